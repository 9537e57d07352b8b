"""QK-clip as a callback: measured in the forward, applied after the optimizer step.

The factors are `lightning_reg.functional.qk_clip`, the parts of an attention `lightning_reg.attention`.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_reg import capture, reparam
from lightning_reg.attention import (
    NOTHING_FOUND,
    Attention,
    Projection,
    check_heads,
    check_not_tied,
    find_attentions,
)
from lightning_reg.callbacks.observer import Observer, Prepares
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.callbacks.softcap import refuse_capped
from lightning_reg.capture import AttentionCall, Targets
from lightning_reg.engine import Engine
from lightning_reg.functional.attention_entropy import MASKED_BIAS
from lightning_reg.functional.attention_logits import max_attention_logit, max_attention_logit_from_scores
from lightning_reg.functional.qk_clip import check_alpha, check_threshold, qk_clip_factors

if TYPE_CHECKING:
    from lightning_reg.engine import Tap


class _Layer:
    """An attention, and the largest ``|logit|`` of each of its heads since the last step."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        weight = attention.query.weight.parameter
        assert weight is not None
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.seen = torch.zeros(attention.heads, dtype=dtype, device=weight.device)
        self.checked = False  # it was seen once
        self.last: tuple[Tensor, Tensor] | None = None  # what the last step saw, and its factors, by query head

    @torch.no_grad()
    def see(self, largest: Tensor) -> None:
        """Take the maximum with that of another forward."""
        if self.seen.device != largest.device:
            self.seen = self.seen.to(largest.device)
        # in place: compiled code sees one tensor in every step
        self.seen.clamp_min_(largest.to(self.seen.dtype))

    def alike(self) -> tuple:
        """Layers of which this is equal get their factors in one computation."""
        return self.attention.groups, self.seen.dtype, self.seen.device

    def scale(self, query: Tensor, key: Tensor) -> None:
        """Multiply weights and biases by factors of each query head and each key head."""
        for projection, factors in ((self.attention.query, query), (self.attention.key, key)):
            for piece in projection.pieces:
                heads = piece.by_head(projection.heads, projection.head_dim)
                shape = [projection.heads if axis == piece.axis else 1 for axis in range(heads.dim())]
                heads.mul_(factors.view(shape))


