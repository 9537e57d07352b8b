"""Values and gradients against an independent float64 computation."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import attention_entropy

subject = sys.modules["lightning_reg.functional.attention_entropy"]  # the name in the package is the function


def expected(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(-1)


@pytest.mark.parametrize("block", [2**20, 64, 7])
@pytest.mark.parametrize("case", ["plain", "causal", "boolean", "additive", "gqa"])
def test_entropy_and_gradients_equal_float64(case: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BLOCK_SCORES", block)
    query = torch.randn(3, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    keys = 7 if case == "causal" else 9
    key = torch.randn(3, 2 if case == "gqa" else 4, keys, 8, dtype=torch.float64, requires_grad=True)
    mask, inputs = None, [query, key]
    if case == "boolean":
        mask = torch.rand(3, 1, 7, 9) > 0.3
        mask[..., 0] = True
    if case == "additive":
        mask = torch.randn(4, 7, 9, dtype=torch.float64, requires_grad=True)
        inputs.append(mask)
    arguments: dict[str, Any] = {"is_causal": case == "causal", "enable_gqa": case == "gqa"}
    got, wanted = attention_entropy(query, key, attn_mask=mask, **arguments), expected(query, key, mask, case == "causal")
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad((got * upstream).sum(), inputs)
    for one, other in zip(gradients, torch.autograd.grad((wanted * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_all_masked_row_is_zero_with_finite_gradient() -> None:
    query, key = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(1, 1, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    entropy = attention_entropy(query, key, attn_mask=mask)
    entropy.sum().backward()
    assert entropy[0, 0, 1] == 0
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()
