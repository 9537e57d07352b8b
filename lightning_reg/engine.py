"""Collects the penalties of all regularizers of a model and joins them to the loss.

One engine for each model. While a training batch is in flight its sites are hooked; each time the model computes there,
the regularizers' taps see it (``capture.py``) and leave a penalty. ``join`` adds ``weight * mean(penalties)`` to the
loss, and autograd does the rest: gradient accumulation, loss scaling, clipping and data parallelism see one loss.

Activation checkpointing needs care. Its non-reentrant kind records the forward as usual and repeats it in backward,
where the taps must run again but not collect. Its reentrant kind runs the forward without gradient, inside an autograd
Function: the penalty's value counts, but its gradient can only be injected when backward repeats the forward with
gradient, scaled by the gradient that the joined loss received.
"""

import sys
import weakref
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_reg import capture
from lightning_reg.functional._scores import MASKED_BIAS, sampled_rows, shift_of
from lightning_reg.functional.attention_entropy import (
    attention_path,
    attention_tap,
    entropy_tap,
    is_fused,
    scores_tap,
)

if TYPE_CHECKING:
    from lightning_reg.callbacks.observer import Observer

_engines: "weakref.WeakKeyDictionary[nn.Module, Engine]" = weakref.WeakKeyDictionary()


class Mode(Enum):
    """What a tap does with the call it sees."""

    SKIP = 0  # not ours: evaluation, a teacher, an inner checkpoint being repeated
    COLLECT = 1  # forward with gradient
    DEFER = 2  # forward of a reentrant checkpoint: value now, gradient when it is repeated
    REPEAT = 3  # a checkpointed forward repeated in backward


class Tap:
    """One regularizer at one site, with what it saw since the last ``join``."""

    def __init__(self, site: capture.Site, regularizer: "Observer") -> None:
        self.site, self.regularizer = site, regularizer
        self.records: list[tuple[Tensor | None, Tensor]] = []  # (penalty, value) of each call
        self.factor = regularizer.layer_factor(site.name)  # on the penalty of this layer
        self.live = True  # the weight is not 0
        self.awake = True  # the site is shown to it at this step
        self.dropped = False  # never shown to it again
        self.mask: Tensor | None = None  # valid tokens of the batch
        self.fired = False
        self.shape, self.method = "", ""
        self.deferred = 0  # calls whose gradient is still to be injected by the next join's backward
        self.expected = self.injected = self.collected = 0  # the same for the join whose backward runs


class SharedEntropy:
    """Taps of a site that share one entropy of its attention."""

    def __init__(self, taps: list[Tap]) -> None:
        self.taps = taps
        self.top_k, self.query_fraction = taps[0].regularizer.top_k, taps[0].regularizer.query_fraction
        self.live = self.awake = True  # whether any of them is, at this step

    @staticmethod
    def among(taps: list[Tap]) -> "list[SharedEntropy]":
        """The taps of a site, one group for each entropy."""
        alike: dict[tuple[int, float], list[Tap]] = {}
        for tap in taps:
            alike.setdefault((tap.regularizer.top_k or 0, tap.regularizer.query_fraction), []).append(tap)
        return [SharedEntropy(alike[kind]) for kind in sorted(alike)]


class _Join(torch.autograd.Function):
    """``loss + penalty``; the backward records the gradient that repeated forwards inject."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, penalty: Tensor, engine: "Engine") -> Tensor:
        ctx.engine, ctx.like = engine, penalty
        return loss + penalty.to(loss.dtype).reshape(loss.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        for_penalty = grad.reshape(ctx.like.shape).to(ctx.like.dtype)
        ctx.engine.gradient = for_penalty.detach()
        ctx.engine.enter_backward()
        return grad, for_penalty, None


class _Inject(torch.autograd.Function):
    """``tensor`` unchanged; the backward gives ``penalty`` the gradient it would have had from the joined loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, penalty: Tensor, engine: "Engine", coefficient: Tensor) -> Tensor:
        ctx.engine, ctx.coefficient, ctx.like = engine, coefficient, penalty
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor, None, None]:
        # the coefficient stays on the CPU: a number to the device, no copy that waits
        scale = ctx.engine.gradient.to(ctx.like.device) * ctx.coefficient
        return grad, scale.to(ctx.like.dtype), None, None


