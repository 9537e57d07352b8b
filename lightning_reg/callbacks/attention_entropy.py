"""Attention entropy as a callback: which attention, when, how strong. The objective is `losses.attention_entropy`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights, Regularizer, check_attention_fired
from lightning_reg.capture import Targets
from lightning_reg.losses import AttentionEntropyLoss
from lightning_reg.losses.attention_entropy import Level, Objective
from lightning_reg.mil import MilAdapter, MilReader, as_adapter
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from lightning_reg.engine import Tap


class AttentionEntropyRegularizer(Regularizer):
    """Maximise, minimise or bound the entropy of attention, wherever the model computes it.

    The penalty is the mean over sites of the mean over (batch, heads, valid queries), taken before dropout. Attention
    is caught in ``F.scaled_dot_product_attention`` (also inside ``nn.MultiheadAttention``) and in softmax; padded
    queries and rows without a choice of keys are left out. With ``objective="maximize"``, ``normalize=False`` and a
    ``Cosine`` schedule this is AEM.

    With ``adapter`` the attention is read out of what a multiple-instance model returns instead, and the penalty is the
    mean over calls of the mean over (bags, branches); bags of one valid instance are left out.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        objective: ``maximize``, ``minimize``, ``floor``, ``ceiling``, ``band`` or ``target``.
        normalize: Divide by log(visible keys), so that the entropy is in [0, 1]; otherwise nats.
        bound: Threshold of ``floor``, ``ceiling`` and ``target``; a pair for ``band``.
        level: Where a non-linear objective applies: to each ``query``, ``head`` mean or ``site`` mean.
        top_k: Entropy of the ``top_k`` largest scores only.
        query_fraction: Share of the queries that is looked at, in (0, 1]: evenly spread, others in each batch, each as
            often as another. Saves where the entropy is computed beside the attention (large attention on a CPU,
            dropout on a GPU), and nothing where one node gives both. Where the model calls torch's attention;
            elsewhere all are.
        targets: The modules in whose forward the attention is computed, or any of their parents; all when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single layers, as for ``Regularizer``.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch; limits the queries
            that count. With ``adapter`` the valid instances (bags, instances), 1 = valid.
        adapter: Layout of what a multiple-instance model returns: ``clam``, ``abmil``, ``dsmil``, ``dsmil_aem``,
            ``acmil``, ``aem_abmil``, ``aem_mha``, ``torchmil``, ``trident``, ``mil_lab``, or a
            ``lightning_reg.mil.MilAdapter``. ``targets`` then names that model; the only child with parameters, or a
            model without a Trainer itself, when left out.
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
        query_fraction: float = 1.0,
        adapter: str | MilAdapter | None = None,
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
        self.query_fraction = check_fraction(query_fraction)
        if self.query_fraction < 1 and adapter is not None:
            raise ValueError(
                f"`query_fraction={query_fraction}` has no meaning with `adapter`, whose attention the model has "
                "computed already; leave it out."
            )
        self.top_k, self.raises_value = top_k, objective in ("maximize", "floor")
        self.adapter = None if adapter is None else as_adapter(adapter)
        self.role = "attention" if self.adapter is None else "module"
        self.reader: MilReader | None = None

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Modules that may compute attention, at or below the targets; with an adapter the targets themselves."""
        if self.adapter is not None:
            models = find_mil_models(self.targets, model)
            self.reader = MilReader(self.adapter, single=len(models) == 1)
            return [(name, True) for name in models]
        return capture.select_attention(self.targets, model)

    def see_attention(self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(penalty, value)`` of attention rows."""
        return self.loss.reduce(entropy, visible, valid)

    def see_output(self, output: Any, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """``(penalty, value)`` of what a multiple-instance model returns; no penalty for bags of one instance."""
        assert self.reader is not None
        entropy, visible = self.reader.read(output, mask, self.top_k)
        if torch.is_grad_enabled() and not (entropy.requires_grad or self.allow_unused):
            raise RuntimeError(
                f"`{self.name}`: the attention that the adapter reads has no gradient: the model detaches it before it "
                "returns it, or nothing before it is trained. Return it attached, leave `adapter` out to catch it "
                "where it is computed, or set `allow_unused=True` to accept it."
            )
        penalty, value = self.loss.reduce(entropy, visible, visible > 1)
        return penalty if self.reader.has_choice else None, value

    @override
    def as_mask(self, mask: Tensor) -> Tensor:
        """With an adapter as it is: the adapter checks it."""
        return super().as_mask(mask) if self.adapter is None else mask

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that bags have instances to choose from."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.reader is not None and self.reader.sizes is not None and not self.reader.had_choice:
            raise RuntimeError(
                f"`{self.name}`: every bag of the epoch had one instance, so nothing was regularized. If bags have "
                f"more, `instance_axis` {self.reader.adapter.instance_axis} is another axis: set "
                "`MilAdapter(instance_axis=...)`."
            )

    def check_fired(self, taps: "list[Tap]") -> None:
        """At least one site must have computed attention, below each module the user named."""
        if self.adapter is not None:
            return check_mil_fired(self.name, taps)
        return check_attention_fired(self.name, taps)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity and the direction."""
        loss = self.loss
        bound = list(loss.bound) if isinstance(loss.bound, tuple) else loss.bound
        return {
            "objective": loss.objective, "normalize": loss.normalize, "bound": bound, "level": loss.level,
            "top_k": loss.top_k, "adapter": None if self.adapter is None else self.adapter.describe(),
        }  # fmt: skip


def check_fraction(fraction: float) -> float:
    """Return ``query_fraction`` or raise a ValueError."""
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"`query_fraction` must be in (0, 1], got {fraction!r}; 1/8 looks at every eighth query.")
    return float(fraction)


def find_mil_models(targets: Targets, model: nn.Module) -> list[str]:
    """Names of the models whose output an adapter reads.

    Raises:
        ValueError: If they are not named and it is not clear which they are.
    """
    if targets is not None:
        selected = capture.explicit_targets(targets, model) or set()
        return [name for name in capture.named_modules(model) if name in selected]
    if not isinstance(model, pl.LightningModule):
        return [""]
    children = {name: module for name, module in capture.named_modules(model).items() if name and "." not in name}
    trained = [name for name, module in children.items() if any(True for _ in module.parameters())]
    if len(trained) != 1:
        found = f"it has {', '.join(trained)}" if trained else "none of its children has parameters"
        raise ValueError(
            "`adapter` reads what the multiple-instance model returns, and which module of "
            f"{type(model).__name__} that is, is not clear: {found}. Name it with `targets=`; `targets=''` is "
            f"{type(model).__name__} itself."
        )
    return trained


def check_mil_fired(name: str, taps: "list[Tap]") -> None:
    """Raise if a model did not return."""
    idle = [tap.site.label for tap in taps if not tap.fired]
    if idle:
        raise RuntimeError(
            f"`{name}`: {', '.join(idle)} returned nothing, with gradient and in training mode, in the first training "
            "step. Call it as `model(x)` and not `model.forward(x)`, which passes hooks by; name another with "
            "`targets=`, or set `allow_unused=True` if it runs in some steps only."
        )
