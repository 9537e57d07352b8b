"""Attention output with the entropy of its rows, and the gradients of both, without the attention matrix.

Letters: B batch, H heads, G key heads (H / G query heads share one), M queries, N keys, D head dim, V value dim.
With s the scaled and biased scores, p = softmax(s) and m the row's largest score:
    H_i = log sum_j exp(s_ij - m_i) - sum_j p_ij (s_ij - m_i)                                (nats)
    ds_ij = p_ij (dP_ij - c_i - dH_i log p_ij),   c_i = sum_v dO_iv O_iv + dH_i H_i
Kernels keep scores in units of log 2, for ``exp2``. Every key that query i sees lies in
``[position - left, position + right]`` with ``position = offset + step * i``.
"""

import math
from copy import copy
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_reg.kernels.launching import ALIGNED, INTERPRETED, MOST_PLANS, TENSOR, Launch, Layout, layout
from lightning_reg.kernels.operators import Unsupported

try:  # from Triton 3.4
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

LARGEST_DIM = 256
L2_BYTES = 2**24  # keys and values of heads that run together

# rows and keys of a block, warps, stages; by kernel and largest dim; rows of "query" are a multiple of those of "key"
BLOCKS = {  # dims 64 and 128 chosen by measurements on an H100
    "forward": {64: (64, 128, 4, 2), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    "query": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
    "key": {64: (32, 128, 4, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
}
SMALL_BLOCKS = {  # fit the registers and 99 KiB of shared memory of other GPUs
    "forward": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 1)},
    "query": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 1)},
    "key": {64: (32, 64, 4, 2), 128: (32, 64, 4, 2), 256: (16, 32, 4, 1)},
}
FLOAT32_BLOCKS = {  # eight warps for dim 256 read outside of memory with Triton 3.6
    "forward": {64: (64, 32, 4, 2), 128: (64, 16, 4, 2), 256: (64, 16, 4, 1)},
    "query": {64: (64, 32, 4, 2), 128: (64, 16, 4, 1), 256: (16, 16, 4, 1)},
    "key": {64: (16, 64, 4, 2), 128: (16, 64, 4, 1), 256: (16, 16, 4, 1)},
}

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED_BIAS = tl.constexpr(-5e3)  # of functional/attention_entropy.py
HIDDEN = tl.constexpr(-1e30)  # finite, so that a block without visible keys gives no NaN; later blocks wash it out
NEVER = tl.constexpr(-1e4)  # logarithm of probability 0
SEEN = tl.constexpr(-1e29)  # largest score of a row that sees a key


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    offset: int,
    step: int,
    sized: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention and the statistics of its rows.

    Args:
        query: (B, H, M, D).
        key: (B, G, N, D).
        value: (B, G, N, V), or None for the statistics alone.
        bias: Added to the scores, four axes of full size or 1; at or below ``MASKED_BIAS`` it hides its key.
        mask: Visible keys, True = visible, four axes of full size or 1.
        scale: Factor on the scores, positive.
        is_causal: Query i sees the keys up to its position, ``offset + step * i``.
        window: Distance from which on keys are hidden, before the position if causal, else on both sides.
        offset: Position of the first query.
        step: Distance between two queries.
        sized: Give the largest magnitude of the scores of each row, bias included.

    Returns:
        Output (B, H, M, V) in the dtype of ``query``, in memory (B, M, H, V), or (0,) without ``value``; entropy in
        nats, log-sum-exp in nats and largest magnitude, each (B, H, M) in float32, the last (0,) unless ``sized``. All
        are 0 in a row that sees no key.
    """
    _check(query, key, value, bias, mask, scale)
    batch, heads, rows, dim = query.shape
    keys, columns = key.shape[2], dim if value is None else value.shape[3]
    entropy, lse = (query.new_empty(batch, heads, rows, dtype=torch.float32) for _ in range(2))
    largest = torch.empty_like(entropy) if sized else query.new_empty(0, dtype=torch.float32)
    output = query.new_empty(0) if value is None else _empty(query, heads, rows, columns)
    if entropy.numel() == 0 or keys == 0:
        return output.zero_(), entropy.zero_(), lse.zero_(), largest.zero_()
    block_m, block_n, *_ = _blocks("forward", query.dtype, dim, columns, query.device)
    tensors = (query, key, value, None if value is None else output)
    described, plain, tiles = _tiles(tensors, (block_m, block_n, block_n, block_m))
    bias, mask = _table(bias), _table(mask)
    launch = _forward_launch(
        query.device, described, tuple(map(layout, plain)), layout(bias), layout(mask), scale, is_causal, window,
        offset, step, sized,
    )  # fmt: skip
    launch(*_given(*tiles, entropy, lse, largest, bias, mask))
    return output, entropy, lse, largest


def backward(
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    output: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    offset: int,
    step: int,
    deterministic: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the attention and of the entropy of its rows.

    ``grad_output`` (B, H, M, V) or ``grad_entropy`` (B, H, M) is None where nobody used what it belongs to. ``output``,
    ``entropy`` and ``lse`` are what the forward returned, whose arguments the others are. ``deterministic`` leaves
    nothing to choose: sums have one order. One kernel for all gradients, with atomic sums for the queries, took 10 %
    longer. ``bias_grad`` says that the bias needs a gradient, which is not supported.

    Returns:
        Gradients of query, key and value, in memory (B, M, H, D), the last (0,) without ``value``; and a (0,) in place
        of that of the bias.
    """
    _check(query, key, value, bias, mask, scale)
    if bias_grad:
        raise Unsupported("its kernel has no gradient for an additive bias")
    batch, heads, rows, dim = query.shape
    groups, keys = key.shape[1:3]
    if value is None or grad_output is None:
        grad_output = output = None
    else:
        grad_output = grad_output.to(query.dtype)
    columns = dim if value is None else value.shape[3]
    grad_query = _empty(query, heads, rows, dim)
    grad_key = _empty(query, groups, keys, dim)
    grad_value = query.new_empty(0) if value is None else _empty(query, groups, keys, columns)
    none = query.new_empty(0)
    if (grad_output is None and grad_entropy is None) or entropy.numel() == 0 or keys == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_(), none
    if grad_output is None:
        value, grad_value = None, grad_value.zero_()

    block_m, block_n, *_ = _blocks("query", query.dtype, dim, columns, query.device)
    statistics = query.new_empty(3, batch * heads, _cdiv(rows, block_m) * block_m, dtype=torch.float32)
    bias, mask = _table(bias), _table(mask)
    tensors = (query, key, value, grad_output, output)
    described, plain, tiles = _tiles(tensors, (block_m, block_n, block_n, block_m, block_m))
    band = (columns, layout(grad_entropy), layout(bias), layout(mask), scale, is_causal, window, offset, step)
    launch = _query_launch(query.device, described, tuple(map(layout, plain)), layout(grad_query), *band)
    launch(*_given(*tiles, grad_entropy, entropy, lse, statistics, grad_query, bias, mask))

    block_m, block_n, *_ = _blocks("key", query.dtype, dim, columns, query.device)
    described, plain, tiles = _tiles(tensors[:4], (block_m, block_n, block_n, block_m))
    grads = (layout(grad_key), None if value is None else layout(grad_value))
    launch = _key_launch(query.device, described, tuple(map(layout, plain)), statistics.shape[2], *grads, *band)
    launch(*_given(*tiles, statistics, grad_key, None if value is None else grad_value, bias, mask))
    return grad_query, grad_key, grad_value, none


