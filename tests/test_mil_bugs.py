"""Seven ways in which public code gets the entropy of attention wrong: what its formula does, and what ours does."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer
from lightning_reg.losses import AttentionEntropyLoss
from lightning_reg.mil import ADAPTERS, MilAdapter
from tests import mil


def exact(scores: Tensor) -> float:
    """Entropy of softmax(scores) from the definition, in float64."""
    p = np.exp(scores.detach().double().numpy() - scores.max().item())
    p = p / p.sum()
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())


def zero() -> Tensor:
    return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("fill", [-math.inf, -1e9, torch.finfo(torch.float32).min], ids=str)
def test_1_padding_of_minus_infinity_is_no_nan(fill: float) -> None:
    """AEM's formula meets 0 * -inf where a framework fills its padding with -inf."""
    scores = torch.randn(1, 6, requires_grad=True)
    padded = torch.cat([scores, torch.full((1, 2), fill)], -1)
    public = torch.sum(F.softmax(padded, dim=-1) * F.log_softmax(padded, dim=-1))
    (slope,) = torch.autograd.grad(public, scores)
    assert bool(public.isnan()) == bool(slope.isnan().all()) == (fill == -math.inf)
    ours = -ADAPTERS["clam"].entropy((0, 0, 0, padded))
    (pull,) = torch.autograd.grad(ours.sum(), scores)
    assert ours.item() == pytest.approx(-exact(scores), abs=1e-6)
    without = -ADAPTERS["clam"].entropy((0, 0, 0, scores))
    torch.testing.assert_close(pull, torch.autograd.grad(without.sum(), scores)[0], atol=1e-7, rtol=1e-5)


def test_2_probabilities_are_not_softmaxed_again() -> None:
    """EAR applies softmax to what Hugging Face returns after its softmax."""
    scores = torch.zeros(1, 512, dtype=torch.float64)
    scores[0, :16] = torch.linspace(7.0, 9.0, 16)
    scores.requires_grad_()
    probs = scores.softmax(-1)
    twice = probs.softmax(-1)
    public = -(twice * twice.log()).sum()
    ours = MilAdapter(kind="auto").entropy(probs)
    assert math.log(512) - public.item() < 1e-3  # taken for uniform
    assert ours.item() == pytest.approx(exact(scores[0]), abs=1e-9)
    assert ours.item() < math.log(512) - 3
    slopes = [torch.autograd.grad(one.sum(), scores, retain_graph=True)[0].norm() for one in (public, ours)]
    assert slopes[1] > 100 * slopes[0]
    with pytest.raises(ValueError, match="already a distribution.*a softmax over it would be nearly uniform"):
        MilAdapter(kind="scores").entropy(probs)


class SelfAttention(nn.Module):
    """Masks its padding, and, as torchmil 1.0.2 does when asked for its attention, the others instead."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(6, 8)

    def forward(self, x: Tensor, mask: Tensor, return_att: bool = False) -> tuple[Tensor, Tensor | None]:
        q, k = self.qk(x).chunk(2, -1)
        scores = q @ k.transpose(-1, -2)
        hidden = mask[:, None] if return_att else ~mask[:, None]
        attention = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        return attention @ x, attention if return_att else None


def test_3_seeing_the_attention_does_not_change_the_model() -> None:
    model, (x, mask) = SelfAttention(), mil.bags([6, 4])
    x[1, 4:] = 9.0
    plain, _ = model(x, mask)
    asked, attention = model(x[1:], mask[1:], return_att=True)
    assert not torch.allclose(asked, plain[1:])
    assert (attention[..., :4] == 0).all()  # nothing but padding is looked at
    with regularize(model, [AttentionEntropyRegularizer(1.0)]) as reg:
        watched, _ = model(x, mask)
        reg.add(zero())
        value = reg.values["attention_entropy/value"].item()
    assert torch.equal(watched, plain)
    rows = []
    for bag, count in ((0, 6), (1, 4)):
        # a softmax over three axes says nothing of padded queries: all of them count
        scores = model.qk(x[bag])[:, :4] @ model.qk(x[bag, :count])[:, 4:].T
        rows += [exact(row) / math.log(count) for row in scores]
    assert value == pytest.approx(np.mean(rows), abs=1e-5)
    # and weights that lie on padding alone are refused
    with pytest.raises(ValueError, match="softmax ran over its padding"):
        MilAdapter(kind="probs", bag_axis=0).entropy(attention, mask=mask[1:])


def nystrom(iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nystrom's product of three matrices, its pseudo-inverse iterated, and its two landmark softmaxes."""
    q, k = 2 * torch.randn(2, 32, 8), 2 * torch.randn(2, 32, 8)
    q_landmarks, k_landmarks = (x.unflatten(1, (8, 4)).mean(2) for x in (q, k))
    first = (q @ k_landmarks.mT / 8**0.5).softmax(-1)
    middle = (q_landmarks @ k_landmarks.mT / 8**0.5).softmax(-1)
    third = (q_landmarks @ k.mT / 8**0.5).softmax(-1)
    inverse = middle.mT / (middle.abs().sum(-1).amax() * middle.abs().sum(-2).amax())
    for _ in range(iterations):
        product, eye = middle @ inverse, torch.eye(8)
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return first @ inverse @ third, first, third


