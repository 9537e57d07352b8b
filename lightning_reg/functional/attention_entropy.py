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
    Boolean (True = visible) or additive. A bias, or a score, at or below ``MASKED_BIAS`` hides its key, which covers
    -inf, ``finfo.min``, -1e9 and the -1e4 that older models add to their scores. NaN is not a mask and stays NaN.
Default and why
    ``normalize`` is off in the functions, which state the quantity of the papers, and on in losses and callbacks, where
    a weight should not depend on the number of keys.
Cost
    From queries and keys: one matrix product forward and three backward, in blocks of about ``BLOCK_SCORES`` scores;
    memory linear in the number of tokens. Computed in float32 (float64 stays).
When it hurts
    The gradient vanishes where ``p_j`` is 0: the term shapes healthy heads and cannot revive a collapsed one.
    Maximising flattens attention: heads that must be sharp (induction, pointing) get worse. Evidence in
    multiple-instance learning is mixed: the authors gain on three sets of slides, tuning the weight on each from 0.001
    to 0.2; public trials of CLAM with strong encoders lost 0.01 to 0.08 of their score at every weight tried (single
    seeds), and where attention is near uniform anyway the term does nothing. Try ``floor``, which leaves sparse lesions
    alone. Made to collapse on purpose (``experiments/results/collapse.md``), attention whose rows were one key to
    rounding was lifted by no entropy term, while maximizing from the start prevented it: it shapes, it does not rescue.
Not together with
    Products that are not distributions, such as Nystrom attention: their "entropy" has no meaning.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional._attention_nodes import (
    BlockwiseEntropy,
    KernelAttention,
    KernelEntropy,
    SmallAttention,
    TwiceEntropy,
)
from lightning_reg.functional._scores import (
    BLOCK_SCORES,
    MASKED_BIAS,
    as_bhmd,
    entropy_of,
    entropy_push,
    exact_scores,
    log_of,
    probs_of,
    seen_by_position,
    upcast,
)

Counts = dict[tuple, Tensor]

# bound now: capture.py replaces the attribute while a training batch is in flight
_softmax = torch.softmax

