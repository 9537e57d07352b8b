r"""Soft count of non-zero activations, the density surrogate of DEFT.

Formula
    ``density = mean over valid x of phi(x)``, ``phi(x) = x^2 / (x^2 + epsilon)``, computed as
    ``1 - 1 / (1 + x^2 / epsilon)`` in float32; ``phi'(x) = 2 x epsilon / (x^2 + epsilon)^2``.
Source
    DEFT (Runwal et al. 2024, arXiv 2402.01911) and its public code, which writes ``x^2 / (x^2 + epsilon)`` in the
    input's precision: inf or NaN gradients in float16, exactly 0 in bfloat16 for |x| >= 1e-2. This form has neither.
Input
    Activations ``x`` of any shape (..., width), normally the input of an MLP's down-projection.
Unit and range
    Dimensionless, in [0, 1]: 0 when every activation is 0, towards 1 when all are far above sqrt(epsilon).
Where it acts
    The pull peaks at |x| = sqrt(epsilon / 3) with height 0.65 / sqrt(epsilon) and fades beyond a few sqrt(epsilon):
    ``epsilon`` decides which activations can be pushed to 0, it is the real hyper-parameter.
Default and why
    ``epsilon=1e-7`` as in the public code. ``relative=True`` multiplies it with the mean square of ``x`` (no gradient
    through that mean), so one value suits every layer.
Cost
    Element-wise, one pass forward and one backward; keeps only ``x``, which the next layer keeps anyway. On a GPU,
    where x comes straight from GELU or SiLU or is gated by one, the backward is that of the activation and free:
    x1.02 of a ViT-B/16 step and no memory, on an H100.
When it hurts
    A dead ReLU has no gradient: nothing revives it. GELU and SiLU give small, not exact, zeros.
Not together with
    ``epsilon`` far below the square of the activations' scale: the penalty is then constant and does nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional._fusing import activate, differentiable, in_place, producer, through
from lightning_reg.functional._tokens import (
    at_least_one,
    check_activations,
    check_documents,
    check_token_mask,
    check_tokens,
    upcast,
    valid_count,
    valid_sum,
)
from lightning_reg.kernels import compiling, operator, whole

SMALLEST_EPSILON = (
    1e-30  # keeps 1 / epsilon, times a loss scale, finite in float32; an all-zero input has no other scale
)


def activation_density(
    x: Tensor, *, epsilon: float = 1e-7, mask: Tensor | None = None, relative: bool = False
) -> Tensor:
    """Mean of ``x^2 / (x^2 + epsilon)`` over valid elements.

    Args:
        x: Activations (..., width).
        epsilon: Softness of the count, > 0, in squared units of ``x``, or of its mean square with ``relative``.
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.
        relative: Scale ``epsilon`` by the mean square of the valid elements.

    Returns:
        Scalar in [0, 1], float32 (float64 for float64 input); 0 when no position is valid.

    Raises:
        ValueError: If ``epsilon`` is not positive or ``x`` or ``mask`` does not fit.

    Example:
        >>> activation_density(torch.tensor([[0.0, 2.0, 0.0, -3.0]]))
        tensor(0.5000)
    """
    return density_tap(x, epsilon=epsilon, mask=mask, relative=relative)[1]


@whole
def density_tap(
    x: Tensor, *, epsilon: float = 1e-7, mask: Tensor | None = None, relative: bool = False
) -> tuple[Tensor, Tensor]:
    """``x`` unchanged, and its density joined to the same autograd node. Arguments as ``activation_density``."""
    check_epsilon(epsilon)
    mask = check_token_mask(mask, check_activations(x))
    activation, sources = producer(x)
    return _Density.apply(x.detach() if sources else x, mask, epsilon, relative, activation, *sources)


def exact_density(
    x: Tensor, *, threshold: float = 0.0, relative: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Share of valid elements with ``|x| > threshold``; ``threshold=0`` counts exact non-zeros.

    Args:
        x: Activations (..., width).
        threshold: Magnitude up to which an element counts as zero, >= 0.
        relative: In place of ``threshold``: an element counts as zero up to this share of the largest magnitude of its
            token, in (0, 1). D2DMoE reports 1/10, 1/100 and 1/1000.
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.

    Returns:
        Scalar in [0, 1], float32, no gradient; 0 when no position is valid. NaN counts as non-zero, with ``relative``
        all of its token does.

    Raises:
        ValueError: If ``threshold`` or ``relative`` is out of range, both are given, or ``mask`` does not fit.

    Example:
        >>> exact_density(torch.tensor([[0.0, 2.0, 1e-3, -3.0]]), threshold=0.01)
        tensor(0.5000)
        >>> exact_density(torch.tensor([[0.0, 2.0, 0.5, -9.0], [0.0, 0.2, 0.5, -0.9]]), relative=0.1)
        tensor(0.6250)
    """
    active, valid = count_active(x, threshold=threshold, relative=relative, mask=mask)
    return active.float() / valid.clamp_min(1)


