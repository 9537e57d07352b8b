"""Division by the square root of the layer's number, by hand."""

from typing import Any

import pytest
import torch

from lightning_reg.functional import layer_norm_scaling


@pytest.mark.parametrize(("layer", "factor"), [(1, 1.0), (2, 0.7071067811865476), (9, 1 / 3), (16, 0.25)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_divided_by_the_root(layer: int, factor: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    y = layer_norm_scaling(x, layer)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y.double(), x.double() * factor, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad.double(), torch.full_like(x, 3 * factor).double(), rtol=tolerance, atol=0)
    assert y.dtype == dtype


@pytest.mark.parametrize("layer", [0, -1, 1.5, True])
def test_bad_layer_is_named(layer: Any) -> None:
    with pytest.raises(ValueError, match=f"`layer` must be an integer >= 1, counted from 1, got {layer}"):
        layer_norm_scaling(torch.ones(2), layer)