class _Through(torch.autograd.Function):
    """``tensor`` unchanged; the backward also visits ``beside``, with gradient 0."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, beside: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


class Engine:
    """Shared by all regularizers of one model.

    Args:
        model: The LightningModule or plain module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.regularizers: list[Observer] = []  # those that leave penalties
        self.taps: dict[Observer, list[Tap]] = {}
        self.sites: dict[str, tuple[nn.Module, capture.Site]] = {}
        self.scope: list[nn.Module] = []
        self.collecting = False
        self.gradient = torch.zeros(())
        self.counts: dict[tuple, Tensor] = {}  # visible keys that positions decide, for layers of the same sizes
        self.totals: dict[str, tuple[Tensor, Tensor]] = {}  # last (value, weighted penalty) by regularizer
        self.layers: dict[str, dict[str, Tensor]] = {}  # last value by regularizer and site
        self.shift = torch.zeros(())  # in [0, 1): where the sampled queries of this batch lie
        self._handles: list[Any] = []
        self._wrapped: dict[str, Any] = {}
        self._announced = False
        self._compiled = False  # a site runs in compiled code

    def __deepcopy__(self, memo: dict) -> None:
        return None

    # --- regularizers ---

    @staticmethod
    def of(model: nn.Module) -> "Engine":
        """The engine of a model, made when there is none."""
        if model not in _engines:
            _engines[model] = Engine(model)
        return _engines[model]

    @staticmethod
    def find(model: nn.Module) -> "Engine | None":
        """The engine of a model, if it has one."""
        return _engines.get(model)

    def register(self, model: nn.Module, regularizer: "Observer") -> None:
        """Find the targets of a regularizer and give each a tap. Registering twice is registering once.

        Raises:
            ValueError: If nothing matches, or another regularizer has the same name.
        """
        if regularizer in self.taps:
            return
        if any(other.name == regularizer.name for other in self.taps):
            raise ValueError(
                f"`name` must differ between regularizers of one model, got {regularizer.name!r} twice; "
                f"set `name=` of one {type(regularizer).__name__}."
            )
        found = regularizer.find_sites(model)
        regularizer.check_layers([name for name, _ in found])
        modules = capture.named_modules(model)
        if regularizer.penalizes:
            self.regularizers.append(regularizer)
        self.taps[regularizer] = [self._tap(name, modules[name], regularizer, explicit) for name, explicit in found]
        if any(capture.is_compiled(module) for module in model.modules()):
            # code compiled before the hooks existed ignores them (pytorch#117758)
            torch.compiler.reset()
            self._compiled = True

    def _tap(self, name: str, module: nn.Module, regularizer: "Observer", explicit: bool) -> Tap:
        if name not in self.sites:
            self.sites[name] = module, capture.Site(name, module, self)
            module.__dict__[capture.SITE] = self.sites[name][1]
        site = self.sites[name][1]
        site.explicit |= explicit
        tap = Tap(site, regularizer)
        site.taps(regularizer.role).append(tap)
        site.entropies = SharedEntropy.among(site.attention)
        return tap

    def close(self) -> None:
        """Leave the model as it was. No-op when already closed."""
        self.disarm()
        for name, original in self._wrapped.items():
            if original is None:
                self.model.__dict__.pop(name, None)
            else:
                self.model.__dict__[name] = original
        self._wrapped.clear()
        for module, site in self.sites.values():
            site.engine = None
            module.__dict__.pop(capture.SITE, None)
        self.sites.clear()
        self.taps.clear()
        self.regularizers.clear()
        _engines.pop(self.model, None)

    # --- around a training step ---

    def wrap(self, pl_module: Any) -> None:
        """Wrap ``training_step``, and ``manual_backward`` under manual optimization. No-op when wrapped."""
        if self._wrapped:
            return
        training_step, manual_backward = pl_module.training_step, pl_module.manual_backward
        automatic = pl_module.automatic_optimization

        @wraps(training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            self.move(pl_module.trainer.fit_loop.epoch_loop.total_batch_idx)
            self.begin(args[0] if args else kwargs.get("batch"))
            try:
                output = training_step(*args, **kwargs)
            finally:
                self.collecting = False
            if automatic:
                return self._join_output(output)
            self.check_first_step(joined=any(tap.fired for taps in self.taps.values() for tap in taps))
            return output

        @wraps(manual_backward)
        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            manual_backward(self.join(loss), *args, **kwargs)
            self.after_backward()

        self._wrapped["training_step"] = pl_module.__dict__.get("training_step")
        pl_module.training_step = step
        if not automatic:
            self._wrapped["manual_backward"] = pl_module.__dict__.get("manual_backward")
            pl_module.manual_backward = backward

    def arm(self) -> None:
        """Hook the sites and watch attention. No-op when armed, or when no site is shown to anything."""
        if self._handles:
            return
        # compiled code does not notice that hooks come and go: there they stay, and ask whether a tap is awake
        sites = [entry for entry in self.sites.values() if self._compiled or entry[1].awake]
        self._handles = capture.attach_hooks(sites)
        if any(site.attention or site.scores for _, site in sites):
            capture.watch_attention(self)

    def disarm(self) -> None:
        """Remove hooks and patches; nothing of ours is left for validation. No-op when not armed."""
        self.collecting = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        capture.unwatch_attention(self)
        self.scope.clear()
        self.counts.clear()

    def begin(self, batch: Any = None) -> None:
        """Start collecting for a forward."""
        self.scope.clear()
        self.totals.clear()
        self.counts.clear()
        for _, site in self.sites.values():
            site.awake = False
        for regularizer, taps in self.taps.items():
            live, awake = regularizer.live, regularizer.awake
            mask = regularizer.batch_mask(batch) if awake else None
            for tap in taps:
                tap.records.clear()
                tap.live, tap.mask, tap.deferred = live, mask, 0
                tap.awake = awake and not tap.dropped
                tap.site.awake |= tap.awake
        for _, site in self.sites.values():
            for shared in site.entropies:
                shared.live = any(tap.live for tap in shared.taps)
                shared.awake = any(tap.awake for tap in shared.taps)
        self.arm()
        self.collecting = True

    def move(self, number: int) -> None:
        """Look at other queries, where not all are; those of a batch must stay until its backward is over."""
        if any(regularizer.query_fraction < 1 for regularizer in self.taps):
            device = next((parameter.device for parameter in self.model.parameters()), self.shift.device)
            self.shift = self.shift.to(device).fill_(shift_of(number))

    def join(self, loss: Tensor) -> Tensor:
        """``loss`` plus every weighted penalty collected since the last join.

        Raises:
            RuntimeError: If a tap never fired or a penalty has no gradient; names the site and the remedy.
        """
        if loss.numel() != 1:
            raise ValueError(f"the loss must have one element, got shape {tuple(loss.shape)}; reduce it first.")
        if loss.is_cuda and torch.cuda.is_current_stream_capturing():
            self._check_capture()
        total = None
        for regularizer, taps in self.taps.items():
            weighted = self._total(regularizer, taps, loss.device) if regularizer.penalizes else None
            if weighted is not None:
                total = weighted if total is None else total + weighted
            for tap in taps:
                tap.fired = tap.fired or bool(tap.records)
                if regularizer.penalizes:
                    tap.records.clear()
        return loss if total is None else _Join.apply(loss, total, self)

    def _total(self, regularizer: "Observer", taps: list[Tap], device: torch.device) -> Tensor | None:
        penalties, values, layers = [], [], {}
        for tap in taps:
            tap.collected, tap.expected = len(tap.records) - tap.deferred, tap.deferred
            tap.injected = tap.deferred = 0
            self._check_gradient(tap)
            penalties += [_times(penalty.to(device), tap.factor) for penalty, _ in tap.records if penalty is not None]
            if tap.records:
                values += [value.to(device) for _, value in tap.records]
                layers[tap.site.label] = tap.records[-1][1]
        if not values:
            return None
        regularizer.coefficient = torch.tensor(regularizer.strength / max(1, len(penalties)))
        weighted = torch.stack(penalties).mean() * regularizer.strength if penalties else None
        shown = torch.zeros((), device=device) if weighted is None else weighted.detach()
        self.totals[regularizer.name] = torch.stack(values).mean(), shown
        self.layers[regularizer.name] = layers
        return weighted

    def _join_output(self, output: Any) -> Any:
        if output is None or (isinstance(output, Mapping) and "loss" not in output):
            return output  # Lightning skips the batch, or raises
        output = {**output, "loss": self.join(output["loss"])} if isinstance(output, Mapping) else self.join(output)
        self.check_first_step()
        return output

    def enter_backward(self) -> None:
        """Let compiled code in a checkpoint do again what it did in forward; what it leaves is not collected."""
        if not self._compiled:
            return
        collecting, self.collecting = self.collecting, True
        kept = [(tap, len(tap.records)) for taps in self.taps.values() for tap in taps]

        def leave() -> None:
            self.collecting = collecting
            for tap, count in kept:
                del tap.records[count:]

        torch.autograd.Variable._execution_engine.queue_callback(leave)  # type: ignore[attr-defined]

    def after_backward(self) -> None:
        """Check that every deferred penalty was injected.

        Raises:
            RuntimeError: If a reentrant checkpoint was not repeated as it ran.
        """
        for taps in self.taps.values():
            for tap in taps:
                if tap.expected != tap.injected:
                    expected, injected, tap.expected = tap.expected, tap.injected, tap.injected
                    raise RuntimeError(
                        f"`{tap.regularizer.name}` at {tap.site.label}: its penalty was seen {expected} times in a "
                        f"forward without gradient but {injected} times in backward, so part of its gradient is lost. "
                        "Use `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`, or leave this module out "
                        "with `targets=`."
                    )

    # --- what passes at a site ---

    def observe_activations(self, site: capture.Site, taps: list[Tap], x: Tensor, place: str) -> Tensor:
        """Show the input or output of ``site`` to its taps of one role; returns the tensor to go on with."""
        mode = self._mode()
        self._note_compiling()
        if mode is Mode.SKIP or not site.awake:
            return x
        for tap in taps:
            if tap.live:
                x, penalty, value = tap.regularizer.see_activations(x, tap.mask)
                (x,) = self._record(mode, tap, (x,), penalty, value)
            elif mode is not Mode.REPEAT and tap.awake:
                with torch.no_grad():
                    _, _, value = tap.regularizer.see_activations(x.detach(), tap.mask)
                self._record(mode, tap, (), None, value)
            if not torch.compiler.is_compiling() and not tap.shape:
                tap.shape, tap.method = _sizes(x), place
        return x

    def observe_attention(
        self, site: capture.Site, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, dropout_p: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Show attention to the taps of ``site``; returns its output."""
        arguments: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        mode = self._mode()
        self._note_compiling()
        if mode is Mode.SKIP or not site.awake:
            return capture.plain_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **arguments)
        query, key = capture.broadcast_leading(query, key, enable_gqa)
        if site.scores:
            query = self._see_call(mode, site, query, False, key=key, attn_mask=attn_mask, **arguments)
        # an additive mask is no part of the scores that are sized
        sized = any(tap.awake and tap.regularizer.sizes for tap in site.scores)
        in_one = sized and (attn_mask is None or attn_mask.dtype == torch.bool)
        entropies = site.entropies
        valid = capture.visible_padding(query, key, attn_mask) if entropies else None
        # what a captured graph reads must be computed in it
        fresh = torch.compiler.is_compiling() or (query.is_cuda and torch.cuda.is_current_stream_capturing())
        counts = None if fresh else self.counts
        last = next((shared for shared in reversed(entropies) if shared.live), None)
        output = largest = None
        for shared in entropies:
            if not shared.live and (mode is Mode.REPEAT or not shared.awake):
                continue
            taps, top_k, fraction = shared.taps, shared.top_k, shared.query_fraction
            rows = None if fraction == 1 else sampled_rows(query.shape[-2], fraction, self.shift.to(query.device))
            if shared is last:
                output, entropy, visible, largest = attention_tap(
                    query, key, value, attn_mask, dropout_p=dropout_p, top_k=top_k, rows=rows, sized=in_one,
                    counts=counts, attention=capture.plain_attention, **arguments,
                )  # fmt: skip
                (output,) = self._see_entropy(mode, taps, (output,), entropy, visible, valid, rows)
            else:
                with torch.set_grad_enabled(shared.live and torch.is_grad_enabled()):
                    q, k, m, entropy, visible = entropy_tap(
                        query, key, attn_mask, top_k=top_k, rows=rows, counts=counts, **arguments
                    )
                if shared.live:
                    query, key, attn_mask = q, k, m
                (query,) = self._see_entropy(mode, taps, (query,), entropy, visible, valid, rows)
            # compiled code must not read what it would then guard
            if torch.compiler.is_compiling() or not taps[0].shape:
                shown = value if shared is last else None
                path = attention_path(query, key, shown, attn_mask, dropout_p, is_causal, top_k)
                for tap in taps:
                    tap.method = f"scaled_dot_product_attention, {path}"
            if not torch.compiler.is_compiling() and not taps[0].shape:
                for tap in taps:
                    tap.shape = f"{_sizes(query)} x {_sizes(key)}"
        if output is None and in_one and is_fused(query, key, value, attn_mask, dropout_p):
            output, *_, largest = attention_tap(query, key, value, attn_mask, sized=True, counts=counts, **arguments)
        if output is None:
            output = capture.plain_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **arguments)
        if sized:
            self._see_call(mode, site, query, True, key=key, attn_mask=attn_mask, largest=largest, **arguments)
        return output

    def observe_scores(self, site: capture.Site, scores: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        """Show attention scores to the taps of ``site``; returns their softmax."""
        mode = self._mode()
        self._note_compiling()
        if mode is Mode.SKIP or not site.awake:
            # not `torch.softmax`, which is watched and would come back here
            return capture.plain_softmax(scores, dim, dtype)
        if site.scores:
            scores = self._see_call(mode, site, scores, query=None, scores=scores, dim=dim)
        square = site.attention and scores.dim() == 4 and scores.shape[-1] == scores.shape[-2] and dim in (-1, 3)
        valid = capture.padding_free(scores.detach() > MASKED_BIAS, scores.shape[-1]) if square else None
        probs: Tensor | None = None
        # the live ones last: the model goes on with the probabilities of the last, joined to its entropy
        for shared in sorted(site.entropies, key=lambda shared: shared.live):
            if not shared.live and (mode is Mode.REPEAT or not shared.awake):
                continue
            taps = shared.taps
            with torch.set_grad_enabled(shared.live and torch.is_grad_enabled()):
                seen, entropy, visible = scores_tap(scores, dim=dim, dtype=dtype, top_k=shared.top_k)
            (seen,) = self._see_entropy(mode, taps, (seen,), entropy, visible, valid)
            if shared.live:
                # an injected gradient needs a way to the loss: keep that of the probabilities left behind
                probs = seen if probs is None else _Through.apply(seen, probs)
            if not torch.compiler.is_compiling() and not taps[0].shape:
                for tap in taps:
                    tap.shape, tap.method = _sizes(scores), f"softmax over axis {dim}"
        return capture.plain_softmax(scores, dim, dtype) if probs is None else probs

    def observe_output(self, site: capture.Site, output: Any) -> Any:
        """Show what a module returns, of any structure, to its taps; returns it."""
        mode = self._mode()
        self._note_compiling()
        if mode is Mode.SKIP or not site.awake:
            return output
        for tap in site.output:
            if tap.live:
                penalty, value = tap.regularizer.see_output(output, tap.mask)
                output = self._record_output(mode, tap, output, penalty, value)
            elif mode is not Mode.REPEAT and tap.awake:
                with torch.no_grad():
                    _, value = tap.regularizer.see_output(output, tap.mask)
                self._record(mode, tap, (), None, value)
            if not torch.compiler.is_compiling() and not tap.shape:
                tap.shape, tap.method = (
                    _sizes(output) if isinstance(output, Tensor) else type(output).__name__,
                    "output",
                )
        return output

    def _record_output(self, mode: Mode, tap: Tap, output: Any, penalty: Tensor | None, value: Tensor) -> Any:
        if mode is not Mode.REPEAT:
            self._record(mode, tap, (), penalty, value)
            return output
        leaves, structure = tree_flatten(output)
        place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad), None)
        if place is None:
            raise RuntimeError(
                f"`{tap.regularizer.name}` at {tap.site.label}: its output, a {type(output).__name__}, holds no tensor "
                "with gradient that can be found, which a reentrant checkpoint needs. Use `use_reentrant=False`."
            )
        (leaves[place],) = self._record(mode, tap, (leaves[place],), penalty, value)
        return tree_unflatten(leaves, structure)

    def _see_call(
        self, mode: Mode, site: capture.Site, tensor: Tensor, sizes: bool | None = None, **arguments: Any
    ) -> Tensor:
        """Show a whole attention to its taps; returns ``tensor``, its queries or scores.

        Args:
            mode: That of the forward.
            site: Where it is.
            tensor: Queries or scores.
            sizes: To taps that read no more than sizes, or to the others; to all when left out.
            arguments: Of the call.
        """
        shown = [tap for tap in site.scores if sizes is None or tap.regularizer.sizes == sizes]
        if not shown:
            return tensor
        call = capture.AttentionCall(site.name, self.sites[site.name][0], **{"query": tensor, **arguments})
        for tap in shown:
            if tap.live:
                penalty, value = tap.regularizer.see_scores(call, tap.mask)
                (tensor,) = self._record(mode, tap, (tensor,), penalty, value)
            elif mode is not Mode.REPEAT and tap.awake:
                with torch.no_grad():
                    _, value = tap.regularizer.see_scores(call.detach(), tap.mask)
                self._record(mode, tap, (), None, value)
            if not torch.compiler.is_compiling() and not tap.shape:
                tap.shape, tap.method = call.describe()
        return tensor

    def _see_entropy(
        self, mode: Mode, taps: list[Tap], tensors: tuple[Tensor, ...], entropy: Tensor, visible: Tensor | int,
        valid: Tensor | None, looked_at: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        for tap in taps:
            if not tap.live and (mode is Mode.REPEAT or not tap.awake):
                continue
            rows = entropy if tap.live else entropy.detach()
            counted = capture.and_tokens(_at(valid, looked_at), _at(tap.mask, looked_at), rows)
            where = {"site": tap.site.label} if tap.regularizer.per_site else {}
            penalty, value = tap.regularizer.see_attention(rows, visible, counted, **where)
            tensors = self._record(mode, tap, tensors, penalty if tap.live else None, value)
        return tensors

    def _note_compiling(self) -> None:
        if torch.compiler.is_compiling():
            self._compiled = True  # written, never read: a read would become a guard

    def _mode(self) -> Mode:
        gradient = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return Mode.COLLECT if gradient and self.collecting else Mode.SKIP
        if capture.in_backward():
            return Mode.REPEAT if gradient else Mode.SKIP
        if not self.collecting:
            return Mode.SKIP
        return Mode.COLLECT if gradient else Mode.DEFER if _inside_function() else Mode.SKIP

    def _record(
        self, mode: Mode, tap: Tap, tensors: tuple[Tensor, ...], penalty: Tensor | None, value: Tensor
    ) -> tuple[Tensor, ...]:
        if mode is not Mode.REPEAT:
            tap.records.append((penalty, value))
            if mode is Mode.DEFER and penalty is not None:
                tap.deferred += 1
            return tensors
        if penalty is None or tap.injected >= tap.expected or (tap.collected and not _in_reentrant_checkpoint()):
            return tensors
        tap.injected += 1
        coefficient = _times(tap.regularizer.coefficient, tap.factor)
        return (_Inject.apply(tensors[0], penalty, self, coefficient), *tensors[1:])

    # --- loud failure ---

    def check_first_step(self, joined: bool = True) -> None:
        """After the first step: raise for what did not run, else print what matched.

        Raises:
            RuntimeError: If a target never ran, or nothing was joined to a loss.
        """
        if self._announced:
            return
        if not joined and any(tap.records for regularizer in self.regularizers for tap in self.taps[regularizer]):
            raise RuntimeError(
                "training_step computed penalties but never called `self.manual_backward(loss)`, which adds them to "
                "the loss. Call it instead of `loss.backward()`."
            )
        for regularizer, taps in self.taps.items():
            if not regularizer.allow_unused:
                regularizer.check_fired(taps)
        self._announced = True
        rows = [
            (tap, regularizer) for regularizer, taps in self.taps.items() for tap in taps if tap.fired or tap.records
        ]
        covered = {(tap.site, regularizer.role) for tap, regularizer in rows if regularizer.penalizes}
        rows = [row for row in rows if row[1].penalizes or (row[0].site, row[1].role) not in covered]
        if rows:
            _print_matches(rows)

    def _check_capture(self) -> None:
        """A CUDA graph repeats what this step launches: what Python decides anew in each step would stand still."""
        for regularizer in self.taps:
            changing = {
                "schedule": getattr(regularizer, "schedule", None) is not None,
                "query_fraction": regularizer.query_fraction < 1,
            }
            for argument, changes in changing.items():
                if changes:
                    raise RuntimeError(
                        f"`{argument}` of {regularizer.name} changes from step to step, but a CUDA graph that captures "
                        "the loss would repeat this step for good. Leave it out, or let "
                        "`torch.compile(mode='reduce-overhead')` capture the model, which leaves the loss outside."
                    )

    def _check_gradient(self, tap: Tap) -> None:
        flat = tap.collected and any(p is not None and not p.requires_grad for p, _ in tap.records[: tap.collected])
        if flat and not tap.expected and not tap.regularizer.allow_unused:
            raise RuntimeError(
                f"`{tap.regularizer.name}` at {tap.site.label}: the penalty has no gradient, because nothing before "
                "this module is trained or its input is detached. Leave it out with `targets=`, or set "
                "`allow_unused=True` to accept it."
            )


class regularize:
    """Regularizers in a hand-written training loop.

    Inside the ``with`` block the forward passes of ``model`` in training mode are watched, and ``add`` joins what they
    left to the task loss. Schedules count the steps of every optimizer that holds a parameter of ``model``. Leaving the
    block, also by an exception, puts the model back as it was.

    Args:
        model: The module to regularize.
        callbacks: Regularizers, and ``SigmaReparam`` whose parameters exist only inside the block: build the
            optimizer there.
        total_steps: Optimizer steps of the whole training, for schedules in fractions of it.

    Example:
        >>> import torch
        >>> from lightning_reg import regularize
        >>> from lightning_reg.callbacks import ActivationDensityRegularizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> with regularize(model, [ActivationDensityRegularizer(weight=0.05)]) as reg:
        ...     task_loss = model(torch.randn(2, 4)).square().mean()
        ...     loss = reg.add(task_loss)
        >>> sorted(reg.values)
        ['activation_density/value', 'activation_density/weight', 'activation_density/weighted']
    """

    def __init__(self, model: nn.Module, callbacks: Sequence[Any], *, total_steps: int | None = None) -> None:
        if not callbacks:
            raise ValueError("`callbacks` must hold at least one regularizer, got none.")
        self.model, self.callbacks, self.total_steps = model, list(callbacks), total_steps
        self.step = 0
        self.values: dict[str, Tensor] = {}
        self._optimizer_hook: Any = None
        self._trains: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = weakref.WeakKeyDictionary()

    def __enter__(self) -> "regularize":
        if Engine.find(self.model) is not None and Engine.of(self.model).regularizers:
            raise RuntimeError("the model is already regularized; leave the other `regularize` block or Trainer first.")
        try:
            for callback in self.callbacks:
                callback.attach(self.model, self.total_steps)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self._optimizer_hook = register_optimizer_step_post_hook(self._count)
        Engine.of(self.model).move(self.step)
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None
        if (engine := Engine.find(self.model)) is not None:
            engine.close()
        for callback in reversed(self.callbacks):
            callback.detach(self.model)

    def add(self, loss: Tensor) -> Tensor:
        """``loss`` plus the weighted penalties of the forward passes since the last call.

        Args:
            loss: The task loss, one element.

        Raises:
            RuntimeError: If a regularizer saw nothing, naming it and the remedy.
        """
        if self._optimizer_hook is None:
            raise RuntimeError("`add` must be called inside the `with regularize(...)` block.")
        engine = Engine.of(self.model)
        joined = engine.join(loss)
        engine.check_first_step()
        for regularizer in engine.regularizers:
            regularizer.observe(self.model)
            value, weighted = engine.totals.get(regularizer.name, (torch.zeros(()), torch.zeros(())))
            self.values[f"{regularizer.name}/value"] = value
            self.values[f"{regularizer.name}/weight"] = torch.tensor(regularizer.strength)
            self.values[f"{regularizer.name}/weighted"] = weighted
        self._begin()
        return joined

    def _begin(self) -> None:
        engine = Engine.of(self.model)
        for regularizer in engine.regularizers:
            regularizer.update_strength(self.step, self.total_steps)
        engine.begin()

    def _count(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self._trains:  # once, not in every step: a model has many parameters
            ours = {id(parameter) for parameter in self.model.parameters()}
            held = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self._trains[optimizer] = any(id(parameter) in ours for parameter in held)
        if self._trains[optimizer]:
            self.step += 1
            for callback in self.callbacks:
                callback.after_step(self.model)
            Engine.of(self.model).move(self.step)
            self._begin()


def _at(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Entries of the last axis, unless it is broadcast."""
    return tensor if tensor is None or rows is None or tensor.shape[-1] == 1 else tensor.index_select(-1, rows)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _inside_function() -> bool:
    """Whether an autograd Function's forward is running, which is how checkpoints without gradient look."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount > 0:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, torch.autograd.function.FunctionCtx):
                # one that no gradient reaches will not be repeated
                return any(context.needs_input_grad)  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _in_reentrant_checkpoint() -> bool:
    node = torch._C._current_autograd_node()
    return node is not None and node.name().endswith("CheckpointFunctionBackward")


def _sizes(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _print_matches(rows: list[tuple[Tap, "Observer"]]) -> None:
    from lightning.pytorch.utilities import rank_zero_info
    from rich.console import Console
    from rich.table import Table

    table = Table("regularizer", "module", "role", "shape", "caught at")
    for tap, regularizer in rows:
        table.add_row(
            regularizer.name, tap.site.label, regularizer.role, tap.shape or "compiled", tap.method or "compiled"
        )
    console = Console(width=140)
    with console.capture() as text:
        console.print(table)
    rank_zero_info(f"lightning_reg found {len(rows)} sites:\n{text.get()}")
