"""What the kernels of activation penalties share: one pass that sums them, one that adds their gradient.

The gradient is added to the one that comes from above and, where the activation function before is known, taken through
it in the same pass: ``d loss / d pre = (grad + strength * slope(x)) * activation'(pre)`` with ``x = activation(pre)``
computed again. Then the penalty costs backward nothing.

Legend: x is (rows, width); without a mask, and where no number belongs to a row, it is one long row. A tile is
(ROWS, COLUMNS) of it. QUANTITY is "density", "l1", "square" or "hoyer".
"""

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_reg.kernels.operators import Unsupported

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
SUM_TILE, SUM_TILES, SUM_WARPS = 8192, 1, 8
ADD_TILE, ADD_WARPS = 1024, 4
WIDE = 1 << 20  # from here on offsets within a tile of several rows could leave int32
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NORMAL = tl.constexpr(0.3989422804014327)  # density of the normal distribution at 0
GELU_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


def check(*tensors: Tensor | None) -> None:
    """Raise ``Unsupported`` for what no kernel here can do."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise Unsupported(f"its kernel does not know tensors of type {type(tensor).__name__}")
        if tensor.dtype not in SUPPORTED:
            raise Unsupported(f"its kernel computes in float32 and was given {tensor.dtype}")


def means(
    x: Tensor, mask: Tensor | None, quantity: str, *, square: bool = False, inverse: Tensor | None = None,
    fixed: float = 0.0, floor: float | None = None,
) -> list[Tensor]:  # fmt: skip
    """Mean of a quantity over valid elements and, with ``square``, of the squares; float32 scalars.

    Args:
        x: Activations (..., width).
        mask: Valid tokens (..., 1), True = valid.
        quantity: "density", "l1" or "square".
        square: Give the mean square too.
        inverse: 1 / epsilon as a scalar tensor; ``fixed`` where it is None.
        fixed: 1 / epsilon.
        floor: Measure how far x stands above it.
    """
    x = x.contiguous()
    rows, width, tile = _layout(x, mask is not None, SUM_TILE)
    tiles = triton.cdiv(rows, tile[0]) * triton.cdiv(width, tile[1]) if x.numel() else 0
    partials = [x.new_empty(triton.cdiv(tiles, SUM_TILES), dtype=torch.float32) for _ in range(1 + square)]
    if tiles:
        with torch.cuda.device_of(x):
            _sum_kernel[partials[0].shape](
                x, _bytes(mask), inverse, partials[0], partials[-1], rows, width, fixed,
                0.0 if floor is None else floor, QUANTITY=quantity, SQUARE=square, MASKED=mask is not None,
                SCALED=inverse is not None, FLOOR=floor is not None, TILES=SUM_TILES, ROWS=tile[0], COLUMNS=tile[1],
                num_warps=SUM_WARPS,
            )  # fmt: skip
    count = max(1, x.numel()) if mask is None else (mask.sum() * x.shape[-1]).clamp_min_(1)
    return [partial.sum() / count for partial in partials]


def add(
    grad: Tensor | None, sources: Sequence[Tensor], activation: str, mask: Tensor | None, strength: Tensor,
    quantity: str, *, inverse: Tensor | None = None, fixed: float = 0.0, floor: float | None = None,
    unit: Tensor | None = None, ratio: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """``grad`` plus the penalty's gradient, taken through the activation function.

    Args:
        grad: Gradient of x from above, or None for 0.
        sources: x; with an activation what enters it and, where it is a gate, what it is multiplied with.
        activation: "", "gelu", "gelu_tanh" or "silu".
        mask: Valid tokens (..., 1), True = valid.
        strength: Factor on the slope, a scalar; one for each token for "hoyer".
        quantity: "density", "l1" or "hoyer".
        inverse: 1 / epsilon as a scalar tensor; ``fixed`` where it is None.
        fixed: 1 / epsilon.
        floor: Measure how far x stands above it.
        unit: Largest magnitude of each token, for "hoyer".
        ratio: L1 over squared L2 of each token in these units, for "hoyer".

    Returns:
        The gradients of ``sources``.
    """
    sources = [source.contiguous() for source in sources]
    outputs = [torch.empty_like(source) for source in sources]
    x = sources[0]
    by_row = mask is not None or quantity == "hoyer"
    rows, width, tile = _layout(x, by_row, ADD_TILE)
    if x.numel():
        grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(width, tile[1]),)
        with torch.cuda.device_of(x):
            _add_kernel[grid](
                None if grad is None else grad.contiguous(), x, sources[-1], _bytes(mask), strength, inverse, unit,
                ratio, outputs[0], outputs[-1], rows, width, fixed, 0.0 if floor is None else floor,
                QUANTITY=quantity, ACTIVATION=activation, GATED=len(sources) > 1, GRAD=grad is not None,
                MASKED=mask is not None, SCALED=inverse is not None, FLOOR=floor is not None, ROWS=tile[0],
                COLUMNS=tile[1], num_warps=ADD_WARPS,
            )  # fmt: skip
    return outputs


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.int8)


def _layout(x: Tensor, by_row: bool, size: int) -> tuple[int, int, tuple[int, int]]:
    """``(rows, width, (rows, columns) of a tile)`` of a contiguous tensor, tiles of at most ``size`` elements."""
    if not by_row:
        return 1, x.numel(), (1, size)
    width = max(1, x.shape[-1])
    power = width & -width
    columns = size if width >= WIDE else min(power if power >= 256 else triton.next_power_of_2(width), size)
    return x.numel() // width, width, (size // columns, columns)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1, without the eight instructions that exponents elsewhere need."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _backwards():
    """Number of the program, the last first: what was written last is still in the cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _tile(index, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row numbers, offset of the first element, offsets from it, and which are within x."""
    across = tl.cast(tl.cdiv(width, COLUMNS), tl.int32)  # a width of 1 is a constant to the compiler
    row = (index // across).to(tl.int64) * ROWS
    column = (index % across).to(tl.int64) * COLUMNS
    row_numbers = row + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    offsets = columns[None, :] if ROWS == 1 else tl.arange(0, ROWS)[:, None] * width + columns[None, :]
    inside = (row_numbers < rows)[:, None] & (column + columns < width)[None, :]
    return row_numbers, row * width + column, offsets, inside


@triton.jit
def _above(x, floor, FLOOR: tl.constexpr):
    # in this order NaN stays NaN
    return tl.where(x < floor, floor, x) - floor if FLOOR else x


@triton.jit
def _sum_kernel(
    x_ptr, mask_ptr, inverse_ptr, partial_ptr, square_ptr, rows, width, fixed, floor, QUANTITY: tl.constexpr,
    SQUARE: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr, FLOOR: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = _backwards()
    inverse = tl.load(inverse_ptr) if SCALED else fixed
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.static_range(TILES):
        row_numbers, start, offsets, inside = _tile(program * TILES + step, rows, width, ROWS, COLUMNS)
        if MASKED:
            token = tl.load(mask_ptr + row_numbers, row_numbers < rows, 0) != 0
            inside = inside & token[:, None]
        x = tl.load(x_ptr + start + offsets, inside, 0.0).to(tl.float32)
        x = tl.where(inside, _above(x, floor, FLOOR), 0.0) if FLOOR else x
        if QUANTITY == "density":
            total += 1.0 - _reciprocal(1.0 + x * inverse * x)
        if QUANTITY == "l1":
            total += tl.abs(x)
        if QUANTITY == "square":
            total += x * x
        if SQUARE:
            square += x * x
    tl.store(partial_ptr + program, tl.sum(total))
    if SQUARE:
        tl.store(square_ptr + program, tl.sum(square))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Value and derivative of the activation function."""
    if ACTIVATION == "gelu":
        # normal distribution: its tail is its density times Mills' ratio, here with a relative error of 2e-7
        density = tl.exp(x * x * -0.5) * NORMAL
        t = _reciprocal(1.0 + 0.3 * tl.abs(x))
        mills = 0.08942340861771297 * t - 0.3940497377266384
        mills = mills * t + 0.5172516105068147
        mills = mills * t - 0.13456500866162546
        mills = mills * t + 0.3222562424967501
        mills = mills * t + 0.2504459746434935
        mills = mills * t + 0.3026852818982412
        mills = mills * t + 0.29986618283502126
        tail = density * (mills * t)
        below = tl.where(x > 0.0, 1.0 - tail, tail)
        value = x * below
        slope = below + x * density
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) = 2 sigmoid(2 u), which keeps its digits where it is small
        share = _reciprocal(1.0 + tl.exp((x + x * x * x * GELU_CUBE) * (-2.0 * GELU_SCALE)))
        value = x * share
        slope = share + value * (1.0 - share) * (2.0 * GELU_SCALE) * (1.0 + x * x * (3.0 * GELU_CUBE))
    else:
        share = _reciprocal(1.0 + tl.exp(-x))
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    return value, slope


