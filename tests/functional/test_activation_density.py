"""Activation density against float64 numpy and hand-worked numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import default_partition

from lightning_reg.functional import activation_density, chunk_density, exact_chunk_density, exact_density
from lightning_reg.functional.activation_density import count_active, count_chunks, density_tap

D = {"dtype": torch.float64}


def reference(x: Tensor, epsilon: float = 1e-7, mask: Tensor | None = None) -> float:
    """DEFT's public formula in float64, over valid tokens."""
    values = x.detach().double().numpy()
    values = values if mask is None else values[mask.numpy().astype(bool)]
    return float(np.mean(values**2 / (values**2 + epsilon))) if values.size else 0.0


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (3, 5), (2, 3, 4), (2, 2, 3, 5)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("epsilon", [1e-7, 1e-2, 20.0])
def test_density_equals_the_public_formula_in_float64(shape: tuple[int, ...], epsilon: float) -> None:
    x = torch.randn(*shape) * 0.1
    density = activation_density(x, epsilon=epsilon)
    assert density.dtype == torch.float32
    assert density.item() == pytest.approx(reference(x, epsilon), rel=1e-5, abs=1e-6)
    exact = activation_density(x.double(), epsilon=epsilon)
    assert exact.dtype == torch.float64
    assert exact.item() == pytest.approx(reference(x, epsilon), rel=1e-12, abs=1e-12)


def test_hand_worked_numbers() -> None:
    assert activation_density(torch.tensor([1.0, 2.0, 0.0, -3.0]), epsilon=1.0).item() == pytest.approx(2.2 / 4)
    assert activation_density(torch.tensor([[0.0, 5.0]])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_all_zero_input_has_density_zero_and_no_gradient(relative: bool) -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    density = activation_density(x, relative=relative)
    density.backward()
    assert density.item() == 0
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("width", [0, 4])
def test_no_valid_position_has_density_zero(relative: bool, width: int) -> None:
    x = torch.randn(3, width, requires_grad=True)
    density = activation_density(x, relative=relative, mask=torch.zeros(3, dtype=torch.bool))
    density.backward()
    assert density.item() == 0
    assert x.grad.eq(0).all()
    assert activation_density(torch.randn(0, 4), relative=relative).item() == 0
    assert exact_density(torch.randn(0, 4)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_mask_leaves_the_valid_tokens(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).to(dtype)
    actual = activation_density(x, epsilon=0.3, mask=mask)
    assert actual.item() == pytest.approx(reference(x, 0.3, mask), rel=1e-6)
    torch.testing.assert_close(actual, activation_density(x[mask.bool()], epsilon=0.3))


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_invalid_positions_may_hold_nan(relative: bool) -> None:
    x = torch.randn(2, 3)
    poisoned = torch.cat([x, torch.full((1, 3), math.nan)]).requires_grad_()
    density = activation_density(poisoned, epsilon=0.3, relative=relative, mask=torch.tensor([True, True, False]))
    density.backward()
    torch.testing.assert_close(density.detach(), activation_density(x, epsilon=0.3, relative=relative))
    assert poisoned.grad.isfinite().all()
    assert poisoned.grad[2].eq(0).all()


def test_nan_in_valid_places_stays_visible() -> None:
    assert activation_density(torch.tensor([1.0, math.nan])).isnan()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_relative_epsilon_follows_the_scale(scale: float) -> None:
    x = torch.randn(4, 5, **D)
    expected = reference(x, 0.1 * float((x**2).mean()))
    assert activation_density(x * scale, epsilon=0.1, relative=True).item() == pytest.approx(expected, rel=1e-9)
    small = activation_density((x * scale).float(), epsilon=0.1, relative=True)
    assert small.item() == pytest.approx(expected, rel=1e-5)


def test_relative_epsilon_takes_the_scale_of_valid_tokens() -> None:
    x, mask = torch.randn(4, 5, **D), torch.tensor([True, False, True, True])
    x[1] = 1e6
    actual = activation_density(x, epsilon=0.1, relative=True, mask=mask)
    torch.testing.assert_close(actual, activation_density(x[mask], epsilon=0.1, relative=True))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_gradient_is_the_closed_form(masked: bool, relative: bool) -> None:
    x = torch.randn(4, 5, **D).requires_grad_()
    mask = torch.tensor([True, False, True, True]) if masked else None
    values = x.detach().numpy()
    valid = np.ones((4, 1)) if mask is None else mask.numpy()[:, None].astype(float)
    epsilon = 0.2 * ((values**2 * valid).sum() / (valid.sum() * 5) if relative else 1)
    expected = -3 * valid * 2 * values * epsilon / (values**2 + epsilon) ** 2 / (valid.sum() * 5)
    (gradient,) = torch.autograd.grad(
        activation_density(x, epsilon=0.2, mask=mask, relative=relative), x, torch.tensor(-3.0, **D)
    )
    torch.testing.assert_close(gradient, torch.as_tensor(expected))


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])], ids=["all", "masked"])
def test_gradients_and_gradients_of_gradients(mask: Tensor | None) -> None:
    x = torch.randn(3, 4, **D).requires_grad_()
    function = lambda x: density_tap(x, epsilon=0.3, mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_pull_peaks_where_the_card_says() -> None:
    epsilon = 1e-7
    x = torch.linspace(1e-6, 2e-3, 20001, **D).requires_grad_()
    (gradient,) = torch.autograd.grad(activation_density(x, epsilon=epsilon) * x.numel(), x)
    peak = gradient.argmax()
    assert x[peak].item() == pytest.approx(math.sqrt(epsilon / 3), rel=1e-3)
    assert gradient[peak].item() == pytest.approx(0.65 / math.sqrt(epsilon), rel=1e-2)


def test_tap_passes_the_value_through_and_joins_gradients() -> None:
    x = torch.randn(3, 4, **D).requires_grad_()
    passed, density = density_tap(x, epsilon=0.3)
    assert torch.equal(passed, x)
    (joined,) = torch.autograd.grad(passed.square().sum() + 2 * density, x)
    (term,) = torch.autograd.grad(2 * activation_density(x, epsilon=0.3), x)
    torch.testing.assert_close(joined, 2 * x + term)
    (alone,) = torch.autograd.grad(density_tap(x)[0].sum(), x)
    assert torch.equal(alone, torch.ones_like(x))


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-2), (torch.bfloat16, 1e-4)], ids=str
)
def test_half_precision_gradient_is_finite_and_not_zero(dtype: torch.dtype, value: float) -> None:
    x = torch.full((2, 2), value, dtype=dtype, requires_grad=True)
    density = activation_density(x)
    density.backward()
    exact = x.detach().double().requires_grad_()
    activation_density(exact).backward()
    assert density.dtype == torch.float32
    assert density.item() == pytest.approx(reference(x), rel=1e-4)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-2, atol=0.0)
    assert x.grad.ne(0).all()


