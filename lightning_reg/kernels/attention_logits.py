"""Size of attention logits: one number of each row of scores, which are not written anywhere.

Letters: B batch, H heads, G key heads, M queries, N keys, D dim. A program takes ``ROWS`` queries of a head and walks
over its keys in steps of ``KEYS``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_reg.kernels.operators import Unsupported

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG_2 = tl.constexpr(0.6931471805599453)
_HIDDEN = tl.constexpr(-1e30)  # below any score, and finite: a row may see nothing
_MASKED_BIAS = tl.constexpr(-5e3)  # a bias at or below it hides its key
_LARGEST_DIM = 256

_NO_MASK, _BOOLEAN, _ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _logit_rows_kernel(
    query_ptr, key_ptr, mask_ptr, result_ptr, scale, heads, group, queries, keys, dim,
    query_b, query_h, query_m, key_b, key_g, key_n, mask_b, mask_h, mask_m, mask_n,
    MAX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Largest magnitude, or logarithm of the sum of exponentials, of ``ROWS`` rows of a head."""
    row, place = _rows_of(queries, ROWS)
    b, h = place // heads, place % heads
    key_ptr += b * key_b + h // group * key_g
    mask_ptr += b * mask_b + h * mask_h
    q = _load(query_ptr + b * query_b + h * query_h, row, queries, query_m, dim, True, DIM, WHOLE_DIM, WIDEN)
    largest = tl.full([ROWS], _HIDDEN, tl.float32)
    total = tl.zeros([ROWS, KEYS], tl.float32)  # with MAX, the largest magnitude
    # keys that all of these rows see come first, without a comparison for each score
    begin = tl.min(row, 0)
    last = tl.minimum(keys, begin + ROWS) if CAUSAL else keys
    shared = tl.minimum(last, begin) // KEYS * KEYS if CAUSAL else keys // KEYS * KEYS
    for start in range(0, shared, KEYS):
        n = start + tl.arange(0, KEYS)
        k = _load(key_ptr, n, keys, key_n, dim, False, DIM, WHOLE_DIM, WIDEN)
        score = _scores(q, k, mask_ptr, scale, row, n, queries, keys, mask_m, mask_n, MAX, False, CAUSAL, MASK, PER_ROW,
                        PRECISION)  # fmt: skip
        largest, total = _take(score, largest, total, MAX)
    for start in range(shared, last, KEYS):
        n = start + tl.arange(0, KEYS)
        k = _load(key_ptr, n, keys, key_n, dim, True, DIM, WHOLE_DIM, WIDEN)
        score = _scores(q, k, mask_ptr, scale, row, n, queries, keys, mask_m, mask_n, MAX, True, CAUSAL, MASK, PER_ROW,
                        PRECISION)  # fmt: skip
        largest, total = _take(score, largest, total, MAX)
    if MAX:
        result = _row_maximum(total)
        if MASK != _ADDITIVE:
            result *= tl.abs(scale)
    else:
        result = (largest + tl.log2(tl.sum(total, 1))) * _LOG_2
        blind = (largest <= _HIDDEN) & (result == result)  # a row of NaN has no largest score either
        result = tl.where(blind, 0.0, tl.where(largest == float("inf"), largest, result))
    tl.store(result_ptr + place * queries + row, result, mask=row < queries)


