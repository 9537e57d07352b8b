"""Launches a kernel again and again: what Triton looks up at every launch is looked up once.

On a slow host that look-up takes longer than the arithmetic of a small layer, and a step has hundreds of launches. A
``Launch`` belongs to one layout, by which the modules here keep their launches: dtypes, shapes, strides, device.
"""

import os
from functools import reduce
from operator import attrgetter, or_
from typing import Any, overload

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TENSOR = object()  # stands where each launch has another tensor
DESCRIPTOR = object()  # stands where each launch has another descriptor of a tensor
MOST_PLANS = 4096  # layouts that are remembered; lengths that differ in every batch must not fill the memory
ALIGNED = 16  # bytes: Triton compiles another kernel for an address that is no multiple

Layout = tuple[torch.dtype, torch.Size, tuple[int, ...]]

_is_cuda = attrgetter("is_cuda")


class Launch:
    """A kernel with its grid and all arguments but tensors, all of which are on one device.

    Args:
        kernel: What ``triton.jit`` made.
        grid: Number of programs along up to three axes.
        arguments: By position, as the kernel takes them, ``TENSOR`` for each tensor and ``DESCRIPTOR`` for each
            descriptor; None for one that is left out.
        named: Other arguments of the kernel, which come after those, and Triton's ``num_warps`` and ``num_stages``.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        own = [name for name in kernel.arg_names if name in named]
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._options = {name: value for name, value in named.items() if name not in own}
        self._arguments = [*arguments, *(named[name] for name in own)]
        self._described = [place for place, argument in enumerate(self._arguments) if argument is DESCRIPTOR]
        self._places = [place for place, argument in enumerate(self._arguments) if argument is TENSOR]
        self._run: Any = None
        self._fixed: tuple[Any, ...] = ()  # what is run, and nobody to be told of it
        self._stream: Any = None
        self._device = 0  # that of the tensors

    def __call__(self, *tensors: Any) -> None:
        """Launch on ``tensors``, one for each place, descriptors first."""
        described, tensors = tensors[: len(self._described)], tensors[len(self._described) :]
        arguments = self._arguments.copy()
        for place, descriptor in zip(self._described, described, strict=True):
            arguments[place] = descriptor
        # a number Triton takes as it is; a tensor it asks for its address, and the driver where that lies
        addresses = [*map(Tensor.data_ptr, tensors)]
        ready = all(map(_is_cuda, tensors)) and not reduce(or_, addresses, 0) % ALIGNED
        if ready and self._run is not None:
            for place, address in zip(self._places, addresses, strict=True):
                arguments[place] = address
            # as Triton itself launches
            self._run(*self._grid, self._stream(self._device), *self._fixed, *arguments)
            return
        for place, tensor in zip(self._places, tensors, strict=True):
            arguments[place] = tensor
        compiled = self._kernel[self._grid](*arguments, **self._options)
        if ready:
            driver = triton.runtime.driver.active
            self._device, self._stream = driver.get_current_device(), driver.get_current_stream
            self._fixed = (compiled.function, compiled.packed_metadata, None, None, None)
            self._run = compiled.run


@overload
def layout(tensor: Tensor) -> Layout: ...
@overload
def layout(tensor: Tensor | None) -> Layout | None: ...
def layout(tensor: Tensor | None) -> Layout | None:
    """What a launch depends on, beside the device."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())
