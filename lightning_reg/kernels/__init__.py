"""Triton kernels under the names of the quantities they compute, loaded on first use only.

``operator`` ties a kernel to the torch code that defines it. On a CUDA device the kernel runs; where it cannot, the
torch code does, with one warning that names the reason. ``disabled()``, or ``LIGHTNING_REG_KERNELS=0`` in the
environment, switches all kernels off.
"""

from lightning_reg.kernels.operators import (
    Unsupported,
    compiling,
    disabled,
    interpreted,
    operator,
    unavailable,
    warn_of_failure,
    warn_once,
    whole,
)

__all__ = [
    "Unsupported",
    "compiling",
    "disabled",
    "interpreted",
    "operator",
    "unavailable",
    "warn_of_failure",
    "warn_once",
    "whole",
]
