"""The prediction entropy kernel against float64."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional import prediction_entropy
from lightning_reg.functional.prediction_entropy import prediction_tap
from lightning_reg.losses import PredictionEntropyLoss

SHAPES = pytest.mark.parametrize(
    "shape", [(7, 2), (3, 130), (2, 2048), (5, 4099), (2, 2, 8200)], ids=lambda s: "x".join(map(str, s))
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
KINDS = pytest.mark.parametrize("multi_label", [False, True], ids=["softmax", "sigmoids"])
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, in the interpreter


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, no kernel fails, and numpy takes infinities as silently as a GPU does."""
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(kernels.operators, "_failed", {})
    with np.errstate(all="ignore"):
        yield
    assert not kernels.operators._failed


def entropy64(x: Tensor, multi_label: bool) -> Tensor:
    """Entropy of each row in float64, by its definition."""
    if multi_label:
        p, q = x.sigmoid(), (-x).sigmoid()
        return -(p.xlogy(p) + q.xlogy(q)).mean(-1)
    p = x.softmax(-1)
    return -p.xlogy(p).sum(-1)


def gradient64(x: Tensor, multi_label: bool) -> Tensor:
    """Its derivative in each logit, by hand: autograd gives NaN where a probability is 0."""
    if multi_label:
        return -x * x.sigmoid() * (-x).sigmoid() / x.shape[-1]
    p = x.softmax(-1)
    log_p = x.log_softmax(-1)
    return torch.where(p > 0, -p * (log_p + entropy64(x, False).unsqueeze(-1)), 0.0)


@SHAPES
@DTYPES
@KINDS
@pytest.mark.parametrize("size", [2.0, 1e4], ids=["usual", "huge"])
def test_value_and_gradient_equal_float64(
    shape: tuple, dtype: torch.dtype, multi_label: bool, size: float, device: str
) -> None:
    logits = (torch.randn(shape, device=device) * size).to(dtype).requires_grad_()
    upstream = torch.randn(shape, device=device).to(dtype)
    weights = torch.randn(shape[:-1], device=device) * 3
    passed, entropy = prediction_tap(logits, multi_label=multi_label)
    torch.autograd.backward([passed, entropy], [upstream, weights])
    exact = logits.detach().double()
    torch.testing.assert_close(entropy.double(), entropy64(exact, multi_label), rtol=1e-6, atol=1e-5)
    wanted = gradient64(exact, multi_label) * weights.unsqueeze(-1).double()
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(logits.grad.double(), wanted + upstream.double(), rtol=eps, atol=eps)
    # what the loss does not touch
    (alone,) = torch.autograd.grad(prediction_entropy(logits, multi_label=multi_label), logits, weights)
    largest = float(wanted.abs().max())
    torch.testing.assert_close(alone.double(), wanted, rtol=eps, atol=max(eps * largest, torch.finfo(dtype).tiny))


@KINDS
def test_agrees_with_torch_code(multi_label: bool, device: str) -> None:
    logits = torch.randn(6, 4100, device=device, requires_grad=True)
    runs = []
    for switch in (kernels.disabled(), nullcontext()):
        with switch:
            entropy = prediction_entropy(logits, multi_label=multi_label)
            runs.append((entropy, *torch.autograd.grad(entropy.square().sum(), logits)))
    assert not torch.equal(runs[0][1], runs[1][1])  # by another way
    for got, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


def test_a_backward_may_follow_a_forward_in_torch_code(device: str) -> None:
    logits = torch.randn(5, 4100, device=device, requires_grad=True)
    with kernels.disabled():
        entropy = prediction_entropy(logits)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(grad.double(), gradient64(logits.detach().double(), False), rtol=1e-5, atol=1e-8)


