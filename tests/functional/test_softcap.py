"""Soft-capped attention against numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import softcap, softcapped_attention


def by_hand(q: Tensor, k: Tensor, v: Tensor, cap: float, mask: Tensor | None, causal: bool, scale: float) -> np.ndarray:
    """Row by row in float64."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    output = np.zeros((*queries.shape[:-1], values.shape[-1]))
    repeats = queries.shape[1] // keys.shape[1]
    shown = np.ones((*queries.shape[:3], keys.shape[2]), bool) if mask is None else None
    bias = np.zeros((*queries.shape[:3], keys.shape[2]))
    if mask is not None:
        full = mask.expand(*bias.shape)
        shown = full.numpy() if mask.dtype == torch.bool else np.ones_like(bias, bool)
        bias = bias if mask.dtype == torch.bool else full.double().numpy()
    for b, h, i in np.ndindex(*queries.shape[:3]):
        seen = [j for j in range(keys.shape[2]) if shown[b, h, i, j] and (not causal or j <= i)]
        if not seen:
            continue
        raw = [
            cap * math.tanh(scale * (queries[b, h, i] @ keys[b, h // repeats, j]) / cap) + bias[b, h, i, j]
            for j in seen
        ]
        weights = np.exp(np.array(raw) - max(raw))
        weights /= weights.sum()
        output[b, h, i] = sum(w * values[b, h // repeats, j] for w, j in zip(weights, seen, strict=True))
    return output


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias", "gqa", "scale"])
def test_equals_numpy(case: str) -> None:
    q, k, v = 5 * torch.randn(2, 4, 5, 3), 5 * torch.randn(2, 2 if case == "gqa" else 4, 7, 3), torch.randn(2, 4, 7, 6)
    v = v[:, :2] if case == "gqa" else v
    mask = {"mask": torch.rand(2, 1, 5, 7) > 0.4, "bias": torch.randn(4, 5, 7)}.get(case)
    if case == "mask":
        mask[0, 0, 2] = False  # a row that sees nothing
    scale = 0.7 if case == "scale" else 3**-0.5
    got = softcapped_attention(
        q,
        k,
        v,
        mask,
        is_causal=case == "causal",
        scale=0.7 if case == "scale" else None,
        enable_gqa=case == "gqa",
        cap=3.0,
    )
    wanted = by_hand(q, k, v, 3.0, mask, case == "causal", scale)
    np.testing.assert_allclose(got.numpy(), wanted, atol=2e-6)
    uncapped = by_hand(q, k, v, 1e9, mask, case == "causal", scale)
    assert np.abs(uncapped - wanted).max() > 0.05


def test_a_high_cap_is_torch_s_attention() -> None:
    q, k, v = torch.randn(3, 2, 2, 4, 5).unbind(0)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(softcapped_attention(q, k, v, is_causal=True, cap=1e6), wanted, atol=1e-5, rtol=1e-5)


def test_gradcheck() -> None:
    q, k, v = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True]] * 3)
    assert torch.autograd.gradcheck(lambda *x: softcapped_attention(*x, mask, cap=1.5), (q, k, v))
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: softcap(s, 0.5), scores)


def test_a_row_that_sees_nothing_has_no_gradient_and_no_nan() -> None:
    q, k, v = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True], [False, False]])
    (3 * softcapped_attention(q, k, v, mask, cap=2.0)).sum().backward()
    assert torch.isfinite(torch.cat([x.grad.flatten() for x in (q, k, v)])).all()
    assert not q.grad[0, 0, 1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_differs_by_rounding(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in torch.randn(3, 2, 2, 9, 8).unbind(0))
    exact = softcapped_attention(q.double(), k.double(), v.double(), cap=4.0)
    got = softcapped_attention(q, k, v, cap=4.0)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, atol=2e-2, rtol=2e-2)
    assert softcap(q, 4.0).dtype == dtype


def test_dropout_scales_what_is_left() -> None:
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4000, 2), torch.ones(1, 1, 4000, 1)
    assert abs(float(softcapped_attention(q, k, v, dropout_p=0.5)) - 1.0) < 0.1


def test_hidden_scores_stay_hidden() -> None:
    hidden = torch.tensor([1.0, -math.inf, -1e9, torch.finfo(torch.float32).min])
    assert torch.equal(softcap(hidden, 2.0)[1:], hidden[1:])


@pytest.mark.parametrize("cap", [0, -1.0, math.inf, math.nan, True, "50"], ids=str)
def test_bad_cap(cap: object) -> None:
    with pytest.raises(ValueError, match="`cap` must be a finite number > 0, got"):
        softcap(torch.zeros(2), cap)  # type: ignore[arg-type]
