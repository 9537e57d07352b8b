"""Effective rank against numpy's singular values."""

import math

import numpy as np
import pytest
import torch

from lightning_reg.functional import effective_rank
from lightning_reg.functional.effective_rank import rank_of, singular_values


def reference(weight: torch.Tensor) -> float:
    values = np.linalg.svd(weight.double().numpy().reshape(len(weight), -1), compute_uv=False)
    share = values / values.sum()
    return float(np.exp(-sum(p * math.log(p) for p in share if p > 0)))


@pytest.mark.parametrize(
    "shape", [(1, 5), (5, 1), (7, 13), (13, 7), (4, 3, 2, 2)], ids=lambda shape: "x".join(map(str, shape))
)
def test_it_equals_that_of_a_singular_value_decomposition(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert effective_rank(weight).item() == pytest.approx(reference(weight), rel=1e-6)
    assert effective_rank(weight.double()).dtype == torch.float64
    assert effective_rank(weight).dtype == effective_rank(weight.bfloat16()).dtype == torch.float32


def test_rounding_does_not_count_as_directions() -> None:
    low = torch.randn(96, 3) @ torch.randn(3, 64)
    assert effective_rank(low).item() == pytest.approx(reference(low), rel=1e-4)
    assert effective_rank(low).item() < 3.001


def test_scale_does_not_matter_and_ends_are_met() -> None:
    weight = torch.randn(6, 9)
    assert effective_rank(1e3 * weight).item() == pytest.approx(effective_rank(weight).item(), rel=1e-6)
    assert effective_rank(torch.eye(5)).item() == pytest.approx(5)
    assert effective_rank(torch.ones(4, 6)).item() == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(4, 6)).item() == 0


def test_singular_values_of_a_batch() -> None:
    matrices = torch.randn(3, 5, 8)
    wanted = np.linalg.svd(matrices.double().numpy(), compute_uv=False)[:, ::-1]
    np.testing.assert_allclose(singular_values(matrices).numpy(), wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(singular_values(matrices.mT).numpy(), wanted, rtol=1e-9, atol=1e-9)
    assert rank_of(singular_values(matrices)).shape == (3,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_nan_and_harms_no_other(bad: float) -> None:
    matrices = torch.randn(2, 4, 4)
    matrices[1, 0, 0] = bad
    values = singular_values(matrices)
    assert values[0].isfinite().all()
    assert values[1].isnan().all()
    assert effective_rank(matrices[1]).isnan()


def test_no_gradient() -> None:
    assert not effective_rank(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`weight` must have at least two axes, got shape \(3,\)"):
        effective_rank(torch.ones(3))
