"""Attention with entropy against attention alone, kernel by kernel: python -m experiments.benchmarks.attention.

``functional.attention_with_entropy`` beside each kernel of torch's attention and beside the usual way, which
materialises the scores; forward, and forward with backward; the row entropies of a bag's scores. A case is timed only
after it was compared with float64.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmarks.harness import Ratio, alternate, paired_ratio, peak_bytes, percentiles
from experiments.benchmarks.results import DIRECTORY, Row, Table, provenance
from experiments.benchmarks.training import release, settle, synchronize
from lightning_reg.functional import attention_entropy, attention_entropy_from_scores, attention_with_entropy

FUSED, FLASH, EAGER, ENTROPY = "fused", "flash", "eager", "entropy only"
BACKENDS = {
    FLASH: SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
VARIANTS = (FUSED, ENTROPY, *BACKENDS, EAGER)
PASSES = ("forward", "both")
CHECKED_LENGTH = 2048  # up to which whole matrices are compared; beyond, rows
CHECKED_ROWS = 64
OUTPUT_TOLERANCE = 1e-2  # relative in norm: bf16 has eight bits
ENTROPY_TOLERANCE = 1e-4  # absolute, nats; the bar is a tenth
GRADIENT_FACTOR, GRADIENT_FLOOR = 3.0, 1e-3  # of torch's own error; the bar is half the factor
BLOCK_SECONDS, MOST_CALLS = 0.02, 50  # of a timed block
CLOCK = 2e9  # cycles a second, at most: how long the device is kept busy while calls are queued
INPUT_SETS = 2  # in turn, so that a small case is not served from the cache
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Sizes of an attention; of a bag's scores where ``head_dim`` is 0."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool

    @property
    def of_scores(self) -> bool:
        """Whether scores are given, not queries and keys."""
        return self.head_dim == 0

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Queries, keys and values as views of one tensor, as models make them; or scores in float32."""
        source: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
        if self.of_scores:
            return [torch.randn(self.batch, self.length, **source).requires_grad_()]
        shape = (self.batch, self.length, 3, self.heads, self.head_dim)
        packed = torch.randn(shape, dtype=torch.float32, **source).to(dtype)
        return [tensor.detach().requires_grad_() for tensor in packed.permute(2, 0, 3, 1, 4)]


@dataclass(frozen=True)
class Line:
    """A line of the CSV: ms a call on the device, ratio to FlashAttention, and what the check found.

    Args:
        direction: ``forward``, or ``both`` for forward and backward.
        memory: Bytes allocated at a time beyond the inputs.
        host_ms: Until a call was queued.
        entropy_error: Largest difference to float64, nats.
        gradient_error: Norm of the difference to float64 relative to the norm, gradients of queries, keys and values.
        sdpa_error: The same of FlashAttention with the same inputs, or of torch's choice where there is none.
    """

    variant: str
    direction: str
    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool
    error: str = ""
    ms: float = float("nan")
    ms_p20: float = float("nan")
    ms_p80: float = float("nan")
    time_p20: float = float("nan")
    time_p50: float = float("nan")
    time_p80: float = float("nan")
    memory: int = 0
    host_ms: float = float("nan")
    rounds: int = 0
    calls: int = 0
    entropy_error: float = float("nan")
    gradient_error: float = float("nan")
    sdpa_error: float = float("nan")
    remark: str = ""


def table(directory: Path) -> Table:
    """The file of the lines."""
    keys = ("variant", "direction", "batch", "heads", "length", "head_dim", "causal")
    return Table(directory / "attention.csv", keys, [field.name for field in fields(Line) if field.name not in keys])


# --- what is called --------------------------------------------------------------------------------------------------


def function(variant: str, case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """From the inputs of a case to what it returns: output, entropy, or both."""
    if case.of_scores:
        return _eager_scores if variant == EAGER else lambda scores: (attention_entropy_from_scores(scores),)
    if variant == FUSED:
        return partial(attention_with_entropy, is_causal=case.causal)
    if variant == ENTROPY:
        return lambda query, key, value: (attention_entropy(query, key, is_causal=case.causal),)
    if variant == EAGER:
        return partial(_eager, causal=case.causal)
    return partial(_sdpa, backend=BACKENDS[variant], causal=case.causal)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend, causal: bool) -> tuple[Tensor, ...]:
    with sdpa_kernel(backend):
        return (F.scaled_dot_product_attention(query, key, value, is_causal=causal),)


