"""What a training step is given in the GPU benchmarks: regularizers of this library, or the usual way to get the same.

``ARMS`` holds both; an ``Addition`` is one of them on a model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.benchmarks import usual
from lightning_reg import regularize
from lightning_reg.callbacks import (
    ActivationDensityRegularizer,
    AttentionEntropyRegularizer,
    PredictionEntropyRegularizer,
    QKClip,
    RegMonitor,
    Regularizer,
    SigmaReparam,
    StabilityMonitor,
    ZLossRegularizer,
)
from lightning_reg.engine import Engine

Expected = Literal["usual", "plain", "decomposition", "sample", "clip"]

NONE = "none"
USUAL = "/usual"  # ends the name of the usual way of an arm
TRAINER = "trainer"  # the baseline of the arms that need a Trainer
ENTROPY_WEIGHT, DENSITY_WEIGHT, Z_WEIGHT, EPSILON = 0.1, 0.1, 1e-4, 1e-3
QUERY_FRACTION = 1 / 8
THRESHOLD = 100.0  # of QK-clip: nothing reaches it, the work is done all the same


class Addition:
    """Nothing: a training step as it is. ``weight`` is a factor on the weights of the penalties."""

    def __init__(self, model: nn.Module, weight: float = 1.0) -> None:
        self.model = model

    def add(self, loss: Tensor) -> Tensor:
        """What is differentiated in place of ``loss``."""
        return loss

    def after_step(self) -> None:
        """Called after an optimizer step."""

    def scale(self, factor: float) -> None:
        """Multiply the weights of the penalties."""

    def resume(self) -> None:
        """Called before a block of steps."""

    def pause(self) -> None:
        """Called after a block of steps: nothing is left that another model could notice."""

    def close(self) -> None:
        """Leave the model."""


class Regularized(Addition):
    """Callbacks of this library in a hand-written loop."""

    def __init__(self, model: nn.Module, callbacks: list[Any]) -> None:
        super().__init__(model)
        self.callbacks = callbacks
        self._regularizers = regularize(model, callbacks).__enter__()

    def add(self, loss: Tensor) -> Tensor:
        """The loss with penalties."""
        return self._regularizers.add(loss)

    def scale(self, factor: float) -> None:
        """Multiply the weights of the penalties, which compiled code does not contain."""
        for callback in self.callbacks:
            if isinstance(callback, Regularizer):
                callback.weight *= factor
                callback.update_strength(0, None)

    def resume(self) -> None:
        """Watch attention again."""
        Engine.of(self.model).begin()

    def pause(self) -> None:
        """Give torch's attention back."""
        Engine.of(self.model).disarm()

    def close(self) -> None:
        """Leave the model as it was."""
        self._regularizers.__exit__(None, None, None)


class Usual(Addition):
    """Hooks on materialised tensors, and torch's spectral norm."""

    def __init__(self, model: nn.Module, weight: float, parts: tuple[str, ...]) -> None:
        super().__init__(model)
        self.terms = usual.Terms()
        if "entropy" in parts:
            usual.add_entropy(model, self.terms, weight * ENTROPY_WEIGHT)
        if "density" in parts:
            usual.add_density(model, self.terms, weight * DENSITY_WEIGHT, EPSILON)
        if "z_loss" in parts:
            usual.add_z_loss(model, self.terms, weight * Z_WEIGHT)
        if "prediction_entropy" in parts:
            usual.add_prediction_entropy(model, self.terms, weight * ENTROPY_WEIGHT)
        if "sigma" in parts:
            usual.add_spectral_norm(model)

    def add(self, loss: Tensor) -> Tensor:
        """The loss with penalties."""
        return self.terms.add(loss)


class UsualClip(Addition):
    """QK-clip by scores computed beside attention."""

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__(model)
        self._clip = usual.Clip(model, threshold)
        self._watching: AbstractContextManager = nullcontext()

    def after_step(self) -> None:
        """Clip."""
        self._clip.clip()

    def resume(self) -> None:
        """Watch attention."""
        self._watching = self._clip.watching()
        self._watching.__enter__()

    def pause(self) -> None:
        """Give torch's attention back."""
        self._watching.__exit__(None, None, None)


