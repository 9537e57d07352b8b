"""LayerNorm Scaling as a callback. The mechanism is `lightning_reg.norm_scaling`."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_reg import capture, norm_scaling
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.callbacks.surgery import Surgery
from lightning_reg.capture import Targets


class LayerNormScaling(Surgery):
    """Multiplies the outputs of the norms of layer l by ``1 / sqrt(l)``, in training and evaluation.

    Layers are counted from 1 in the longest stack of equal blocks; every LayerNorm and RMSNorm in a block is scaled,
    except those of queries and keys, and the final norm is not. The scaling stays when the fit ends, because the
    weights were trained with it; checkpoints keep their plain keys and hold a record of it. A Trainer with this
    callback puts it in place before it validates, tests or predicts, ``lightning_reg.norm_scaling`` does so without
    one: ``load_layer_norm_scaling(model, checkpoint)``. ``fold_layer_norm_scaling`` leaves a plain model,
    ``remove_layer_norm_scaling`` takes it away. Post-norm blocks are refused, at the latest in the first step.

    Args:
        targets: Norms, or modules that hold them, as for ``Regularizer``; those of the longest stack of equal blocks
            when left out.
        offset: Layers before the first of the stack, >= 0.
    """

    record_key = "norm_scaling"

    def __init__(self, *, targets: Targets = None, offset: int = 0) -> None:
        super().__init__()
        self.targets, self.offset = plain_targets(targets), norm_scaling.check_offset(offset)
        self._probe: norm_scaling.Probe | None = None
        self._probed = False

    @override
    def operate(self, model: nn.Module) -> list[str]:
        """Scale."""
        return norm_scaling.apply_layer_norm_scaling(model, targets=self.targets, offset=self.offset)

    @override
    def undo(self, model: nn.Module, names: list[str]) -> None:
        """Stop scaling."""
        norm_scaling.remove_layer_norm_scaling(model, names)

    @override
    def record(self, model: nn.Module) -> Mapping[str, Any]:
        """Numbers of the layers by norm."""
        return norm_scaling.norm_scaling_record(model)

    @override
    def repeat(self, model: nn.Module, record: Mapping[str, Any]) -> list[str]:
        """Scale as a record says.

        Raises:
            ValueError: If the arguments of the callback say otherwise.
        """
        current = norm_scaling.norm_scaling_record(model)
        different = [name for name in {**record, **current} if record and record.get(name) != current.get(name)]
        if different:
            self.undo(model, self._changed)
            raise ValueError(
                f"the checkpoint was trained with {different[0]!r} as layer {record.get(different[0])}, but `targets` "
                f"and `offset` of LayerNormScaling make it layer {current.get(different[0])}: set them as in that "
                "training, or load only the weights to start a new one."
            )
        return []

    @override
    def describe(self, name: str) -> str:
        """The factor of the first norm."""
        return "norms divided by the square root of their layer's number"

    # --- first step ---

    def _watch(self, model: nn.Module) -> None:
        if not self._probed and not any(capture.is_compiled(module) for module in model.modules()):
            self._probe = norm_scaling.Probe(model)
        self._probed = True

    def _watched(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.close()
            probe.check()

    @override
    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Scale, and watch the first step."""
        super().attach(model, total_steps)
        self._probed = False
        self._watch(model)

    @override
    def after_step(self, model: nn.Module) -> None:
        """Check the first step; from here on the weights belong to the scaling."""
        self._watched()
        super().after_step(model)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run, and scale what exists by now."""
        self._probed = False
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scale: here the model exists, however it was built, and the checkpoint is loaded."""
        super().on_fit_start(trainer, pl_module)
        for logger in trainer.loggers:
            arguments = {"targets": describe_targets(self.targets), "offset": self.offset}
            logger.log_hyperparams({f"reg/layer_norm_scaling/{key}": value for key, value in arguments.items()})

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the first step."""
        self._watch(pl_module)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the first step, before anything is trained."""
        self._watched()

    @override
    def _forget(self) -> None:
        super()._forget()
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint."""
        return self._generate_state_key(targets=str(describe_targets(self.targets)))
