"""Chunk density against float64 numpy, hand-worked numbers and the formula differentiated by autograd."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_reg.functional import activation_density, chunk_density
from lightning_reg.functional.chunk_density import chunk_tap
from tests.functional.sequences import BOOLEAN, DOCUMENTS, INTEGERS, SHAPE, spans, valid_rows

WAYS = {
    "density": {"epsilon": 0.5},
    "relative": {"epsilon": 2.0, "relative": True},
    "share": {"probability": "share"},
}


def reference(
    x: Tensor, documents: Tensor | None, chunk: int, probability: str = "density", epsilon: float = 1e-7,
    relative: bool = False,
) -> float:  # fmt: skip
    values = x.detach().double().numpy()
    if relative:
        epsilon = epsilon * np.mean(valid_rows(x, documents) ** 2)
    found = []
    for row, tokens in spans(x, documents):
        for start in range(0, len(tokens), chunk):
            part = values[row, tokens[start : start + chunk]]
            share = np.abs(part) / (np.abs(part).sum(-1, keepdims=True) + 1e-5)
            p = share if probability == "share" else part**2 / (part**2 + epsilon)
            found.append(1 - np.prod(1 - p + 1e-5, axis=0))
    return float(np.mean(found)) if found else 0.0


def formula(x: Tensor, documents: Tensor | None, chunk: int, **way) -> Tensor:
    """The same composed of autograd operations."""
    found = []
    scale = 1.0
    if way.get("relative"):
        scale = float(np.mean(valid_rows(x, documents) ** 2))
    for row, tokens in spans(x, documents):
        for start in range(0, len(tokens), chunk):
            part = x[row, tokens[start : start + chunk]]
            if way.get("probability") == "share":
                p = part.abs() / (part.abs().sum(-1, keepdim=True) + 1e-5)
            else:
                p = part**2 / (part**2 + way["epsilon"] * scale)
            found.append(1 - (1 - p + 1e-5).log().sum(0).exp())
    return torch.stack(found).mean()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("documents", [name for name in DOCUMENTS if name != "nothing"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_equals_numpy_in_float64(dtype: torch.dtype, chunk: int, documents: str, way: str) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    got = chunk_density(x, documents=DOCUMENTS[documents], chunk=chunk, **WAYS[way])
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert got.item() == pytest.approx(reference(x, DOCUMENTS[documents], chunk, **WAYS[way]), abs=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("documents", [name for name in DOCUMENTS if name != "nothing"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_gradient_equals_that_of_the_formula(chunk: int, documents: str, way: str) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    arguments = {"documents": DOCUMENTS[documents], "chunk": chunk, **WAYS[way]}
    (wanted,) = torch.autograd.grad(0.7 * formula(x, **arguments), x)
    (got,) = torch.autograd.grad(0.7 * chunk_density(x, **arguments), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    # a chunk of one token: its shares sum to 1 whatever it holds
    assert (wanted.abs().max() > 1e-4) != (way == "share" and chunk == 1)


@pytest.mark.parametrize("way", ["density", "share"])
def test_gradcheck_of_both_orders(way: str) -> None:
    x = torch.randn(3, 11, 2, dtype=torch.float64, requires_grad=True)
    for documents in (None, INTEGERS):
        density = partial(chunk_density, documents=documents, chunk=3, **WAYS[way])
        assert torch.autograd.gradcheck(density, x)
        assert torch.autograd.gradgradcheck(density, x)


def test_tap_adds_its_gradient_to_what_comes_through() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    (alone,) = torch.autograd.grad(chunk_density(x, chunk=3, epsilon=0.5), x)
    passed, density = chunk_tap(x, chunk=3, epsilon=0.5)
    assert torch.equal(passed, x)
    (both,) = torch.autograd.grad((passed * 2).sum() + 3 * density, x)
    torch.testing.assert_close(both, 2 + 3 * alone)


def test_hand_worked_numbers() -> None:
    # two chunks of two tokens and one of one; a neuron is on where x^2 = epsilon, so p = 1/2
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    half = 0.5 + 1e-5
    silent = [[half * half, 1.00002], [1.00002, half], [half, half]]
    got = chunk_density(x, chunk=2, epsilon=1.0)
    assert got.item() == pytest.approx(np.mean([1 - s for row in silent for s in row]), abs=1e-6)


def test_exact_zeros_and_large_activations_give_the_share_of_neurons_a_chunk_needs() -> None:
    x = torch.zeros(1, 8, 10)
    x[0, 1, :2], x[0, 3, 1:3], x[0, 6, 9] = 5.0, -7.0, 9.0
    # neurons 0 to 2 in the first chunk, 9 in the second
    assert chunk_density(x, chunk=4).item() == pytest.approx((3 + 1) / 20, abs=1e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_a_chunk_of_one_token_is_the_density(relative: bool) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64)
    got = chunk_density(x, chunk=1, epsilon=0.3, relative=relative)
    wanted = activation_density(x, epsilon=0.3, relative=relative) - 1e-5
    assert got.item() == pytest.approx(wanted.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 6e4])
@pytest.mark.parametrize("way", [*WAYS, "sharp"])
def test_value_and_gradient_are_finite_and_right_at_every_scale(way: str, scale: float, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 40, 33) * scale).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    arguments = {"chunk": 16, **({"epsilon": 1e-7} if way == "sharp" else WAYS[way])}
    density = chunk_density(x, **arguments)
    density.backward()
    assert density.item() == pytest.approx(reference(x, None, **arguments), abs=1e-5)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(chunk_density(exact, **arguments), exact)
    assert torch.isfinite(x.grad).all()
    tiny = torch.finfo(dtype).smallest_normal  # below it, a gradient is 0 or coarse
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-2, atol=tiny + 1e-2 * wanted.abs().max().item())


@pytest.mark.parametrize("way", [{"epsilon": 1e-30}, {"probability": "share"}], ids=["density", "share"])
def test_gradient_is_finite_where_p_is_one(way: dict) -> None:
    x = torch.zeros(1, 3, 2)
    x[0, :, 0] = torch.tensor([1.0, 1e4, 3.0])
    x.requires_grad_()
    density = chunk_density(x, **way)
    (density * 2.0**15).backward()
    assert density.item() == pytest.approx(0.5, abs=1e-4)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_zeros_have_a_value_near_zero_and_no_gradient(documents: str, way: str) -> None:
    x = torch.zeros(SHAPE, requires_grad=True)
    density = chunk_density(x, documents=DOCUMENTS[documents], chunk=4, **WAYS[way])
    density.backward()
    assert -4.1e-5 < density.item() <= 0
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("documents", [INTEGERS, BOOLEAN], ids=["integers", "boolean"])
def test_padding_is_left_out_whatever_it_holds(documents: Tensor, way: str) -> None:
    x = torch.randn(SHAPE)
    arguments = {"documents": documents, "chunk": 3, **WAYS[way]}
    wanted = chunk_density(x, **arguments)
    x[documents == 0] = float("nan")
    x.requires_grad_()
    got = chunk_density(x, **arguments)
    got.backward()
    assert torch.equal(got, wanted)
    assert x.grad[documents == 0].eq(0).all()
    assert torch.isfinite(x.grad).all()


def test_nothing_valid_gives_zero() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    density = chunk_density(x, documents=torch.zeros(3, 11, dtype=torch.long))
    density.backward()
    assert density.item() == 0
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("way", WAYS)
def test_all_valid_is_no_documents(way: str) -> None:
    x = torch.randn(SHAPE)
    plain = chunk_density(x, chunk=4, **WAYS[way])
    for documents in (torch.ones(3, 11, dtype=torch.bool), torch.ones(3, 11, dtype=torch.int32)):
        torch.testing.assert_close(chunk_density(x, documents=documents, chunk=4, **WAYS[way]), plain)


def test_leading_axes_and_none_at_all() -> None:
    x, documents = torch.randn(2, 3, 7, 4), torch.randint(0, 3, (2, 3, 7))
    torch.testing.assert_close(chunk_density(x, chunk=3), chunk_density(x.flatten(0, 1), chunk=3))
    for kind in (documents, documents > 0):
        wanted = chunk_density(x.flatten(0, 1), documents=kind.flatten(0, 1), chunk=3, epsilon=0.5)
        torch.testing.assert_close(chunk_density(x, documents=kind, chunk=3, epsilon=0.5), wanted)
    single = chunk_density(x[0, 0], documents=documents[0, 0], chunk=3, epsilon=0.5)
    torch.testing.assert_close(single, chunk_density(x[0, :1], documents=documents[0, :1], chunk=3, epsilon=0.5))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 7), st.integers(0, 10**6))
def test_range_permutation_and_packing(first: int, second: int, chunk: int, seed: int) -> None:
    x = torch.randn(1, first + second, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    documents = torch.tensor([[1] * first + [2] * second])
    arguments = {"chunk": chunk, "epsilon": 0.5}
    packed = chunk_density(x, documents=documents, **arguments).item()
    assert -1e-4 < packed < 1
    assert chunk_density(x.flip(-1), documents=documents, **arguments).item() == pytest.approx(packed, rel=1e-12)
    parts = [(x[:, :first], -(-first // chunk)), (x[:, first:], -(-second // chunk))]
    apart = sum(chunk_density(part, **arguments).item() * chunks for part, chunks in parts)
    assert packed == pytest.approx(apart / sum(chunks for _, chunks in parts), rel=1e-10)


def test_a_longer_chunk_is_at_least_as_dense() -> None:
    x = torch.randn(2, 64, 16)
    values = [chunk_density(x, chunk=chunk, epsilon=4.0).item() for chunk in (1, 4, 16, 64)]
    assert values == sorted(values)


def test_share_does_not_see_the_scale() -> None:
    x = torch.rand(2, 9, 6, dtype=torch.float64) + 1
    wanted = chunk_density(1e4 * x, probability="share").item()
    assert chunk_density(1e6 * x, probability="share").item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("way", [{"epsilon": 16.0, "relative": True}, {"probability": "share"}])
def test_descent_lowers_the_union_of_active_neurons(way: dict) -> None:
    x = (torch.randn(2, 32, 16) - 0.5).relu()
    before = x.view(2, 2, 16, 16).ne(0).any(2).float().mean()
    for _ in range(300):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(chunk_density(x, chunk=16, **way), x)
        x = (x.detach() - 5 * grad).clamp_min(0)
    assert x.view(2, 2, 16, 16).gt(1e-3).any(2).float().mean() < 0.9 * before


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4), (2, 3, 0)], ids=str)
def test_empty_input_gives_zero(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    for documents in (None, torch.ones(shape[:2], dtype=torch.bool), torch.ones(shape[:2], dtype=torch.long)):
        density = chunk_density(x, documents=documents)
        density.backward()
        assert density.item() == 0


def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    compiled = torch.compile(chunk_density, backend="aot_eager", fullgraph=True, dynamic=True)
    for documents in (None, INTEGERS, BOOLEAN):
        x = torch.randn(SHAPE, requires_grad=True)
        arguments = {"documents": documents, "chunk": 3, "epsilon": 0.5, "relative": True}
        (wanted,) = torch.autograd.grad(chunk_density(x, **arguments), x)
        (got,) = torch.autograd.grad(compiled(x, **arguments), x)
        torch.testing.assert_close(got, wanted)


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3, 4)
    for chunk in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=rf"`chunk` must be .*>= 1.*got {chunk}"):
            chunk_density(x, chunk=chunk)
    with pytest.raises(ValueError, match=r"`epsilon` must be finite and > 0, got 0"):
        chunk_density(x, epsilon=0)
    with pytest.raises(ValueError, match=r"`probability` must be 'density' or 'share', got 'softmax'"):
        chunk_density(x, probability="softmax")
    with pytest.raises(ValueError, match=r"`relative=True` scales the `epsilon` of probability='density'.*Leave"):
        chunk_density(x, probability="share", relative=True)
    with pytest.raises(ValueError, match=r"`x` must have an axis of tokens before the last.*got \(4,\)"):
        chunk_density(torch.ones(4))
    with pytest.raises(ValueError, match=r"`x` must be floating point"):
        chunk_density(torch.ones(2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`documents` must have the shape of `x` without .* \(2, 3\), got"):
        chunk_density(x, documents=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`documents` must be boolean .* or integers .*got torch.float32"):
        chunk_density(x, documents=torch.ones(2, 3))
