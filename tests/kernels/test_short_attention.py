"""The kernels for short sequences against float64; upstream gradients are random, fresh memory is NaN."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from lightning_reg.kernels import Unsupported, short_attention

ALLOWED = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the norm


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is to fill holds NaN."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *size, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def options(query: Tensor, **changes: Any) -> dict[str, Any]:
    return dict(scale=1.3 * query.shape[-1] ** -0.5, is_causal=False, window=None, offset=0, step=1) | changes


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, chosen: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, entropy, log-sum-exp and largest magnitude from the whole matrix."""
    scores = query @ key.mT * chosen["scale"]
    position = chosen["offset"] + chosen["step"] * torch.arange(query.shape[2], device=query.device)[:, None]
    distance = position - torch.arange(key.shape[2], device=query.device)
    shown = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    if chosen["is_causal"]:
        shown = shown & (distance >= 0)
    if chosen["window"] is not None:
        near = distance if chosen["is_causal"] else distance.abs()
        shown = shown & (near < chosen["window"])
    seen = shown.any(-1)
    lse = scores.masked_fill(~shown, -math.inf).logsumexp(-1).masked_fill(~seen, 0.0)
    logs = torch.where(shown, scores - lse[..., None], 0.0)
    probs = torch.where(shown, logs.exp(), 0.0)
    largest = torch.zeros_like(lse)
    if key.shape[2] > 0:
        largest = scores.masked_fill(~shown, 0.0).abs().amax(-1)
    return probs @ value, -(probs * logs).sum(-1), lse, largest


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    mask: Tensor | None = None,
    **changes: Any,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the forward and what the backward kernel return."""
    chosen = options(query, **changes)
    results = short_attention.forward(query, key, value, None, mask, *chosen.values(), True)
    grads = short_attention.backward(
        grad_output, grad_entropy, query, key, value, None, mask, *results[:3], *chosen.values(), False, False
    )
    return results, grads


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    mask: Tensor | None = None,
    **changes: Any,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The same in float64, by autograd."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    results = reference(*inputs, mask, options(query, **changes))
    loss = inputs[0].sum() * 0
    if grad_output is not None:
        loss = loss + (results[0] * grad_output.double()).sum()
    if grad_entropy is not None:
        loss = loss + (results[1] * grad_entropy.double()).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return tuple(x.detach() for x in results), tuple(
        torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, inputs, strict=True)
    )


def distance(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1.0))


def check(
    got: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], wanted: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
) -> None:
    (output, *statistics), (*grads, nothing) = got
    (wanted_output, *wanted_statistics), wanted_grads = wanted
    allowed = ALLOWED[output.dtype]
    assert distance(output, wanted_output) <= allowed
    for one, other in zip(statistics, wanted_statistics, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-6)
    for one, other in zip(grads, wanted_grads, strict=True):
        assert one.dtype == output.dtype
        assert distance(one, other) <= allowed
    assert nothing.shape == (0,)


def inputs(
    device: str,
    heads: tuple[int, int] = (2, 2),
    tokens: tuple[int, int] = (37, 50),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query, key, value and the gradients of output and entropy."""
    (queries, keys), (dim, value_dim) = tokens, dims
    shapes = [(queries, dim), (keys, dim), (keys, value_dim), (queries, value_dim)]
    found = [torch.randn(*heads, *shape, device=device).to(dtype) for shape in shapes]
    return [*found, torch.randn(*heads, queries, device=device)]


