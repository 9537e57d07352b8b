"""The attention logits kernel against float64."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional import max_attention_logit
from lightning_reg.functional.attention_logits import logit_rows

STATISTICS = pytest.mark.parametrize("statistic", ["max", "logsumexp"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, in the interpreter


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, no kernel fails, and numpy takes infinities as silently as a GPU does."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: plain(*a, **k).fill_(math.nan))
    monkeypatch.setattr(kernels.operators, "_failed", {})
    with np.errstate(all="ignore"):
        yield
    assert not kernels.operators._failed


def reference(
    query: Tensor, key: Tensor, statistic: str, scale: float, is_causal: bool = False, attn_mask: Tensor | None = None
) -> Tensor:
    """One number of each row, from all scores in float64."""
    groups = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(groups, 1).mT * scale
    hidden = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if is_causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden |= ~attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
        hidden |= attn_mask <= -5e3
    if statistic == "max":
        return scores.masked_fill(hidden, 0.0).abs().amax(-1)
    z = scores.masked_fill(hidden, -math.inf).logsumexp(-1)
    return torch.where(hidden.all(-1), 0.0, z)


def check(query: Tensor, key: Tensor, statistic: str, scale: float | None = None, **arguments: Tensor | bool) -> None:
    """Compare rows and, with an upstream that is not 1, gradients of queries and keys."""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    rows, _ = logit_rows(query, key, statistic=statistic, scale=scale, enable_gqa=True, **arguments)
    exact = query.detach().double().requires_grad_(), key.detach().double().requires_grad_()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wanted = reference(*exact, statistic, scale, **arguments)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), wanted, rtol=2e-6, atol=1e-5)
    upstream = torch.randn(rows.shape, device=rows.device)
    got = torch.autograd.grad(rows, (query, key), upstream)
    eps = max(torch.finfo(query.dtype).eps, 1e-5)
    for grad, exact_grad in zip(got, torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
        torch.testing.assert_close(
            grad.double(), exact_grad, rtol=2 * eps, atol=2 * eps * float(exact_grad.abs().max())
        )


@STATISTICS
@DTYPES
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 3, 17, 33, 16), (1, 4, 2, 65, 65, 20), (1, 2, 1, 130, 70, 64), (2, 1, 1, 1, 1, 8), (1, 1, 1, 3, 150, 130)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_rows_equal_float64(shape: tuple, is_causal: bool, dtype: torch.dtype, statistic: str, device: str) -> None:
    batch, heads, key_heads, queries, keys, dim = shape
    query = (torch.randn(batch, heads, queries, dim, device=device) * 3).to(dtype)
    key = torch.randn(batch, key_heads, keys, dim, device=device).to(dtype)
    check(query, key, statistic, is_causal=is_causal)


@STATISTICS
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "half"])
@pytest.mark.parametrize("sizes", [(2, 1, 1, 70), (1, 3, 35, 70), (2, 3, 35, 1), (35, 70), (1, 1)], ids=str)
def test_masks_hide_keys(sizes: tuple, kind: str, is_causal: bool, statistic: str, device: str) -> None:
    query, key = torch.randn(2, 3, 35, 16, device=device) * 3, torch.randn(2, 3, 70, 16, device=device)
    shown = torch.rand(sizes, device=device) < 0.6
    shown[..., :1] = True
    if sizes[-2] > 1:
        shown[..., 4, :] = False  # a row that sees nothing
    mask = shown
    if kind != "boolean":
        bias = torch.randn(sizes, device=device) * 4
        mask = torch.where(shown, bias, torch.where(bias > 0, -math.inf, -1e4))
        mask = mask.bfloat16() if kind == "half" else mask
    check(query, key, statistic, is_causal=is_causal, attn_mask=mask)


@STATISTICS
def test_huge_logits_and_scales(statistic: str, device: str) -> None:
    query, key = torch.randn(1, 2, 40, 16, device=device), torch.randn(1, 2, 40, 16, device=device)
    for scale in (-3.0, 0.0, 1e-6):
        check(query, key, statistic, scale)
    for scale in (1e4, -1e3):
        rows, _ = logit_rows(query.bfloat16() * 10, key.bfloat16(), statistic=statistic, scale=scale)
        wanted = reference(query.bfloat16() * 10, key.bfloat16(), statistic, scale)
        torch.testing.assert_close(rows.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_equal_logits_share_the_gradient_of_the_maximum(is_causal: bool, device: str) -> None:
    query = torch.randint(-2, 3, (2, 4, 70, 4), device=device).float()
    key = torch.randint(-2, 3, (2, 2, 90, 4), device=device).float()
    check(query, key, "max", 0.5, is_causal=is_causal)
    check(query.half(), key.half(), "max", -0.5, is_causal=is_causal)


def test_rows_below_a_bound_get_nothing(device: str) -> None:
    query = torch.randn(1, 2, 150, 16, device=device, requires_grad=True)
    key = torch.randn(1, 2, 100, 16, device=device, requires_grad=True)
    rows, _ = logit_rows(query, key, statistic="max")
    for bound in (float(rows.detach().flatten().sort().values[-3]), 1e3):
        got = torch.autograd.grad((rows - bound).relu().square().sum(), (query, key), retain_graph=True)
        exact = query.detach().double().requires_grad_(), key.detach().double().requires_grad_()
        wanted = reference(*exact, "max", 0.25)
        wanted = torch.autograd.grad((wanted - bound).relu().square().sum(), exact)
        for grad, exact_grad in zip(got, wanted, strict=True):
            torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)
    assert all(grad.eq(0).all() for grad in got)


@STATISTICS
def test_gradients_smaller_than_half_precision(statistic: str, device: str) -> None:
    query = torch.randn(1, 1, 300, 16, device=device).half().requires_grad_()
    key = torch.randn(1, 1, 70, 16, device=device).half().requires_grad_()
    rows, _ = logit_rows(query, key, statistic=statistic)
    # that of a key sums over 300 rows, each of which would be rounded to multiples of 6e-8
    got = torch.autograd.grad(rows.sum() * 3e-6, key)[0].double()
    exact = query.detach().double(), key.detach().double().requires_grad_()
    wanted = torch.autograd.grad(reference(*exact, statistic, 0.25).sum() * 3e-6, exact[1])[0]
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=4e-8)


def test_twice_is_bit_equal(device: str) -> None:
    query, key = torch.randn(2, 4, 100, 16, device=device), torch.randn(2, 2, 100, 16, device=device)
    for statistic in ("max", "logsumexp"):
        runs = []
        for _ in range(2):
            leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
            rows, _ = logit_rows(*leaves, statistic=statistic, is_causal=True, enable_gqa=True)
            runs.append((rows, *torch.autograd.grad(rows.square().sum(), leaves)))
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_learned_bias_and_second_derivatives_are_those_of_the_torch_code(device: str) -> None:
    query, key = torch.randn(1, 1, 5, 8, device=device), torch.randn(1, 1, 5, 8, device=device)
    bias = torch.randn(5, 5, device=device, requires_grad=True)
    leaves = (query.requires_grad_(), key.requires_grad_(), bias)
    rows, _ = logit_rows(query, key, bias, statistic="logsumexp")
    got = torch.autograd.grad(rows.square().sum(), leaves, create_graph=True)
    twice = torch.autograd.grad(sum(grad.square().sum() for grad in got), leaves)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    rows = reference(exact[0], exact[1], "logsumexp", 8**-0.5, attn_mask=exact[2])
    wanted = torch.autograd.grad(rows.square().sum(), exact, create_graph=True)
    wanted_twice = torch.autograd.grad(sum(grad.square().sum() for grad in wanted), exact)
    for grad, exact_grad in zip((*got, *twice), (*wanted, *wanted_twice), strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-3, atol=1e-4)


def test_a_negative_score_counts_by_its_size(device: str) -> None:
    query = torch.ones(1, 1, 1, 4, device=device)
    key = torch.tensor([[[[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]]], device=device)
    assert max_attention_logit(query, key).item() == 2
    assert max_attention_logit(query, key, scale=-1.0).item() == 4


@STATISTICS
def test_what_is_not_finite_stays_so(statistic: str, device: str) -> None:
    query, key = torch.randn(1, 1, 4, 16, device=device), torch.randn(1, 1, 70, 16, device=device)
    query[0, 0, 1, 3] = math.nan
    query[0, 0, 2, 3] = math.inf
    key[..., 3] = key[..., 3].abs() + 1
    rows, _ = logit_rows(query, key, statistic=statistic)
    assert rows.isnan().flatten().tolist() == [False, True, False, False]
    assert rows.isinf().flatten().tolist() == [False, False, True, False]
    key[0, 0, 66, 0] = math.nan
    rows, _ = logit_rows(query, key, statistic=statistic)
    assert not rows.isfinite().any()
    rows, _ = logit_rows(query, key, statistic=statistic, is_causal=True)
    assert rows.isnan().flatten().tolist() == [False, True, False, False]


@STATISTICS
@pytest.mark.parametrize("sizes", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)], ids=str)
def test_empty_axes(sizes: tuple, statistic: str, device: str) -> None:
    batch, heads, queries, keys = sizes
    query, key = torch.randn(batch, heads, queries, 8, device=device), torch.randn(batch, heads, keys, 8, device=device)
    rows, _ = logit_rows(query, key, statistic=statistic)
    assert rows.shape == (batch, heads, queries)
    assert rows.eq(0).all()


@STATISTICS
def test_strides_are_followed(statistic: str, device: str) -> None:
    packed = torch.randn(2, 50, 3, 3, 16, device=device)  # as timm packs queries, keys and values
    query, key, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    check(query, key, statistic)
    check(query.mT.contiguous().mT, key[:, :, ::2], statistic)
    check(query[:, :1].expand(2, 3, 50, 16), key[:1].expand(2, 3, 50, 16), statistic)
    for flat in ((0, 0), (0,)):  # fewer axes
        q, k = query[flat], key[flat]
        rows, _ = logit_rows(q, k, statistic=statistic)
        wanted = reference(query, key, statistic, 0.25)[flat]
        torch.testing.assert_close(rows.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_kernel_runs_also_when_compiled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 2, 20, 16, device=device), torch.randn(1, 2, 20, 16, device=device)
    ran, load = [], kernels.operators._load
    monkeypatch.setattr(kernels.operators, "_load", lambda name: (ran.append(name), load(name))[1])
    eager = max_attention_logit(query, key)
    assert ran == ["attention_logits.forward"]
    torch.compiler.reset()
    compiled = torch.compile(max_attention_logit, backend="aot_eager", fullgraph=True)(query, key)
    assert ran == ["attention_logits.forward"] * 2
    assert torch.equal(eager, compiled)


@pytest.mark.parametrize(
    ("query", "key", "reason"),
    [
        (torch.zeros(1, 1, 2, 8).double(), torch.zeros(1, 1, 2, 8).double(), "no kernel for torch.float64"),
        (torch.zeros(1, 1, 2, 8).bfloat16(), torch.zeros(1, 1, 2, 8), "its keys torch.float32"),
        (torch.zeros(1, 1, 2, 300), torch.zeros(1, 1, 2, 300), "head dim is 300"),
    ],
    ids=["float64", "mixed", "wide"],
)
def test_what_it_cannot_do_is_done_in_torch_with_a_warning(
    query: Tensor, key: Tensor, reason: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.operators, "_warned", set())
    with pytest.warns(UserWarning, match=reason):
        rows = max_attention_logit(query.to(device), key.to(device))
    assert rows.eq(0).all()


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers() -> None:
    # (batch, heads, tokens, dim) with 2.2e9 numbers in queries; the last sample is looked at
    query = torch.empty(66_000, 1, 256, 128, dtype=torch.bfloat16, device="cuda").normal_()
    key = torch.randn(66_000, 1, 3, 128, dtype=torch.bfloat16, device="cuda")
    rows = max_attention_logit(query, key)
    wanted = reference(query[-3:], key[-3:], "max", 128**-0.5)
    torch.testing.assert_close(rows[-3:].double(), wanted, rtol=2e-6, atol=1e-5)