@pytest.mark.parametrize("iterations", [6, 20])
@pytest.mark.parametrize("kind", ["auto", "probs"])
def test_4_products_of_nystrom_are_refused(kind: str, iterations: int) -> None:
    product, first, third = nystrom(iterations)
    assert ((product.sum(-1) - 1).abs().max() < 1e-3) == (iterations == 20)
    assert (product < 0).float().mean() > 0.1
    assert -(product * product.log()).sum(-1).mean() != -(product * product.log()).sum(-1).mean()  # NaN
    adapter = MilAdapter(kind=kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\d+% of the entries are negative.*Nystrom.*landmark softmaxes"):
        adapter.entropy(product)
    for landmarks in (first, third):
        rows = landmarks.flatten(0, 1)
        got = adapter.entropy(landmarks)
        torch.testing.assert_close(got.flatten(), -(rows * rows.log()).sum(-1), atol=1e-5, rtol=1e-5)


def test_5_weights_after_dropout_are_refused_and_heads_are_not_averaged_first() -> None:
    """``need_weights=True`` of nn.MultiheadAttention gives weights after dropout, averaged over the heads."""
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 4, dropout=0.5, batch_first=True), 3 * torch.randn(1, 6, 8)
    _, dropped = attention(x, x, x, need_weights=True, average_attn_weights=False)
    assert (dropped.sum(-1) - 1).abs().max() > 0.1
    for kind in ("auto", "probs"):
        with pytest.raises(ValueError, match="rows sum to .*as they are before dropout"):
            MilAdapter(1, kind=kind, bag_axis=0).entropy((None, dropped))  # type: ignore[arg-type]
    attention.dropout = 0.0
    _, mean = attention(x, x, x, need_weights=True)
    _, heads = attention(x, x, x, need_weights=True, average_attn_weights=False)
    ours = MilAdapter(kind="probs", bag_axis=0).entropy(heads).mean()
    of_the_mean = MilAdapter(kind="probs", bag_axis=0).entropy(mean).mean()
    assert ours < of_the_mean - 0.01
    rows = [exact(row.log()) for row in heads.flatten(0, 2)]
    assert ours.item() == pytest.approx(np.mean(rows), abs=1e-6)
    attention.dropout = 0.5
    with regularize(attention, [AttentionEntropyRegularizer(1.0, normalize=False)]) as reg:
        attention(x, x, x, need_weights=False)
        reg.add(zero())
        assert reg.values["attention_entropy/value"].item() == pytest.approx(ours.item(), abs=1e-6)


def test_6_maximizing_raises_the_entropy_and_a_constant_shift_does_nothing() -> None:
    """netcal's ConfidencePenalty returns +H to be minimised; another project adds H to every score."""
    torch.manual_seed(0)
    for weight, direction in ((1.0, -1), (0.0, 0)):
        model = mil.Clam()
        with torch.no_grad():
            model.score.weight.mul_(8)
        x, optimizer = torch.randn(7, 6), torch.optim.SGD(model.parameters(), lr=0.01)
        before = exact(model(x)[3])
        scores = model(x)[3]
        entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum()
        # the wrong sign lowers it; added to the scores it changes nothing
        loss = (
            weight * entropy
            if direction
            else (scores + entropy).softmax(-1).square().sum() - (scores.softmax(-1).square().sum())
        )
        loss.backward()
        optimizer.step()
        after = exact(model(x)[3])
        assert after < before - 1e-5 if direction else after == pytest.approx(before, abs=1e-6)
    model.zero_grad()
    before = exact(model(x)[3])
    with regularize(model, [AttentionEntropyRegularizer(1.0, adapter="clam")]) as reg:
        model(x)
        reg.add(zero()).backward()
        optimizer.step()
    assert exact(model(x)[3]) > before + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_7_small_constants_inside_the_logarithm_are_not_needed(dtype: torch.dtype) -> None:
    """MIL_BASELINE takes log(A + 1e-8), which half precision rounds to log(A): NaN at a weight of 0."""
    scores = torch.tensor([[20.0, 0.0, -20.0, 1.0]], requires_grad=True)
    weights = scores.softmax(-1).to(dtype)
    if dtype == torch.float16:
        public = -(weights * torch.log(weights + 1e-8)).sum()
        assert (weights == 0).any()
        assert not public.isfinite()
        assert not torch.autograd.grad(public, scores, retain_graph=True)[0].isfinite().all()
    ours = MilAdapter(kind="probs").entropy(weights)
    assert ours.isfinite().all()
    assert torch.autograd.grad(ours.sum(), scores)[0].isfinite().all()
    # in single precision the constant biases the entropy of long bags; ours has none
    uniform = torch.full((1, 10**6), 1e-6)
    biased = -(uniform * torch.log(uniform + 1e-8)).sum()
    assert abs(biased.item() - math.log(10**6)) > 5e-3
    assert MilAdapter(kind="probs").entropy(uniform).item() == pytest.approx(math.log(10**6), abs=1e-4)
    assert AttentionEntropyLoss().from_probs(uniform).item() == pytest.approx(-1.0, abs=1e-5)
