"""Masks and densities against numpy, and against numbers worked out by hand."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import (
    erk_densities,
    magnitude_mask,
    n_m_mask,
    random_mask,
    rigl_mask,
    rigl_share,
    weight_sparsity,
)
from lightning_reg.functional.weight_sparsity import spread_zeros

SPARSITIES = [0.0, 0.1, 1 / 3, 0.5, 0.999, 1.0]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def smallest_first(weights: list[np.ndarray], zeros: int) -> list[np.ndarray]:
    """Masks by a stable sort of all magnitudes together."""
    flat = np.concatenate([np.abs(weight).ravel() for weight in weights])
    mask = np.ones(len(flat), bool)
    mask[np.argsort(flat, kind="stable")[:zeros]] = False
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [part.reshape(weight.shape) for part, weight in zip(np.split(mask, ends), weights, strict=True)]


def numpy(weight: Tensor) -> np.ndarray:
    return weight.double().numpy()


# --- the quantity ----------------------------------------------------------------------------------------------------


def test_sparsity_counts_exact_zeros() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-45], [math.nan, 1.0, -math.inf]])
    assert weight_sparsity(weight).item() == pytest.approx(2 / 6)
    assert weight_sparsity(torch.zeros(3)) == 1
    assert weight_sparsity(torch.empty(0)).isnan()
    assert weight_sparsity(torch.zeros(2).double()).dtype == torch.float32


# --- magnitude -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_mask_is_a_stable_sort(dtype: torch.dtype, sparsity: float) -> None:
    weight = torch.randn(7, 3, 5).to(dtype)  # halves have ties
    (wanted,) = smallest_first([numpy(weight)], round(sparsity * weight.numel()))
    mask = magnitude_mask(weight, sparsity)
    assert np.array_equal(mask.numpy(), wanted)
    assert (~mask).sum() == round(sparsity * weight.numel())


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_mask_ranks_all_weights_together(sparsity: float) -> None:
    weights = [torch.randn(4, 6), 3 * torch.randn(2, 3, 3, 3), torch.randn(5, 5).double()]
    wanted = smallest_first([numpy(weight) for weight in weights], round(sparsity * 103))
    masks = magnitude_mask(weights, sparsity)
    assert all(np.array_equal(mask.numpy(), want) for mask, want in zip(masks, wanted, strict=True))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_ties_go_in_order_of_layer_and_position(sparsity: float) -> None:
    masks = magnitude_mask([torch.ones(3, 4), -torch.ones(8)], sparsity)
    flat = torch.cat([mask.flatten() for mask in masks])
    assert flat.tolist() == [position >= round(sparsity * 20) for position in range(20)]


def test_sparsity_is_absolute() -> None:
    weight = torch.randn(100)
    mask = torch.ones(100, dtype=torch.bool)
    for sparsity in (0.2, 0.5, 0.7):  # ModelPruning prunes 0.7 of what 0.5 of 0.2 left: 0.88
        before = mask
        mask = magnitude_mask(weight * mask, sparsity, mask=mask)
        assert (~mask).sum() == round(100 * sparsity)
        assert not (mask & ~before).any()


def test_what_the_mask_prunes_goes_before_zeros_that_live() -> None:
    weight = torch.zeros(4)
    mask = torch.tensor([True, True, False, False])
    assert magnitude_mask(weight, 0.5, mask=mask).tolist() == mask.tolist()
    assert magnitude_mask(weight, 0.75, mask=mask).tolist() == [False, True, False, False]


def test_nan_and_infinity_are_large() -> None:
    weight = torch.tensor([math.nan, 1e30, -math.inf, 1e-30])
    assert magnitude_mask(weight, 0.25).tolist() == [True, True, True, False]
    assert magnitude_mask(weight, 0.75).tolist() == [True, False, False, False]


def test_strided_weights_are_ranked_by_position() -> None:
    weight = torch.randn(6, 4)
    assert torch.equal(magnitude_mask(weight.T, 0.4), magnitude_mask(weight.T.contiguous(), 0.4))


# --- at random -------------------------------------------------------------------------------------------------------


def test_random_mask_is_exact_nested_and_seeded() -> None:
    state = torch.random.get_rng_state()
    masks = [random_mask((10, 7), sparsity, seed=3) for sparsity in (0.1, 0.5, 0.83)]
    assert [(~mask).sum().item() for mask in masks] == [7, 35, 58]
    assert all(not (large & ~small).any() for small, large in itertools.pairwise(masks))
    assert torch.equal(random_mask((10, 7), 0.5, seed=3), masks[1])
    assert not torch.equal(random_mask((10, 7), 0.5, seed=4), masks[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_mask_prunes_every_place_alike() -> None:
    kept = torch.stack([random_mask((20,), 0.75, seed=seed) for seed in range(2000)]).double().mean(0)
    assert (kept - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 2000)


# --- ERK -------------------------------------------------------------------------------------------------------------


def reference_erk(shapes: list[tuple[int, ...]], sparsity: float, power: float) -> np.ndarray:
    """eps by bisection of the total: another way than making layers dense one after the other."""
    sizes = np.array([math.prod(shape) for shape in shapes], float)
    raw = np.array([(sum(shape) / math.prod(shape)) ** power for shape in shapes])
    low, high = 0.0, 1 / raw.min()
    for _ in range(200):
        middle = (low + high) / 2
        enough = (np.minimum(1, middle * raw) * sizes).sum() > (1 - sparsity) * sizes.sum()
        low, high = (low, middle) if enough else (middle, high)
    return np.minimum(1, low * raw)


RESNET = [(64, 3, 7, 7), (64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (512, 512, 3, 3), (1000, 2048)]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_erk_densities_solve_for_the_total(sparsity: float, power: float) -> None:
    densities = np.array(erk_densities(RESNET, sparsity, power=power))
    np.testing.assert_allclose(densities, reference_erk(RESNET, sparsity, power), rtol=1e-9)
    sizes = np.array([math.prod(shape) for shape in RESNET])
    assert (densities * sizes).sum() == pytest.approx((1 - sparsity) * sizes.sum(), rel=1e-12)
    assert (densities <= 1).all()


def test_erk_by_hand() -> None:
    # 200 eps + 20 eps = 0.1 * 10100; the second exceeds 1 from eps = 5 on
    assert erk_densities([(100, 100), (10, 10)], 0.9) == pytest.approx([1010 / 220 * 0.02, 1010 / 220 * 0.2])
    assert erk_densities([(100, 100), (10, 10)], 0.5) == pytest.approx([4950 / 10000, 1.0])
    assert erk_densities([(3, 3)], 0.25) == pytest.approx([0.75])
    assert erk_densities([(3, 3), (4, 4)], 1.0) == [0.0, 0.0]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9, 0.99, 1.0])
def test_rounded_zeros_add_up_exactly(sparsity: float) -> None:
    sizes = [math.prod(shape) for shape in RESNET]
    densities = erk_densities(RESNET, sparsity)
    zeros = spread_zeros(sizes, densities, sparsity)
    assert sum(zeros) == round(sparsity * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(zeros, sizes, strict=True))
    assert all(abs(count - size * (1 - d)) < 1 for count, size, d in zip(zeros, sizes, densities, strict=True))


# --- N:M -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_n_m_keeps_the_n_largest_of_every_m(n: int, m: int, dim: int) -> None:
    weight = torch.randn(8, 16, 8)
    mask = n_m_mask(weight, n, m, dim=dim)
    rows = np.moveaxis(numpy(weight), dim, -1).reshape(-1, m)
    kept = np.moveaxis(mask.numpy(), dim, -1).reshape(-1, m)
    assert (kept.sum(1) == n).all()
    for row, keep in zip(np.abs(rows), kept, strict=True):
        assert set(np.flatnonzero(keep)) == set(np.argsort(row)[-n:])


def test_n_m_is_exact_where_all_are_equal() -> None:
    assert n_m_mask(torch.zeros(2, 8), 2, 4).tolist() == [[False, False, True, True] * 2] * 2


# --- RigL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_rigl_drops_the_smallest_and_grows_the_steepest(density: float, share: float) -> None:
    weight, gradient = torch.randn(9, 11), torch.randn(9, 11)
    mask = random_mask((9, 11), 1 - density, seed=1)
    weight = weight * mask
    active, inactive = np.flatnonzero(mask), np.flatnonzero(~mask)
    count = min(int(share * len(active)), len(inactive))
    dropped = active[np.argsort(np.abs(numpy(weight).ravel()[active]))[:count]]
    grown = inactive[np.argsort(-np.abs(numpy(gradient).ravel()[inactive]))[:count]]
    wanted = mask.numpy().ravel().copy()
    wanted[dropped], wanted[grown] = False, True
    new = rigl_mask(weight, gradient, mask, share)
    assert np.array_equal(new.numpy().ravel(), wanted)
    assert new.sum() == mask.sum()


def test_rigl_of_a_dense_weight_changes_nothing() -> None:
    weight = torch.randn(3, 4)
    assert rigl_mask(weight, torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool), 0.5).all()


def test_rigl_share_is_half_a_cosine() -> None:
    shares = [rigl_share(step, 200, 0.3) for step in (0, 50, 100, 150, 199, 200, 201)]
    wanted = [0.3, 0.15 * (1 + math.sqrt(0.5)), 0.15, 0.15 * (1 - math.sqrt(0.5)), 0.0, 0.0, 0.0]
    assert shares == pytest.approx(wanted, abs=2e-5)
    assert shares[-1] == shares[-2] == 0.0


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, True, "0.5", None])
@pytest.mark.parametrize(
    "call",
    [
        lambda sparsity: magnitude_mask(torch.ones(3), sparsity),
        lambda sparsity: random_mask((3,), sparsity),
        lambda sparsity: erk_densities([(3, 4)], sparsity),
    ],
    ids=["magnitude", "random", "erk"],
)
def test_sparsity_outside_its_range_is_refused(call: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\], got .*; 0.9 prunes nine of ten"):
        call(bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: n_m_mask(torch.ones(2, 4), 4, 4), "`n` and `m` must have 0 < n < m, got 4:4"),
        (lambda: n_m_mask(torch.ones(2, 6), 2, 4), r"`m` must divide the size of axis -1, got m=4 for shape \(2, 6\)"),
        (
            lambda: rigl_mask(torch.ones(2), torch.ones(2), torch.ones(2).bool(), 1.5),
            r"`share` must be in \[0, 1\], got 1.5",
        ),
    ],
    ids=["pattern", "divide", "share"],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