# ways to the entropy from queries and keys, as the table of matches names them
ONE_NODE = "one node"  # attention and entropy together in torch: small attention on a CPU
FUSED = "fused kernel"  # output and entropy together
BESIDE = "entropy kernel"  # the entropy alone, beside the model's own attention
TWICE = "torch's attention twice"
BLOCKS = "blocks of scores"


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
            sum to 1 over the visible keys (scores, dropped-out weights, or a product that is no distribution).

    Example:
        >>> attention_entropy_from_probs(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), normalize=True)
        tensor([0.5000])
    """
    probs = upcast(_check_floating("probs", probs))
    if mask is not None:
        probs = probs.masked_fill(~_check_mask(mask, probs.shape), 0.0)
    if not torch.compiler.is_compiling():
        _check_distribution(probs, dim)
    entropy = entropy_of(probs, log_of(probs), dim)
    return normalize_entropy(entropy, visible_keys(probs, mask, dim)) if normalize else entropy


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
    window: int | None = None,
    query_offset: int = 0,
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
        window: A query sees only the keys less than this away from its position: the last ``window`` when causal.
        query_offset: Position of the first query among the keys, for queries that continue cached keys.

    Returns:
        (batch, heads, queries), float32 or float64; nats, or [0, 1] when normalised.

    Raises:
        ValueError: If shapes do not fit, naming the argument.

    Example:
        >>> query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
        >>> attention_entropy(query, key, is_causal=True)
        tensor([[[0.0000, 0.6931]]])
    """
    *_, entropy, visible = entropy_tap(
        query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, top_k=top_k,
        window=window, query_offset=query_offset,
    )  # fmt: skip
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
    window: int | None = None,
    query_offset: int = 0,
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
        window: As for ``attention_entropy``.
        query_offset: As for ``attention_entropy``.

    Returns:
        Output (batch, heads, queries, value_dim), equal to torch's attention up to rounding, and entropy
        (batch, heads, queries).

    Example:
        >>> query, key = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
        >>> attention_with_entropy(query, key, torch.eye(2)[None, None])
        (tensor([[[[0.5000, 0.5000]]]]), tensor([[[0.6931]]]))
    """
    output, entropy, visible, _ = attention_tap(
        query, key, value, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, window=window,
        query_offset=query_offset,
    )  # fmt: skip
    return output, normalize_entropy(entropy, visible) if normalize else entropy


def attention_tap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    top_k: int | None = None,
    window: int | None = None,
    query_offset: int = 0,
    rows: Tensor | None = None,
    sized: bool = False,
    counts: Counts | None = None,
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> tuple[Tensor, Tensor, Tensor | int, Tensor | None]:
    """Attention and the entropy of its rows before dropout, whichever way is cheapest.

    Small attention on a CPU is computed here, in one node, and attention without dropout on a GPU in one kernel; any
    other by ``attention``, torch's unless another is given, behind an ``entropy_tap``. With ``rows`` only the entropy
    of these queries is returned: where one node gives all, that costs less than to look at a part beside it.
    ``counts`` keeps the numbers of visible keys that positions alone decide, for layers of the same sizes.

    Returns:
        ``(output, entropy, visible, largest)``, as torch's attention and as ``entropy_tap`` return them; with ``sized``
        the largest ``|score|`` of each row over its visible keys, (batch, heads, queries), where the kernel that
        computes the output gives it at no extra pass, else None.
    """
    _check_query_key(query, key, attn_mask, enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = _as_attention_casts(query, key, value)
    path = attention_path(query, key, value, attn_mask, dropout_p, is_causal, top_k, window, query_offset)
    if path == ONE_NODE:
        output, entropy = SmallAttention.apply(query, key, value, scale, is_causal)
        visible = _visible_to_queries(query, key, None, is_causal, None, counts=counts)
        return output, *_select(rows, entropy, visible), None
    if path == FUSED:
        q, k, v, bias, mask = _four_axes(query, key, value, attn_mask)
        output, entropy, largest = KernelAttention.apply(
            q, k, v, bias, mask, scale, is_causal, window, query_offset, sized
        )
        places = _places(query, query_offset) if query_offset else None
        visible = _visible_to_queries(query, key, attn_mask, is_causal, None, window, places, counts)
        if query.dim() != 4:
            lead = query.shape[:-1]
            output, entropy = output.reshape(*lead, value.shape[-1]), entropy.reshape(lead)
            largest = largest.reshape(lead) if sized else largest
        return output, *_select(rows, entropy, visible), largest if sized else None
    query, key, attn_mask, entropy, visible = entropy_tap(
        query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, top_k=top_k, window=window,
        query_offset=query_offset, rows=rows, counts=counts,
    )  # fmt: skip
    if window is not None or (query_offset and is_causal):
        attn_mask = _with_band(_places(query, query_offset), key, attn_mask, is_causal, window)
        is_causal = False
    output = attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip
    return output, entropy, visible, None


def is_fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> bool:
    """Whether ``attention_tap`` computes this in one kernel, whose output and largest scores cost one pass."""
    if dropout_p or kernels.unavailable(query) is not None:
        return False
    query, key, value = _as_attention_casts(query, key, value)
    return _no_kernel(query, key, value, attn_mask, None) is None


def _select(rows: Tensor | None, entropy: Tensor, visible: Tensor | int) -> tuple[Tensor, Tensor | int]:
    """Those of some queries."""
    if rows is None:
        return entropy, visible
    chosen = entropy.index_select(-1, rows)
    return chosen, visible if isinstance(visible, int) else visible.index_select(-1, rows)


def entropy_tap(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    top_k: int | None = None,
    window: int | None = None,
    query_offset: int = 0,
    rows: Tensor | None = None,
    counts: Counts | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | int]:
    """Queries, keys and mask unchanged, with the entropy of their attention rows joined to the same autograd node.

    Feed the returned tensors to the attention: its gradient and the entropy's meet in one backward. On a GPU under
    autocast they come in its dtype, as attention takes them. With ``rows`` only these queries are looked at. ``counts``
    as in ``attention_tap``.

    Returns:
        ``(query, key, attn_mask, entropy, visible)``, entropy in nats and the number of visible keys, both
        (batch, heads, queries); one number where every query sees as many keys.
    """
    _check_query_key(query, key, attn_mask, enable_gqa)
    _check_window(window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = _as_attention_casts(query, key)
    if rows is not None:
        part, mask = query.index_select(-2, rows), attn_mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask.index_select(-2, rows)
        _, key, _, entropy, visible = _tap(part, key, mask, scale, is_causal, top_k, window, rows + query_offset)
        return query, key, attn_mask, entropy, visible
    return _tap(query, key, attn_mask, scale, is_causal, top_k, window, query_offset, counts)


def _tap(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    is_causal: bool,
    top_k: int | None,
    window: int | None,
    places: Tensor | int,
    counts: Counts | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | int]:
    """``entropy_tap`` of queries at ``places`` (queries,), or one after another from a number on."""
    scattered = isinstance(places, Tensor) and (is_causal or window is not None)
    positions = places if isinstance(places, Tensor) else _places(query, places) if places else None
    visible = _visible_to_queries(query, key, attn_mask, is_causal, check_top_k(top_k), window, positions, counts)
    offset = places if isinstance(places, int) else 0
    path = attention_path(query, key, None, attn_mask, 0.0, is_causal, top_k, window, offset or int(scattered))
    if path == BLOCKS:
        band = (positions, scale, is_causal, top_k, window)
        if attn_mask is None or attn_mask.dtype == torch.bool:
            query, key, entropy = BlockwiseEntropy.apply(query, key, None, attn_mask, *band)
        else:
            query, key, attn_mask, entropy = BlockwiseEntropy.apply(query, key, attn_mask, None, *band)
        if attn_mask is not None or window is not None:
            entropy = entropy.masked_fill(visible == 0, 0.0)
        return query, key, attn_mask, entropy, visible
    q, k, _, bias, mask = _four_axes(query, key, None, attn_mask)
    if path == TWICE:
        q, k, entropy = TwiceEntropy.apply(q, k, scale, is_causal)
    elif scattered:  # kernels know a step between queries, not a turn
        assert positions is not None
        banded = _with_band(positions, key, attn_mask, is_causal, window)
        *_, bias, mask = _four_axes(query, key, None, banded)
        q, k, entropy = KernelEntropy.apply(q, k, bias, mask, scale, False, None, 0)
    else:
        q, k, entropy = KernelEntropy.apply(q, k, bias, mask, scale, is_causal, window, offset)
    return q.reshape(query.shape), k.reshape(key.shape), attn_mask, entropy.reshape(query.shape[:-1]), visible


def attention_path(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    top_k: int | None = None,
    window: int | None = None,
    query_offset: int = 0,
) -> str:
    """The way to the entropy, and with ``value`` to the output, by device, dtype, mask and size.

    Warns once of each reason for which a GPU takes a slower one.
    """
    placed = window is not None or (query_offset != 0 and is_causal)
    if value is not None and not placed and _is_small(query, key, value, attn_mask, dropout_p, top_k):
        return ONE_NODE
    reason = kernels.unavailable(query)
    if reason is None:
        reason = _no_kernel(query, key, value, attn_mask, top_k)
    if reason is None:
        return FUSED if value is not None and not dropout_p else BESIDE
    simple = attn_mask is None and top_k is None and not placed and query.shape == key.shape[:-2] + query.shape[-2:]
    path = TWICE if query.is_cuda and simple and query.dtype != torch.float64 and query.numel() else BLOCKS
    if reason:
        kernels.warn_once(
            f"lightning_reg computes the entropy of attention by {path}, which is exact but slower, because {reason}."
        )
    return path


def _no_kernel(
    query: Tensor, key: Tensor, value: Tensor | None, attn_mask: Tensor | None, top_k: int | None
) -> str | None:
    """Why no kernel computes this entropy; None when one does."""
    # loads Triton
    from lightning_reg.kernels.attention_entropy import unsupported

    if top_k is not None:
        return "`top_k` needs whole rows"
    if attn_mask is not None and attn_mask.requires_grad:
        return "the additive mask is trained"
    if value is not None and value.shape[:-1] != key.shape[:-1]:
        return f"`value` {tuple(value.shape)} is shaped unlike `key` {tuple(key.shape)}"
    return unsupported(*_four_axes(query, key, value, attn_mask))


def _four_axes(
    query: Tensor, key: Tensor, value: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Query, key, value, additive and boolean mask as (B, H, M, D), (B, G, N, D), (B, G, N, Dv), (B, H, M, N)."""
    lead = query.shape[:-2]
    # (batch, tokens, dim) is one head, unless its first axis groups heads
    axis = 0 if query.shape[0] != key.shape[0] else 1
    q, k = as_bhmd(query, lead, axis), as_bhmd(key, lead, axis)
    v = None if value is None else as_bhmd(value, lead, axis)
    if attn_mask is None:
        return q, k, v, None, None
    mask = as_bhmd(attn_mask, lead, axis)
    return (q, k, v, None, mask) if mask.dtype == torch.bool else (q, k, v, mask, None)