def exact_chunk_density(
    x: Tensor, *, chunk: int = 8, threshold: float = 0.0, documents: Tensor | None = None
) -> Tensor:
    """Share of neurons with ``|x| > threshold`` at one or more tokens of a chunk, over chunks and neurons.

    This union is what decoding ``chunk`` tokens at once has to load. Chunks begin with their document and never cross
    into another; the last one of a document may hold fewer tokens and counts as one all the same.

    Args:
        x: Activations (..., tokens, width).
        chunk: Tokens in a chunk, >= 1; 1 gives ``exact_density``.
        threshold: Magnitude up to which an element counts as zero, >= 0.
        documents: Shape of ``x`` without its last axis. Boolean: True = valid, one document a row. Integers: 0 =
            padding, equal neighbours belong to the same document.

    Returns:
        Scalar in [0, 1], float32, no gradient; 0 when no position is valid. NaN counts as non-zero.

    Raises:
        ValueError: If ``chunk`` or ``threshold`` is out of range or ``documents`` does not fit.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
        >>> exact_chunk_density(x, chunk=2), exact_density(x)
        (tensor(0.7500), tensor(0.3750))
    """
    active, total = count_chunks(x, chunk=chunk, threshold=threshold, documents=documents)
    return active.float() / total.clamp_min(1)


