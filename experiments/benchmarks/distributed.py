"""What each arm adds to a training step on several GPUs, and whether it is exact there, under DDP and FSDP2:
torchrun --nproc-per-node 2 -m experiments.benchmarks.distributed --model vit.

Before anything is timed, a small copy of the model is trained for a few steps in float32, each process with its share
of the batches; its parameters must be those of one process with whole batches: with the terms of the usual way, and
where sigma-Reparam is involved, which has no equal in torch, with ours.
"""

import argparse
import gc
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.benchmarks.arms import ARMS, NONE, Addition, Arm, Usual
from experiments.benchmarks.harness import Ratio, alternate, full_precision, paired_ratio, percentiles, quiet
from experiments.benchmarks.results import DIRECTORY, Row, Table, provenance
from experiments.benchmarks.tasks import TASKS, TINY, Batch, Task
from experiments.benchmarks.training import Training, attach_of, plain_name, release, settle

ARM_NAMES = (NONE, "entropy", "sigma", "density", "all", "qk_clip")
STRATEGIES = ("ddp", "fsdp2")
STEPS = 5
LEARNING_RATE = 0.05
TOLERANCE = 2e-6  # of the largest parameter
DIFFERENT = 10.0  # times the tolerance: what training with the arm must differ from training without


@dataclass(frozen=True)
class Line:
    """A line of the CSV: ms a step of the slowest process, ratio to nothing, distance to the reference.

    Args:
        distance: Largest difference to the parameters of the reference, relative to the largest parameter.
        without: The same between trainings with and without the arm.
    """

    strategy: str
    processes: int
    model: str
    arm: str
    error: str = ""
    distance: float = float("nan")
    without: float = float("nan")
    ms: float = float("nan")
    ms_p20: float = float("nan")
    ms_p80: float = float("nan")
    time_p20: float = float("nan")
    time_p50: float = float("nan")
    time_p80: float = float("nan")
    rounds: int = 0
    steps: int = 0
    host_ms: float = float("nan")
    remark: str = ""


def table(directory: Path) -> Table:
    """The file of the lines."""
    keys = ("strategy", "processes", "model", "arm")
    return Table(directory / "distributed.csv", keys, [field.name for field in fields(Line) if field.name not in keys])