def test_half_precision_joins_an_upstream_gradient() -> None:
    x = torch.tensor([[1e-2, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    passed, density = density_tap(x, epsilon=1e-2)
    (passed.sum() + density).backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad[0, 0] > 1


@pytest.mark.parametrize("epsilon", [1e-40, 1e-20, 1e-7])
def test_tiny_epsilon_gives_no_nan(epsilon: float) -> None:
    x = torch.tensor([0.0, 1e-15, 1e-4, 1.0, 1e15], requires_grad=True)
    density = activation_density(x, epsilon=epsilon)
    (density * 65536).backward()  # a usual loss scale
    assert 0 <= density <= 1
    assert x.grad.isfinite().all()
    assert x.grad[0] == 0


def test_layout_does_not_matter() -> None:
    x = torch.randn(4, 3, 5).permute(2, 0, 1).requires_grad_()
    density = activation_density(x, epsilon=0.1)
    torch.testing.assert_close(density, activation_density(x.contiguous(), epsilon=0.1))
    assert torch.autograd.grad(density, x)[0].shape == x.shape


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_compiled_without_graph_break_equals_eager(relative: bool) -> None:
    x = torch.randn(4, 5, requires_grad=True)
    mask = torch.tensor([True, False, True, True])

    def function(x: Tensor) -> Tensor:
        passed, density = density_tap(x, epsilon=0.1, mask=mask, relative=relative)
        return passed.square().sum() + density

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(x), x)[0] for f in (compiled, function))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("epsilon", [1e-30, 1e-7, 0.1, 20.0])
def test_compiled_gradient_equals_the_formula_in_float64(relative: bool, epsilon: float) -> None:
    x = torch.tensor([[0.0, 1e-15, -2e-15, 3e-4], [-0.2, 1.0, 5.0, -300.0]], requires_grad=True)
    exact = x.detach().double()
    scale = epsilon * exact.square().mean() if relative else torch.tensor(epsilon, **D)
    expected = 3 * 2 * exact * scale / (exact.square() + scale).square() / exact.numel()
    torch.compiler.reset()
    compiled = torch.compile(activation_density, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(x, epsilon=epsilon, relative=relative), x, torch.tensor(3.0))
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=float(expected.abs().max()) * 1e-9)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_compiled_backward_shares_nothing_in_float32_with_the_forward(relative: bool) -> None:
    """What both compute alike torch may keep in between; x in float32 alone is left, which it computes again."""
    kept: list[tuple[torch.dtype, torch.Size]] = []

    def partition(joint: Any, inputs: Any, **options: Any) -> Any:
        joint.graph = fx_graph_cse(joint.graph)
        forward, backward = default_partition(joint, inputs, **options)
        results = next(iter(forward.graph.find_nodes(op="output"))).args[0]
        tensors = [node.meta["val"] for node in results if isinstance(node.meta.get("val"), Tensor)]
        kept.extend((tensor.dtype, tensor.shape) for tensor in tensors)
        return forward, backward

    x = torch.randn(6, 40, dtype=torch.bfloat16, requires_grad=True)

    def run(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition)
    torch.compiler.reset()
    torch.compile(activation_density, fullgraph=True, backend=backend)(x, epsilon=0.1, relative=relative).backward()
    assert x.grad is not None
    assert kept.count((torch.float32, x.shape)) <= 1
    assert (torch.bfloat16, x.shape) in kept or (torch.float32, x.shape) in kept


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 128, 256, 384, 3072])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_sums_of_any_width_equal_the_public_formula(width: int, masked: bool) -> None:
    torch.compiler.reset()
    x = torch.randn(3, 5, width)
    mask = torch.rand(3, 5) < 0.6 if masked else None
    compiled = torch.compile(activation_density, fullgraph=True, backend="aot_eager")
    assert float(compiled(x, epsilon=0.3, mask=mask)) == pytest.approx(reference(x, 0.3, mask), rel=1e-6)


