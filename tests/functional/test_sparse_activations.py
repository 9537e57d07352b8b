"""Sparse activation functions against numpy, and their gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from lightning_reg.functional import drelu, fatrelu, relu2, shifted_relu, statistical_topk, topk

torch.manual_seed(0)


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def test_values_are_those_of_the_definitions() -> None:
    x, u = rows(3, 5, 7), rows(3, 5, 7)
    a, b = x.numpy(), u.numpy()
    np.testing.assert_allclose(relu2(x), np.maximum(a, 0) ** 2)
    np.testing.assert_allclose(shifted_relu(x, 0.4), np.maximum(a - 0.4, 0))
    np.testing.assert_allclose(drelu(x, u), np.maximum(a, 0) * np.maximum(b, 0))
    np.testing.assert_array_equal(fatrelu(x, 0.3), np.where(a > 0.3, a, 0))
    channels = torch.rand(7, dtype=torch.float64)
    np.testing.assert_array_equal(fatrelu(x, channels), np.where(a > channels.numpy(), a, 0))
    soft = np.maximum(a, 0) / (1 + np.exp(-9 * (a - 0.3)))
    np.testing.assert_allclose(fatrelu(x, 0.3, sharpness=9.0), soft)
    cutoff = a.mean(-1, keepdims=True) + a.std(-1, keepdims=True) * norm.ppf(0.8)
    np.testing.assert_allclose(statistical_topk(x, 0.8), np.maximum(a - cutoff, 0), atol=1e-12)


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 9))
def test_topk_keeps_exactly_the_largest(width: int, share: float, seed: int) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = max(1, round(share * width))
    for straight_through in (True, False):
        out = topk(x, share, straight_through=straight_through)
        wanted = np.zeros((4, width))
        for row, values in enumerate(x.numpy()):
            index = np.argsort(-np.abs(values))[:kept]
            wanted[row, index] = values[index]
        np.testing.assert_array_equal(out, wanted)


def test_gradient_of_topk_passes_everything_or_what_was_kept() -> None:
    x = rows(3, 11).requires_grad_()
    upstream = rows(3, 11)
    (straight,) = torch.autograd.grad(topk(x, 0.3), x, upstream)
    assert torch.equal(straight, upstream)
    out = topk(x, 0.3, straight_through=False)
    (masked,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(masked, upstream * (out != 0))


@pytest.mark.parametrize(
    "function",
    [
        relu2,
        lambda x: drelu(x, x.roll(1, -1)),
        lambda x: fatrelu(x, 0.1),
        lambda x: fatrelu(x, torch.full((6,), 0.2, dtype=torch.float64)),
        lambda x: fatrelu(x, 0.1, sharpness=5.0),
        lambda x: statistical_topk(x, 0.6),
        lambda x: topk(x, 0.5, straight_through=False),
    ],
    ids=["relu2", "drelu", "fatrelu", "channels", "soft", "statistical", "topk"],
)
def test_gradients(function: object) -> None:
    assert torch.autograd.gradcheck(function, rows(4, 6).requires_grad_())  # type: ignore[arg-type]


def test_soft_fatrelu_becomes_the_hard_one() -> None:
    x = rows(50, 9)
    torch.testing.assert_close(fatrelu(x, 0.3, sharpness=1e9), fatrelu(x, 0.3))


def test_statistical_topk_gives_about_its_sparsity() -> None:
    out = statistical_topk(torch.randn(200, 1000), 0.95)
    assert (out == 0).float().mean().item() == pytest.approx(0.95, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_are_kept_and_large_values_stay_exact(dtype: torch.dtype) -> None:
    x = torch.tensor([[-300.0, 200.0, 1.0, 0.5]], dtype=dtype)
    channels = torch.full((4,), 0.75)
    outs = [fatrelu(x, 0.75), fatrelu(x, channels), fatrelu(x, 0.7, sharpness=4.0), topk(x, 0.5)]
    outs += [statistical_topk(x, 0.5), drelu(x, x)]
    assert all(out.dtype == dtype and torch.isfinite(out).all() for out in outs)
    assert outs[0].tolist() == outs[1].tolist() == [[0.0, 200.0, 1.0, 0.0]]


def test_not_finite_inputs_stay_visible() -> None:
    x = torch.tensor([float("nan"), float("inf"), -1.0, 2.0])
    for out in (fatrelu(x, 0.5), fatrelu(x, torch.full((4,), 0.5)), topk(x, 0.5)):
        assert out[0].isnan()
        assert out[1].isinf()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fatrelu(x, -0.1), "`threshold` must be finite and >= 0, got -0.1"),
        (lambda x: fatrelu(x, torch.ones(3)), r"have the width of `x`, \(6,\), got \(3,\)"),
        (lambda x: fatrelu(x, 0.1, sharpness=0.0), "`sharpness` must be > 0, got 0"),
        (lambda x: shifted_relu(x, float("nan")), "`shift` must be finite, got nan"),
        (lambda x: topk(x, 0.0), r"`share` must be in \(0, 1\], the part of the width to keep, got 0"),
        (lambda x: topk(x, 1.5), r"`share` must be in \(0, 1\]"),
        (lambda x: statistical_topk(x, 1.0), r"`sparsity` must be in \(0, 1\), .* got 1"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(rows(2, 6))  # type: ignore[operator]