@triton.jit
def _query_gradient_kernel(
    query_ptr, key_ptr, mask_ptr, level_ptr, grad_ptr, weight_ptr, result_ptr, scale, heads, group, queries, keys, dim,
    query_b, query_h, query_m, key_b, key_g, key_n, mask_b, mask_h, mask_m, mask_n, result_b, result_h, result_m,
    MAX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradient of ``ROWS`` queries. With MAX it leaves, for the keys, each row's largest score and its share of it."""
    row, place = _rows_of(queries, ROWS)
    b, h = place // heads, place % heads
    key_ptr += b * key_b + h // group * key_g
    mask_ptr += b * mask_b + h * mask_h
    at = place * queries + row
    weight = tl.load(grad_ptr + at, mask=row < queries, other=0.0)
    last = tl.minimum(keys, tl.min(row, 0) + ROWS) if CAUSAL else keys
    result = tl.zeros([ROWS, DIM], tl.float32)
    if tl.sum((weight != 0).to(tl.int32), 0) > 0:  # below a hinge's bound there is nothing to do
        q = _load(query_ptr + b * query_b + h * query_h, row, queries, query_m, dim, True, DIM, WHOLE_DIM, WIDEN)
        count = tl.zeros([ROWS, KEYS], tl.float32)
        if MAX:
            for start in range(0, last, KEYS):
                n = start + tl.arange(0, KEYS)
                k = _load(key_ptr, n, keys, key_n, dim, True, DIM, WHOLE_DIM, WIDEN)
                score = _scores(q, k, mask_ptr, scale, row, n, queries, keys, mask_m, mask_n, MAX, True, CAUSAL, MASK,
                                PER_ROW, PRECISION)  # fmt: skip
                _, count = _take(score, weight, count, MAX)
            level = _row_maximum(count)
            tl.store(level_ptr + at, level, mask=row < queries)
            count = tl.zeros([ROWS, KEYS], tl.float32)
        else:
            level = tl.load(level_ptr + at, mask=row < queries, other=float("inf"))
        for start in range(0, last, KEYS):
            n = start + tl.arange(0, KEYS)
            k = _load(key_ptr, n, keys, key_n, dim, True, DIM, WHOLE_DIM, WIDEN)
            score = _scores(q, k, mask_ptr, scale, row, n, queries, keys, mask_m, mask_n, MAX, True, CAUSAL, MASK,
                            PER_ROW, PRECISION)  # fmt: skip
            push = _slope(score, level, MAX)
            if MAX:
                count += tl.abs(push)
            result += tl.dot(push.to(k.dtype), k, input_precision=PRECISION)
        if MAX:
            count = tl.sum(count, 1)
            weight = tl.where(count == 0, 0.0, weight / tl.where(count == 0, 1.0, count))
            weight = tl.where(level != level, level, weight)
        result *= (weight * _factor(scale, MAX, MASK))[:, None]
    if MAX:
        tl.store(weight_ptr + at, weight, mask=row < queries)
    _store(result_ptr + b * result_b + h * result_h, result, row, queries, result_m, dim, DIM)


@triton.jit
def _key_gradient_kernel(
    query_ptr, key_ptr, mask_ptr, level_ptr, weight_ptr, size_ptr, result_ptr, scale, heads, group, queries, keys, dim,
    query_b, query_h, query_m, key_b, key_g, key_n, mask_b, mask_h, mask_m, mask_n, result_b, result_g, result_n,
    MAX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradient of ``KEYS`` keys, from all queries of all heads that share them."""
    blocks = tl.cdiv(keys, KEYS)
    n = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = place // (heads // group), place % (heads // group)
    k = _load(key_ptr + b * key_b + g * key_g, n, keys, key_n, dim, True, DIM, WHOLE_DIM, WIDEN)
    # weights may be too small for half precision: there they are multiples of the largest
    size = tl.load(size_ptr)
    size = tl.where(size == 0, 1.0, size)
    first = tl.min(n, 0) // ROWS * ROWS if CAUSAL else 0
    result = tl.zeros([KEYS, DIM], tl.float32)
    for h in range(g * group, (g + 1) * group):
        for start in range(first, queries, ROWS):
            row = start + tl.arange(0, ROWS)
            at = (b * heads + h) * queries + row
            weight = tl.load(weight_ptr + at, mask=row < queries, other=0.0)
            if tl.sum((weight != 0).to(tl.int32), 0) > 0:
                level = tl.load(level_ptr + at, mask=row < queries, other=float("inf"))
                q = _load(
                    query_ptr + b * query_b + h * query_h, row, queries, query_m, dim, True, DIM, WHOLE_DIM, WIDEN
                )
                score = _scores(q, k, mask_ptr + b * mask_b + h * mask_h, scale, row, n, queries, keys, mask_m, mask_n,
                                MAX, True, CAUSAL, MASK, PER_ROW, PRECISION)  # fmt: skip
                push = _slope(score, level, MAX) * (weight / size)[:, None]
                result += tl.dot(tl.trans(push.to(q.dtype)), q, input_precision=PRECISION)
    result *= size * _factor(scale, MAX, MASK)
    _store(result_ptr + b * result_b + g * result_g, result, n, keys, result_n, dim, DIM)


@triton.jit
def _rows_of(queries, ROWS: tl.constexpr):
    """Queries of a program, and their place in (B, H)."""
    blocks = tl.cdiv(queries, ROWS)
    # in causal attention the later rows take longest: start with them
    block = blocks - 1 - tl.program_id(0) % blocks
    return block * ROWS + tl.arange(0, ROWS), (tl.program_id(0) // blocks).to(tl.int64)


@triton.jit
def _load(
    ptr, token, tokens, stride, dim, EDGE: tl.constexpr, DIM: tl.constexpr, WHOLE_DIM: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Tokens (tokens, dim), 0 beyond the last; EDGE where some may be."""
    d = tl.arange(0, DIM)[None, :]
    at = ptr + token[:, None].to(tl.int64) * stride + d
    if EDGE and not WHOLE_DIM:
        x = tl.load(at, mask=(token[:, None] < tokens) & (d < dim), other=0.0)
    elif EDGE:
        x = tl.load(at, mask=token[:, None] < tokens, other=0.0)
    elif not WHOLE_DIM:
        x = tl.load(at, mask=d < dim, other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _store(ptr, x, token, tokens, stride, dim, DIM: tl.constexpr):
    d = tl.arange(0, DIM)[None, :]
    at = ptr + token[:, None].to(tl.int64) * stride + d
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(token[:, None] < tokens) & (d < dim))


@triton.jit
def _scores(
    q, k, mask_ptr, scale, row, n, queries, keys, mask_m, mask_n,
    MAX: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (rows, keys) to base 2, for MAX without their scale; with EDGE some may be out of sight."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    fill = 0.0 if MAX else _HIDDEN
    if MASK != _NO_MASK:
        where = n[None, :].to(tl.int64) * mask_n
        inside = n[None, :] < keys
        if PER_ROW:
            where += row[:, None].to(tl.int64) * mask_m
            inside &= row[:, None] < queries
        given = tl.load(mask_ptr + where, mask=inside, other=0)
        if MASK == _ADDITIVE:
            bias = tl.broadcast_to(given.to(tl.float32), score.shape)
            # one rounding, here as there: equal scores stay equal
            score = tl.fma(score, tl.full(score.shape, scale, tl.float32), bias)
            score = tl.where(bias <= _MASKED_BIAS, fill, score)
        else:
            if not MAX:
                score *= scale
            score = tl.where(given != 0, score, fill)
    elif not MAX:
        score *= scale
    if EDGE and CAUSAL:
        score = tl.where(n[None, :] <= row[:, None], score, fill)
    if EDGE:
        score = tl.where(n[None, :] < keys, score, fill)
    return score if MAX else score * _LOG2_E


@triton.jit
def _take(score, largest, total, MAX: tl.constexpr):
    """What is known of the rows, with more scores."""
    if MAX:
        return largest, tl.maximum(total, tl.abs(score), propagate_nan=tl.PropagateNan.ALL)
    higher = tl.maximum(largest, tl.max(score, 1))
    total = total * tl.exp2(largest - higher)[:, None] + tl.exp2(score - higher[:, None])
    return higher, total


@triton.jit
def _row_maximum(x):
    """Maximum of rows; NaN, which ``tl.max`` leaves out, stays."""
    return tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(x, 1))


@triton.jit
def _slope(score, level, MAX: tl.constexpr):
    """Derivative of a row's number in its scores, which for MAX is to be shared among equals."""
    if MAX:
        sign = tl.where(score > 0, 1.0, tl.where(score < 0, -1.0, 0.0))
        return tl.where(tl.abs(score) == level[:, None], sign, 0.0)
    return tl.exp2(score - level[:, None] * _LOG2_E)


@triton.jit
def _factor(scale, MAX: tl.constexpr, MASK: tl.constexpr):
    """Derivative of what ``_scores`` gives in the products of queries and keys."""
    return tl.abs(scale) if MAX and MASK != _ADDITIVE else scale


def forward(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    statistic: str,
) -> Tensor:
    """``m`` or ``z`` of each row.

    Args:
        query: (B, H, M, D).
        key: (B, G, N, D), of the dtype of ``query``.
        bias: Additive mask, broadcastable to (B, H, M, N); at or below -5e3 it hides a key.
        mask: Boolean mask, True = visible. Not together with ``bias``.
        scale: Factor on the scores.
        is_causal: Query i sees keys 0..i.
        statistic: ``max`` or ``logsumexp``.

    Returns:
        (B, H, M) in float32, 0 for a row that sees no key.
    """
    _check(query, key, bias)
    rows = query.new_zeros(query.shape[:3], dtype=torch.float32)
    if rows.numel() and key.shape[2]:
        query, key, given, shared, options = _prepared(query, key, bias, mask, scale, is_causal, statistic)
        tiles = triton.cdiv(query.shape[2], options["ROWS"])
        _logit_rows_kernel[(query.shape[:2].numel() * tiles,)](query, key, given, rows, *shared, **options)
    return rows


def backward(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    grad: Tensor,
    scale: float,
    is_causal: bool,
    statistic: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``(rows * grad).sum()``, with ``rows`` of ``forward``, in queries and keys. A bias gets none."""
    _check(query, key, bias)
    results = _like(query), _like(key)
    if not rows.numel() or not key.shape[2]:
        return results[0].zero_(), results[1].zero_()
    query, key, given, shared, options = _prepared(query, key, bias, mask, scale, is_causal, statistic, True)
    grad = grad.contiguous().float()
    # of the maximum: what counts as the largest score, and how much each of those that are gets
    largest = statistic == "max"
    level, weight = (torch.empty_like(grad), torch.empty_like(grad)) if largest else (rows.contiguous(), grad)
    tiles = triton.cdiv(query.shape[2], options["ROWS"])
    _query_gradient_kernel[(query.shape[:2].numel() * tiles,)](
        query, key, given, level, grad, weight, results[0], *shared, *results[0].stride()[:3], **options
    )
    tiles = triton.cdiv(key.shape[2], options["KEYS"])
    _key_gradient_kernel[(key.shape[:2].numel() * tiles,)](
        query, key, given, level, weight, grad.abs().amax(), results[1], *shared, *results[1].stride()[:3], **options
    )
    return results


def _prepared(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    statistic: str,
    backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor, tuple, dict[str, Any]]:
    """Queries, keys, mask, and the arguments that all kernels share."""
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    query, key = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key))
    given = mask.view(torch.uint8) if mask is not None else bias
    kind = _NO_MASK if given is None else _BOOLEAN if mask is not None else _ADDITIVE
    strides = (0, 0, 0, 0) if given is None else given.expand(batch, heads, queries, keys).stride()
    shared = (
        float(scale), heads, heads // key.shape[1], queries, keys, dim, *query.stride()[:3], *key.stride()[:3], *strides
    )  # fmt: skip
    rows, columns, warps, stages = _tile(query, keys, backward)
    padded = max(16, triton.next_power_of_2(dim))
    options = {
        "MAX": statistic == "max", "CAUSAL": is_causal, "MASK": kind, "PER_ROW": strides[2] != 0,
        "ROWS": rows, "KEYS": columns, "DIM": padded, "WHOLE_DIM": padded == dim,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "WIDEN": not query.is_cuda,  # the interpreter knows no products of bfloat16
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    return query, key, query if given is None else given, shared, options


def _like(tensor: Tensor) -> Tensor:
    """Memory for a gradient, the last axis together."""
    result = torch.empty_like(tensor)
    return result if result.stride(3) == 1 else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _check(query: Tensor, key: Tensor, bias: Tensor | None) -> None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"it has no kernel for {query.dtype}")
    if key.dtype != query.dtype:
        raise Unsupported(f"its queries are {query.dtype} and its keys {key.dtype}")
    if bias is not None and bias.dtype == torch.float64:
        raise Unsupported("its bias is torch.float64")
    if query.shape[3] > _LARGEST_DIM:
        raise Unsupported(f"its head dim is {query.shape[3]}, above {_LARGEST_DIM}")


def _tile(query: Tensor, keys: int, backward: bool) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages, as measured on an H100."""
    dim = query.shape[3]
    if query.dtype == torch.float32:
        return (64, 32, 4, 2) if dim <= 64 and not backward else (32, 32, 4, 2)
    if dim > 128:
        return (32, 32, 4, 2) if backward else (64, 64, 4, 2)
    return (128, 32, 4, 3) if dim <= 64 and keys <= 512 and not backward else (64, 64, 4, 3)
