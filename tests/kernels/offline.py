"""Compiles what kernels launch for an H100, where there is no GPU: python -m tests.kernels.offline CASE.

Launches of Triton are stopped after their compilation, so that what only the compiler refuses, such as a size of 1 that
it takes for a constant, is found without a device. Run as a process of its own: Triton must not be interpreting.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lightning_reg.functional import activation_density, activation_hoyer, activation_l1, prediction_entropy, z_loss
from lightning_reg.kernels import attention_entropy, attention_logits, long_attention, operators

# the package exports functions of the modules' names
density, l1, hoyer, spectral_norm = (
    import_module(f"lightning_reg.functional.{name}")
    for name in ("activation_density", "activation_l1", "activation_hoyer", "spectral_norm")
)
SHARED_MEMORY = 232448  # bytes that a block may have on an H100
compiled: list[str] = []


class H100:
    """As much of a Triton driver as compilation asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel that launches nothing."""

    function = packed_metadata = None

    def run(self, *args: Any) -> None:
        """Launch nothing."""


def stop_after_compilation() -> None:
    """Launch nothing from here on."""
    driver.set_active(H100())
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(self.fn.__name__)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.metadata.shared <= SHARED_MEMORY, f"{self.fn.__name__} needs {kernel.metadata.shared} bytes"
        return Compiled()

    JITFunction.run = compile_only


def attention(
    batch: int, heads: int, groups: int, rows: int, keys: int, dim: int, dtype: torch.dtype, causal: bool = False,
    mask: str = "", value: bool = True, long: bool = False, window: int | None = None,
) -> None:  # fmt: skip
    """Forward and backward of attention with entropy."""
    module = long_attention if long else attention_entropy
    q = torch.randn(batch, heads, rows, dim).to(dtype)
    k, v = torch.randn(2, batch, groups, keys, dim).to(dtype)
    shown = torch.rand(batch, 1, rows if mask == "pairs" else 1, keys) < 0.9 if mask in ("keys", "pairs") else None
    bias = torch.randn(1, heads, rows, keys) if mask == "bias" else None
    band = (dim**-0.5, causal, window, 0, 1)
    module.forward(q, k, v if value else None, bias, shown, *band, True)
    output, entropy, lse, _ = module.forward(q, k, v if value else None, bias, shown, *band)
    up = torch.randn_like(output) if value else None
    module.backward(
        up,
        torch.randn_like(entropy),
        q,
        k,
        v if value else None,
        None,
        shown,
        output,
        entropy,
        lse,
        *band,
        False,
        False,
    )


def logits(batch: int, heads: int, rows: int, dim: int, dtype: torch.dtype) -> None:
    """Largest attention logits."""
    q, k = torch.randn(2, batch, heads, rows, dim).to(dtype)
    attention_logits.forward(q, k, None, None, dim**-0.5, True, "max")


def penalties(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sums and gradients of activations and logits."""
    functions = [activation_density, activation_l1, activation_hoyer, z_loss]
    for function in [*functions, prediction_entropy] if shape[-1] > 1 else functions:
        x = torch.randn(shape).to(dtype).requires_grad_()
        value: Tensor = function(x)
        value.sum().backward()