@KINDS
def test_the_kernels_run_also_when_compiled(multi_label: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 50, device=device, requires_grad=True)
    ran, load = [], kernels.operators._load
    monkeypatch.setattr(kernels.operators, "_load", lambda name: (ran.append(name), load(name))[1])
    torch.compiler.reset()
    compiled = torch.compile(prediction_entropy, backend="aot_eager", fullgraph=True)(logits, multi_label=multi_label)
    (grad,) = torch.autograd.grad(compiled.square().sum(), logits)
    assert ran == ["prediction_entropy.forward", "prediction_entropy.backward"]
    eager = prediction_entropy(logits, multi_label=multi_label)
    assert torch.equal(eager, compiled)
    assert torch.equal(torch.autograd.grad(eager.square().sum(), logits)[0], grad)


@pytest.mark.parametrize("classes", [6, 4100])
@KINDS
def test_classes_that_are_ruled_out(classes: int, multi_label: bool, device: str) -> None:
    logits = torch.randn(3, classes, device=device)
    logits[0, 2:5], logits[1, 1:] = -math.inf, -math.inf
    logits[2, 0] = torch.finfo(torch.float32).min
    logits.requires_grad_()
    entropy = prediction_entropy(logits, multi_label=multi_label)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    with kernels.disabled():
        wanted = prediction_entropy(logits, multi_label=multi_label)
        (exact,) = torch.autograd.grad(wanted.sum(), logits)
    torch.testing.assert_close(entropy, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-7)
    assert grad.isfinite().all()


@pytest.mark.parametrize("classes", [6, 4100])
@KINDS
def test_not_a_number_stays_and_positions_left_out_leave_no_trace(classes: int, multi_label: bool, device: str) -> None:
    logits = torch.randn(4, classes, device=device)
    logits[1, 2], logits[2, 0] = math.nan, math.nan
    logits.requires_grad_()
    entropy = prediction_entropy(logits, multi_label=multi_label)
    assert entropy.isnan().tolist() == [False, True, True, False]
    mask = torch.tensor([True, False, False, True], device=device)
    loss = PredictionEntropyLoss(multi_label=multi_label)(logits, mask=mask)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert grad[1:3].eq(0).all()
    assert grad[[0, 3]].isfinite().all()
    assert grad[[0, 3]].ne(0).any(1).all()


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 4100), (1, 3000), (1, 2)], ids=str)
@KINDS
def test_few_positions(shape: tuple, multi_label: bool, device: str) -> None:
    logits = torch.randn(shape, device=device, requires_grad=True)
    entropy = prediction_entropy(logits, multi_label=multi_label)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(entropy.double(), entropy64(logits.double(), multi_label), rtol=1e-6, atol=1e-5)
    assert grad.shape == shape


def test_one_class_is_for_sigmoids(device: str) -> None:
    logits = torch.randn(9, 1, device=device, requires_grad=True)
    entropy = prediction_entropy(logits, multi_label=True)
    torch.testing.assert_close(entropy.double(), entropy64(logits.double(), True), rtol=1e-6, atol=1e-6)


@KINDS
def test_twice_is_bit_equal(multi_label: bool, device: str) -> None:
    logits = torch.randn(9, 5003, device=device, requires_grad=True)
    runs = []
    for _ in range(2):
        entropy = prediction_entropy(logits, multi_label=multi_label)
        runs.append((entropy, *torch.autograd.grad(entropy.sum(), logits)))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_double_backward_is_that_of_the_torch_code(device: str) -> None:
    logits = torch.randn(3, 6, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(prediction_entropy(logits).sum(), logits, create_graph=True)
    (twice,) = torch.autograd.grad(grad.square().sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(entropy64(exact, False).sum(), exact, create_graph=True)
    (wanted,) = torch.autograd.grad(grad.square().sum(), exact)
    torch.testing.assert_close(twice.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers() -> None:
    rows, classes = 43_000, 50_001
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    entropy = prediction_entropy(logits)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    for row in (0, rows // 2, rows - 1):
        exact = logits.detach()[row].double()
        assert entropy[row].item() == pytest.approx(entropy64(exact, False).item(), abs=1e-5)
        torch.testing.assert_close(grad[row].double(), gradient64(exact, False), rtol=0.01, atol=1e-9)
