"""Attention entropy as a callback: which attention, when, how strong. The objective is `losses.attention_entropy`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_reg import capture
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights, Regularizer
from lightning_reg.capture import Targets
from lightning_reg.losses import AttentionEntropyLoss
from lightning_reg.losses.attention_entropy import Level, Objective
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from lightning_reg.engine import Tap


class AttentionEntropyRegularizer(Regularizer):
    """Maximise, minimise or bound the entropy of attention, wherever the model computes it.

    The penalty is the mean over sites of the mean over (batch, heads, valid queries), taken before dropout. Attention
    is caught in ``F.scaled_dot_product_attention`` (also inside ``nn.MultiheadAttention``) and in softmax; padded
    queries and rows without a choice of keys are left out. With ``objective="maximize"``, ``normalize=False`` and a
    ``Cosine`` schedule this is AEM.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        objective: ``maximize``, ``minimize``, ``floor``, ``ceiling``, ``band`` or ``target``.
        normalize: Divide by log(visible keys), so that the entropy is in [0, 1]; otherwise nats.
        bound: Threshold of ``floor``, ``ceiling`` and ``target``; a pair for ``band``.
        level: Where a non-linear objective applies: to each ``query``, ``head`` mean or ``site`` mean.
        top_k: Entropy of the ``top_k`` largest scores only.
        targets: The modules in whose forward the attention is computed, or any of their parents; all when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single layers, as for ``Regularizer``.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch; limits the queries
            that count.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    role = "attention"

    def __init__(
        self,
        weight: float,
        *,
        objective: Objective = "maximize",
        normalize: bool = True,
        bound: float | Sequence[float] | None = None,
        level: Level = "query",
        top_k: int | None = None,
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "attention_entropy",
    ) -> None:
        super().__init__(
            weight,
            targets=targets,
            schedule=schedule,
            layer_weights=layer_weights,
            mask=mask,
            allow_unused=allow_unused,
            name=name,
        )
        self.loss = AttentionEntropyLoss(objective, normalize=normalize, bound=bound, level=level, top_k=top_k)
        self.top_k, self.raises_value = top_k, objective in ("maximize", "floor")

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Modules that may compute attention, at or below the targets."""
        candidates = capture.attention_candidates(model)
        selected = capture.explicit_targets(self.targets, model)
        if selected is None:
            return [(name, False) for name in candidates]
        below = [
            name for name in candidates if any(not top or name == top or name.startswith(f"{top}.") for top in selected)
        ]
        if not below:
            raise ValueError(
                f"`targets` select {', '.join(sorted(selected))}, where no attention can be computed: name the module "
                "whose forward calls `F.scaled_dot_product_attention` or `softmax`, or one of its parents."
            )
        return [(name, name in selected) for name in below]

    def see_attention(self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(penalty, value)`` of attention rows."""
        return self.loss.reduce(entropy, visible, valid)

    def check_fired(self, taps: "list[Tap]") -> None:
        """At least one site must have computed attention, below each module the user named."""
        if not any(tap.fired for tap in taps):
            raise RuntimeError(
                f"`{self.name}` caught no attention in the first training step. It sees "
                "`F.scaled_dot_product_attention` and softmax, in modules that are in training mode and reached by "
                "gradient. Flash-attention, FlexAttention and Nystrom products are not seen: with Hugging Face use "
                "`attn_implementation='sdpa'`, and for a softmax in an unusual place name its module with `targets=`. "
                "A compiled block inside a reentrant checkpoint is not seen either: use `use_reentrant=False`."
            )
        idle = [tap.site.label for tap in taps if tap.site.explicit and not _fired_at_or_below(tap, taps)]
        if idle:
            raise RuntimeError(
                f"`{self.name}`: no attention was computed in {', '.join(idle)} in the first training step. Leave it "
                "out of `targets`, or set `allow_unused=True` if it runs in some steps only."
            )

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity and the direction."""
        loss = self.loss
        bound = list(loss.bound) if isinstance(loss.bound, tuple) else loss.bound
        return {
            "objective": loss.objective, "normalize": loss.normalize, "bound": bound, "level": loss.level,
            "top_k": loss.top_k,
        }  # fmt: skip


def _fired_at_or_below(tap: "Tap", taps: "list[Tap]") -> bool:
    top = tap.site.name
    return any(
        other.fired and (not top or other.site.name == top or other.site.name.startswith(f"{top}.")) for other in taps
    )