@triton.jit
def _add_kernel(
    grad_ptr, source_ptr, up_ptr, mask_ptr, strength_ptr, inverse_ptr, unit_ptr, ratio_ptr, out_ptr, up_out_ptr, rows,
    width, fixed, floor, QUANTITY: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, GRAD: tl.constexpr,
    MASKED: tl.constexpr, SCALED: tl.constexpr, FLOOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_numbers, start, offsets, inside = _tile(_backwards(), rows, width, ROWS, COLUMNS)
    source = tl.load(source_ptr + start + offsets, inside, 0.0).to(tl.float32)
    x = source
    if ACTIVATION != "":
        value, derivative = _activate(source, ACTIVATION)
        x = value.to(source_ptr.dtype.element_ty).to(tl.float32)
        if GATED:
            up = tl.load(up_ptr + start + offsets, inside, 0.0).to(tl.float32)
            x = (x * up).to(source_ptr.dtype.element_ty).to(tl.float32)
    x = _above(x, floor, FLOOR)

    sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))  # of NaN NaN, of 0 0
    if QUANTITY == "density":
        zero = _reciprocal(1.0 + x * (tl.load(inverse_ptr) if SCALED else fixed) * x)
        pull = tl.load(strength_ptr) * (x * zero * zero)
    elif QUANTITY == "l1":
        pull = tl.load(strength_ptr) * sign
    else:
        within = row_numbers < rows
        unit = tl.load(unit_ptr + row_numbers, within, 1.0)[:, None]
        ratio = tl.load(ratio_ptr + row_numbers, within, 0.0)[:, None]
        strength = tl.load(strength_ptr + row_numbers, within, 0.0)[:, None]
        # where nothing but the sign is left of a number too small to be squared, and in padding
        pull = tl.where(strength == 0.0, 0.0, (sign - x / unit * ratio) * strength)
    if MASKED and QUANTITY != "hoyer":
        token = tl.load(mask_ptr + row_numbers, row_numbers < rows, 0) != 0
        pull = tl.where(token[:, None], pull, 0.0)

    total = pull
    if GRAD:
        total += tl.load(grad_ptr + start + offsets, inside, 0.0).to(tl.float32)
    if GATED:
        tl.store(up_out_ptr + start + offsets, total * value, inside)
        total *= up
    if ACTIVATION != "":
        total *= derivative
    tl.store(out_ptr + start + offsets, total, inside)
