"""What runs where a kernel cannot: the torch code, with one warning that names the reason."""

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.kernels import operators

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