def wrapper(strategy: str, task: Task, device: torch.device) -> Callable[[nn.Module], nn.Module]:
    """What makes a model parallel."""

    def ddp(model: nn.Module) -> nn.Module:
        devices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)  # as under a Trainer

    def fsdp2(model: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in task.blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    return ddp if strategy == "ddp" else fsdp2


# --- is it exact -----------------------------------------------------------------------------------------------------


def check(task: Task, arm: Arm, strategy: str, device: torch.device) -> tuple[float, float]:
    """Distance to the reference, and of trainings with and without the arm.

    Raises:
        RuntimeError: If the parameters are others, or the arm makes no difference.
    """
    small = replace(task.small(), batch=2)
    size = dist.get_world_size()
    whole = replace(small, batch=small.batch * size).batches(device)
    part = [tuple(tensor.chunk(size)[dist.get_rank()].contiguous() for tensor in batch) for batch in whole]
    with full_precision():
        ours = _trained(small, attach_of(arm), device, part, wrapper(strategy, small, device))  # type: ignore[arg-type]
        expected = _trained(small, _reference(arm), device, whole)
        without = _trained(small, Addition, device, whole)
    distance, difference = _distance(ours, expected), _distance(without, expected)
    # every process must come to the same end
    worst = torch.tensor([distance, -difference], device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    distance, difference = float(worst[0]), -float(worst[1])
    if not distance <= TOLERANCE:
        raise RuntimeError(f"{arm.name} under {strategy}: parameters are off by {distance:.1e} of the largest.")
    if arm.name not in (NONE, "qk_clip") and difference < DIFFERENT * TOLERANCE:
        raise RuntimeError(f"{arm.name} under {strategy}: makes a difference of {difference:.1e}, which shows nothing.")
    return distance, difference


def _reference(arm: Arm) -> Callable[[nn.Module, float], Addition]:
    if arm.expected == "usual":
        return lambda model, weight: Usual(model, weight, arm.parts)
    return attach_of(arm)


def _trained(
    task: Task, attach: Callable[[nn.Module, float], Addition], device: torch.device, batches: list[Batch],
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Parameters after a few steps."""
    training = Training(
        task, attach, device, weight=10.0, bf16=False, sharp=True, wrap=wrap, batches=batches,
        optimizer=torch.optim.SGD, lr=LEARNING_RATE,
    )  # fmt: skip
    training.warm_up(STEPS)
    parameters = training.model.named_parameters()
    found = {plain_name(name): _whole(parameter.detach()).clone() for name, parameter in parameters}
    if wrap is None:
        training.close()
    return found


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the parameters that both have: without sigma-Reparam there are no gains."""
    shared = ours.keys() & expected.keys()
    largest = max(float(expected[name].abs().max()) for name in shared)
    return max(float((ours[name] - expected[name]).abs().max()) for name in shared) / largest


# --- what does it cost -----------------------------------------------------------------------------------------------


def measure(
    task: Task, strategy: str, arms: Sequence[Arm], device: torch.device, rounds: int, steps: int
) -> list[Line]:
    """Check and time arms, of which the first is nothing."""
    lines = {arm.name: Line(strategy, dist.get_world_size(), task.name, arm.name) for arm in arms}
    alive: dict[str, Training] = {}
    for arm in arms:
        with quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                found = dict(zip(("distance", "without"), check(task, arm, strategy, device), strict=True))
                release(device)
                alive[arm.name] = Training(task, attach_of(arm), device, wrap=wrapper(strategy, task, device))
                alive[arm.name].warm_up()
            except RuntimeError as error:  # this arm gets no numbers, the others do
                found = {"error": " ".join(str(error).split())[:500]}  # type: ignore[dict-item]
        texts = dict.fromkeys(str(w.message) for w in caught if "lightning_reg" in str(w.message))
        values: dict[str, Any] = {**found, "remark": " ".join(texts)[:300]}
        lines[arm.name] = replace(lines[arm.name], **values)
        _say(f"{task.name}, {strategy}, {arm.name}: {found}")
    settle()
    hosts: dict[str, list[float]] = {name: [] for name in alive}

    def block(name: str) -> float:
        dist.barrier()
        seconds = torch.tensor(alive[name].block(steps), device=device)
        hosts[name].append(1e3 * alive[name].host)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    times = alternate({name: partial(block, name) for name in alive}, rounds)
    gc.unfreeze()  # what is alive must be collected in the end
    for name, own in times.items():
        spread, ratio = percentiles([1e3 * seconds for seconds in own]), Ratio(*[float("nan")] * 3)
        if NONE in times:
            ratio = paired_ratio(own, times[NONE])
        lines[name] = replace(
            lines[name], ms=spread.median, ms_p20=spread.low, ms_p80=spread.high, time_p20=ratio.low,
            time_p50=ratio.median, time_p80=ratio.high, rounds=rounds, steps=steps,
            host_ms=statistics.median(hosts[name]),
        )  # fmt: skip
    return list(lines.values())


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def show(lines: Sequence[Line], where: Row) -> None:
    """Print where the numbers come from, and the numbers."""
    console = Console(width=150)
    for key, value in where.items():
        console.print(f"{key}: {value}", highlight=False, soft_wrap=True)
    printed = Printed("model", "strategy", "processes", "arm", "ms", "time", "distance", "without it", "remark")
    for line in lines:
        printed.add_row(
            line.model, line.strategy, str(line.processes), line.arm, f"{line.ms:.2f}",
            str(Ratio(line.time_p20, line.time_p50, line.time_p80)), f"{line.distance:.1e}", f"{line.without:.1e}",
            line.error or line.remark,
        )  # fmt: skip
    console.print(printed)


def run(arguments: argparse.Namespace) -> list[Line]:
    """Measure what is asked for, whatever is there; the first process writes."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    file, where = table(arguments.results), provenance(arguments.commit)
    lines: list[Line] = []
    for name in arguments.model:
        task = (TINY if arguments.tiny else TASKS)[name]
        for strategy in arguments.strategies:
            arms = [ARMS[NONE], *(ARMS[name] for name in arguments.arms if name != NONE)]
            if strategy == "fsdp2":
                arms = [arm for arm in arms if arm.name != "qk_clip"]  # scales whole heads, and refuses shards
            new = measure(task, strategy, arms, device, arguments.rounds, arguments.steps)
            lines += new
            if dist.get_rank() == 0:
                file.append((asdict(line) for line in new), where)
            release(device)
    if dist.get_rank() == 0:
        show(lines, where)
    dist.destroy_process_group()
    return lines


def main() -> None:
    """Check, measure, print, write; fails where an arm gets no numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", nargs="+", default=["vit"], choices=TASKS)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--arms", nargs="+", default=list(ARM_NAMES), choices=ARM_NAMES)
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each arm")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a block")
    parser.add_argument("--results", type=Path, default=DIRECTORY, help="folder of the CSV files")
    parser.add_argument("--commit", help="of the code, where this is no git checkout")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on CPUs, whose times mean nothing")
    lines = run(parser.parse_args())
    if any(line.error for line in lines):
        raise SystemExit("Some arms have no numbers: see above.")


if __name__ == "__main__":
    main()
