"""One pass over rows of logits for what their softmax is made of, and one for a gradient that goes through it.

A tile holds ``ROWS`` rows and ``BLOCK`` columns. Long rows go one to a program, in columns counted from the last
boundary of ``VECTOR`` numbers before the row: rows of an odd length start anywhere, and whole vectors are what memory
is fast at. The few numbers outside them, at both edges of a row, are loaded on their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_reg.kernels.operators import Unsupported

LOG_SUM = tl.constexpr(0)  # logarithm of the sum of exponentials
SOFTMAX = tl.constexpr(1)  # entropy of the softmax
SIGMOIDS = tl.constexpr(2)  # mean entropy of a sigmoid for each class

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(1e4)  # a sigmoid is 0 or 1 long before this, and 0 * inf is not reached
_LEAST = tl.constexpr(-3.4028234663852886e38)
_NARROW = 2048  # columns of a tile that holds whole rows
_TILE = 4096  # numbers of a tile, which with 4 warps came closest to the bandwidth of an H100
_SOFTMAX_TILE = 2048  # it keeps two sums
_EDGES = 16  # numbers of the two edges, at most 2 (VECTOR - 1)


@triton.jit
def _rows_kernel(
    x_ptr, result_ptr, normalizer_ptr, rows, classes, stride,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """One number for each row; with SOFTMAX also the largest logit and the logarithm of the sum beyond it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_ptr += (row * stride // VECTOR * VECTOR)[:, None]
    first = (row * stride % VECTOR).to(tl.int32)[:, None]
    low, high = (first + VECTOR - 1) // VECTOR * VECTOR, (first + classes) // VECTOR * VECTOR
    exists = row[:, None] < rows
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes + VECTOR - 1, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + column, mask=exists & (column >= low) & (column < high), other=float("-inf"))
        if KIND == SIGMOIDS:
            total += tl.where((column >= low) & (column < high), _sigmoid_entropy(x.to(tl.float32)), 0.0)
        else:
            largest, total, weighted = _gather(x.to(tl.float32), largest, total, weighted, KIND)
    total, weighted = tl.sum(total, 1)[:, None], tl.sum(weighted, 1)[:, None]
    if EDGES:
        column, inside = _edges(first, classes, low, high, VECTOR, EDGES)
        x = tl.load(x_ptr + column, mask=exists & inside, other=float("-inf"))
        if KIND == SIGMOIDS:
            total += tl.sum(tl.where(inside, _sigmoid_entropy(x.to(tl.float32)), 0.0), 1)[:, None]
        else:
            # as many lanes as the tile has, of which the first holds what the others left
            lane = tl.arange(0, EDGES)[None, :] == 0
            total, weighted = tl.where(lane, total, 0.0), tl.where(lane, weighted, 0.0)
            largest, total, weighted = _gather(x.to(tl.float32), largest, total, weighted, KIND)
            total, weighted = tl.sum(total, 1)[:, None], tl.sum(weighted, 1)[:, None]
    total, weighted = tl.sum(total, 1), tl.sum(weighted, 1)
    stored = row < rows
    if KIND == SIGMOIDS:
        tl.store(result_ptr + row, total / classes, mask=stored)
    elif KIND == LOG_SUM:
        tl.store(result_ptr + row, _finite(largest) + tl.log(total), mask=stored)
    else:
        log_total = tl.log(total)
        tl.store(result_ptr + row, log_total - weighted / total, mask=stored)
        tl.store(normalizer_ptr + 2 * row, largest, mask=stored)
        tl.store(normalizer_ptr + 2 * row + 1, log_total, mask=stored)


@triton.jit
def _gather(x, largest, total, weighted, KIND: tl.constexpr):
    """Take a tile of logits, -inf where there is none, into the sums of ``e = exp(x - largest)`` and ``e log e``."""
    higher = tl.maximum(largest, tl.max(x, 1))
    step = tl.where(largest == higher, 0.0, largest - higher)
    shrink = tl.exp2(step * _LOG2_E)[:, None]
    x -= _finite(higher)[:, None]
    weight = tl.exp2(x * _LOG2_E)
    if KIND == SOFTMAX:
        step = tl.where(largest == float("-inf"), 0.0, step)[:, None]
        weighted = shrink * (weighted + step * total) + tl.where(weight > 0, weight * x, 0.0)
    return higher, total * shrink + weight, weighted


