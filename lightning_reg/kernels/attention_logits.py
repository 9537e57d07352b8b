"""Size of attention logits: one number of each row of scores, which are not written anywhere.

Letters: B batch, H heads, G key heads, M queries, N keys, D dim. A program takes ``ROWS`` queries of a head and walks
over its keys in steps of ``KEYS``.
"""

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
    MAX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Largest magnitude, or logarithm of the sum of exponentials, of ``ROWS`` rows of a head."""
    blocks = tl.cdiv(queries, ROWS)
    # in causal attention the later rows take longest: start with them
    block = blocks - 1 - tl.program_id(0) % blocks
    place = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = place // heads, place % heads
    row = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    query_ptr += b * query_b + h * query_h
    key_ptr += b * key_b + h // group * key_g
    mask_ptr += b * mask_b + h * mask_h
    q_mask = row[:, None] < queries
    if not WHOLE_DIM:
        q_mask &= d[None, :] < dim
    q = tl.load(query_ptr + row[:, None].to(tl.int64) * query_m + d[None, :], mask=q_mask, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    largest = tl.full([ROWS], _HIDDEN, tl.float32)
    total = tl.zeros([ROWS, KEYS], tl.float32)  # with MAX, the largest magnitude
    # keys that all of these rows see come first, without a comparison for each score
    last = tl.minimum(keys, (block + 1) * ROWS) if CAUSAL else keys
    shared = tl.minimum(last, block * ROWS) // KEYS * KEYS if CAUSAL else keys // KEYS * KEYS
    for start in range(0, shared, KEYS):
        largest, total = _take(
            q, key_ptr, mask_ptr, scale, largest, total, row, start, queries, keys, dim, key_n, mask_m, mask_n,
            MAX, False, CAUSAL, MASK, KEYS, DIM, WHOLE_DIM, PRECISION, WIDEN,
        )  # fmt: skip
    for start in range(shared, last, KEYS):
        largest, total = _take(
            q, key_ptr, mask_ptr, scale, largest, total, row, start, queries, keys, dim, key_n, mask_m, mask_n,
            MAX, True, CAUSAL, MASK, KEYS, DIM, WHOLE_DIM, PRECISION, WIDEN,
        )  # fmt: skip
    if MAX:
        result = tl.max(total, 1)  # leaves NaN out
        result = tl.where(tl.max((total != total).to(tl.int32), 1) > 0, float("nan"), result)
        if MASK != _ADDITIVE:
            result *= tl.abs(scale)
    else:
        result = (largest + tl.log2(tl.sum(total, 1))) * _LOG_2
        blind = (largest <= _HIDDEN) & (result == result)  # a row of NaN has no largest score either
        result = tl.where(blind, 0.0, tl.where(largest == float("inf"), largest, result))
    tl.store(result_ptr + place * queries + row, result, mask=row < queries)


@triton.jit
def _take(
    q, key_ptr, mask_ptr, scale, largest, total, row, start, queries, keys, dim, key_n, mask_m, mask_n,
    MAX: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Take the scores of ``KEYS`` keys into what is known of the rows; EDGE where some may be out of sight."""
    n = start + tl.arange(0, KEYS)
    d = tl.arange(0, DIM)
    at = key_ptr + n[None, :].to(tl.int64) * key_n + d[:, None]
    if EDGE and not WHOLE_DIM:
        k = tl.load(at, mask=(n[None, :] < keys) & (d[:, None] < dim), other=0.0)
    elif EDGE:
        k = tl.load(at, mask=n[None, :] < keys, other=0.0)
    elif not WHOLE_DIM:
        k = tl.load(at, mask=d[:, None] < dim, other=0.0)
    else:
        k = tl.load(at)
    if WIDEN:
        k = k.to(tl.float32)
    score = tl.dot(q, k, input_precision=PRECISION)
    fill = 0.0 if MAX else _HIDDEN
    if MASK == _ADDITIVE or not MAX:
        score *= scale
    if MASK != _NO_MASK:
        where = row[:, None].to(tl.int64) * mask_m + n[None, :].to(tl.int64) * mask_n
        inside = (row[:, None] < queries) & (n[None, :] < keys)
        if MASK == _BOOLEAN:
            score = tl.where(tl.load(mask_ptr + where, mask=inside, other=0) != 0, score, fill)
        else:
            bias = tl.load(mask_ptr + where, mask=inside, other=0.0).to(tl.float32)
            score = tl.where(bias <= _MASKED_BIAS, fill, score + bias)
    if EDGE and CAUSAL:
        score = tl.where(n[None, :] <= row[:, None], score, fill)
    if EDGE:
        score = tl.where(n[None, :] < keys, score, fill)
    if MAX:
        return largest, tl.maximum(total, tl.abs(score), propagate_nan=tl.PropagateNan.ALL)
    score *= _LOG2_E
    higher = tl.maximum(largest, tl.max(score, 1))
    total = total * tl.exp2(largest - higher)[:, None] + tl.exp2(score - higher[:, None])
    return higher, total


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
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    result = torch.zeros if not keys else torch.empty
    rows = result((batch, heads, queries), dtype=torch.float32, device=query.device)
    if not rows.numel() or not keys:
        return rows
    query, key = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key))
    given = mask.view(torch.uint8) if mask is not None else bias
    kind = _NO_MASK if given is None else _BOOLEAN if mask is not None else _ADDITIVE
    strides = (0, 0, 0, 0)
    if given is not None:
        strides = given.expand(batch, heads, queries, keys).stride()
    tile_rows, tile_keys, warps, stages = _tile(query)
    padded = max(16, triton.next_power_of_2(dim))
    _logit_rows_kernel[(batch * heads * triton.cdiv(queries, tile_rows),)](
        query, key, query if given is None else given, rows, float(scale), heads, heads // key.shape[1], queries, keys,
        dim, *query.stride()[:3], *key.stride()[:3], *strides,
        MAX=statistic == "max", CAUSAL=is_causal, MASK=kind, ROWS=tile_rows, KEYS=tile_keys, DIM=padded,
        WHOLE_DIM=padded == dim, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        WIDEN=not query.is_cuda,  # the interpreter knows no products of bfloat16
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return rows


def _check(query: Tensor, key: Tensor, bias: Tensor | None) -> None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"it has no kernel for {query.dtype}")
    if key.dtype != query.dtype:
        raise Unsupported(f"its queries are {query.dtype} and its keys {key.dtype}")
    if bias is not None and bias.dtype == torch.float64:
        raise Unsupported("its bias is torch.float64")
    if query.shape[3] > _LARGEST_DIM:
        raise Unsupported(f"its head dim is {query.shape[3]}, above {_LARGEST_DIM}")


def _tile(query: Tensor) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages."""
    dim = query.shape[3]
    if query.dtype == torch.float32:
        return (64, 32, 4, 2) if dim <= 64 else (32, 32, 4, 2)
    if dim > 128:
        return 64, 64, 4, 2
    return 64, 64, 4, 3