def test_exact_density_counts_what_exceeds_the_threshold() -> None:
    x = torch.tensor([[0.0, -0.01, 0.02, 3.0], [0.0, 0.0, -0.0, 1.0]])
    assert exact_density(x).item() == pytest.approx(4 / 8)
    assert exact_density(x, threshold=0.01).item() == pytest.approx(3 / 8)  # not at the threshold
    assert exact_density(x, mask=torch.tensor([True, False])).item() == pytest.approx(3 / 4)
    assert exact_density(x, threshold=5.0).item() == 0


def test_exact_density_equals_count_nonzero() -> None:
    x = torch.randn(3, 4, 5).relu()
    x[0, 0, 0] = math.nan
    active, valid = count_active(x)
    assert (active.item(), valid.item()) == (torch.count_nonzero(x).item(), 60)
    assert (active.dtype, valid.dtype) == (torch.int64, torch.int64)


def test_exact_density_has_no_gradient() -> None:
    assert not exact_density(torch.randn(3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize("relative", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 7)], ids=lambda shape: "x".join(map(str, shape)))
def test_relative_density_equals_a_loop_over_tokens(shape: tuple[int, ...], relative: float) -> None:
    x = torch.randn(shape, **D) ** 5
    rows = np.abs(x.numpy().reshape(-1, shape[-1]))
    expected = np.mean([[value > relative * max(row) for value in row] for row in rows])
    assert exact_density(x, relative=relative).item() == pytest.approx(expected)


