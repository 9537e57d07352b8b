r"""Attention to a random subset of the keys, drawn anew at every call: a regularizer that also makes training cheaper.

Formula
    ``softmax(scale * q k_S^T + bias_S) v_S`` with S a uniformly drawn subset of ``max(1, round(keep * N))`` of the N
    keys, the same for all queries and heads of a call. Causal attention keeps the first key, so that no row is empty;
    under a mask a row all of whose keys were left out sees all that the mask shows it.
Source
    Stochastically subsampled self-attention (SSA), Hussain, Zaki and Subramanian 2023 (arXiv 2306.01705), the unbiased
    form, in which the subset does not depend on the position. Its locally biased form is not here.
Input
    As ``torch.nn.functional.scaled_dot_product_attention``.
Unit and range
    ``keep`` in (0, 1], the share of keys; 1 is plain attention.
Default and why
    0.5: the paper trains with a tenth to a half of the keys, and finds the full attention at inference better than
    without, as dropout does.
Cost
    The product with the keys shrinks to the share that is kept; gathering them costs one copy of keys and values. Under
    a mask the keys are hidden instead, which saves nothing.
When it hurts
    Where one particular key matters (retrieval, induction, the class token as a key): it is absent in a share
    ``1 - keep`` of the calls. Short sequences: few keys are left.
Not together with
    Evaluation: the full attention is the model. A key-value cache.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.functional.attention_entropy import MASKED_BIAS

_attention = F.scaled_dot_product_attention  # bound now: capture.py replaces the attribute


def kept_keys(
    keys: int, keep: float, *, first: bool = False, seed: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Indices of the drawn keys, ascending.

    Args:
        keys: How many there are.
        keep: Share to draw, in (0, 1].
        first: Draw among the others, and keep the first key too.
        seed: One integer, on the device of the indices: equal seeds draw alike. Without it the global generator draws.
        device: Of the indices, when there is no seed.

    Returns:
        (drawn,) integers.
    """
    count = max(1, round(check_keep(keep) * keys))
    drawn = torch.rand(keys, device=device).neg() if seed is None else _hashed(keys, seed)
    if first:
        drawn = torch.where(torch.arange(keys, device=drawn.device) == 0, drawn.new_full((), -(2**62) * 2), drawn)
    return drawn.argsort()[:count].sort().values


def _hashed(keys: int, seed: Tensor) -> Tensor:
    """(keys,) integers that look independent (the finalizer of SplitMix64): no generator, so no state to restore."""
    x = (torch.arange(1, keys + 1, device=seed.device) + (seed << 20)) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def stochastic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    keep: float = 0.5,
    seed: Tensor | None = None,
    attention: Callable[..., Tensor] = _attention,
) -> Tensor:
    """Attention to a random subset of the keys. Arguments named as in torch's attention mean the same.

    Args:
        query: (batch, heads, queries, dim); any number of leading axes.
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        value: (batch, heads, keys, value_dim).
        attn_mask: Boolean (True = visible) or additive, broadcastable to (batch, heads, queries, keys).
        dropout_p: Of the probabilities.
        is_causal: Query i sees keys 0..i.
        scale: Factor on the scores, default ``dim ** -0.5``.
        enable_gqa: Share each key head among ``heads / key_heads`` query heads.
        keep: Share of the keys, in (0, 1].
        seed: Of the draw, as for ``kept_keys``.
        attention: Computes it on the drawn keys.

    Returns:
        (batch, heads, queries, value_dim). A query whose visible keys were all left out sees all of them.

    Example:
        >>> query, key, value = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 3)
        >>> stochastic_attention(query, key, value, keep=0.25)[0, 0, 0]
        tensor([1., 1., 1.])
    """
    arguments: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    rows, keys = query.shape[-2], key.shape[-2]
    if check_keep(keep) == 1 or keys == 1:
        return attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **arguments)
    kept = kept_keys(keys, keep, first=is_causal, seed=seed, device=key.device)
    if attn_mask is None and not is_causal:
        return attention(query, key[..., kept, :], value[..., kept, :], attn_mask=None, is_causal=False, **arguments)
    if attn_mask is None:
        past = torch.arange(rows, device=key.device)[:, None] >= kept
        return attention(query, key[..., kept, :], value[..., kept, :], attn_mask=past, is_causal=False, **arguments)
    # rows that the draw would leave empty see everything: only a mask over all keys can say that
    mask = masked_to(attn_mask, kept, rows, keys, is_causal)
    return attention(query, key, value, attn_mask=mask, is_causal=False, **arguments)


def masked_to(attn_mask: Tensor, kept: Tensor, rows: int, keys: int, is_causal: bool = False) -> Tensor:
    """``attn_mask`` with the keys that were not drawn hidden, except in rows that would see nothing."""
    drawn = torch.zeros(keys, dtype=torch.bool, device=kept.device).index_fill(0, kept, True)
    shown = attn_mask if attn_mask.dtype == torch.bool else attn_mask > MASKED_BIAS
    shown = shown.expand(*shown.shape[:-2], rows, keys) if shown.dim() > 1 else shown.expand(rows, keys)
    if is_causal:
        shown = shown & torch.ones(rows, keys, dtype=torch.bool, device=kept.device).tril()
    left = shown & drawn
    left = torch.where(left.any(-1, keepdim=True), left, shown)
    if attn_mask.dtype == torch.bool:
        return left
    # what was hidden keeps its finite fill: a row of -inf alone has no softmax
    return attn_mask.masked_fill(~left & (attn_mask > MASKED_BIAS), -torch.inf)


def check_keep(keep: float) -> float:
    """Return ``keep`` or raise a ValueError."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"`keep` must be a share of the keys in (0, 1], got {keep!r}; 1 keeps them all.")
    return float(keep)
