r"""Largest singular value of a weight, by power iteration, and the sigma-Reparam weight built on it.

Formula
    ``W_hat = (gain / sigma(W)) W`` with ``sigma = u^T W v``, u and v the leading singular vectors. With
    ``G = dL/dW_hat`` and ``c = <G, W>``: ``dL/dgain = c / sigma`` and
    ``dL/dW = (gain / sigma) G - (gain c / sigma^2) u v^T``, so ``<dL/dW, W> = 0``: the loss does not see the
    scale of W.
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
    One matrix-vector product and one pass over W in forward, three passes in backward, one power iteration per
    optimizer step.
When it hurts
    Models that need sharp heads; see the evidence in the README. Weight decay on W only changes its effective
    learning rate; on ``gain`` it shrinks the function, so ``gain`` is left out of weight decay by default.
Not together with
    QK-norm on the same projections (it removes their scale already), or another parametrization of the weight.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

GRAM_LIMIT = 256  # smaller side up to which an eigendecomposition of the Gram matrix is the cheaper exact way
TINY = 1e-30


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
    dtype = torch.float64 if matrices.dtype == torch.float64 else torch.float32
    exact = matrices.detach().double()
    v = torch.stack([_leading_right_vector(matrix) for matrix in exact])
    u = nn.functional.normalize(_apply(exact, v), dim=-1)
    return rayleigh(exact, u, v).to(dtype), u.to(dtype).contiguous(), v.to(dtype).contiguous()


def _leading_right_vector(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        return torch.full_like(matrix[0], torch.nan)
    if min(matrix.shape) > GRAM_LIMIT:
        return _lanczos(matrix)
    if matrix.shape[0] >= matrix.shape[1]:
        return torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -1]
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
    return nn.functional.normalize(matrix.T @ left, dim=0)


def _lanczos(matrix: Tensor, steps: int = 80, restarts: int = 20) -> Tensor:
    """Leading right singular vector by Golub-Kahan bidiagonalisation, reorthogonalised, restarted from its best vector.

    It finds the closely spaced singular values of a random matrix in some sixty products with W, where power iteration
    needs thousands. The start is random but fixed: a constant vector is orthogonal to the answer for centred weights.
    """
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    best = nn.functional.normalize(start.to(matrix.device), dim=0)
    for _ in range(restarts):
        right, diagonal, above = [best], [], []
        left: list[Tensor] = []
        for _ in range(steps):
            u = _orthogonalised(matrix @ right[-1], left)
            diagonal.append(u.norm())
            left.append(u / diagonal[-1].clamp_min(TINY))
            v = _orthogonalised(matrix.T @ left[-1], right)
            above.append(v.norm())
            right.append(v / above[-1].clamp_min(TINY))
        small = torch.diag(torch.stack(diagonal)) + torch.diag(torch.stack(above[:-1]), 1)
        p, sigma, qh = torch.linalg.svd(small)
        best = nn.functional.normalize(torch.stack(right[:-1], 1) @ qh[0], dim=0)
        if above[-1] * p[-1, 0].abs() <= 1e-6 * sigma[0]:
            break
    return best


def _orthogonalised(vector: Tensor, basis: list[Tensor]) -> Tensor:
    if basis:
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough, once is not
            vector = vector - stacked.T @ (stacked @ vector)
    return vector


@torch.no_grad()
def power_iteration_(matrices: list[Tensor], u: list[Tensor], v: list[Tensor]) -> None:
    """One step ``u = W v / |W v|``, ``v = W^T u / |W^T u|`` of many matrices (rows, columns), in place on u and v.

    All layers go through the same few kernels, except for the products.
    """
    for inputs, outputs, sources in ((v, u, matrices), (u, v, [matrix.T for matrix in matrices])):
        products = [torch.mv(matrix, vector) for matrix, vector in zip(sources, inputs, strict=True)]
        norms = torch._foreach_norm(products)
        torch._foreach_clamp_min_(norms, TINY)
        torch._foreach_div_(products, norms)
        torch._foreach_copy_(outputs, products)


def rayleigh(matrices: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``u^T W v`` of each part, (parts,)."""
    return _inner(u, _apply(matrices, v))


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
    weight = weight.t() if transposed else weight
    return weight.reshape(parts, weight.shape[0] // parts, -1)


class _SpectralReparam(torch.autograd.Function):
    """Closed-form backward: keeps only W, where autograd would keep W / sigma too. Written for few kernel launches."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool) -> Tensor:
        with _full_precision(weight):
            matrices = weight_matrices(_exact(weight), len(gain), transposed)
            sigma = rayleigh(matrices, u.to(matrices.dtype), v.to(matrices.dtype))
            factor = gain / sigma
            ctx.save_for_backward(weight, gain, u, v, sigma, factor)
            ctx.transposed = transposed
            return _as_weight(matrices * _per_part(factor), weight, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, u, v, sigma, factor = ctx.saved_tensors
        with _full_precision(weight):
            matrices = weight_matrices(_exact(weight), len(gain), ctx.transposed)
            grads = weight_matrices(_exact(grad), len(gain), ctx.transposed)
            u, v = u.to(matrices.dtype), v.to(matrices.dtype)
            if torch.is_grad_enabled():
                sigma = rayleigh(matrices, u, v)  # a second derivative passes through sigma too
                factor = gain / sigma
            for_gain = _inner(grads, matrices) / sigma
            scaled = v * (for_gain if len(gain) == 1 else for_gain.unsqueeze(1))
            for_weight = torch.addcmul(grads, u.unsqueeze(2), scaled.unsqueeze(1), value=-1.0).mul_(_per_part(factor))
        return _as_weight(for_weight, weight, ctx.transposed), for_gain.to(gain.dtype), None, None, None


def _per_part(factor: Tensor) -> Tensor:
    return factor if len(factor) == 1 else factor.view(-1, 1, 1)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _as_weight(matrices: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Inverse of ``weight_matrices``, in the dtype of ``weight``."""
    if transposed:
        return matrices.reshape(weight.shape[1], -1).t().to(weight.dtype)
    return matrices.reshape(weight.shape).to(weight.dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of ``a * b`` over each part, without the product in memory where the layout allows."""
    if not (a.is_contiguous() and b.is_contiguous()):
        return (a * b).flatten(1).sum(1)
    if len(a) == 1:
        return torch.dot(a.view(-1), b.view(-1)).unsqueeze(0)
    return torch.stack([torch.dot(x.view(-1), y.view(-1)) for x, y in zip(a.unbind(), b.unbind())])


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    # one product a part: a batched product may round through TF32, a matrix-vector product does not
    if len(matrices) == 1:
        return torch.mv(matrices[0], vectors[0]).unsqueeze(0)
    return torch.stack([torch.mv(matrix, vector) for matrix, vector in zip(matrices.unbind(), vectors.unbind())])