def test_relative_density_is_per_token_and_leaves_zeros_out() -> None:
    x = torch.tensor([[0.0, 10.0, 1.0, 2.0], [0.0, 0.02, 0.05, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert exact_density(x, relative=0.1).item() == pytest.approx((2 + 3) / 12)  # not at a tenth
    assert exact_density(x * torch.tensor([[1e-3], [1e6], [1.0]]), relative=0.1).item() == pytest.approx(5 / 12)
    assert exact_density(x, relative=0.1, mask=torch.tensor([True, False, False])).item() == pytest.approx(2 / 4)
    assert exact_density(torch.zeros(3, 0), relative=0.1) == 0


def test_relative_density_in_half_precision_does_not_round_the_limit() -> None:
    x = torch.tensor([[1.0, 0.10009765625]], dtype=torch.bfloat16)  # a tenth of 1 rounds to just this in bfloat16
    assert exact_density(x, relative=0.1) == 1


def test_relative_density_of_a_token_with_nan_is_one() -> None:
    assert exact_density(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), relative=0.1).item() == pytest.approx(3 / 4)


# --- chunks ----------------------------------------------------------------------------------------------------------


def chunk_reference(x: Tensor, chunk: int, threshold: float, documents: Tensor | None) -> tuple[int, int]:
    """Unions of sets over chunks, document by document."""
    documents = torch.ones(x.shape[:-1]).bool() if documents is None else documents
    active = total = 0
    for row, marks in zip(x.reshape(-1, *x.shape[-2:]).tolist(), documents.reshape(-1, x.shape[-2]).tolist()):
        runs: list[list] = []
        for t, mark in enumerate(marks):
            if not mark:
                continue
            same = bool(runs) if documents.dtype == torch.bool else t > 0 and marks[t - 1] == mark
            runs = runs if same else [*runs, []]
            runs[-1].append(row[t])
        for run in runs:
            for start in range(0, len(run), chunk):
                part = run[start : start + chunk]
                active += sum(any(abs(token[j]) > threshold for token in part) for j in range(x.shape[-1]))
                total += x.shape[-1]
    return active, total


@pytest.mark.parametrize("kind", ["none", "valid", "ids"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 300])
@pytest.mark.parametrize("shape", [(5, 7), (3, 11, 5), (2, 2, 1, 3), (2, 9, 1)], ids=lambda s: "x".join(map(str, s)))
def test_chunks_equal_a_loop(shape: tuple[int, ...], chunk: int, kind: str) -> None:
    x = (torch.randn(shape) - 0.5).relu()
    documents = {"none": None, "valid": torch.rand(shape[:-1]) > 0.3, "ids": torch.randint(0, 3, shape[:-1])}[kind]
    for threshold in (0.0, 0.4):
        counts = count_chunks(x, chunk=chunk, threshold=threshold, documents=documents)
        assert tuple(count.item() for count in counts) == chunk_reference(x, chunk, threshold, documents)
        assert all(count.dtype == torch.int64 for count in counts)


def test_hand_worked_chunks() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.1, 0.0]])
    assert exact_chunk_density(x, chunk=2).item() == pytest.approx((2 + 0 + 1) / 6)  # the ragged last counts as one
    assert exact_chunk_density(x, chunk=2, threshold=0.1).item() == pytest.approx(2 / 6)
    assert exact_chunk_density(x, chunk=5) == 1
    # [0], [1, 2], [3]: no chunk reaches into another document
    assert exact_chunk_density(x, chunk=2, documents=torch.tensor([4, 2, 2, 9, 0])).item() == pytest.approx(2 / 6)
    # left padding: chunks begin with the first valid token
    assert exact_chunk_density(x, chunk=2, documents=torch.tensor([False, True, True, True, True])).item() == 0.5


def test_chunks_of_one_token_give_the_density() -> None:
    x, valid = torch.randn(3, 7, 5).relu(), torch.rand(3, 7) > 0.4
    assert exact_chunk_density(x, chunk=1, documents=valid) == exact_density(x, mask=valid)


def test_independent_tokens_fill_chunks_as_powers() -> None:
    x = (torch.rand(8, 400, 64) < 0.1).float()
    assert exact_chunk_density(x, chunk=8).item() == pytest.approx(1 - 0.9**8, abs=0.01)


