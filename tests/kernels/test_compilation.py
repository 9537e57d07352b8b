"""Every kernel compiles for an H100, at ordinary sizes and at those of 1, which the compiler takes for constants."""

import os
import subprocess
import sys

import pytest

from tests.kernels.offline import CASES


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_an_h100(case: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.kernels.offline", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "launches of" in done.stdout