class QKClip(Observer, Callback):
    """Shrinks the query and key weights of heads whose logits exceed a threshold: QK-clip (Kimi K2).

    Measures the largest ``|logit|`` of each head over all forwards of an optimizer step, exactly and over all
    processes, and after the step multiplies weights and biases of queries and keys of the heads that exceed it, so that
    the same batch would reach the threshold. Heads below it keep their bits. Nothing is added to the model, and nothing
    waits for the device. On a GPU, without dropout or a float mask, attention is computed by the kernel that gives the
    largest logits with its output. The bias of a float mask (ALiBi, T5) is no part of what is measured, unless the
    model computes its own softmax, where the two cannot be told apart.

    With several optimizers (manual optimization) an attention is clipped after the step of the one that trains its
    query weights. Optimizers that keep copies of the weights in another precision undo it.

    Args:
        threshold: Largest ``|logit|`` allowed, > 0; ``math.inf`` clips nothing.
        alpha: Share of the factor that the queries take, in [0, 1].
        targets: Modules that compute attention, or any of their parents; all attentions when left out.
        every: Optimizer steps between clips; only the step that clips is measured.
        heads: Number of query heads, where the model does not say it.
        allow_unused: Accept attentions that do not run in the first step.
        name: Name in logs and checkpoints; two instances in one Trainer need two names and disjoint targets.

    Attributes:
        enabled: While False it neither measures nor clips; a ``Guard`` switches it.

    Logs ``reg/<name>/max_logit``, the largest of the last measured step before the clip, and ``reg/<name>/clipped``,
    the share of heads that it shrank.
    """

    role = "attention_scores"
    sizes = True
    _model: nn.Module | None
    _layers: list[_Layer]
    _of_site: dict[str, int]  # layer by name of the module that computes attention
    _step_hooks: dict[int, Any]  # after a step, by optimizer of the Trainer
    _attempted: list[_Layer]  # whose optimizer was to step, and has not yet
    _steps: int  # of a hand-written loop

    def __init__(
        self,
        *,
        threshold: float = 100.0,
        alpha: float = 0.5,
        targets: Targets = None,
        every: int = 1,
        heads: int | None = None,
        allow_unused: bool = False,
        name: str = "qk_clip",
    ) -> None:
        super().__init__()
        self.threshold, self.alpha = check_threshold(threshold), check_alpha(alpha)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be an integer >= 1, got {every!r}: optimizer steps between clips.")
        check_heads(heads)
        if not name:
            raise ValueError("`name` must not be empty; it names the logged values and the state in checkpoints.")
        self.targets, self.every, self.heads, self.name = plain_targets(targets), every, heads, name
        self.enabled = True
        self.accepts_unused = allow_unused
        self.allow_unused = True  # the engine asks in the first step, which may not be measured: see `_check_seen`
        self._forget()

    # --- what it looks at ---

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """The attentions, and modules below them in whose forward they may be computed."""
        candidates = capture.attention_candidates(model)
        own = {layer.attention.name: index for index, layer in enumerate(self._layers)}
        for name in dict.fromkeys([*own, *candidates]):
            above = [top for top in own if capture.at_or_below(name, top)]
            if above:
                self._of_site[name] = own[max(above, key=len)]
        return [(name, self.targets is not None and name in own) for name in self._of_site]

    def see_scores(self, call: AttentionCall, mask: Tensor | None) -> tuple[None, Tensor]:
        """Keep the largest ``|logit|`` of each head."""
        layer = self._layers[self._of_site[call.site]]
        largest = _largest_by_head(call.detach(), layer.attention)
        layer.see(largest)
        return None, largest

    def check_fired(self, taps: "list[Tap]") -> None:
        """Checked where the first measured step ends."""

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        plain = {name: getattr(self, name) for name in ("threshold", "alpha", "every", "heads")}
        return {**plain, "targets": describe_targets(self.targets)}

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Find the attentions and register with the engine of ``model``. Twice is once.

        Raises:
            ValueError: If an attention is found that cannot be clipped, or none.
            RuntimeError: If a weight is sharded.
        """
        if self._model is model and self in Engine.of(model).taps:
            return
        attentions = find_attentions(model, targets=self.targets, heads=self.heads)
        if not attentions:
            raise ValueError(NOTHING_FOUND.format("QKClip"))
        for attention in attentions:
            _check_clippable(attention)
        check_not_tied(attentions)
        self._forget()
        self._model, self._layers = model, [_Layer(attention) for attention in attentions]
        try:
            Engine.of(model).register(model, self)
        except BaseException:
            self._forget()
            raise
        self._wake(0, 1)

    def after_step(self, model: nn.Module) -> None:
        """Clip, after an optimizer step of a hand-written loop."""
        if self._model is None:
            return
        self._clip(self._layers)
        self._steps += 1
        self._wake(self._steps, 1)

    def detach(self, model: nn.Module) -> None:
        """Stop; the weights stay clipped. No-op when nothing is attached."""
        self._release()

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, also after a crashed fit."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise RuntimeError(
                f"QKClip does not work with {type(trainer.strategy).__name__}: it scales the weights of whole heads, "
                "and a process has only a part of them. Use one device or `DDPStrategy`."
            )
        self._release()
        if (engine := Engine.find(pl_module)) is not None:
            engine.close()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach: here the model exists, however it was built."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, Prepares):
                callback.prepare(pl_module)
        self.attach(pl_module)
        if self.threshold < math.inf:
            refuse_capped(pl_module, self.threshold, f"`threshold` of {self.name}")
        self._check_overlap(callbacks)
        Engine.of(pl_module).wrap(pl_module)
        names = ", ".join(layer.attention.label for layer in self._layers[:3]) + (", ..." * (len(self._layers) > 3))
        rank_zero_info(f"QKClip watches {sum(len(x.seen) for x in self._layers)} heads of attention in {names}.")
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether the step of this batch is measured."""
        manual = not pl_module.automatic_optimization
        self._wake(trainer.global_step, max(1, len(trainer.optimizers)) if manual else 1)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """See to it that the step of this optimizer is followed by a clip."""
        if self._model is None:
            return
        self._attempted += self._trained_by(optimizer)
        if id(optimizer) not in self._step_hooks:
            self._step_hooks[id(optimizer)] = optimizer.register_step_post_hook(self._after_optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Unhook until the next batch, and log."""
        Engine.of(pl_module).disarm()
        for layer in self._attempted:  # the gradient scaler skipped the step: the weights are those from before
            layer.seen.zero_()
        self._attempted = []
        if trainer._logger_connector.should_update_logs and not trainer.barebones:
            self._log(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it is: clipped."""
        if (engine := Engine.find(pl_module)) is not None:
            engine.close()
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model: Lightning does not call ``teardown`` after a crash."""
        self.teardown(trainer, pl_module, "fit")

    # --- what happens at a step ---

    def _wake(self, step: int, optimizers: int) -> None:
        """Watch the forwards of a batch after whose steps a multiple of ``every`` has come."""
        self.awake = self.enabled and (step + optimizers) // self.every > step // self.every

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        layers = self._trained_by(optimizer)
        self._attempted = [layer for layer in self._attempted if layer not in layers]
        self._clip(layers)

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> list[_Layer]:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [layer for layer in self._layers if id(layer.attention.query.weight.parameter) in owned]

    @torch.no_grad()
    def _clip(self, layers: list[_Layer]) -> None:
        """Scale what was measured; without a copy to the host, also where nothing exceeds the threshold."""
        if not self.awake or not layers:
            return
        self._check_seen([layer for layer in layers if not layer.checked])
        maxima = _over_processes([layer.seen for layer in layers])
        # a step has little else to launch: the arithmetic of a few numbers is done once for all layers
        for members in _grouped(layers):
            largest = torch.cat([maxima[layers.index(layer)] for layer in members])
            groups = members[0].attention.groups
            query, key = qk_clip_factors(largest, self.threshold, self.alpha, groups)
            together = query * key.repeat_interleave(groups)
            heads = [layer.attention.heads for layer in members]
            key_heads = [count // groups for count in heads]
            parts = (largest.split(heads), together.split(heads), query.split(heads), key.split(key_heads))
            for layer, seen, factors, for_query, for_key in zip(members, *parts, strict=True):
                if self.threshold < math.inf:
                    layer.scale(for_query, for_key)
                layer.last = seen, factors
        torch._foreach_zero_([layer.seen for layer in layers])

    def _check_seen(self, layers: list[_Layer]) -> None:
        """In the first measured step of a layer: its attention must have been computed where it can be seen."""
        if not layers or self._model is None:
            return
        taps = Engine.of(self._model).taps[self]
        fired = {self._of_site[tap.site.name] for tap in taps if tap.fired or tap.records}
        idle = [layer.attention.label for layer in layers if self._layers.index(layer) not in fired]
        if idle and not (self.accepts_unused and fired):
            raise RuntimeError(
                f"`{self.name}`: no attention was seen in {', '.join(idle)} in the first measured step. It sees "
                "`F.scaled_dot_product_attention` and softmax, in modules in training mode: with Hugging Face use "
                "`attn_implementation='sdpa'`. Leave them out with `targets=`, or set `allow_unused=True` if they run "
                "in some steps only."
            )
        for layer in layers:
            layer.checked = True

    def _log(self, pl_module: pl.LightningModule) -> None:
        last = [layer.last for layer in self._layers if layer.last is not None]
        if not last:
            return
        device = last[0][0].device
        largest = torch.cat([seen.to(device) for seen, _ in last]).max()
        clipped = torch.cat([(factors < 1).to(device) for _, factors in last]).float().mean()
        pl_module.log(f"reg/{self.name}/max_logit", largest.float(), batch_size=1, rank_zero_only=False)
        pl_module.log(f"reg/{self.name}/clipped", clipped, batch_size=1, rank_zero_only=False)

    # --- how it starts and ends ---

    def _check_overlap(self, callbacks: Iterable[Callback]) -> None:
        own = {id(layer.attention.module): layer.attention.label for layer in self._layers}
        for other in callbacks:
            for layer in other._layers if isinstance(other, QKClip) and other is not self else ():
                if id(layer.attention.module) in own:
                    raise ValueError(
                        f"`targets` of {self.name!r} and {other.name!r} both select {layer.attention.label!r}, which "  # type: ignore[attr-defined]
                        "would be clipped twice. Leave it out of one of them."
                    )

    def _release(self) -> None:
        for hook in self._step_hooks.values():
            hook.remove()
        self._forget()

    def _forget(self) -> None:
        self._model, self._layers, self._of_site, self._attempted = None, [], {}, []
        self._step_hooks, self._steps = {}, 0
        self.awake = False

    # --- checkpoints ---

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint. Lightning asks for it at every hook."""
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Whether it acts; everything else is in the weights."""
        return {"enabled": self.enabled}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of ``state_dict``."""
        self.enabled = state_dict["enabled"]


def _largest_by_head(call: AttentionCall, attention: Attention) -> Tensor:
    """Largest ``|logit|`` of each head, (heads,), over batch, keys and queries that are no padding."""
    if call.largest is not None:
        rows = call.largest
    elif call.scores is not None:
        rows = max_attention_logit_from_scores(call.scores, dim=call.dim)
    else:
        assert call.query is not None
        assert call.key is not None
        mask = call.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask > MASKED_BIAS  # clipping does not scale a bias
        rows = max_attention_logit(
            call.query, call.key, scale=call.scale, is_causal=call.is_causal, attn_mask=mask, enable_gqa=call.enable_gqa
        )
    if (valid := call.valid_rows()) is not None:
        rows = rows.masked_fill(~valid, 0.0)
    heads = attention.heads
    if rows.dim() == 2 and rows.shape[0] % heads == 0:  # torch's own layout, (batch * heads, queries)
        rows = rows.unflatten(0, (-1, heads))
    if rows.dim() < 3 or rows.shape[-2] != heads:
        if heads > 1:
            shape, where = call.describe()
            raise ValueError(
                f"the {heads} heads of {attention.label!r} are not on the axis before the queries in its {where}, of "
                f"shape {shape}. Give their number with `heads=`, or leave the module out with `targets=`."
            )
        rows = rows.unsqueeze(-2)
    return rows.amax([axis for axis in range(rows.dim()) if axis != rows.dim() - 2])


def _grouped(layers: list[_Layer]) -> list[list[_Layer]]:
    """Layers that are ``alike``, in order."""
    found: dict[tuple, list[_Layer]] = {}
    for layer in layers:
        found.setdefault(layer.alike(), []).append(layer)
    return list(found.values())


def _over_processes(maxima: list[Tensor]) -> list[Tensor]:
    """Maxima over all processes: one reduction for everything; a value that is not finite stays so on each."""
    device = maxima[0].device
    packed = torch.cat([largest.to(device) for largest in maxima])
    packed = torch.where(packed.isnan(), float("inf"), packed)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(packed, torch.distributed.ReduceOp.MAX)
    parts = packed.split([len(largest) for largest in maxima])
    return [part.to(largest.device, largest.dtype) for part, largest in zip(parts, maxima, strict=True)]


def _check_clippable(attention: Attention) -> None:
    leave_out = "Leave it out with `targets=`"
    if attention.norm is not None:
        raise ValueError(
            f"{attention.label!r} normalises its queries and keys ({attention.norm!r}), so that scaling their weights "
            f"changes nothing. {leave_out}, or remove QKClip: QK-norm bounds the logits by itself."
        )
    for projection in (attention.query, attention.key):
        parameter = projection.weight.parameter
        owner = projection.weight.owner
        if parametrize.is_parametrized(owner, projection.weight.tensor) or _has_old_norm(projection):
            raise ValueError(
                f"the weight of {projection.name!r} is parametrized (sigma-Reparam, weight norm or another), so that "
                f"scaling it changes nothing or something else. {leave_out} here, or of the other."
            )
        if projection.module is not owner:
            raise ValueError(
                f"the weight of {projection.name!r} is wrapped ({type(projection.module).__name__}, as of LoRA): what "
                f"adds to its outputs would not be scaled. {leave_out}, or merge the adapter."
            )
        if reason := reparam._unsupported(owner, projection.weight.tensor, parameter):
            if parameter is not None and reparam.is_sharded(parameter):
                continue
            raise ValueError(f"the weight of {projection.name!r} {reason}. {leave_out}.")
        if parameter is not None and not parameter.requires_grad:
            raise ValueError(
                f"the weight of {projection.name!r} is frozen, and clipping would change it. {leave_out}, or train it."
            )
    for piece in (*attention.query.pieces, *attention.key.pieces):
        if piece.parameter is not None and reparam.is_sharded(piece.parameter):
            raise RuntimeError(
                f"the weight of {attention.label!r} is sharded; QKClip scales whole heads. Train with one device or "
                "`DDPStrategy`."
            )


def _has_old_norm(projection: Projection) -> bool:
    weight = projection.weight
    return f"{weight.tensor}_g" in weight.owner._parameters or f"{weight.tensor}_orig" in weight.owner._parameters
