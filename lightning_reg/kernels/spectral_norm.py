"""Triton kernels of sigma-Reparam: scale and cast one weight or several, their gradients, power iteration of many.

A part of a weight lies in memory as M rows of N adjacent columns, LD apart. ``left`` (M) and ``right`` (N) are its
vectors: u and v, or v and u where the output axis is the last. Sums go through memory in a fixed order, so that two
runs agree to the bit.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import triton_op, wrap_triton

from lightning_reg.kernels.launching import TENSOR, Launch
from lightning_reg.kernels.operators import Unsupported, on_device

TILE, WIDEST, WARPS = 2048, 256, 4  # elements of a tile, its most columns, warps for each
PARTIALS, JOINT_PARTIALS = 512, 128  # most partial sums of a part: each program that scales adds them all up
BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WARPS = 16, 256, 8  # of the power iteration
REDUCE_BLOCKS, REDUCE_COLUMNS = 32, 128
NORM = 1024
TINY = 1e-30

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- scale -----------------------------------------------------------------------------------------------------------


def scaled_weight(
    weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``((gain / sigma) W, sigma)``: the weight in ``dtype``, sigma (parts,) in float32."""
    plan = _plan(weight, gain, u, v, transposed, dtype)
    scaled, sigmas = torch.empty_like(weight, dtype=dtype), torch.empty(len(u), dtype=u.dtype, device=u.device)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=weight.device)
    left, right = (v, u) if transposed else (u, v)
    plan.bilinear(weight, left, right, partials)
    plan.scale(weight, gain, partials, scaled, sigmas)
    return scaled, sigmas


