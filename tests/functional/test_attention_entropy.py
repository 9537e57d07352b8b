"""Attention entropy against row-by-row float64 computations and hand-worked numbers."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_reg.functional import (
    attention_entropy,
    attention_entropy_from_probs,
    attention_entropy_from_scores,
    attention_with_entropy,
)
from lightning_reg.functional.attention_entropy import entropy_tap, normalize_entropy, scores_tap

# the package exports a function of the module's name
module = sys.modules["lightning_reg.functional._scores"]

LOG2, LOG3 = math.log(2), math.log(3)
# a fair coin and a biased one: H(1/2, 1/4, 1/4) = 1.5 log 2
HALF_QUARTER_QUARTER = 1.5 * LOG2


def row_entropy(scores: np.ndarray, shown: np.ndarray, top_k: int | None = None) -> float:
    """Entropy of softmax over the shown scores of one row."""
    kept = np.sort(scores[shown].astype(np.float64))[::-1][:top_k]
    if kept.size == 0:
        return 0.0
    weights = np.exp(kept - kept.max())
    weights /= weights.sum()
    return float(-sum(w * math.log(w) for w in weights if w > 0))


def reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    normalize: bool = False,
    top_k: int | None = None,
) -> np.ndarray:
    """Loop over (batch, heads, queries) in float64; key heads are shared in groups."""
    q, k = query.detach().double().numpy(), key.detach().double().numpy()
    batch, heads, rows, dim = q.shape
    group = heads // k.shape[1]
    full = None if mask is None else mask.detach().expand(batch, heads, rows, k.shape[2])
    result = np.zeros((batch, heads, rows))
    for b, h, m in np.ndindex(*result.shape):
        scores = k[b, h // group] @ q[b, h, m] * (dim**-0.5 if scale is None else scale)
        shown = np.ones(len(scores), dtype=bool)
        if full is not None and full.dtype == torch.bool:
            shown = full[b, h, m].numpy()
        elif full is not None:
            bias = full[b, h, m].double().numpy()
            shown = bias > -5000
            scores = scores + bias
        if causal:
            shown = shown & (np.arange(len(scores)) <= m)
        entropy = row_entropy(scores, shown, top_k)
        visible = min(shown.sum(), top_k or len(scores))
        result[b, h, m] = entropy / math.log(visible) if normalize and visible > 1 else 0.0 if normalize else entropy
    return result


def qk(batch: int, heads: int, rows: int, keys: int, dim: int, key_heads: int | None = None, **kwargs):
    query = torch.randn(batch, heads, rows, dim, **kwargs) * 2
    return query, torch.randn(batch, key_heads or heads, keys, dim, **kwargs) * 2


def close(actual: Tensor, expected: np.ndarray, **kwargs) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected), **({"rtol": 1e-5, "atol": 2e-6} | kwargs))


# --- values ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1, 2, 4), (2, 3, 5, 7, 8), (3, 1, 17, 17, 5), (1, 2, 9, 4, 1), (2, 2, 1, 33, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("normalize", [False, True], ids=["nats", "normalised"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_entropy_equals_float64_rows(shape: tuple[int, ...], normalize: bool, causal: bool) -> None:
    query, key = qk(*shape)
    actual = attention_entropy(query, key, is_causal=causal, normalize=normalize)
    assert actual.shape == query.shape[:3]
    assert actual.dtype == torch.float32
    close(actual, reference(query, key, causal=causal, normalize=normalize))


def padding(dtype: torch.dtype | None = None, fill: float = -math.inf) -> Tensor:
    """Keys 5 and 6 of the second sample are padding; boolean, or additive with ``fill``."""
    shown = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    shown[1, ..., 5:] = False
    return shown if dtype is None else torch.zeros(2, 1, 1, 7, dtype=dtype).masked_fill(~shown, fill)


MASKS = {
    "key_padding": padding(),
    "minus_inf": padding(torch.float32),
    "finfo_min": padding(torch.float32, torch.finfo(torch.float32).min),
    "minus_1e9": padding(torch.float32, -1e9),
    "minus_1e4": padding(torch.float32, -1e4),
    "full_boolean": torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4,
    "rows_only": torch.rand(5, 1, generator=torch.Generator().manual_seed(1)) > 0.3,
    "keys_only": torch.tensor([True, False, True, True, False, True, True]),
    "float_bias": torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(1)),
    "head_bias": torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("normalize", [False, True], ids=["nats", "normalised"])
def test_masks_leave_the_visible_keys(name: str, causal: bool, normalize: bool) -> None:
    query, key = qk(2, 3, 5, 7, 4)
    actual = attention_entropy(query, key, attn_mask=MASKS[name], is_causal=causal, normalize=normalize)
    close(actual, reference(query, key, MASKS[name], causal=causal, normalize=normalize))


def test_all_fills_of_a_mask_agree() -> None:
    query, key = qk(2, 3, 5, 7, 4)
    results = [
        attention_entropy(query, key, attn_mask=MASKS[name], normalize=True)
        for name in ("key_padding", "minus_inf", "finfo_min", "minus_1e9", "minus_1e4")
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
def test_a_fill_added_to_scores_still_hides_its_key(fill: float) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.5], [-3.0, 0.0, -2.0]])
    masked = scores + torch.tensor([0.0, 0.0, fill])
    expected = attention_entropy_from_scores(scores[:, :2], normalize=True)
    torch.testing.assert_close(attention_entropy_from_scores(masked, normalize=True), expected)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_queries_share_their_key_head(key_heads: int) -> None:
    query, key = qk(2, 4, 3, 6, 5, key_heads)
    actual = attention_entropy(query, key, enable_gqa=True, is_causal=True)
    close(actual, reference(query, key, causal=True))
    repeated = key.repeat_interleave(4 // key_heads, 1)
    torch.testing.assert_close(actual, attention_entropy(query, repeated, is_causal=True))


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_scale_multiplies_the_scores(scale: float) -> None:
    query, key = qk(1, 2, 3, 4, 5)
    close(attention_entropy(query, key, scale=scale), reference(query, key, scale=scale))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 3, 4), (2, 1, 2, 2)], ids=lambda lead: f"{len(lead) + 2}d")
def test_any_number_of_leading_axes(lead: tuple[int, ...]) -> None:
    query, key = torch.randn(*lead, 5, 4), torch.randn(*lead, 6, 4)
    actual = attention_entropy(query, key, is_causal=True, normalize=True)
    assert actual.shape == (*lead, 5)
    flat = attention_entropy(query.reshape(-1, 1, 5, 4), key.reshape(-1, 1, 6, 4), is_causal=True, normalize=True)
    torch.testing.assert_close(actual.reshape(-1, 1, 5), flat)


def test_three_axes_with_gqa_are_heads() -> None:
    query, key = torch.randn(4, 5, 3), torch.randn(2, 6, 3)
    mask = torch.rand(4, 5, 6) > 0.3
    actual = attention_entropy(query, key, enable_gqa=True, attn_mask=mask)
    torch.testing.assert_close(actual, attention_entropy(query[None], key[None], enable_gqa=True, attn_mask=mask)[0])


def test_three_axes_with_a_mask_for_each_sample() -> None:
    query, key, mask = torch.randn(4, 5, 3), torch.randn(4, 6, 3), torch.rand(4, 5, 6) > 0.3
    expected = attention_entropy(query[:, None], key[:, None], attn_mask=mask[:, None])[:, 0]
    torch.testing.assert_close(attention_entropy(query, key, attn_mask=mask), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_scores_and_probabilities_take_any_key_axis(dim: int) -> None:
    scores = torch.randn(4, 5, 6) * 3
    last = scores.movedim(dim, -1)
    expected = np.array([[row_entropy(row.numpy(), np.ones(len(row), bool)) for row in rows] for rows in last])
    close(attention_entropy_from_scores(scores, dim=dim), expected)
    close(attention_entropy_from_probs(scores.softmax(dim), dim=dim), expected)


def test_hand_worked_numbers() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    nats = torch.tensor([HALF_QUARTER_QUARTER, 0.0, 2 * LOG2])
    torch.testing.assert_close(attention_entropy_from_probs(probs), nats)
    torch.testing.assert_close(attention_entropy_from_scores(probs.log()), nats)
    torch.testing.assert_close(attention_entropy_from_probs(probs, normalize=True), nats / (2 * LOG2))
    query = torch.tensor([[[[LOG2]]]])  # scores log 2, 0, 0: probabilities 1/2, 1/4, 1/4
    key = torch.tensor([[[[1.0], [0.0], [0.0]]]])
    torch.testing.assert_close(attention_entropy(query, key), torch.tensor([[[HALF_QUARTER_QUARTER]]]))


@pytest.mark.parametrize("keys", [2, 3, 64, 1000])
def test_uniform_attention_reaches_log_keys(keys: int) -> None:
    query, key = torch.zeros(1, 1, 2, 4), torch.randn(1, 1, keys, 4)
    torch.testing.assert_close(attention_entropy(query, key), torch.full((1, 1, 2), math.log(keys)))
    torch.testing.assert_close(attention_entropy(query, key, normalize=True), torch.ones(1, 1, 2))


def test_one_visible_key_has_no_entropy() -> None:
    query, key = qk(1, 1, 3, 1, 4)
    for normalize in (False, True):
        assert attention_entropy(query, key, normalize=normalize).tolist() == [[[0.0, 0.0, 0.0]]]
        assert attention_entropy_from_scores(torch.randn(2, 1), normalize=normalize).tolist() == [0.0, 0.0]
        assert attention_entropy_from_probs(torch.ones(2, 1), normalize=normalize).tolist() == [0.0, 0.0]


def test_no_keys_and_no_rows_give_empty_or_zero() -> None:
    assert attention_entropy(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 0, 5)).eq(0).all()
    assert attention_entropy(torch.randn(0, 3, 4, 5), torch.randn(0, 3, 6, 5)).shape == (0, 3, 4)
    assert attention_entropy(torch.randn(2, 3, 0, 5), torch.randn(2, 3, 6, 5)).shape == (2, 3, 0)


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9, None], ids=str)
def test_rows_that_see_nothing_are_zero_with_finite_gradient(fill: float | None) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    given = mask if fill is None else torch.zeros(3, 4).masked_fill(~mask, fill)
    query, key = (tensor.requires_grad_() for tensor in qk(1, 2, 3, 4, 5))
    for normalize in (False, True):
        entropy = attention_entropy(query, key, attn_mask=given, normalize=normalize)
        assert (entropy[:, :, 1] == 0).all()
        for_query, for_key = torch.autograd.grad(entropy.sum(), (query, key))
        assert for_query[:, :, 1].eq(0).all()
        assert for_query[:, :, 0].ne(0).any()
        assert for_key.isfinite().all()


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4], ids=str)
def test_score_rows_that_see_nothing_are_zero_with_finite_gradient(fill: float) -> None:
    scores = torch.randn(3, 4)
    scores[1] = fill
    scores.requires_grad_()
    entropy = attention_entropy_from_scores(scores, normalize=True)
    (gradient,) = torch.autograd.grad(entropy.sum(), scores)
    assert entropy[1] == 0
    assert gradient.isfinite().all()
    assert gradient[1].eq(0).all()
    assert gradient[0].ne(0).any()


def test_probability_rows_that_see_nothing_are_zero() -> None:
    probs = torch.tensor([[0.0, 0.0], [0.5, 0.5]], requires_grad=True)
    entropy = attention_entropy_from_probs(probs, mask=torch.tensor([[False], [True]]), normalize=True)
    assert entropy.tolist() == [0.0, 1.0]
    entropy.sum().backward()
    assert probs.grad.isfinite().all()


def test_hidden_values_do_not_matter() -> None:
    query, key = qk(1, 2, 3, 6, 4)
    poisoned = key.clone()
    poisoned[:, :, 4:] = math.nan
    mask = torch.tensor([True] * 4 + [False] * 2)
    expected = attention_entropy(query, key[:, :, :4], normalize=True)
    torch.testing.assert_close(attention_entropy(query, poisoned, attn_mask=mask, normalize=True), expected)
    scores, probs = torch.randn(3, 6), torch.rand(3, 6)
    scores[:, 4:], probs[:, :4], probs[:, 4:] = math.nan, probs[:, :4] / probs[:, :4].sum(-1, keepdim=True), math.nan
    torch.testing.assert_close(
        attention_entropy_from_scores(scores, mask=mask), attention_entropy_from_scores(scores[:, :4])
    )
    torch.testing.assert_close(
        attention_entropy_from_probs(probs, mask=mask), attention_entropy_from_probs(probs[:, :4])
    )


def test_nan_in_visible_places_stays_visible() -> None:
    query, key = qk(1, 1, 2, 3, 4)
    query[0, 0, 0, 0] = math.nan
    entropy = attention_entropy(query, key)
    assert entropy.isnan().tolist() == [[[True, False]]]
    assert attention_entropy_from_scores(torch.tensor([[math.nan, 0.0], [0.0, 0.0]])).isnan().tolist() == [True, False]


# --- top-k and AEM's public code -------------------------------------------------------------------------------------


def test_aem_value_is_minus_the_entropy() -> None:
    scores = torch.randn(1, 1, 50) * 3
    div = torch.sum(torch.softmax(scores, -1) * torch.log_softmax(scores, -1))
    torch.testing.assert_close(-attention_entropy_from_scores(scores).sum(), div)
    many = torch.randn(8, 1, 50)
    div = torch.sum(torch.softmax(many, -1) * torch.log_softmax(many, -1)) / many.shape[0]
    torch.testing.assert_close(-attention_entropy_from_scores(many).mean(), div)


@pytest.mark.parametrize("top_k", [2, 5, 49, 50, 100])
def test_aem_top_k_value_and_gradient(top_k: int) -> None:
    scores = (torch.randn(1, 1, 50, dtype=torch.float64) * 2).requires_grad_()
    values = torch.softmax(scores, -1).topk(min(top_k, 50))[0]
    values = values / values.sum()
    expected = -torch.sum(values * values.log())
    actual = attention_entropy_from_scores(scores, top_k=top_k).sum()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, scores)[0] for value in (actual, expected)))


@pytest.mark.parametrize("top_k", [2, 3, 7])
@pytest.mark.parametrize("name", ["key_padding", "full_boolean", "float_bias"])
def test_top_k_from_queries_and_keys(top_k: int, name: str) -> None:
    query, key = qk(2, 3, 5, 7, 4)
    actual = attention_entropy(query, key, attn_mask=MASKS[name], top_k=top_k, normalize=True)
    close(actual, reference(query, key, MASKS[name], top_k=top_k, normalize=True))
    scores = query @ key.mT / 2
    if MASKS[name].dtype == torch.bool:
        other = attention_entropy_from_scores(scores, mask=MASKS[name], top_k=top_k, normalize=True)
    else:
        other = attention_entropy_from_scores(scores + MASKS[name], top_k=top_k, normalize=True)
    torch.testing.assert_close(actual, other)


def test_top_k_that_underflows_is_finite() -> None:
    scores = torch.tensor([[0.0, -200.0, -300.0]], requires_grad=True)  # AEM's form: log(0) -> NaN
    entropy = attention_entropy_from_scores(scores, top_k=2)
    entropy.sum().backward()
    assert entropy.item() == 0
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_padding_gives_no_nan_where_the_public_formula_does(fill: float) -> None:
    scores = torch.randn(1, 1, 6)
    padded = torch.cat([scores, torch.full((1, 1, 3), fill)], -1).requires_grad_()
    public = torch.sum(torch.softmax(padded, -1) * torch.log_softmax(padded, -1))
    assert public.isnan().item() is (fill == -math.inf)
    entropy = attention_entropy_from_scores(padded)
    (gradient,) = torch.autograd.grad(entropy.sum(), padded)
    torch.testing.assert_close(entropy, attention_entropy_from_scores(scores))
    assert gradient.isfinite().all()
    assert gradient[..., 6:].eq(0).all()


# --- gradients -------------------------------------------------------------------------------------------------------

D = {"dtype": torch.float64}


@pytest.mark.parametrize("normalize", [False, True], ids=["nats", "normalised"])
@pytest.mark.parametrize(
    ("mask", "causal", "key_heads", "top_k"),
    [
        (None, False, 4, None),
        (None, True, 2, None),
        (torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(2)) > 0.4, False, 4, None),
        (torch.tensor([0.0, -math.inf, 0.3, 0.1, -1e9], **D), False, 1, None),
        (None, True, 4, 2),
    ],
    ids=["plain", "causal_gqa", "boolean", "additive_mqa", "causal_top2"],
)
def test_gradients_of_query_and_key(mask, causal: bool, key_heads: int, top_k: int | None, normalize: bool) -> None:
    query, key = (tensor.requires_grad_() for tensor in qk(2, 4, 3, 5, 3, key_heads, **D))

    def function(q: Tensor, k: Tensor) -> Tensor:
        return attention_entropy(
            q, k, attn_mask=mask, is_causal=causal, enable_gqa=True, top_k=top_k, normalize=normalize
        )

    assert torch.autograd.gradcheck(function, (query, key))


@pytest.mark.parametrize(
    "shape",
    [(5,), (3, 5), (1, 5), (3, 1), (4, 3, 5), (4, 1, 1), (1, 1, 3, 5), (2, 4, 3, 5), (2, 1, 1, 5)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_learned_bias_receives_its_gradient(shape: tuple[int, ...]) -> None:
    query, key = qk(2, 4, 3, 5, 3, **D)
    bias = torch.randn(*shape, **D).requires_grad_()
    query.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, b: attention_entropy(q, key, attn_mask=b), (query, bias))


@pytest.mark.parametrize(
    "shape", [(3, 5), (4, 3, 5), (3, 1, 3, 5), (1, 4, 3, 5), (2, 1, 1, 3, 5), (2, 3, 4, 3, 5)], ids=str
)
def test_learned_bias_of_five_axes_receives_its_gradient(shape: tuple[int, ...]) -> None:
    query, key = torch.randn(2, 3, 4, 3, 2, **D), torch.randn(2, 3, 4, 5, 2, **D)
    bias = torch.randn(*shape, **D).requires_grad_()
    function = lambda b: attention_entropy(query, key, attn_mask=b)  # noqa: E731
    assert torch.autograd.gradcheck(function, bias, fast_mode=True)


@pytest.mark.parametrize("top_k", [None, 3], ids=["all", "top3"])
def test_gradients_of_scores_and_probabilities(top_k: int | None) -> None:
    scores = torch.randn(2, 3, 5, **D).requires_grad_()
    mask = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda s: attention_entropy_from_scores(s, mask=mask, top_k=top_k, normalize=True, dim=2), scores
    )
    assert torch.autograd.gradcheck(lambda s: scores_tap(s, dim=1, top_k=top_k)[:2], scores)
    assert torch.autograd.gradcheck(lambda s: attention_entropy_from_probs(s.softmax(-1)), scores)


def test_gradients_of_gradients() -> None:
    query, key = (tensor.requires_grad_() for tensor in qk(1, 2, 3, 4, 2, **D))
    mask = torch.tensor([True, False, True, True])
    function = lambda q, k: attention_entropy(q, k, attn_mask=mask, is_causal=True)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (query, key))
    scores = torch.randn(2, 4, **D).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s: scores_tap(s)[:2], scores)


def test_gradient_is_the_closed_form() -> None:
    scores = torch.randn(4, 6, **D).requires_grad_()
    entropy = attention_entropy_from_scores(scores)
    upstream = torch.tensor([1.0, -2.0, 0.0, 1e3], **D)  # not 1
    (gradient,) = torch.autograd.grad(entropy, scores, upstream)
    p = scores.detach().softmax(-1).numpy()
    h = -(p * np.log(p)).sum(-1, keepdims=True)
    torch.testing.assert_close(gradient, torch.as_tensor(-p * (np.log(p) + h)) * upstream[:, None])


def test_tap_passes_values_through_and_joins_gradients() -> None:
    query, key = (tensor.requires_grad_() for tensor in qk(2, 2, 3, 5, 4, **D))
    bias = torch.randn(3, 5, **D).requires_grad_()
    value = torch.randn(2, 2, 5, 4, **D)
    q, k, b, entropy, visible = entropy_tap(query, key, bias)
    assert torch.equal(q, query)
    assert torch.equal(k, key)
    assert torch.equal(b, bias)
    assert visible.eq(5).all()
    output = F.scaled_dot_product_attention(q, k, value, attn_mask=b)
    joined = torch.autograd.grad(output.square().sum() + 3 * entropy.sum(), (query, key, bias))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    task = torch.autograd.grad(output.square().sum(), (query, key, bias))
    term = torch.autograd.grad(3 * attention_entropy(query, key, attn_mask=bias).sum(), (query, key, bias))
    for actual, first, second in zip(joined, task, term, strict=True):
        torch.testing.assert_close(actual, first + second)


def test_scores_tap_is_softmax_with_a_second_output() -> None:
    scores = torch.randn(2, 3, 5, **D).requires_grad_()
    upstream = torch.randn(2, 3, 5, **D)
    probs, entropy, visible = scores_tap(scores)
    assert torch.equal(probs, torch.softmax(scores, -1))
    assert visible.eq(5).all()
    (joined,) = torch.autograd.grad([probs, entropy.sum()], scores, [upstream, torch.tensor(2.0, **D)])
    (task,) = torch.autograd.grad(torch.softmax(scores, -1), scores, upstream)
    (term,) = torch.autograd.grad(2 * attention_entropy_from_scores(scores).sum(), scores)
    torch.testing.assert_close(joined, task + term)
    (alone,) = torch.autograd.grad(scores_tap(scores)[0], scores, upstream)
    assert torch.equal(alone, task)


def test_scores_tap_keeps_the_dtype_that_softmax_would_have() -> None:
    scores = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    probs, entropy, _ = scores_tap(scores)
    assert (probs.dtype, entropy.dtype) == (torch.bfloat16, torch.float32)
    probs, entropy, _ = scores_tap(scores, dtype=torch.float32)
    assert torch.equal(probs, torch.softmax(scores, -1, dtype=torch.float32))
    (entropy.sum() + probs.square().sum()).backward()
    assert scores.grad.dtype == torch.bfloat16


WITH_ENTROPY = {
    # small attention is one node, the rest torch's attention behind a tap
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "mask": {"attn_mask": torch.ones(3, 5, dtype=torch.bool).tril(1)},
    "bias": {"attn_mask": torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)},
}


@pytest.mark.parametrize("block", [2**17, 1], ids=["small", "large"])
@pytest.mark.parametrize("case", WITH_ENTROPY)
@pytest.mark.parametrize("shape", [(2, 4), (2, 2), (4,), ()], ids=["gqa", "4d", "3d", "2d"])
def test_output_and_entropy_share_exact_gradients(
    case: str, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's attention and the entropy of a plain softmax, both differentiated by autograd in float64."""
    monkeypatch.setattr(module, "BLOCK_SCORES", block)
    arguments, groups = WITH_ENTROPY[case], (*shape[:1], 2) if len(shape) == 2 else shape
    inputs = [
        torch.randn(*lead, rows, dim, dtype=torch.float64, requires_grad=True)
        for lead, rows, dim in ((shape, 3, 4), (groups, 5, 4), (groups, 5, 6))
    ]
    gqa = shape == (2, 4)
    output, entropy = attention_with_entropy(*inputs, **arguments, enable_gqa=gqa)
    expected = F.scaled_dot_product_attention(*inputs, **arguments, enable_gqa=gqa)
    keys = inputs[1].repeat_interleave(2, 1) if gqa else inputs[1]
    scores = inputs[0] @ keys.mT * arguments.get("scale", 0.5)
    mask = torch.ones(3, 5, dtype=torch.bool).tril() if "is_causal" in arguments else arguments.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    log_p = scores.log_softmax(-1)
    wanted = -torch.where(log_p.isfinite(), log_p.exp() * log_p.nan_to_num(neginf=0.0), 0.0).sum(-1)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn_like(output), torch.randn_like(entropy)
    for ours, theirs in zip(
        torch.autograd.grad([output, entropy], inputs, upstream),
        torch.autograd.grad([expected, wanted], inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_small_attention_passes_gradcheck_of_both_orders(is_causal: bool) -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_with_entropy(query, key, value, is_causal=is_causal, enable_gqa=True)

    inputs = [
        torch.randn(2, heads, rows, dim, dtype=torch.float64, requires_grad=True)
        for heads, rows, dim in ((4, 3, 2), (2, 4, 2), (2, 4, 3))
    ]
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


def test_gradient_vanishes_on_a_collapsed_head() -> None:
    scores = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    attention_entropy_from_scores(scores).sum().backward()
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0]]


