r"""z-loss: the squared logarithm of the softmax's normaliser, which keeps output logits from drifting.

Formula
    ``z_t = log sum_c exp x_tc`` of each position; the mean of ``z_t^2`` over valid positions.
    ``dz_t^2/dx_tc = 2 z_t softmax(x_t)_c``.
Source
    PaLM (arXiv 2204.02311, section 5, weight 1e-4), after Mesh-TensorFlow; Wortsman et al. 2023 (arXiv 2309.14322,
    section 3.2) show that 1e-4 removes the divergence of output logits. Chameleon and OLMo 2 use 1e-5.
Input
    Logits ``x`` of any shape (..., classes), as they enter the softmax.
Unit and range
    Squared nats, >= 0: 0 where the exponentials sum to 1, so that logits are log-probabilities, and log(classes)^2 when
    all logits are 0. A position that does not count (padding, an ignored label) leaves no trace.
Where it acts
    It pulls all logits of a position down together while z > 0, and up while z < 0. The cross-entropy does not see that
    direction, so the two do not argue. The pull grows with the drift and does not vanish: it rescues logits that have
    drifted. It says nothing of a collapsed attention, nor of how confident a prediction is.
Default and why
    Weight 1e-4, at which the term is about 1e-4 * 120 of a loss of 10 at the start of a vocabulary of 50k.
Cost
    One pass forward and one backward, in float32 (float64 stays): on a GPU by one kernel each, elsewhere in chunks of
    about ``BLOCK_SCORES`` numbers. Keeps the logits and one number of each position; a loss that upcasts logits in half
    precision would have freed them.
When it hurts
    A model that must say how sure it is by the size of its logits (energy-based, some contrastive losses). Large
    weights slow the start, where z is log(classes). It
    acts on the output's logits only: against a collapse of attention (``experiments/results/collapse.md``) it did
    nothing. In bfloat16 logits the gradient of a small weight is lost in the rounding of the loss's own
    (2 w z against 2^-8): keep the head in float32.
Not together with
    A loss that contains it already (flash-attention's and Liger's ``lse_square_scale``): it would count twice.
    Soft-capped logits are bounded anyway; take the logits after the cap.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional._scores import BLOCK_SCORES, LARGE_BLOCKS
from lightning_reg.functional._tokens import at_least_one, check_token_mask, upcast
from lightning_reg.kernels import operator


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean over valid positions of ``logsumexp(logits)^2``.

    Args:
        logits: (..., classes).
        mask: Valid positions, True = valid, shape of ``logits`` without its last axis.

    Returns:
        Scalar >= 0 in squared nats, float32 (float64 for float64 input); 0 when no position is valid.

    Raises:
        ValueError: If ``logits`` or ``mask`` does not fit.

    Example:
        >>> z_loss(torch.zeros(2, 4))  # log(4)^2
        tensor(1.9218)
    """
    return z_loss_tap(logits, mask=mask)[1]


def z_loss_tap(logits: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``logits`` unchanged, and their z-loss joined to the same autograd node. Arguments as ``z_loss``."""
    logits, z = _LogSumExp.apply(check_logits(logits))
    return logits, position_mean(valid_or_zero(z, check_token_mask(mask, logits)).square(), mask)


def labelled(labels: Tensor, *, ignore_index: int = -100, shift: bool = False) -> Tensor:
    """Positions whose logits a loss compares with a label: the mask for ``labels``.

    Args:
        labels: Classes (..., tokens), integers.
        ignore_index: Label of the positions that do not count.
        shift: The loss compares the logits of a token with the label of the next, as Hugging Face does: the label of a
            position is that of the next, and the last has none.

    Returns:
        Boolean, shape of ``labels``.

    Raises:
        ValueError: If ``labels`` are not integers, or have no tokens to shift.

    Example:
        >>> labelled(torch.tensor([-100, 3, 5, -100]), shift=True)
        tensor([ True,  True, False, False])
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be classes as integers, got {labels.dtype}; use `mask=` for valid positions.")
    counted = labels != ignore_index
    if not shift:
        return counted
    if labels.dim() == 0:
        raise ValueError("`shift=True` needs `labels` with an axis of tokens, (..., tokens), got shape ().")
    following = torch.zeros_like(counted)
    following[..., :-1] = counted[..., 1:]
    return following


class _LogSumExp(torch.autograd.Function):
    """One node for the logits and the logarithm of the sum of their exponentials."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` (..., classes) and z (...)."""
        z = _log_sum_exp(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])
        ctx.save_for_backward(x, z)
        ctx.set_materialize_grads(False)
        return x.view_as(x), z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> Tensor | None:
        """Add ``grad_z * softmax(x)`` to the gradient of ``x``."""
        x, z = ctx.saved_tensors
        if grad_z is None:
            return grad
        flat = x.reshape(-1, x.shape[-1])
        grad = None if grad is None else grad.reshape(flat.shape)
        # a kernel knows nothing of its own derivative
        gradient = _gradient if torch.is_grad_enabled() else _fast_gradient
        return gradient(flat, z.reshape(-1), grad_z.reshape(-1), grad).reshape(x.shape)


