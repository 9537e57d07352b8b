"""What the kernels of activation penalties share: one pass that sums them, one that adds their gradient.

The gradient is added to the one that comes from above and, where the activation function before is known, taken through
it in the same pass: ``d loss / d pre = (grad + strength * slope(x)) * activation'(pre)`` with ``x = activation(pre)``
computed again. Then the penalty costs backward nothing.

Legend: x is (rows, width); without a mask, and where no number belongs to a row, it is one long row. A tile is
(ROWS, COLUMNS) of it. QUANTITY is "density", "l1", "square" or "hoyer".
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_reg.kernels import launching
from lightning_reg.kernels.launching import MOST_PLANS, TENSOR, Launch
from lightning_reg.kernels.operators import Unsupported

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
SUM_TILE, SUM_TILES, SUM_WARPS = 8192, 1, 8
ADD_TILE, ADD_WARPS = 1024, 4
WIDE = 1 << 20  # from here on offsets within a tile of several rows could leave int32
INTERPRETED = tl.constexpr(launching.INTERPRETED)
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
    count, launch = _sums(
        x.device, x.dtype, x.shape, quantity, square, mask is not None, inverse is not None, fixed, floor
    )
    partials = [x.new_empty(count, dtype=torch.float32) for _ in range(1 + square)]
    if launch is not None:
        launch(*_given(x, _bytes(mask), inverse), partials[0], partials[-1])
    sums = [partial.sum() for partial in partials]
    if mask is None:  # the kernel has divided already
        return sums
    count = (mask.sum() * x.shape[-1]).clamp_min_(1)
    return [total / count for total in sums]


@lru_cache(MOST_PLANS)
def _sums(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, quantity: str, square: bool, masked: bool,
    scaled: bool, fixed: float, floor: float | None,
) -> tuple[int, Launch | None]:  # fmt: skip
    """Number of the partial sums, and the launch that writes them; none where there is nothing to add.

    Without a mask, which tells how many elements count, they are divided by the size of x.
    """
    rows, width, tile = _layout(shape, masked, SUM_TILE)
    count = triton.cdiv(triton.cdiv(rows, tile[0]) * triton.cdiv(width, tile[1]), SUM_TILES) if shape.numel() else 0
    if not count:
        return 0, None
    launch = Launch(
        _sum_kernel, (count,), TENSOR, TENSOR if masked else None, TENSOR if scaled else None, TENSOR, TENSOR,
        rows, width, fixed, 0.0 if floor is None else floor, 1.0 if masked else 1 / shape.numel(), QUANTITY=quantity,
        SQUARE=square, MASKED=masked, SCALED=scaled, FLOOR=floor is not None, TILES=SUM_TILES, ROWS=tile[0],
        COLUMNS=tile[1], num_warps=SUM_WARPS,
    )  # fmt: skip
    return count, launch


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
    x, given = sources[0], (_bytes(mask), strength, inverse, unit, ratio)
    if x.numel():
        grad = None if grad is None else grad.contiguous()
        launch = _additions(
            x.device, None if grad is None else grad.dtype, x.dtype, sources[-1].dtype, strength.dtype, x.shape,
            len(sources) > 1, tuple(tensor is not None for tensor in given), activation, quantity, fixed, floor,
        )  # fmt: skip
        launch(*_given(grad, x, sources[-1], *given), outputs[0], outputs[-1])
    return outputs


@lru_cache(MOST_PLANS)
def _additions(
    device: torch.device, grad: torch.dtype | None, dtype: torch.dtype, up: torch.dtype, strength: torch.dtype,
    shape: torch.Size, gated: bool, given: tuple[bool, ...], activation: str, quantity: str, fixed: float,
    floor: float | None,
) -> Launch:  # fmt: skip
    masked, _, scaled, *_ = given
    rows, width, tile = _layout(shape, masked or quantity == "hoyer", ADD_TILE)
    return Launch(
        _add_kernel, (triton.cdiv(rows, tile[0]) * triton.cdiv(width, tile[1]),),
        None if grad is None else TENSOR, TENSOR, TENSOR, *(TENSOR if there else None for there in given), TENSOR,
        TENSOR, rows, width, fixed, 0.0 if floor is None else floor, QUANTITY=quantity, ACTIVATION=activation,
        GATED=gated, GRAD=grad is not None, MASKED=masked, SCALED=scaled, FLOOR=floor is not None, ROWS=tile[0],
        COLUMNS=tile[1], num_warps=ADD_WARPS,
    )  # fmt: skip


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.int8)


def _layout(shape: torch.Size, by_row: bool, size: int) -> tuple[int, int, tuple[int, int]]:
    """``(rows, width, (rows, columns) of a tile)`` of a contiguous tensor, tiles of at most ``size`` elements."""
    if not by_row:
        return 1, shape.numel(), (1, size)
    width = max(1, shape[-1])
    power = width & -width
    columns = size if width >= WIDE else min(power if power >= 256 else triton.next_power_of_2(width), size)
    return shape.numel() // width, width, (size // columns, columns)


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
    x_ptr, mask_ptr, inverse_ptr, partial_ptr, square_ptr, rows, width, fixed, floor, share, QUANTITY: tl.constexpr,
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
    tl.store(partial_ptr + program, tl.sum(total) * share)
    if SQUARE:
        tl.store(square_ptr + program, tl.sum(square) * share)


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
