"""Change from token to token against float64 numpy, hand-worked numbers and a straight-through composition."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_reg.functional import temporal_delta
from lightning_reg.functional.temporal_delta import delta_tap
from tests.functional.sequences import BOOLEAN, DOCUMENTS, INTEGERS, SHAPE, pairs, valid_rows


def reference(x: Tensor, documents: Tensor | None, theta: float | None, relative: bool) -> float:
    unit = np.sqrt(np.mean(valid_rows(x, documents) ** 2)) if relative else 1.0

    def step(values: np.ndarray) -> np.ndarray:
        return values / unit if theta is None else np.rint(values / unit / theta) * theta

    found = [np.abs(step(earlier) - step(later)) for earlier, later in pairs(x, documents)]
    return float(np.mean(found)) if found else 0.0


def composed(x: Tensor, theta: float | None, relative: bool, documents: Tensor | None) -> Tensor:
    """The public layer's loss: rounding that passes the gradient on, then the mean change."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if documents is None else documents.bool()
    y = x / x.detach()[valid].square().mean().sqrt() if relative else x
    q = y if theta is None else y + ((y / theta).round() * theta - y).detach()
    change = (q[:, :-1] - q[:, 1:]).abs()
    if documents is not None:
        change = change[(documents[:, 1:] == documents[:, :-1]) & valid[:, 1:]]
    return change.mean()


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("theta", [None, 0.3])
@pytest.mark.parametrize("documents", [name for name in DOCUMENTS if name != "nothing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_equals_numpy_in_float64(dtype: torch.dtype, documents: str, theta: float | None, relative: bool) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    got = temporal_delta(x, documents=DOCUMENTS[documents], theta=theta, relative=relative)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert got.item() == pytest.approx(reference(x, DOCUMENTS[documents], theta, relative), rel=tolerance)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("theta", [None, 0.8])
@pytest.mark.parametrize("documents", [name for name in DOCUMENTS if name != "nothing"])
def test_gradient_goes_straight_through_the_rounding(documents: str, theta: float | None, relative: bool) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    wanted = composed(x, theta, relative, DOCUMENTS[documents])
    got = temporal_delta(x, documents=DOCUMENTS[documents], theta=theta, relative=relative)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    (wanted_grad,) = torch.autograd.grad(0.7 * wanted, x)
    (got_grad,) = torch.autograd.grad(0.7 * got, x)
    torch.testing.assert_close(got_grad, wanted_grad, rtol=0, atol=1e-14)


def test_gradcheck() -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    for documents in (None, INTEGERS, BOOLEAN):
        assert torch.autograd.gradcheck(partial(temporal_delta, documents=documents), x)


def test_tap_adds_its_gradient_to_what_comes_through() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    (alone,) = torch.autograd.grad(temporal_delta(x, theta=0.5), x)
    passed, delta = delta_tap(x, theta=0.5)
    assert torch.equal(passed, x)
    (both,) = torch.autograd.grad((passed * 2).sum() + 3 * delta, x)
    torch.testing.assert_close(both, 2 + 3 * alone)


def test_hand_worked_numbers() -> None:
    x = torch.tensor([[1.1, 0.2], [2.9, 0.3], [2.6, -0.2]], requires_grad=True)
    delta = temporal_delta(x, theta=1.0)
    # 1, 3, 3 and 0, 0, 0: one change of 2 among four pairs
    assert delta.item() == 0.5
    (4 * delta).backward()
    assert x.grad.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_an_inner_token_is_pulled_by_both_neighbours() -> None:
    x = torch.tensor([[0.0], [5.0], [1.0]], requires_grad=True)
    (2 * temporal_delta(x)).backward()
    assert x.grad.tolist() == [[-1.0], [2.0], [-1.0]]


def test_a_constant_sequence_changes_nothing_and_has_no_gradient() -> None:
    x = torch.randn(3, 1, 5).expand(3, 11, 5).clone().requires_grad_()
    for relative in (False, True):
        delta = temporal_delta(x, relative=relative)
        delta.backward()
        assert delta.item() == 0
        assert x.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6e4])
