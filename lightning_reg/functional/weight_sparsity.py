r"""Share of exact zeros among weights, and the masks that set them: by magnitude, at random, N:M, RigL.

Formula
    ``sparsity = number of weights == 0 / number of weights``. A mask is True where a weight is kept, and prunes exactly
    ``round(sparsity * n)`` of n weights.
    Magnitude: the smallest ``|w|`` are pruned, in one weight or among several ranked together.
    ERK: ``density_l = min(1, eps * sum(shape_l) / prod(shape_l))``, eps such that ``sum(density_l n_l)`` is the total.
    N:M: the n largest of every m consecutive weights along the input are kept.
    RigL: every so often ``floor(share * active)`` active weights of smallest ``|w|`` are exchanged for as many inactive
    ones of largest ``|dL/dw|``, which start at 0; ``share = alpha / 2 * (1 + cos(pi t / T))``.
Source
    Gradual magnitude pruning: Zhu & Gupta 2017 (arXiv 1710.01878). ERK and RigL: Evci et al. 2020 (arXiv 1911.11134),
    Algorithm 1 and section 3. Static random masks: Liu et al. 2022 (arXiv 2202.02643). 2:4: Mishra et al. 2021 (arXiv
    2104.08378). In RigL a weight just dropped may grow again at once; here only weights that were inactive grow. It
    leaves out the optimizer step of an update; here the exchange comes first, and the step is taken with what it left.
Input
    Weights of any shape; N:M needs the axis of the input, the last one of ``nn.Linear``, the second of a convolution
    and the first of GPT-2's ``Conv1D``.
Unit and range
    Dimensionless, [0, 1]: 0 is dense, 1 all zeros. Equal magnitudes are pruned in order of layer and position, so every
    process that sees the same weights gets the same mask. NaN counts as the largest magnitude.
Where it acts
    On stored weights, after the optimizer step, and on their gradients before it.
Default and why
    Cubic schedule, ranked over all layers: fast while there is much to spare, slow at the end; the ranking finds the
    layers that can spare more.
Cost
    A ranking reads the weights some 30 times, and holds 4 bytes for each (8 in float64) meanwhile; it happens every so
    many steps. Between two, zeros are held by one pass over the gradients and one over the weights.
When it hurts
    Zeros save no time in a dense kernel: only 2:4 has one on GPUs. Ranking over all layers can empty a layer whose
    weights are small by their scale. A mask at random on trained weights throws them away.
Not together with
    A second pruning of the same weights, or a weight decay tuned for the dense model.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# --- the quantity ----------------------------------------------------------------------------------------------------


def weight_sparsity(weight: Tensor) -> Tensor:
    """Share of exact zeros.

    Args:
        weight: Weight of any shape.

    Returns:
        Scalar in [0, 1], float32; NaN for an empty weight.

    Example:
        >>> weight_sparsity(torch.tensor([[0.0, 2.0], [-0.0, 1.0]]))
        tensor(0.5000)
    """
    return (count_zeros(weight).double() / weight.numel()).float()


def count_zeros(weight: Tensor) -> Tensor:
    """Number of exact zeros, an int64 scalar."""
    return (weight.detach() == 0).count_nonzero()


# --- masks -----------------------------------------------------------------------------------------------------------


def magnitude_mask(
    weight: Tensor | Sequence[Tensor], sparsity: float, *, mask: Tensor | Sequence[Tensor] | None = None
) -> Tensor | list[Tensor]:
    """Mask that prunes the smallest weights, of one tensor or of several ranked together.

    Args:
        weight: A weight, or a sequence of them.
        sparsity: Share to prune of all weights, absolute: what ``mask`` prunes is included.
        mask: Mask so far, of the same structure; what it prunes stays pruned unless ``sparsity`` asks for less.

    Returns:
        Mask of each weight, True = kept, with ``round(sparsity * n)`` False in all.

    Raises:
        ValueError: If ``sparsity`` is not in [0, 1].

    Example:
        >>> magnitude_mask(torch.tensor([0.1, -3.0, 0.2, 1.0]), 0.5)
        tensor([False,  True, False,  True])
        >>> magnitude_mask([torch.tensor([0.1, 0.2]), torch.tensor([3.0, 0.3])], 0.5)
        [tensor([False, False]), tensor([True, True])]
    """
    if isinstance(weight, Tensor):
        return magnitude_mask([weight], sparsity, mask=None if mask is None else [mask])[0]  # type: ignore[list-item]
    masks: Sequence[Tensor | None] = [None] * len(weight) if mask is None else list(mask)
    dtype = ranking_dtype(weight)
    keys = [magnitude_keys(part, dtype, kept) for part, kept in zip(weight, masks, strict=True)]
    return keep_largest(keys, zeros_of(sparsity, sum(part.numel() for part in weight)))


def random_mask(shape: Sequence[int], sparsity: float, *, seed: int = 0) -> Tensor:
    """Mask of exact sparsity at random, the same on every device; that of a larger sparsity prunes a superset.

    Args:
        shape: Shape of the weight.
        sparsity: Share to prune.
        seed: Of a generator of its own: torch's global one stays as it is.

    Returns:
        Mask, True = kept, with ``round(sparsity * n)`` False, on the CPU.

    Raises:
        ValueError: If ``sparsity`` is not in [0, 1].

    Example:
        >>> random_mask((2, 4), 0.75, seed=1).sum()
        tensor(2)
    """
    return keep_largest([random_keys(shape, seed)], zeros_of(sparsity, math.prod(shape)))[0]


def n_m_mask(weight: Tensor, n: int, m: int, *, dim: int = -1) -> Tensor:
    """Mask that keeps the n largest of every m consecutive weights.

    Args:
        weight: Weight, or integers to rank by.
        n: How many to keep, 0 < n < m.
        m: Size of a group; must divide the size of ``dim``.
        dim: Axis of the input.

    Returns:
        Mask, True = kept. Of equal magnitudes the later ones are kept.

    Raises:
        ValueError: If n and m are no pattern, or m does not divide the axis.

    Example:
        >>> n_m_mask(torch.tensor([[0.1, -3.0, 0.2, 1.0]]), 2, 4)
        tensor([[False,  True, False,  True]])
    """
    if not 0 < n < m:
        raise ValueError(f"`n` and `m` must have 0 < n < m, got {n}:{m}; 2:4 keeps two of four.")
    if weight.shape[dim] % m:
        raise ValueError(
            f"`m` must divide the size of axis {dim}, got m={m} for shape {tuple(weight.shape)}; pad the weight, or "
            "leave it dense."
        )
    keys = magnitude_keys(weight, ranking_dtype([weight])) if weight.is_floating_point() else weight
    groups = keys.movedim(dim, -1).unflatten(-1, (-1, m))
    pruned = groups.argsort(dim=-1, stable=True)[..., : m - n]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter(-1, pruned, False)
    return mask.flatten(-2).movedim(-1, dim)


def rigl_mask(weight: Tensor, gradient: Tensor, mask: Tensor, share: float) -> Tensor:
    """Mask after one RigL update, with as many weights active as before.

    Args:
        weight: Weight.
        gradient: Its gradient, also where the mask prunes.
        mask: Mask so far, True = kept.
        share: Share of the active weights to exchange, in [0, 1]; see ``rigl_share``.

    Returns:
        Mask, True = kept. Set the weights it adds to 0. Less is exchanged where too few are inactive.

    Raises:
        ValueError: If ``share`` is not in [0, 1].

    Example:
        >>> weight, gradient = torch.tensor([0.1, 2.0, 0.0, 0.0]), torch.tensor([9.0, 0.0, 1.0, -2.0])
        >>> rigl_mask(weight, gradient, torch.tensor([True, True, False, False]), 0.5)
        tensor([False,  True, False,  True])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be in [0, 1], got {share}; it is a share of the active weights.")
    active = _count([mask])
    count = min(int(share * active), mask.numel() - active)
    by_weight = magnitude_keys(weight, ranking_dtype([weight]))
    by_gradient = magnitude_keys(gradient, ranking_dtype([gradient]), ~mask)
    never_dropped = torch.iinfo(by_weight.dtype).max
    (kept,) = keep_largest([by_weight.masked_fill(~mask, never_dropped)], count)
    (grown,) = keep_largest([by_gradient], mask.numel() - count)
    return (mask & kept) | grown


