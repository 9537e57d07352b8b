"""The activation function before a tap: found in the autograd graph, so that its backward and the penalty's are one.

What the graph keeps for the activation's own backward, its input, is enough for both: the tap takes that input in its
own node beside the activation's, which is then left with the other users of x, if any. Where anything could tell the
difference, nothing is found and the tap follows the activation. Only a hook put on x after its tap comes too late: it
sees what the other users of x send. ReLU keeps its output only, from which no way leads to what entered it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.kernels import compiling, unavailable

_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_aten: Any = torch.ops.aten
_FORWARD: dict[str, Callable] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(grad, x)
    share = x.sigmoid()
    return grad * share * (1 + x * (1 - share))


_BACKWARD: dict[str, Callable] = {
    "gelu": partial(_aten.gelu_backward, approximate="none"),
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
    "silu": _silu_backward,
}


def producer(x: Tensor) -> tuple[str, tuple[Tensor, ...]]:
    """Name of the activation function that gave ``x``, and what it was given; ``("", ())`` where there is none.

    It was given the pre-activation and, where it is a gate, what that was multiplied with.
    """
    if compiling() or not (torch.is_grad_enabled() and x.requires_grad) or not _untouched(x):
        return "", ()
    if unavailable(x) is not None or saving_is_hooked():
        return "", ()
    name, pre = _activation(x)
    if pre is not None:
        return name, (pre,)
    if type(x.grad_fn).__name__ == "MulBackward0":
        pair = _saved(x.grad_fn, "self"), _saved(x.grad_fn, "other")
        for gate, up in (pair, pair[::-1]):
            if gate is None or up is None or not (_like(up, x) and _like(gate, x) and _untouched(gate)):
                continue
            name, pre = _activation(gate)
            if pre is not None:
                return name, (pre, up)
    return "", ()


def activate(activation: str, sources: Sequence[Tensor]) -> Tensor:
    """What the activation function makes of its inputs; with no name the only one as it is."""
    if not activation:
        return sources[0]
    value = _FORWARD[activation](sources[0])
    return value * sources[1] if len(sources) > 1 else value


def through(activation: str, grad: Tensor | None, sources: Sequence[Tensor]) -> list[Any]:
    """Gradients of the inputs of an activation function, from that of its output; None from None."""
    if not activation or grad is None:
        return [grad, *(None for _ in sources[1:])]
    if len(sources) == 1:
        return [_BACKWARD[activation](grad, sources[0])]
    return [_BACKWARD[activation](grad * sources[1], sources[0]), grad * _FORWARD[activation](sources[0])]


def in_place(grad: Tensor) -> Tensor:
    """The gradient of an activation, which compiled code writes over the one that comes from above.

    Inductor cuts long expressions in two, with a float32 between that fits over nothing: the backward of GELU with a
    penalty in it then needs another tensor of the size of ``grad``. Cut here, both halves are written in its place.
    Distributed tensors know no such view and stay as they are.
    """
    if compiling() and not hasattr(grad, "full_tensor"):
        return grad.as_strided(grad.shape, grad.stride())
    return grad


def differentiable(operator: Callable) -> Callable:
    """The torch code of an operator where its result is to be differentiated, itself otherwise."""
    return operator.__wrapped__ if torch.is_grad_enabled() else operator  # type: ignore[attr-defined]


def _activation(x: Tensor) -> tuple[str, Tensor | None]:
    node = x.grad_fn
    kind = type(node).__name__
    if kind == "GeluBackward0":
        name = "gelu_tanh" if node._saved_approximate == "tanh" else "gelu"  # type: ignore[union-attr]
    elif kind == "SiluBackward0":
        name = "silu"
    else:
        return "", None
    pre = _saved(node, "self")
    return (name, pre) if pre is not None and _like(pre, x) else ("", None)


def _saved(node: Any, name: str) -> Tensor | None:
    """A tensor an autograd node keeps; None where it was let go, changed, or is kept in a way of someone else's."""
    try:
        if getattr(node, f"_raw_saved_{name}").unpack_hook is None:
            return getattr(node, f"_saved_{name}")
    except (AttributeError, RuntimeError):
        pass
    return None


def saving_is_hooked() -> bool:
    """Whether a checkpoint or the like decides what is kept, which repeats the forward if one tries to read it."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None  # before torch 2.8 nothing tells


def _untouched(x: Tensor) -> bool:
    """Whether it still is what its node gave, and nobody waits for its gradient there."""
    return (
        type(x) is Tensor
        and x.dtype in _FUSED_DTYPES
        and x.grad_fn is not None
        and not (x._version or x._is_view() or x._backward_hooks or x.retains_grad)
        and x.is_contiguous()
    )


def _like(source: Tensor, x: Tensor) -> bool:
    return (
        type(source) in (Tensor, torch.nn.Parameter)
        and source.shape == x.shape
        and source.dtype == x.dtype
        and source.device == x.device
        and source.is_contiguous()
    )
