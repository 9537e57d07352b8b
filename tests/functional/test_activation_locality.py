"""Activation locality against float64 numpy, hand-worked numbers and the public definition by autograd."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_reg.functional import activation_locality
from lightning_reg.functional.activation_locality import locality_tap
from tests.functional.sequences import BOOLEAN, DOCUMENTS, INTEGERS, SHAPE, pairs


def reference(x: Tensor, documents: Tensor | None = None, alpha: float = 100.0) -> float:
    found = []
    for earlier, later in pairs(x, documents):
        z, target = alpha * earlier, 0.5 * (1 + np.tanh(alpha * later / 2))
        found.append(np.logaddexp(0, z) - target * z)
    return float(np.mean(found)) if found else 0.0


def published(x: Tensor, documents: Tensor | None, alpha: float) -> Tensor:
    """As the public code gathers its pairs: the index of the token before, -1 where there is none."""
    flat = x.flatten(0, 1)
    before = []
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            same = token > 0 and (
                documents is None or bool(documents[row, token] == documents[row, token - 1] and documents[row, token])
            )
            before.append(row * x.shape[1] + token - 1 if same else -1)
    index = torch.tensor(before)
    valid = index != -1
    left, right = flat[index][valid], flat[valid]
    return F.binary_cross_entropy_with_logits(left * alpha, torch.sigmoid(right * alpha))


@pytest.mark.parametrize("alpha", [100.0, 1.5])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_equals_numpy_in_float64(dtype: torch.dtype, documents: str, alpha: float) -> None:
    x = (torch.randn(SHAPE, dtype=torch.float64) * 0.1).to(dtype)
    got = activation_locality(x, documents=DOCUMENTS[documents], alpha=alpha)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert got.item() == pytest.approx(reference(x, DOCUMENTS[documents], alpha), rel=tolerance)


@pytest.mark.parametrize("documents", [name for name in DOCUMENTS if name != "nothing"])
def test_value_and_both_gradients_are_those_of_the_public_code(documents: str) -> None:
    x = (torch.randn(SHAPE, dtype=torch.float64) * 0.1).requires_grad_()
    wanted = published(x, DOCUMENTS[documents], 20.0)
    got = activation_locality(x, documents=DOCUMENTS[documents], alpha=20.0)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    (wanted_grad,) = torch.autograd.grad(0.7 * wanted, x)
    (got_grad,) = torch.autograd.grad(0.7 * got, x)
    torch.testing.assert_close(got_grad, wanted_grad, rtol=0, atol=1e-13)


def test_gradcheck_of_both_orders() -> None:
    x = torch.randn(3, 11, 2, dtype=torch.float64, requires_grad=True)
    for documents in (None, INTEGERS, BOOLEAN):
        assert torch.autograd.gradcheck(partial(activation_locality, documents=documents, alpha=1.3), x)
    assert torch.autograd.gradgradcheck(lambda x: activation_locality(x, documents=INTEGERS, alpha=1.3), x)


def test_tap_adds_its_gradient_to_what_comes_through() -> None:
    x = (torch.randn(SHAPE) * 0.1).requires_grad_()
    (alone,) = torch.autograd.grad(activation_locality(x, alpha=5.0), x)
    passed, locality = locality_tap(x, alpha=5.0)
    assert torch.equal(passed, x)
    (both,) = torch.autograd.grad((passed * 2).sum() + 3 * locality, x)
    torch.testing.assert_close(both, 2 + 3 * alone)


def test_hand_worked_numbers() -> None:
    x = torch.tensor([[0.02, 0.0], [0.02, -0.05]], requires_grad=True)
    # neuron 0: BCE of sigmoid(2) with itself; neuron 1: logit 0 against sigmoid(-5)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(5))
    locality = activation_locality(x)
    assert locality.item() == pytest.approx((-p * math.log(p) - (1 - p) * math.log(1 - p) + math.log(2)) / 2, rel=1e-6)
    locality.backward()
    wanted = [[0.0, 100 * (0.5 - q) / 2], [-100 * 2 * p * (1 - p) / 2, 0.0]]
    torch.testing.assert_close(x.grad, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_the_later_token_is_the_target() -> None:
    x = torch.tensor([[1.0], [-0.001]])
    assert activation_locality(x).item() == pytest.approx(100 * (1 - 1 / (1 + math.exp(0.1))), rel=1e-5)
    assert activation_locality(x.flip(0)).item() == pytest.approx(math.log1p(math.exp(-0.1)) + 0.1, rel=1e-5)


def test_tokens_that_agree_far_from_zero_cost_nothing_and_others_their_distance() -> None:
    x = torch.tensor([[2.0, -3.0], [1.0, -1.0], [5.0, -4.0]])
    assert activation_locality(x).item() < 1e-30
    x[1] = -x[1]
    assert activation_locality(x).item() == pytest.approx(100 * (2.0 + 3.0 + 1.0 + 1.0) / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 6e4])
def test_half_precision_is_finite_and_right(dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(4, 64, 128) * scale).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    locality = activation_locality(x)
    locality.backward()
    exact = x.detach().double().requires_grad_()
    wanted = activation_locality(exact)
    wanted.backward()
    assert locality.item() == pytest.approx(wanted.item(), rel=1e-2)
    assert torch.isfinite(x.grad).all()
    tiny = 6e-8 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        x.grad.double(), exact.grad, rtol=1e-2, atol=tiny + 1e-2 * exact.grad.abs().mean().item()
    )


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_zeros_give_the_entropy_of_a_coin_and_no_gradient(documents: str) -> None:
    x = torch.zeros(SHAPE, requires_grad=True)
    locality = activation_locality(x, documents=DOCUMENTS[documents])
    locality.backward()
    assert locality.item() == pytest.approx(0.0 if documents == "nothing" else math.log(2))
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("documents", [INTEGERS, BOOLEAN], ids=["integers", "boolean"])
def test_padding_is_left_out_whatever_it_holds(documents: Tensor) -> None:
    x = torch.randn(SHAPE)
    wanted = activation_locality(x, documents=documents)
    x[documents == 0] = float("nan")
    x.requires_grad_()
    got = activation_locality(x, documents=documents)
    got.backward()
    assert torch.equal(got, wanted)
    assert x.grad[documents == 0].eq(0).all()
    assert torch.isfinite(x.grad).all()


def test_all_valid_is_no_documents() -> None:
    x = torch.randn(SHAPE)
    for documents in (torch.ones(3, 11, dtype=torch.bool), torch.full((3, 11), 7)):
        torch.testing.assert_close(activation_locality(x, documents=documents), activation_locality(x))


def test_leading_axes_and_none_at_all() -> None:
    x, documents = torch.randn(2, 3, 7, 4), torch.randint(0, 3, (2, 3, 7))
    wanted = activation_locality(x.flatten(0, 1), documents=documents.flatten(0, 1))
    torch.testing.assert_close(activation_locality(x, documents=documents), wanted)
    torch.testing.assert_close(activation_locality(x[0, 0]), activation_locality(x[0, :1]))
    assert activation_locality(x[..., :1, :]).item() == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 50), st.integers(0, 10**6))
def test_range_permutation_and_packing(first: int, second: int, alpha: float, seed: int) -> None:
    x = torch.randn(1, first + second, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    documents = torch.tensor([[3] * first + [2] * second])
    packed = activation_locality(x, documents=documents, alpha=alpha).item()
    assert packed >= 0
    assert activation_locality(x.flip(-1), documents=documents, alpha=alpha).item() == pytest.approx(packed, rel=1e-12)
    parts = [(x[:, :first], first - 1), (x[:, first:], second - 1)]
    apart = sum(activation_locality(part, alpha=alpha).item() * count for part, count in parts)
    assert packed * (first + second - 2) == pytest.approx(apart, rel=1e-10)


def test_descent_makes_neighbours_agree() -> None:
    x = torch.randn(2, 16, 8) * 0.1

    def agreement() -> float:
        return (x[:, 1:].gt(0) == x[:, :-1].gt(0)).float().mean().item()

    before = agreement()
    for _ in range(100):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(activation_locality(x), x)
        x = x.detach() - 1e-2 * grad
    assert agreement() > before + 0.1


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4), (2, 3, 0), (2, 1, 4)], ids=str)
def test_without_neighbours_it_is_zero(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    for documents in (None, torch.ones(shape[:2], dtype=torch.bool), torch.ones(shape[:2], dtype=torch.long)):
        value = activation_locality(x, documents=documents)
        value.backward()
        assert value.item() == 0
        assert x.grad.eq(0).all()


def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    compiled = torch.compile(activation_locality, backend="aot_eager", fullgraph=True, dynamic=True)
    for documents in (None, INTEGERS, BOOLEAN):
        x = torch.randn(SHAPE, requires_grad=True)
        (wanted,) = torch.autograd.grad(activation_locality(x, documents=documents), x)
        (got,) = torch.autograd.grad(compiled(x, documents=documents), x)
        torch.testing.assert_close(got, wanted)


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3, 4)
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"`alpha` must be finite and > 0, got {alpha}. BlockFFN uses 100"):
            activation_locality(x, alpha=alpha)
    with pytest.raises(ValueError, match=r"`x` must have an axis of tokens before the last.*got \(4,\)"):
        activation_locality(torch.ones(4))
    with pytest.raises(ValueError, match=r"`x` must be floating point"):
        activation_locality(torch.ones(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`documents` must have the shape of `x` without .* \(2, 3\), got"):
        activation_locality(x, documents=torch.ones(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`documents` must be boolean .* or integers .*got torch.float32"):
        activation_locality(x, documents=torch.ones(2, 3))
