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
    optimizer step. The kernels read W twice in forward and once in backward, the second time from the cache, and write
    the weight in use in the dtype of autocast; in eager code the small weights of a block are computed at once.
When it hurts
    Models that need sharp heads; see the evidence in the README. Weight decay on W only changes its effective
    learning rate; on ``gain`` it shrinks the function, so ``gain`` is left out of weight decay by default. In a
    collapse made on purpose (``experiments/results/collapse.md``) it prevented, the harder one in part, and did not
    rescue: it starts at the spectral norms of the collapsed weights, and nothing lowers them.
Not together with
    QK-norm on the same projections (it removes their scale already), or another parametrization of the weight.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.functional._fusing import saving_is_hooked
from lightning_reg.kernels import operators
from lightning_reg.kernels.operators import (
    Unsupported,
    compiling,
    operator,
    unavailable,
    warn_of_failure,
    warn_once,
    whole,
)

GRAM_LIMIT = 256  # smaller side up to which an eigendecomposition of the Gram matrix is the cheaper exact way
TINY = 1e-30
MOST_JOINT = 8  # weights that are computed at once, as in ``kernels.spectral_norm``
TRITON = find_spec("triton") is not None


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

    All go through the same few operations, on a CUDA device even for their products.

    Args:
        matrices: Matrices (rows, columns).
        u: Left vectors (rows,).
        v: Right vectors (columns,), of one dtype with the left ones.
        starts: Of sharded matrices, where in ``u`` the rows begin that ``matrices`` holds of each.
        reduce: For sharded matrices: sums a buffer over all processes, in place. Called once in a step.

    Example:
        >>> u, v = torch.zeros(2), torch.ones(2)
        >>> PowerIteration([torch.diag(torch.tensor([3.0, 0.0]))], [u], [v]).step()
        >>> u, v
        (tensor([1., 0.]), tensor([1., 0.]))
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        *,
        starts: Sequence[int] | None = None,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        alike: dict[Any, list[tuple[Tensor, Tensor, Tensor, int]]] = {}
        for entry in zip(matrices, u, v, starts or [0] * len(matrices), strict=True):
            alike.setdefault((entry[1].device, entry[1].dtype), []).append(entry)
        self._steps: list[_HalfStep | _WholeStep] = []
        for entries in alike.values():
            group, left, right, first = (list(column) for column in zip(*entries, strict=True))
            if reduce is not None or unavailable(left[0]) is None:
                self._steps.append(_WholeStep(group, left, right, first, reduce))
            else:
                self._steps += [_HalfStep(group, right, left), _HalfStep([matrix.T for matrix in group], left, right)]

    @torch.no_grad()
    def step(self) -> None:
        """One step ``u = W v / |W v|``, ``v = W^T u / |W^T u|``."""
        for step in self._steps:
            step()


