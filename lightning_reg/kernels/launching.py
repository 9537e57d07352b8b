"""Launches a kernel again and again: what Triton looks up at every launch is looked up once.

On a slow host that look-up takes longer than the arithmetic of a small layer, and a step has hundreds of launches. A
``Launch`` belongs to one layout, by which the modules here keep their launches: dtypes, shapes, strides, device.
"""

import os
from typing import Any, overload

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TENSOR = object()  # stands where each launch has another tensor
MOST_PLANS = 4096  # layouts that are remembered; lengths that differ in every batch must not fill the memory
ALIGNED = 16  # bytes: Triton compiles another kernel for an address that is no multiple

Layout = tuple[torch.dtype, torch.Size, tuple[int, ...]]


class Launch:
    """A kernel with its grid and all arguments but tensors, all of which are on one device.

    Args:
        kernel: What ``triton.jit`` made.
        grid: Number of programs along up to three axes.
        arguments: By position, as the kernel takes them, ``TENSOR`` for each tensor; None for one that is left out.
        named: Other arguments of the kernel, which come after those, and Triton's ``num_warps`` and ``num_stages``.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        own = [name for name in kernel.arg_names if name in named]
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._options = {name: value for name, value in named.items() if name not in own}
        self._arguments = [*arguments, *(named[name] for name in own)]
        self._places = [place for place, argument in enumerate(self._arguments) if argument is TENSOR]
        self._compiled: Any = None
        self._device = 0  # that of the tensors

    def __call__(self, *tensors: Any) -> None:
        """Launch on ``tensors``, or descriptors of tensors, one for each place."""
        arguments, bits = self._arguments.copy(), 0
        for place, tensor in zip(self._places, tensors, strict=True):
            if not isinstance(tensor, Tensor):
                arguments[place] = tensor
                continue
            # a number Triton takes as it is; a tensor it asks for its address, and the driver where that lies
            arguments[place] = address = tensor.data_ptr()
            bits |= address if tensor.is_cuda else 1
        if self._compiled is None or bits % ALIGNED:
            for place, tensor in zip(self._places, tensors, strict=True):
                arguments[place] = tensor
            compiled = self._kernel[self._grid](*arguments, **self._options)
            if not bits % ALIGNED:
                self._device = triton.runtime.driver.active.get_current_device()
                self._compiled = compiled
            return
        kernel, stream = self._compiled, triton.runtime.driver.active.get_current_stream(self._device)
        # as Triton itself launches, with nobody to be told of it
        kernel.run(*self._grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)


@overload
def layout(tensor: Tensor) -> Layout: ...
@overload
def layout(tensor: Tensor | None) -> Layout | None: ...
def layout(tensor: Tensor | None) -> Layout | None:
    """What a launch depends on, beside the device."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())