def _as_attention_casts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's attention takes them under autocast on a GPU: all in its dtype."""
    if not (tensors[0].is_cuda and torch.is_autocast_enabled("cuda")):
        return tensors
    dtype = torch.get_autocast_dtype("cuda")
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _with_band(
    positions: Tensor | None, key: Tensor, attn_mask: Tensor | None, is_causal: bool, window: int | None
) -> Tensor:
    """The mask with what positions hide."""
    assert positions is not None
    shown = seen_by_position(positions, key.shape[-2], is_causal, window)
    if attn_mask is None:
        return shown
    return shown & attn_mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~shown, -math.inf)


def _places(query: Tensor, offset: int) -> Tensor:
    """Positions of queries that stand one after another."""
    return torch.arange(offset, offset + query.shape[-2], device=query.device)


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


def normalize_entropy(entropy: Tensor, visible: Tensor | int) -> Tensor:
    """``entropy / log(visible)``, and 0 for rows with fewer than two visible keys."""
    if isinstance(visible, int):
        return entropy / math.log(visible) if visible > 1 else torch.zeros_like(entropy)
    return entropy / torch.where(visible > 1, visible, math.inf).to(entropy.dtype).log()


def rows_with_choice(entropy: Tensor, visible: Tensor | int, normalize: bool) -> Tensor:
    """Rows of ``entropy`` that means count: those that see a key, or two keys where the entropy is normalised."""
    chosen = visible > (1 if normalize else 0)
    return chosen if isinstance(chosen, Tensor) else torch.full_like(entropy, chosen, dtype=torch.bool)


