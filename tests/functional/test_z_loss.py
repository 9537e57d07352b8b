"""z-loss against float64 numpy, dense autograd and hand-worked numbers."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_reg.functional import z_loss
from lightning_reg.functional.z_loss import labelled, z_loss_tap

module = sys.modules["lightning_reg.functional.z_loss"]
CHUNKS = pytest.mark.parametrize("chunk", [10, 2**17], ids=["chunks", "whole"])


def reference(logits: Tensor, mask: Tensor | None = None) -> float:
    values = logits.detach().double().numpy()
    values = values.reshape(-1, values.shape[-1]) if mask is None else values[mask.numpy()]
    return float(np.mean([math.log(sum(math.exp(v) for v in row)) ** 2 for row in values])) if len(values) else 0.0


@CHUNKS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_equals_numpy_in_float64(
    dtype: torch.dtype, masked: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_SCORES", chunk)
    logits = (torch.randn(3, 5, 7, dtype=torch.float64) * 4).to(dtype)
    mask = torch.rand(3, 5) < 0.6 if masked else None
    got = z_loss(logits, mask=mask)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.item() == pytest.approx(reference(logits, mask), rel=1e-12 if dtype == torch.float64 else 2e-6)


def test_zeros_give_the_square_of_log_classes_and_log_probabilities_give_nothing() -> None:
    assert z_loss(torch.zeros(2, 3, 50)).item() == pytest.approx(math.log(50) ** 2)
    assert z_loss(torch.randn(4, 9, dtype=torch.float64).log_softmax(-1)).item() == pytest.approx(0, abs=1e-28)
    shifted = torch.randn(4, 9, dtype=torch.float64).log_softmax(-1) - 3
    assert z_loss(shifted).item() == pytest.approx(9)


@CHUNKS
def test_gradient_joins_that_of_the_loss(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_SCORES", chunk)
    logits = (torch.randn(3, 5, 7, dtype=torch.float64) * 4).requires_grad_()
    mask, upstream = torch.rand(3, 5) < 0.6, torch.randn(3, 5, 7, dtype=torch.float64)
    passed, penalty = z_loss_tap(logits, mask=mask)
    assert torch.equal(passed, logits)
    (got,) = torch.autograd.grad((passed * upstream).sum() + 0.7 * penalty, logits, retain_graph=True)
    formula = logits[mask].exp().sum(-1).log().square().mean()
    (wanted,) = torch.autograd.grad(0.7 * formula, logits)
    torch.testing.assert_close(got, wanted + upstream, rtol=1e-12, atol=1e-12)
    (alone,) = torch.autograd.grad(penalty, logits, retain_graph=True)
    torch.testing.assert_close(0.7 * alone, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.autograd.grad((passed * upstream).sum(), logits)[0], upstream)
    assert alone[~mask].eq(0).all()


def test_gradcheck_of_both_orders() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    for chunk in (5, 2**17):
        module.BLOCK_SCORES, kept = chunk, module.BLOCK_SCORES
        try:
            assert torch.autograd.gradcheck(lambda x: z_loss(x, mask=mask), logits)
            assert torch.autograd.gradgradcheck(lambda x: z_loss(x, mask=mask), logits)
        finally:
            module.BLOCK_SCORES = kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    logits = (torch.randn(8, 40) * 20).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = z_loss(logits)
        value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(logits), rel=1e-6)
    exact = logits.detach().double().requires_grad_()
    exact.logsumexp(-1).square().mean().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_numbers_that_overflow_an_exponential_are_measured() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0]], requires_grad=True)
    value = z_loss(logits)
    value.backward()
    assert value.item() == pytest.approx(9e8)
    assert logits.grad.tolist() == [[6e4, 0.0, 0.0]]


def test_classes_at_minus_infinity_do_not_count() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    z_loss(logits).backward()
    assert z_loss(logits).item() == pytest.approx(reference(logits[:, :2]))
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2] == 0


@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf], ids=["finite", "nan", "inf"])
def test_nothing_valid_is_exactly_zero_without_gradient(poison: float) -> None:
    logits = (torch.randn(2, 3, 4) + poison).requires_grad_()
    value = z_loss(logits, mask=torch.zeros(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert logits.grad.eq(0).all()


def test_positions_left_out_leave_no_trace() -> None:
    logits = torch.randn(3, 4)
    logits[1] = math.nan
    logits.requires_grad_()
    value = z_loss(logits, mask=torch.tensor([1, 0, 1]))
    value.backward()
    assert value.item() == pytest.approx(reference(logits[[0, 2]]))
    assert logits.grad[1].eq(0).all()
    assert logits.grad[[0, 2]].ne(0).all()


def test_no_positions_and_no_leading_axes() -> None:
    for shape in ((0, 4), (2, 0, 4)):
        logits = torch.zeros(shape, requires_grad=True)
        z_loss(logits).backward()
        assert z_loss(logits).item() == 0
        assert logits.grad.shape == shape
    assert z_loss(torch.zeros(4)).item() == pytest.approx(math.log(4) ** 2)


def test_memory_beside_the_logits_is_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size of the logits: themselves, their copy for backward, their gradient. The rest is small."""

    class Sizes(TorchDispatchMode):
        computed: list[int]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            names = ("view", "empty", "detach", "alias", "unsafe_view")
            if isinstance(result, Tensor) and not func.__name__.startswith(names):
                self.computed.append(result.numel())
            return result

    monkeypatch.setattr(module, "BLOCK_SCORES", 4000)
    logits = torch.randn(64, 1000).bfloat16().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        with Sizes() as watched:
            watched.computed = []
            z_loss(logits).backward()
    assert max(watched.computed) <= 4000
    assert sorted(kept)[-2:] == [64, 64_000]


def test_labels_say_which_positions_count() -> None:
    labels = torch.tensor([[5, -100, 2, -100], [-100, -100, 0, 7]])
    assert labelled(labels).tolist() == [[True, False, True, False], [False, False, True, True]]
    assert labelled(labels, ignore_index=0).tolist() == [[True] * 4, [True, True, False, True]]
    # the label of a token is compared with the logits of the token before
    assert labelled(labels, shift=True).tolist() == [[False, True, False, False], [False, True, True, False]]
    assert labelled(torch.tensor([3]), shift=True).tolist() == [False]


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`logits` must be floating point of shape \(..., classes\), got \(2, 3\)"):
        z_loss(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`logits` must be floating point"):
        z_loss(torch.ones(2, 0))
    with pytest.raises(ValueError, match=r"`logits` must be floating point"):
        z_loss(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `x` without its last axis"):
        z_loss(torch.ones(2, 3), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`labels` must be classes as integers, got torch.float32; use `mask=`"):
        labelled(torch.ones(2))
    with pytest.raises(ValueError, match=r"`labels` must be classes as integers, got torch.bool"):
        labelled(torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`shift=True` needs `labels` with an axis of tokens"):
        labelled(torch.tensor(1), shift=True)
