"""ProSparse as a callback: substitute the activation, then penalise it progressively."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_reg import activations
from lightning_reg.activations import Activation
from lightning_reg.callbacks.control import DensityProbe, refuse_smooth
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import HiddenRegularizer
from lightning_reg.callbacks.sparse_activations import SubstitutesActivations
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine
from lightning_reg.losses import ActivationDensityLoss, ActivationHoyerLoss, ActivationL1Loss
from lightning_reg.schedules import ProSparse

Penalty = Literal["l1", "hoyer", "density"]
_LOSSES = {"l1": ActivationL1Loss, "hoyer": ActivationHoyerLoss, "density": ActivationDensityLoss}


class ProgressiveSparsity(SubstitutesActivations, HiddenRegularizer):
    """ProSparse (Song et al. 2024): activations that are exactly 0, by a penalty that rises in stages.

    The activation of each MLP becomes ReLU when training starts. The penalty, on the *input* of each down-projection,
    follows ``schedules.ProSparse``. The substitutes stay in the model, see ``ActivationSubstitution``; afterwards
    ``lightning_reg.calibration.calibrate_fatrelu`` shifts their thresholds. Logs ``reg/<name>/density``, the share of
    activations that are not 0 (after dropout, which zeroes some more).

    Args:
        stages: ``(end, weight)`` of each stage, as for ``schedules.ProSparse``: ends increasing, all optimizer steps
            (int) or all fractions of training (float); a leading ``(end, 0.0)`` lets the model get used to ReLU.
            ``schedules.prosparse_stages`` gives the published ones in this library's units.
        penalty: ``"l1"`` as in the paper, ``"hoyer"`` or ``"density"``.
        substitute: Activation to train with, as for ``ActivationSubstitution``; None keeps the model's own.
        targets: Down-projections; all MLPs when left out.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[float]],
        *,
        penalty: Penalty = "l1",
        substitute: Activation | None = "relu",
        targets: Targets = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "progressive_sparsity",
    ) -> None:
        if penalty not in get_args(Penalty):
            raise ValueError(f"`penalty` must be one of {', '.join(map(repr, _LOSSES))}, got {penalty!r}.")
        super().__init__(
            1.0, targets=targets, schedule=ProSparse(stages), mask=mask, allow_unused=allow_unused, name=name
        )
        if substitute is not None:
            activations.make_activation(substitute)
        self.substitute, self.penalty, self.loss = substitute, penalty, _LOSSES[penalty]()
        self._probe = DensityProbe(self, self.targets, threshold=0.0)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"penalty": self.penalty, "substitute": str(self.substitute)}

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        stages = zip(self.schedule.ends, self.schedule.peaks)  # type: ignore[union-attr]
        return {**super().hyperparameters(), "stages": str(list(stages))}

    @override
    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Substitute, register with the engine, and watch the density at the steps that are logged."""
        super().attach(model, total_steps)
        engine = Engine.of(model)
        if self._probe not in engine.taps:
            self._probe = DensityProbe(self, self.targets, threshold=0.0)
            engine.register(model, self._probe)

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Down-projections of MLPs whose activation can be exactly 0.

        Raises:
            ValueError: If none is found, or an activation is smooth, so that no density would ever be exact.
        """
        refuse_smooth(self.targets, model)
        return super().find_sites(model)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the strength of this step, and whether its density is counted."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._probe.awake = trainer._logger_connector.should_update_logs

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the density beside the penalty."""
        density = self._probe.measured(Engine.of(pl_module)) if self._probe.awake else None
        if density is not None:
            pl_module.log(f"reg/{self.name}/density", density, prog_bar=True, batch_size=1)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the length of the schedule with that of the training."""
        super().on_train_start(trainer, pl_module)
        schedule, total = self.schedule, trainer.estimated_stepping_batches
        assert isinstance(schedule, ProSparse)
        if isinstance(schedule.ends[-1], int) and 0 <= total < schedule.ends[-1]:
            reached = schedule(int(total))
            rank_zero_warn(
                f"`stages` of {self.name} end at step {schedule.ends[-1]}, but the training has {int(total)}: the "
                f"weight will reach {reached:g} instead of {schedule.peaks[-1]:g}. Train longer, or give the ends as "
                "fractions of the training."
            )
