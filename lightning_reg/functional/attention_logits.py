r"""Size of attention logits: the largest magnitude in each row, and each row's logarithm of summed exponentials.

Formula
    ``s = scale * q k^T + bias``; ``m_i = max_j |s_ij|`` and ``z_i = log sum_j exp s_ij``, over the keys that query i
    sees. ``dm_i/ds_ij = sign(s_ij)`` at the largest magnitude and 0 elsewhere, shared evenly among equals (a
    subgradient; 0 where all are 0); ``dz_i/ds_ij = softmax(s_i)_j``.
Source
    Growth of max logits as the sign of divergence, near 1e4: Wortsman et al. 2023 (arXiv 2309.14322, section 3). The
    maximum is what QK-clip (Kimi K2, tau = 100) compares with its threshold. ``z_i^2`` is the z-loss of PaLM (arXiv
    2204.02311, section 5), on attention instead of classes.
Input
    ``query`` (batch, heads, queries, dim), ``key`` (batch, key_heads, keys, dim); or scores with the keys on ``dim``.
    After rotary embedding or QK-norm, as they enter the attention.
Unit and range
    Of a logit, a natural logarithm of a ratio of probabilities. ``m`` is >= 0, and 0 for a row that sees no key; ``z``
    is any number, log(visible keys) when all scores are 0, and 0 for a row that sees no key, which means leave out.
Masks
    Boolean (True = visible) or additive. A bias, or a score, at or below ``MASKED_BIAS`` hides its key; a larger one,
    as of ALiBi, is part of the logit.
Where it acts
    ``m`` above a bound pulls on the one logit that is too large, and says nothing of the others; ``z^2`` pulls on all,
    by their probability. On a collapsed head the gradient of the entropy vanishes and that of ``m`` does not: a bound
    on ``m`` rescues, an entropy penalty only shapes. ``z^2`` holds a growing logit down but rescues in part only: it
    pulls a dominant logit from 200 to 0, while a row of logits 0 and -200 has z = 0 and no gradient.
Default and why
    Bound 50: an order below 1e3, where small models get worse, and half of QK-clip's threshold, which leaves healthy
    heads alone.
Cost
    From queries and keys: one matrix product forward and three backward, in blocks as ``attention_entropy`` does, or
    in kernels on a GPU, where rows without a gradient cost nothing in backward; the gradient of a learned bias is taken
    in blocks also there. Memory linear in the number of tokens. Computed in float32 (float64 stays).
When it hurts
    The gradient of the squared hinge grows with the excess: clip gradients when a run starts far above the bound. Heads
    that point (induction, copying) need large logits: a low bound makes them worse. ``z^2`` has its minimum where
    the exponentials sum to 1, so it also pushes uniform attention over n keys towards logits of -log n.
    In a collapse made on purpose (``experiments/results/collapse.md``) the hinge prevented and rescued; from rows that
    were one key to rounding it brought the entropy back, and within 300 steps not the accuracy.
Not together with
    QK-norm, which bounds the logits itself, and soft-capping, behind whose tanh large logits have no gradient left.
    Beside QK-clip it is double work but no harm.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.functional._scores import (
    HIDDEN_SCORE,
    MASKED_BIAS,
    Scores,
    cut,
    exact_dtype,
    full_precision,
    upcast,
)
from lightning_reg.functional.attention_entropy import (
    _check_floating,
    _check_mask,
    _check_query_key,
    _visible_to_queries,
)
from lightning_reg.kernels import operator

Statistic = Literal["max", "logsumexp"]


def max_attention_logit(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Largest ``|score|`` of each attention row over its visible keys, without materialising the attention matrix.

    Arguments named as in ``torch.nn.functional.scaled_dot_product_attention`` mean the same.

    Args:
        query: (batch, heads, queries, dim); any number of leading axes, also none.
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        scale: Factor on the scores, default ``dim ** -0.5``.
        is_causal: Query i sees keys 0..i.
        attn_mask: Boolean (True = visible) or additive, broadcastable to (batch, heads, queries, keys).
        enable_gqa: Share each key head among ``heads / key_heads`` query heads.

    Returns:
        (batch, heads, queries) >= 0, float32 or float64; 0 for a row that sees no key.

    Raises:
        ValueError: If shapes do not fit, naming the argument.

    Example:
        >>> query, key = torch.ones(1, 1, 1, 4), torch.tensor([[[[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]]])
        >>> max_attention_logit(query, key)
        tensor([[[2.]]])
    """
    return logit_rows(
        query, key, attn_mask, statistic="max", scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
    )[0]  # fmt: skip


