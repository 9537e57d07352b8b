"""Which rows of an attention are looked at: all where they are few, else a spread sample that moves with the step.

Nothing is drawn from a random generator, so that a training with a monitor goes as it would without: rows are spread
evenly over batch and queries, and a shift that is a function of the step moves them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_reg import capture
from lightning_reg.functional._scores import GOLDEN, MASKED_BIAS, as_bhmd, full_precision, upcast


@dataclass(frozen=True)
class Rows:
    """Rows of an attention.

    Args:
        scores: (batch, heads, queries, keys), float32 or float64, -inf where a key is hidden and in rows of padding.
        query_norms: l2 norms of their queries (batch, heads, queries); None where only scores were seen.
        key_norms: l2 norms of the keys (batch, heads, keys); None where only scores were seen.
    """

    scores: Tensor
    query_norms: Tensor | None = None
    key_norms: Tensor | None = None


def sample_rows(call: capture.AttentionCall, rows: int, shift: Tensor, tokens: Tensor | None = None) -> Rows:
    """At most about ``rows`` rows of each head, at a cost of rows x keys; all where there are no more.

    Args:
        call: The attention.
        rows: Rows of each head.
        shift: Scalar tensor in [0, 1): a tensor, so that compiled code need not be compiled for each step.
        tokens: Valid tokens of the batch, (batch, queries).
    """
    valid = call.valid_rows(tokens)
    if call.scores is not None:
        return _of_scores(call.scores.movedim(call.dim, -1), valid, rows, shift)
    assert call.query is not None
    assert call.key is not None
    query, key = capture.broadcast_leading(call.query, call.key, call.enable_gqa)
    lead, axis = query.shape[:-2], 0 if query.shape[0] != key.shape[0] else 1
    q, k = as_bhmd(query, lead, axis), as_bhmd(key, lead, axis)
    mask = None if call.attn_mask is None else as_bhmd(call.attn_mask, lead, axis)
    counted = None if valid is None else as_bhmd(valid.unsqueeze(-1), lead, axis)
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    sample = _Sample(q.shape[0], q.shape[2], rows, shift.to(q.device))
    with full_precision(q):
        q, k = upcast(sample.of_rows(q)), upcast(sample.of_batch(k))
        batch, heads, queries, dim = q.shape
        scores = (q.reshape(batch, k.shape[1], -1, dim) @ k.mT).mul_(scale).view(batch, heads, queries, k.shape[2])
    hidden: list[Tensor] = []
    if mask is not None:
        mask = sample.of_rows(mask)
        hidden.append(~mask if mask.dtype == torch.bool else mask <= MASKED_BIAS)
        scores = scores if mask.dtype == torch.bool else scores + mask
    if call.is_causal:
        hidden.append(torch.arange(k.shape[2], device=q.device) > sample.queries[:, None, :, None])
    if counted is not None:
        hidden.append(~sample.of_rows(counted))
    for part in hidden:
        scores = scores.masked_fill(part, -math.inf)
    return Rows(
        scores,
        q.norm(dim=-1),
        k.norm(dim=-1).repeat_interleave(heads // k.shape[1], 1),
    )


def _of_scores(scores: Tensor, valid: Tensor | None, rows: int, shift: Tensor) -> Rows:
    lead = scores.shape[:-2]
    scores = scores if scores.dim() > 1 else scores.unsqueeze(0)
    table = as_bhmd(scores, lead, 1)
    counted = None if valid is None else as_bhmd(valid.unsqueeze(-1), lead, 1)
    sample = _Sample(table.shape[0], table.shape[2], rows, shift.to(scores.device))
    table = upcast(sample.of_rows(table))
    table = table.masked_fill(table <= MASKED_BIAS, -math.inf)
    return Rows(table if counted is None else table.masked_fill(~sample.of_rows(counted), -math.inf))


def sample_positions(x: Tensor, mask: Tensor | None, rows: int, shift: Tensor) -> tuple[Tensor, Tensor | None]:
    """At most ``rows`` evenly spread positions of ``x`` (..., width) as (positions, width), and which are valid."""
    flat = x.reshape(-1, x.shape[-1])
    counted = None if mask is None else mask.reshape(-1)
    if len(flat) <= rows:
        return flat, counted
    index = _spread(rows, len(flat), shift.to(x.device))
    return flat[index], None if counted is None else counted[index]


class _Sample:
    """Places in (batch, queries): all, or so many queries of so many samples, others for each sample."""

    def __init__(self, batch: int, queries: int, rows: int, shift: Tensor) -> None:
        self.batch, self.of, self.whole = batch, queries, batch * queries <= rows
        if self.whole:
            self.queries = torch.arange(queries, device=shift.device).unsqueeze(0)
            return
        # as many samples as queries of each, unless one of them runs out
        samples = min(batch, max(1, math.isqrt(rows)))
        each = min(queries, max(1, rows // samples))
        samples = min(batch, max(1, rows // each))
        self.samples = _spread(samples, batch, shift)
        turned = (shift + torch.arange(samples, device=shift.device) * GOLDEN) % 1
        self.queries = _spread(each, queries, turned.unsqueeze(-1))

    def of_rows(self, tensor: Tensor) -> Tensor:
        """(samples, heads, queries, ...) of a tensor (batch, heads, queries, ...), whose first and third may be 1."""
        if self.whole:
            return tensor
        sizes = (self.batch, -1, self.of, *(-1,) * (tensor.dim() - 3))
        return tensor.expand(sizes)[self.samples[:, None], :, self.queries].transpose(1, 2)

    def of_batch(self, tensor: Tensor) -> Tensor:
        """(samples, ...) of a tensor (batch, ...)."""
        return tensor if self.whole else tensor[self.samples]


def _spread(count: int, total: int, shift: Tensor) -> Tensor:
    """``count`` different places below ``total``, one in each of as many equal strata."""
    places = (torch.arange(count, device=shift.device) + shift) * (total / count)
    return places.long().clamp_max(total - 1)
