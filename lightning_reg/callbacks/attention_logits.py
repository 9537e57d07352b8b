"""Attention logits as a callback: which attention, when, how strong. The penalty is `losses.attention_logits`."""

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights, Regularizer, check_attention_fired
from lightning_reg.callbacks.softcap import refuse_capped
from lightning_reg.capture import AttentionCall, Targets
from lightning_reg.functional.attention_logits import logit_rows, logit_rows_from_scores
from lightning_reg.losses import AttentionLogitLoss
from lightning_reg.losses.attention_logits import Objective
from lightning_reg.schedules import Schedule, TargetController

if TYPE_CHECKING:
    from lightning_reg.engine import Tap


class AttentionLogitRegularizer(Regularizer):
    """Keep attention logits from growing, wherever the model computes attention.

    The penalty is the mean over sites of the mean over (batch, heads, valid queries) of
    ``max(0, max_j |s_j| - bound)^2``, or of ``logsumexp(s)^2``. Attention is caught as by
    ``AttentionEntropyRegularizer``; padded queries and rows that see no key are left out. Unlike the entropy's, its
    gradient does not vanish on a collapsed head.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        objective: ``hinge``, on the largest magnitude of each row, or ``square``, attention's z-loss.
        bound: The largest logit that ``hinge`` leaves alone.
        targets: The modules in whose forward the attention is computed, or any of their parents; all when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single layers, as for ``Regularizer``.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch; limits the queries
            that count.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    role = "attention_scores"

    def __init__(
        self,
        weight: float,
        *,
        objective: Objective = "hinge",
        bound: float = 50.0,
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "attention_logits",
    ) -> None:
        super().__init__(
            weight, targets=targets, schedule=schedule, layer_weights=layer_weights, mask=mask,
            allow_unused=allow_unused, name=name,
        )  # fmt: skip
        if isinstance(schedule, TargetController) and schedule.quantity == "density":
            raise ValueError(f"`quantity='density'` is of MLP activations, but {name} is about attention; use 'value'.")
        self.loss = AttentionLogitLoss(objective, bound=bound)

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Modules that may compute attention, at or below the targets."""
        return capture.select_attention(self.targets, model)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach, where a penalty can act."""
        super().on_fit_start(trainer, pl_module)
        if self.loss.objective == "hinge" and self.weight:
            refuse_capped(pl_module, self.loss.bound, f"`bound` of {self.name}")

    def see_scores(self, call: AttentionCall, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(penalty, value)`` of one attention."""
        statistic = self.loss.statistic
        if call.query is None or call.key is None:
            assert call.scores is not None
            rows, visible = logit_rows_from_scores(call.scores, statistic=statistic, dim=call.dim)
            return self.loss.reduce(rows, visible, call.valid_rows(mask))
        rows, seen = logit_rows(
            call.query, call.key, call.attn_mask, statistic=statistic, is_causal=call.is_causal, scale=call.scale,
            enable_gqa=call.enable_gqa,
        )  # fmt: skip
        return self.loss.reduce(rows, seen, call.valid_rows(mask))

    def check_fired(self, taps: "list[Tap]") -> None:
        """At least one site must have computed attention, below each module the user named."""
        check_attention_fired(self.name, taps)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        bound = self.loss.bound if self.loss.objective == "hinge" else None
        return {"objective": self.loss.objective, "bound": bound}