def max_attention_logit_from_scores(scores: Tensor, *, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """Largest ``|score|`` of each row of scores over its visible keys.

    Args:
        scores: Attention scores before softmax, any shape; values at or below ``MASKED_BIAS`` count as masked.
        dim: Axis of the keys.
        mask: Visible keys, True = visible, broadcastable to ``scores``.

    Returns:
        Shape of ``scores`` without ``dim``, >= 0, float32 or float64; 0 for a row that sees no key.

    Raises:
        ValueError: If ``scores`` or ``mask`` does not fit.

    Example:
        >>> max_attention_logit_from_scores(torch.tensor([[1.0, -3.0, float("-inf")]]))
        tensor([3.])
    """
    return logit_rows_from_scores(scores, statistic="max", dim=dim, mask=mask)[0]


def logit_rows(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    statistic: Statistic,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | int]:
    """``m`` or ``z`` of each row, with gradient in queries, keys and an additive mask, and the number of visible keys.

    Returns:
        ``(rows, visible)``, both (batch, heads, queries); one number where every query sees as many keys.
    """
    _check_query_key(query, key, attn_mask, enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    bias, mask = (None, attn_mask) if boolean else (attn_mask, None)
    rows = _LogitRows.apply(query, key, bias, mask, scale, is_causal, statistic)
    return rows, _visible_to_queries(query, key, attn_mask, is_causal, None)


def logit_rows_from_scores(
    scores: Tensor, *, statistic: Statistic, dim: int = -1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``m`` or ``z`` of each row of scores, and the number of visible keys, both of the shape without ``dim``."""
    hidden = _check_floating("scores", scores) <= MASKED_BIAS
    if mask is not None:
        hidden = hidden | ~_check_mask(mask, scores.shape)
    visible = (~hidden).sum(dim)
    if not scores.shape[dim]:
        return visible.to(exact_dtype(scores)), visible
    return _row(upcast(scores), hidden, statistic, dim), visible


class _LogitRows(torch.autograd.Function):
    """One number for each row; the backward recomputes the scores block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        statistic: Statistic,
    ) -> Tensor:
        """Return the statistic of every row, (batch, heads, queries)."""
        logits = _Logits(query, key, bias, mask, scale, is_causal)
        rows = _rows(logits.query, logits.key, logits.bias, logits.mask, scale, is_causal, statistic)
        rows = rows.reshape(query.shape[:-1])
        ctx.save_for_backward(query, key, bias, mask, rows)
        ctx.arguments, ctx.statistic = (scale, is_causal), statistic
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient in query, key and bias."""
        query, key, bias, mask, rows = ctx.saved_tensors
        with_bias = bias is not None and ctx.needs_input_grad[2]
        logits = _Logits(query, key, bias, mask, *ctx.arguments)
        if with_bias or torch.is_grad_enabled():  # a kernel knows neither a bias's gradient nor its own derivative
            for_query, for_key, for_bias = logits.pulls(rows, grad, ctx.statistic, with_bias)
            for_bias = None if for_bias is None else for_bias.to(bias.dtype)
        else:
            shape, for_bias = logits.query.shape[:3], None
            for_query, for_key = _pulls(
                logits.query, logits.key, logits.bias, logits.mask, rows.reshape(shape), grad.reshape(shape),
                *ctx.arguments, ctx.statistic,
            )  # fmt: skip
            for_query, for_key = for_query.reshape(query.shape), for_key.reshape(key.shape)
        return for_query.to(query.dtype), for_key.to(key.dtype), for_bias, None, None, None, None


def _like_rows(query: Tensor, *args: Any) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=exact_dtype(query))


@operator("attention_logits.forward", fake=_like_rows)
def _rows(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, is_causal: bool, statistic: str
) -> Tensor:
    """``m`` or ``z`` of every row, (B, H, M), from (B, H, M, D) and (B, G, N, D)."""
    return _Logits(query, key, bias, mask, scale, is_causal).rows(statistic)  # type: ignore[arg-type]


@operator("attention_logits.backward")
def _pulls(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, rows: Tensor, grad: Tensor, scale: float,
    is_causal: bool, statistic: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of ``(rows * grad).sum()``, (B, H, M), in (B, H, M, D) and (B, G, N, D)."""
    logits = _Logits(query, key, bias, mask, scale, is_causal)
    for_query, for_key, _ = logits.pulls(rows, grad, statistic, False)  # type: ignore[arg-type]
    return for_query.to(query.dtype), for_key.to(key.dtype)


class _Logits(Scores):
    """Attention scores in blocks, of which each row leaves one number. Letters as in its base."""

    def rows(self, statistic: Statistic) -> Tensor:
        """``m`` or ``z`` of every row, (batch, heads, queries)."""
        rows = self.query.new_zeros(self.query.shape[:3], dtype=exact_dtype(self.query))
        if self.key.shape[2]:
            with full_precision(self.query):
                for block, q, k in self.blocks():
                    cut(rows, block).copy_(_row(*self.logits(block, q, k), statistic, -1))
        return rows.reshape(self.shapes[0][:-1])

    def pulls(
        self, rows: Tensor, grad: Tensor, statistic: Statistic, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient of ``(rows * grad).sum()`` in query, key and bias."""
        rows, grad = (tensor.reshape(*self.query.shape[:3], 1) for tensor in (rows, grad))
        for_query, for_key = (torch.zeros_like(tensor, dtype=grad.dtype) for tensor in (self.query, self.key))
        for_bias = torch.zeros_like(self.bias, dtype=grad.dtype) if with_bias and self.bias is not None else None
        if self.key.shape[2]:
            with full_precision(self.query):
                for block, q, k in self.blocks():
                    push = _slope(*self.logits(block, q, k), cut(rows, block), statistic) * cut(grad, block)
                    if for_bias is not None:
                        part = cut(for_bias, block)
                        part.add_(push.sum_to_size(part.shape))
                    push = (push * self.scale).reshape(*q.shape[:3], k.shape[2])
                    part = cut(for_query, block)
                    part.copy_((push @ k).reshape(part.shape))
                    for_key[block[0]].add_(push.transpose(-1, -2) @ q)
        return for_query.reshape(self.shapes[0]), for_key.reshape(self.shapes[1]), self._as_given(for_bias)


def _row(scores: Tensor, hidden: Tensor | None, statistic: Statistic, dim: int) -> Tensor:
    """``m`` or ``z`` of rows with at least one key; 0 where all are hidden."""
    if statistic == "max":
        return _shown(scores, hidden, 0.0).abs().amax(dim)
    z = _shown(scores, hidden, HIDDEN_SCORE).logsumexp(dim)
    return z if hidden is None else torch.where(hidden.expand(scores.shape).all(dim), 0.0, z)


def _slope(scores: Tensor, hidden: Tensor | None, row: Tensor, statistic: Statistic) -> Tensor:
    """Derivative of ``m`` or ``z`` in the scores (..., N), given its value (..., 1)."""
    if statistic == "max":
        scores = _shown(scores, hidden, 0.0)
        # against the maximum of these very scores: those of the forward may have been rounded elsewhere
        largest = scores.abs() == scores.abs().amax(-1, keepdim=True)
        return scores.sign() * largest / largest.sum(-1, keepdim=True)
    return (_shown(scores, hidden, -math.inf) - row).exp()


def _shown(scores: Tensor, hidden: Tensor | None, fill: float) -> Tensor:
    return scores if hidden is None else scores.masked_fill(hidden, fill)
