"""Entropy of predictions against float64 numpy, dense autograd and hand-worked numbers."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_reg.functional import prediction_entropy
from lightning_reg.functional.prediction_entropy import prediction_tap

# the chunks are those of the z-loss
chunks = sys.modules["lightning_reg.functional.z_loss"]
CHUNKS = pytest.mark.parametrize("chunk", [10, 2**17], ids=["chunks", "whole"])
KIND = pytest.mark.parametrize("multi_label", [False, True], ids=["softmax", "sigmoids"])


def surprise(p: float) -> float:
    return -p * math.log(p) if p > 0 else 0.0


def reference(logits: Tensor, multi_label: bool) -> np.ndarray:
    """Loop over positions and classes in float64."""
    values = logits.detach().double().numpy()
    result = np.zeros(values.shape[:-1])
    for place in np.ndindex(*result.shape):
        row = values[place]
        if multi_label:
            probs = [1 / (1 + math.exp(-v)) for v in row]
            result[place] = sum(surprise(p) + surprise(1 / (1 + math.exp(v))) for p, v in zip(probs, row)) / len(row)
        else:
            weights = [math.exp(v - max(row)) for v in row]
            result[place] = sum(surprise(w / sum(weights)) for w in weights)
    return result


@CHUNKS
@KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_equals_numpy_in_float64(
    dtype: torch.dtype, multi_label: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "BLOCK_SCORES", chunk)
    logits = (torch.randn(3, 5, 7, dtype=torch.float64) * 3).to(dtype)
    got = prediction_entropy(logits, multi_label=multi_label)
    assert got.shape == (3, 5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(
        got.double(), torch.as_tensor(reference(logits, multi_label)), rtol=tolerance, atol=tolerance
    )
    normalised = prediction_entropy(logits, multi_label=multi_label, normalize=True)
    torch.testing.assert_close(normalised, got / math.log(2 if multi_label else 7))


def test_hand_worked_numbers() -> None:
    # H(1/2, 1/4, 1/4) = 1.5 log 2
    halves = torch.tensor([0.5, 0.25, 0.25]).log()
    assert prediction_entropy(halves).item() == pytest.approx(1.5 * math.log(2))
    assert prediction_entropy(halves, normalize=True).item() == pytest.approx(1.5 * math.log(2) / math.log(3))
    # a fair coin and one with 1/4
    coins = torch.tensor([0.0, -math.log(3)])
    biased = surprise(0.25) + surprise(0.75)
    assert prediction_entropy(coins, multi_label=True).item() == pytest.approx((math.log(2) + biased) / 2)
    assert prediction_entropy(torch.zeros(1), multi_label=True, normalize=True).item() == pytest.approx(1)


@CHUNKS
@KIND
def test_gradient_joins_that_of_the_loss(multi_label: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BLOCK_SCORES", chunk)
    logits = (torch.randn(3, 5, 7, dtype=torch.float64) * 2).requires_grad_()
    upstream, weight = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    passed, entropy = prediction_tap(logits, multi_label=multi_label)
    assert torch.equal(passed, logits)
    (got,) = torch.autograd.grad((passed * upstream).sum() + (weight * entropy).sum(), logits)
    p = logits.sigmoid() if multi_label else logits.softmax(-1)
    formula = torch.special.entr(p).sum(-1)
    if multi_label:
        formula = (formula + torch.special.entr(1 - p).sum(-1)) / 7
    (wanted,) = torch.autograd.grad((weight * formula).sum(), logits)
    torch.testing.assert_close(got, wanted + upstream, rtol=1e-10, atol=1e-12)
    assert wanted.abs().max() > 0.05


@KIND
def test_gradcheck_of_both_orders(multi_label: bool) -> None:
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for chunk in (5, 2**17):
        chunks.BLOCK_SCORES, kept = chunk, chunks.BLOCK_SCORES
        try:
            assert torch.autograd.gradcheck(lambda x: prediction_entropy(x, multi_label=multi_label), logits)
            assert torch.autograd.gradgradcheck(lambda x: prediction_entropy(x, multi_label=multi_label), logits)
        finally:
            chunks.BLOCK_SCORES = kept


@KIND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype: torch.dtype, multi_label: bool) -> None:
    logits = (torch.randn(8, 40) * 3).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = prediction_entropy(logits, multi_label=multi_label)
        value.sum().backward()
    assert value.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    wanted = prediction_entropy(exact, multi_label=multi_label)
    torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=2e-6)
    wanted.sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


@KIND
def test_saturated_and_infinite_logits_are_sure(multi_label: bool) -> None:
    for row in ([6e4, -6e4, -6e4], [math.inf, -math.inf, -math.inf] if multi_label else [0.0, -math.inf, -math.inf]):
        logits = torch.tensor([row], requires_grad=True)
        entropy = prediction_entropy(logits, multi_label=multi_label)
        entropy.sum().backward()
        assert entropy.item() == 0
        assert logits.grad.eq(0).all()


def test_class_at_minus_infinity_has_no_part_in_it() -> None:
    logits = torch.tensor([[1.0, -0.5, -math.inf]], requires_grad=True)
    entropy = prediction_entropy(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(prediction_entropy(logits[:, :2]).item())
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2] == 0


@KIND
def test_nan_is_an_error_of_the_model_and_stays(multi_label: bool) -> None:
    assert prediction_entropy(torch.tensor([[0.0, math.nan]]), multi_label=multi_label).isnan().all()


@KIND
@settings(deadline=None, max_examples=30)
@given(st.integers(2, 9), st.floats(0, 1e3), st.integers(0, 10**6))
def test_range_and_permutation(multi_label: bool, classes: int, scale: float, seed: int) -> None:
    logits = scale * torch.randn(3, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    entropy = prediction_entropy(logits, multi_label=multi_label, normalize=True)
    assert ((entropy >= 0) & (entropy <= 1 + 1e-12)).all()
    turned = prediction_entropy(logits.flip(-1), multi_label=multi_label, normalize=True)
    torch.testing.assert_close(turned, entropy)
    if not multi_label:
        torch.testing.assert_close(prediction_entropy(logits + 5, normalize=True), entropy)


def test_confidence_penalty_and_label_smoothing_are_the_two_directions_of_the_divergence() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    p, uniform = logits.softmax(-1), torch.full((6,), 1 / 6, dtype=torch.float64)
    forward, reverse = (p * (p / uniform).log()).sum(-1), (uniform * (uniform / p).log()).sum(-1)
    torch.testing.assert_close(math.log(6) - prediction_entropy(logits), forward)
    smoothing = -logits.log_softmax(-1).mean(-1)
    torch.testing.assert_close(smoothing - math.log(6), reverse)


@KIND
def test_memory_beside_the_logits_is_of_a_chunk(multi_label: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sizes(TorchDispatchMode):
        computed: list[int]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not func.__name__.startswith(("view", "empty", "detach", "alias")):
                self.computed.append(result.numel())
            return result

    monkeypatch.setattr(chunks, "BLOCK_SCORES", 4000)
    logits = torch.randn(64, 1000).bfloat16().requires_grad_()
    with Sizes() as watched:
        watched.computed = []
        prediction_entropy(logits, multi_label=multi_label).sum().backward()
    assert max(watched.computed) <= 4000


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`logits` must be floating point of shape"):
        prediction_entropy(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`logits` must have at least 2 classes, got 1; set `multi_label=True`"):
        prediction_entropy(torch.ones(2, 1))
