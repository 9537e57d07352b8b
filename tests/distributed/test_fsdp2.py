"""FSDP2 on two CPU processes: the reference is the hand-written loss under DDP, which averages the same gradients."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests import tiny
from tests.distributed.test_ddp import ddp_fit, pytestmark  # noqa: F401 - the same marks
from tests.test_engine import DIFFERENT, EXACT


def test_sharded_training_equals_the_handwritten_loss(tmp_path: Path) -> None:
    script = Path(__file__).with_name("fsdp2_script.py")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER_", "LOCAL_"))
    }
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "parameters.pt")],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    vectors = torch.load(tmp_path / "parameters.pt")
    wanted = ddp_fit(tiny.Tiny(handwritten=True), None, {}, {})
    assert tiny.distance(vectors["unregularized"], wanted) > DIFFERENT
    for case in ("plain", "nonreentrant", "reentrant"):
        assert tiny.distance(vectors[case], wanted) <= EXACT, case
