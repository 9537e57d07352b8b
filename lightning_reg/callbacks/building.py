"""For callbacks whose parameters must exist before the optimizer does, however late the model is built."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

_PER_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_values", "_last_lr")


class BuildHooks:
    """Calls a function after ``setup`` and ``configure_model`` of a LightningModule, where it has them."""

    def __init__(self) -> None:
        self._patched: dict[str, tuple[Any, Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._patched)

    def install(self, pl_module: pl.LightningModule, then: Callable[[], Any]) -> None:
        """Patch the instance until ``remove``."""
        for hook in ("setup", "configure_model"):
            if is_overridden(hook, pl_module):
                self._patch(pl_module, hook, then)

    def _patch(self, pl_module: pl.LightningModule, hook: str, then: Callable[[], Any]) -> None:
        before, original = pl_module.__dict__.get(hook), getattr(pl_module, hook)

        # no functools.wraps: Lightning would look through it, and not call it where only a callback overrides
        def build(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._patched.get(hook, (None, None))[1] is build:
                then()
            return result

        setattr(pl_module, hook, build)
        self._patched[hook] = (before, build)

    def remove(self, pl_module: Any) -> None:
        """Put the hooks back; no-op when nothing is patched."""
        for hook, (before, patch) in self._patched.items():
            if pl_module.__dict__.get(hook) is patch:
                delattr(pl_module, hook)
                if before is not None:
                    setattr(pl_module, hook, before)
        self._patched = {}


def check_before_averaging(trainer: pl.Trainer, callback: Callback, what: str) -> None:
    """Raise a ValueError if a weight-averaging callback comes before, and would copy a model without ``what``."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
            name = type(callback).__name__
            raise ValueError(
                f"{type(other).__name__} comes before {name} in `callbacks`, so it would average a model without the "
                f"{what}. Put {name} first."
            )


def takes_groups(optimizer: Any) -> bool:
    """Whether an optimizer takes further parameter groups."""
    return not isinstance(optimizer, torch.optim.LBFGS) and type(optimizer).__name__ != "ZeroRedundancyOptimizer"


def nested_schedulers(scheduler: Any) -> Iterator[Any]:
    """A learning rate scheduler and those it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", []):
        yield from nested_schedulers(inner)


def extend_schedules(scheduler: Any, index: int, groups: int) -> None:
    """Give the new last group the schedule of group ``index``."""
    for attribute in _PER_GROUP:
        values = getattr(scheduler, attribute, None)
        if isinstance(values, list) and len(values) == groups:
            setattr(scheduler, attribute, [*values, values[index]])
