"""Massive activations over updates."""

import math

import numpy as np
import pytest
import torch

from lightning_reg.metrics import MassiveActivations


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])
def test_median_is_that_of_all_updates_together(scale: float) -> None:
    batches = [scale * torch.randn(n, 9) * 10.0**n for n in (1, 2, 3)]
    mask = [torch.arange(len(batch)) != 1 for batch in batches]
    metric = MassiveActivations()
    for batch, valid in zip(batches, mask, strict=True):
        metric.update(batch, mask=valid)
    size = np.sort(np.concatenate([np.abs(b[v].numpy()).ravel() for b, v in zip(batches, mask, strict=True)]))
    wanted = size.max() / size[(size.size - 1) // 2]
    assert metric.compute().item() == pytest.approx(wanted, rel=0.006)


def test_zeros_and_nan() -> None:
    assert MassiveActivations()(torch.zeros(2, 3)) == 0
    assert MassiveActivations()(torch.tensor([[0.0, 0.0, 3.0]])) == math.inf
    assert MassiveActivations()(torch.tensor([[1.0, math.nan]])).isnan()
    assert MassiveActivations()(torch.ones(2, 3), mask=torch.zeros(2).bool()).isnan()


def test_half_precision_and_magnitudes_beyond_the_bins() -> None:
    x = torch.tensor([[1.0, 300.0, 1.0, 2.0]], dtype=torch.bfloat16)
    assert MassiveActivations()(x).item() == pytest.approx(300, rel=0.006)
    assert MassiveActivations()(torch.tensor([[1e30, 1e30, 1.0]])).isfinite()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="`mask` must have the shape of `x`"):
        MassiveActivations().update(torch.ones(2, 3), mask=torch.ones(3).bool())