@triton.jit
def _finite(x):
    """Something to subtract: an infinite largest logit would give NaN in rows that are -inf alone, or hold inf."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _edges(first, classes, low, high, VECTOR: tl.constexpr, EDGES: tl.constexpr):
    """Columns before the first whole vector and after the last, and which of them exist."""
    lane = tl.arange(0, EDGES)[None, :]
    column = tl.where(lane < VECTOR, lane, high + lane - VECTOR)
    inside = tl.where(lane < VECTOR, (column >= first) & (column < low), column < first + classes)
    return column, inside & (lane < 2 * VECTOR)


@triton.jit
def _clamp(x):
    """``x`` within what a sigmoid can tell apart; NaN stays."""
    return tl.where(x > _LARGEST, _LARGEST, tl.where(x < -_LARGEST, -_LARGEST, x))


@triton.jit
def _sigmoid_entropy(x):
    size = tl.abs(_clamp(x))
    odds = tl.exp2(-size * _LOG2_E)
    beyond = (1 + odds) - 1  # what of the odds is left beside 1: dividing by it makes the logarithm exact
    log_1p = tl.where(beyond == 0, odds, tl.log(1 + odds) * (odds / tl.where(beyond == 0, 1.0, beyond)))
    return log_1p + size * odds / (1 + odds)


@triton.jit
def _gradient_kernel(
    x_ptr, grad_ptr, result_ptr, weight_ptr, value_ptr, normalizer_ptr, rows, classes, stride, grad_stride,
    grad_column, chunks,
    KIND: tl.constexpr, WITH_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """``grad`` and what ``weight`` times the derivative of each row's number adds to it."""
    part = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    weight = tl.load(weight_ptr + row, mask=exists, other=0.0)[:, None]
    value = tl.load(value_ptr + row, mask=exists, other=0.0)[:, None]
    largest = value
    log_total = value
    if KIND == SOFTMAX:
        largest = tl.load(normalizer_ptr + 2 * row, mask=exists, other=0.0)[:, None]
        log_total = tl.load(normalizer_ptr + 2 * row + 1, mask=exists, other=0.0)[:, None]
    exists = exists[:, None]
    x_ptr += (row * stride // VECTOR * VECTOR)[:, None]
    # the same multiple of VECTOR where VECTOR is not 1
    grad_ptr += (row * grad_stride // VECTOR * VECTOR)[:, None]
    result_ptr += (row * classes // VECTOR * VECTOR)[:, None]
    first = (row * stride % VECTOR).to(tl.int32)[:, None]
    low, high = (first + VECTOR - 1) // VECTOR * VECTOR, (first + classes) // VECTOR * VECTOR
    column = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = exists & (column >= low) & (column < high)
    _add(x_ptr, grad_ptr, grad_column, result_ptr, column, inside, weight, value, largest, log_total, classes, KIND,
         WITH_GRAD)  # fmt: skip
    if EDGES:  # noqa: SIM102  # known when it is compiled, unlike the part
        if part == 0:
            edge, outside = _edges(first, classes, low, high, VECTOR, EDGES)
            _add(x_ptr, grad_ptr, grad_column, result_ptr, edge, exists & outside, weight, value, largest, log_total,
                 classes, KIND, WITH_GRAD)  # fmt: skip


@triton.jit
def _add(
    x_ptr, grad_ptr, grad_column, result_ptr, column, inside, weight, value, largest, log_total, classes,
    KIND: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """Write the gradient of these columns."""
    # what does not count is not even read
    x = tl.load(x_ptr + column, mask=inside & (weight != 0), other=0.0).to(tl.float32)
    pull = _pull(x, weight, value, largest, log_total, classes, KIND)
    if WITH_GRAD:
        pull += tl.load(grad_ptr + column * grad_column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result_ptr + column, pull.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pull(x, weight, value, largest, log_total, classes, KIND: tl.constexpr):
    """``weight`` times the derivative of a row's number in its logits; 0 where ``weight`` is, whatever the logits."""
    if KIND == LOG_SUM:
        slope = tl.exp2(tl.where(weight == 0, 0.0, x - value) * _LOG2_E)
    elif KIND == SOFTMAX:
        log_p = x - largest - log_total
        log_p = tl.where(log_p < _LEAST, _LEAST, log_p)
        slope = -tl.exp2(log_p * _LOG2_E) * (log_p + value)
    else:
        x = _clamp(x)
        odds = tl.exp2(-tl.abs(x) * _LOG2_E)
        slope = -x * odds / ((1 + odds) * (1 + odds)) / classes
    return tl.where(weight == 0, 0.0, slope * weight)


def check(x: Tensor) -> None:
    """Raise Unsupported for logits (positions, classes) that no kernel takes."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"it has no kernel for {x.dtype}")


def row_values(x: Tensor, kind: tl.constexpr) -> tuple[Tensor, Tensor]:
    """The number of each row and, with SOFTMAX, what normalizes it.

    Args:
        x: Logits (positions, classes).
        kind: LOG_SUM, SOFTMAX or SIGMOIDS.

    Returns:
        (positions,) and (positions, 2), or (0, 2), in float32.
    """
    check(x)
    rows, classes = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    result = x.new_empty(rows, dtype=torch.float32)
    normalizer = x.new_empty(rows if kind is SOFTMAX else 0, 2, dtype=torch.float32)
    if rows:
        tile_rows, block, vector = _tile(_SOFTMAX_TILE if kind is SOFTMAX else _TILE, classes, x)
        _rows_kernel[(triton.cdiv(rows, tile_rows),)](
            x, result, normalizer, rows, classes, x.stride(0),
            KIND=kind, ROWS=tile_rows, BLOCK=block, VECTOR=vector, EDGES=_EDGES if vector > 1 else 0, num_warps=4,
        )  # fmt: skip
    return result, normalizer


def gradient(
    x: Tensor, value: Tensor, normalizer: Tensor, weight: Tensor, grad: Tensor | None, kind: tl.constexpr
) -> Tensor:
    """Gradient of the logits.

    Args:
        x: Logits (positions, classes).
        value: The number of each row, (positions,) in float32, of ``row_values``.
        normalizer: The other result of ``row_values``.
        weight: Gradient of the number of each row, (positions,); a row where it is 0 gets nothing.
        grad: What comes from the loss, (positions, classes); None for nothing.
        kind: LOG_SUM, SOFTMAX or SIGMOIDS.

    Returns:
        Fresh (positions, classes) in the dtype of ``x``.
    """
    check(x)
    rows, classes = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    result = torch.empty((rows, classes), dtype=x.dtype, device=x.device)
    if rows:
        with_grad = grad is not None
        grad = grad if grad is not None else x
        tile_rows, block, vector = _tile(_TILE, classes, x, grad, result)
        chunks = triton.cdiv(classes + vector - 1, block)
        _gradient_kernel[(triton.cdiv(rows, tile_rows) * chunks,)](
            x, grad, result, weight.contiguous(), value.contiguous(), normalizer,
            rows, classes, x.stride(0), grad.stride(0), grad.stride(1), chunks,
            KIND=kind, WITH_GRAD=with_grad, ROWS=tile_rows, BLOCK=block, VECTOR=vector,
            EDGES=_EDGES if vector > 1 else 0, num_warps=4,
        )  # fmt: skip
    return result


def _tile(numbers: int, classes: int, *tensors: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a tile, and the numbers of a vector of 16 bytes, 1 where rows are no vectors alike."""
    if classes <= _NARROW:
        block = triton.next_power_of_2(classes)
        return numbers // block, block, 1
    size = tensors[0].element_size()
    alike = all(
        tensor.data_ptr() % 16 == 0 and tensor.stride() == tensors[0].stride() and tensor.dtype == tensors[0].dtype
        for tensor in tensors
    )
    return 1, numbers, 16 // size if alike else 1