@pytest.mark.parametrize("kind", ["none", "valid", "ids"])
def test_chunks_are_those_of_the_loss(kind: str) -> None:
    x = (torch.randn(3, 11, 6) - 1).relu() * 1e3
    documents = {"none": None, "valid": torch.rand(3, 11) > 0.3, "ids": torch.randint(0, 3, (3, 11))}[kind]
    soft = chunk_density(x, chunk=4, documents=documents, epsilon=1e-7)
    assert exact_chunk_density(x, chunk=4, documents=documents).item() == pytest.approx(soft.item(), abs=1e-4)


def test_no_chunk_has_density_zero() -> None:
    for x in (torch.ones(3, 0, 4), torch.ones(3, 5, 0), torch.ones(0, 5, 4)):
        assert exact_chunk_density(x) == 0
    assert exact_chunk_density(torch.ones(2, 4), documents=torch.zeros(2).bool()) == 0


def test_padded_chunks_may_hold_nan() -> None:
    x = torch.tensor([[0.0, 1.0], [math.nan, math.nan], [0.0, math.nan]])
    assert exact_chunk_density(x, documents=torch.tensor([True, False, False])) == 0.5
    assert exact_chunk_density(x) == 1


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activation_density(X, epsilon=0.0), r"`epsilon` must be finite and > 0, got 0.0. DEFT"),
        (lambda: activation_density(X, epsilon=-1.0), "`epsilon` must be finite and > 0, got -1.0"),
        (lambda: activation_density(X, epsilon=math.nan), "`epsilon` must be finite and > 0, got nan"),
        (lambda: activation_density(X, epsilon=math.inf), "`epsilon` must be finite and > 0, got inf"),
        (lambda: activation_density(X.long()), r"`x` must be floating point .* got \(2, 3, 4\) torch.int64"),
        (lambda: activation_density(torch.tensor(1.0)), r"`x` must be floating point of shape \(..., width\)"),
        (lambda: activation_density(X, mask=X.bool()), r"`mask` .* without its last axis, \(2, 3\), got \(2, 3, 4\)"),
        (lambda: activation_density(X, mask=X[..., 0]), r"`mask` must be boolean or 0/1 integers .* torch.float32"),
        (lambda: exact_density(X, mask=torch.ones(2).bool()), r"`mask` .* \(2, 3\), got \(2,\)"),
        (lambda: exact_density(X, threshold=-0.1), "`threshold` must be >= 0, got -0.1"),
        (lambda: exact_density(X, threshold=math.nan), "`threshold` must be >= 0, got nan"),
        (lambda: exact_density(X, relative=0.0), r"`relative` must be in \(0, 1\), got 0.0. D2DMoE reports"),
        (lambda: exact_density(X, relative=1.0), r"`relative` must be in \(0, 1\), got 1.0"),
        (
            lambda: exact_density(X, relative=0.1, threshold=0.2),
            "`threshold=0.2` and `relative=0.1` exclude each other",
        ),
        (lambda: exact_chunk_density(X, chunk=0), "`chunk` must be .*, got 0"),
        (lambda: exact_chunk_density(X, threshold=-1.0), "`threshold` must be >= 0, got -1.0"),
        (lambda: exact_chunk_density(X[0, 0]), r"`x` must have an axis of tokens before the last, .*, got \(4,\)"),
        (lambda: exact_chunk_density(X, documents=torch.ones(3).long()), r"`documents` .* \(2, 3\), got \(3,\)"),
        (lambda: exact_chunk_density(X, documents=X[..., 0]), r"`documents` must be boolean .* got torch.float32"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- properties ------------------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@QUICK
@given(VALUES, st.floats(1e-12, 1e3))
def test_density_is_between_zero_and_the_exact_share(values: list[float], epsilon: float) -> None:
    x = torch.tensor(values)
    assert 0 <= activation_density(x, epsilon=epsilon) <= exact_density(x) + 1e-6


@QUICK
@given(VALUES, st.floats(1e-6, 1e3))
def test_density_falls_with_epsilon(values: list[float], epsilon: float) -> None:
    x = torch.tensor(values)
    assert activation_density(x, epsilon=2 * epsilon) <= activation_density(x, epsilon=epsilon) + 1e-6


@QUICK
@given(VALUES)
def test_gradient_points_away_from_zero(values: list[float]) -> None:
    x = torch.tensor(values, requires_grad=True)
    activation_density(x, epsilon=0.1).backward()
    assert (x.grad * x >= 0).all()
