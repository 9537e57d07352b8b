"""Where the time of a step goes, by kernel and by function: python -m experiments.benchmarks.profiling --model vit.

For each arm the kernels whose time differs most from the step without it, the time that the device is idle, and the
Python functions in which the host spends more.
"""

import argparse
import cProfile
import pstats
from collections import Counter
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.arms import ARMS, NONE, Arm
from experiments.benchmarks.harness import quiet
from experiments.benchmarks.tasks import TASKS, TINY, Task
from experiments.benchmarks.training import MODES, Mode, Training, attach_of, release

STEPS = 4
SHOWN = 14


def kernels(training: Training) -> Counter[str]:
    """Milliseconds of a step by kernel, or by operator where there is no GPU."""
    cuda = training.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorder:
        training.block(STEPS)
    found: Counter[str] = Counter()
    for event in recorder.events():
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            found[event.name[:90]] += event.time_range.elapsed_us() / 1e3 / (STEPS + 1)  # type: ignore[assignment]
    return found


def functions(training: Training) -> Counter[str]:
    """Milliseconds of a step by Python function, without what it calls; the profiler makes all of them slower."""
    recorder = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):  # else backward's functions run where nothing is recorded
        recorder.enable()
        training.block(STEPS)
        recorder.disable()
    entries = pstats.Stats(recorder).stats.items()  # type: ignore[attr-defined]
    found: Counter[str] = Counter()
    for (file, line, name), (_, _, own, *_) in entries:
        found[f"{'/'.join(file.split('/')[-2:])}:{line} {name}"[:90]] += 1e3 * own / (STEPS + 1)
    return found


def report(task: Task, arms: Sequence[Arm], device: torch.device, mode: Mode) -> None:
    """Print what an arm adds to the step without it."""
    base: tuple[Counter[str], Counter[str]] | None = None
    for arm in arms:
        with quiet():
            training = Training(task, attach_of(arm), device, mode)
            training.warm_up()
            wall = min(1e3 * training.block(STEPS) for _ in range(2))
            host = 1e3 * training.host
            found = kernels(training), functions(training)
        busy = sum(found[0].values())
        times = f"{wall:.2f} ms a step, queued in {host:.2f}, kernels {busy:.2f}"
        print(f"\n{task.name}, {mode}, {arm.name}: {times}")
        for title, own, before in zip(("kernel", "function"), found, base or (Counter(), Counter()), strict=True):
            change = {name: own[name] - before[name] for name in own.keys() | before.keys()}
            for name, more in sorted(change.items(), key=lambda item: -abs(item[1]))[:SHOWN]:
                print(f"  {title} {more:+8.3f} ms, now {own[name]:7.3f}  {name}")
        base = base or found
        training.close()
        del training
        release(device)


def main() -> None:
    """Profile each arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="vit", choices=TASKS)
    parser.add_argument("--arms", nargs="+", default=["entropy", "sigma", "density", "all"], choices=ARMS)
    parser.add_argument("--mode", default="eager", choices=MODES)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arms = [ARMS[NONE], *(ARMS[name] for name in arguments.arms if name != NONE)]
    report((TINY if arguments.tiny else TASKS)[arguments.model], arms, device, arguments.mode)


if __name__ == "__main__":
    main()
