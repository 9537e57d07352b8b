r"""Activation functions that give exact zeros.

Formula
    ``relu2(x) = max(0, x)^2``. ``shifted_relu(x) = max(0, x - b)``. ``drelu(g, u) = max(0, g) * max(0, u)``.
    ``fatrelu(x) = x if x > t else 0``; soft, ``max(0, x) * sigmoid(s (x - t))``. ``topk(x)`` keeps the k elements of
    largest magnitude of each token. ``statistical_topk(x) = max(0, x - mean(x) - std(x) * Phi^-1(p))`` with mean and
    (population) deviation of each token and the inverse Phi^-1 of the normal distribution, so a share of about p
    becomes 0 without sorting.
Source
    relu2: Primer (So et al. 2021). shifted_relu: ReLU Strikes Back (Mirzadeh et al. 2023, arXiv 2310.04564). drelu:
    TurboSparse (Song et al. 2024, arXiv 2406.05955). fatrelu: Kurtz et al. 2020; ProSparse (arXiv 2402.13516) shifts
    ReLU to it after training, with t from 0.005 to 0.03. topk: Lazy Neuron (Li et al. 2023, arXiv 2210.06313), with
    straight-through gradient Q-Sparse (Wang et al. 2024, arXiv 2407.10969). statistical_topk: Spark Transformer (You
    et al. 2025), Gemma 3n.
Input
    Pre-activations ``x`` of any shape (..., width); top-k takes what an activation gave.
Unit and range
    Units of ``x``, squared for relu2 and drelu. All but topk are >= 0 (fatrelu with t >= 0).
Where it acts
    The gradient is that of what survives, 0 at every exact zero, except for the soft fatrelu (none at x <= 0) and
    the straight-through topk, whose gradient passes as if nothing had been cut.
Default and why
    ``t = 0.01``, ProSparse's. Straight-through for topk: without it what is cut never learns to come back.
Cost
    Element-wise; topk sorts partially, statistical_topk needs two reductions.
When it hurts
    A share fixed for every token takes from those that need more. relu2 overflows float16 above 255.
Not together with
    A penalty that counts zeros, on topk: their number is given.
"""

from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """``max(0, x)^2``, shape of ``x``.

    Example:
        >>> relu2(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """
    return F.relu(x).square()


def shifted_relu(x: Tensor, shift: float = 1.0) -> Tensor:
    """``max(0, x - shift)``, shape of ``x``.

    Raises:
        ValueError: If ``shift`` is not finite.

    Example:
        >>> shifted_relu(torch.tensor([-1.0, 1.5]))
        tensor([0.0000, 0.5000])
    """
    return F.relu(x - check_shift(shift))


def drelu(gate: Tensor, up: Tensor) -> Tensor:
    """``max(0, gate) * max(0, up)``, the hidden activations of a gated MLP whose two branches are rectified.

    Example:
        >>> drelu(torch.tensor([-1.0, 2.0, 2.0]), torch.tensor([-3.0, -3.0, 3.0]))
        tensor([0., 0., 6.])
    """
    return F.relu(gate) * F.relu(up)


def fatrelu(x: Tensor, threshold: float | Tensor = 0.01, *, sharpness: float | None = None) -> Tensor:
    """``x`` where it is above ``threshold``, else 0; with ``sharpness`` a smooth step at the threshold.

    Args:
        x: Pre-activations (..., width).
        threshold: >= 0; a number, or (width,) for one of each channel. The papers keep ``x >= t``, this ``x > t``.
        sharpness: Steepness of the soft form, > 0, in inverse units of ``x``; hard when left out.

    Raises:
        ValueError: If a number ``threshold`` is negative, a tensor does not fit, or ``sharpness`` is not positive.

    Example:
        >>> fatrelu(torch.tensor([-1.0, 0.2, 0.7]), 0.5)
        tensor([0.0000, 0.0000, 0.7000])
    """
    check_fat_threshold(threshold)
    if isinstance(threshold, Tensor) and threshold.dim() and threshold.shape != x.shape[-1:]:
        raise ValueError(
            f"`threshold` must be a number or have the width of `x`, {tuple(x.shape[-1:])}, got "
            f"{tuple(threshold.shape)}."
        )
    if sharpness is not None:
        if not sharpness > 0:
            raise ValueError(f"`sharpness` must be > 0, got {sharpness}; leave it out for the hard threshold.")
        return F.relu(x) * torch.sigmoid(sharpness * (x - threshold)).to(x.dtype)
    if not isinstance(threshold, Tensor):
        return F.threshold(x, threshold, 0.0)
    return torch.where(x <= threshold, 0.0, x)


def topk(x: Tensor, share: float, *, straight_through: bool = True) -> Tensor:
    """The elements of largest magnitude of each token, the others 0.

    Args:
        x: Activations (..., width).
        share: Of the width to keep, in (0, 1]; at least one element, rounded.
        straight_through: Pass the gradient to all elements instead of those kept.

    Raises:
        ValueError: If ``share`` is outside (0, 1].

    Example:
        >>> topk(torch.tensor([1.0, -4.0, 2.0, 0.5]), 0.5)
        tensor([ 0., -4.,  2.,  0.])
    """
    width = x.shape[-1]
    kept = max(1, round(check_share(share) * width))
    if kept == width:
        return x
    index = x.detach().abs().topk(kept, dim=-1, sorted=False).indices
    keep = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, index, True)
    # x - x is 0 exactly, and so is what is taken from those kept
    return x - x.detach().masked_fill(keep, 0.0) if straight_through else x.masked_fill(~keep, 0.0)


def statistical_topk(x: Tensor, sparsity: float) -> Tensor:
    """What exceeds the cutoff that leaves a share of about ``1 - sparsity`` of normally distributed elements.

    Args:
        x: Pre-activations (..., width).
        sparsity: Share of each token's elements to become 0, in (0, 1).

    Raises:
        ValueError: If ``sparsity`` is outside (0, 1).

    Example:
        >>> statistical_topk(torch.tensor([-1.0, 0.0, 1.0]), 0.5)
        tensor([0., 0., 1.])
    """
    quantile = NormalDist().inv_cdf(check_sparsity(sparsity))
    exact = x if x.dtype == torch.float64 else x.float()
    std, mean = torch.std_mean(exact, dim=-1, keepdim=True, correction=0)
    return F.relu(x - (mean + std * quantile).to(x.dtype))


def check_fat_threshold(threshold: float | Tensor) -> float | Tensor:
    """Return ``threshold`` or raise a ValueError; a tensor is looked at when it is made, not in every forward."""
    if not isinstance(threshold, Tensor) and not 0 <= threshold < float("inf"):
        raise ValueError(f"`threshold` must be finite and >= 0, got {threshold}; ProSparse uses 0.005 to 0.03.")
    return threshold


def check_shift(shift: float) -> float:
    """Return ``shift`` or raise a ValueError."""
    if not -float("inf") < shift < float("inf"):
        raise ValueError(f"`shift` must be finite, got {shift}.")
    return shift


def check_share(share: float) -> float:
    """Return ``share`` or raise a ValueError."""
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], the part of the width to keep, got {share}.")
    return share


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` or raise a ValueError."""
    if not 0 < sparsity < 1:
        raise ValueError(f"`sparsity` must be in (0, 1), the part of each token that becomes 0, got {sparsity}.")
    return sparsity
