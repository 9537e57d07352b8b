"""The spectral norm and the sigma-Reparam weight against numpy's SVD and finite differences, in float64."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import spectral_norm, spectral_reparam
from lightning_reg.functional.attention_entropy import entropy_tap

module = sys.modules[spectral_norm.__module__]

# parts, transposed
LAYOUTS = [(1, False), (3, False), (1, True), (3, True)]


def reference(weight: Tensor, gain: Tensor, transposed: bool) -> np.ndarray:
    """``gain / sigma`` on each block of output rows, sigma from numpy."""
    matrix = weight.detach().double().numpy()
    matrix = matrix.T if transposed else matrix.reshape(len(matrix), -1)
    blocks = [g * block / np.linalg.norm(block, 2) for g, block in zip(gain.tolist(), np.split(matrix, len(gain)))]
    result = np.concatenate(blocks)
    return result.T if transposed else result.reshape(weight.shape)


def leading(weight: Tensor, parts: int, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return module.leading_singular_triplet(module.weight_matrices(weight.detach(), parts, transposed))


@pytest.mark.parametrize(
    "shape", [(1, 7), (7, 1), (30, 20), (20, 30), (8, 3, 5, 5), (300, 700), (700, 300), (400, 400)]
)
def test_spectral_norm_equals_numpy(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    expected = np.linalg.norm(weight.numpy().reshape(shape[0], -1), 2)
    assert spectral_norm(weight).item() == pytest.approx(expected, rel=1e-9)
    assert spectral_norm(weight.float()).item() == pytest.approx(expected, rel=1e-6)


def test_spectral_norm_of_a_worked_example() -> None:
    # [[3, 0], [4, 5]]: eigenvalues of the Gram matrix are 45 and 5
    assert spectral_norm(torch.tensor([[3.0, 0.0], [4.0, 5.0]])).item() == pytest.approx(45**0.5)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_spectral_norm_of_large_degenerate_matrices(rank: int) -> None:
    weight = torch.randn(300, rank) @ torch.randn(rank, 280)
    assert spectral_norm(weight).item() == pytest.approx(float(np.linalg.norm(weight.numpy(), 2)), rel=1e-5)


def test_rows_that_sum_to_zero_do_not_hide_the_leading_vector() -> None:
    weight = torch.randn(300, 300)
    weight -= weight.mean(1, keepdim=True)
    assert spectral_norm(weight).item() == pytest.approx(float(np.linalg.norm(weight.numpy(), 2)), rel=1e-6)


def test_spectral_norm_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    spectral_norm(torch.ones(300, 300))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_vector_has_no_spectral_norm() -> None:
    with pytest.raises(ValueError, match=r"`weight` must have at least two axes, got shape \(3,\)"):
        spectral_norm(torch.ones(3))


@pytest.mark.parametrize(("parts", "transposed"), LAYOUTS)
def test_reparam_equals_numpy(parts: int, transposed: bool) -> None:
    weight = torch.randn(12, 6) if not transposed else torch.randn(6, 12)
    gain = torch.rand(parts) + 0.5
    _, u, v = leading(weight, parts, transposed)
    np.testing.assert_allclose(
        spectral_reparam(weight, gain, u, v, transposed).numpy(),
        reference(weight, gain, transposed),
        rtol=2e-5,
        atol=1e-7,
    )


def test_convolution_is_flattened_to_output_channels() -> None:
    weight, gain = torch.randn(4, 3, 2, 2), torch.tensor([2.0])
    _, u, v = leading(weight, 1, False)
    result = spectral_reparam(weight, gain, u, v)
    np.testing.assert_allclose(result.numpy(), reference(weight, gain, False), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("parts", "transposed"), LAYOUTS)
def test_gradients_of_first_and_second_order(parts: int, transposed: bool) -> None:
    weight = torch.randn((6, 4) if not transposed else (4, 6), dtype=torch.float64, requires_grad=True)
    gain = torch.rand(parts, dtype=torch.float64, requires_grad=True)
    _, u, v = leading(weight, parts, transposed)
    u = torch.nn.functional.normalize(u + 0.1 * torch.randn_like(u), dim=-1)  # also off the exact singular vectors

    def function(weight: Tensor, gain: Tensor) -> Tensor:
        return spectral_reparam(weight, gain, u, v, transposed)

    assert torch.autograd.gradcheck(function, (weight, gain))
    assert torch.autograd.gradgradcheck(function, (weight, gain))


@pytest.mark.parametrize(("parts", "transposed"), LAYOUTS)
def test_the_loss_does_not_see_the_scale_of_the_weight(parts: int, transposed: bool) -> None:
    weight = torch.randn((6, 4) if not transposed else (4, 6), dtype=torch.float64, requires_grad=True)
    gain = torch.rand(parts, dtype=torch.float64)
    _, u, v = leading(weight, parts, transposed)
    (spectral_reparam(weight, gain, u, v, transposed) * torch.randn_like(weight)).sum().backward()
    assert abs((weight.grad * weight).sum().item()) < 1e-13


def test_half_precision_weight_keeps_its_dtype_and_exact_sigma() -> None:
    weight = torch.randn(8, 6).bfloat16().requires_grad_()
    sigma, u, v = leading(weight, 1, False)
    assert sigma.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = spectral_reparam(weight, sigma, u, v)
    assert torch.equal(result, weight)
    result.sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_power_iteration_approaches_the_leading_pair_from_below() -> None:
    matrices = [torch.randn(20, 10), torch.randn(5, 30)]
    u, v = [torch.zeros(20), torch.zeros(5)], [torch.randn(10), torch.randn(30)]
    previous, iteration = [0.0, 0.0], module.PowerIteration(matrices, u, v)
    for _ in range(100):
        iteration.step()
        sigma = [(a @ m @ b).item() for a, m, b in zip(u, matrices, v)]
        assert all(new >= old - 1e-5 for new, old in zip(sigma, previous))
        previous = sigma
    assert previous == pytest.approx([np.linalg.norm(m.numpy(), 2) for m in matrices], rel=1e-3)


def test_compiled_under_autocast_leaves_others_their_precision() -> None:
    """Its products in full precision must not end the precision of what comes after them."""

    def loss(weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            u = v = torch.full((1, 16), 0.25)
            queries = torch.nn.functional.linear(x, spectral_reparam(weight, torch.ones(1), u, v))
            queries = queries.view(2, 5, 2, 8).transpose(1, 2)
            *_, entropy, _ = entropy_tap(queries, queries * 1.5)
            return entropy.mean()

    torch.compiler.reset()
    x, weight = torch.randn(2, 5, 16), torch.randn(16, 16, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(weight), weight)[0] for f in (compiled, loss)))