# --- precision, layout, blocks, compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_exact_for_its_inputs(dtype: torch.dtype) -> None:
    query, key = (tensor.to(dtype).requires_grad_() for tensor in qk(2, 4, 5, 7, 8, 2))
    entropy = attention_entropy(query, key, enable_gqa=True)
    assert entropy.dtype == torch.float32
    close(entropy, reference(query, key))
    entropy.sum().backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in (query, key)]
    attention_entropy(*doubles, enable_gqa=True).sum().backward()
    for half, double in zip((query, key), doubles, strict=True):
        assert half.grad.dtype == dtype
        torch.testing.assert_close(half.grad.double(), double.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_scores_and_probabilities(dtype: torch.dtype) -> None:
    scores = (torch.randn(3, 300) * 2).to(dtype)
    expected = np.array([row_entropy(row.double().numpy(), np.ones(300, bool)) for row in scores])
    close(attention_entropy_from_scores(scores), expected)
    close(attention_entropy_from_probs(scores.softmax(-1)), expected, rtol=1e-2, atol=1e-2)


def test_half_precision_masked_scores_are_finite() -> None:
    scores = torch.full((2, 4), torch.finfo(torch.float16).min, dtype=torch.float16)
    scores[0, :2] = 1.0
    scores.requires_grad_()
    entropy = attention_entropy_from_scores(scores, normalize=True)
    entropy.sum().backward()
    torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0]))
    assert scores.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision() -> None:
    query, key = qk(1, 2, 5, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attention_entropy(query, key)
    assert torch.equal(actual, attention_entropy(query, key))


def test_float64_stays() -> None:
    query, key = qk(1, 1, 2, 3, 4, **D)
    assert attention_entropy(query, key).dtype == torch.float64
    close(attention_entropy(query, key), reference(query, key), rtol=1e-12, atol=1e-14)


def test_sharp_rows_keep_their_small_entropy() -> None:
    scores = torch.tensor([[12.0, 0.0]])  # H is about p log(1/p) with p = 6e-6
    close(
        attention_entropy_from_scores(scores),
        np.array([row_entropy(scores[0].numpy(), np.ones(2, bool))]),
        rtol=1e-3,
        atol=1e-9,
    )
    query, key = torch.tensor([[12.0]]), torch.tensor([[1.0], [0.0]])
    close(
        attention_entropy(query, key),
        np.array([row_entropy(scores[0].numpy(), np.ones(2, bool))]),
        rtol=1e-3,
        atol=1e-9,
    )


def test_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[3e38, 3e38, 0.0]], requires_grad=True)
    entropy = attention_entropy_from_scores(scores)
    entropy.sum().backward()
    torch.testing.assert_close(entropy, torch.tensor([LOG2]))
    assert scores.grad.isfinite().all()


