"""Where a number comes from: versions, hardware, commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "lightning", "torchmetrics", "timm", "transformers", "peft", "hydra-core")  # those installed
ROOT = Path(__file__).parents[1]


def run_info() -> dict[str, str]:
    """Commit, versions and hardware, as text."""
    versions = {"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {
        "commit": _commit(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "hardware": _hardware(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, {torch.get_num_threads()} torch threads, no GPU"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _commit() -> str:
    """Of the code that was loaded: files that change while it runs do not count."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return f"{commit} with local changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
