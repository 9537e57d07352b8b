"""Attention with row entropy where a head fits into one program: at most 256 queries and 256 keys.

All keys of a row are at hand at once, so the softmax needs no rescaling and the entropy comes from the same exponents.
One backward kernel makes the gradients of queries, keys and values from five products, always added in one order.

With ``p = 2 ** t`` and scaled scores ``s``: ``H = -sum p ln(p)`` and
``ds = p * (dP - dH * ln(p) - c)``, ``c = sum_j p_j (dP_j - dH * ln(p_j)) = dO . O + dH * H`` of the row.
Keys are cut into ``PIECES``, powers of two that add up to little more than there are: 197 keys are 128 + 64 + 16.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_reg.kernels.launching import INTERPRETED, MOST_PLANS, TENSOR, Launch, Layout, layout
from lightning_reg.kernels.operators import Unsupported

MOST_TOKENS = 256
MOST_DIM = 128
MOST_BYTES = 2**17  # of keys and values at once in float32: what a block needs beside them must fit too

HIDDEN = tl.constexpr(-1e30)
SEEN = tl.constexpr(-1e29)  # above every hidden score
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward_kernel(
    query, key, value, mask, output, entropy, lse, largest,
    scale, heads, queries, keys, offset, step, window,
    query_b, query_h, query_m, key_b, key_h, key_n, value_b, value_h, value_n,
    mask_b, mask_h, mask_m, mask_n, output_b, output_h, output_m,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WIDEN: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // SPLIT).to(tl.int64)
    part = program % SPLIT
    b = head // heads
    h = head % heads
    query += b * query_b + h * query_h
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    mask += b * mask_b + h * mask_h
    output += b * output_b + h * output_h
    entropy += head * queries
    lse += head * queries
    largest += head * queries

    key_tiles = ()
    value_tiles = ()
    at = 0
    for i in tl.static_range(len(PIECES)):
        key_tiles += (_load_rows(key, at, keys, key_n, PIECES[i], DIM, WIDTH, WIDEN),)
        value_tiles += (_load_rows(value, at, keys, value_n, PIECES[i], VALUE_DIM, VALUE_WIDTH, WIDEN),)
        at += PIECES[i]

    for first in range(part * ROWS, queries, SPLIT * ROWS):
        _attend(
            query, key_tiles, value_tiles, mask, output, entropy, lse, largest,
            first, scale, queries, keys, offset, step, window, query_m, mask_m, mask_n, output_m,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, ROWS, PIECES, FULL, MASK, CAUSAL, WINDOW, WIDEN, SIZED,
        )  # fmt: skip


@triton.jit
def _attend(
    query, key_tiles, value_tiles, mask, output, entropy, lse, largest,
    first, scale, queries, keys, offset, step, window, query_m, mask_m, mask_n, output_m,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WIDEN: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Output and row statistics of ``ROWS`` queries."""
    rows = first + tl.arange(0, ROWS)
    tile = _load_rows(query, first, queries, query_m, ROWS, DIM, WIDTH, WIDEN)
    scores = ()
    most = tl.full([ROWS], HIDDEN, tl.float32)
    at = 0
    for i in tl.static_range(len(PIECES)):
        products = tl.dot(tile, tl.trans(key_tiles[i]), input_precision="ieee")
        products = _hide(
            products, rows[:, None], _count_from(at, PIECES[i])[None, :], queries, keys, offset, step, window,
            mask, mask_m, mask_n, i >= FULL, MASK, CAUSAL, WINDOW,
        )  # fmt: skip
        most = tl.maximum(most, tl.max(products, 1))
        scores += (products,)
        at += PIECES[i]

    factor = scale * LOG2E
    shift = tl.where(most > SEEN, most * factor, 0.0)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for i in tl.static_range(len(PIECES)):
        exponents = scores[i] * factor - shift[:, None]
        weights = tl.exp2(exponents)
        total += tl.sum(weights, 1)
        weighted += tl.sum(weights * exponents, 1)
        result = tl.dot(weights.to(value_tiles[i].dtype), value_tiles[i], acc=result, input_precision="ieee")
    inside = rows < queries
    if SIZED:
        size = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(len(PIECES)):
            size = tl.maximum(size, tl.max(tl.where(scores[i] > SEEN, tl.abs(scores[i]), 0.0), 1))
        # a maximum passes over NaN, a sum does not
        tl.store(largest + rows, tl.where(total == total, size * scale, total), mask=inside)
    total = tl.where(total == 0, 1.0, total)
    bits = tl.log2(total)
    _store_rows(output, result / total[:, None], first, queries, output_m, ROWS, VALUE_DIM, VALUE_WIDTH)
    tl.store(entropy + rows, (bits - weighted / total) * LN2, mask=inside)
    tl.store(lse + rows, (shift + bits) * LN2, mask=inside)