def scaled_weight_gradients(
    grad: Tensor, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, sigmas: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and gain, in their dtypes."""
    plan, grad = _plan(weight, gain, u, v, transposed, grad.dtype), grad.contiguous()
    for_weight, for_gain = torch.empty_like(weight), torch.empty_like(gain)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=weight.device)
    left, right = (v, u) if transposed else (u, v)
    plan.inner(grad, weight, partials)
    plan.gradient(grad, gain, left, right, partials, sigmas, for_weight, for_gain)
    return for_weight, for_gain


class _Plan:
    """How the parts of a weight are cut into tiles, and the launches over them."""

    def __init__(self, parts: int, rows: int, columns: int, leading: int, step: int) -> None:
        width = min(WIDEST, triton.next_power_of_2(max(columns, 1)))
        height = TILE // width
        across = max(1, triton.cdiv(columns, width))
        tiles = max(1, triton.cdiv(rows, height) * across)  # one program writes the scalars of an empty weight
        count = min(tiles, PARTIALS)
        self.sizes = sizes = (rows, columns, leading, step, across)
        self.tile: dict[str, Any] = {"BM": height, "BN": width, "num_warps": WARPS}
        self.summed = self.tile | {"PARTIALS": triton.next_power_of_2(count)}
        self.count, self.partials = count, parts * count
        self.summing, self.scaling = (count, parts), (tiles, parts)  # grids
        self.bilinear = Launch(_bilinear_kernel, self.summing, *[TENSOR] * 4, *sizes, **self.tile)
        self.scale = Launch(_scale_kernel, self.scaling, *[TENSOR] * 5, count, *sizes, **self.summed)
        self.inner = Launch(_inner_kernel, self.summing, *[TENSOR] * 3, *sizes, **self.tile)
        self.gradient = Launch(_gradient_kernel, self.scaling, *[TENSOR] * 8, count, *sizes, **self.summed)


_plans: dict[Any, _Plan] = {}


def _plan(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool, dtype: torch.dtype) -> _Plan:
    """The plan for tensors of these shapes and dtypes; ``dtype`` is that of the weight in use or of its gradient."""
    if reason := unsupported(weight, gain, u, v, dtype):
        raise Unsupported(reason)
    key = u.shape, v.shape, transposed, weight.dtype, gain.dtype, dtype, weight.device
    if (plan := _plans.get(key)) is None:
        plan = _plans[key] = _Plan(len(u), *_sizes(u, v, transposed))
    return plan


def _sizes(u: Tensor, v: Tensor, transposed: bool) -> tuple[int, int, int, int]:
    """M, N and LD of each part, and how far it is to the next."""
    if transposed:
        return v.shape[1], u.shape[1], u.numel(), u.shape[1]
    return u.shape[1], v.shape[1], v.shape[1], u.shape[1] * v.shape[1]


def unsupported(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take these; ``dtype`` is that of the weight in use or of its gradient."""
    if weight.dtype not in _TYPES or gain.dtype not in _TYPES or dtype not in _TYPES:
        return f"the weight is {weight.dtype}, its gain {gain.dtype} and the weight in use {dtype}"
    if u.dtype != torch.float32 or v.dtype != torch.float32:
        return f"the singular vectors are {u.dtype} and {v.dtype}, not float32"
    if not weight.is_contiguous():
        return "the weight is not contiguous (`torch.channels_last`?)"
    if not (gain.is_contiguous() and u.is_contiguous() and v.is_contiguous()):
        return "the gain or the singular vectors are not contiguous"
    return None


@triton.jit
def _tile(tile, M, N, LD, ACROSS, BM: tl.constexpr, BN: tl.constexpr):
    rows = (tile // ACROSS) * BM + tl.arange(0, BM)
    columns = (tile % ACROSS) * BN + tl.arange(0, BN)
    offsets = rows[:, None].to(tl.int64) * LD + columns[None, :]
    return rows, columns, offsets, (rows < M)[:, None] & (columns < N)[None, :]


@triton.jit
def _total(partials, part, COUNT, PARTIALS: tl.constexpr):
    index = tl.arange(0, PARTIALS)
    return tl.sum(tl.load(partials + part * COUNT + index, mask=index < COUNT, other=0.0))


@triton.jit
def _bilinear_kernel(W, left, right, partials, M, N, LD, PART, ACROSS, BM: tl.constexpr, BN: tl.constexpr):
    # partial sums of left^T W right: a program adds up every `count`-th tile
    start, count, part = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    base, left, right = W + part.to(tl.int64) * PART, left + part.to(tl.int64) * M, right + part.to(tl.int64) * N
    total = tl.zeros((BM, BN), tl.float32)
    for tile in range(start, tl.cdiv(M, BM) * ACROSS, count):
        rows, columns, offsets, inside = _tile(tile, M, N, LD, ACROSS, BM, BN)
        w = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(left + rows, mask=rows < M, other=0.0)
        b = tl.load(right + columns, mask=columns < N, other=0.0)
        total += a[:, None] * w * b[None, :]
    tl.store(partials + part * count + start, tl.sum(total))


@triton.jit
def _scale_kernel(
    W, gain, partials, scaled, sigmas, COUNT, M, N, LD, PART, ACROSS,
    BM: tl.constexpr, BN: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    _, _, offsets, inside = _tile(tile, M, N, LD, ACROSS, BM, BN)
    offsets += part.to(tl.int64) * PART
    w = tl.load(W + offsets, mask=inside, other=0.0).to(tl.float32)
    sigma = _total(partials, part, COUNT, PARTIALS)
    factor = tl.div_rn(tl.load(gain + part).to(tl.float32), sigma)
    if tile == 0:
        tl.store(sigmas + part, sigma)
    tl.store(scaled + offsets, (w * factor).to(scaled.dtype.element_ty), mask=inside)


@triton.jit
def _inner_kernel(G, W, partials, M, N, LD, PART, ACROSS, BM: tl.constexpr, BN: tl.constexpr):
    # partial sums of <G, W>
    start, count, part = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    total = tl.zeros((BM, BN), tl.float32)
    for tile in range(start, tl.cdiv(M, BM) * ACROSS, count):
        _, _, offsets, inside = _tile(tile, M, N, LD, ACROSS, BM, BN)
        offsets += part.to(tl.int64) * PART
        g = tl.load(G + offsets, mask=inside, other=0.0).to(tl.float32)
        total += g * tl.load(W + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(partials + part * count + start, tl.sum(total))


@triton.jit
def _gradient_kernel(
    G, gain, left, right, partials, sigmas, for_weight, for_gain, COUNT, M, N, LD, PART, ACROSS,
    BM: tl.constexpr, BN: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    # dgain = <G, W> / sigma, dW = (gain / sigma) (G - dgain left right^T)
    tile, part = tl.program_id(0), tl.program_id(1)
    rows, columns, offsets, inside = _tile(tile, M, N, LD, ACROSS, BM, BN)
    offsets += part.to(tl.int64) * PART
    g = tl.load(G + offsets, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(left + part.to(tl.int64) * M + rows, mask=rows < M, other=0.0)
    b = tl.load(right + part.to(tl.int64) * N + columns, mask=columns < N, other=0.0)
    sigma = tl.load(sigmas + part)
    dgain = tl.div_rn(_total(partials, part, COUNT, PARTIALS), sigma)
    if tile == 0:
        tl.store(for_gain + part, dgain.to(for_gain.dtype.element_ty))
    dw = (g - a[:, None] * (b * dgain)[None, :]) * tl.div_rn(tl.load(gain + part).to(tl.float32), sigma)
    tl.store(for_weight + offsets, dw.to(for_weight.dtype.element_ty), mask=inside)


# What compiled code calls: its launches become part of the compiled program, which costs less than to call an operator.
# Below the kernels, which torch looks up here to know when compiled code is out of date.


@triton_op("lightning_reg::compiled_scaled_weight", mutates_args=())
def compiled_scaled_weight(
    weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``scaled_weight`` in compiled code."""
    plan = _plan(weight, gain, u, v, transposed, dtype)
    scaled, sigmas = torch.empty_like(weight, dtype=dtype), torch.empty(len(u), dtype=u.dtype, device=u.device)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=weight.device)
    left, right = (v, u) if transposed else (u, v)
    wrap_triton(_bilinear_kernel)[plan.summing](weight, left, right, partials, *plan.sizes, **plan.tile)
    wrap_triton(_scale_kernel)[plan.scaling](
        weight, gain, partials, scaled, sigmas, plan.count, *plan.sizes, **plan.summed
    )
    return scaled, sigmas


@triton_op("lightning_reg::compiled_scaled_weight_gradients", mutates_args=())
def compiled_scaled_weight_gradients(
    grad: Tensor, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, sigmas: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """``scaled_weight_gradients`` in compiled code."""
    plan, grad = _plan(weight, gain, u, v, transposed, grad.dtype), grad.contiguous()
    for_weight, for_gain = torch.empty_like(weight), torch.empty_like(gain)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=weight.device)
    left, right = (v, u) if transposed else (u, v)
    wrap_triton(_inner_kernel)[plan.summing](grad, weight, partials, *plan.sizes, **plan.tile)
    wrap_triton(_gradient_kernel)[plan.scaling](
        grad, gain, left, right, partials, sigmas, for_weight, for_gain, plan.count, *plan.sizes, **plan.summed
    )
    return for_weight, for_gain


# --- several weights at once -----------------------------------------------------------------------------------------

MEMBERS = 8  # weights of one launch at most: where they go, and their gradients, are arguments of the kernels


class Together:
    """``scaled_weight`` and its gradients of several weights, in as many launches as one weight takes.

    The kernels find the parts of all weights through a table of their addresses, which is made once.

    Args:
        operands: ``(weight, gain, u, v, transposed)`` of each, as ``scaled_weight`` takes them, of the same dtypes and
            on one device; at most ``MEMBERS``.
        dtype: Of the weights in use.

    Raises:
        Unsupported: If the kernels cannot take them.
    """

    def __init__(self, operands: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, bool]], dtype: torch.dtype) -> None:
        for weight, gain, u, v, _ in operands:
            if reason := unsupported(weight, gain, u, v, dtype):
                raise Unsupported(reason)
        if len({(weight.dtype, gain.dtype, weight.device) for weight, gain, *_ in operands}) > 1:
            raise Unsupported("weights or gains differ in dtype or device")
        self.weights, self.gains = [operand[0] for operand in operands], [operand[1] for operand in operands]
        self.dtype, self.parts = dtype, [len(gain) for gain in self.gains]
        device, element = self.weights[0].device, _TYPES[self.weights[0].dtype]
        shapes = [_sizes(u, v, transposed) for _, _, u, v, transposed in operands]
        width = min(WIDEST, triton.next_power_of_2(max(1, *(columns for _, columns, _, _ in shapes))))
        height = TILE // width
        across = [max(1, triton.cdiv(columns, width)) for _, columns, _, _ in shapes]
        tiles = [max(1, triton.cdiv(rows, height) * n) for (rows, *_), n in zip(shapes, across)]
        counts = [min(n, JOINT_PARTIALS) for n in tiles]
        each = [member for member, parts in enumerate(self.parts) for _ in range(parts)]
        firsts = _starts([counts[member] for member in each]), _starts([tiles[member] for member in each])
        rows = []
        for row, member in enumerate(each):
            weight, gain, u, v, transposed = operands[member]
            height_, columns, leading, step = shapes[member]
            part = row - each.index(member)
            left, right = (v, u) if transposed else (u, v)
            addresses = [
                tensor.data_ptr() + part * distance * tensor.element_size()
                for tensor, distance in ((weight, step), (gain, 1), (left, height_), (right, columns))
            ]
            place = (part * step, member, firsts[0][row], counts[member], firsts[1][row])
            rows.append((*addresses, height_, columns, leading, across[member], *place))
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
        self.rows, self.partials = len(rows), sum(counts[member] for member in each)
        self.summing = _owners([counts[member] for member in each], device)
        self.scaling = _owners([tiles[member] for member in each], device)
        grids = (len(self.summing),), (len(self.scaling),)
        tile: dict[str, Any] = {"ELEMENT": element, "BM": height, "BN": width, "num_warps": WARPS}
        summed = tile | {"GAIN": _TYPES[self.gains[0].dtype], "PARTIALS": triton.next_power_of_2(max(counts))}
        total = self.partials
        self.bilinear = Launch(_joint_bilinear_kernel, grids[0], *[TENSOR] * 3, **tile)
        self.scale = Launch(_joint_scale_kernel, grids[1], *[TENSOR] * (3 + MEMBERS), total, **summed)
        self.inner = Launch(_joint_inner_kernel, grids[0], *[TENSOR] * (3 + MEMBERS), **tile)
        self.gradient = Launch(_joint_gradient_kernel, grids[1], *[TENSOR] * (5 + 2 * MEMBERS), total, **summed)

    def scaled(self) -> tuple[list[Tensor], Tensor]:
        """The weights in use, and partial sums with sigma of every part at the end, float32."""
        outputs = [torch.empty_like(weight, dtype=self.dtype) for weight in self.weights]
        sums = torch.empty(self.partials + self.rows, dtype=torch.float32, device=self.table.device)
        with on_device(self.table):
            self.bilinear(self.table, self.summing, sums)
            self.scale(self.table, self.scaling, sums, *_padded(outputs))
        return outputs, sums

    def gradients(self, grads: Sequence[Tensor], sums: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of weights and of gains, in their dtypes, from those of the weights in use."""
        grads = [grad.contiguous() for grad in grads]
        for_weights = [torch.empty_like(weight) for weight in self.weights]
        for_gains = self.gains[0].new_empty(self.rows)
        partials = torch.empty(self.partials, dtype=torch.float32, device=self.table.device)
        with on_device(self.table):
            self.inner(self.table, self.summing, partials, *_padded(grads))
            self.gradient(self.table, self.scaling, partials, sums, for_gains, *_padded(grads), *_padded(for_weights))
        return for_weights, _pieces(for_gains, self.parts)


def _pieces(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Consecutive pieces in the same memory, which do not know of each other as views would."""
    storage, starts = tensor.untyped_storage(), _starts(sizes)
    return [tensor.new_empty(0).set_(storage, start, (size,), (1,)) for start, size in zip(starts, sizes, strict=True)]


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors, *tensors[:1] * (MEMBERS - len(tensors))]


JOINT_FIELDS = tl.constexpr(13)  # W, gain, left, right, M, N, LD, across, offset, member, first sum, sums, first tile


@triton.jit
def _joint_sizes(entry):
    return tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)


@triton.jit
def _joint_vectors(entry):
    left = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    return left, tl.load(entry + 3).to(tl.pointer_type(tl.float32))


@triton.jit
def _of_member(entry, a, b, c, d, e, f, g, h):
    """The tensor of the weight, at the place of the part."""
    member = tl.load(entry + 9)
    first = tl.where(member == 0, a, tl.where(member == 1, b, tl.where(member == 2, c, d)))
    last = tl.where(member == 4, e, tl.where(member == 5, f, tl.where(member == 6, g, h)))
    return tl.where(member < 4, first, last) + tl.load(entry + 8)


@triton.jit
def _joint_bilinear_kernel(table, owners, sums, ELEMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    program = tl.program_id(0)
    entry = table + tl.load(owners + program) * JOINT_FIELDS
    W = tl.load(entry).to(tl.pointer_type(ELEMENT))
    M, N, LD, across = _joint_sizes(entry)
    left, right = _joint_vectors(entry)
    total = tl.zeros((BM, BN), tl.float32)
    for tile in range(program - tl.load(entry + 10), tl.cdiv(M, BM) * across, tl.load(entry + 11)):
        rows, columns, offsets, inside = _tile(tile, M, N, LD, across, BM, BN)
        w = tl.load(W + offsets, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(left + rows, mask=rows < M, other=0.0)
        b = tl.load(right + columns, mask=columns < N, other=0.0)
        total += a[:, None] * w * b[None, :]
    tl.store(sums + program, tl.sum(total))


@triton.jit
def _joint_scale_kernel(
    table, owners, sums, o0, o1, o2, o3, o4, o5, o6, o7, TOTAL,
    ELEMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GAIN: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    row = tl.load(owners + tl.program_id(0))
    entry = table + row * JOINT_FIELDS
    W = tl.load(entry).to(tl.pointer_type(ELEMENT))
    M, N, LD, across = _joint_sizes(entry)
    tile = tl.program_id(0) - tl.load(entry + 12)
    _, _, offsets, inside = _tile(tile, M, N, LD, across, BM, BN)
    w = tl.load(W + offsets, mask=inside, other=0.0).to(tl.float32)
    sigma = _total(sums + tl.load(entry + 10), 0, tl.load(entry + 11), PARTIALS)
    factor = tl.div_rn(tl.load(tl.load(entry + 1).to(tl.pointer_type(GAIN))).to(tl.float32), sigma)
    if tile == 0:
        tl.store(sums + TOTAL + row, sigma)
    output = _of_member(entry, o0, o1, o2, o3, o4, o5, o6, o7)
    tl.store(output + offsets, (w * factor).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _joint_inner_kernel(
    table, owners, partials, g0, g1, g2, g3, g4, g5, g6, g7,
    ELEMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    entry = table + tl.load(owners + program) * JOINT_FIELDS
    W = tl.load(entry).to(tl.pointer_type(ELEMENT))
    M, N, LD, across = _joint_sizes(entry)
    G = _of_member(entry, g0, g1, g2, g3, g4, g5, g6, g7)
    total = tl.zeros((BM, BN), tl.float32)
    for tile in range(program - tl.load(entry + 10), tl.cdiv(M, BM) * across, tl.load(entry + 11)):
        _, _, offsets, inside = _tile(tile, M, N, LD, across, BM, BN)
        g = tl.load(G + offsets, mask=inside, other=0.0).to(tl.float32)
        total += g * tl.load(W + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(partials + program, tl.sum(total))


@triton.jit
def _joint_gradient_kernel(
    table, owners, partials, sums, for_gains, g0, g1, g2, g3, g4, g5, g6, g7, d0, d1, d2, d3, d4, d5, d6, d7, TOTAL,
    ELEMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GAIN: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    row = tl.load(owners + tl.program_id(0))
    entry = table + row * JOINT_FIELDS
    M, N, LD, across = _joint_sizes(entry)
    left, right = _joint_vectors(entry)
    tile = tl.program_id(0) - tl.load(entry + 12)
    rows, columns, offsets, inside = _tile(tile, M, N, LD, across, BM, BN)
    g = tl.load(_of_member(entry, g0, g1, g2, g3, g4, g5, g6, g7) + offsets, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(left + rows, mask=rows < M, other=0.0)
    b = tl.load(right + columns, mask=columns < N, other=0.0)
    sigma = tl.load(sums + TOTAL + row)
    dgain = tl.div_rn(_total(partials + tl.load(entry + 10), 0, tl.load(entry + 11), PARTIALS), sigma)
    if tile == 0:
        tl.store(for_gains + row, dgain.to(GAIN))
    factor = tl.div_rn(tl.load(tl.load(entry + 1).to(tl.pointer_type(GAIN))).to(tl.float32), sigma)
    dw = (g - a[:, None] * (b * dgain)[None, :]) * factor
    tl.store(_of_member(entry, d0, d1, d2, d3, d4, d5, d6, d7) + offsets, dw.to(ELEMENT), mask=inside)


# --- power iteration -------------------------------------------------------------------------------------------------


class Products:
    """``left = W v`` and ``right = W^T left`` of many matrices, in two launches and one pass over them per dtype.

    Args:
        matrices: (rows, columns) each, with adjacent columns; they may be empty.
        v: (columns,) float32 each.
        left: Results (rows,) float32.
        right: Results (columns,) float32.
    """

    def __init__(
        self, matrices: Sequence[Tensor], v: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]
    ) -> None:
        alike: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
        for entry in zip(matrices, v, left, right, strict=True):
            alike.setdefault(entry[0].dtype, []).append(entry)
        self._groups = [_Group(entries) for entries in alike.values()]

    def __call__(self) -> None:
        """Compute all."""
        for group in self._groups:
            group()


class _Group:
    """Matrices of one dtype, found by the kernels through a table of their addresses."""

    def __init__(self, entries: list[tuple[Tensor, ...]]) -> None:
        matrices = [entry[0] for entry in entries]
        _check_group(entries)
        self.kept = entries  # alive as long as their addresses are used
        blocks = [triton.cdiv(len(matrix), BLOCK_ROWS) for matrix in matrices]
        spans = [triton.cdiv(matrix.shape[1], REDUCE_COLUMNS) for matrix in matrices]
        scratch = [count * matrix.shape[1] for count, matrix in zip(blocks, matrices)]
        rows = [
            (*(tensor.data_ptr() for tensor in entry), *entry[0].shape, entry[0].stride(0), count, *firsts)
            for entry, count, *firsts in zip(entries, blocks, *map(_starts, (blocks, spans, scratch)))
        ]
        device = matrices[0].device
        self.table = torch.tensor(rows, dtype=torch.int64).to(device)
        self.scratch = torch.empty(sum(scratch), dtype=torch.float32, device=device)
        self.blocks, self.spans = _owners(blocks, device), _owners(spans, device)
        self.products = Launch(
            _products_kernel, (len(self.blocks),), *[TENSOR] * 3, ELEMENT=_TYPES[matrices[0].dtype], BM=BLOCK_ROWS,
            BN=BLOCK_COLUMNS, num_warps=BLOCK_WARPS,
        )  # fmt: skip
        self.reduce = Launch(
            _reduce_kernel, (len(self.spans),), *[TENSOR] * 3, BM=REDUCE_BLOCKS, BN=REDUCE_COLUMNS, num_warps=4
        )

    def __call__(self) -> None:
        with on_device(self.table):
            if len(self.blocks):
                self.products(self.table, self.blocks, self.scratch)
            if len(self.spans):
                self.reduce(self.table, self.spans, self.scratch)


def _check_group(entries: list[tuple[Tensor, ...]]) -> None:
    for matrix, *vectors in entries:
        if matrix.dtype not in _TYPES or any(vector.dtype != torch.float32 for vector in vectors):
            raise Unsupported(f"a weight is {matrix.dtype} and its singular vectors {vectors[0].dtype}")
        if (matrix.shape[1] > 1 and matrix.stride(1) != 1) or any(vector.stride(0) != 1 for vector in vectors):
            raise Unsupported("the columns of a weight, or its singular vectors, are not adjacent in memory")


class Normalise:
    """Pieces of a float32 buffer, each divided by its norm, written to ``outputs``.

    Args:
        flat: The pieces, one after the other.
        sizes: Their lengths.
        outputs: Where they go.
    """

    def __init__(self, flat: Tensor, sizes: Sequence[int], outputs: Sequence[Tensor]) -> None:
        if any(output.dtype != torch.float32 or output.stride(0) != 1 for output in outputs):
            raise Unsupported("the singular vectors are not contiguous float32")
        self.flat, self.outputs = flat, list(outputs)
        rows = list(zip(_starts(sizes), sizes, (output.data_ptr() for output in outputs), strict=True))
        self.table = torch.tensor(rows, dtype=torch.int64).to(flat.device)
        self.launch = Launch(_normalise_kernel, (len(rows),), TENSOR, TENSOR, TINY=TINY, BLOCK=NORM, num_warps=4)

    def __call__(self) -> None:
        """Normalise all."""
        with on_device(self.flat):
            self.launch(self.table, self.flat)
        increment_version(self.outputs)  # which torch does not see: no backward is to take them for older ones


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _owners(counts: Sequence[int], device: torch.device) -> Tensor:
    """Index of the matrix of each program."""
    numbers, times = torch.arange(len(counts), device="cpu"), torch.tensor(counts, device="cpu")
    return numbers.repeat_interleave(times).to(device, torch.int32)


FIELDS = tl.constexpr(11)  # matrix, v, left, right, M, N, LD, blocks, first block, first span, place in scratch


@triton.jit
def _products_kernel(table, owners, scratch, ELEMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    # BM rows: y = W v and their share of W^T y; the second time the rows come from the cache
    program = tl.program_id(0)
    entry = table + tl.load(owners + program) * FIELDS
    W = tl.load(entry).to(tl.pointer_type(ELEMENT))
    v = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    left = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    M, N, LD = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    block = program - tl.load(entry + 8)
    rows = block * BM + tl.arange(0, BM)
    W += rows[:, None] * LD
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        w = tl.load(W + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += w * tl.load(v + columns, mask=columns < N, other=0.0)[None, :]
    y = tl.sum(total, 1)
    tl.store(left + rows, y, mask=rows < M)
    scratch += tl.load(entry + 10) + block * N
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        w = tl.load(W + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(scratch + columns, tl.sum(w * y[:, None], 0), mask=columns < N)


@triton.jit
def _reduce_kernel(table, owners, scratch, BM: tl.constexpr, BN: tl.constexpr):
    program = tl.program_id(0)
    entry = table + tl.load(owners + program) * FIELDS
    right = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    N, blocks = tl.load(entry + 5), tl.load(entry + 7)
    columns = (program - tl.load(entry + 9)) * BN + tl.arange(0, BN)
    scratch += tl.load(entry + 10)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, blocks, BM):
        rows = start + tl.arange(0, BM)
        inside = (rows < blocks)[:, None] & (columns < N)[None, :]
        total += tl.load(scratch + rows[:, None] * N + columns[None, :], mask=inside, other=0.0)
    tl.store(right + columns, tl.sum(total, 0), mask=columns < N)


@triton.jit
def _normalise_kernel(table, flat, TINY: tl.constexpr, BLOCK: tl.constexpr):
    # first to a largest entry of 1: the squares of W^T W v would leave the range of float32
    row = table + tl.program_id(0) * 3
    flat += tl.load(row)
    size = tl.load(row + 1)
    output = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(flat + index, mask=index < size, other=0.0)))
    scale = tl.maximum(tl.max(largest), TINY)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.div_rn(tl.load(flat + index, mask=index < size, other=0.0), scale)
        squares += x * x
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares)), TINY)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.div_rn(tl.load(flat + index, mask=index < size, other=0.0), scale)
        tl.store(output + index, tl.div_rn(x, norm), mask=index < size)