def packed(device: str, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """As in a vision transformer: views of one projection, and a gradient with the heads inside."""
    query, key, value = torch.randn(batch, tokens, 3, heads, dim, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    grad_output = torch.randn(batch, tokens, heads, dim, device=device).to(dtype).transpose(1, 2)
    return [query, key, value, grad_output, torch.randn(batch, heads, tokens, device=device)]


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    ("tokens", "dims"),
    [((1, 1), (16, 16)), ((5, 17), (20, 33)), ((65, 64), (8, 16)), ((130, 33), (64, 48)), ((16, 197), (32, 32))],
    ids=str,
)
def test_equals_float64(tokens: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    drawn = inputs(device, (1, 2), tokens, dims, dtype)
    check(compute(*drawn), expected(*drawn))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [50, 197, 256])
@pytest.mark.parametrize("dim", [64, 128])
def test_equals_float64_at_the_sizes_of_vision_transformers(
    tokens: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    drawn = packed(device, 1, tokens, 1, dim, dtype)
    check(compute(*drawn), expected(*drawn))


@pytest.mark.parametrize(("keys", "dim"), [(256, 64), (128, 128)])
def test_equals_float64_at_the_largest_sizes_in_float32(keys: int, dim: int, device: str) -> None:
    drawn = inputs(device, (1, 1), (256, keys), (dim, dim))
    check(compute(*drawn), expected(*drawn))


def test_more_in_float32_is_left_to_the_long_kernel(device: str) -> None:
    query, key, value = (x.float() for x in inputs(device, (1, 1), (256, 256), (128, 128))[:3])
    assert "do not fit" in str(short_attention.unsupported(query, key, value, None, None))
    assert short_attention.unsupported(*(x.bfloat16() for x in (query, key, value)), None, None) is None


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        dict(is_causal=True),
        dict(is_causal=True, offset=13),
        dict(is_causal=True, offset=2, step=3),
        dict(is_causal=True, window=5),
        dict(window=9),
        dict(window=7, offset=20, step=2),
        dict(scale=1.0),
    ],
    ids=str,
)
def test_what_is_visible_by_position(changes: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    drawn = inputs(device, tokens=(37, 70), dtype=dtype)
    check(compute(*drawn, **changes), expected(*drawn, **changes))


@pytest.mark.parametrize("tokens", [(37, 50), (70, 90)], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1, 0), (1, 2, 1, 0), (2, 2, 0, 0), (1, 1, 0, 0), (2, 1, 0, 1)], ids=str)
def test_masks_of_every_shape(shape: tuple[int, ...], tokens: tuple[int, int], device: str) -> None:
    """0 stands for the full axis."""
    drawn = inputs(device, tokens=tokens, dtype=torch.float16)
    full = (2, 2, *tokens)
    mask = torch.rand([size or whole for size, whole in zip(shape, full, strict=True)], device=device) > 0.4
    check(compute(*drawn, mask), expected(*drawn, mask))
    check(compute(*drawn, mask, is_causal=True), expected(*drawn, mask, is_causal=True))


def test_sizes_are_given_only_when_asked_for_and_nan_is_not_hidden(device: str) -> None:
    query, key, value, *_ = inputs(device, (2, 1), (33, 40))
    chosen = options(query, is_causal=True).values()
    *asked, largest = short_attention.forward(query, key, value, None, None, *chosen, True)
    *others, nothing = short_attention.forward(query, key, value, None, None, *chosen)
    assert nothing.shape == (0,)
    assert largest.shape == query.shape[:3]
    assert all(torch.equal(a, b) for a, b in zip(asked, others, strict=True))
    key[0, 0, 0] = math.nan
    *_, largest = short_attention.forward(query, key, value, None, None, *chosen, True)
    assert largest[0, 0].isnan().all()
    assert largest[1:].isfinite().all()


def test_rows_that_see_no_key_are_zero(device: str) -> None:
    drawn = inputs(device, (2, 1), (33, 40))
    mask = torch.rand(2, 1, 33, 40, device=device) > 0.5
    mask[0] = False
    mask[1, :, 7] = False
    (output, entropy, lse, largest), grads = compute(*drawn, mask)
    dead = ~mask.any(-1).squeeze(1)
    assert dead.sum() == 34
    for result in (output, entropy, lse, largest, grads[0]):
        assert (result[:, 0][dead] == 0).all()
    check(((output, entropy, lse, largest), grads), expected(*drawn, mask))


