"""Activation density on held-out images, counted apart from the loss that was trained."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.capture import find_down_projections
from lightning_reg.functional import exact_density

SMALL = 0.1  # of the layer's root mean square: what a threshold at inference could drop


@torch.no_grad()
def held_out_density(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Share of active inputs of the MLPs' down-projections: not exactly zero, and above a tenth of their RMS."""
    sums: dict[str, float] = defaultdict(float)

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        sums["elements"] += x.numel()
        sums["density/exact"] += x.numel() * float(exact_density(x))
        threshold = SMALL * float(x.square().mean().sqrt())
        sums["density/thresholded"] += x.numel() * float(exact_density(x, threshold=threshold))

    handles = [net.get_submodule(name).register_forward_pre_hook(count) for name in find_down_projections(net)]
    net.eval()
    for images, _ in batches:
        net(images)
    for handle in handles:
        handle.remove()
    return {key: sums[key] / sums["elements"] for key in ("density/exact", "density/thresholded") if handles}
