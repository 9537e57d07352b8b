"""The comparison on a language model: its text, its runs, its table."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.data.python_docs import PythonDocs
from experiments.run_info import ROOT
from experiments.sparsity import FIELDS
from experiments.sparsity_results import summarise, write_results

SMALL = (
    "pretrain_steps=2", "steps=2", "precision=32-true", "trainer.accelerator=cpu", "threads=1",
    "model.net.config.hidden_size=16", "model.net.config.intermediate_size=32", "model.net.config.num_hidden_layers=2",
    "model.net.config.num_attention_heads=2", "+data.datamodule.length=16", "+data.datamodule.batch_size=4",
    "+data.datamodule.val_batches=1",
)  # fmt: skip


def write_docs(folder: Path, files: int = 40) -> Path:
    for index in range(files):
        (folder / f"{index:02}.rst.txt").write_text(f"page {index} " * 40)
    return folder


def test_held_out_files_are_never_trained_on(tmp_path: Path) -> None:
    data = PythonDocs(0, length=8, batch_size=3, steps=5, val_batches=2, root=str(write_docs(tmp_path)))
    data.setup("fit")
    train, val = (bytes(data.parts[name].tolist()) for name in ("train", "val"))
    held_out = [index for index in range(40) if f"page {index} ".encode() in val]
    assert held_out == [19, 39]
    assert not any(f"page {index} ".encode() in train for index in held_out)
    batches = list(data.train_dataloader())
    assert [batch.shape for batch in batches] == [(3, 9)] * 5
    assert all(bytes(window.tolist()) in train for batch in batches for window in batch)
    again = PythonDocs(0, length=8, batch_size=3, steps=5, root=str(tmp_path))
    again.setup("fit")
    assert torch.equal(next(iter(again.train_dataloader())), batches[0])
    other = PythonDocs(1, length=8, batch_size=3, steps=5, root=str(tmp_path))
    other.setup("fit")
    assert not torch.equal(next(iter(other.train_dataloader())), batches[0])


def test_text_that_is_missing_or_too_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"is not in .*python3.11-doc`, or give `data.datamodule.root="):
        PythonDocs(0, root=str(tmp_path)).setup("fit")
    (tmp_path / "text").write_text("short")
    with pytest.raises(ValueError, match="too little text for `length=256` in train"):
        PythonDocs(0, root=str(tmp_path / "text")).setup("fit")


def run(folder: Path, text: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "experiments.sparsity", f"output_dir={folder}", f"+data.datamodule.root={text}"]
    result = subprocess.run([*command, *SMALL, *overrides], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_comparison_runs_every_arm_once_and_continues(tmp_path: Path) -> None:
    text = write_docs(tmp_path)
    run(tmp_path / "out", text, "seeds=[0]", "arms.hoyer.strengths=[1.0]", "arms.constant_l1.strengths=[1.0]")
    path = tmp_path / "out" / "sparsity.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["arm"] for row in rows} == {
        "silu", "relu", "shifted_relu", "constant_l1", "prosparse", "hoyer", "controller", "controller_slow",
    }  # fmt: skip
    assert tuple(rows[0]) == FIELDS
    by_arm = {row["arm"]: row for row in rows}
    assert float(by_arm["silu"]["density"]) > 0.999
    assert by_arm["silu"]["shifted_loss"] == ""
    assert 0.2 < float(by_arm["relu"]["density"]) < 0.8
    assert float(by_arm["relu"]["shifted_density"]) < float(by_arm["relu"]["density"])
    assert all(0 < float(row["loss"]) < 6 for row in rows)
    before = path.read_text()
    run(tmp_path / "out", text, "seeds=[0]", "arms.hoyer.strengths=[1.0]", "arms.constant_l1.strengths=[1.0]")
    assert path.read_text() == before
    assert (tmp_path / "out" / "sparsity.png").stat().st_size > 1000
    assert "| relu |" in (tmp_path / "out" / "sparsity.md").read_text()


def row(arm: str, seed: int, loss: float, strength: float = 0.0, shifted: str = "") -> dict[str, str]:
    numbers = {"loss": loss, "density": 0.5, "dead": 0.0, "seconds": 1.0}
    return {
        "arm": arm, "seed": str(seed), "strength": str(strength), "shifted_loss": shifted, "shifted_density": shifted,
        **{key: str(value) for key, value in numbers.items()},
    }  # fmt: skip


def test_table_compares_with_relu_of_the_same_seed(tmp_path: Path) -> None:
    rows = [row("relu", 0, 1.0), row("relu", 1, 2.0), row("hoyer", 1, 2.3, 3.0), row("hoyer", 0, 1.1, 3.0, "0.25")]
    relu, hoyer = summarise(rows)
    assert relu[:4] == ("relu", "", "1.5000 ± 0.7071", "+0.0000 ± 0.0000")
    assert hoyer[:5] == ("hoyer", "3", "1.7000 ± 0.8485", "+0.2000 ± 0.1414", "50.0 ± 0.0 %")
    assert hoyer[5:7] == ("-0.7500", "25.0 %")
    twice = [{"file": "a", **relu} for relu in rows[:1]] + [{"file": "b", **row("relu", 0, 3.0)}]
    twice += [{"file": name, **row("hoyer", 0, 4.0, 1.0)} for name in ("b", "c")]
    assert summarise(twice)[1][3] == "+2.0000 ± 1.4142"  # its own file's, else the first


def test_published_results_are_drawn_from_their_runs(tmp_path: Path) -> None:
    folder = ROOT / "experiments" / "results" / "sparsity"
    copies = []
    for path in sorted(folder.glob("*.csv")):
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text())
    table = [line for line in write_results(copies, {}).read_text().splitlines() if line.startswith("| ")]
    page = (ROOT / "experiments" / "results" / "sparsity.md").read_text()
    assert all(line in page for line in table)
