"""Attention scores in blocks: the arithmetic that quantities of attention share, in memory linear in the tokens."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

MASKED_BIAS = -5e3  # half the smallest fill in common use, which comes added to a score; ALiBi this low is 0 anyway
HIDDEN_SCORE = -1e30  # probability 0 and, unlike with -inf, no NaN in 0 * log(0), also when differentiated twice
BLOCK_SCORES = 2**17  # scores held at a time: 512 KiB in float32, which stay in a CPU's cache
GOLDEN = (math.sqrt(5) - 1) / 2
LARGE_BLOCKS = 128  # times as many on an accelerator, where launches cost, and in compiled code, which unrolls blocks

Block = tuple[slice, slice]  # of batch and queries
WHOLE: Block = (slice(0, None), slice(0, None))


class Scores:
    """Attention scores in blocks of about ``BLOCK_SCORES``, cut over the batch and, for long rows, over the queries.

    Letters: B batch, H heads, G key heads, R = H / G heads that share a key, M queries, N keys, D dim.

    Args:
        query: (..., M, D), any number of leading axes.
        key: (..., N, D).
        bias: Additive mask, broadcastable to (..., M, N); at or below ``MASKED_BIAS`` it hides a key.
        mask: Boolean mask, True = visible.
        scale: Factor on the scores.
        is_causal: A query sees the keys up to its position.
        top_k: Keep the ``top_k`` largest scores of a row.
        window: A query sees the keys less than this away from its position.
        positions: Position of each query, (M,); 0, 1, ... when left out.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        top_k: int | None = None,
        window: int | None = None,
        positions: Tensor | None = None,
    ) -> None:
        lead = query.shape[:-2]
        # (batch, tokens, dim) is one head, so that blocks cut the batch, unless its first axis groups heads
        axis = 0 if query.shape[0] != key.shape[0] else 1
        self.query, self.key = as_bhmd(query, lead, axis), as_bhmd(key, lead, axis)  # (B, H, M, D), (B, G, N, D)
        # broadcastable to (B, H, M, N)
        self.bias = None if bias is None else as_bhmd(bias, lead, axis)
        self.mask = None if mask is None else as_bhmd(mask, lead, axis)
        self.shapes, self.bias_shape = (query.shape, key.shape), None if bias is None else bias.shape
        self.scale, self.is_causal, self.top_k = scale, is_causal, top_k
        self.window, self.positions = window, positions

    def entropy(self) -> tuple[Tensor, Tensor | None]:
        """Entropy of every row in nats, (batch, heads, queries), without meaning where a row sees no key.

        Scores that fit a block also leave ``p (log p + H)``, so that the backward need not take them again.
        """
        entropy = push = None
        with full_precision(self.query):
            for block, q, k in self.blocks():
                probs, log_probs = self._probs(block, q, k)
                part = entropy_of(probs, log_probs, -1).unsqueeze(-1)
                if block is WHOLE and probs.numel() <= BLOCK_SCORES:
                    # `entropy_of` left p log p in log_probs
                    entropy, push = part, log_probs.addcmul_(probs, part)
                elif block is WHOLE:
                    entropy = part
                else:
                    entropy = part.new_empty(*self.query.shape[:3], 1) if entropy is None else entropy
                    cut(entropy, block).copy_(part)
        if entropy is None:  # no queries
            entropy = self.query.new_zeros(*self.query.shape[:3], 1, dtype=exact_dtype(self.query))
        return entropy.reshape(self.shapes[0][:-1]), push

    def gradients(
        self, entropy: Tensor, grad_entropy: Tensor, with_bias: bool, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient of ``(entropy * grad_entropy).sum()`` in query, key and bias."""
        rows = (*self.query.shape[:3], 1)
        entropy, grad_entropy = entropy.reshape(rows), grad_entropy.reshape(rows)
        for_query = for_key = None
        for_bias = torch.zeros_like(self.bias, dtype=entropy.dtype) if with_bias and self.bias is not None else None
        with full_precision(self.query):
            for block, q, k in self.blocks():
                push = kept if kept is not None else entropy_push(*self._probs(block, q, k), cut(entropy, block))
                weight = cut(grad_entropy, block)  # (B, H, M, 1)
                if for_bias is not None:
                    part = cut(for_bias, block)
                    part.sub_((push * weight).sum_to_size(part.shape))
                pull = (push * (weight * -self.scale)).reshape(*q.shape[:3], k.shape[2])
                in_query, in_key = pull @ k, pull.transpose(-1, -2) @ q
                if block is WHOLE:
                    for_query, for_key = in_query, in_key
                else:
                    if for_query is None or for_key is None:
                        for_query = torch.empty_like(self.query, dtype=entropy.dtype)
                        for_key = torch.zeros_like(self.key, dtype=entropy.dtype)
                    part = cut(for_query, block)
                    part.copy_(in_query.reshape(part.shape))
                    for_key[block[0]].add_(in_key)
        if for_query is None or for_key is None:  # no queries
            for_query, for_key = torch.zeros_like(self.query), torch.zeros_like(self.key)
        return for_query.reshape(self.shapes[0]), for_key.reshape(self.shapes[1]), self._as_given(for_bias)

    def _as_given(self, for_bias: Tensor | None) -> Tensor | None:
        """Undo ``as_bhmd``: sum over the batch axes that were expanded."""
        if for_bias is None or self.bias_shape is None:
            return None
        lead = self.shapes[0][:-3]
        if len(lead) > 1 and len(self.bias_shape) > 3:
            for_bias = for_bias.unflatten(0, lead).sum_to_size(self.bias_shape)
        return for_bias.reshape(self.bias_shape)

    def blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Slices of B and M with their queries (B, G, R M, D) and keys (B, G, N, D), upcast."""
        batch, heads, rows, dim = self.query.shape
        large = self.query.device.type != "cpu" or torch.compiler.is_compiling()
        limit = BLOCK_SCORES * (LARGE_BLOCKS if large else 1)
        row = max(1, heads * self.key.shape[2])
        row_step = max(1, min(rows, limit // row))
        batch_step = max(1, limit // (row * row_step)) if row_step == rows else 1
        if batch_step >= batch and row_step >= rows:
            q, k = upcast(self.query), upcast(self.key)
            yield WHOLE, q.reshape(*k.shape[:2], -1, dim) if heads != k.shape[1] else q, k
            return
        for b in range(0, batch, batch_step):
            k = upcast(self.key[b : b + batch_step])
            for m in range(0, rows, row_step):
                block = slice(b, b + batch_step), slice(m, m + row_step)
                q = upcast(cut(self.query, block))
                yield block, q.reshape(*k.shape[:2], heads // k.shape[1] * q.shape[2], dim), k

    def _probs(self, block: Block, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of a block (B, H, M, N) and their logarithms; uniform where a row sees nothing."""
        scores, hidden = self.logits(block, q, k)
        if hidden is not None:
            scores = scores.masked_fill_(hidden, HIDDEN_SCORE)
        return probs_of(scores, -1, self.top_k)

    def logits(self, block: Block, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of a block (B, H, M, N), and which of them are hidden."""
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        heads = self.query.shape[1]
        scores = scores.reshape(len(q), heads, q.shape[1] * q.shape[2] // heads, k.shape[2])
        hidden = None
        if self.mask is not None:
            hidden = ~cut(self.mask, block)
        if self.bias is not None:
            bias = cut(self.bias, block)
            scores, hidden = scores + bias, bias <= MASKED_BIAS
        if self.is_causal or self.window is not None:
            shown = seen_by_position(
                self._positions(block, scores.shape[2], q.device), scores.shape[3], self.is_causal, self.window
            )
            hidden = ~shown if hidden is None else hidden | ~shown
        return scores, hidden

    def _positions(self, block: Block, rows: int, device: torch.device) -> Tensor:
        if self.positions is not None:
            return self.positions[block[1]]
        return torch.arange(block[1].start, block[1].start + rows, device=device)


def seen_by_position(positions: Tensor, keys: int, is_causal: bool, window: int | None) -> Tensor:
    """Which keys the positions (M,) of queries let them see, (M, N)."""
    distance = positions.unsqueeze(-1) - torch.arange(keys, device=positions.device)
    if window is None:
        return distance >= 0
    near = distance < window
    return near & (distance >= 0) if is_causal else near & (distance > -window)


def sampled_rows(rows: int, fraction: float, shift: Tensor) -> Tensor:
    """About ``fraction`` of so many rows, evenly spread and turned by ``shift`` in [0, 1), each as likely as another.

    A tensor turns them, so that compiled code need not be compiled for each step.

    Returns:
        (sampled,) indices; not ascending where the turn wraps.
    """
    count = min(rows, max(1, round(rows * fraction)))
    spread = torch.arange(count, device=shift.device) * rows // max(1, count)
    return (spread + (shift * rows).long()) % max(1, rows)


def shift_of(step: int) -> float:
    """Where in [0, 1) the sampled rows of a step lie: multiples of the golden ratio fill it evenly."""
    return (step + 1) * GOLDEN % 1


def full_precision(tensor: Tensor) -> Any:
    """Autocast off; nothing at all where it is not on, which saves entering it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def as_bhmd(tensor: Tensor, lead: torch.Size, axis: int) -> Tensor:
    """Bring (*lead, rows, columns), or a mask broadcastable to it, to four axes."""
    if len(lead) == 2 and tensor.dim() == 4:
        return tensor
    if len(lead) == 1 and tensor.dim() == 3:
        return tensor.unsqueeze(axis)
    if len(lead) > 2 and tensor.dim() > 3:
        return tensor.expand(*lead[:-1], *tensor.shape[-3:]).flatten(0, -4)
    return tensor.reshape((1,) * (4 - tensor.dim()) + tensor.shape)


def cut(tensor: Tensor, block: Block) -> Tensor:
    """The block's part of a tensor (B, H, M, ...), whose broadcast axes stay."""
    if block is WHOLE:
        return tensor
    if tensor.shape[0] > 1:
        tensor = tensor[block[0]]
    return tensor[:, :, block[1]] if tensor.shape[2] > 1 else tensor


def probs_of(scores: Tensor, dim: int, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms, finite for finite scores."""
    if top_k is not None and top_k < scores.shape[dim]:
        kept = scores.topk(top_k, dim)
        scores = torch.full_like(scores, HIDDEN_SCORE).scatter(dim, kept.indices, kept.values)
    log_probs = torch.log_softmax(scores, dim)
    return log_probs.exp(), log_probs


def log_of(probs: Tensor) -> Tensor:
    """Logarithm, finite at 0, where it only ever meets its factor 0."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log_()


def entropy_of(probs: Tensor, log_probs: Tensor, dim: int) -> Tensor:
    """Entropy of rows; overwrites ``log_probs``, because a fresh tensor costs more than the product."""
    return 0 - log_probs.mul_(probs).sum(dim)  # not -0.0


def entropy_push(probs: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """Negative gradient of the entropy in the scores, ``p (log p + H)``."""
    return (probs * log_probs).addcmul_(probs, entropy)


def exact_scores(scores: Tensor) -> Tensor:
    """Scores in the precision to compute in, all finite."""
    return upcast(scores).clamp_min(HIDDEN_SCORE)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The precision to compute in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in the precision to compute in."""
    return tensor.to(exact_dtype(tensor))
