"""Closes the loop between a quantity and the weight of its regularizer. The law is ``schedules.TargetController``."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_reg import activations, capture
from lightning_reg.callbacks.observer import Observer
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine
from lightning_reg.functional.activation_density import exact_density
from lightning_reg.schedules import TargetController

if TYPE_CHECKING:
    from lightning_reg.callbacks.regularizer import Regularizer


class Control:
    """Feeds a ``TargetController`` with what the model does, and keeps its place in the training.

    Args:
        regularizer: Whose weight is controlled.
        controller: Its schedule.
    """

    def __init__(self, regularizer: "Regularizer", controller: TargetController) -> None:
        self.regularizer, self.controller = regularizer, controller
        if controller.quantity == "density" and regularizer.role == "attention":
            raise ValueError(
                f"`quantity='density'` is of MLP activations, but {regularizer.name} is about attention; use 'value'."
            )
        self.steps = self.updated = 0  # optimizer steps: so far, and at the last update
        self._measured: list[Tensor] = []  # since the last update
        self._restored: dict[str, Any] | None = None
        self._probe: Observer | None = None

    @property
    def density(self) -> float | None:
        """Moving average of the density, where that is the quantity."""
        return self.controller.average if self.controller.quantity == "density" else None

    def begin(self, model: nn.Module) -> None:
        """Start a training, or continue that of a checkpoint; watch the density, if that is the quantity."""
        self.steps, self.updated, self._measured = 0, 0, []
        self.controller.reset()
        if self._restored is not None:
            state, self._restored = self._restored, None
            self.steps = self.updated = state["steps"]
            self.controller.load_state_dict(state)
        if self.controller.quantity == "density":
            if self.controller.threshold == 0:
                refuse_smooth(self._targets(), model)
            self._probe = DensityProbe(self.regularizer, self._targets(), self.controller.threshold)
            Engine.of(model).register(model, self._probe)

    def _targets(self) -> Targets:
        return self.regularizer.targets if self.regularizer.role == "mlp_hidden" else None

    def observe(self, model: nn.Module, logged: Mapping[str, Any] | None = None) -> None:
        """Keep what the last batch gave, on its device."""
        engine, quantity = Engine.of(model), self.controller.quantity
        if quantity == "density":
            assert self._probe is not None
            values = [value for tap in engine.taps[self._probe] for _, value in tap.records]
            self._measured += [torch.stack([value.float() for value in values]).mean()] if values else []
        elif quantity == "value":
            total = engine.totals.get(self.regularizer.name)
            self._measured += [] if total is None else [total[0]]
        elif (number := (logged or {}).get(quantity)) is not None:
            self._measured.append(number.detach().float())

    def check_measured(self, logged: Mapping[str, Any]) -> None:
        """Raise a RuntimeError if a whole epoch has not brought the quantity."""
        if self.controller.average is None and not self._measured:
            raise RuntimeError(
                f"`quantity={self.controller.quantity!r}` of the controller of {self.regularizer.name} was never "
                f"logged; logged are {', '.join(sorted(logged)) or 'no numbers'}. 'density' and 'value' need no log."
            )

    def step(self, steps: int, reduce: Callable[..., Any] = lambda value, **_: value) -> None:
        """After optimizer step number ``steps``: update the controller when it is due."""
        self.steps = steps
        if not self._measured or steps - self.updated < self.controller.every:
            return
        device = self._measured[-1].device
        mean = reduce(torch.stack([value.to(device) for value in self._measured]).mean(), reduce_op="mean")
        self.updated, self._measured = steps, []
        raises = self.regularizer.raises_value and self.controller.quantity == "value"
        self.controller.update(float(mean), steps, self.regularizer.total_steps, raises=raises)

    def state_dict(self) -> dict[str, Any]:
        """State of the controller and its place in the training."""
        return {"steps": self.updated, **self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Keep for ``begin``."""
        self._restored = state


class DensityProbe(Observer):
    """Measures the share of activations that are not 0 where a regularizer acts; leaves no penalty."""

    role = "mlp_hidden"
    allow_unused = True

    def __init__(self, regularizer: "Regularizer", targets: Targets, threshold: float) -> None:
        self.name, self.mask = f"{regularizer.name}/density", regularizer.mask
        self.targets, self.threshold = targets, threshold

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Down-projections of the MLPs."""
        return [(mlp.down, self.targets is not None) for mlp in capture.select_mlps(self.targets, model)]

    def see_activations(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None, Tensor]:
        """``x`` and its density."""
        valid = None if mask is None else mask.bool()
        return x, None, exact_density(x, threshold=self.threshold, mask=valid)


def refuse_smooth(targets: Targets, model: nn.Module) -> None:
    """Raise a ValueError if an MLP's activation is smooth, so that its density would never be exact."""
    for mlp in capture.select_mlps(targets, model):
        found = [(path, capture.attribute(model, path)) for path in mlp.activations]
        if found and all(activations.gives_zeros(activation) is False for _, activation in found):
            path, activation = found[0]
            raise ValueError(
                f"the activation {path!r} ({activations.describe(activation)}) is never exactly 0, so its density "
                "stays 1. Substitute it (`ActivationSubstitution('relu')`, `ProgressiveSparsity(substitute='relu')`), "
                "penalise what enters it (`ActivationL1Regularizer(weight, role='mlp_pre_activation')`), or count with "
                "a `threshold`."
            )