@dataclass(frozen=True)
class Arm:
    """One thing to be measured against a baseline.

    Args:
        name: In commands and in the CSV.
        label: In tables.
        attach: Puts it on a model with a factor on its weights; None where it needs a Trainer.
        expected: What its gradients, or the weights after its step, are compared with before it is timed; None for
            the usual ways, which are what others are compared with.
        parts: Usual terms that have the same gradient.
        callbacks: Those for a Trainer.
    """

    name: str
    label: str
    attach: Callable[[nn.Module, float], Addition] | None = Addition
    expected: Expected | None = None
    parts: tuple[str, ...] = ()
    callbacks: Callable[[], list[Any]] = list

    @property
    def baseline(self) -> str:
        """What its ratios are of."""
        return NONE if self.attach else TRAINER

    @property
    def ours(self) -> bool:
        """Whether it is this library's."""
        return self.expected is not None


def entropy(weight: float, **arguments: Any) -> AttentionEntropyRegularizer:
    """Attention entropy of all layers, maximised."""
    return AttentionEntropyRegularizer(weight * ENTROPY_WEIGHT, **arguments)


def density(weight: float) -> ActivationDensityRegularizer:
    """Density of all MLPs."""
    return ActivationDensityRegularizer(weight * DENSITY_WEIGHT, epsilon=EPSILON)


def _arms() -> Iterator[Arm]:
    yield Arm(NONE, "nothing")
    for name, label, callbacks, expected, parts in (
        ("entropy", "attention entropy", lambda w: [entropy(w)], "usual", ("entropy",)),
        ("entropy_eighth", "attention entropy of 1/8 of the queries",
         lambda w: [entropy(w, query_fraction=QUERY_FRACTION)], "sample", ("entropy",)),
        ("sigma", "sigma-Reparam", lambda w: [SigmaReparam()], "decomposition", ()),
        ("density", "density loss", lambda w: [density(w)], "usual", ("density",)),
        ("all", "all three", lambda w: [SigmaReparam(), entropy(w), density(w)], "decomposition",
         ("entropy", "density")),
        ("qk_clip", "QK-clip", lambda w: [QKClip(threshold=THRESHOLD)], "clip", ()),
        ("z_loss", "z-loss", lambda w: [ZLossRegularizer(w * Z_WEIGHT)], "usual", ("z_loss",)),
        ("prediction_entropy", "prediction entropy", lambda w: [PredictionEntropyRegularizer(w * ENTROPY_WEIGHT)],
         "usual", ("prediction_entropy",)),
    ):  # fmt: skip
        yield Arm(name, label, _regularized(callbacks), expected, parts)  # type: ignore[arg-type]
    usual_ways: dict[str, tuple[str, ...]] = {
        "entropy": ("entropy",), "sigma": ("sigma",), "density": ("density",), "all": ("entropy", "density", "sigma"),
        "z_loss": ("z_loss",), "prediction_entropy": ("prediction_entropy",),
    }  # fmt: skip
    for name, usual_parts in usual_ways.items():
        yield Arm(name + USUAL, f"{name.replace('_', ' ')}, the usual way", _usual(usual_parts))
    yield Arm("qk_clip" + USUAL, "QK-clip, the usual way", lambda model, weight: UsualClip(model, THRESHOLD))
    yield Arm(TRAINER, "Trainer without callbacks", None)
    yield Arm("monitor", "`RegMonitor`", None, "plain", callbacks=lambda: [RegMonitor()])
    yield Arm("stability", "`StabilityMonitor`", None, "plain", callbacks=lambda: [StabilityMonitor()])


def _regularized(callbacks: Callable[[float], list[Any]]) -> Callable[[nn.Module, float], Addition]:
    return lambda model, weight: Regularized(model, callbacks(weight))


def _usual(parts: tuple[str, ...]) -> Callable[[nn.Module, float], Addition]:
    return lambda model, weight: Usual(model, weight, parts)


ARMS = {arm.name: arm for arm in _arms()}


def suits(arm: Arm, task: Any, mode: str) -> bool:
    """Whether an arm makes sense for a task.

    The bag has no MLP and no queries; materialised QK-clip is written for fused projections, in eager code; what needs
    a Trainer is measured in eager code, because each of its blocks starts a fit, which compiles anew.
    """
    name = arm.name.removesuffix(USUAL)
    if task.kind == "bag":
        return name in (NONE, "entropy", TRAINER, "monitor")
    if name == "qk_clip" and arm.name.endswith(USUAL):
        return task.kind in ("vit", "gpt2") and mode == "eager"
    return arm.attach is not None or mode == "eager"


def autocast(device: torch.device, enabled: bool = True) -> AbstractContextManager:
    """bf16 where ``enabled``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
