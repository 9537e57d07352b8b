r"""Entropy of predictions: how undecided the softmax, or the sigmoids, over the classes are.

Formula
    ``p = softmax(x)``, ``H = -sum_c p_c log p_c``, ``dH/dx_c = -p_c (log p_c + H)``. With several labels at once
    ``p_c = sigmoid(x_c)`` and H is the mean over classes of ``-p_c log p_c - (1 - p_c) log(1 - p_c)``, with
    ``dH/dx_c = -x_c p_c (1 - p_c) / classes``.
Source
    The confidence penalty of Pereyra et al. 2017 (arXiv 1701.06548, section 3) maximises it, also with a hinge, which
    is a floor here. Grandvalet & Bengio 2004 minimise it (entropy minimization), as test-time adaptation does.
Input
    Logits ``x`` of any shape (..., classes): not probabilities. At least two classes, or any number of sigmoids.
Unit and range
    Nats, from 0 (all weight on one class) to log(classes) (uniform), log 2 with several labels; normalised by that, so
    in [0, 1]. A class whose logit is -inf has probability 0 but still counts as a class.
Where it acts
    Undecided predictions: near 0 and near uniform the gradient vanishes, as ``p log p`` does. It shapes, it does not
    rescue a model that is already sure. The confidence penalty is, up to a constant, KL(p || u) to the uniform u; label
    smoothing is KL(u || p), whose gradient ``p - u`` does not vanish and which asks every class for some weight.
Default and why
    Weight 0.1 as in the paper's image and translation models; normalised, so that it does not depend on the number of
    classes: 0.1 in nats is 0.1 log(classes) here.
Cost
    One pass forward and one backward, in float32 (float64 stays): on a GPU by one kernel each, elsewhere in chunks of
    about ``BLOCK_SCORES`` numbers. Keeps the logits and one number of each position, on a GPU three.
When it hurts
    Maximised, it keeps the loss from 0 and costs accuracy where labels are clean; minimised, it makes wrong predictions
    surer, and is minimal when all inputs get one class.
Not together with
    Label smoothing, which does nearly the same: the two add up.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional._tokens import upcast
from lightning_reg.functional.z_loss import check_logits, joined, row_chunks
from lightning_reg.kernels import operator

_LARGEST = 1e4  # a sigmoid is 0 or 1 long before this, and 0 * inf is not reached


def prediction_entropy(logits: Tensor, *, multi_label: bool = False, normalize: bool = False) -> Tensor:
    """Entropy of the prediction at each position.

    Args:
        logits: (..., classes).
        multi_label: The classes are sigmoids of their own: the mean of their binary entropies.
        normalize: Divide by log(classes), or by log 2 with ``multi_label``.

    Returns:
        Shape of ``logits`` without its last axis, float32 (float64 for float64 input); nats, or [0, 1] when normalised.

    Raises:
        ValueError: If ``logits`` are not floating point, or have a single class without ``multi_label``.

    Example:
        >>> prediction_entropy(torch.zeros(1, 4))
        tensor([1.3863])
    """
    return prediction_tap(logits, multi_label=multi_label, normalize=normalize)[1]


def prediction_tap(logits: Tensor, *, multi_label: bool = False, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """``logits`` unchanged, and the entropies joined to the same autograd node. Arguments as ``prediction_entropy``."""
    logits, entropy = _PredictionEntropy.apply(check_logits(logits, 1 if multi_label else 2), multi_label)
    return logits, entropy / math.log(2 if multi_label else logits.shape[-1]) if normalize else entropy


class _PredictionEntropy(torch.autograd.Function):
    """One node for the logits and the entropy of each position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
        """Return ``x`` (..., classes) and the entropies (...)."""
        entropy, normalizer = _entropies(x.reshape(-1, x.shape[-1]), multi_label)
        entropy = entropy.reshape(x.shape[:-1])
        ctx.save_for_backward(x, entropy, normalizer)
        ctx.multi_label = multi_label
        ctx.set_materialize_grads(False)
        return x.view_as(x), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, None]:
        """Add the gradient of the entropies to that of ``x``."""
        x, entropy, normalizer = ctx.saved_tensors
        if grad_entropy is None:
            return grad, None
        flat = x.reshape(-1, x.shape[-1])
        grad = None if grad is None else grad.reshape(flat.shape)
        # a kernel knows nothing of its own derivative
        gradient = _gradient if torch.is_grad_enabled() else _fast_gradient
        total = gradient(flat, entropy.reshape(-1), normalizer, grad_entropy.reshape(-1), grad, ctx.multi_label)
        return total.reshape(x.shape), None


def _like_entropies(x: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    entropy = upcast(x[:, 0])
    return torch.empty_like(entropy), entropy.new_empty(0 if multi_label else len(x), 2)


@operator("prediction_entropy.forward", fake=_like_entropies)
def _entropies(x: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Entropies (positions,) of logits (positions, classes), and what normalizes a softmax, for a kernel.

    That is the largest logit and the logarithm of the sum of exponentials beyond it, (positions, 2); nothing where no
    kernel could ask for it.
    """
    entropy = upcast(x[:, 0]).clone()
    normalizer = entropy.new_empty(0 if multi_label or x.device.type == "cpu" else len(x), 2)
    for part in row_chunks(x):
        exact = upcast(x[part])
        entropy[part] = (_of_sigmoids if multi_label else _of_softmax)(exact)
        if len(normalizer):
            normalizer[part, 0] = exact.amax(-1)
            normalizer[part, 1] = (exact - normalizer[part, :1]).logsumexp(-1)
    return entropy, normalizer


def _gradient(
    x: Tensor, entropy: Tensor, normalizer: Tensor, grad_entropy: Tensor, grad: Tensor | None, multi_label: bool
) -> Tensor:
    """``grad`` and the gradient of the entropies, (positions, classes)."""
    entropy, grad_entropy = entropy.unsqueeze(1), grad_entropy.unsqueeze(1)
    total = torch.empty_like(x)
    for part in row_chunks(x):
        exact = upcast(x[part])
        slope = _sigmoid_slope(exact) if multi_label else _softmax_slope(exact, entropy[part])
        total[part] = joined(slope * grad_entropy[part], grad_entropy[part], grad, part)
    return total


_fast_gradient = operator("prediction_entropy.backward", fake=lambda x, *args: torch.empty_like(x))(_gradient)


def _log_probs(x: Tensor) -> Tensor:
    """Logarithms of probabilities, finite also where the probability, with which they only ever meet, is 0."""
    return x.log_softmax(-1).clamp_min(torch.finfo(x.dtype).min)


def _of_softmax(x: Tensor) -> Tensor:
    log_p = _log_probs(x)
    return 0 - (log_p.exp() * log_p).sum(-1)  # not -0.0


def _softmax_slope(x: Tensor, entropy: Tensor) -> Tensor:
    log_p = _log_probs(x)
    return -log_p.exp() * (log_p + entropy)


def _of_sigmoids(x: Tensor) -> Tensor:
    size = x.clamp(-_LARGEST, _LARGEST).abs()
    odds = (-size).exp()
    return (odds.log1p() + size * odds / (1 + odds)).mean(-1)


def _sigmoid_slope(x: Tensor) -> Tensor:
    x = x.clamp(-_LARGEST, _LARGEST)
    return -x * x.sigmoid() * (-x).sigmoid() / x.shape[-1]
