r"""Largest singular value of a weight, by power iteration, and the sigma-Reparam weight built on it.

Formula
    ``W_hat = (gain / sigma(W)) W`` with ``sigma = u^T W v``, u and v the leading singular vectors. With
    ``G = dL/dW_hat`` and ``c = <G, W>``: ``dL/dgain = c / sigma``, ``dL/dW = (gain / sigma) G - (gain c / sigma^2) u v^T``,
    so ``<dL/dW, W> = 0``: the loss does not see the scale of W.
Source
    sigma-Reparam (Zhai et al. 2023, arXiv 2303.06296, section 3.2, where ``gain`` is called gamma).
Input
    Matrices (parts, rows, columns), one sigma and one gain for each part; ``weight_matrices`` brings a Linear, a
    convolution (output channels by the rest) or a GPT-2 ``Conv1D`` (transposed) to that shape.
Unit and range
    sigma >= 0 in units of the weight. Power iteration approaches it from below.
Default and why
    ``gain = sigma(W_0)`` preserves the function at the start (safe for fine-tuning); the paper starts at 1.
Cost
    One matrix-vector product and one pass over W in forward, two passes in backward, one iteration per optimizer step.
When it hurts
    Models that need sharp heads; see the evidence in the README. Weight decay on W only changes its effective
    learning rate; on ``gain`` it shrinks the function, so ``gain`` is left out of weight decay by default.
Not together with
    QK-norm on the same projections (it removes their scale already), or another parametrization of the weight.
"""

from typing import Any

import torch
from torch import Tensor, nn

GRAM_LIMIT = 4096  # smaller side up to which the exact Gram eigenvector is cheaper than many iterations


def spectral_norm(weight: Tensor) -> Tensor:
    """Exact largest singular value of a weight (rows, ...) flattened to a matrix.

    Args:
        weight: At least two axes; axes after the first are flattened.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Example:
        >>> spectral_norm(torch.diag(torch.tensor([3.0, 1.0])))
        tensor(3.)
    """
    if weight.dim() < 2:
        raise ValueError(f"`weight` must have at least two axes, got shape {tuple(weight.shape)}.")
    sigma, _, _ = leading_singular_triplet(weight.detach().flatten(1).unsqueeze(0))
    return sigma[0]


def leading_singular_triplet(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact ``(sigma, u, v)`` of each matrix (parts, rows, columns): (parts,), (parts, rows), (parts, columns)."""
    exact = matrices.double()
    wide = exact.shape[1] <= exact.shape[2]
    small = exact if wide else exact.transpose(1, 2)
    if small.shape[1] <= GRAM_LIMIT:
        left = torch.linalg.eigh(small @ small.transpose(1, 2)).eigenvectors[..., -1]
        right = nn.functional.normalize(_apply(small.transpose(1, 2), left), dim=-1)
    else:
        right = torch.ones_like(small[:, 0, :])
        for _ in range(100):
            left, right = power_iteration(small, right)
    left = nn.functional.normalize(_apply(small, right), dim=-1)
    u, v = (left, right) if wide else (right, left)
    dtype = torch.float64 if matrices.dtype == torch.float64 else torch.float32
    return rayleigh(exact, u, v).to(dtype), u.to(dtype).contiguous(), v.to(dtype).contiguous()


def power_iteration(matrices: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One step from v: ``u = W v / |W v|``, ``v = W^T u / |W^T u|``; shapes as ``leading_singular_triplet``."""
    u = nn.functional.normalize(_apply(matrices, v), dim=-1)
    return u, nn.functional.normalize(_apply(matrices.transpose(1, 2), u), dim=-1)


def rayleigh(matrices: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``u^T W v`` of each part, (parts,)."""
    return (u * _apply(matrices, v)).sum(-1)


def spectral_reparam(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool = False) -> Tensor:
    """``(gain / sigma) W``, differentiable in ``weight`` and ``gain`` with u and v held fixed.

    Args:
        weight: Weight of a layer, its output axis first, or last when ``transposed`` (GPT-2 ``Conv1D``).
        gain: (parts,), the output axis is cut into as many equal parts (3 for a fused QKV projection).
        u: Left singular vectors (parts, rows).
        v: Right singular vectors (parts, columns).
        transposed: The output axis is the last one.

    Returns:
        Shape and dtype of ``weight``.
    """
    return _SpectralReparam.apply(weight, gain, u, v, transposed)


def weight_matrices(weight: Tensor, parts: int = 1, transposed: bool = False) -> Tensor:
    """View a weight as (parts, rows, columns), rows along the output axis."""
    if transposed:
        return weight.unflatten(1, (parts, -1)).permute(1, 2, 0)
    return weight.unflatten(0, (parts, -1)).flatten(2)


class _SpectralReparam(torch.autograd.Function):
    """Closed-form backward: keeps only W, where autograd would keep W / sigma too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
            matrices = weight_matrices(exact, len(gain), transposed)
            sigma = rayleigh(matrices, u.to(exact.dtype), v.to(exact.dtype))
            factor = gain.to(exact.dtype) / sigma
            ctx.save_for_backward(weight, gain, u, v, sigma)
            ctx.transposed = transposed
            return _scaled(exact, factor, transposed).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, u, v, sigma = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            matrices = weight_matrices(weight.to(sigma.dtype), len(gain), ctx.transposed)
            grads = weight_matrices(grad.to(sigma.dtype), len(gain), ctx.transposed)
            overlap = (grads * matrices).sum((1, 2))
            factor = gain.to(sigma.dtype) / sigma
            outer = u.to(sigma.dtype).unsqueeze(2) * (v.to(sigma.dtype) * (factor * overlap / sigma)[:, None]).unsqueeze(1)
            for_weight = grads * factor[:, None, None] - outer
            if ctx.transposed:
                for_weight = for_weight.permute(2, 0, 1)
            for_weight = for_weight.reshape(weight.shape).to(weight.dtype)
        return for_weight, (overlap / sigma).to(gain.dtype), None, None, None


def _scaled(weight: Tensor, factor: Tensor, transposed: bool) -> Tensor:
    axis = 1 if transposed else 0
    parts = weight.unflatten(axis, (len(factor), -1))
    shape = [1] * parts.dim()
    shape[axis] = -1
    return (parts * factor.view(shape)).flatten(axis, axis + 1)


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
