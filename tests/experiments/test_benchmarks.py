"""The harness pairs, rotates and measures; the benchmark gives no numbers for a callback that computes another term."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from experiments.benchmarks import attention, checks, distributed, harness, overhead, page, steps
from experiments.benchmarks.arms import ARMS, Addition
from experiments.benchmarks.harness import (
    Variant,
    alternate,
    full_precision,
    gradients,
    interleave,
    paired_ratio,
    peak_allocation,
)
from experiments.benchmarks.overhead import Contest, Setup, check, contests
from experiments.benchmarks.results import DIRECTORY, PROVENANCE
from experiments.benchmarks.tasks import TASKS, TINY
from experiments.benchmarks.training import Mode, Training, attach_of
from experiments.run_info import ROOT
from lightning_reg.callbacks import QKClip
from lightning_reg.functional import attention_with_entropy


class Model(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.down(self.up(batch).relu()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


BATCHES = [torch.randn(256, 4)]


def test_ratios_are_paired() -> None:
    ratio = paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)


def test_the_order_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(harness, "_seconds", lambda variant, *_: order.append(variant.name) or 1.0)
    times = interleave([Variant(name, Model) for name in "abc"], BATCHES, rounds=3, steps=1)
    assert "".join(order) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_step_takes_time() -> None:
    assert all(value > 0 for value in interleave([Variant("a", Model)], BATCHES, rounds=1, steps=2)["a"])


def test_a_wider_model_allocates_more() -> None:
    narrow, wide = (peak_allocation(Variant("", lambda width=width: Model(width)), BATCHES) for width in (64, 1024))
    assert narrow > 256 * 64 * 4
    assert wide > 8 * narrow


def test_gradients_are_those_of_the_first_step() -> None:
    found = gradients(Variant("", Model), BATCHES)
    torch.manual_seed(0)
    model = Model()
    model.training_step(BATCHES[0], 0).backward()
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in model.named_parameters())


def test_the_callbacks_compute_what_they_are_compared_with() -> None:
    check(Setup(sharpness=10), contests())


def test_a_callback_that_computes_something_else_gets_no_numbers() -> None:
    rows = {row.name: row for row in contests()}
    wrong = Contest("density loss", rows["attention entropy"].callbacks, rows["density loss"].usual)
    with pytest.raises(RuntimeError, match="density loss: gradients differ"):
        check(Setup(sharpness=10), [wrong])


def test_a_term_without_gradient_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "TOLERANCE", 1.0)
    with pytest.raises(RuntimeError, match="leaves the gradients as they are"):
        check(Setup(sharpness=10), contests()[:1])


# --- the GPU benchmarks, at sizes whose times mean nothing -----------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every script wrote."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("results") / "speed"
    common = ["--tiny", "--rounds", "3", "--results", str(folder), "--commit", "abc"]
    arms = ["none", "entropy", "all", "entropy/usual", "monitor"]
    call(steps, "--model", "vit", "bag", "--growth", "layers", "--arms", *arms, "--steps", "1", *common)
    call(steps, "--model", "gpt2-1k", "llama", "--arms", "none", "qk_clip", "z_loss", "--steps", "1", *common)
    call(attention, *common)
    launch(*common, "--arms", "none", "all", "--steps", "1")
    return folder


def call(script: ModuleType, *arguments: str) -> list[Any]:
    return script.run(script.parser().parse_args(arguments))


def launch(*arguments: str) -> None:
    # none of the variables that pytest or an outer launcher set
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER_", "LOCAL_"))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "experiments.benchmarks.distributed", *arguments],
        cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_every_script_writes_its_lines(results: Path) -> None:
    found = steps.table(results).read()
    measured = {(row["growth"], row["model"], row["arm"]) for row in found if float(row["ms"]) > 0}
    assert len(measured) == len(found)
    assert {("", "tiny ViT", "all"), ("", "tiny bag", "entropy/usual"), ("", "tiny Llama", "qk_clip")} <= measured
    assert ("layers", "tiny ViT, 2 layers", "entropy") in measured
    assert {row["commit"] for row in found} == {"abc"}
    assert all(row["error_fp32"] for row in found if row["arm"] in ("entropy", "all", "qk_clip", "z_loss", "monitor"))
    assert {row["variant"] for row in attention.table(results).read()} == {"fused", "entropy only", "eager"}
    assert {row["strategy"] for row in distributed.table(results).read()} == {"ddp", "fsdp2"}


def test_what_is_there_is_not_measured_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = steps.table(results).read()[0]
    monkeypatch.setattr(steps, "provenance", lambda commit: {key: first[key] for key in PROVENANCE})
    arguments = ["--tiny", "--model", "vit", "--arms", "none", "entropy", "--rounds", "3", "--steps", "1"]
    assert not call(steps, *arguments, "--results", str(results))
    measured = call(steps, *arguments, "--results", str(results.with_name("other")))
    assert [line.arm for line in measured] == ["none", "entropy"]


def test_the_page_has_the_numbers_of_the_files(results: Path) -> None:
    assert page.write(results) == results.with_suffix(".md")
    text = results.with_suffix(".md").read_text()
    growth = [row for row in steps.table(results).read() if row["growth"] and row["arm"] != "none"]
    assert growth
    for row in growth:
        assert f"x{float(row['time_p50']):.3f} [{float(row['time_p20']):.3f}, {float(row['time_p80']):.3f}]" in text
    for row in distributed.table(results).read():
        assert f"{float(row['distance']):.0e}" in text
    assert (results / "layers.png").stat().st_size > 10_000


def test_the_page_in_git_is_that_of_its_files() -> None:
    there = DIRECTORY.with_suffix(".md")
    assert there.exists() == DIRECTORY.exists()
    assert not there.exists() or there.read_text() == page.render(DIRECTORY)


def test_a_missed_bar_is_named(tmp_path: Path) -> None:
    write_vit(tmp_path / "speed", entropy_time=1.07, entropy_memory=1.01)
    text = page.render(tmp_path / "speed")
    assert "attention entropy: time is 1.07, the bar at most 1.05" in text
    assert "| x1.070 [1.060, 1.080] | x1.05 missed | x1.010 | x1.02 met |" in text
    write_vit(tmp_path / "speed", entropy_time=1.04, entropy_memory=1.01)  # the last line counts
    assert "All are met" in page.render(tmp_path / "speed")


def write_vit(folder: Path, entropy_time: float, entropy_memory: float) -> None:
    where = {"hardware": "a GPU", "versions": "torch 2", "commit": "abc", "source": "def"}
    common = {"growth": "", "model": TASKS["vit"].name, "mode": "eager", "ms": 50.0, "peak": 2**30}
    entropy = {"arm": "entropy", "time_p20": entropy_time - 0.01, "time_p50": entropy_time,
               "time_p80": entropy_time + 0.01, "memory": entropy_memory}  # fmt: skip
    empty = dict.fromkeys(steps.table(folder).columns, "")
    steps.table(folder).append([{**empty, **common, "arm": "none"}, {**empty, **common, **entropy}], where)


@pytest.mark.parametrize("name", ["entropy", "density", "z_loss", "prediction_entropy", "sigma", "entropy_eighth"])
def test_an_arm_that_computes_something_else_gets_no_numbers(name: str) -> None:
    other = ARMS["z_loss" if name == "density" else "density"]
    wrong = replace(ARMS[name], attach=other.attach)
    with pytest.raises(RuntimeError, match=name):
        checks.check(TINY["gpt2-1k"], wrong, torch.device("cpu"))


def test_a_clip_that_clips_nothing_gets_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check.cache_clear()
    monkeypatch.setattr(checks, "QKClip", lambda threshold: QKClip(threshold=2 * threshold))
    with pytest.raises(RuntimeError, match="qk_clip: differs"):
        checks.check(TINY["llama"], ARMS["qk_clip"], torch.device("cpu"))


def test_attention_off_by_a_rounding_of_bf16_gets_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(*args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, entropy = attention_with_entropy(*args, **kwargs)
        return output, entropy + 1e-3

    case = attention.Case(2, 2, 17, 16, True)
    assert attention.check(case, torch.device("cpu"), torch.float32).entropy < 1e-6
    monkeypatch.setattr(attention, "attention_with_entropy", rounded)
    with pytest.raises(RuntimeError, match="entropy is off by 1"):
        attention.check(case, torch.device("cpu"), torch.float32)


def test_long_attention_is_checked_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHECKED_LENGTH", 32)
    monkeypatch.setattr(attention, "CHECKED_ROWS", 7)
    for causal in (True, False):
        errors = attention.check(attention.Case(1, 2, 65, 16, causal), torch.device("cpu"), torch.float32)
        assert errors.entropy < 1e-6
        assert errors.gradient < 1e-6


@pytest.mark.parametrize(("mode", "graphs"), [("compiled", 1), ("blocks", 2)])
def test_graphs_and_their_breaks_are_counted(monkeypatch: pytest.MonkeyPatch, mode: Mode, graphs: int) -> None:
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)  # all of compilation but C++
    training = Training(TINY["vit"], attach_of(ARMS["all"]), torch.device("cpu"), mode)
    training.warm_up()
    assert training.compiler.graphs <= graphs
    assert not training.breaks
    training.close()

    def breaks(model: nn.Module, weight: float) -> Addition:
        model.blocks[0].norm1.register_forward_hook(lambda *_: torch._dynamo.graph_break())  # type: ignore[union-attr, operator]
        return Addition(model)

    training = Training(TINY["vit"], breaks, torch.device("cpu"), mode)
    training.warm_up()
    assert training.breaks


def test_an_arm_out_of_memory_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: nn.Module, weight: float) -> Addition:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(ARMS, "density/usual", replace(ARMS["density/usual"], attach=full))
    settings = steps.Settings(torch.device("cpu"), rounds=3, steps=1, budget=60)
    arms = [ARMS[name] for name in ("none", "density", "density/usual")]
    lines = {line.arm: line for line in steps.measure(TINY["vit"], arms, "eager", settings)}
    assert lines["density/usual"].error == "out of memory"
    assert lines["density"].time_p50 > 0


def test_a_paused_arm_gives_attention_back() -> None:
    attention_function = torch.nn.functional.scaled_dot_product_attention
    for name in ("all", "qk_clip/usual"):
        training = Training(TINY["vit"], attach_of(ARMS[name]), torch.device("cpu"))
        training.warm_up()
        assert torch.nn.functional.scaled_dot_product_attention is attention_function
        training.close()


def test_compiled_code_that_computes_something_else_gets_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)  # all of compilation but C++
    arm, device = ARMS["all"], torch.device("cpu")
    training = Training(TINY["vit"], attach_of(arm), device, "blocks")
    before = [tensor.clone() for tensor in training.tensors()]
    assert checks.check_compiled(training, arm, checks.Errors(usual=0.01)) < 0.01
    assert all(torch.equal(old, new) for old, new in zip(before, training.tensors(), strict=True))
    with torch.no_grad():
        training.model.head.register_forward_hook(lambda module, args, output: 1.05 * output)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="compiled, its gradients differ"):
        checks.check_compiled(training, arm, checks.Errors(usual=0.001))
    training.close()


def test_a_budget_ends_the_rounds() -> None:
    assert len(alternate({"a": lambda: 1.0}, rounds=50, budget=0)["a"]) == harness.LEAST_ROUNDS


def test_full_precision_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
