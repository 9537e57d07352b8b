r"""How much activations change from one token or frame to the next, the penalty of the Delta Activation Layer.

Formula
    ``delta = mean over neurons and neighbours of |q_t - q_{t+1}|``, ``q = theta round(x / theta)``, or ``q = x`` with
    ``theta=None``. Rounding passes the gradient on: ``d/dx_t = sign(q_t - q_{t+1}) / count`` and the opposite for
    ``x_{t+1}``. With ``relative``, x is first divided by its root mean square, through which no gradient flows.
Source
    Yousefzadeh and Sifalakis 2021 (arXiv 2107.07305) and the public code of the layer: the same mean, without the first
    frame, times the fan-out of the neuron. The layer also learns theta and hands q on; here theta is fixed and x goes
    on unchanged.
Input
    Activations ``x`` (..., tokens, width), normally the input of an MLP's down-projection; tokens in an order that
    means something, as frames, text or patches. ``documents`` (..., tokens) keeps padding and borders out.
Unit and range
    Units of ``x``, >= 0; with ``relative`` dimensionless, 0 to about 2. 0 when nothing changes by more than rounding.
Where it acts
    The pull is the same for every change, small or large. Neighbours that round to the same number have none.
Default and why
    ``theta=None``: no step fits every layer. With ``relative`` one does, as theta is then in units of the root mean
    square; 0.1 is what the layer starts from.
Cost
    Element-wise, one pass forward and one backward with the next token beside it; keeps only ``x``.
When it hurts
    It falls without a single equal pair when the model makes x smaller and the next weights larger; ``relative`` takes
    that way out. It smooths: what differs between neighbouring tokens is what tells them apart.
Not together with
    An order of tokens that means nothing, as between the images or bags of a batch: (tokens, width) without
    ``documents`` is one sequence.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional._tokens import (
    at_least_one,
    check_documents,
    check_tokens,
    join,
    neighbours,
    split,
    upcast,
    valid_count,
    valid_sum,
)
from lightning_reg.functional.activation_density import SMALLEST_EPSILON


def temporal_delta(
    x: Tensor, *, documents: Tensor | None = None, theta: float | None = None, relative: bool = False
) -> Tensor:
    """Mean over neighbouring tokens and neurons of the magnitude of the change, in steps of ``theta``.

    Args:
        x: Activations (..., tokens, width).
        documents: Shape of ``x`` without its last axis. Boolean: True = valid, one document a row. Integers: 0 =
            padding, equal neighbours belong to the same document.
        theta: Step to which activations are rounded, > 0, in units of ``x``, or of its root mean square with
            ``relative``; None does not round.
        relative: Divide ``x`` by the root mean square of the valid elements, held fixed.

    Returns:
        Scalar >= 0, float32 (float64 for float64 input); 0 when there are no neighbours.

    Raises:
        ValueError: If ``theta`` is not positive or ``x`` or ``documents`` does not fit.

    Example:
        >>> temporal_delta(torch.tensor([[0.1, 3.0], [0.2, 1.0]]), theta=1.0)
        tensor(1.)
    """
    return delta_tap(x, documents=documents, theta=theta, relative=relative)[1]


def delta_tap(
    x: Tensor, *, documents: Tensor | None = None, theta: float | None = None, relative: bool = False
) -> tuple[Tensor, Tensor]:
    """``x`` unchanged, and its change joined to the same autograd node. Arguments as ``temporal_delta``."""
    documents = check_documents(documents, check_tokens(x))
    valid = None if documents is None else documents.bool().unsqueeze(-1)
    return _Delta.apply(x, valid, neighbours(documents), check_theta(theta), relative)


class _Delta(torch.autograd.Function):
    """One node for the value and its change."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, valid: Tensor | None, pairs: Tensor | None, theta: float | None, relative: bool
    ) -> tuple[Tensor, Tensor]:
        """Return ``x`` and its change."""
        unit = _root_mean_square(upcast(x), valid) if relative else None
        ctx.save_for_backward(x, pairs, unit)
        ctx.theta = theta
        ctx.set_materialize_grads(False)
        change = _change(x, unit, theta)
        return x.view_as(x), valid_sum(change.abs(), pairs) / at_least_one(valid_count(change, pairs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_delta: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add ``+-grad_delta * sign(change) / count`` to the gradients of the two tokens of each pair."""
        x, pairs, unit = ctx.saved_tensors
        if grad_delta is not None:
            sign = _change(x, unit, ctx.theta).sign()
            strength = grad_delta / at_least_one(valid_count(sign, pairs))
            strength = strength if unit is None else strength / unit
            pull = join(sign, -sign, pairs, x.shape[-2]) * strength
            grad = (pull if grad is None else grad + pull).to(x.dtype)
        return grad, None, None, None, None


def _change(x: Tensor, unit: Tensor | None, theta: float | None) -> Tensor:
    """``q_t - q_{t+1}`` of each pair of neighbours."""
    exact = upcast(x) if unit is None else upcast(x) / unit
    earlier, later = split(exact if theta is None else (exact / theta).round() * theta)
    return earlier - later


def _root_mean_square(x: Tensor, valid: Tensor | None) -> Tensor:
    """Of the valid elements; an all-zero input has none, and is measured in something small."""
    square = valid_sum(x.square(), valid) / at_least_one(valid_count(x, valid))
    return square.clamp_min(SMALLEST_EPSILON).sqrt()


def check_theta(theta: float | None) -> float | None:
    """Return ``theta`` or raise a ValueError."""
    if theta is not None and not 0 < theta < math.inf:
        raise ValueError(
            f"`theta` must be finite and > 0, or None for no rounding, got {theta}. The Delta Activation Layer starts "
            "from 0.1."
        )
    return theta