@pytest.mark.parametrize("absent", [0, 1], ids=["no gradient of the output", "no gradient of the entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_upstream_gradient_alone(absent: int, dtype: torch.dtype, device: str) -> None:
    drawn: list[Any] = inputs(device, dtype=dtype)
    drawn[3 + absent] = None
    check(compute(*drawn), expected(*drawn))


def test_without_upstream_gradients_all_is_zero(device: str) -> None:
    query, key, value, *_ = inputs(device)
    _, grads = compute(query, key, value, None, None)
    for grad, tensor in zip(grads, (query, key, value), strict=False):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize(
    ("heads", "tokens"), [((2, 2), (0, 5)), ((2, 2), (5, 0)), ((0, 2), (5, 5)), ((2, 0), (5, 5))], ids=str
)
def test_empty_inputs(heads: tuple[int, int], tokens: tuple[int, int], device: str) -> None:
    drawn = inputs(device, heads, tokens)
    check(compute(*drawn), expected(*drawn))


def test_any_strides(device: str) -> None:
    drawn = inputs(device, (2, 3), (20, 24))
    batch_last = [x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in drawn[:4]]
    reversed_axes = [x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for x in drawn[:4]]
    entropy = drawn[4].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wanted = expected(*drawn)
    check(compute(*batch_last, entropy), wanted)
    check(compute(*reversed_axes, entropy), wanted)


def test_expanded_upstream_gradients(device: str) -> None:
    drawn = inputs(device)
    drawn[3] = torch.full((), 0.7, device=device).expand_as(drawn[3])
    drawn[4] = torch.full((), -1.9, device=device).expand_as(drawn[4])
    check(compute(*drawn), expected(*drawn))


def test_offsets_beyond_32_bits(device: str) -> None:
    reach = 2**31 + 64
    near = torch.randn(2, 2, 17, 16, device=device).half()
    far = torch.empty(reach + 64, dtype=torch.float16, device=device).as_strided(near.shape, (32, 16, reach // 16, 1))
    far.copy_(near)
    grad_entropy = torch.randn(2, 2, 17, device=device)
    got, wanted = compute(far, far, far, far, grad_entropy), compute(near, near, near, near, grad_entropy)
    for one, other in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(one, other)


def test_results_have_the_heads_inside(device: str) -> None:
    query, key, value, grad_output, grad_entropy = packed(device, 2, 20, 3, 16, torch.float16)
    (output, *statistics), grads = compute(query, key, value, grad_output, grad_entropy)
    for tensor in (output, *grads[:3]):
        assert tensor.transpose(1, 2).is_contiguous()
    for tensor in statistics:
        assert tensor.is_contiguous()


def test_runs_are_bit_equal(device: str) -> None:
    drawn = packed(device, 2, 90, 2, 32, torch.bfloat16)
    first, second = compute(*drawn), compute(*drawn)
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


def test_gradients_as_near_to_float64_as_those_of_torch(device: str) -> None:
    query, key, value, grad_output, _ = packed(device, 2, 197 if device == "cuda" else 70, 2, 64, torch.float16)
    _, grads = compute(query, key, value, grad_output, None, scale=0.125)
    _, wanted = expected(query, key, value, grad_output, None, scale=0.125)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch_grads = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, scale=0.125), leaves, grad_output)
    for ours, theirs, right in zip(grads, torch_grads, wanted, strict=False):
        assert distance(ours, right) <= 1.5 * distance(theirs, right)


def test_entropy_is_within_1e_5_where_scores_are_large(device: str) -> None:
    query, key, value, *upstream = inputs(device, (1, 1), (40, 60))
    query, key = query * 20, key * 2
    got, wanted = compute(query, key, value, *upstream), expected(query, key, value, *upstream)
    assert wanted[0][3].max() > 100
    assert (got[0][1].double() - wanted[0][1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(value=None), "need a value"),
        (dict(bias=torch.zeros(1, 1, 4, 5)), "no additive mask"),
        (dict(query=torch.zeros(1, 2, 4, 8, dtype=torch.float64)), "torch.float64 is neither"),
        (dict(key=torch.zeros(1, 2, 5, 8, dtype=torch.float16)), "different dtypes"),
        (dict(query=torch.zeros(1, 4, 4, 8)), "heads share keys"),
        (dict(key=torch.zeros(1, 2, 257, 8)), "more than 256 keys"),
        (dict(query=torch.zeros(1, 2, 257, 8)), "more than 256 queries"),
        (dict(query=torch.zeros(1, 2, 4, 129)), "head dim is above 128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_for_what_is_not_supported(changes: dict[str, Any], reason: str) -> None:
    arguments = dict(
        query=torch.zeros(1, 2, 4, 8), key=torch.zeros(1, 2, 5, 8), value=torch.zeros(1, 2, 5, 8), bias=None, mask=None
    )
    assert short_attention.unsupported(**arguments) is None
    arguments |= changes
    assert reason in str(short_attention.unsupported(**arguments))
    with pytest.raises(Unsupported, match=reason):
        short_attention.forward(*arguments.values(), 1.0, False, None, 0, 1)


def test_scales_that_are_not_positive_and_gradients_of_a_bias_are_not_supported() -> None:
    query, key, value, grad_output, grad_entropy = inputs("cpu")
    with pytest.raises(Unsupported, match="scale is not positive"):
        short_attention.forward(query, key, value, None, None, -1.0, False, None, 0, 1)
    rows = torch.zeros(query.shape[:3])
    with pytest.raises(Unsupported, match="gradient of a bias"):
        short_attention.backward(
            *(grad_output, grad_entropy, query, key, value, None, None, grad_output, rows, rows),
            *(1.0, False, None, 0, 1, False, True),
        )
