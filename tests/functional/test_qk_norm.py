"""QK-norm against numpy in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_reg.functional import qk_norm


def reference(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, norm: str, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain + bias


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5, 7), (0, 7), (3, 1)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_values_are_those_of_numpy(norm: str, affine: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64)
    gain = torch.randn(shape[-1], dtype=torch.float64) if affine else None
    bias = torch.randn(shape[-1], dtype=torch.float64) if affine and norm == "layer" else None
    arrays = [np.ones(shape[-1]) if gain is None else gain.numpy(), np.zeros(1) if bias is None else bias.numpy()]
    result = qk_norm(x, gain, bias, norm=norm, eps=1e-2)  # type: ignore[arg-type]
    np.testing.assert_allclose(result.numpy(), reference(x.numpy(), *arrays, norm, 1e-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradients(norm: Any) -> None:
    torch.manual_seed(0)
    x, gain, bias = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5).double(), torch.randn(5).double()
    tensors = [part.requires_grad_() for part in ((x, gain, bias) if norm == "layer" else (x, gain))]
    assert torch.autograd.gradcheck(lambda *parts: qk_norm(*parts, norm=norm), tensors)


def test_rms_without_gain_bounds_the_logit_by_the_root_of_the_width() -> None:
    q, k = (qk_norm(torch.randn(100, 16) * 1e3) for _ in range(2))
    assert (q @ k.T).abs().max() / 4 <= 4 + 1e-5
    assert q.norm(dim=-1).tolist() == pytest.approx([4.0] * 100, abs=1e-5)
    assert torch.equal(qk_norm(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_is_computed_in_single_and_returned_in_its_own(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 33) * 300).to(dtype)  # squares overflow float16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = qk_norm(x, torch.ones(33, dtype=dtype))
    assert result.dtype == dtype
    wanted = reference(x.double().numpy(), np.ones(33), np.zeros(1), "rms", 1e-6)
    torch.testing.assert_close(result, torch.tensor(wanted).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "batch"}, "`norm` must be 'rms' or 'layer', got 'batch': RMSNorm, or LayerNorm"),
        ({"eps": 0.0}, "`eps` must be a finite number > 0, got 0.0"),
        ({"eps": math.inf}, "`eps` must be a finite number > 0, got inf"),
        ({"eps": True}, "`eps` must be a finite number > 0, got True"),
        ({"bias": torch.ones(3)}, "`bias` must be left out with `norm='rms'`"),
    ],
    ids=["norm", "zero", "inf", "bool", "bias"],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk_norm(torch.ones(3), **arguments)
