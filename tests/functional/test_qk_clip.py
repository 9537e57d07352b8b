"""QK-clip factors against hand-worked numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_reg.functional import qk_clip_factors


def test_factors_by_hand() -> None:
    query, key = qk_clip_factors(torch.tensor([400.0, 100.0, 99.0, 0.0]))
    assert query.tolist() == [0.5, 1.0, 1.0, 1.0]
    assert key.tolist() == [0.5, 1.0, 1.0, 1.0]
    query, key = qk_clip_factors(torch.tensor([80.0, 5.0], dtype=torch.float64), threshold=10.0, alpha=1 / 3)
    assert query.tolist() == pytest.approx([0.5, 1.0], abs=1e-15)
    assert key.tolist() == pytest.approx([0.25, 1.0], abs=1e-15)


def test_heads_that_share_a_key_are_clipped_with_the_largest() -> None:
    query, key = qk_clip_factors(torch.tensor([[1.0, 16.0, 2.0, 3.0, 8.0, 1.0]]), threshold=4.0, groups=3)
    assert query.tolist() == [[0.5, 0.5, 0.5, *[pytest.approx(0.5**0.5)] * 3]]
    assert key.tolist() == [[0.5, pytest.approx(0.5**0.5)]]


@pytest.mark.parametrize(("alpha", "query", "key"), [(0.0, 1.0, 0.25), (1.0, 0.25, 1.0)])
def test_alpha_at_its_ends_leaves_one_side_alone(alpha: float, query: float, key: float) -> None:
    factors = qk_clip_factors(torch.tensor([40.0]), threshold=10.0, alpha=alpha)
    assert [factor.item() for factor in factors] == [query, key]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e30), min_size=1, max_size=5), st.floats(1e-3, 1e6), st.floats(0, 1), st.integers(1, 3)
)  # fmt: skip
def test_product_is_that_of_numpy(values: list[float], threshold: float, alpha: float, groups: int) -> None:
    largest = np.repeat(np.array(values), groups) * np.tile(np.linspace(0.1, 1, groups), len(values))
    query, key = qk_clip_factors(torch.tensor(largest), threshold, alpha, groups)
    shared = largest.reshape(-1, groups).max(1)
    eta = np.minimum(1, threshold / np.maximum(shared, 1e-300))
    np.testing.assert_allclose(key.numpy(), eta ** (1 - alpha), rtol=1e-12)
    np.testing.assert_allclose(query.numpy(), np.repeat(eta**alpha, groups), rtol=1e-12)
    assert ((query <= 1) & (query > 0)).all()
    if (shared <= threshold).all():
        assert (query == 1).all()
        assert (key == 1).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf])
def test_maximum_that_is_not_finite_clips_nothing(bad: float) -> None:
    query, key = qk_clip_factors(torch.tensor([bad, 400.0]))
    assert query.tolist() == key.tolist() == [1.0, 0.5]
    assert qk_clip_factors(torch.tensor([bad, 400.0]), groups=2)[1].tolist() in ([1.0], [0.5])
    assert qk_clip_factors(torch.tensor([1e30]), math.inf)[0].tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    query, _ = qk_clip_factors(torch.tensor([300.0], dtype=dtype), alpha=1.0)
    assert query.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert query.item() == pytest.approx(1 / 3, abs=1e-7)


@pytest.mark.parametrize(
    ("largest", "arguments", "message"),
    [
        (torch.ones(2), {"threshold": 0.0}, "`threshold` must be a number > 0, got 0.0; `math.inf` clips nothing"),
        (torch.ones(2), {"threshold": math.nan}, "`threshold` must be a number > 0, got nan"),
        (torch.ones(2), {"threshold": "1"}, "`threshold` must be a number > 0, got '1'"),
        (torch.ones(2), {"alpha": -0.1}, r"`alpha` must be in \[0, 1\], got -0.1: the share"),
        (torch.ones(2), {"groups": 0}, "`groups` must be a divisor of the 2 heads, got 0"),
        (torch.ones(3), {"groups": 2}, "`groups` must be a divisor of the 3 heads, got 2"),
        (torch.ones(2), {"groups": True}, "`groups` must be a divisor of the 2 heads, got True"),
        (torch.ones(2, dtype=torch.int64), {}, r"`max_logits` must be floating point of shape \(..., heads\), got"),
        (torch.ones(()), {}, r"`max_logits` must be floating point of shape \(..., heads\), got \(\)"),
    ],
    ids=["zero", "nan", "text", "alpha", "groups_zero", "groups_odd", "groups_bool", "integers", "scalar"],
)
def test_bad_input_is_named(largest: torch.Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk_clip_factors(largest, **arguments)
