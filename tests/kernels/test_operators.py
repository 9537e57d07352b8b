"""What runs where a kernel cannot: the torch code, with one warning that names the reason."""

import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from lightning_reg import kernels
from lightning_reg.functional.activation_density import density_tap
from lightning_reg.functional.activation_hoyer import hoyer_tap
from lightning_reg.functional.activation_l1 import l1_tap
from lightning_reg.functional.spectral_norm import spectral_reparam
from lightning_reg.kernels import compiling, operators, whole

calls: list[str] = []


def launch(x: Tensor, factor: float) -> Tensor:
    """Stands for a kernel."""
    if x.dtype == torch.float64:
        raise kernels.Unsupported("it takes float32, not float64")
    if x.shape[-1] == 13:
        raise RuntimeError("out of resource: shared memory")
    if x.shape[-1] == 17:
        raise torch.OutOfMemoryError("CUDA out of memory")
    calls.append("kernel")
    return x * factor


stand_in = ModuleType("lightning_reg.kernels.stand_in")
stand_in.launch = launch  # type: ignore[attr-defined]
sys.modules[stand_in.__name__] = stand_in


@kernels.operator("stand_in.launch")
def scaled(x: Tensor, factor: float) -> Tensor:
    """The definition."""
    if not torch.compiler.is_compiling():
        calls.append("torch")
    return x * factor


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    calls.clear()
    operators._failed.clear()
    operators._warned.clear()
    yield
    operators._failed.clear()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CPU tensors could be launched on."""
    monkeypatch.setattr(operators, "_interpreting", True)


def test_cpu_runs_the_torch_code_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled(torch.ones(3), 2.0)
    assert calls == ["torch"]


def test_kernel_runs_where_it_can(on_cpu: None) -> None:
    assert torch.equal(scaled(torch.ones(3), 2.0), torch.full((3,), 2.0))
    assert calls == ["kernel"]
    with kernels.disabled():
        scaled(torch.ones(3), 2.0)
    assert calls == ["kernel", "torch"]


def test_unsupported_arguments_warn_once_and_give_the_number(on_cpu: None) -> None:
    x = torch.ones(3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="stand_in_launch in plain torch.*because it takes float32, not float64"):
        assert torch.equal(scaled(x, 2.0), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scaled(x, 3.0), 3 * x)
        scaled(x.float(), 2.0)
    assert calls == ["torch", "torch", "kernel"]


def test_a_kernel_that_fails_is_not_tried_again_for_such_arguments(on_cpu: None) -> None:
    x = torch.ones(2, 13)
    with pytest.warns(UserWarning, match="its kernel failed with RuntimeError: out of resource"):
        assert torch.equal(scaled(x, 2.0), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled(x, 2.0)
        scaled(torch.ones(2, 12), 2.0)
    assert calls == ["torch", "torch", "kernel"]


def test_memory_that_runs_out_is_not_hidden(on_cpu: None) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        scaled(torch.ones(17), 2.0)


@pytest.mark.parametrize("available", [False, True])
def test_compiled_code_calls_the_operator_without_graph_break(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_interpreting", available)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: scaled(x + 1, 2.0) - 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    if available and torch.__version__ < (2, 14):  # asks the torch code for the shape of the result, and leaves a note
        assert set(calls[:-1]) <= {"torch"}
        calls[:] = calls[-1:]
    assert calls == (["kernel"] if available else [])


def test_without_triton_or_on_an_old_device_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    operators._missing_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert operators._missing_on(0) == "kernels need compute capability 8.0, and device 0 has 7.5"
    operators._missing_on.cache_clear()
    monkeypatch.setattr(operators, "find_spec", lambda name: None)
    assert operators._missing_on(0) == "Triton is not installed: `pip install triton`"
    operators._missing_on.cache_clear()


def test_interpreting_needs_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), kernels.interpreted():
        pass


# --- taken whole -----------------------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[Callable, Callable]] = {
    "density_tap": (density_tap, lambda x: density_tap(x, epsilon=0.1)),
    "l1_tap": (l1_tap, lambda x: l1_tap(x, relative=True)),
    "hoyer_tap": (hoyer_tap, hoyer_tap),
    "spectral_reparam": (
        spectral_reparam,
        lambda x: (spectral_reparam(x, torch.ones(1), torch.full((1, 3), 0.5), torch.full((1, 4), 0.5)), x.sum()),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_code_takes_functions_whole(name: str) -> None:
    """So that nothing in them is guarded before each call of what was compiled."""
    function, use = WHOLE[name]
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    def loss(x: Tensor) -> Tensor:
        first, second = use(x)
        return first.square().sum() + 3 * second

    torch.compiler.reset()
    x = torch.randn(3, 4, requires_grad=True)
    grads = [torch.autograd.grad(f(x), x)[0] for f in (torch.compile(loss, fullgraph=True, backend=backend), loss)]
    torch.testing.assert_close(*grads)
    assert targets.count(function) == 1


def test_functions_taken_whole_know_that_they_are_compiled() -> None:
    seen = []

    @whole
    def function(x: Tensor) -> Tensor:
        seen.append(compiling())
        return x.sin()

    torch.compiler.reset()
    compiled = torch.compile(lambda x: function(x).square(), fullgraph=True, backend="aot_eager")
    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(compiled(x).sum(), x)
    assert seen
    assert all(seen)
    assert not compiling()
    seen.clear()
    function(x)
    assert seen == [False]
