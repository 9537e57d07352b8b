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
    learning rate; on ``gain`` it shrinks the function, so ``gain`` is left out of weight decay by default. In a
    collapse made on purpose (``experiments/results/collapse.md``) it prevented, the harder one in part, and did not
    rescue: it starts at the spectral norms of the collapsed weights, and nothing lowers them.
Not together with
    QK-norm on the same projections (it removes their scale already), or another parametrization of the weight.
"""

from collections.abc import Sequence
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


class PowerIteration:
    """Power iteration of many matrices, in place on their vectors.

    All go through the same few operations, except for their products.

    Args:
        matrices: Matrices (rows, columns).
        u: Left vectors (rows,) in the dtype of their matrix.
        v: Right vectors (columns,).

    Example:
        >>> u, v = torch.zeros(2), torch.ones(2)
        >>> PowerIteration([torch.diag(torch.tensor([3.0, 0.0]))], [u], [v]).step()
        >>> u, v
        (tensor([1., 0.]), tensor([1., 0.]))
    """

    def __init__(self, matrices: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        alike: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for entry in zip(matrices, u, v, strict=True):
            alike.setdefault((entry[0].device, entry[0].dtype), []).append(entry)
        self._halves: list[_HalfStep] = []
        for entries in alike.values():
            group, left, right = (list(column) for column in zip(*entries, strict=True))
            self._halves += [_HalfStep(group, right, left), _HalfStep([matrix.T for matrix in group], left, right)]

    @torch.no_grad()
    def step(self) -> None:
        """One step ``u = W v / |W v|``, ``v = W^T u / |W^T u|``."""
        for half in self._halves:
            half()


class _HalfStep:
    """``outputs = W inputs / |W inputs|``."""

    def __init__(self, matrices: list[Tensor], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.matrices, self.inputs, self.outputs = matrices, inputs, outputs
        self.sizes = [len(output) for output in outputs]
        self.lengths = torch.tensor(self.sizes, device=outputs[0].device)
        self.owner = torch.arange(len(outputs), device=outputs[0].device).repeat_interleave(self.lengths)

    def __call__(self) -> None:
        flat = torch.cat([torch.mv(*pair) for pair in zip(self.matrices, self.inputs, strict=True)])
        squares = torch.segment_reduce(flat.square(), "sum", lengths=self.lengths, unsafe=True)
        flat /= squares.sqrt_().clamp_min_(TINY)[self.owner]
        torch._foreach_copy_(self.outputs, flat.split(self.sizes))


def rayleigh(matrices: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``u^T W v`` of each part, (parts,)."""
    return torch.stack([torch.dot(a, b) for a, b in zip(u.unbind(), _apply(matrices, v).unbind(), strict=True)])


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
    """Closed-form backward: keeps only W, where autograd would keep W / sigma too.

    Written for few operations: on small layers each costs more than its arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool) -> Tensor:
        with _full_precision(weight):
            parts = _parts(weight, gain, u, v, transposed)
            sigmas = [torch.dot(u, torch.mv(matrix, v)) for matrix, _, u, v in parts]
            factors = [gain / sigma for (_, gain, _, _), sigma in zip(parts, sigmas, strict=True)]
            ctx.save_for_backward(weight, gain, u, v, *sigmas, *factors)
            ctx.transposed = transposed
            return _as_weight(
                [part[0] * factor for part, factor in zip(parts, factors, strict=True)], weight, transposed
            )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, u, v, *scalars = ctx.saved_tensors
        sigmas, factors = scalars[: len(gain)], scalars[len(gain) :]
        with _full_precision(weight):
            parts = _parts(weight, gain, u, v, ctx.transposed)
            if torch.is_grad_enabled():  # a second derivative passes through sigma too
                sigmas = [torch.dot(u, torch.mv(matrix, v)) for matrix, _, u, v in parts]
                factors = [gain / sigma for (_, gain, _, _), sigma in zip(parts, sigmas, strict=True)]
            for_gain, for_weight = [], []
            grads = _matrices(_exact(grad), len(gain), ctx.transposed)
            for (matrix, _, u, v), grad, sigma, factor in zip(parts, grads, sigmas, factors, strict=True):
                for_gain.append(_inner(grad, matrix) / sigma)
                for_weight.append(torch.addr(grad, u, v * for_gain[-1], alpha=-1.0).mul_(factor))
            of_gain = for_gain[0].reshape(1) if len(gain) == 1 else torch.stack(for_gain)
        return _as_weight(for_weight, weight, ctx.transposed), of_gain.to(gain.dtype), None, None, None


def _parts(
    weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``(W, gain, u, v)`` of each part, in the precision to compute in."""
    matrices = _matrices(_exact(weight), len(gain), transposed)
    if u.dtype != matrices[0].dtype:
        u, v = u.to(matrices[0].dtype), v.to(matrices[0].dtype)
    if len(matrices) == 1:
        return [(matrices[0], gain, u.view(-1), v.view(-1))]
    return list(zip(matrices, gain.unbind(), u.unbind(), v.unbind(), strict=True))


def _matrices(weight: Tensor, parts: int, transposed: bool) -> tuple[Tensor, ...]:
    if parts == 1 and weight.dim() == 2:
        return (weight.t() if transposed else weight,)
    return weight_matrices(weight, parts, transposed).unbind()


def _exact(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _as_weight(matrices: list[Tensor], weight: Tensor, transposed: bool) -> Tensor:
    """Inverse of ``_matrices``, in the dtype of ``weight``."""
    joined = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    joined = joined.t() if transposed else joined
    if joined.shape != weight.shape:
        joined = joined.reshape(weight.shape)
    return joined if joined.dtype == weight.dtype else joined.to(weight.dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of ``a * b``, without the product in memory where the layout allows."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    # one product a part: a batched product may round through TF32, a matrix-vector product does not
    return torch.stack([torch.mv(matrix, vector) for matrix, vector in zip(matrices.unbind(), vectors.unbind())])
