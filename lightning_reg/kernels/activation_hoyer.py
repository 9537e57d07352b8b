"""Norms of tokens and the gradient of their Hoyer-square, one pass each. The quantity is in ``functional``."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_reg.kernels import reduction
from lightning_reg.kernels.launching import MOST_PLANS, TENSOR, Launch

TILE, WARPS = 4096, 4


def norms(x: Tensor, floor: float | None) -> list[Tensor]:
    """``[unit, L1, L2 squared]`` of each token, float32 (..., 1), in units of its largest magnitude."""
    reduction.check(x)
    x = x.contiguous()
    unit, l1, square = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(3))
    if tokens := unit.numel():
        _norms(x.device, x.dtype, tokens, x.shape[-1], floor)(x, unit, l1, square)
    return [unit, l1, square]


@lru_cache(MOST_PLANS)
def _norms(device: torch.device, dtype: torch.dtype, tokens: int, width: int, floor: float | None) -> Launch:
    columns = min(TILE, triton.next_power_of_2(max(1, width)))
    rows = max(1, 1024 // columns)
    return Launch(
        _norms_kernel, (triton.cdiv(tokens, rows),), *[TENSOR] * 4, tokens, width, 0.0 if floor is None else floor,
        FLOOR=floor is not None, ROWS=rows, COLUMNS=columns, num_warps=WARPS,
    )  # fmt: skip


def add_gradient(
    grad: Tensor | None, sources: Sequence[Tensor], activation: str, floor: float | None, unit: Tensor, ratio: Tensor,
    per_token: Tensor,
) -> list[Tensor]:  # fmt: skip
    """``grad + per_token * (sign(x) - ratio * x / unit)``, through the activation; arguments as ``reduction.add``."""
    reduction.check(grad, *sources)
    unit, ratio, per_token = unit.contiguous(), ratio.contiguous(), per_token.contiguous()
    return reduction.add(grad, sources, activation, None, per_token, "hoyer", floor=floor, unit=unit, ratio=ratio)


@triton.jit
def _norms_kernel(
    x_ptr, unit_ptr, l1_ptr, square_ptr, rows, width, floor, FLOOR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    unit = tl.zeros((ROWS,), tl.float32)
    l1 = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        inside = (numbers < rows)[:, None] & (start + columns < width)[None, :]
        x = tl.load(x_ptr + numbers[:, None] * width + (start + columns)[None, :], inside, 0.0).to(tl.float32)
        size = tl.abs(tl.where(inside, reduction._above(x, floor, FLOOR), 0.0))
        largest = tl.maximum(unit, tl.max(size, 1))
        largest = tl.where(largest == 0.0, 1.0, largest)
        scaled = size / largest[:, None]
        # what was summed before, in the new unit
        shrink = unit / largest
        l1 = l1 * shrink + tl.sum(scaled, 1)
        square = square * shrink * shrink + tl.sum(scaled * scaled, 1)
        unit = tl.where(l1 == 0.0, 0.0, largest)
    tl.store(unit_ptr + numbers, tl.where(unit == 0.0, 1.0, unit), numbers < rows)
    tl.store(l1_ptr + numbers, l1, numbers < rows)
    tl.store(square_ptr + numbers, tl.where(square == 0.0, 1.0, square), numbers < rows)
