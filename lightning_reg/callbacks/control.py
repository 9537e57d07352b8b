"""Closes the loop between a quantity and the weight of its regularizer. The law is ``schedules.TargetController``."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
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
        self._sum: Tensor | float = 0.0  # measured since the last update; a number until then, which needs no device
        self._count = 0
        self._restored: dict[str, Any] | None = None
        self._probe: DensityProbe | None = None

    @property
    def density(self) -> float | None:
        """Moving average of the density, where that is the quantity."""
        return self.controller.average if self.controller.quantity == "density" else None

    @property
    def needs_logged(self) -> bool:
        """Whether the quantity is a number that something else logs."""
        return self.controller.quantity not in ("density", "value")

    def begin(self, model: nn.Module) -> None:
        """Start a training, or continue that of a checkpoint; watch the density, if that is the quantity."""
        engine = Engine.of(model)
        if any(getattr(other, "schedule", None) is self.controller for other in engine.regularizers):
            raise ValueError(
                f"the controller of {self.regularizer.name} has another regularizer too: make two of them."
            )
        self.steps = self.updated = 0
        self._forget()
        self.controller.reset()
        if self._restored is not None:
            state, self._restored = self._restored, None
            self.steps, self.updated = state["steps"], state["updated"]
            self._sum, self._count = state["sum"], state["count"]
            self.controller.load_state_dict(state)
        if self.controller.quantity == "density":
            targets = self._targets(model)
            if self.controller.threshold == 0:
                refuse_smooth(targets, model)
            self._probe = DensityProbe(self.regularizer, targets, self.controller.threshold)
            engine.register(model, self._probe)

    def _forget(self) -> None:
        self._sum, self._count = 0.0, 0

    def _targets(self, model: nn.Module) -> Targets:
        """Down-projections of the MLPs that are regularized."""
        if self.regularizer.role == "mlp_hidden" or self.regularizer.targets is None:
            return self.regularizer.targets
        sites = {name for name, _ in self.regularizer.find_sites(model)}
        downs = {mlp.down for mlp in capture.find_mlps(model) if capture.pre_activation_site(model, mlp) in sites}
        if not downs:
            raise ValueError(
                f"`targets` of {self.regularizer.name} belong to no MLP that was recognised, so there is no density to "
                "control. Control the `quantity='value'`."
            )
        return lambda name, module: name in downs

    def observe(self, model: nn.Module, logged: Mapping[str, Any] | None = None) -> None:
        """Keep what the last batch gave, on its device."""
        engine, quantity = Engine.of(model), self.controller.quantity
        value: Tensor | None = None
        if quantity == "density":
            assert self._probe is not None
            value = self._probe.measured(engine)
        elif quantity == "value":
            value = engine.totals[self.regularizer.name][0] if self.regularizer.name in engine.totals else None
        elif logged is None:
            raise ValueError(f"`quantity={quantity!r}` is logged by a Trainer; without one use 'density' or 'value'.")
        else:
            value = logged.get(quantity)
        if value is not None:
            self._sum, self._count = value.detach().double() + self._sum, self._count + 1

    def check_measured(self, logged: Mapping[str, Any]) -> None:
        """Raise a RuntimeError if a whole epoch has not brought the quantity."""
        if self.controller.average is None and not self._count and self.controller.quantity not in logged:
            raise RuntimeError(
                f"`quantity={self.controller.quantity!r}` of the controller of {self.regularizer.name} was never "
                f"logged; logged are {', '.join(sorted(logged)) or 'no numbers'}. 'density' and 'value' need no log."
            )

    def step(self, steps: int, reduce: Callable[..., Any] = lambda value, **_: value) -> None:
        """After optimizer step number ``steps``: update the controller when it is due, on all processes or none."""
        self.steps = steps
        if steps - self.updated < self.controller.every:
            return
        total = torch.as_tensor(self._sum, dtype=torch.float64)
        both = torch.stack([total, torch.full_like(total, self._count)])
        total, count = reduce(both, reduce_op="sum").tolist()
        self.updated = steps
        self._forget()
        if not count:
            return
        if self.density is None and self.controller.threshold == 0 and self._probe is not None:
            self._refuse_dense(total / count)
        raises = self.regularizer.raises_value and self.controller.quantity == "value"
        self.controller.update(total / count, steps, self.regularizer.total_steps, raises=raises)

    def _refuse_dense(self, density: float) -> None:
        if density > 0.999:
            raise RuntimeError(
                f"the density of {self.regularizer.name} is {density:.4f} in the first step: no activation is exactly "
                "0, so its MLPs have a smooth activation. Train them with ReLU, or count with a `threshold`."
            )

    def warn_if_missed(self) -> None:
        """Warn when the quantity has not met its target."""
        controller = self.controller
        if controller.average is None or abs(controller.average / controller.target - 1) <= 0.1:
            return
        limits = {controller.minimum: "its `minimum`", controller.maximum: "its `maximum`"}
        rank_zero_warn(
            f"{self.regularizer.name} missed its target: {controller.quantity} is {controller.average:.4g} instead of "
            f"{controller.target:g} after {self.steps} steps, with the factor at "
            f"{limits.get(controller.factor, f'{controller.factor:.3g}')}. Train longer, give it a longer `ramp` if it "
            "fell too far, or a shorter one if it has not arrived."
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the controller, what it has measured since its last update, and its place in the training."""
        own = {"steps": self.steps, "updated": self.updated, "sum": float(self._sum), "count": self._count}
        return {**own, **self.controller.state_dict()}

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

    def measured(self, engine: Engine) -> Tensor | None:
        """Mean over sites and calls of the last forward; None if there was none."""
        values = [value.float() for tap in engine.taps[self] for _, value in tap.records]
        return torch.stack(values).mean() if values else None

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
                "stays 1. Substitute it: add `ActivationSubstitution('relu')` to the callbacks, or leave `substitute` "
                "of `ProgressiveSparsity` at 'relu'. Or keep it, and penalise what enters it with a fixed weight: "
                "`ActivationL1Regularizer(weight, role='mlp_pre_activation')` without a controller."
            )