@operator("z_loss.forward", inline=True)
def _log_sum_exp(x: Tensor) -> Tensor:
    """Z (positions,) of logits (positions, classes)."""
    z = upcast(x[:, 0]).clone()
    for part in row_chunks(x):
        z[part] = upcast(x[part]).logsumexp(-1)
    return z


def _gradient(x: Tensor, z: Tensor, grad_z: Tensor, grad: Tensor | None) -> Tensor:
    """``grad + grad_z * softmax(x)``, (positions, classes)."""
    z, grad_z = z.unsqueeze(1), grad_z.unsqueeze(1)
    total = torch.empty_like(x)
    for part in row_chunks(x):
        pull = (upcast(x[part]) - z[part]).exp() * grad_z[part]
        total[part] = joined(pull, grad_z[part], grad, part)
    return total


_fast_gradient = operator("z_loss.backward", inline=True)(_gradient)


def row_chunks(flat: Tensor) -> Iterator[slice]:
    """Slices of (positions, classes) that hold about ``BLOCK_SCORES`` numbers, more on an accelerator."""
    compiling, on_cpu = torch.compiler.is_compiling(), flat.device.type == "cpu"
    if compiling and not on_cpu:  # what is compiled there keeps no intermediate results, and sees the loss beside us
        yield slice(0, len(flat))
        return
    large = compiling or not on_cpu
    step = max(1, BLOCK_SCORES * (LARGE_BLOCKS if large else 1) // flat.shape[1])
    for start in range(0, len(flat), step):
        yield slice(start, start + step)


def joined(pull: Tensor, grad_row: Tensor, grad: Tensor | None, part: slice) -> Tensor:
    """A chunk of the gradient of the logits: ours, and what came from the loss.

    Positions that do not count get nothing from us, whatever is in them.
    """
    pull = pull.masked_fill(grad_row == 0, 0.0)
    return pull if grad is None else pull + grad[part]


def valid_or_zero(rows: Tensor, mask: Tensor | None) -> Tensor:
    """``rows`` (...) with 0 where the checked ``mask`` (..., 1) is False, also in place of NaN."""
    return rows if mask is None else torch.where(mask.squeeze(-1), rows, 0.0)


def position_mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of rows of which those that do not count are 0, over those that count; 0 when none does."""
    return rows.sum() / at_least_one(rows.numel() if mask is None else mask.bool().sum())


def check_logits(logits: Tensor, classes: int = 1) -> Tensor:
    """Return ``logits`` or raise a ValueError."""
    if not torch.is_floating_point(logits) or logits.dim() == 0 or logits.shape[-1] < 1:
        raise ValueError(
            f"`logits` must be floating point of shape (..., classes), got {tuple(logits.shape)} {logits.dtype}."
        )
    if logits.shape[-1] < classes:
        raise ValueError(
            f"`logits` must have at least {classes} classes, got {logits.shape[-1]}; set `multi_label=True` for a "
            "sigmoid output."
        )
    return logits