def _eager(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, ...]:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probs = scores.to(wide).softmax(-1)
    entropy = -(probs * (probs + torch.finfo(wide).tiny).log()).sum(-1)
    return probs.to(value.dtype) @ value, entropy


def _eager_scores(scores: Tensor) -> tuple[Tensor, ...]:
    probs = scores.softmax(-1)
    return (-(probs * (probs + torch.finfo(probs.dtype).tiny).log()).sum(-1),)


def upstream(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Random gradients, of entropies in float32."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]


# --- is it right -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Of entropy in nats, of gradients relative in norm, and of those of torch's own attention."""

    entropy: float
    gradient: float
    sdpa: float = float("nan")


def check(case: Case, device: torch.device, dtype: torch.dtype) -> Errors:
    """Compare ours with float64: whole up to ``CHECKED_LENGTH`` keys, beyond that rows of queries.

    Raises:
        RuntimeError: If it computes something else.
    """
    small = Case(min(case.batch, 2), min(case.heads, 2), case.length, case.head_dim, case.causal)
    inputs = small.inputs(device, dtype, seed=2)
    errors = _check_scores(inputs[0]) if case.of_scores else _check_attention(small, inputs)
    if not errors.entropy <= ENTROPY_TOLERANCE:
        raise RuntimeError(f"{case}: entropy is off by {errors.entropy:.1e} nats; its cost means nothing.")
    if not errors.gradient <= GRADIENT_FACTOR * (0.0 if math.isnan(errors.sdpa) else errors.sdpa) + GRADIENT_FLOOR:
        raise RuntimeError(f"{case}: gradients are off by {errors.gradient:.1e}, torch's by {errors.sdpa:.1e}.")
    return errors


def _check_scores(scores: Tensor) -> Errors:
    exact = scores.detach().double().requires_grad_()
    (expected,), (ours,) = _eager_scores(exact), (attention_entropy_from_scores(scores),)
    grad = upstream([ours])[0]
    wanted = torch.autograd.grad(expected, exact, grad.double())
    return Errors(_largest(ours, expected), _norm(torch.autograd.grad(ours, scores, grad), wanted))


def _check_attention(case: Case, inputs: list[Tensor]) -> Errors:
    rows = _checked_rows(case, inputs[0].device)
    outputs = attention_with_entropy(*inputs, is_causal=case.causal)
    grads = upstream(outputs)
    if len(rows) < case.length:  # only these have a gradient, so that all that keys and values receive is from them
        keep = torch.zeros(case.length, device=rows.device).index_fill_(0, rows, 1.0)
        grads = [grads[0] * keep[:, None].to(grads[0].dtype), grads[1] * keep]
    chosen = [grads[0][..., rows, :].double(), grads[1][..., rows].double()]
    exact = [tensor.detach().double() for tensor in inputs]
    exact[0] = exact[0][..., rows, :]
    query, key, value = exact = [tensor.requires_grad_() for tensor in exact]
    expected = _rows(query, key, value, rows if case.causal else None)
    ours = _of_rows(torch.autograd.grad(outputs, inputs, grads), rows)
    wanted = torch.autograd.grad(expected, exact, chosen, retain_graph=True)
    plain = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=case.causal)
    of_torch = _of_rows(torch.autograd.grad(plain, inputs, grads[0]), rows)
    wanted_of_torch = torch.autograd.grad(expected[0], exact, chosen[0])
    if _norm([outputs[0][..., rows, :]], [expected[0]]) > OUTPUT_TOLERANCE:
        raise RuntimeError(f"{case}: the output is not that of attention; its cost means nothing.")
    return Errors(
        _largest(outputs[1][..., rows], expected[1]), _norm(ours, wanted), _norm(of_torch, wanted_of_torch)
    )  # fmt: skip


