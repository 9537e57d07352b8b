"""Where a kernel runs, and what runs in its place: an operator is torch code with a Triton kernel behind it."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

LEAST_CAPABILITY = (8, 0)  # bf16 products
LIBRARY = torch.library.Library("lightning_reg", "FRAGMENT")

_off = os.environ.get("LIGHTNING_REG_KERNELS", "1") == "0"
_interpreting = False
_failed: dict[Any, str] = {}  # calls whose kernel did not compile or launch
_warned: set[str] = set()


class Unsupported(Exception):
    """A kernel does not handle these arguments; the message completes 'because ...'."""


def operator(kernel: str, *, fake: Callable | None = None, inline: bool = False) -> Callable[[Callable], Callable]:
    """Tie a function, which defines a quantity in torch, to a kernel that computes the same.

    Args:
        kernel: ``module.function`` below ``lightning_reg.kernels``, with the arguments and results of the decorated
            function. It raises ``Unsupported`` for what it cannot do, before it launches anything.
        fake: Shapes and dtypes of the results, for compilation; the decorated function itself when left out.
        inline: Let compiled code trace the torch code, which it fuses with what stands around it, instead of calling
            the kernel.

    The decorated function must be annotated as ``torch.library.custom_op`` asks, return fresh tensors and take all
    arguments by position. Autograd does not see through it: call it inside an ``autograd.Function``.
    """

    def register(eager: Callable) -> Callable:
        name = kernel.replace(".", "_")

        @wraps(eager)
        def run(*args: Any) -> Any:
            tensor = _first(args)
            launch = _launcher(kernel, args, tensor)
            if launch is not None:
                try:
                    with on_device(tensor):
                        return launch(*args)
                except Unsupported as reason:
                    _warn(name, str(reason))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    _failed[_key(kernel, args)] = f"{type(error).__name__}: {error}"
                    warn_of_failure(f"{name} in plain torch", error)
            return eager(*args)

        # as `torch.library.custom_op` does, without its wrapper for autograd, which costs more than many a kernel
        LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lightning_reg::{name}", fake or eager, lib=LIBRARY)
        custom = getattr(torch.ops.lightning_reg, name).default

        @wraps(eager)
        def call(*args: Any) -> Any:
            if not compiling():
                return run(*args)
            if inline or unavailable(_first(args)) is not None:
                return eager(*args)
            return custom(*args)

        return call

    return register


def whole(function: Callable) -> Callable:
    """Let compiled code take ``function`` as one call, and look into it where nothing is guarded any more.

    What torch reads to compile it guards: every function and constant, before each call of a compiled block. Only for
    functions of tensors, plain numbers and dtypes, which give tensors and depend on nothing else that may change.
    """
    return torch.compiler.allow_in_graph(function)


def compiling() -> bool:
    """Whether torch is compiling what runs, by reading it or, in functions that are taken ``whole``, by running it."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def unavailable(tensor: Tensor) -> str | None:
    """Why no kernel can run on the device of ``tensor``; None when one can, an empty text where none is meant to."""
    if _off:
        return ""
    if not tensor.is_cuda:
        return None if _interpreting else ""
    return _missing(tensor.device.index or 0)


@contextmanager
def disabled() -> Iterator[None]:
    """No kernel runs inside; code that was compiled outside keeps its own, code compiled inside keeps none."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run on CPU tensors inside, slowly: set ``TRITON_INTERPRET=1`` before the first one is loaded."""
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("`interpreted()` needs the environment variable `TRITON_INTERPRET=1`, set at the start.")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def warn_once(text: str) -> None:
    """Warn of a fallback the first time it is taken."""
    if not compiling() and text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


def warn_of_failure(what: str, error: Exception) -> None:
    """Warn of a kernel that did not compile or launch, and of ``what`` is computed in its place, and how."""
    reason = f"its kernel failed with {type(error).__name__}: {str(error)[:300]}"
    warn_once(f"lightning_reg computes {what}, which is exact but slower, because {reason}.")


def _launcher(kernel: str, args: tuple, tensor: Tensor) -> Callable | None:
    reason = unavailable(tensor)
    if reason is None and (not _failed or _key(kernel, args) not in _failed):
        return _load(kernel)
    if reason:
        _warn(kernel.replace(".", "_"), reason)
    return None


def _warn(name: str, reason: str) -> None:
    warn_once(f"lightning_reg computes {name} in plain torch, which is exact but slower, because {reason}.")


@cache
def _load(kernel: str) -> Callable:
    module, _, function = kernel.rpartition(".")
    return getattr(import_module(f"lightning_reg.kernels.{module}"), function)


@torch.compiler.assume_constant_result
def _missing(device: int) -> str | None:
    return _missing_on(device)


@cache
def _missing_on(device: int) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"kernels need compute capability 8.0, and device {device} has {capability[0]}.{capability[1]}"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launches go to the device of ``tensor`` inside: Triton takes the current one, which need not be that."""
    if not tensor.is_cuda or _devices() <= 1:
        return _HERE
    index = tensor.get_device()
    return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)


_HERE: AbstractContextManager = nullcontext()


@cache
def _devices() -> int:
    return torch.cuda.device_count()


def _first(args: tuple) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
    raise TypeError("an operator needs a tensor")


def _key(kernel: str, args: tuple) -> Any:
    return kernel, *((arg.dtype, arg.shape[-1:]) for arg in args if isinstance(arg, Tensor))