def count_active(
    x: Tensor, *, threshold: float = 0.0, relative: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers of active and of valid elements, int64 scalars. Arguments as ``exact_density``."""
    mask = check_token_mask(mask, x)
    active = is_active(x, threshold=threshold, relative=relative)
    if mask is None:
        return active.sum(), torch.full((), x.numel(), device=x.device)
    return active.logical_and_(mask).sum(), mask.sum() * x.shape[-1]


def count_chunks(
    x: Tensor, *, chunk: int = 8, threshold: float = 0.0, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers of active and of all pairs (chunk, neuron), int64 scalars. Arguments as ``exact_chunk_density``."""
    check_chunk(chunk)
    documents = check_documents(documents, check_tokens(x))
    documents = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if documents is None else documents
    active = is_active(x, threshold=threshold).logical_and_(documents.bool().unsqueeze(-1))
    starts = _chunk_starts(documents, chunk).flatten()
    number = (starts.cumsum(0) - 1).clamp_min_(0)
    # a row for each token, so that no size depends on the data; most stay empty
    union = torch.zeros(starts.numel(), x.shape[-1], dtype=torch.int32, device=x.device)
    union.index_add_(0, number, active.flatten(0, -2).int())
    return union.count_nonzero(), starts.sum() * x.shape[-1]


def _chunk_starts(documents: Tensor, chunk: int) -> Tensor:
    """Tokens at which a chunk begins."""
    valid = documents.bool()
    rank = valid.cumsum(-1) - 1
    if documents.dtype != torch.bool:
        begins = valid.clone()
        begins[..., 1:] &= documents[..., 1:] != documents[..., :-1]
        rank = rank - torch.where(begins, rank, 0).cummax(-1).values
    return valid & (rank % chunk == 0)


def is_active(x: Tensor, *, threshold: float = 0.0, relative: float | None = None) -> Tensor:
    """Which elements are active, boolean; NaN is, as in ``torch.count_nonzero``."""
    check_threshold(threshold)
    size = x.detach().abs()
    relative = check_relative(relative, threshold)
    if relative is None or not x.shape[-1]:
        return (size <= threshold).logical_not_()
    # the product in float32: in half precision it would round across neighbouring activations
    return (size <= upcast(size.amax(-1, keepdim=True)) * relative).logical_not_()


class _Density(torch.autograd.Function):
    """One node for the value and its density, so that one pass writes ``grad + grad_density * phi'(x) / count``.

    With the ``sources`` of x, that pass goes on through the activation function that made x of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, epsilon: float, relative: bool, activation: str, *sources: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``x`` and its density."""
        inverse = _relative_inverse(x, mask, epsilon) if relative else None
        ctx.save_for_backward(mask, inverse, *(sources or (x,)))
        ctx.fixed, ctx.activation = 1 / max(epsilon, SMALLEST_EPSILON), activation
        ctx.set_materialize_grads(False)
        return x.view_as(x), _density(x, mask, inverse, ctx.fixed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_density: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add ``grad_density * 2 x / (epsilon (1 + x^2 / epsilon)^2) / count`` to the gradient of ``x``."""
        mask, inverse, *sources = ctx.saved_tensors
        if grad_density is None:
            grads = through(ctx.activation, grad, sources)
        else:
            double = 2 * (ctx.fixed if inverse is None else inverse)
            strength = grad_density * (double / at_least_one(valid_count(sources[0], mask)))
            add = differentiable(_add_gradient)
            grads = add(grad, sources, ctx.activation, mask, inverse, ctx.fixed, strength)
        return (None, None, None, None, None, *grads) if ctx.activation else (*grads, None, None, None, None)


@operator("activation_density.density", inline=True)
def _density(x: Tensor, mask: Tensor | None, inverse: Tensor | None, fixed: float) -> Tensor:
    """Density of ``x``; 1 / epsilon is ``inverse``, or ``fixed``."""
    valid = valid_count(x, mask)
    zeros = valid_sum(_spread(upcast(x), fixed if inverse is None else inverse).reciprocal_(), mask)
    return (valid - zeros) / at_least_one(valid)


@operator("activation_density.relative_inverse", inline=True)
def _relative_inverse(x: Tensor, mask: Tensor | None, epsilon: float) -> Tensor:
    """1 / (epsilon times the mean square)."""
    square = valid_sum(upcast(x).square(), mask) / at_least_one(valid_count(x, mask))
    return square.mul_(epsilon).clamp_min_(SMALLEST_EPSILON).reciprocal_()


@operator("activation_density.add_gradient", inline=True)
def _add_gradient(
    grad: Tensor | None, sources: list[Tensor], activation: str, mask: Tensor | None, inverse: Tensor | None,
    fixed: float, strength: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of ``sources``, of which ``activation`` makes x: ``grad + strength x / (1 + x^2 / epsilon)^2``."""
    x = activate(activation, sources)
    exact = upcast(x)
    slope = _spread_again(exact, fixed if inverse is None else inverse).pow_(-2).mul_(exact)
    if mask is not None:
        slope.masked_fill_(~mask, 0.0)
    total = slope.mul_(strength).to(x.dtype) if grad is None else grad.addcmul(slope, strength).to(grad.dtype)
    return through(activation, in_place(total), sources)


def _spread(x: Tensor, inverse: float | Tensor) -> Tensor:
    """``1 + x^2 / epsilon``."""
    if isinstance(inverse, Tensor):
        return x.square().mul_(inverse).add_(1)
    return torch.addcmul(x.new_ones(()), x, x, value=inverse)


def _spread_again(x: Tensor, inverse: float | Tensor) -> Tensor:
    """``_spread`` in a backward.

    Compiled code gets another expression: were it the same, torch 2.11 would keep it from the forward on, in float32.
    """
    if not compiling():
        return _spread(x, inverse)
    root = inverse.sqrt() if isinstance(inverse, Tensor) else math.sqrt(inverse)
    return (x * root).square().add_(1)


def check_epsilon(epsilon: float) -> float:
    """Return ``epsilon`` or raise a ValueError."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"`epsilon` must be finite and > 0, got {epsilon}. DEFT's public code uses 1e-7.")
    return epsilon


def check_threshold(threshold: float) -> float:
    """Return ``threshold`` or raise a ValueError."""
    if not threshold >= 0:
        raise ValueError(f"`threshold` must be >= 0, got {threshold}.")
    return threshold


def check_relative(relative: float | None, threshold: float = 0.0) -> float | None:
    """Return ``relative`` or raise a ValueError."""
    if relative is not None and not 0 < relative < 1:
        raise ValueError(f"`relative` must be in (0, 1), got {relative}. D2DMoE reports 0.1, 0.01 and 0.001.")
    if relative is not None and threshold:
        raise ValueError(
            f"`threshold={threshold}` and `relative={relative}` exclude each other: give an absolute threshold, or one "
            "relative to the largest magnitude of a token."
        )
    return relative


def check_chunk(chunk: int) -> int:
    """Return ``chunk`` or raise a ValueError."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"`chunk` must be an integer >= 1, the tokens in a chunk, got {chunk}.")
    return chunk