def visible_keys(probs: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Number of keys each row of probabilities sees, the shape of ``probs`` without ``dim``."""
    shown = torch.ones_like(probs, dtype=torch.bool) if mask is None else mask.expand(probs.shape)
    return shown.sum(dim)


class _SoftmaxEntropy(torch.autograd.Function):
    """``softmax(scores, dim, dtype)``, its entropy in nats and the visible keys; keeps what a softmax keeps."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, dim: int, dtype: torch.dtype | None, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities like ``scores``, entropy and visible keys without ``dim``."""
        probs = _softmax(scores, dim, dtype=dtype)
        visible = scores.shape[dim] - (scores <= MASKED_BIAS).sum(dim)
        # probabilities in half precision are too coarse for their logarithm: take the scores again
        exact = top_k is None and probs.dtype in (torch.float32, torch.float64)
        p, log_p = (probs, log_of(probs)) if exact else probs_of(exact_scores(scores), dim, top_k)
        entropy = entropy_of(p, log_p, dim).masked_fill(visible == 0, 0.0)
        ctx.save_for_backward(probs, None if exact else scores, entropy, visible)
        ctx.dim, ctx.top_k, ctx.dtype = dim, top_k, scores.dtype
        visible = visible if top_k is None else visible.clamp_max(top_k)
        ctx.mark_non_differentiable(visible)
        ctx.set_materialize_grads(False)
        return probs, entropy, visible

    @staticmethod
    def backward(ctx: Any, grad_probs: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple:
        """Join the gradient of the probabilities with that of the entropy."""
        probs, scores, entropy, visible = ctx.saved_tensors
        grad = None
        if grad_probs is not None:
            grad = torch._softmax_backward_data(grad_probs, probs, ctx.dim, probs.dtype)
        if grad_entropy is not None:
            p, log_p = (probs, log_of(probs)) if scores is None else probs_of(exact_scores(scores), ctx.dim, ctx.top_k)
            pull = entropy_push(p, log_p, entropy.unsqueeze(ctx.dim)).mul_(-grad_entropy.unsqueeze(ctx.dim))
            pull.masked_fill_((visible == 0).unsqueeze(ctx.dim), 0.0)  # a row of -inf has probabilities NaN
            grad = pull if grad is None else pull.add_(grad)
        return (None if grad is None else grad.to(ctx.dtype)), None, None, None


def _is_small(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, top_k: int | None
) -> bool:
    """Whether ``SmallAttention`` can compute this, and is the cheapest to do so."""
    if attn_mask is not None or top_k is not None or dropout_p or torch.compiler.is_compiling():
        return False
    if query.device.type != "cpu" or torch.is_autocast_enabled("cpu") or kernels.unavailable(query) is None:
        return False
    exact = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.float64)
    alike = min(query.dim(), key.dim()) > 1 and value.shape[:-1] == key.shape[:-1]
    return exact and alike and 0 < query[..., 0].numel() * key.shape[-2] <= BLOCK_SCORES


def _visible_to_queries(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    top_k: int | None,
    window: int | None = None,
    positions: Tensor | None = None,
    counts: Counts | None = None,
) -> Tensor | int:
    """Number of keys each query sees, broadcast to (batch, heads, queries); one number when all see as many."""
    placed = is_causal or window is not None
    if attn_mask is None and not placed:
        return key.shape[-2] if top_k is None else min(top_k, key.shape[-2])
    if counts is not None and attn_mask is None and positions is None:
        sizes = (query.shape[:-1], key.shape[-2], is_causal, top_k, window, query.device)
        if sizes not in counts:
            counts[sizes] = _visible_to_queries(query, key, None, is_causal, top_k, window)  # type: ignore[assignment]
        return counts[sizes]
    if attn_mask is None:
        shown = torch.ones(1, dtype=torch.bool, device=query.device)
    else:
        shown = attn_mask if attn_mask.dtype == torch.bool else ~(attn_mask <= MASKED_BIAS)
    if placed:
        places = torch.arange(query.shape[-2], device=query.device) if positions is None else positions
        visible = _count_in_band(shown, places, key.shape[-2], is_causal, window)
    else:
        visible = shown.sum(-1) * (key.shape[-2] if shown.shape[-1] == 1 else 1)
    visible = visible if top_k is None else visible.clamp_max(top_k)
    return visible.expand(query.shape[:-1])


def _count_in_band(shown: Tensor, positions: Tensor, keys: int, is_causal: bool, window: int | None) -> Tensor:
    """Number of shown keys that positions let each query see, in memory of the mask's own size."""
    after = (positions + (1 if is_causal or window is None else window)).clamp(0, keys)
    first = torch.zeros_like(after) if window is None else (positions - (window - 1)).clamp(0, keys)
    after = torch.maximum(after, first)
    if shown.shape[-1] == 1:
        return shown.squeeze(-1) * (after - first)
    if shown.dim() > 1 and shown.shape[-2] > 1:
        return (shown & seen_by_position(positions, keys, is_causal, window)).sum(-1)
    upto = torch.nn.functional.pad(shown.cumsum(-1), (1, 0))
    counts = upto[..., after] - upto[..., first]
    return counts.squeeze(-2) if shown.dim() > 1 else counts


def _check_window(window: int | None) -> None:
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"`window` must be an integer >= 1, the keys a query sees on each side, got {window!r}.")


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
    if not _broadcastable(mask.shape, shape):
        raise ValueError(f"`mask` must be broadcastable to {tuple(shape)}, got {tuple(mask.shape)}.")
    return mask


def _broadcastable(shape: torch.Size, full: torch.Size) -> bool:
    pairs = zip(shape[::-1], full[::-1], strict=False)
    return len(shape) <= len(full) and all(size in (1, wanted) for size, wanted in pairs)


def _check_distribution(probs: Tensor, dim: int) -> None:
    detached = probs.detach()
    total = detached.sum(dim)
    wrong = (detached < 0).any() | ((total != 0) & ((total - 1).abs() > 0.05)).any()
    if wrong:
        raise ValueError(
            "`probs` must be non-negative with rows that sum to 1 over the visible keys: these are scores or a product "
            "that is no distribution. Use `attention_entropy_from_scores` for scores before softmax, or set `dim`."
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
    full = torch.Size((*query.shape[:-1], key.shape[-2]))
    if attn_mask.dtype != torch.bool and not torch.is_floating_point(attn_mask):
        raise ValueError(f"`attn_mask` must be boolean or floating point, got {attn_mask.dtype}; use `mask.bool()`.")
    if attn_mask.dim() == 0 or not _broadcastable(attn_mask.shape, full):
        raise ValueError(f"`attn_mask` must be broadcastable to {tuple(full)}, got {tuple(attn_mask.shape)}.")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