def weights(rows: int, columns: int, parts: int, dtype: torch.dtype) -> None:
    """The weight of sigma-Reparam, its gradient, and a power iteration."""
    weight = torch.randn(rows, columns, requires_grad=True)
    gain, u, v = torch.ones(parts, requires_grad=True), torch.randn(parts, rows // parts), torch.randn(parts, columns)
    scaled = spectral_norm.spectral_reparam(weight, gain, u, v, False, dtype)
    scaled.backward(torch.randn_like(scaled))
    matrices = list(weight.detach().view(parts, -1, columns).unbind())
    spectral_norm.PowerIteration(matrices, list(u.unbind()), list(v.unbind())).step()


def fused(activation: torch.nn.Module, tokens: int, width: int) -> None:
    """Penalties whose backward is that of the activation too."""
    for tap in (density.density_tap, l1.l1_tap, hoyer.hoyer_tap):
        x = activation(torch.randn(tokens, width, dtype=BF16, requires_grad=True))
        y, value = tap(x)
        (y.sum() + value).backward()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, list[Callable[[], None]]] = {
    "one head": [
        lambda: attention(1, 1, 1, 300, 300, 64, BF16),
        lambda: attention(1, 1, 1, 300, 300, 64, BF16, causal=True),
        lambda: attention(1, 1, 1, 17, 17, 16, FP32, long=True),
        lambda: attention(1, 1, 1, 1, 300, 64, BF16, value=False),
        lambda: attention(1, 1, 1, 17, 17, 64, BF16),
    ],
    "one key head": [
        lambda: attention(2, 2, 1, 300, 300, 64, BF16, causal=True),
        lambda: attention(1, 4, 1, 1, 1, 64, FP16, long=True),
    ],
    "vit": [
        lambda: attention(4, 12, 12, 197, 197, 64, BF16),
        lambda: attention(2, 3, 3, 50, 50, 32, FP16, mask="keys"),
    ],
    "long": [
        lambda: attention(2, 4, 2, 1024, 1024, 128, BF16, causal=True),
        lambda: attention(2, 2, 2, 300, 500, 80, FP16, mask="keys"),
        lambda: attention(2, 2, 2, 300, 300, 256, BF16),
        lambda: attention(2, 2, 2, 300, 300, 64, FP32), lambda: attention(2, 2, 2, 300, 300, 128, FP32),
        lambda: attention(2, 2, 2, 300, 300, 256, FP32),
    ],
    "masks": [
        partial(attention, 2, 2, 2, 300, 300, dim, dtype, mask=mask, window=window, causal=causal)
        for mask, window, causal in (("pairs", None, False), ("bias", None, True), ("", 50, True), ("keys", 50, False))
        for dim, dtype in ((64, BF16), (128, BF16), (256, FP16), (64, FP32))
    ],
    "short": [
        partial(attention, 2, 2, 2, rows, keys, dim, dtype, causal=causal)
        for rows, keys, causal in ((256, 256, False), (130, 70, True), (256, 1, False))
        for dim in (16, 64, 128)
        for dtype in (BF16, FP32)
    ],
    "logits": [
        lambda: logits(1, 1, 300, 64, BF16), lambda: logits(2, 3, 197, 64, BF16), lambda: logits(2, 3, 9, 20, FP32),
    ],
    "penalties": [
        lambda: penalties((1, 1), BF16), lambda: penalties((2, 5, 48), BF16), lambda: penalties((7, 13), FP32),
    ],
    "vocabulary": [lambda: penalties((1, 50257), BF16), lambda: penalties((3, 5, 32000), FP16)],
    "fused": [
        lambda: fused(torch.nn.GELU(), 1, 1), lambda: fused(torch.nn.GELU(), 6, 64),
        lambda: fused(torch.nn.GELU("tanh"), 6, 64), lambda: fused(torch.nn.SiLU(), 6, 64),
    ],
    "weights": [
        lambda: weights(1, 8, 1, FP32), lambda: weights(8, 1, 1, BF16), lambda: weights(192, 64, 3, BF16),
        lambda: weights(64, 192, 1, FP16), lambda: weights(1, 1, 1, FP32),
    ],
}  # fmt: skip


def main(case: str) -> None:
    """Compile a case; a failure ends the process."""
    stop_after_compilation()
    # CPU tensors stand for a GPU's
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment, method-assign]
    operators._missing_on = lambda device: None  # type: ignore[assignment]
    for launch in CASES[case]:
        launch()
    assert not operators._failed, operators._failed
    print(f"{len(compiled)} launches of {', '.join(sorted(set(compiled)))}")


if __name__ == "__main__":
    main(sys.argv[1])
