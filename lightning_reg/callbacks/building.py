"""For callbacks whose parameters must exist before the optimizer does, however late the model is built."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden


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
