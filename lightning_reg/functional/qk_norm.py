r"""QK-norm: queries and keys normalised head by head before their dot product, so that logits cannot grow with norms.

Formula
    For one head of one token, x of width d: RMS ``x / sqrt(mean(x^2) + eps) * gain``; layer
    ``(x - mean(x)) / sqrt(var(x) + eps) * gain + bias``. Before rotary embedding.
Source
    Henry et al. 2020 (arXiv 2010.04245); Dehghani et al. 2023 (ViT-22B, arXiv 2302.05442); per-head RMSNorm as in
    Qwen3 and Gemma 3, per-head LayerNorm as timm's ``qk_norm``.
Input
    Queries or keys (..., heads, head_dim) or (batch, heads, tokens, head_dim): the last axis is one head's.
Unit and range
    Dimensionless. Without gain and bias each head has norm sqrt(d) at most, so a logit with the usual scale is at most
    sqrt(d); 0 stays 0.
Where it acts
    In the forward of training and of everything after it: the weights need it from then on.
Default and why
    RMS, gain 1 at the start and eps 1e-6, as in current language models. On a trained model it changes the function:
    meant for training from scratch.
Cost
    Two passes over queries and keys. head_dim parameters for queries and as many for keys, for all heads of a layer.
When it hurts
    Gains can grow instead of norms: then weight decay on them helps, which is what an optimizer built from
    ``model.parameters()`` does; else exclude them as other norms are. No cure for loss spikes of other causes.
    In a collapse made on purpose (``experiments/results/collapse.md``) it prevented, and rescued where it was inserted
    into the collapsed model.
Not together with
    QK-clip, which cannot scale what is normalised; sigma-Reparam on the query and key projections, which it makes
    pointless. A second QK-norm.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["rms", "layer"]


def qk_norm(
    x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None, *, norm: Norm = "rms", eps: float = 1e-6
) -> Tensor:
    """Queries or keys normalised over the last axis.

    Args:
        x: (..., head_dim).
        gain: (head_dim,), 1 when left out.
        bias: (head_dim,), only with ``norm="layer"``.
        norm: ``"rms"`` or ``"layer"``.
        eps: Added to the mean square or the variance, > 0.

    Returns:
        Shape and dtype of ``x``; computed in float32 at least.

    Raises:
        ValueError: If ``norm`` or ``eps`` is invalid, or a bias comes with RMS.

    Example:
        >>> qk_norm(torch.tensor([3.0, -4.0]))
        tensor([ 0.8485, -1.1314])
    """
    check_norm(norm, eps)
    if norm == "rms" and bias is not None:
        raise ValueError("`bias` must be left out with `norm='rms'`, which does not centre; use `norm='layer'`.")
    exact = x.double() if x.dtype == torch.float64 else x.float()
    gain, bias = (None if part is None else part.to(exact.dtype) for part in (gain, bias))
    # autocast would round the input of either to half precision again
    with torch.autocast(x.device.type, enabled=False):
        if norm == "layer":
            return F.layer_norm(exact, x.shape[-1:], gain, bias, eps).to(x.dtype)
        return F.rms_norm(exact, x.shape[-1:], gain, eps).to(x.dtype)


def check_norm(norm: Any, eps: Any) -> None:
    """Raise a ValueError for an unknown norm or an ``eps`` that is none."""
    if norm not in ("rms", "layer"):
        raise ValueError(f"`norm` must be 'rms' or 'layer', got {norm!r}: RMSNorm, or LayerNorm as timm's `qk_norm`.")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
        raise ValueError(f"`eps` must be a finite number > 0, got {eps!r}.")