def _of_rows(grads: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Gradients of queries, of these rows only, and of keys and values."""
    return [grads[0][..., rows, :], *grads[1:]]


def _checked_rows(case: Case, device: torch.device) -> Tensor:
    if case.length <= CHECKED_LENGTH:
        return torch.arange(case.length, device=device)
    return torch.linspace(0, case.length - 1, CHECKED_ROWS, device=device).long()


def _rows(query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention and entropy of chosen queries; ``rows`` are their places where attention is causal."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if rows is not None:
        hidden = torch.arange(key.shape[-2], device=rows.device) > rows[:, None]
        scores = scores.masked_fill(hidden, -math.inf)
    probs = scores.softmax(-1)
    logs = torch.where(probs > 0, probs, 1.0).log()
    return probs @ value, -(probs * logs).sum(-1)


def _largest(ours: Tensor, expected: Tensor) -> float:
    return float((ours.detach().double() - expected.detach()).abs().max())


def _norm(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    with torch.no_grad():
        off = sum(float((mine.double() - theirs).square().sum()) for mine, theirs in zip(ours, expected, strict=True))
        return math.sqrt(off / sum(float(theirs.square().sum()) for theirs in expected))


# --- how long does it take -------------------------------------------------------------------------------------------


class Timed:
    """One variant of a case in one direction, to be called in blocks."""

    def __init__(self, variant: str, direction: str, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.backward, self.device = direction == "both", device
        self.call = function(variant, case)
        self.sets = [case.inputs(device, dtype, seed) for seed in range(INPUT_SETS)]
        if variant == ENTROPY:
            for inputs in self.sets:
                inputs[2].requires_grad_(False)
        self.grads = upstream(self.call(*self.sets[0]))
        self.calls = 1
        self.host = 0.0
        for _ in range(2):
            seconds = self.block()
        self.calls = max(1, min(MOST_CALLS, math.ceil(BLOCK_SECONDS / max(seconds, 1e-9))))
        self.memory = self._memory()

    def once(self, index: int = 0) -> None:
        """One call."""
        inputs = self.sets[index % len(self.sets)]
        with torch.set_grad_enabled(self.backward):
            outputs = self.call(*inputs)
        if self.backward:
            torch.autograd.grad(outputs, [tensor for tensor in inputs if tensor.requires_grad], self.grads)

    def block(self) -> float:
        """Seconds of a call on the device, which is kept busy until all calls are queued."""
        if self.device.type != "cuda":
            return self._queue()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CLOCK * min(0.2, 1.2 * self.host * self.calls)))
        start.record()
        self.host = self._queue()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls

    def _queue(self) -> float:
        start = time.perf_counter()
        for index in range(self.calls):
            self.once(index)
        return (time.perf_counter() - start) / self.calls

    def _memory(self) -> int:
        synchronize(self.device)
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        return peak_bytes(self.once, self.device) - before


def measure(
    case: Case, variants: Sequence[str], directions: Sequence[str], device: torch.device, dtype: torch.dtype,
    rounds: int, budget: float,
) -> list[Line]:  # fmt: skip
    """Check and time the variants of a case."""
    lines: list[Line] = []
    for direction in directions:
        found: dict[str, dict[str, Any]] = {}
        alive: dict[str, Timed] = {}
        for variant in variants:
            found[variant] = {}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                try:
                    if variant == FUSED:
                        errors = check(case, device, dtype)
                        found[variant] = {"entropy_error": errors.entropy, "gradient_error": errors.gradient,
                                          "sdpa_error": errors.sdpa}  # fmt: skip
                        release(device)
                    alive[variant] = Timed(variant, direction, case, device, dtype)
                    found[variant]["memory"] = alive[variant].memory
                except torch.OutOfMemoryError:
                    found[variant]["error"] = "out of memory"
                except RuntimeError as error:  # this one gets no numbers, the others do
                    found[variant]["error"] = " ".join(str(error).split())[:300]
            own = dict.fromkeys(str(w.message) for w in caught if "lightning_reg" in str(w.message))
            found[variant]["remark"] = " ".join(own)[:300]
            release(device)
        times = alternate({variant: timed.block for variant, timed in alive.items()}, rounds, budget)
        base = times.get(FLASH)
        for variant, values in found.items():
            if variant in times:
                spread = percentiles([1e3 * seconds for seconds in times[variant]])
                ratio = paired_ratio(times[variant], base) if base else Ratio(*[float("nan")] * 3)
                values |= {
                    "ms": spread.median, "ms_p20": spread.low, "ms_p80": spread.high, "time_p20": ratio.low,
                    "time_p50": ratio.median, "time_p80": ratio.high, "rounds": len(times[variant]),
                    "calls": alive[variant].calls, "host_ms": 1e3 * alive[variant].host,
                }  # fmt: skip
            lines.append(Line(variant, direction, **asdict(case), **values))
    return lines


# --- which cases -----------------------------------------------------------------------------------------------------


def cases(tiny: bool) -> Iterator[tuple[Case, Sequence[str]]]:
    """Sizes, each with the variants that are run: 16k tokens in a call, 16 heads."""
    if tiny:
        yield Case(2, 2, 17, 16, True), (FUSED, ENTROPY, EAGER)
        yield Case(1, 1, 33, 0, False), (FUSED, EAGER)
        return
    for head_dim in (64, 128):
        for causal in (True, False):
            for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768):
                yield Case(max(1, 16384 // length), 16, length, head_dim, causal), VARIANTS
    for length in (8192, 16384, 32768, 65536, 131072):  # memory
        yield Case(1, 4, length, 64, True), (FUSED, FLASH)
    yield Case(128, 12, 197, 64, False), VARIANTS  # ViT-B/16
    yield Case(1, 8, 50_000, 64, False), VARIANTS  # a bag, in a transformer
    yield Case(1, 1, 50_000, 0, False), (FUSED, EAGER)  # a bag, in CLAM


def show(lines: Sequence[Line], where: Row) -> None:
    """Print where the numbers come from, and the numbers."""
    console = Console(width=150)
    for key, value in where.items():
        console.print(f"{key}: {value}", highlight=False, soft_wrap=True)
    printed = Printed("case", "variant", "direction", "ms", "flash", "MiB", "host ms", "H", "grads", "sdpa", "remark")
    for line in lines:
        ratio = str(Ratio(line.time_p20, line.time_p50, line.time_p80))
        name = f"{line.batch}x{line.heads}x{line.length}x{line.head_dim}{' causal' if line.causal else ''}"
        printed.add_row(
            name, line.variant, line.direction, f"{line.ms:.3f}", ratio, f"{line.memory / MIB:.1f}",
            f"{line.host_ms:.3f}", f"{line.entropy_error:.0e}", f"{line.gradient_error:.1e}",
            f"{line.sdpa_error:.1e}", line.error or line.remark,
        )  # fmt: skip
    console.print(printed)


def run(arguments: argparse.Namespace) -> list[Line]:
    """Measure what is asked for and not there yet; returns the new lines."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    file, where = table(arguments.results), provenance(arguments.commit)
    settle()
    lines: list[Line] = []
    for case, suited in cases(arguments.tiny):
        if not _asked_for(case, arguments):
            continue
        variants = [variant for variant in suited if variant in arguments.variants]
        for direction in arguments.directions:
            named = {"direction": direction, **asdict(case)}
            if not arguments.again and all(file.has({**named, "variant": v}, where) for v in variants):
                continue
            start = time.perf_counter()
            new = measure(case, variants, [direction], device, dtype, arguments.rounds, arguments.budget)
            file.append((asdict(line) for line in new), where)
            lines += new
            print(f"{case}, {direction}: {time.perf_counter() - start:.1f} s", flush=True)
    show(lines, where)
    return lines


def _asked_for(case: Case, arguments: argparse.Namespace) -> bool:
    return (
        (not arguments.lengths or case.length in arguments.lengths)
        and (not arguments.head_dims or case.head_dim in arguments.head_dims)
        and (arguments.causal is None or case.causal == arguments.causal)
    )


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", nargs="*", type=int, default=[], help="only these")
    parser.add_argument("--head-dims", nargs="*", type=int, default=[], help="only these; 0 is scores")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, help="only such; both when left out")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--directions", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each variant")
    parser.add_argument("--budget", type=float, default=2, help="seconds of timing, of a case and direction")
    parser.add_argument("--results", type=Path, default=DIRECTORY, help="folder of the CSV files")
    parser.add_argument("--commit", help="of the code, where this is no git checkout")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU, whose times mean nothing")
    return parser


def main() -> None:
    """Check, measure, print, write; fails where ours gets no numbers."""
    lines = run(parser().parse_args())
    if any(line.error and line.variant in (FUSED, ENTROPY) for line in lines):
        raise SystemExit("Some variants have no numbers: see above.")


if __name__ == "__main__":
    main()