# --- launches --------------------------------------------------------------------------------------------------------


@lru_cache(MOST_PLANS)
def _forward_launch(
    device: torch.device, described: bool, tiles: tuple[Layout | None, ...], bias: Layout | None, mask: Layout | None,
    scale: float, is_causal: bool, window: int | None, offset: int, step: int, sized: bool,
) -> Launch:  # fmt: skip
    query, key, value, _ = tiles
    dtype, (batch, heads, rows, dim), _ = query  # type: ignore[misc]
    groups, keys = key[1][1:3]  # type: ignore[index]
    columns = dim if value is None else value[1][3]
    block_m, block_n, warps, stages = _blocks("forward", dtype, dim, columns, device)
    left, right, has_left, has_right = _spans(is_causal, window)
    blocks = _cdiv(rows, block_m)
    return Launch(
        _attention_entropy_forward_kernel, (blocks * batch * heads,),
        *_tile_arguments(tiles, described), TENSOR, TENSOR, TENSOR, *_table_arguments(bias), *_table_arguments(mask),
        batch * heads, heads, heads // groups, rows, keys, blocks, _group(key, value, has_right),
        scale * LOG2E.value, offset, step, left, right,
        D=dim, V=columns, DP=_padded(dim), VP=_padded(columns), BLOCK_M=block_m, BLOCK_N=block_n,
        HAS_VALUE=value is not None, LEFT=has_left, RIGHT=has_right, TMA=described, PRECISION=_precision(dtype),
        SIZED=sized, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@lru_cache(MOST_PLANS)
def _query_launch(
    device: torch.device, described: bool, tiles: tuple[Layout | None, ...], grad_query: Layout, columns: int,
    grad_entropy: Layout | None, bias: Layout | None, mask: Layout | None, scale: float, is_causal: bool,
    window: int | None, offset: int, step: int,
) -> Launch:  # fmt: skip
    query, key, value, *_ = tiles
    dtype, (batch, heads, rows, dim), _ = query  # type: ignore[misc]
    groups, keys = key[1][1:3]  # type: ignore[index]
    block_m, block_n, warps, stages = _blocks("query", dtype, dim, columns, device)
    blocks = _cdiv(rows, block_m)
    left, right, has_left, has_right = _spans(is_causal, window)
    return Launch(
        _attention_entropy_backward_query_kernel, (blocks * batch * heads,), *_tile_arguments(tiles, described),
        *((None, 0, 0, 0) if grad_entropy is None else (TENSOR, *grad_entropy[2])), TENSOR, TENSOR, TENSOR,
        TENSOR, *grad_query[2][:3], *_table_arguments(bias), *_table_arguments(mask),
        batch * heads, heads, heads // groups, rows, keys, blocks * block_m, blocks, _group(key, value, has_right),
        scale, offset, step, left, right,
        D=dim, V=columns, DP=_padded(dim), VP=_padded(columns), HAS_VALUE=value is not None,
        ENTROPY=grad_entropy is not None, LEFT=has_left, RIGHT=has_right, TMA=described,
        PRECISION=_precision(dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@lru_cache(MOST_PLANS)
def _key_launch(
    device: torch.device, described: bool, tiles: tuple[Layout | None, ...], padded_rows: int, grad_key: Layout,
    grad_value: Layout | None, columns: int, grad_entropy: Layout | None, bias: Layout | None, mask: Layout | None,
    scale: float, is_causal: bool, window: int | None, offset: int, step: int,
) -> Launch:  # fmt: skip
    query, key, value, grad_output = tiles
    dtype, (batch, heads, rows, dim), _ = query  # type: ignore[misc]
    groups, keys = key[1][1:3]  # type: ignore[index]
    block_m, block_n, warps, stages = _blocks("key", dtype, dim, columns, device)
    blocks = _cdiv(keys, block_n)
    left, right, has_left, has_right = _spans(is_causal, window)
    return Launch(
        _attention_entropy_backward_key_kernel, (blocks * batch * groups,), *_tile_arguments(tiles, described),
        TENSOR, TENSOR, *grad_key[2][:3], *((None, 0, 0, 0) if grad_value is None else (TENSOR, *grad_value[2][:3])),
        *_table_arguments(bias), *_table_arguments(mask),
        batch * groups, heads, heads // groups, rows, keys, padded_rows, blocks, _group(query, grad_output, has_right),
        scale, offset, step, left, right,
        D=dim, V=columns, DP=_padded(dim), VP=_padded(columns), HAS_VALUE=value is not None,
        ENTROPY=grad_entropy is not None, LEFT=has_left, RIGHT=has_right, TMA=described,
        PRECISION=_precision(dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _given(*tensors: Any) -> list[Any]:
    return [tensor for tensor in tensors if tensor is not None]


def _tile_arguments(tiles: tuple[Layout | None, ...], described: bool) -> list[Any]:
    """Tensors with the strides of three axes each, which a descriptor knows itself."""
    found: list[Any] = []
    for tile in tiles:
        found += (None, 0, 0, 0) if tile is None else (TENSOR, *((0, 0, 0) if described else tile[2][:3]))
    return found


def _table_arguments(table: Layout | None) -> tuple[Any, ...]:
    """A bias or mask with its strides, those of broadcast axes 0, and whether queries differ in it."""
    if table is None:
        return None, 0, 0, 0, 0, False
    _, shape, strides = table
    return TENSOR, *(0 if n == 1 else stride for n, stride in zip(shape, strides)), shape[2] > 1


def unsupported(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> str | None:
    """Why the kernels cannot take these tensors; completes 'because ...'."""
    others = [tensor.device for tensor in (key, value, bias, mask) if tensor is not None]
    if any(device != query.device for device in others):
        return "its kernel takes tensors of one device"
    return _refusal(layout(query), layout(key), layout(value), None if bias is None else bias.dtype)


def _refusal(query: Layout, key: Layout, value: Layout | None, bias: torch.dtype | None) -> str | None:
    (dtype, (_, heads, *_), _), (_, (_, groups, *_), _) = query, key
    dtypes = [tensor[0] for tensor in (query, key, value) if tensor is not None]
    dims = [tensor[1][-1] for tensor in (query, key, value) if tensor is not None]
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernel takes float16, bfloat16 and float32, not {dtype}"
    if any(other != dtype for other in dtypes):
        return f"its kernel takes one dtype, not {' and '.join(map(str, dtypes))}"
    if max(dims) > LARGEST_DIM or min(dims) == 0:
        return f"its kernel takes head dims from 1 to {LARGEST_DIM}, not {max(dims)}"
    if groups == 0 or heads % groups:
        return f"its kernel shares key heads evenly, not {groups} among {heads}"
    if bias is not None and bias not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernel takes a bias of float16, bfloat16 or float32, not {bias}"
    return None


def _empty(query: Tensor, heads: int, rows: int, columns: int) -> Tensor:
    """An empty (B, heads, rows, columns) whose heads lie together in memory, as the layer after attention reads it."""
    return query.new_empty(query.shape[0], rows, heads, columns).transpose(1, 2)


def _tiles(tensors: tuple[Tensor | None, ...], rows: tuple[int, ...]) -> tuple[bool, list[Tensor | None], list[Any]]:
    """Whether a kernel takes descriptors, tensors with adjacent rows, and what the kernel takes for them.

    Args:
        tensors: (B, H, tokens, D) each, or None.
        rows: Tokens of a block of each.
    """
    plain = [tensor if tensor is None or tensor.stride(3) == 1 else tensor.contiguous() for tensor in tensors]
    found: list[Any] = []
    for tensor, size in zip(plain, rows):
        if tensor is None:
            found.append(None)
            continue
        template = _described(tensor.shape, tensor.stride(), tensor.dtype, size)
        if template is None or tensor.data_ptr() % ALIGNED or not _is_hopper(tensor.device):
            return False, plain, plain
        described = copy(template)  # a third of the time of making one
        described.base = tensor
        found.append(described)
    return True, plain, found


@lru_cache(MOST_PLANS)
def _described(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int) -> Any:
    """A descriptor without its tensor; None where the tensor memory accelerator cannot address it."""
    size = dtype.itemsize
    if TensorDescriptor is None or shape[3] * size < 16:
        return None
    if any(n > 1 and (stride <= 0 or stride * size % 16) for n, stride in zip(shape[:3], strides)):
        return None
    aligned = [shape[3] * 16 if n == 1 else stride for n, stride in zip(shape[:3], strides)]
    base = torch.empty(0, dtype=dtype)
    made = TensorDescriptor(base, list(shape), [*aligned, 1], [1, 1, rows, _padded(shape[3])])
    made.base = None
    return made


def _check(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, mask: Tensor | None, scale: float
) -> None:
    reason = unsupported(query, key, value, bias, mask)
    if reason is not None:
        raise Unsupported(reason)
    if not scale > 0 or math.isinf(scale):
        raise Unsupported(f"its kernel takes a positive scale, not {scale}")


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _cdiv(number: int, size: int) -> int:
    return -(-number // size)


def _precision(dtype: torch.dtype) -> str:
    """How products are taken: those of float32 as three of TF32, exact to 2**-22; the interpreter has no bfloat16."""
    if INTERPRETED:
        return "upcast"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _table(table: Tensor | None) -> Tensor | None:
    """A bias, or a mask as bytes."""
    return table.view(torch.uint8) if table is not None and table.dtype == torch.bool else table


def _spans(is_causal: bool, window: int | None) -> tuple[int, int, bool, bool]:
    """How many keys before and after its position a query sees, and whether either is limited."""
    left = 0 if window is None else max(window - 1, -1)
    right = 0 if is_causal else left
    return left, right, window is not None, is_causal or window is not None


def _group(first: Layout | None, second: Layout | None, uneven: bool) -> int:
    """Heads that run side by side: as many as leave what they read over and over in the L2 cache."""
    if not uneven:
        return 1
    size = sum(shape[2] * shape[3] * dtype.itemsize for dtype, shape, _ in filter(None, (first, second)))
    return max(1, min(L2_BYTES // size, 64))


def _blocks(kernel: str, dtype: torch.dtype, dim: int, columns: int, device: torch.device) -> tuple[int, int, int, int]:
    """Rows and keys of a block, warps and stages."""
    tables = FLOAT32_BLOCKS if dtype == torch.float32 else BLOCKS if _is_hopper(device) else SMALL_BLOCKS
    return tables[kernel][max(64, _padded(dim), _padded(columns))]


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Whether ``device`` has a tensor memory accelerator and room for large blocks; Triton's interpreter has."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@triton.jit
def _place(sets, blocks, group, REVERSED: tl.constexpr):
    """Block and set (batch and head) of a program: ``group`` sets side by side, block after block."""
    program = tl.program_id(0)
    first = program // (blocks * group) * group
    width = tl.minimum(group, sets - first)
    rest = program - first * blocks
    block = rest // width
    if REVERSED:
        block = blocks - 1 - block
    return block, first + rest % width


@triton.jit
def _load_tile(
    source, stride_b, stride_h, stride_r, batch, head, row, rows,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK, PADDED) from ``row`` on, zeros outside."""
    if TMA:
        tile = source.load([batch, head, row, 0]).reshape(BLOCK, PADDED)
    else:
        at = row + tl.arange(0, BLOCK)
        column = tl.arange(0, PADDED)
        base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        inside = (at[:, None] < rows) & (column[None, :] < COLUMNS)
        tile = tl.load(base + at[:, None].to(tl.int64) * stride_r + column[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _store_tile(
    target, stride_b, stride_h, stride_r, batch, head, row, rows, tile,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = row + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    base = target + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    inside = (at[:, None] < rows) & (column[None, :] < COLUMNS)
    tl.store(base + at[:, None].to(tl.int64) * stride_r + column[None, :], tile, mask=inside)


@triton.jit
def _dot(first, second, total, PRECISION: tl.constexpr):
    if PRECISION == "upcast":
        total = tl.dot(first.to(tl.float32), second.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(first, second, total, input_precision=PRECISION)
    return total


@triton.jit
def _load_table(table, stride_r, stride_k, row, key, rows, keys, FULL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Part of a bias or mask for ``row`` x ``key``, or one row of it where all are the same."""
    if FULL:
        if TRANSPOSED:
            at = row[None, :].to(tl.int64) * stride_r + key[:, None].to(tl.int64) * stride_k
            inside = (row[None, :] < rows) & (key[:, None] < keys)
        else:
            at = row[:, None].to(tl.int64) * stride_r + key[None, :].to(tl.int64) * stride_k
            inside = (row[:, None] < rows) & (key[None, :] < keys)
        found = tl.load(table + at, mask=inside, other=0)
    else:
        found = tl.load(table + key.to(tl.int64) * stride_k, mask=key < keys, other=0)
        found = found[:, None] if TRANSPOSED else found[None, :]
    return found


@triton.jit
def _scores(
    products, row, key, rows, keys, scale,
    bias, bias_r, bias_k, BIAS_FULL: tl.constexpr, mask, mask_r, mask_k, MASK_FULL: tl.constexpr,
    offset, step, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    EDGE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2 from products of queries and keys, those of hidden keys ``HIDDEN``."""
    scores = products * scale
    if bias is not None:
        added = _load_table(bias, bias_r, bias_k, row, key, rows, keys, BIAS_FULL, TRANSPOSED).to(tl.float32)
        hides = added <= MASKED_BIAS
        scores = tl.where(hides, HIDDEN, scores + tl.where(hides, 0.0, added) * LOG2E)
    if mask is not None:
        shown = _load_table(mask, mask_r, mask_k, row, key, rows, keys, MASK_FULL, TRANSPOSED)
        scores = tl.where(shown != 0, scores, HIDDEN)
    if EDGE:
        position = offset + step * row
        if TRANSPOSED:
            position, key = position[None, :], key[:, None]
        else:
            position, key = position[:, None], key[None, :]
        visible = key < keys
        if LEFT:
            visible = visible & (key >= position - left)
        if RIGHT:
            visible = visible & (key <= position + right)
        scores = tl.where(visible, scores, HIDDEN)
    return scores


@triton.jit
def _key_range(
    row, rows, keys, offset, step, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Keys that a block of queries sees, ``[begin, end)``, and between them those that all of its queries see."""
    near = offset + step * row
    far = offset + step * (tl.minimum(row + BLOCK_M, rows) - 1)
    begin, end, full_begin, full_end = 0, keys, 0, keys
    if LEFT:
        begin = tl.minimum(tl.maximum(near - left, 0), keys) // BLOCK_N * BLOCK_N
        full_begin = tl.maximum(far - left, 0)
    if RIGHT:
        end = tl.minimum(tl.maximum(far + right + 1, 0), keys)
        full_end = tl.minimum(tl.maximum(near + right + 1, 0), keys)
    full_begin = tl.minimum((full_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _row_range(
    key, rows, keys, offset, step, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Queries that see a key of a block, ``[begin, end)``, and between them those that see all of its keys."""
    last = tl.minimum(key + BLOCK_N, keys) - 1
    begin, end, full_begin, full_end = 0, rows, 0, rows
    if RIGHT:
        begin = tl.minimum(tl.maximum(key - right - offset + step - 1, 0) // step, rows) // BLOCK_M * BLOCK_M
        full_begin = tl.minimum(tl.maximum(last - right - offset + step - 1, 0) // step, rows)
    if LEFT:
        end = tl.minimum(tl.maximum(last + left - offset + step, 0) // step, rows)
        full_end = tl.minimum(tl.maximum(key + left - offset + step, 0) // step, rows)
    full_begin = tl.minimum((full_begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M, end)
    full_begin = tl.where(key + BLOCK_N > keys, end, full_begin)
    full_begin = tl.maximum(full_begin, begin)
    # rows after the last one have probability 0 and need no mask
    full_end = tl.where(full_end == rows, end, full_end // BLOCK_M * BLOCK_M)
    return begin, full_begin, tl.maximum(full_end, full_begin), end


@triton.jit
def _forward_over_keys(
    begin, end, tile, largest, total, moment, gathered, size,
    k, k_b, k_h, k_r, v, v_b, v_h, v_r, batch, key_head, row, rows, keys, scale,
    bias, bias_r, bias_k, BIAS_FULL: tl.constexpr, mask, mask_r, mask_k, MASK_FULL: tl.constexpr,
    offset, step, left, right,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALUE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Take in keys ``[begin, end)``: ``total`` = sum exp(s - m), ``moment`` = sum (s - m) exp(s - m)."""
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        keys_tile = _load_tile(k, k_b, k_h, k_r, batch, key_head, start, keys, D, DP, BLOCK_N, TMA)
        products = _dot(tile, tl.trans(keys_tile), None, PRECISION)
        if EDGE or bias is not None or mask is not None:
            scores = _scores(
                products, row, start + tl.arange(0, BLOCK_N), rows, keys, scale,
                bias, bias_r, bias_k, BIAS_FULL, mask, mask_r, mask_k, MASK_FULL,
                offset, step, left, right, LEFT, RIGHT, EDGE, False,
            )  # fmt: skip
            above = tl.maximum(largest, tl.max(scores, 1))
            if SIZED:
                size = tl.maximum(size, tl.max(tl.where(scores > SEEN, tl.abs(scores), 0.0), 1))
            scores = scores - above[:, None]
        else:
            above = tl.maximum(largest, tl.max(products, 1) * scale)
            if SIZED:
                size = tl.maximum(size, tl.max(tl.abs(products), 1) * scale)
            scores = products * scale - above[:, None]
        probs = tl.exp2(scores)
        rescale = tl.exp2(largest - above)
        moment = (moment + total * (largest - above)) * rescale + tl.sum(probs * scores, 1)
        total = total * rescale + tl.sum(probs, 1)
        largest = above
        if HAS_VALUE:
            gathered = gathered * rescale[:, None]
            values = _load_tile(v, v_b, v_h, v_r, batch, key_head, start, keys, V, VP, BLOCK_N, TMA)
            gathered = _dot(probs.to(values.dtype), values, gathered, PRECISION)
    return largest, total, moment, gathered, size


@triton.jit(do_not_specialize=["rows", "keys", "blocks", "group", "offset", "left", "right"])
def _attention_entropy_forward_kernel(
    q, q_b, q_h, q_r, k, k_b, k_h, k_r, v, v_b, v_h, v_r, output, o_b, o_h, o_r,
    entropy, lse, largest_size,
    bias, bias_b, bias_h, bias_r, bias_k, BIAS_FULL: tl.constexpr,
    mask, mask_b, mask_h, mask_r, mask_k, MASK_FULL: tl.constexpr,
    sets, heads, repeats, rows, keys, blocks, group, scale, offset, step, left, right,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALUE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    SIZED: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys it sees."""
    block, place = _place(sets, blocks, group, True)
    batch, head = place // heads, place % heads
    first = block * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    if bias is not None:
        bias += batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h
    if mask is not None:
        mask += batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
    tile = _load_tile(q, q_b, q_h, q_r, batch, head, first, rows, D, DP, BLOCK_M, TMA)
    largest = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    gathered = tl.zeros([BLOCK_M, VP], tl.float32)
    size = tl.zeros([BLOCK_M], tl.float32)
    begin, full_begin, full_end, end = _key_range(
        first, rows, keys, offset, step, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT
    )
    for part in tl.static_range(0, 3):
        if LEFT or part > 0:
            largest, total, moment, gathered, size = _forward_over_keys(
                begin if part == 0 else full_begin if part == 1 else full_end,
                full_begin if part == 0 else full_end if part == 1 else end,
                tile, largest, total, moment, gathered, size,
                k, k_b, k_h, k_r, v, v_b, v_h, v_r, batch, head // repeats, row, rows, keys, scale,
                bias, bias_r, bias_k, BIAS_FULL, mask, mask_r, mask_k, MASK_FULL,
                offset, step, left, right,
                D, V, DP, VP, BLOCK_N, HAS_VALUE, LEFT, RIGHT, part != 1, TMA, PRECISION, SIZED,
            )  # fmt: skip
    largest = tl.where(total == total, largest, total)  # a maximum passes over NaN, a sum does not
    seen = (largest > SEEN) | (total != total)
    at = place.to(tl.int64) * rows + row
    if SIZED:
        tl.store(largest_size + at, tl.where(total == total, size * LN2, total), mask=row < rows)
    total = tl.where(seen, total, 1.0)
    tl.store(entropy + at, tl.where(seen, (tl.log2(total) - moment / total) * LN2, 0.0), mask=row < rows)
    tl.store(lse + at, tl.where(seen, (tl.log2(total) + largest) * LN2, 0.0), mask=row < rows)
    if HAS_VALUE:
        gathered = tl.where(seen[:, None], gathered / total[:, None], 0.0)
        if TMA:
            output.store([batch, head, first, 0], gathered.to(output.dtype).reshape(1, 1, BLOCK_M, VP))
        else:
            gathered = gathered.to(output.dtype.element_ty)
            _store_tile(output, o_b, o_h, o_r, batch, head, first, rows, gathered, V, VP, BLOCK_M)


@triton.jit
def _backward_over_rows(
    begin, end, keys_tile, values, for_key, for_value,
    q, q_b, q_h, q_r, do, do_b, do_h, do_r, statistics, plane, batch, head, key, rows, keys, scale,
    bias, bias_r, bias_k, BIAS_FULL: tl.constexpr, mask, mask_r, mask_k, MASK_FULL: tl.constexpr,
    offset, step, left, right,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_VALUE: tl.constexpr, ENTROPY: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in queries ``[begin, end)`` for the gradients of a block of keys; tiles of scores are (keys, queries)."""
    for start in range(begin, end, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        row = start + tl.arange(0, BLOCK_M)
        tile = _load_tile(q, q_b, q_h, q_r, batch, head, start, rows, D, DP, BLOCK_M, TMA)
        base = tl.load(statistics + row)
        products = _dot(keys_tile, tl.trans(tile), None, PRECISION)
        if EDGE or bias is not None or mask is not None:
            scores = _scores(
                products, row, key, rows, keys, scale * LOG2E,
                bias, bias_r, bias_k, BIAS_FULL, mask, mask_r, mask_k, MASK_FULL,
                offset, step, left, right, LEFT, RIGHT, EDGE, True,
            )  # fmt: skip
            scores = tl.where(scores < SEEN, NEVER, scores - base[None, :])
        else:
            scores = products * (scale * LOG2E) - base[None, :]
        probs = tl.exp2(scores)
        pull = -tl.load(statistics + plane + row)[None, :]
        if ENTROPY:
            pull = pull + scores * tl.load(statistics + 2 * plane + row)[None, :]
        if HAS_VALUE:
            pushed = _load_tile(do, do_b, do_h, do_r, batch, head, start, rows, V, VP, BLOCK_M, TMA)
            for_value = _dot(probs.to(pushed.dtype), pushed, for_value, PRECISION)
            pull = pull + _dot(values, tl.trans(pushed), None, PRECISION)
        pull = (probs * pull).to(tile.dtype)
        for_key = _dot(pull, tile, for_key, PRECISION)
    return for_key, for_value


@triton.jit(do_not_specialize=["rows", "keys", "blocks", "group", "offset", "left", "right", "padded_rows"])
def _attention_entropy_backward_key_kernel(
    q, q_b, q_h, q_r, k, k_b, k_h, k_r, v, v_b, v_h, v_r, do, do_b, do_h, do_r,
    statistics, grad_key, dk_b, dk_h, dk_r, grad_value, dv_b, dv_h, dv_r,
    bias, bias_b, bias_h, bias_r, bias_k, BIAS_FULL: tl.constexpr,
    mask, mask_b, mask_h, mask_r, mask_k, MASK_FULL: tl.constexpr,
    sets, heads, repeats, rows, keys, padded_rows, blocks, group, scale, offset, step, left, right,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    HAS_VALUE: tl.constexpr, ENTROPY: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values."""
    block, place = _place(sets, blocks, group, False)
    groups = heads // repeats
    batch, key_head = place // groups, place % groups
    first = block * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    keys_tile = _load_tile(k, k_b, k_h, k_r, batch, key_head, first, keys, D, DP, BLOCK_N, TMA)
    values = keys_tile
    if HAS_VALUE:
        values = _load_tile(v, v_b, v_h, v_r, batch, key_head, first, keys, V, VP, BLOCK_N, TMA)
    for_key = tl.zeros([BLOCK_N, DP], tl.float32)
    for_value = tl.zeros([BLOCK_N, VP], tl.float32)
    begin, full_begin, full_end, end = _row_range(
        first, rows, keys, offset, step, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT
    )
    plane = tl.cast(sets, tl.int64) * repeats * padded_rows
    for repeat in range(0, repeats):
        head = key_head * repeats + repeat
        query_place = batch.to(tl.int64) * heads + head
        bias_of_head, mask_of_head = bias, mask
        if bias is not None:
            bias_of_head = bias + batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h
        if mask is not None:
            mask_of_head = mask + batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
        for part in tl.static_range(0, 3):
            if LEFT or part < 2:
                for_key, for_value = _backward_over_rows(
                    begin if part == 0 else full_begin if part == 1 else full_end,
                    full_begin if part == 0 else full_end if part == 1 else end,
                    keys_tile, values, for_key, for_value,
                    q, q_b, q_h, q_r, do, do_b, do_h, do_r,
                    statistics + query_place * padded_rows, plane, batch, head, key, rows, keys, scale,
                    bias_of_head, bias_r, bias_k, BIAS_FULL, mask_of_head, mask_r, mask_k, MASK_FULL,
                    offset, step, left, right, D, V, DP, VP, BLOCK_M,
                    HAS_VALUE, ENTROPY, LEFT, RIGHT, part != 1, TMA, PRECISION,
                )  # fmt: skip
    for_key = (for_key * scale).to(grad_key.dtype.element_ty)
    _store_tile(grad_key, dk_b, dk_h, dk_r, batch, key_head, first, keys, for_key, D, DP, BLOCK_N)
    if HAS_VALUE:
        for_value = for_value.to(grad_value.dtype.element_ty)
        _store_tile(grad_value, dv_b, dv_h, dv_r, batch, key_head, first, keys, for_value, V, VP, BLOCK_N)


@triton.jit
def _backward_over_keys(
    begin, end, tile, pushed, for_query, base, constant, slope,
    k, k_b, k_h, k_r, v, v_b, v_h, v_r, batch, key_head, row, rows, keys, scale,
    bias, bias_r, bias_k, BIAS_FULL: tl.constexpr, mask, mask_r, mask_k, MASK_FULL: tl.constexpr,
    offset, step, left, right,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_VALUE: tl.constexpr, ENTROPY: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in keys ``[begin, end)`` for the gradient of a block of queries."""
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        keys_tile = _load_tile(k, k_b, k_h, k_r, batch, key_head, start, keys, D, DP, BLOCK_N, TMA)
        products = _dot(tile, tl.trans(keys_tile), None, PRECISION)
        if EDGE or bias is not None or mask is not None:
            scores = _scores(
                products, row, start + tl.arange(0, BLOCK_N), rows, keys, scale * LOG2E,
                bias, bias_r, bias_k, BIAS_FULL, mask, mask_r, mask_k, MASK_FULL,
                offset, step, left, right, LEFT, RIGHT, EDGE, False,
            )  # fmt: skip
            scores = tl.where(scores < SEEN, NEVER, scores - base[:, None])
        else:
            scores = products * (scale * LOG2E) - base[:, None]
        probs = tl.exp2(scores)
        pull = -constant[:, None]
        if ENTROPY:
            pull = pull + scores * slope[:, None]
        if HAS_VALUE:
            values = _load_tile(v, v_b, v_h, v_r, batch, key_head, start, keys, V, VP, BLOCK_N, TMA)
            pull = pull + _dot(pushed, tl.trans(values), None, PRECISION)
        pull = (probs * pull).to(keys_tile.dtype)
        for_query = _dot(pull, keys_tile, for_query, PRECISION)
    return for_query


@triton.jit(do_not_specialize=["rows", "keys", "blocks", "group", "offset", "left", "right", "padded_rows"])
def _attention_entropy_backward_query_kernel(
    q, q_b, q_h, q_r, k, k_b, k_h, k_r, v, v_b, v_h, v_r, do, do_b, do_h, do_r, o, o_b, o_h, o_r,
    grad_entropy, dh_b, dh_h, dh_r, entropy, lse, statistics, grad_query, dq_b, dq_h, dq_r,
    bias, bias_b, bias_h, bias_r, bias_k, BIAS_FULL: tl.constexpr,
    mask, mask_b, mask_h, mask_r, mask_k, MASK_FULL: tl.constexpr,
    sets, heads, repeats, rows, keys, padded_rows, blocks, group, scale, offset, step, left, right,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    HAS_VALUE: tl.constexpr, ENTROPY: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries, and the statistics of its rows for the kernel of the keys."""
    block, place = _place(sets, blocks, group, True)
    batch, head = place // heads, place % heads
    first = block * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    if bias is not None:
        bias += batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h
    if mask is not None:
        mask += batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
    tile = _load_tile(q, q_b, q_h, q_r, batch, head, first, rows, D, DP, BLOCK_M, TMA)
    pushed = tile
    at = place.to(tl.int64) * rows + row
    # rows after the last one get a log-sum-exp that makes their probabilities 0
    base = tl.load(lse + at, mask=row < rows, other=-HIDDEN) * LOG2E
    constant = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if HAS_VALUE:
        pushed = _load_tile(do, do_b, do_h, do_r, batch, head, first, rows, V, VP, BLOCK_M, TMA)
        output = _load_tile(o, o_b, o_h, o_r, batch, head, first, rows, V, VP, BLOCK_M, TMA)
        constant += tl.sum(pushed.to(tl.float32) * output.to(tl.float32), 1)
    if ENTROPY:
        grad_entropy += batch.to(tl.int64) * dh_b + head.to(tl.int64) * dh_h
        push = tl.load(grad_entropy + row.to(tl.int64) * dh_r, mask=row < rows, other=0.0).to(tl.float32)
        constant += push * tl.load(entropy + at, mask=row < rows, other=0.0)
        slope -= push * LN2
    plane = tl.cast(sets, tl.int64) * padded_rows
    at = statistics + place.to(tl.int64) * padded_rows + row
    tl.store(at, base)
    tl.store(at + plane, constant)
    tl.store(at + 2 * plane, slope)
    for_query = tl.zeros([BLOCK_M, DP], tl.float32)
    begin, full_begin, full_end, end = _key_range(
        first, rows, keys, offset, step, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT
    )
    for part in tl.static_range(0, 3):
        if LEFT or part > 0:
            for_query = _backward_over_keys(
                begin if part == 0 else full_begin if part == 1 else full_end,
                full_begin if part == 0 else full_end if part == 1 else end,
                tile, pushed, for_query, base, constant, slope,
                k, k_b, k_h, k_r, v, v_b, v_h, v_r, batch, head // repeats, row, rows, keys, scale,
                bias, bias_r, bias_k, BIAS_FULL, mask, mask_r, mask_k, MASK_FULL,
                offset, step, left, right,
                D, V, DP, VP, BLOCK_N, HAS_VALUE, ENTROPY, LEFT, RIGHT, part != 1, TMA, PRECISION,
            )  # fmt: skip
    for_query = (for_query * scale).to(grad_query.dtype.element_ty)
    _store_tile(grad_query, dq_b, dq_h, dq_r, batch, head, first, rows, for_query, D, DP, BLOCK_M)
