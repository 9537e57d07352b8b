"""Attention output with the entropy of its rows: ``short_attention`` where it can, else ``long_attention``."""

from typing import Any

from torch import Tensor

from lightning_reg.kernels import long_attention, short_attention


def forward(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, mask: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, entropy, log-sum-exp and, if asked for, largest magnitude; arguments as in ``long_attention.forward``."""
    short = short_attention.unsupported(query, key, value, bias, mask) is None
    return (short_attention if short else long_attention).forward(query, key, value, bias, mask, *arguments)


def backward(
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and an empty tensor; arguments as in ``long_attention.backward``."""
    short = short_attention.unsupported(query, key, value, bias, mask) is None
    return (short_attention if short else long_attention).backward(
        grad_output, grad_entropy, query, key, value, bias, mask, *arguments
    )


def unsupported(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, mask: Tensor | None
) -> str | None:
    """Why no kernel takes these tensors; completes 'because ...'."""
    return long_attention.unsupported(query, key, value, bias, mask)
