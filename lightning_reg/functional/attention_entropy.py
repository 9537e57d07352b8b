r"""Shannon entropy of attention rows, from queries and keys, from scores, or from probabilities.

Formula
    ``p = softmax(scale * q k^T + bias)``, ``H_i = -sum_j p_ij log p_ij``; with ``top_k`` the row is first cut to its
    ``top_k`` largest scores and renormalised. Gradient: ``dH/ds_j = -p_j (log p_j + H)``.
Source
    sigma-Reparam (Zhai et al. 2023, arXiv 2303.06296, section 3) monitors this quantity; AEM (arXiv 2406.15303)
    maximises it and its public code sums it in nats, which is ``normalize=False`` here, also in its top-k form.
Input
    ``query`` (batch, heads, queries, dim), ``key`` (batch, key_heads, keys, dim); or scores or probabilities with the
    keys on ``dim``. Everything after rotary embedding or QK-norm and before dropout.
Unit and range
    Nats, from 0 (one key holds all the weight) to log(visible keys) (uniform); with ``normalize=True`` divided by
    log(visible keys), so in [0, 1]. A row that sees no key, or a single key when normalised, has no choice to make: it
    is 0 here, and losses and metrics leave it out of their means.
Masks
    Boolean (True = visible) or additive. An additive bias at or below ``MASKED_BIAS`` hides its key, which covers -inf,
    ``finfo.min``, -1e9 and the -1e4 that older models use.
Default and why
    ``normalize`` is off in the functions, which state the quantity of the papers, and on in losses and callbacks, where
    a weight should not depend on the number of keys.
Cost
    From queries and keys: two matrix products forward and three more backward, in blocks of at most ``BLOCK_SCORES``
    scores; memory linear in the number of tokens. Computed in float32 (float64 stays).
When it hurts
    The gradient vanishes where ``p_j`` is 0: the term shapes healthy heads and cannot revive a collapsed one.
    Maximising flattens attention: heads that must be sharp (induction, pointing) get worse.
Not together with
    Products that are not distributions, such as Nystrom attention: their "entropy" has no meaning.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED_BIAS = -1e4  # smallest fill in common use; an ALiBi bias this low has probability 0 anyway
BLOCK_SCORES = 2**20  # scores held at a time: 4 MiB in float32, which stays in a CPU's cache

# bound now: capture.py replaces the attribute while a training batch is in flight
_softmax = torch.softmax


def attention_entropy_from_probs(
    probs: Tensor, *, mask: Tensor | None = None, dim: int = -1, normalize: bool = False
) -> Tensor:
    """Entropy of attention probabilities.

    Args:
        probs: Probabilities, rows along ``dim`` sum to 1, any shape.
        mask: Visible keys, True = visible, broadcastable to ``probs``; without it every key counts as visible.
        dim: Axis of the keys.
        normalize: Divide by log(visible keys).

    Returns:
        Shape of ``probs`` without ``dim``, float32 or float64; nats, or [0, 1] when normalised.

    Raises:
        ValueError: If a shape does not fit, or, outside torch.compile, a probability is negative or a row does not
            sum to 1 (scores, or a product that is no distribution).

    Example:
        >>> attention_entropy_from_probs(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), normalize=True)
        tensor([0.5000])
    """
    probs = _upcast(_check_floating("probs", probs))
    if mask is not None:
        probs = probs.masked_fill(~_check_mask(mask, probs.shape), 0.0)
    if not torch.compiler.is_compiling():
        _check_distribution(probs, dim)
    # log(0) has an infinite gradient; where p is 0 the term is 0 whatever its logarithm
    entropy = -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(dim)
    return normalize_entropy(entropy, _visible(mask, probs, dim)) if normalize else entropy


def attention_entropy_from_scores(
    scores: Tensor, *, mask: Tensor | None = None, dim: int = -1, normalize: bool = False, top_k: int | None = None
) -> Tensor:
    """Entropy of ``softmax(scores)``.

    Args:
        scores: Attention scores before softmax, any shape; values at or below ``MASKED_BIAS`` count as masked.
        mask: Visible keys, True = visible, broadcastable to ``scores``.
        dim: Axis of the keys.
        normalize: Divide by log(visible keys).
        top_k: Keep the ``top_k`` largest scores of a row and renormalise (AEM's top-k form).

    Returns:
        Shape of ``scores`` without ``dim``, float32 or float64; nats, or [0, 1] when normalised.

    Example:
        >>> attention_entropy_from_scores(torch.zeros(1, 4))
        tensor([1.3863])
    """
    _, entropy, visible = scores_tap(scores, mask=mask, dim=dim, top_k=top_k)
    return normalize_entropy(entropy, visible) if normalize else entropy


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    normalize: bool = False,
    top_k: int | None = None,
) -> Tensor:
    """Entropy of each attention row, from queries and keys, without materialising the attention matrix.

    Arguments named as in ``torch.nn.functional.scaled_dot_product_attention`` mean the same.

    Args:
        query: (batch, heads, queries, dim); any number of leading axes, also none.
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        scale: Factor on the scores, default ``dim ** -0.5``.
        is_causal: Query i sees keys 0..i.
        attn_mask: Boolean (True = visible) or additive, broadcastable to (batch, heads, queries, keys). A learned
            additive bias receives its gradient.
        enable_gqa: Share each key head among ``heads / key_heads`` query heads.
        normalize: Divide by log(visible keys).
        top_k: Keep the ``top_k`` largest scores of a row and renormalise.

    Returns:
        (batch, heads, queries), float32 (float64 for float64 input); nats, or [0, 1] when normalised.

    Raises:
        ValueError: If shapes do not fit, naming the argument.
    """
    *_, entropy, visible = entropy_tap(
        query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, top_k=top_k
    )
    return normalize_entropy(entropy, visible) if normalize else entropy


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention output and the entropy of its rows.

    Args:
        query: (batch, heads, queries, dim).
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        value: (batch, heads, keys, value_dim).
        scale: Factor on the scores, default ``dim ** -0.5``.
        is_causal: Query i sees keys 0..i.
        attn_mask: Boolean (True = visible) or additive.
        enable_gqa: Share key heads among query heads.
        normalize: Divide the entropy by log(visible keys).

    Returns:
        Output (batch, heads, queries, value_dim) exactly as torch's attention computes it, and entropy
        (batch, heads, queries).
    """
    query, key, attn_mask, entropy, visible = entropy_tap(
        query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
    )
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return output, normalize_entropy(entropy, visible) if normalize else entropy


def normalize_entropy(entropy: Tensor, visible: Tensor) -> Tensor:
    """``entropy / log(visible)``, and 0 for rows with fewer than two visible keys."""
    return entropy / torch.where(visible > 1, visible, math.inf).to(entropy.dtype).log()


def entropy_tap(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Queries, keys and mask unchanged, with the entropy of their attention rows joined to the same autograd node.

    Feed the returned tensors to the attention: its gradient and the entropy's meet in one backward.

    Returns:
        ``(query, key, attn_mask, entropy, visible)``, entropy in nats and the number of visible keys, both
        (batch, heads, queries).
    """
    _check_query_key(query, key, attn_mask, enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else None
    visible = _visible_keys(query, key, attn_mask, is_causal, check_top_k(top_k))
    if bias is None:
        query, key, entropy = _QueryKeyEntropy.apply(query, key, None, attn_mask, scale, is_causal, top_k)
    else:
        query, key, attn_mask, entropy = _QueryKeyEntropy.apply(query, key, bias, None, scale, is_causal, top_k)
    return query, key, attn_mask, entropy, visible


def scores_tap(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    dim: int = -1,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``softmax(scores, dim, dtype)``, with the entropy of its rows joined to the same autograd node.

    Returns:
        ``(probs, entropy, visible)``: probabilities like ``scores``, entropy in nats and visible keys without ``dim``.
    """
    _check_floating("scores", scores)
    if mask is not None:
        scores = scores.masked_fill(~_check_mask(mask, scores.shape), -math.inf)
    return _SoftmaxEntropy.apply(scores, dim % scores.dim(), dtype, check_top_k(top_k))


class _SoftmaxEntropy(torch.autograd.Function):
    """``softmax(scores, dim, dtype)``, its entropy in nats and the visible keys; keeps what a softmax keeps."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, dim: int, dtype: torch.dtype | None, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities like ``scores``, entropy and visible keys without ``dim``."""
        probs = _softmax(scores, dim, dtype=dtype)
        hidden = scores <= MASKED_BIAS
        visible = scores.shape[dim] - hidden.sum(dim)
        # probabilities in half precision are too coarse for their logarithm: take the scores again
        exact = top_k is None and probs.dtype in (torch.float32, torch.float64)
        entropy = _entropy(_exact_probs(probs, scores, dim, top_k, exact).masked_fill(hidden, 0.0), dim)
        visible = visible if top_k is None else visible.clamp_max(top_k)
        ctx.save_for_backward(probs, hidden, None if exact else scores)
        ctx.dim, ctx.top_k, ctx.dtype = dim, top_k, scores.dtype
        ctx.mark_non_differentiable(visible)
        ctx.set_materialize_grads(False)
        return probs, entropy, visible

    @staticmethod
    def backward(ctx: Any, grad_probs: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple:
        """Join the gradient of the probabilities with that of the entropy."""
        probs, hidden, scores = ctx.saved_tensors
        grad = None
        if grad_probs is not None:
            weighted = probs * grad_probs
            grad = weighted - probs * weighted.sum(ctx.dim, keepdim=True)
        if grad_entropy is not None:
            exact = _exact_probs(probs, scores, ctx.dim, ctx.top_k, scores is None).masked_fill(hidden, 0.0)
            pull = _entropy_pull(exact, ctx.dim) * grad_entropy.unsqueeze(ctx.dim)
            grad = pull if grad is None else grad + pull
        return (None if grad is None else grad.to(ctx.dtype)), None, None, None


class _QueryKeyEntropy(torch.autograd.Function):
    """Tap on queries, keys and an additive bias; the backward recomputes the scores block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        top_k: int | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(query, key, bias, mask)
        ctx.arguments = (scale, is_causal, top_k)
        ctx.set_materialize_grads(False)
        entropy = _Scores(query, key, bias, mask, *ctx.arguments).entropy()
        passed = (tensor.view_as(tensor) for tensor in (query, key, bias) if tensor is not None)
        return (*passed, entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, bias, mask = ctx.saved_tensors
        *passed, grad_entropy = (*grads[:2], None, grads[2]) if bias is None else grads
        if grad_entropy is not None:
            scores = _Scores(query, key, bias, mask, *ctx.arguments)
            pulls = scores.gradients(grad_entropy, bias is not None and ctx.needs_input_grad[2])
            passed = [
                grad if pull is None else pull.to(tensor.dtype) if grad is None else grad + pull.to(grad.dtype)
                for grad, pull, tensor in zip(passed, pulls, (query, key, bias), strict=True)
            ]
        return (*passed, None, None, None, None)


class _Scores:
    """Attention scores in blocks of about ``BLOCK_SCORES``, cut over the batch and, for long rows, over the queries.

    Letters: B batch, H heads, G key heads, M queries, N keys, D dim.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        top_k: int | None,
    ) -> None:
        lead = query.shape[:-2]
        self.query, self.key = _as_bhmd(query, lead), _as_bhmd(key, lead)  # (B, H, M, D), (B, G, N, D)
        self.bias, self.mask = _as_bhmd(bias, lead), _as_bhmd(mask, lead)  # broadcastable to (B, H, M, N)
        self.shapes = query.shape, key.shape, None if bias is None else bias.shape
        self.scale, self.is_causal, self.top_k = scale, is_causal, top_k

    def entropy(self) -> Tensor:
        """Entropy of every row in nats, (batch, heads, queries)."""
        entropy = self.query.new_empty(self.query.shape[:3], dtype=_exact_dtype(self.query))
        for block in self._blocks():
            _cut(entropy.unsqueeze(-1), block).squeeze(-1).copy_(_entropy(self._probs(block), -1))
        return entropy.reshape(self.shapes[0][:-1])

    def gradients(self, grad_entropy: Tensor, with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient of ``(entropy * grad_entropy).sum()`` in query, key and bias."""
        grad_entropy = grad_entropy.reshape(*self.query.shape[:3], 1)
        dtype = _exact_dtype(self.query)
        for_query = torch.empty_like(self.query, dtype=dtype)
        for_key = torch.zeros_like(self.key, dtype=dtype)
        for_bias = torch.zeros_like(self.bias, dtype=dtype) if with_bias and self.bias is not None else None
        for block in self._blocks():
            grad_scores = _entropy_pull(self._probs(block), -1).mul_(_cut(grad_entropy, block))
            q, k = self._query_key(block)
            with torch.autocast(q.device.type, enabled=False):
                _cut(for_query, block).copy_(grad_scores @ k).mul_(self.scale)
                for_heads = grad_scores.transpose(-1, -2) @ q
            for_key[block[0]].add_(for_heads.unflatten(1, (self.key.shape[1], -1)).sum(2), alpha=self.scale)
            if for_bias is not None:
                part = _cut(for_bias, block)
                part.add_(grad_scores.sum_to_size(part.shape))
        return (
            for_query.reshape(self.shapes[0]),
            for_key.reshape(self.shapes[1]),
            None if for_bias is None else for_bias.reshape(self.shapes[2]),
        )

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        batch, heads, rows, keys = *self.query.shape[:3], self.key.shape[2]
        row = max(1, heads * keys)
        row_step = max(1, min(rows, BLOCK_SCORES // row))
        batch_step = max(1, BLOCK_SCORES // (row * row_step)) if row_step == rows else 1
        for b in range(0, batch, batch_step):
            for m in range(0, rows, row_step):
                yield slice(b, b + batch_step), slice(m, m + row_step)

    def _probs(self, block: tuple[slice, slice]) -> Tensor:
        """Probabilities of a block; a row that sees nothing is all 0."""
        q, k = self._query_key(block)
        with torch.autocast(q.device.type, enabled=False):
            scores = (q * self.scale) @ k.transpose(-1, -2)
        hidden = None
        if self.mask is not None:
            hidden = ~_cut(self.mask, block)
        if self.bias is not None:
            scores = scores + _cut(self.bias, block)
            hidden = _cut(self.bias, block) <= MASKED_BIAS
        if self.is_causal:
            queries = torch.arange(block[1].start, block[1].start + scores.shape[-2], device=q.device)
            future = torch.arange(scores.shape[-1], device=q.device) > queries[:, None]
            hidden = future if hidden is None else hidden | future
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        if self.top_k is not None:
            scores = _keep_top_k(scores, self.top_k, -1)
        probs = _softmax(scores, -1)
        return probs if hidden is None else probs.masked_fill(hidden, 0.0)

    def _query_key(self, block: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        q, k = _upcast(_cut(self.query, block)), _upcast(self.key[block[0]])
        group = q.shape[1] // k.shape[1]
        return q, k if group == 1 else k.repeat_interleave(group, 1)


def _as_bhmd(tensor: Any, lead: torch.Size) -> Any:
    """Bring (*lead, rows, columns), or a mask broadcastable to it, to four axes."""
    if tensor is None or tensor.dim() == 4 == len(lead) + 2:
        return tensor
    if len(lead) == 1 and tensor.dim() == 3:  # (batch, queries, dim): one head, so that blocks cut the batch
        return tensor.unsqueeze(1)
    if len(lead) > 2 and tensor.dim() > 3:
        return tensor.expand(*lead[:-1], *tensor.shape[-3:]).flatten(0, -4)
    return tensor.reshape((1,) * (4 - tensor.dim()) + tensor.shape)


def _cut(tensor: Tensor, block: tuple[slice, slice]) -> Tensor:
    """The block's part of a tensor (B, H, M, ...), whose broadcast axes stay."""
    if tensor.shape[0] > 1:
        tensor = tensor[block[0]]
    return tensor[:, :, block[1]] if tensor.shape[2] > 1 else tensor


def _visible_keys(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, top_k: int | None
) -> Tensor:
    """Number of keys each query sees, broadcast to (batch, heads, queries)."""
    rows, keys = query.shape[-2], key.shape[-2]
    shown = None if attn_mask is None else attn_mask if attn_mask.dtype == torch.bool else attn_mask > MASKED_BIAS
    if is_causal:
        past = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
        visible = past.sum(-1) if shown is None else (past & shown).sum(-1)
    elif shown is None:
        visible = torch.full((), keys, device=query.device)
    else:
        visible = shown.sum(-1) if shown.shape[-1] == keys else shown.sum(-1) * keys
    visible = visible if top_k is None else visible.clamp_max(top_k)
    return visible.expand(query.shape[:-1])


def _visible(mask: Tensor | None, probs: Tensor, dim: int) -> Tensor:
    shown = torch.ones_like(probs, dtype=torch.bool) if mask is None else mask.expand(probs.shape)
    return shown.sum(dim)


def _entropy(probs: Tensor, dim: int) -> Tensor:
    return torch.special.entr(probs).sum(dim)


def _entropy_pull(probs: Tensor, dim: int) -> Tensor:
    """dH/dscores = -p (log p + H), without the logarithm of 0."""
    surprise = torch.special.entr(probs)
    return surprise - probs * surprise.sum(dim, keepdim=True)


def _exact_probs(probs: Tensor, scores: Tensor | None, dim: int, top_k: int | None, exact: bool) -> Tensor:
    if exact:
        return probs
    assert scores is not None
    scores = _upcast(scores)
    return _softmax(scores if top_k is None else _keep_top_k(scores, top_k, dim), dim)


def _keep_top_k(scores: Tensor, top_k: int, dim: int) -> Tensor:
    if top_k >= scores.shape[dim]:
        return scores
    kept = scores.topk(top_k, dim)
    return torch.full_like(scores, -math.inf).scatter(dim, kept.indices, kept.values)


def _exact_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(_exact_dtype(tensor))


def check_top_k(top_k: int | None) -> int | None:
    """Return ``top_k`` or raise a ValueError."""
    if top_k is not None and top_k < 2:
        raise ValueError(f"`top_k` must be at least 2 (one key has no entropy) or None for all keys, got {top_k}.")
    return top_k


def _check_floating(name: str, tensor: Tensor) -> Tensor:
    if not torch.is_floating_point(tensor) or tensor.dim() == 0:
        raise ValueError(f"`{name}` must be a floating-point tensor with at least one axis, got {_describe(tensor)}.")
    return tensor


def _check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be boolean (True = visible), got {mask.dtype}; use `mask.bool()`.")
    if mask.dim() > len(shape) or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"`mask` must be broadcastable to {tuple(shape)}, got {tuple(mask.shape)}.")
    return mask


def _check_distribution(probs: Tensor, dim: int) -> None:
    detached = probs.detach()
    total = detached.sum(dim)
    wrong = (detached < 0).any() | ((total != 0) & ((total - 1).abs() > 0.05)).any()
    if wrong:
        raise ValueError(
            "`probs` must be non-negative with rows that sum to 1: these are scores or a product that is no "
            "distribution. Use `attention_entropy_from_scores` for scores before softmax, or set `dim`."
        )


def _check_query_key(query: Tensor, key: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if not torch.is_floating_point(tensor) or tensor.dim() < 2:
            raise ValueError(
                f"`{name}` must be floating point of shape (batch, heads, tokens, dim), got {_describe(tensor)}."
            )
    if query.shape[-1] != key.shape[-1] or query.dim() != key.dim() or query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"`query` and `key` must share batch and dim, got {_describe(query)} and {_describe(key)}.")
    if query.dim() > 2 and query.shape[-3] != key.shape[-3]:
        if not enable_gqa:
            raise ValueError(
                f"`key` must have the {query.shape[-3]} heads of `query`, got {key.shape[-3]}; "
                "set `enable_gqa=True` for grouped-query attention."
            )
        if query.shape[-3] % key.shape[-3]:
            raise ValueError(f"`query` heads {query.shape[-3]} must be a multiple of `key` heads {key.shape[-3]}.")
    if attn_mask is None:
        return
    full = (*query.shape[:-1], key.shape[-2])
    if attn_mask.dtype != torch.bool and not torch.is_floating_point(attn_mask):
        raise ValueError(f"`attn_mask` must be boolean or floating point, got {attn_mask.dtype}; use `mask.bool()`.")
    pairs = zip(attn_mask.shape[::-1], full[::-1], strict=False)
    if attn_mask.dim() > len(full) or any(m not in (1, n) for m, n in pairs):
        raise ValueError(f"`attn_mask` must be broadcastable to {full}, got {tuple(attn_mask.shape)}.")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
