"""Attention logits against row-by-row float64 computations, dense autograd and hand-worked numbers."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import max_attention_logit, max_attention_logit_from_scores
from lightning_reg.functional.attention_logits import logit_rows, logit_rows_from_scores

blocks = sys.modules["lightning_reg.functional._scores"]
STATISTICS = ("max", "logsumexp")


def dense(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """All scores (batch, heads, queries, keys) and which are shown, one product after the other."""
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("bhmd,bhnd->bhmn", query, key.repeat_interleave(group, 1))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    shown = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        shown = shown & mask
    elif mask is not None:
        scores, shown = scores + mask, shown & (mask > -5000)
    return scores, shown & torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if causal else shown


def reference(scores: Tensor, shown: Tensor, statistic: str) -> np.ndarray:
    """Loop over rows in float64."""
    values, seen = scores.detach().double().numpy(), shown.numpy()
    result = np.zeros(values.shape[:-1])
    for place in np.ndindex(*result.shape):
        row = values[place][seen[place]]
        if row.size:
            result[place] = max(abs(row)) if statistic == "max" else math.log(sum(math.exp(s) for s in row))
    return result


MASKS = {
    "none": None,
    "boolean": torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4,
    "row_without_keys": (torch.arange(5) != 2)[:, None].expand(5, 7),
    "minus_inf": torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, -math.inf),
    "minus_1e4": torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, -1e4),
    "float_bias": torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(1)) * 30,
}


@pytest.mark.parametrize("block", [8, 2**17], ids=["blocks", "whole"])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["heads", "grouped"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_rows_equal_float64_loops(
    statistic: Any, mask: str, causal: bool, key_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SCORES", block)
    query, key = torch.randn(2, 4, 5, 3) * 4, torch.randn(2, key_heads, 7, 3)
    arguments = {"is_causal": causal, "enable_gqa": key_heads < 4, "scale": 0.7}
    rows, visible = logit_rows(query, key, MASKS[mask], statistic=statistic, **arguments)
    scores, shown = dense(query, key, MASKS[mask], causal, 0.7)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(
        rows.double(), torch.as_tensor(reference(scores, shown, statistic)), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(torch.as_tensor(visible).expand(shown.shape[:-1]), shown.sum(-1))
    if statistic == "max":
        assert torch.equal(max_attention_logit(query, key, attn_mask=MASKS[mask], **arguments), rows)


@pytest.mark.parametrize("block", [8, 2**17], ids=["blocks", "whole"])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["heads", "grouped"])
@pytest.mark.parametrize("mask", ["none", "boolean", "row_without_keys", "minus_inf", "float_bias"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradient_equals_dense_autograd(
    statistic: Any, mask: str, key_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SCORES", block)
    query = (torch.randn(2, 4, 5, 3, dtype=torch.float64) * 4).requires_grad_()
    key = torch.randn(2, key_heads, 7, 3, dtype=torch.float64, requires_grad=True)
    given, upstream = MASKS[mask], torch.randn(2, 4, 5, dtype=torch.float64)
    inputs = [query, key]
    if given is not None and given.dtype != torch.bool:
        given = given.double().requires_grad_()
        inputs.append(given)
    rows, _ = logit_rows(query, key, given, statistic=statistic, is_causal=True, enable_gqa=key_heads < 4)
    got = torch.autograd.grad((rows * upstream).sum(), inputs)
    scores, shown = dense(query, key, given, True, None)
    per_row = scores.masked_fill(~shown, 0).abs().amax(-1)
    if statistic == "logsumexp":
        per_row = torch.where(shown.any(-1), scores.masked_fill(~shown, -1e30).logsumexp(-1), 0.0)
    wanted = torch.autograd.grad((per_row * upstream).sum(), inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in got)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradcheck_of_both_orders(statistic: Any) -> None:
    query, key, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 2, 3, 2),) * 3)
    bias = bias.detach()[..., :1].expand(1, 2, 3, 3).clone().requires_grad_()

    def rows(*inputs: Tensor) -> Tensor:
        return logit_rows(*inputs, statistic=statistic, is_causal=True)[0].square()

    assert torch.autograd.gradcheck(rows, (query, key, bias))
    assert torch.autograd.gradgradcheck(rows, (query, key, bias))
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: logit_rows_from_scores(s, statistic=statistic)[0], scores)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_scores_give_what_queries_and_keys_give(statistic: Any, dim: int) -> None:
    query, key, mask = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5), torch.rand(2, 1, 4, 6) > 0.4
    scores = (query @ key.mT / 5**0.5).movedim(-1, dim).requires_grad_()
    rows, visible = logit_rows_from_scores(
        scores, statistic=statistic, dim=dim, mask=mask.expand(2, 3, 4, 6).movedim(-1, dim)
    )
    wanted, seen = logit_rows(query, key, mask, statistic=statistic)
    torch.testing.assert_close(rows, wanted)
    assert torch.equal(visible, torch.as_tensor(seen))
    assert torch.isfinite(torch.autograd.grad(rows.sum(), scores)[0]).all()


def test_hidden_scores_are_no_logits() -> None:
    scores = torch.tensor([[1.0, -2.0, -1e4], [-math.inf, -1e9, torch.finfo().min], [-60.0, 3.0, -math.inf]])
    assert max_attention_logit_from_scores(scores).tolist() == [2.0, 0.0, 60.0]
    mask = torch.tensor([True, False, True])
    assert max_attention_logit_from_scores(scores, mask=mask).tolist() == [1.0, 0.0, 60.0]
    rows, visible = logit_rows_from_scores(scores.requires_grad_(), statistic="logsumexp")
    assert rows.tolist() == pytest.approx([math.log(math.e + math.e**-2), 0.0, 3.0])
    assert visible.tolist() == [2, 0, 2]
    (gradient,) = torch.autograd.grad(rows.sum(), scores)
    assert gradient[1].eq(0).all()
    assert gradient[0].sum().item() == pytest.approx(1)


def test_equal_magnitudes_share_the_gradient() -> None:
    scores = torch.tensor([[3.0, -3.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    wanted = [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]
    leaf = scores.clone().requires_grad_()
    assert torch.autograd.grad(logit_rows_from_scores(leaf, statistic="max")[0].sum(), leaf)[0].tolist() == wanted
    query, key = torch.eye(3, dtype=torch.float64)[None, None], torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    bias = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    bias[0, 0, :2] = scores
    bias.requires_grad_()
    rows, _ = logit_rows(query, key, bias, statistic="max")
    assert torch.autograd.grad(rows.sum(), bias)[0][0, 0, :2].tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, key = (torch.randn(1, 2, 5, 8) * 30).to(dtype).requires_grad_(), (torch.randn(1, 2, 5, 8) * 30).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = max_attention_logit(query, key, scale=30.0)
    scores, shown = dense(query.double(), key.double(), None, False, 30.0)
    assert rows.dtype == torch.float32
    assert rows.max() > 65504
    torch.testing.assert_close(rows.double(), torch.as_tensor(reference(scores, shown, "max")), rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(rows.sum(), query)
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()
    assert logit_rows_from_scores(query, statistic="logsumexp")[0].dtype == torch.float32


def test_memory_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.size = max(self.size, result.numel() if isinstance(result, Tensor) else 0)
            return result

    monkeypatch.setattr(blocks, "BLOCK_SCORES", 2048)
    query, key = torch.randn(1, 2, 256, 4, requires_grad=True), torch.randn(1, 2, 256, 4)
    with Largest() as watched:
        max_attention_logit(query, key, is_causal=True).sum().backward()
    assert watched.size <= 2048


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 3, 2, 5, 3)], ids=["2d", "3d", "5d"])
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    query, key = torch.randn(shape, requires_grad=True), torch.randn(shape)
    rows = max_attention_logit(query, key)
    torch.testing.assert_close(rows, (query @ key.mT / 3**0.5).abs().amax(-1))
    rows.sum().backward()
    assert query.grad.shape == shape


def test_nothing_to_look_at() -> None:
    for rows, keys in ((0, 3), (3, 0)):
        query, key = torch.randn(1, 1, rows, 2, requires_grad=True), torch.randn(1, 1, keys, 2, requires_grad=True)
        for statistic in STATISTICS:
            values, _ = logit_rows(query, key, statistic=statistic)
            assert values.shape == (1, 1, rows)
            assert values.eq(0).all()
            assert all(g.eq(0).all() for g in torch.autograd.grad(values.sum(), (query, key)))
    rows, visible = logit_rows_from_scores(torch.zeros(2, 0), statistic="max")
    assert rows.tolist() == visible.tolist() == [0, 0]


def test_nan_is_no_mask() -> None:
    assert max_attention_logit_from_scores(torch.tensor([[1.0, math.nan]])).isnan().all()
    assert max_attention_logit(torch.full((1, 1, 1, 2), math.nan), torch.ones(1, 1, 2, 2)).isnan().all()


def test_bad_input_names_the_argument() -> None:
    query, key = torch.randn(1, 4, 2, 3), torch.randn(1, 2, 2, 3)
    with pytest.raises(ValueError, match=r"`key` must have the 4 heads of `query`, got 2; set `enable_gqa=True`"):
        max_attention_logit(query, key)
    with pytest.raises(ValueError, match=r"`attn_mask` must be broadcastable to"):
        max_attention_logit(query, query, attn_mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`scores` must be a floating-point tensor"):
        max_attention_logit_from_scores(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`mask` must be boolean"):
        max_attention_logit_from_scores(torch.ones(2, 2), mask=torch.ones(2, 2))
