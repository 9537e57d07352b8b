"""A model in training with one arm, eager or compiled, beside which others may live in the same process."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from experiments.benchmarks.arms import Addition, Arm, autocast
from experiments.benchmarks.tasks import Batch, Task

Mode = Literal["eager", "compiled", "blocks"]
MODES: dict[str, str] = {
    "eager": "eager",
    "compiled": "`torch.compile` of the model",
    "blocks": "`torch.compile` of each block",
}
LEARNING_RATE = 1e-4


class Compiler:
    """Inductor, with a cache of its own: code compiled for one arm is never taken for another.

    Attributes:
        graphs: Compiled so far.
    """

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(graph, inputs)

    def compile(self, task: Task, model: nn.Module, mode: Mode) -> None:
        """Compile the model or its blocks, in place."""
        torch._dynamo.config.recompile_limit = 64  # several arms share the code of a module
        for module in [model] if mode == "compiled" else task.blocks(model):
            module.compile(backend=self)


class Training:
    """Forward under bf16 autocast, backward and a step of fused AdamW, with an arm's additions.

    Args:
        task: What is trained.
        attach: Puts an arm on the model.
        device: Where.
        mode: Eager or compiled.
        weight: Factor on the weights of penalties.
        bf16: Whether the forward is autocast.
        sharp: Whether attention is sharpened, as checks want it.
        wrap: What makes it parallel.
        batches: Those of the task when left out.
        optimizer: From parameters to an optimizer.
        arguments: Of the optimizer.
    """

    def __init__(
        self,
        task: Task,
        attach: Callable[[nn.Module, float], Addition],
        device: torch.device,
        mode: Mode = "eager",
        *,
        weight: float = 1.0,
        bf16: bool = True,
        sharp: bool = False,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        batches: list[Batch] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **arguments: Any,
    ) -> None:
        self.task, self.device, self.bf16 = task, device, bf16
        self.model = new_model(task, device, sharp)
        self.batches = batches or task.batches(device)
        # first: code compiled before is compiled anew when a regularizer comes
        self.addition = attach(self.model, weight)
        self.called = wrap(self.model) if wrap else self.model
        self.compiler = Compiler()
        self.breaks: list[str] = []
        if mode != "eager":
            torch._dynamo.utils.counters.clear()
            self.compiler.compile(task, self.model, mode)
        arguments = arguments or {"lr": LEARNING_RATE, "fused": True}
        self.optimizer = optimizer(self.model.parameters(), **arguments)
        self.steps = 0
        self.host = 0.0  # seconds until the last block's steps were queued, for each
        self.addition.pause()

    def loss(self) -> Tensor:
        """What the next step differentiates."""
        batch: Batch = self.batches[self.steps % len(self.batches)]
        with autocast(self.device, self.bf16):
            loss = self.task.loss(self.called, batch)
        return self.addition.add(loss)

    def step(self) -> None:
        """One step; gradients are freed, so that nothing is held between steps but parameters and optimizer state."""
        self.loss().backward()
        self.optimizer.step()
        self.addition.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def warm_up(self, steps: int = 3) -> None:
        """Find sites, compile, allocate optimizer state; notes where the compiler gave up."""
        self.addition.resume()
        for _ in range(steps):
            self.step()
        self.addition.pause()
        if self.compiler.graphs:
            self.breaks = [str(reason) for reason in torch._dynamo.utils.counters["graph_break"]]

    def block(self, steps: int) -> float:
        """Seconds of a step, the mean of ``steps`` after one that is not timed."""
        self.addition.resume()
        self.step()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.host = (time.perf_counter() - start) / steps
        synchronize(self.device)
        seconds = (time.perf_counter() - start) / steps
        self.addition.pause()
        return seconds

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the next step, which is not made, by the names parameters have without parametrizations."""
        self.addition.resume()
        self.loss().backward()
        self.addition.pause()
        found = {plain_name(name): p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, those of the addition included."""
        return [*self.model.parameters(), *self.model.buffers()]

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> None:
        """Put other values into parameters and buffers."""
        for own, other in zip(self.tensors(), tensors, strict=True):
            own.copy_(other)

    def close(self) -> None:
        """Let go of the model."""
        self.addition.close()


class Fit(pl.LightningModule):
    """The same for a Trainer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.task, self.net = task, task.model()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.task.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, fused=True)


def new_model(task: Task, device: torch.device, sharp: bool = False) -> nn.Module:
    """A model on ``device``, each time the same; initialised there, which is faster."""
    torch.manual_seed(0)
    with device:
        model = task.model()
    if sharp:
        task.sharpen(model)
    return model


def plain_name(name: str) -> str:
    """Name of a parameter before its module was parametrized."""
    return name.replace("parametrizations.weight.original", "weight")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def settle() -> None:
    """Spare later collections what is there now, modules and models: they took longer than many a step."""
    gc.collect()
    gc.freeze()


def release(device: torch.device) -> None:
    """Give memory of the device back that nothing refers to."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def attach_of(arm: Arm) -> Callable[[nn.Module, float], Addition]:
    """How an arm is put on a model, of those that need no Trainer."""
    if arm.attach is None:
        raise ValueError(f"the arm {arm.name!r} needs a Trainer.")
    return arm.attach