@pytest.mark.parametrize("arguments", [{}, {"theta": 0.25}, {"theta": 0.25, "relative": True}], ids=str)
def test_half_precision_is_finite_and_right(arguments: dict, scale: float, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 32, 64) * scale).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    delta = temporal_delta(x, **arguments)
    (delta * 2.0**10).backward()
    exact = x.detach().double().requires_grad_()
    wanted = temporal_delta(exact, **arguments)
    (wanted * 2.0**10).backward()
    assert delta.item() == pytest.approx(wanted.item(), rel=1e-2)
    assert torch.isfinite(x.grad).all()
    largest = exact.grad.abs().max().item()
    # an activation at the border of a step may round to either side in float32
    assert (x.grad.double() - exact.grad).abs().gt(1e-2 * largest + 1e-7).float().mean() < 1e-3


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("arguments", [{}, {"theta": 0.1, "relative": True}], ids=str)
def test_zeros_and_nothing_valid(arguments: dict, documents: str) -> None:
    x = (torch.randn(SHAPE) if documents == "nothing" else torch.zeros(SHAPE)).requires_grad_()
    delta = temporal_delta(x, documents=DOCUMENTS[documents], **arguments)
    delta.backward()
    assert delta.item() == 0
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("documents", [INTEGERS, BOOLEAN], ids=["integers", "boolean"])
def test_padding_is_left_out_whatever_it_holds(documents: Tensor, relative: bool) -> None:
    x = torch.randn(SHAPE)
    wanted = temporal_delta(x, documents=documents, theta=0.2, relative=relative)
    x[documents == 0] = float("nan")
    x.requires_grad_()
    got = temporal_delta(x, documents=documents, theta=0.2, relative=relative)
    got.backward()
    assert torch.equal(got, wanted)
    assert x.grad[documents == 0].eq(0).all()
    assert torch.isfinite(x.grad).all()


def test_all_valid_is_no_documents() -> None:
    x = torch.randn(SHAPE)
    for documents in (torch.ones(3, 11, dtype=torch.bool), torch.full((3, 11), 7)):
        torch.testing.assert_close(
            temporal_delta(x, documents=documents, relative=True), temporal_delta(x, relative=True)
        )


def test_leading_axes_and_none_at_all() -> None:
    x, documents = torch.randn(2, 3, 7, 4), torch.randint(0, 3, (2, 3, 7))
    wanted = temporal_delta(x.flatten(0, 1), documents=documents.flatten(0, 1))
    torch.testing.assert_close(temporal_delta(x, documents=documents), wanted)
    torch.testing.assert_close(temporal_delta(x[0, 0]), temporal_delta(x[0, :1]))
    assert temporal_delta(x[..., :1, :]).item() == 0


@pytest.mark.parametrize("theta", [None, 0.1])
def test_relative_does_not_see_the_scale(theta: float | None) -> None:
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    wanted = temporal_delta(x, theta=theta, relative=True).item()
    assert temporal_delta(1e-3 * x, theta=theta, relative=True).item() == pytest.approx(wanted, rel=1e-12)
    assert temporal_delta(1e-3 * x, theta=theta).item() < 1e-2 * wanted


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 3), st.integers(0, 10**6))
def test_range_permutation_and_packing(first: int, second: int, theta: float, seed: int) -> None:
    x = torch.randn(1, first + second, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    documents = torch.tensor([[3] * first + [2] * second])
    packed = temporal_delta(x, documents=documents, theta=theta).item()
    assert abs(packed - temporal_delta(x, documents=documents).item()) <= theta + 1e-12
    for axis, other in ((-1, documents), (1, documents.flip(1))):  # neither neurons nor time have a direction
        assert temporal_delta(x.flip(axis), documents=other, theta=theta).item() == pytest.approx(packed, rel=1e-12)
    parts = [(x[:, :first], first - 1), (x[:, first:], second - 1)]
    apart = sum(temporal_delta(part, theta=theta).item() * count for part, count in parts)
    assert packed * (first + second - 2) == pytest.approx(apart, rel=1e-10)


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4), (2, 3, 0), (2, 1, 4)], ids=str)
def test_without_neighbours_it_is_zero(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    for documents in (None, torch.ones(shape[:2], dtype=torch.bool), torch.ones(shape[:2], dtype=torch.long)):
        value = temporal_delta(x, documents=documents)
        value.backward()
        assert value.item() == 0
        assert x.grad.eq(0).all()


def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    compiled = torch.compile(temporal_delta, backend="aot_eager", fullgraph=True, dynamic=True)
    for documents in (None, INTEGERS, BOOLEAN):
        x = torch.randn(SHAPE, requires_grad=True)
        arguments = {"documents": documents, "theta": 0.1, "relative": True}
        (wanted,) = torch.autograd.grad(temporal_delta(x, **arguments), x)
        (got,) = torch.autograd.grad(compiled(x, **arguments), x)
        torch.testing.assert_close(got, wanted)


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3, 4)
    for theta in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"`theta` must be finite and > 0, or None for no rounding, got {theta}"):
            temporal_delta(x, theta=theta)
    with pytest.raises(ValueError, match=r"`x` must have an axis of tokens before the last.*got \(4,\)"):
        temporal_delta(torch.ones(4))
    with pytest.raises(ValueError, match=r"`x` must be floating point"):
        temporal_delta(torch.ones(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`documents` must have the shape of `x` without .* \(2, 3\), got"):
        temporal_delta(x, documents=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`documents` must be boolean .* or integers .*got torch.float32"):
        temporal_delta(x, documents=torch.ones(2, 3))
