"""Root mean square of gradients against numpy."""

import numpy as np
import pytest
import torch

from lightning_reg.functional import gradient_rms

SHAPES = [(3,), (4, 5), (), (2, 3, 2), (7,)]


def test_all_and_groups_equal_numpy() -> None:
    gradients = [torch.randn(shape) for shape in SHAPES]
    flat = [gradient.numpy().reshape(-1) for gradient in gradients]
    assert gradient_rms(gradients).item() == pytest.approx(np.sqrt(np.mean(np.concatenate(flat) ** 2)), rel=1e-6)
    groups = [0, 2, 0, 1, 2]
    wanted = [
        np.sqrt(np.mean(np.concatenate([part for part, own in zip(flat, groups, strict=True) if own == group]) ** 2))
        for group in range(3)
    ]
    np.testing.assert_allclose(gradient_rms(gradients, groups).numpy(), wanted, rtol=1e-6)


def test_a_group_without_gradients_is_zero() -> None:
    assert gradient_rms([torch.full((4,), 2.0)], [1]).tolist() == [0, 2]
    assert gradient_rms([]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    rms = gradient_rms([torch.full((100,), 2e4, dtype=dtype)])
    assert rms.item() == pytest.approx(2e4, rel=1e-2)
    assert rms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_mixed_precisions() -> None:
    gradients = [torch.ones(3, dtype=torch.bfloat16), torch.full((1,), 3.0)]
    assert gradient_rms(gradients).item() == pytest.approx(np.sqrt(12 / 4))


def test_no_gradient_of_the_gradient() -> None:
    assert not gradient_rms([torch.ones(2, requires_grad=True)]).requires_grad


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="`groups` must have an entry for each of 2 gradients, got 1"):
        gradient_rms([torch.ones(2), torch.ones(3)], [0])