@triton.jit
def _backward_kernel(
    grad_output, grad_entropy, query, key, value, mask, output, entropy, lse,
    grad_query, grad_key, grad_value, partial,
    scale, heads, queries, keys, offset, step, window,
    up_b, up_h, up_m, bend_b, bend_h, bend_m,
    query_b, query_h, query_m, key_b, key_h, key_n, value_b, value_h, value_n,
    mask_b, mask_h, mask_m, mask_n, output_b, output_h, output_m,
    to_query_b, to_query_h, to_query_m, to_key_b, to_key_h, to_key_n, to_value_b, to_value_h, to_value_n,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BOUND: tl.constexpr, ONCE: tl.constexpr,
    OUTPUT: tl.constexpr, ENTROPY: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """All gradients of a head: ``KEYS`` keys at a time, the gradient of the queries passing through ``partial``."""
    head = tl.program_id(0).to(tl.int64)
    b = head // heads
    h = head % heads
    grad_output += b * up_b + h * up_h
    grad_entropy += b * bend_b + h * bend_h
    query += b * query_b + h * query_h
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    mask += b * mask_b + h * mask_h
    output += b * output_b + h * output_h
    grad_query += b * to_query_b + h * to_query_h
    grad_key += b * to_key_b + h * to_key_h
    grad_value += b * to_value_b + h * to_value_h
    entropy += head * queries
    lse += head * queries
    partial += head * queries * WIDTH
    factor = scale * LOG2E

    for start in range(0, keys, KEYS):
        key_tile = _load_rows(key, start, keys, key_n, KEYS, DIM, WIDTH, WIDEN)
        value_tile = _load_rows(value, start, keys, value_n, KEYS, VALUE_DIM, VALUE_WIDTH, WIDEN)
        to_key = tl.zeros([KEYS, WIDTH], tl.float32)
        to_value = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
        columns = start + tl.arange(0, KEYS)
        for first in range(0, queries, ROWS):
            rows = first + tl.arange(0, ROWS)
            inside = rows < queries
            tile = _load_rows(query, first, queries, query_m, ROWS, DIM, WIDTH, WIDEN)
            level = tl.load(lse + rows, mask=inside, other=1e30) * LOG2E
            constant = tl.zeros([ROWS], tl.float32)
            if OUTPUT:
                up = _load_rows(grad_output, first, queries, up_m, ROWS, VALUE_DIM, VALUE_WIDTH, WIDEN)
                result = _load_rows(output, first, queries, output_m, ROWS, VALUE_DIM, VALUE_WIDTH, WIDEN)
                constant += tl.sum(up.to(tl.float32) * result.to(tl.float32), 1)
            if ENTROPY:
                bend = tl.load(grad_entropy + rows.to(tl.int64) * bend_m, mask=inside, other=0.0).to(tl.float32)
                constant += bend * tl.load(entropy + rows, mask=inside, other=0.0)
            products = tl.dot(key_tile, tl.trans(tile), input_precision="ieee")
            products = _hide(
                products, rows[None, :], columns[:, None], queries, keys, offset, step, window,
                mask, mask_m, mask_n, BOUND, MASK, CAUSAL, WINDOW,
            )  # fmt: skip
            exponents = products * factor - level[None, :]
            weights = tl.exp2(exponents)
            pull = tl.zeros([KEYS, ROWS], tl.float32)
            if OUTPUT:
                pull = tl.dot(value_tile, tl.trans(up), input_precision="ieee")
                to_value = tl.dot(weights.to(up.dtype), up, acc=to_value, input_precision="ieee")
            if ENTROPY:
                pull -= (bend * LN2)[None, :] * exponents
            slopes = (weights * (pull - constant[None, :])).to(tile.dtype)
            to_key = tl.dot(slopes, tile, acc=to_key, input_precision="ieee")
            if ONCE:
                to_query = tl.dot(tl.trans(slopes), key_tile, input_precision="ieee")
                _store_rows(grad_query, to_query * scale, first, queries, to_query_m, ROWS, DIM, WIDTH)
            else:
                # masks in place of a branch: Triton 3.6 cannot compile one here
                before = queries if start > 0 else 0
                after = queries if start + KEYS < keys else 0
                to_query = _load_rows(partial, first, before, WIDTH, ROWS, WIDTH, WIDTH, False)
                to_query = tl.dot(tl.trans(slopes), key_tile, acc=to_query, input_precision="ieee")
                _store_rows(partial, to_query, first, after, WIDTH, ROWS, WIDTH, WIDTH)
                _store_rows(grad_query, to_query * scale, first, queries - after, to_query_m, ROWS, DIM, WIDTH)

        _store_rows(grad_key, to_key * scale, start, keys, to_key_n, KEYS, DIM, WIDTH)
        _store_rows(grad_value, to_value, start, keys, to_value_n, KEYS, VALUE_DIM, VALUE_WIDTH)
        if not ONCE:
            tl.debug_barrier()  # the next pass reads what other threads stored in ``partial``


@triton.jit
def _hide(
    scores, row, column, queries, keys, offset, step, window, mask, mask_m, mask_n,
    BOUND: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores out of sight become ``HIDDEN``; row and column broadcast to the tile, in either order."""
    if BOUND:
        scores = tl.where(column < keys, scores, HIDDEN)
    if CAUSAL:
        scores = tl.where(column <= offset + step * row, scores, HIDDEN)
    if WINDOW:
        scores = tl.where(column > offset + step * row - window, scores, HIDDEN)
        if not CAUSAL:
            scores = tl.where(column < offset + step * row + window, scores, HIDDEN)
    if MASK == "keys":
        seen = tl.load(mask + column.to(tl.int64) * mask_n, mask=column < keys, other=0)
        scores = tl.where(seen != 0, scores, HIDDEN)
    if MASK == "pairs":
        at = mask + row.to(tl.int64) * mask_m + column.to(tl.int64) * mask_n
        seen = tl.load(at, mask=(row < queries) & (column < keys), other=0)
        scores = tl.where(seen != 0, scores, HIDDEN)
    return scores


@triton.jit
def _load_rows(
    base, first, count, stride, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr
):
    rows = first + tl.arange(0, SIZE)
    columns = tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tile = tl.load(at, mask=(rows < count)[:, None] & (columns < DIM)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _store_rows(base, tile, first, count, stride, SIZE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    rows = first + tl.arange(0, SIZE)
    columns = tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=(rows < count)[:, None] & (columns < DIM)[None, :])


@triton.jit
def _count_from(first, SIZE: tl.constexpr):
    return first + tl.arange(0, SIZE)


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
    """Attention output, and of each row the entropy, log-sum-exp and the largest magnitude of its scaled scores.

    Args:
        query: (batch, heads, queries, dim).
        key: (batch, heads, keys, dim).
        value: (batch, heads, keys, value_dim).
        bias: None.
        mask: Visible keys, True = visible, four axes, each full or of size 1.
        scale: Factor on the scores, positive.
        is_causal: Query i stands at ``offset + step * i`` and sees the keys up to there.
        window: Sees only keys less than so far from where it stands.
        offset: Where the first query stands.
        step: From one query to the next.
        sized: Give the largest magnitudes.

    Returns:
        Output (batch, heads, queries, value_dim), in memory (batch, queries, heads, value_dim); entropy in nats,
        log-sum-exp and, if ``sized``, largest magnitude, else (0,); float32 (batch, heads, queries). All are 0 in rows
        that see no key.
    """
    if bias is not None:
        raise Unsupported(WITHOUT_BIAS)
    query, key, value = _rows_adjacent(query, key, value)
    seen = _seen(mask, query, key)
    plan = _forward_plan(
        query.device, layout(query), layout(key), layout(value), layout(seen), mask is not None and mask.shape[-2] == 1,
        scale, is_causal, window, offset, step, sized,
    )  # fmt: skip
    output = query.new_empty_strided(*plan.output)
    entropy, lse = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    largest = torch.empty_like(entropy) if sized else query.new_empty(0, dtype=torch.float32)
    if plan.launch is not None:
        plan.launch(query, key, value, query if seen is None else seen, output, entropy, lse, largest)
    return output, entropy, lse, largest


def backward(
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
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
    """Gradients of query, key and value, and an empty tensor; bit for bit the same in every run.

    The gradients of output and entropy have any strides, or are None where nothing depends on them; ``output``,
    ``entropy`` and ``lse`` come from ``forward``, whose arguments the others are. The results have the shapes of query,
    key and value and lie in memory as (batch, tokens, heads, dim).
    """
    if bias_grad:
        raise Unsupported("short sequences know no gradient of a bias")
    if bias is not None:
        raise Unsupported(WITHOUT_BIAS)
    query, key, value = _rows_adjacent(query, key, value)
    seen, output = _seen(mask, query, key), _adjacent(output)
    up = output if grad_output is None else _adjacent(grad_output)
    bend = entropy if grad_entropy is None else grad_entropy
    plan = _backward_plan(
        query.device, layout(query), layout(key), layout(value), layout(seen), mask is not None and mask.shape[-2] == 1,
        layout(up), layout(bend), layout(output), grad_output is not None, grad_entropy is not None,
        scale, is_causal, window, offset, step,
    )  # fmt: skip
    grads = [query.new_empty_strided(*shape_and_strides) for shape_and_strides in plan.outputs]
    nothing = query.new_empty(0)
    if plan.launch is None:
        for grad in grads:
            grad.zero_()
    else:
        partial = query.new_empty(plan.partial, dtype=torch.float32) if plan.partial else nothing
        plan.launch(
            up, bend, query, key, value, query if seen is None else seen, output, entropy.contiguous(),
            lse.contiguous(), *grads, partial,
        )  # fmt: skip
    return grads[0], grads[1], grads[2], nothing


# --- plans -----------------------------------------------------------------------------------------------------------

Placed = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@dataclass(frozen=True)
class _Forward:
    """What the forward allocates and launches for tensors laid out alike; no launch where there is nothing to do."""

    output: Placed
    launch: Launch | None


@dataclass(frozen=True)
class _Backward:
    """The same of the backward; ``partial`` numbers of float32 in between."""

    outputs: tuple[Placed, ...]
    partial: int
    launch: Launch | None


@lru_cache(MOST_PLANS)
def _forward_plan(
    device: torch.device, query: Layout, key: Layout, value: Layout, seen: Layout | None, by_key: bool, scale: float,
    is_causal: bool, window: int | None, offset: int, step: int, sized: bool,
) -> _Forward:  # fmt: skip
    _check(query, key, value, scale)
    dtype, (batch, heads, queries, dim), _ = query
    keys, value_dim = value[1][2:]
    output = _heads_inside(batch, heads, queries, value_dim)
    if batch * heads * queries == 0:
        return _Forward(output, None)
    settings, options = _forward_settings(dtype, queries, keys, max(dim, value_dim))
    launch = Launch(
        _forward_kernel, (batch * heads * settings["SPLIT"],), *[TENSOR] * 8,
        scale, heads, queries, keys, offset, step, window or 0,
        *query[2][:3], *key[2][:3], *value[2][:3], *_strides(seen), *output[1][:3],
        **_dims(dim, value_dim), **settings, **_sight(seen, by_key, is_causal, window), SIZED=sized, **options,
    )  # fmt: skip
    return _Forward(output, launch)


@lru_cache(MOST_PLANS)
def _backward_plan(
    device: torch.device, query: Layout, key: Layout, value: Layout, seen: Layout | None, by_key: bool, up: Layout,
    bend: Layout, output: Layout, from_output: bool, from_entropy: bool, scale: float, is_causal: bool,
    window: int | None, offset: int, step: int,
) -> _Backward:  # fmt: skip
    _check(query, key, value, scale)
    dtype, (batch, heads, queries, dim), _ = query
    keys, value_dim = value[1][2:]
    outputs = tuple(_heads_inside(batch, heads, *size) for size in ((queries, dim), (keys, dim), (keys, value_dim)))
    if batch * heads * queries * keys == 0 or not (from_output or from_entropy):
        return _Backward(outputs, 0, None)
    settings, options = _backward_settings(dtype, queries, keys, max(dim, value_dim))
    dims = _dims(dim, value_dim)
    strides = [stride for _, placed in outputs for stride in placed[:3]]
    launch = Launch(
        _backward_kernel, (batch * heads,), *[TENSOR] * 13, scale, heads, queries, keys, offset, step, window or 0,
        *up[2][:3], *bend[2], *query[2][:3], *key[2][:3], *value[2][:3], *_strides(seen), *output[2][:3], *strides,
        OUTPUT=from_output, ENTROPY=from_entropy, **dims, **settings,
        **_sight(seen, by_key, is_causal, window), **options,
    )  # fmt: skip
    return _Backward(outputs, 0 if settings["ONCE"] else batch * heads * queries * dims["WIDTH"], launch)


def unsupported(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> str | None:
    """Why these kernels cannot take the arguments; None when they can."""
    if bias is not None:
        return WITHOUT_BIAS
    return _refusal(layout(query), layout(key), layout(value))


WITHOUT_BIAS = "short sequences take no additive mask"


@lru_cache(MOST_PLANS)
def _refusal(query: Layout, key: Layout, value: Layout | None) -> str | None:
    if value is None:
        return "short sequences need a value"
    if query[0] not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{query[0]} is neither float16, bfloat16 nor float32"
    if not query[0] == key[0] == value[0]:
        return f"query, key and value have different dtypes, {query[0]}, {key[0]} and {value[0]}"
    (_, heads, queries, dim), (_, key_heads, keys, _), value_dim = query[1], key[1], value[1][-1]
    if heads != key_heads:
        return "heads share keys"
    if max(queries, keys) > MOST_TOKENS:
        return f"there are more than {MOST_TOKENS} {'keys' if keys > MOST_TOKENS else 'queries'}"
    if max(dim, value_dim) > MOST_DIM:
        return f"the head dim is above {MOST_DIM}"
    dims = _dims(dim, value_dim)
    most = max(16, triton.next_power_of_2(keys))
    if query[0] == torch.float32 and 4 * most * (dims["WIDTH"] + dims["VALUE_WIDTH"]) > MOST_BYTES:
        return "keys and values in float32 do not fit the shared memory"
    return None


def _check(query: Layout, key: Layout, value: Layout, scale: float) -> None:
    reason = _refusal(query, key, value)
    if reason is None and scale <= 0:
        reason = "the scale is not positive"
    if reason is not None:
        raise Unsupported(reason)


def _forward_settings(dtype: torch.dtype, queries: int, keys: int, dim: int) -> tuple[dict[str, Any], dict[str, int]]:
    if dtype == torch.float32:
        rows, pieces, warps, stages = 16, (_power(keys, 256),), 4, 1
    else:
        rows, pieces, warps, stages = 64, _pieces(keys), 4, 2
    settings = {"ROWS": rows, "SPLIT": 1, "PIECES": pieces, "FULL": len(pieces) - (sum(pieces) > keys)}
    return settings, {"num_warps": warps, "num_stages": stages}


def _backward_settings(dtype: torch.dtype, queries: int, keys: int, dim: int) -> tuple[dict[str, Any], dict[str, int]]:
    if dtype == torch.float32:
        rows, piece, warps = 16, 16, 4
    else:
        piece = _power(keys, 256 if dim <= 64 else 128)
        rows, warps = 32, 8 if piece >= 128 else 4
    settings = {"ROWS": rows, "KEYS": piece, "BOUND": keys % piece > 0, "ONCE": piece >= keys}
    return settings, {"num_warps": warps, "num_stages": 1}


def _power(size: int, most: int) -> int:
    """Power of two from 16 to ``most`` that holds ``size``, or ``most``."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _pieces(keys: int) -> tuple[int, ...]:
    """At most three powers of two, falling, none below 16, that add up to ``keys`` or a little more."""
    pieces: list[int] = []
    left = keys
    while left > 0 or not pieces:
        size = max(16, triton.next_power_of_2(left))
        if len(pieces) < 2 and size > 16 and left <= size * 13 // 16:
            size //= 2
        pieces.append(size)
        left -= size
    return tuple(pieces)


def _dims(dim: int, value_dim: int) -> dict[str, int]:
    width, value_width = _power(dim, MOST_DIM), _power(value_dim, MOST_DIM)
    return {"DIM": dim, "WIDTH": width, "VALUE_DIM": value_dim, "VALUE_WIDTH": value_width}


def _sight(seen: Layout | None, by_key: bool, is_causal: bool, window: int | None) -> dict[str, Any]:
    kind = "none" if seen is None else "keys" if by_key else "pairs"
    # the interpreter multiplies the bits of bfloat16 as integers
    return {"MASK": kind, "CAUSAL": is_causal, "WINDOW": window is not None, "WIDEN": INTERPRETED}


def _seen(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Visible keys as bytes, in the shape of the scores."""
    return None if mask is None else mask.view(torch.uint8).expand(*query.shape[:-1], key.shape[-2])


def _strides(seen: Layout | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if seen is None else seen[2]


def _heads_inside(batch: int, heads: int, tokens: int, dim: int) -> Placed:
    """Shape (batch, heads, tokens, dim), memory (batch, tokens, heads, dim): a later merge of heads is a view."""
    return (batch, heads, tokens, dim), (tokens * heads * dim, dim, heads * dim, 1)


def _rows_adjacent(query: Tensor, key: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if value is None:
        raise Unsupported("short sequences need a value")
    return _adjacent(query), _adjacent(key), _adjacent(value)


def _adjacent(tensor: Tensor) -> Tensor:
    """With the numbers of a row beside each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
