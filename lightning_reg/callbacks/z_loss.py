"""z-loss as a callback: which heads, when, how strong. The penalty is `losses.z_loss`."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights, Regularizer, check_hidden_fired
from lightning_reg.capture import Targets
from lightning_reg.functional.z_loss import labelled
from lightning_reg.losses import ZLoss
from lightning_reg.schedules import Schedule, TargetController

if TYPE_CHECKING:
    from lightning_reg.engine import Tap


class LogitsRegularizer(Regularizer):
    """A penalty on the logits of each output head, over the positions that have a label.

    Args:
        weight: As for ``Regularizer``.
        labels: Key or index of the batch's labels, of the positions of the logits, or a function of the batch.
        ignore_index: Label of the positions that do not count.
        shift: The loss compares the logits of a token with the label of the next, as Hugging Face does.
        arguments: The others of ``Regularizer``.
    """

    role = "logits"
    loss: Any  # a module of ``lightning_reg.losses`` with a ``tap``

    def __init__(
        self, weight: float, *, labels: Mask = None, ignore_index: int = -100, shift: bool = False, **arguments: Any
    ) -> None:
        super().__init__(weight, **arguments)
        if shift and labels is None:
            raise ValueError("`shift=True` needs `labels`, whose tokens it shifts; give their key in the batch.")
        if isinstance(self.schedule, TargetController) and self.schedule.quantity == "density":
            raise ValueError(
                f"`quantity='density'` is of MLP activations, but {self.name} is about logits; use 'value'."
            )
        self.labels, self.ignore_index, self.shift = labels, ignore_index, shift

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Output heads, the model's own or named by the user."""
        return [(name, self.targets is not None) for name in capture.select_heads(self.targets, model)]

    def see_activations(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, penalty, value)`` of logits (..., classes)."""
        if mask is not None and mask.shape != x.shape[:-1]:
            if x.dim() == 2 and mask.numel() == len(x):
                mask = mask.flatten()  # a head on the tokens of all samples in a row
            elif self.labels is not None:
                raise ValueError(
                    f"`labels={self.labels!r}` and `mask` must be of the positions of the logits, "
                    f"{tuple(x.shape[:-1])}, got {tuple(mask.shape)}. Name another head with `targets=`, or give a "
                    "function of the batch."
                )
        return self.loss.tap(x, mask)

    @override
    def batch_mask(self, batch: Any) -> Tensor | None:
        """Positions that have a label and are valid."""
        mask = super().batch_mask(batch)
        if self.labels is None or batch is None:
            return mask
        counted = labelled(self._batch_labels(batch), ignore_index=self.ignore_index, shift=self.shift)
        if mask is not None and mask.shape != counted.shape:
            raise ValueError(
                f"`mask={self.mask!r}` must have the shape of `labels={self.labels!r}`, {tuple(counted.shape)}, got "
                f"{tuple(mask.shape)}."
            )
        return counted if mask is None else counted & mask

    def _batch_labels(self, batch: Any) -> Tensor:
        try:
            labels = self.labels(batch) if callable(self.labels) else batch[self.labels]
        except (KeyError, IndexError, TypeError) as error:
            keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, dict) else ""
            raise ValueError(
                f"`labels={self.labels!r}` is not in the batch, a {type(batch).__name__}{keys}; give its key, its "
                "index, or a function of the batch."
            ) from error
        if not isinstance(labels, Tensor):
            raise ValueError(f"`labels={self.labels!r}` must select a tensor, got {type(labels).__name__}.")
        return labels

    @override
    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Register with the engine of ``model``; ``total_steps`` are those of the whole training."""
        if self.labels is not None and getattr(model, "_trainer", None) is None:
            raise ValueError(
                f"`labels={self.labels!r}` are part of the Trainer's batch, which a hand-written loop does not show: "
                f"add `losses.{type(self.loss).__name__}` of logits and labels to the loss instead, or leave `labels` "
                "out to count every position."
            )
        super().attach(model, total_steps)

    def check_fired(self, taps: "list[Tap]") -> None:
        """Every head must have run."""
        check_hidden_fired(self.name, taps)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"ignore_index": self.ignore_index, "shift": self.shift}

    @override
    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        return {**super().hyperparameters(), "labels": str(self.labels)}


class ZLossRegularizer(LogitsRegularizer):
    """Keep output logits from drifting, by the squared logarithm of the softmax's normaliser.

    The penalty is the mean over sites of the mean over valid positions of ``logsumexp(logits)^2``, in float32 whatever
    the precision of the model, before the loss sees the logits.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        labels: Key or index of the batch's labels, of the positions of the logits, or a function of the batch; only
            positions whose label is not ``ignore_index`` count. All count when left out.
        ignore_index: Label of the positions that do not count.
        shift: The loss compares the logits of a token with the label of the next, as Hugging Face does.
        mask: Key or index of the batch's valid positions, or a function of the batch; not shifted.
        targets: Modules whose output are logits; the model's own heads when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single heads, as for ``Regularizer``.
        allow_unused: Accept heads that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    def __init__(
        self,
        weight: float = 1e-4,
        *,
        labels: Mask = None,
        ignore_index: int = -100,
        shift: bool = False,
        mask: Mask = None,
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        allow_unused: bool = False,
        name: str = "z_loss",
    ) -> None:
        super().__init__(
            weight, labels=labels, ignore_index=ignore_index, shift=shift, mask=mask, targets=targets,
            schedule=schedule, layer_weights=layer_weights, allow_unused=allow_unused, name=name,
        )  # fmt: skip
        self.loss = ZLoss(ignore_index=ignore_index, shift=shift)
