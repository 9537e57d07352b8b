r"""Soft cap on attention scores: they can approach a bound, and never pass it.

Formula
    ``cap * tanh(s / cap)``, applied to the scaled scores before masking and softmax. Derivative ``1 - tanh(s/cap)^2``:
    1 at 0, and vanishing far above the cap.
Source
    Bello et al. 2016 (arXiv 1611.09940) for logits; Gemma 2 (arXiv 2408.00118, section 2) for attention, cap 50.
Input
    Scores of any shape, or queries (batch, heads, queries, dim) and keys as for
    ``torch.nn.functional.scaled_dot_product_attention``. After rotary embedding and QK-norm.
Unit and range
    That of the scores; the result lies in (-cap, cap). ``cap > 0``.
Default and why
    50, Gemma 2's: an attention whose scores stay below 10 does not notice it (1.3 % off at 10).
Cost
    The attention is computed with its scores in memory, (batch, heads, queries, keys), because torch's fused attention
    knows no cap: linear memory is lost. A FlexAttention or a kernel would keep it.
When it hurts
    Scores that have run far above the cap have almost no gradient left: put on a collapsed model it restores the
    entropy at once (in a collapse made on purpose, ``experiments/results/collapse.md``, it prevented and rescued), and
    the order of the keys is learnt again only slowly. Entropy cannot fall below that of one key at +cap and the others
    at -cap: a cap that is low enough to help there cost 3 to 8 points of accuracy. A model trained with a cap needs it
    at inference too.
Not together with
    Code that computes attention elsewhere (flash-attention called directly), which never sees the cap.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.functional.attention_entropy import MASKED_BIAS

# bound now: capture.py replaces the attribute while a training batch is in flight
_softmax = torch.softmax


def softcap(scores: Tensor, cap: float = 50.0) -> Tensor:
    """Scores pressed into (-cap, cap); hidden ones, at or below ``MASKED_BIAS``, stay hidden.

    Args:
        scores: Any shape; computed in float32, or float64 for float64.
        cap: Bound, > 0.

    Returns:
        Shape and dtype of ``scores``.

    Example:
        >>> softcap(torch.tensor([0.0, 1.0, 100.0, -float("inf")]), cap=2.0)
        tensor([0.0000, 0.9242, 2.0000,   -inf])
    """
    check_cap(cap)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.where(exact <= MASKED_BIAS, exact, cap * torch.tanh(exact / cap)).to(scores.dtype)


def softcapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    cap: float = 50.0,
    softmax: Callable[[Tensor, int], Tensor] = _softmax,
) -> Tensor:
    """Attention with capped scores. Arguments named as in torch's attention mean the same.

    Args:
        query: (batch, heads, queries, dim); any number of leading axes.
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        value: (batch, heads, keys, value_dim).
        attn_mask: Boolean (True = visible) or additive, added to the capped scores.
        dropout_p: Of the probabilities.
        is_causal: Query i sees keys 0..i.
        scale: Factor on the scores, default ``dim ** -0.5``.
        enable_gqa: Share each key head among ``heads / key_heads`` query heads.
        cap: Bound, > 0.
        softmax: Of scores over an axis.

    Returns:
        (batch, heads, queries, value_dim), the dtype of ``value``; 0 for a query that sees no key.

    Example:
        >>> query, key = torch.tensor([[[[100.0]]]]), torch.tensor([[[[1.0], [0.0]]]])
        >>> softcapped_attention(query, key, torch.eye(2)[None, None], cap=1.0)
        tensor([[[[0.7311, 0.2689]]]])
    """
    check_cap(cap)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(dtype) @ key.to(dtype).mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = _masked(cap * torch.tanh(scores / cap), attn_mask, is_causal)
        empty = (scores <= MASKED_BIAS).all(-1, keepdim=True)
        probs = softmax(scores.masked_fill(empty, 0.0) if attn_mask is not None else scores, -1)
        if attn_mask is not None:
            probs = probs.masked_fill(empty, 0.0)
        return F.dropout(probs.to(value.dtype), dropout_p) @ value


def _masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf)
    return scores + attn_mask


def check_cap(cap: float) -> float:
    """Return ``cap`` or raise a ValueError."""
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 < cap < float("inf"):
        raise ValueError(f"`cap` must be a finite number > 0, got {cap!r}; Gemma 2 uses 50 for attention.")
    return float(cap)