class _HalfStep:
    """``outputs = W inputs / |W inputs|``."""

    def __init__(self, matrices: list[Tensor], inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.matrices, self.inputs, self.outputs = matrices, inputs, outputs
        self.sizes = [len(output) for output in outputs]
        self.lengths = torch.tensor(self.sizes, device=outputs[0].device)
        self.owner = torch.arange(len(outputs), device=outputs[0].device).repeat_interleave(self.lengths)

    def __call__(self) -> None:
        flat = torch.cat([_product(*pair) for pair in zip(self.matrices, self.inputs, strict=True)])
        squares = torch.segment_reduce(flat.square(), "sum", lengths=self.lengths, unsafe=True)
        flat /= squares.sqrt_().clamp_min_(TINY)[self.owner]
        torch._foreach_copy_(self.outputs, flat.split(self.sizes))


class _WholeStep:
    """``y = W v`` and ``z = W^T y`` of all matrices in one buffer, then ``u = y / |y|`` and ``v = z / |z|``."""

    def __init__(
        self,
        matrices: list[Tensor],
        u: list[Tensor],
        v: list[Tensor],
        starts: list[int],
        reduce: Callable[[Tensor], None] | None,
    ) -> None:
        self.matrices, self.inputs, self.outputs, self.reduce = matrices, v, [*u, *v], reduce
        self.sizes = [len(output) for output in self.outputs]
        self.lengths = torch.tensor(self.sizes, device=u[0].device)
        self.owner = torch.arange(len(self.sizes), device=u[0].device).repeat_interleave(self.lengths)
        self.flat = torch.zeros(sum(self.sizes), dtype=u[0].dtype, device=u[0].device)
        pieces = self.flat.split(self.sizes)
        self.left = [y[start : start + len(w)] for y, w, start in zip(pieces, matrices, starts, strict=False)]
        self.right = pieces[len(u) :]
        self.kernels = self._kernels()

    def __call__(self) -> None:
        if self.reduce is not None:
            self.flat.zero_()  # the rows of other processes
        self._launch(0, self._products)
        if self.reduce is not None:
            self.reduce(self.flat)
        self._launch(1, self._normalise)

    def _products(self) -> None:
        for matrix, v, y, z in zip(self.matrices, self.inputs, self.left, self.right, strict=True):
            y.copy_(_product(matrix, v))
            z.copy_(_product(matrix.T, y))

    def _normalise(self) -> None:
        # first to a largest entry of 1: the squares of W^T W v would leave the range of float32
        for norm in (self._largest, self._norm):
            self.flat /= norm().clamp_min_(TINY)[self.owner]
        torch._foreach_copy_(self.outputs, self.flat.split(self.sizes))

    def _largest(self) -> Tensor:
        return torch.segment_reduce(self.flat.abs(), "max", lengths=self.lengths, unsafe=True)

    def _norm(self) -> Tensor:
        return torch.segment_reduce(self.flat.square(), "sum", lengths=self.lengths, unsafe=True).sqrt_()

    def _launch(self, stage: int, torch_code: Callable[[], None]) -> None:
        if self.kernels:
            try:
                return self.kernels[stage]()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.kernels = ()
                warn_of_failure("power iteration in plain torch", error)
        torch_code()

    def _kernels(self) -> tuple[Callable[[], None], ...]:
        reason = unavailable(self.flat)
        if reason is None:
            from lightning_reg.kernels import spectral_norm as kernels

            try:
                products = kernels.Products(self.matrices, self.inputs, self.left, self.right)
                return products, kernels.Normalise(self.flat, self.sizes, self.outputs)
            except Unsupported as unsupported:
                reason = str(unsupported)
        if reason:
            _warn_of_torch(reason)
        return ()


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(matrix.to(vector.dtype), vector)


def _warn_of_torch(reason: str) -> None:
    warn_once(f"lightning_reg computes power iteration in plain torch, which is exact but slower, because {reason}.")


def rayleigh(matrices: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``u^T W v`` of each part, (parts,)."""
    return torch.stack([torch.dot(a, b) for a, b in zip(u.unbind(), _apply(matrices, v).unbind(), strict=True)])


@whole
def spectral_reparam(
    weight: Tensor,
    gain: Tensor,
    u: Tensor,
    v: Tensor,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``(gain / sigma) W``, differentiable in ``weight`` and ``gain`` with u and v held fixed.

    Args:
        weight: Weight of a layer, its output axis first, or last when ``transposed`` (GPT-2 ``Conv1D``).
        gain: (parts,), the output axis is cut into as many equal parts (3 for a fused QKV projection).
        u: Left singular vectors (parts, rows).
        v: Right singular vectors (parts, columns).
        transposed: The output axis is the last one.
        dtype: Of the result, which is rounded once; that of ``weight`` when left out.

    Returns:
        Shape of ``weight``.
    """
    return _SpectralReparam.apply(weight, gain, u, v, transposed, dtype or weight.dtype)


def weight_matrices(weight: Tensor, parts: int = 1, transposed: bool = False) -> Tensor:
    """View a weight as (parts, rows, columns), rows along the output axis."""
    weight = weight.t() if transposed else weight
    return weight.reshape(parts, weight.shape[0] // parts, -1)


Operand = tuple[Tensor, Tensor, Tensor, Tensor, bool]  # weight, gain, u, v, transposed


class JointReparam:
    """``spectral_reparam`` of several weights at once, by kernels: one autograd node for all.

    What it returns belongs together no closer than weights of their own: each can be used or left, and a gradient may
    come to some of them before the others.

    Args:
        operands: ``(weight, gain, u, v, transposed)`` of each weight, of the same dtypes and on one device.
        dtype: Of the weights in use.
    """

    def __init__(self, operands: Sequence[Operand], dtype: torch.dtype) -> None:
        from lightning_reg.kernels.spectral_norm import Together

        self.operands = operands
        self.addresses = self._where()
        try:
            self.kernels: Together | None = Together(operands, dtype)
        except Unsupported:  # a weight alone will say why
            self.kernels = None

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether a weight can be computed with others at this moment."""
        if unavailable(weight) is not None or not (weight.requires_grad and torch.is_grad_enabled()):
            return False
        traced = compiling() or torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active()
        return type(weight) in (Tensor, nn.Parameter) and not traced and not saving_is_hooked()

    def is_of(self, operands: Sequence[Operand]) -> bool:
        """Whether these are the tensors, where they were."""
        if len(operands) != len(self.operands):
            return False
        pairs = zip(chain.from_iterable(self.operands), chain.from_iterable(operands), strict=True)
        return all(a is b for a, b in pairs) and self.stands()

    def stands(self) -> bool:
        """Whether all tensors still lie where they did."""
        return self.addresses == self._where()

    def versions(self) -> list[list[int]]:
        """Of each weight, numbers that grow with each change in place."""
        return [[tensor._version for tensor in operand[:4]] for operand in self.operands]

    def __call__(self, finished: Callable[[], None]) -> Sequence[Tensor]:
        """The weights in use, none where it cannot be done; ``finished`` is called when a backward comes to one."""
        if self.kernels is None:
            return ()
        weights, gains = ([operand[place] for operand in self.operands] for place in (0, 1))
        try:
            return _JointReparam.apply(self, finished, *weights, *gains)  # type: ignore[return-value]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            warn_of_failure("the weights of sigma-Reparam one by one", error)
            self.kernels = None
            return ()

    def gradients(self, grads: Sequence[Tensor | None], sums: Tensor) -> tuple[list[Any], list[Any]]:
        """Of weights and gains, from those of the weights in use and what the forward summed."""
        if torch.is_grad_enabled() or not self.stands() or self.kernels is None:
            return self._one_by_one(grads, sums)
        arrived = next(grad for grad in grads if grad is not None)
        # of what has not come any gradient will do: the result is not looked at
        filled = [
            torch.empty_like(operand[0], dtype=arrived.dtype) if grad is None else grad
            for operand, grad in zip(self.operands, grads, strict=True)
        ]
        try:
            return self.kernels.gradients(filled, sums)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            warn_of_failure("the gradients of sigma-Reparam one by one", error)
            return self._one_by_one(grads, sums)

    def _one_by_one(self, grads: Sequence[Tensor | None], sums: Tensor) -> tuple[list[Any], list[Any]]:
        parts = [len(operand[1]) for operand in self.operands]
        found: tuple[list[Any], list[Any]] = [], []
        each = zip(self.operands, grads, sums[-sum(parts) :].split(parts), strict=True)
        for (weight, gain, u, v, transposed), grad, sigmas in each:
            pair: tuple[Any, Any] = (None, None)
            if grad is not None:
                pair = _own_gradients(grad, weight, gain, u, v, sigmas, transposed)
            found[0].append(pair[0])
            found[1].append(pair[1])
        return found

    def _where(self) -> list[int]:
        return [tensor.data_ptr() for operand in self.operands for tensor in operand[:4]]


class _JointReparam(torch.autograd.Function):
    """Keeps the tensors itself: a part of the gradients may come in one backward, the others in the next."""

    @staticmethod
    def forward(ctx: Any, joint: JointReparam, finished: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        assert joint.kernels is not None
        scaled, ctx.sums = joint.kernels.scaled()
        ctx.joint, ctx.finished, ctx.versions = joint, finished, joint.versions()
        ctx.set_materialize_grads(False)
        return tuple(scaled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        joint: JointReparam = ctx.joint
        ctx.finished()
        if all(grad is None for grad in grads):
            return (None,) * (2 + 2 * len(grads))
        pairs = zip(grads, joint.versions(), ctx.versions, strict=True)
        if any(grad is not None and now != then for grad, now, then in pairs):
            raise RuntimeError(
                "a weight, gain or singular vector of sigma-Reparam was changed in place between forward and backward; "
                "step the optimizer after the backward."
            )
        for_weights, for_gains = (
            [None if grad is None else own for own, grad in zip(column, grads, strict=True)]
            for column in joint.gradients(grads, ctx.sums)
        )
        return None, None, *for_weights, *for_gains


class _SpectralReparam(torch.autograd.Function):
    """Closed-form backward: keeps only W, where autograd would keep W / sigma too."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool, dtype: torch.dtype
    ) -> Tensor:
        if _traced_with_kernels(weight, gain, u, v, dtype):
            from lightning_reg.kernels.spectral_norm import compiled_scaled_weight as scale
        else:
            scale = scaled_weight
        scaled, sigmas = scale(weight, gain, u, v, transposed, dtype)
        ctx.save_for_backward(weight, gain, u, v, sigmas)
        ctx.transposed = transposed
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, u, v, sigmas = ctx.saved_tensors
        return *_own_gradients(grad, weight, gain, u, v, sigmas, ctx.transposed), None, None, None, None


def _own_gradients(
    grad: Tensor, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, sigmas: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of one weight and its gain."""
    if torch.is_grad_enabled():  # a second derivative passes through sigma too
        with _full_precision(weight):
            sigmas = _sigmas(_parts(weight, gain, u, v, transposed))
        gradients = _gradients
    elif _traced_with_kernels(weight, gain, u, v, grad.dtype):
        from lightning_reg.kernels.spectral_norm import compiled_scaled_weight_gradients as gradients
    else:
        gradients = scaled_weight_gradients
    return gradients(grad, weight, gain, u, v, sigmas, transposed)


def _traced_with_kernels(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> bool:
    """Whether code is being compiled whose kernels can be part of it."""
    if not (compiling() and weight.is_cuda and TRITON) or operators._off:
        return False
    from lightning_reg.kernels.spectral_norm import unsupported

    return unsupported(weight, gain, u, v, dtype) is None


@operator("spectral_norm.scaled_weight", inline=True)
def scaled_weight(
    weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``((gain / sigma) W, sigma)``: the weight in ``dtype``, sigma (parts,).

    Written for few operations, as is its gradient: on small layers each costs more than its arithmetic.
    """
    with _full_precision(weight):
        parts = _parts(weight, gain, u, v, transposed)
        sigmas = _sigmas(parts)
        factors = _each(_exact(gain) / sigmas)
        scaled = [matrix * factor for (matrix, _, _), factor in zip(parts, factors, strict=True)]
        return _as_weight(scaled, weight, transposed, dtype), sigmas


def _gradients(
    grad: Tensor, weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, sigmas: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and gain, in their dtypes."""
    with _full_precision(weight):
        for_gain, for_weight = [], []
        parts, grads = _parts(weight, gain, u, v, transposed), _matrices(_exact(grad), len(gain), transposed)
        scalars = _each(sigmas), _each(_exact(gain) / sigmas)
        for (matrix, u, v), grad, sigma, factor in zip(parts, grads, *scalars, strict=True):
            for_gain.append(_inner(grad, matrix) / sigma)
            for_weight.append(torch.addr(grad, u, v * for_gain[-1], alpha=-1.0).mul_(factor))
        of_gain = for_gain[0] if len(for_gain) == 1 else torch.stack(for_gain)
        return _as_weight(for_weight, weight, transposed, weight.dtype), of_gain.to(gain.dtype)


scaled_weight_gradients = operator("spectral_norm.scaled_weight_gradients", inline=True)(_gradients)


def _parts(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, transposed: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``(W, u, v)`` of each part, in the precision to compute in."""
    matrices = _matrices(_exact(weight), len(gain), transposed)
    if u.dtype != matrices[0].dtype:
        u, v = u.to(matrices[0].dtype), v.to(matrices[0].dtype)
    if len(matrices) == 1:
        return [(matrices[0], u.view(-1), v.view(-1))]
    return list(zip(matrices, u.unbind(), v.unbind(), strict=True))


def _sigmas(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """``u^T W v`` of each part, (parts,)."""
    each = [torch.dot(u, torch.mv(matrix, v)) for matrix, u, v in parts]
    return each[0].view(1) if len(each) == 1 else torch.stack(each)


def _each(scalars: Tensor) -> tuple[Tensor, ...]:
    return (scalars,) if len(scalars) == 1 else scalars.unbind()


def _matrices(weight: Tensor, parts: int, transposed: bool) -> tuple[Tensor, ...]:
    if parts == 1 and weight.dim() == 2:
        return (weight.t() if transposed else weight,)
    return weight_matrices(weight, parts, transposed).unbind()


def _exact(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _as_weight(matrices: list[Tensor], weight: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Inverse of ``_matrices``, in ``dtype``."""
    joined = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    joined = joined.t() if transposed else joined
    if joined.shape != weight.shape:
        joined = joined.reshape(weight.shape)
    return joined if joined.dtype == dtype else joined.to(dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of ``a * b``, without the product in memory where the layout allows."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    # one product a part: a batched product may round through TF32, a matrix-vector product does not
    return torch.stack([torch.mv(matrix, vector) for matrix, vector in zip(matrices.unbind(), vectors.unbind())])