def test_layout_does_not_matter() -> None:
    packed = torch.randn(2, 5, 2, 3, 4, requires_grad=True)  # (batch, tokens, q and k, heads, dim), as timm packs them
    query, key = packed.permute(2, 0, 3, 1, 4).unbind(0)
    assert not query.is_contiguous()
    entropy = attention_entropy(query, key)
    torch.testing.assert_close(entropy, attention_entropy(query.contiguous(), key.contiguous()))
    mask = torch.rand(7, 5).t()[:, :5] > 0.3
    torch.testing.assert_close(
        attention_entropy(query, key, attn_mask=mask), attention_entropy(query, key, attn_mask=mask.contiguous())
    )
    entropy.sum().backward()
    assert packed.grad.ne(0).any()


@pytest.mark.parametrize("block", [1, 7, 40, 100, 10**6])
@pytest.mark.parametrize("name", [None, "key_padding", "full_boolean", "float_bias", "rows_only"], ids=str)
def test_blocks_do_not_change_the_result(block: int, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (tensor.requires_grad_() for tensor in qk(2, 3, 5, 7, 4, **D))
    mask = None if name is None else MASKS[name]
    inputs = [query, key]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double().requires_grad_()
        inputs.append(mask)
    upstream = torch.randn(2, 3, 5, **D)

    def values_and_gradients() -> list[Tensor]:
        entropy = attention_entropy(query, key, attn_mask=mask, is_causal=True)
        return [entropy, *torch.autograd.grad(entropy, inputs, upstream)]

    whole = values_and_gradients()
    monkeypatch.setattr(module, "BLOCK_SCORES", block)
    for actual, expected in zip(values_and_gradients(), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.elements = max(self.elements, *(t.numel() for t in tensors if isinstance(t, Tensor)), 0)
        return result


@pytest.mark.parametrize("key_heads", [4, 1], ids=["mha", "mqa"])
def test_memory_never_exceeds_a_block(key_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_SCORES", 4096)
    query, key = (tensor.requires_grad_() for tensor in qk(2, 4, 256, 256, 2, key_heads))
    with Largest() as largest:
        attention_entropy(query, key, is_causal=True, enable_gqa=True).sum().backward()
    assert largest.elements <= 4096 < 2 * 4 * 256 * 256
    assert largest.elements >= query.numel()


@pytest.mark.parametrize("name", [None, "key_padding", "float_bias"], ids=str)
def test_compiled_without_graph_break_equals_eager(name: str | None) -> None:
    query, key = (tensor.requires_grad_() for tensor in qk(2, 3, 5, 7, 4))
    mask = None if name is None else MASKS[name]

    def function(q: Tensor, k: Tensor) -> Tensor:
        return attention_entropy(q, k, attn_mask=mask, normalize=True).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(query, key), function(query, key)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(value, (query, key)) for value in (actual, expected)]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_compiled_scores_equal_eager() -> None:
    scores = torch.randn(2, 3, 5, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: scores_tap(s, top_k=3)[1].sum(), fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(scores), scores)
    (expected,) = torch.autograd.grad(attention_entropy_from_scores(scores, top_k=3).sum(), scores)
    torch.testing.assert_close(actual, expected)


# --- errors ----------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)


def entropy(query: Tensor = Q, key: Tensor = K, **kwargs) -> Tensor:
    return attention_entropy(query, key, **kwargs)


LONG_MASK = torch.ones(3, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy(Q.long()), r"`query` must be floating point of shape .* got \(2, 4, 3, 8\) torch.int64"),
        (lambda: entropy(key=K[0, 0, 0]), r"`key` must be floating point of shape .* got \(8,\)"),
        (lambda: entropy(key=K[..., :4]), "`query` and `key` must share batch and dim"),
        (lambda: entropy(key=K[0]), "`query` and `key` must share batch and dim"),
        (lambda: entropy(key=K[:1]), "`query` and `key` must share batch and dim"),
        (lambda: entropy(key=K[:, :2]), "`key` must have the 4 heads of `query`, got 2; set `enable_gqa=True`"),
        (lambda: entropy(key=K[:, :3], enable_gqa=True), "`query` heads 4 must be a multiple of `key` heads 3"),
        (lambda: entropy(attn_mask=LONG_MASK), r"`attn_mask` must be boolean or floating point, got torch.int64"),
        (lambda: entropy(attn_mask=LONG_MASK[:, :4].bool()), r"must be broadcastable to \(2, 4, 3, 5\), got \(3, 4\)"),
        (lambda: entropy(attn_mask=torch.ones(1, 2, 4, 3, 5)), "`attn_mask` must be broadcastable"),
        (lambda: entropy(attn_mask=torch.tensor(0.0)), "`attn_mask` must be broadcastable"),
        (lambda: entropy(top_k=1), "`top_k` must be at least 2 .* got 1"),
        (lambda: attention_entropy_from_scores(Q, top_k=0), "`top_k` must be at least 2 .* got 0"),
        (lambda: attention_entropy_from_scores(Q.long()), "`scores` must be a floating-point tensor"),
        (lambda: attention_entropy_from_scores(torch.tensor(1.0)), "`scores` must .* with at least one axis"),
        (lambda: attention_entropy_from_scores(Q, mask=torch.ones(8)), r"boolean .*float32; use `mask.bool\(\)`"),
        (lambda: attention_entropy_from_scores(Q, mask=torch.ones(7).bool()), r"broadcastable to \(2, 4, 3, 8\)"),
        (lambda: attention_entropy_from_probs(Q.long()), "`probs` must be a floating-point tensor"),
        (lambda: attention_entropy_from_probs(Q, mask=torch.ones(8)), "`mask` must be boolean"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "probs",
    [
        torch.tensor([[2.0, 0.3, -1.0]]),  # scores
        torch.tensor([[0.9, 0.4, -0.3]]),  # a Nystrom product sums to 1 but is negative
        torch.tensor([[0.5, 0.0, 0.2]]),  # after dropout
        torch.rand(3, 4).softmax(0) * torch.tensor([1.0, 0.2, 0.1, 0.5]),  # the wrong axis
    ],
    ids=["scores", "nystrom", "dropout", "axis"],
)
def test_what_is_no_distribution_is_refused(probs: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"`probs` must be non-negative with rows that sum to 1 .* Use `attention_entropy_from_scores`"
    ):
        attention_entropy_from_probs(probs)


def test_probabilities_that_ignore_the_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1 over the visible keys"):
        attention_entropy_from_probs(torch.full((1, 4), 0.25), mask=torch.tensor([True, True, True, False]))


def test_double_softmax_is_not_the_entropy() -> None:
    scores = torch.zeros(1, 512)
    scores[0, 0] = 7.0
    right = attention_entropy_from_scores(scores).item()
    probs = attention_entropy_from_probs(scores.softmax(-1)).item()
    twice = attention_entropy_from_scores(scores.softmax(-1)).item()  # what EAR computes
    assert right == pytest.approx(probs, abs=1e-5)
    assert twice > math.log(512) - 0.01 > right + 3


def test_normalize_is_zero_without_a_choice() -> None:
    entropy = normalize_entropy(torch.tensor([5.0, 0.0, LOG3, LOG2]), torch.tensor([0, 1, 3, 4]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.0, 1.0, 0.5]))


# --- properties ------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=12)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@QUICK
@given(ROWS, st.randoms(use_true_random=False))
def test_order_of_keys_does_not_matter(row: list[float], random) -> None:
    shuffled = random.sample(row, len(row))
    first, second = (attention_entropy_from_scores(torch.tensor(r)) for r in (row, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@QUICK
@given(ROWS, st.integers(1, 5), st.sampled_from([-math.inf, -1e9, -1e4, torch.finfo(torch.float32).min]))
def test_padding_does_not_matter(row: list[float], extra: int, fill: float) -> None:
    scores, padded = torch.tensor(row), torch.tensor(row + [fill] * extra)
    for normalize in (False, True):
        torch.testing.assert_close(
            attention_entropy_from_scores(scores, normalize=normalize),
            attention_entropy_from_scores(padded, normalize=normalize),
        )


@QUICK
@given(ROWS)
def test_entropy_is_between_zero_and_log_keys(row: list[float]) -> None:
    for value, bound in (
        (attention_entropy_from_scores(torch.tensor(row)), math.log(len(row))),
        (attention_entropy(torch.tensor([[1.0]]), torch.tensor(row)[:, None])[0], math.log(len(row))),
        (attention_entropy_from_scores(torch.tensor(row), normalize=True), 1.0),
    ):
        assert 0 <= value.item() <= bound + 1e-5


@QUICK
@given(ROWS, st.floats(-30, 30, width=32))
def test_a_constant_added_to_a_row_does_not_matter(row: list[float], shift: float) -> None:
    scores = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(
        attention_entropy_from_scores(scores), attention_entropy_from_scores(scores + shift), rtol=1e-9, atol=1e-9
    )


@QUICK
@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=12).filter(lambda row: max(row) - min(row) > 0.1))
def test_a_gradient_step_raises_the_entropy(row: list[float]) -> None:
    scores = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    before = attention_entropy_from_scores(scores)
    (gradient,) = torch.autograd.grad(before, scores)
    assert attention_entropy_from_scores(scores + 0.1 * gradient) > before
