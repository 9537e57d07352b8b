"""Densities asked for and reached: the runs and their table."""

import subprocess
import sys
from pathlib import Path

from experiments.control import FIELDS, write_table
from experiments.run_info import ROOT
from experiments.sparsity import append, read

SMALL = ("seeds=[0]", "widths=[8]", "targets=[0.3]", "weights=[0.1]", "trainer.max_steps=4")


def test_every_target_and_weight_is_run_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.control", f"output_dir={tmp_path}", *SMALL]
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
    rows = read(tmp_path / "control.csv")
    assert [(row["kind"], row["asked"], row["width"]) for row in rows] == [
        ("target", "0.3", "8"),
        ("weight", "0.1", "8"),
    ]
    assert all(0 < float(row["density"]) < 1 and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert float(rows[0]["weight"]) != 1.0
    assert "| density 0.3 |" in (tmp_path / "control.md").read_text()


def test_table_says_how_far_off(tmp_path: Path) -> None:
    for seed, density in ((0, 0.11), (1, 0.09)):
        row = {
            "seed": seed,
            "width": 8,
            "kind": "target",
            "asked": 0.1,
            "density": density,
            "accuracy": 0.5,
            "weight": 2,
        }
        append(tmp_path / "control.csv", row, FIELDS)
    (line,) = [line for line in write_table(tmp_path / "control.csv").read_text().splitlines() if "density 0.1" in line]
    assert line == "| density 0.1 | 0.110 (+10%) | 0.090 (-10%) | 50.0 % |"


def test_published_densities_are_within_ten_percent() -> None:
    rows = read(ROOT / "experiments" / "results" / "control.csv")
    asked = [row for row in rows if row["kind"] == "target"]
    assert len({row["asked"] for row in asked}) >= 3
    assert len({row["width"] for row in asked}) >= 2
    assert all(abs(float(row["density"]) / float(row["asked"]) - 1) <= 0.1 for row in asked)
