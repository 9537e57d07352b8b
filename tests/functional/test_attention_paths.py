"""Every way to the entropy gives the numbers of a materialised float64 softmax; bands of keys; sampled rows."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional import _attention_nodes as nodes
from lightning_reg.functional import attention_entropy, attention_with_entropy
from lightning_reg.functional._scores import sampled_rows
from lightning_reg.functional.attention_entropy import (
    BLOCKS,
    ONE_NODE,
    attention_path,
    attention_tap,
    entropy_tap,
)


def qkv(rows: int = 5, keys: int = 7, heads: int = 4, key_heads: int = 2, dim: int = 6) -> tuple[Tensor, ...]:
    """Sharp float64 queries, keys and values."""
    shapes = (2, heads, rows, dim), (2, key_heads, keys, dim), (2, key_heads, keys, 3)
    return tuple((2 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes)


def materialised(q: Tensor, k: Tensor, v: Tensor, scale: float, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Output and entropy in nats from the whole matrix of scores; 0 for rows that see nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~shown, -math.inf)
    alive = shown.any(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    probs = torch.where(alive, scores, 0.0).softmax(-1) * alive
    logs = torch.where(probs > 0, probs, 1.0).log()
    return probs @ v, -(probs * logs).sum(-1)


def band(positions: Tensor, keys: int, causal: bool, window: int | None) -> Tensor:
    """Visible keys by a loop."""
    shown = torch.zeros(len(positions), keys, dtype=torch.bool)
    for row, place in enumerate(positions.tolist()):
        for key in range(keys):
            near = window is None or abs(place - key) < window
            shown[row, key] = near and (key <= place or not causal)
    return shown


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", ["kernel attention", "kernel entropy", "blocks"])
def test_ways_equal_the_materialised_softmax(way: str, causal: bool, window: int | None, offset: int) -> None:
    q, k, v = qkv()
    shown = band(torch.arange(offset, offset + 5), 7, causal, window)
    mask = torch.rand(2, 1, 5, 7) < 0.8
    mask[1, 0, 2] = False  # a row that sees nothing
    expected, expected_entropy = materialised(q, k, v, 0.4, shown & mask)
    if way == "kernel attention":
        output, entropy, largest = nodes.KernelAttention.apply(q, k, v, None, mask, 0.4, causal, window, offset, True)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * 0.4
        torch.testing.assert_close(largest, scores.masked_fill(~(shown & mask), 0.0).abs().amax(-1))
        torch.testing.assert_close(output, expected)
    elif way == "kernel entropy":
        *_, entropy = nodes.KernelEntropy.apply(q, k, None, mask, 0.4, causal, window, offset)
    else:
        *_, entropy, visible = entropy_tap(
            q, k, mask, scale=0.4, is_causal=causal, enable_gqa=True, window=window, query_offset=offset
        )
        assert torch.equal(visible, (shown & mask).sum(-1).expand(2, 4, 5))
    torch.testing.assert_close(entropy, expected_entropy)
    upstream, up_output = torch.randn_like(entropy), torch.randn_like(expected)
    total, wanted = (entropy * upstream).sum(), (expected_entropy * upstream).sum()
    if way == "kernel attention":
        total, wanted = total + (output * up_output).sum(), wanted + (expected * up_output).sum()
    inputs = (q, k, v) if way == "kernel attention" else (q, k)
    for ours, theirs in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_of_a_function_of_the_entropy() -> None:
    q, k, v = qkv(rows=3, keys=4, heads=2, key_heads=2, dim=2)
    shown = torch.ones(3, 4, dtype=torch.bool)

    def penalty(output: Tensor, entropy: Tensor) -> Tensor:
        total = entropy.square().sum() + output.pow(3).sum()
        return sum(grad.square().sum() for grad in torch.autograd.grad(total, (q, k), create_graph=True))

    ours = penalty(*nodes.KernelAttention.apply(q, k, v, None, None, 0.5, False, None, 0, False)[:2])
    theirs = penalty(*materialised(q, k, v, 0.5, shown))
    torch.testing.assert_close(ours, theirs)
    for mine, right in zip(torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(theirs, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("node", ["attention", "entropy"])
def test_second_derivatives_of_kernel_nodes(node: str) -> None:
    q, k, v = qkv(rows=3, keys=4, heads=2, key_heads=1, dim=2)
    v = v[..., :2]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        if node == "attention":
            return nodes.KernelAttention.apply(*inputs, None, None, 0.5, True, None, 0, False)[:2]
        return nodes.KernelEntropy.apply(*inputs, None, None, 0.5, True, None, 0)

    inputs = (q, k, v) if node == "attention" else (q, k)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_attention_twice_is_the_entropy(causal: bool) -> None:
    q, k, _ = (x.detach().float().requires_grad_() for x in qkv(rows=6, keys=6, heads=2, key_heads=2, dim=8))
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    shown = band(torch.arange(6), 6, causal, None)
    _, expected = materialised(*exact, exact[1], 0.3, shown)
    passed_q, passed_k, entropy = nodes.TwiceEntropy.apply(q, k, 0.3, causal)
    assert (entropy - expected).abs().max() < 1e-5
    upstream, other = torch.randn_like(expected), torch.randn_like(q)
    ours = torch.autograd.grad((entropy * upstream).sum() + (passed_q * other).sum() + passed_k.sum(), (q, k))
    theirs = torch.autograd.grad(
        (expected * upstream).sum() + (exact[0] * other).sum() + exact[1].sum(), exact
    )  # fmt: skip
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-4)


def test_torchs_attention_twice_has_second_derivatives() -> None:
    q, k, _ = (x.detach().float().requires_grad_() for x in qkv(rows=4, keys=4, heads=2, key_heads=2, dim=8))
    exact = [x.detach().double().requires_grad_() for x in (q, k)]

    def penalty(entropy: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first = torch.autograd.grad(entropy.square().sum(), (q, k), create_graph=True)
        return sum(grad.square().sum() for grad in first)

    ours = penalty(nodes.TwiceEntropy.apply(q, k, 0.3, False)[2], q, k)
    theirs = penalty(materialised(*exact, exact[1], 0.3, torch.ones(4, 4, dtype=torch.bool))[1], *exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    for mine, right in zip(torch.autograd.grad(ours, (q, k)), torch.autograd.grad(theirs, exact), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-3, atol=1e-4)


def test_cpu_takes_the_paths_it_always_took() -> None:
    q, k, v = (x.float() for x in qkv())
    assert attention_path(q, k, v) == ONE_NODE
    assert attention_path(q, k, None) == BLOCKS
    assert attention_path(q, k, v, torch.ones(5, 7, dtype=torch.bool)) == BLOCKS
    assert attention_path(q, k, v, window=3) == BLOCKS
    with kernels.disabled():
        assert attention_path(q, k, v) == ONE_NODE


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("window", [None, 2])
def test_window_and_offset_reach_output_and_entropy(window: int | None, offset: int) -> None:
    q, k, v = qkv(key_heads=4)
    shown = band(torch.arange(offset, offset + 5), 7, True, window)
    output, entropy = attention_with_entropy(q, k, v, is_causal=True, window=window, query_offset=offset)
    expected, expected_entropy = materialised(q, k, v, 6**-0.5, shown)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    alone = attention_entropy(q, k, is_causal=True, window=window, query_offset=offset, normalize=True)
    choice = shown.sum(-1).double()
    torch.testing.assert_close(alone, torch.where(choice > 1, expected_entropy / choice.clamp_min(2).log(), 0.0))


@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 1, 1, 7), (7,), (5, 1), (2, 4, 5, 7)])
def test_visible_keys_within_a_window_and_a_mask(shape: tuple[int, ...]) -> None:
    q, k, _ = qkv(key_heads=4)
    mask = torch.rand(shape) < 0.6
    *_, visible = entropy_tap(q, k, mask, is_causal=True, window=3, query_offset=2)
    shown = band(torch.arange(2, 7), 7, True, 3) & mask
    assert torch.equal(visible, shown.sum(-1).expand(2, 4, 5))


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_window_must_be_a_number_of_keys(window: object) -> None:
    q, k, _ = qkv(key_heads=4)
    with pytest.raises(ValueError, match="`window` must be an integer >= 1"):
        attention_entropy(q, k, window=window)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_rows", [None, 1, 12])
def test_sampled_rows_are_rows_of_the_whole(mask_rows: int | None, causal: bool) -> None:
    q, k, _ = qkv(rows=12, keys=12)
    mask = None if mask_rows is None else torch.rand(2, 1, mask_rows, 12) < 0.7
    rows = sampled_rows(12, 0.25, torch.tensor(0.9))
    assert rows.tolist() == [10, 2, 6]
    arguments = {"is_causal": causal, "enable_gqa": True}
    same_q, same_k, _, part, seen = entropy_tap(q, k, mask, rows=rows, **arguments)
    *_, whole, all_seen = entropy_tap(q, k, mask, **arguments)
    torch.testing.assert_close(part, whole[..., rows])
    if not isinstance(seen, int):
        assert torch.equal(seen, all_seen[..., rows])
    upstream = torch.randn_like(part)
    ours = torch.autograd.grad((part * upstream).sum() + same_q.sum() + same_k.sum(), (q, k))
    theirs = torch.autograd.grad((whole[..., rows] * upstream).sum() + q.sum() + k.sum(), (q, k))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("rows", [1, 5, 8, 197])
@pytest.mark.parametrize("fraction", [0.125, 0.3, 1.0])
def test_every_row_is_sampled_as_often(rows: int, fraction: float) -> None:
    counts = torch.zeros(rows)
    for turn in range(rows):
        drawn = sampled_rows(rows, fraction, torch.tensor((turn + 0.5) / rows))
        assert len(drawn.unique()) == len(drawn) == max(1, round(rows * fraction))
        counts[drawn] += 1
    assert torch.equal(counts, torch.full((rows,), float(len(drawn))))


def test_attention_beside_the_entropy_kernel_keeps_its_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(key_heads=4)
    seen = {}

    def attention(query: Tensor, key: Tensor, value: Tensor, **arguments: object) -> Tensor:
        seen.update(arguments)
        return F.scaled_dot_product_attention(query, key, value)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_tap(q, k, v, dropout_p=0.25, is_causal=True, attention=attention)
    assert seen["dropout_p"] == 0.25
    assert seen["is_causal"] is True