def rigl_share(step: int, end: int, alpha: float = 0.3) -> float:
    """Share of the active weights that RigL exchanges: ``alpha / 2 * (1 + cos(pi * step / end))``, 0 from ``end`` on.

    Args:
        step: Optimizer step.
        end: Step of the last exchange, > 0.
        alpha: Share at step 0.

    Example:
        >>> [rigl_share(step, 100) for step in (0, 100, 1000)]
        [0.3, 0.0, 0.0]
    """
    return 0.0 if step >= end else alpha / 2 * (1 + math.cos(math.pi * step / end))


# --- densities -------------------------------------------------------------------------------------------------------


def erk_densities(shapes: Sequence[Sequence[int]], sparsity: float, *, power: float = 1.0) -> list[float]:
    """Erdos-Renyi-kernel density of each layer, of a given sparsity in total.

    Args:
        shapes: Shapes of the weights.
        sparsity: Share of zeros among all weights together.
        power: Of ``sum(shape) / prod(shape)``; 0 makes all layers alike.

    Returns:
        Density of each layer, in [0, 1]: small layers are denser, and dense where they would exceed 1.

    Raises:
        ValueError: If ``sparsity`` is not in [0, 1].

    Example:
        >>> [round(density, 4) for density in erk_densities([(100, 100), (10, 10)], 0.5)]
        [0.495, 1.0]
    """
    check_sparsity(sparsity)
    sizes = [math.prod(shape) for shape in shapes]
    raw = [(sum(shape) / size) ** power for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [layer for layer in range(len(sizes)) if layer not in dense]
        budget = (1 - sparsity) * sum(sizes) - sum(sizes[layer] for layer in dense)
        scale = budget / sum(raw[layer] * sizes[layer] for layer in rest) if rest else 0.0
        full = {layer for layer in rest if scale * raw[layer] > 1}
        if not full:
            return [1.0 if layer in dense else scale * raw[layer] for layer in range(len(sizes))]
        dense |= full


def spread_zeros(sizes: Sequence[int], densities: Sequence[float], sparsity: float) -> list[int]:
    """Zeros of each layer, rounded so that all together are exactly ``round(sparsity * n)``."""
    shares = [size * (1 - density) for size, density in zip(sizes, densities, strict=True)]
    zeros = [math.floor(share) for share in shares]
    missing = zeros_of(sparsity, sum(sizes)) - sum(zeros)
    # the largest remainders are rounded up, a full layer never
    order = sorted(range(len(sizes)), key=lambda layer: (zeros[layer] >= sizes[layer], zeros[layer] - shares[layer]))
    for layer in order[:missing]:
        zeros[layer] += 1
    return zeros


def check_sparsity(sparsity: float, argument: str = "sparsity") -> float:
    """``sparsity``, or a ValueError when it is not in [0, 1]."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
        raise ValueError(f"`{argument}` must be in [0, 1], got {sparsity!r}; 0.9 prunes nine of ten weights.")
    return float(sparsity)


def zeros_of(sparsity: float, size: int) -> int:
    """How many of ``size`` weights a sparsity prunes."""
    return round(check_sparsity(sparsity) * size)


# --- ranking ---------------------------------------------------------------------------------------------------------


def ranking_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """Type in which weights can be ranked together."""
    return torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32


def magnitude_keys(weight: Tensor, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """Integers >= 0 in the order of ``|weight|``; -1, below all, where ``mask`` is False."""
    # the bits of a non-negative float, read as an integer, are in its order
    keys = weight.detach().to(dtype).abs().view(torch.int64 if dtype == torch.float64 else torch.int32)
    return keys if mask is None else keys.masked_fill(~mask, -1)


def random_keys(shape: Sequence[int], seed: int) -> Tensor:
    """Random integers >= 0, on the CPU: other devices have other generators."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**31 - 1, tuple(shape), generator=generator, dtype=torch.int32)


def keep_largest(keys: Sequence[Tensor], zeros: int) -> list[Tensor]:
    """Masks that prune the ``zeros`` smallest keys >= -1 of all tensors together; of equal ones the first go."""
    if zeros <= 0:
        return [torch.ones_like(key, dtype=torch.bool) for key in keys]
    threshold = _kth_smallest(keys, zeros)
    rest = zeros - _count([key < threshold for key in keys])
    masks = []
    for key in keys:
        equal = key == threshold
        first = equal.flatten().cumsum(0).view_as(equal) <= rest
        masks.append(~((key < threshold) | (equal & first)))
        rest -= _count([equal])
    return masks


def _kth_smallest(keys: Sequence[Tensor], k: int) -> int:
    if len(keys) == 1 and keys[0].is_cuda:
        return int(keys[0].flatten().sort().values[k - 1])  # below, each round waits for the device
    # by bisection: a sort of all weights together would need several times their memory
    low, high = -1, max(int(key.max()) for key in keys if key.numel())
    while low < high:
        middle = (low + high) // 2
        if _count([key <= middle for key in keys]) >= k:
            high = middle
        else:
            low = middle + 1
    return low


def _count(marks: Sequence[Tensor]) -> int:
    """Number of True in all tensors, with one copy from the device."""
    # not `sum`: it is thirty times slower on the CPU
    return int(torch.stack([mark.count_nonzero().to(marks[0].device) for mark in marks]).sum())
