"""Published pages and tables are what their stored runs give, to the letter."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import (
    aem_mil_results,
    compose_results,
    deft_minilm_results,
    prosparse_lm_results,
    sigma_reparam_vit_results,
)
from experiments.evidence import Store
from experiments.gallery import RESULTS
from tests.conf.configs import CONF

WRITERS: dict[str, Callable[..., Path]] = {
    "aem_mil": aem_mil_results.write_results,
    "compose": compose_results.write_results,
    "deft_minilm": deft_minilm_results.write_results,
    "prosparse_lm": prosparse_lm_results.write_results,
    "sigma_reparam_vit": sigma_reparam_vit_results.write_results,
}
FROM_CONFIG = {
    "deft_minilm": ("tuning_seed", "allowed"), "prosparse_lm": ("tuning_seed", "sparsity"),
    "sigma_reparam_vit": ("tuning_seed",),
}  # fmt: skip


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(RESULTS.glob("*/runs.jsonl.gz"))])
def test_a_published_page_comes_from_its_runs(name: str, tmp_path: Path) -> None:
    shutil.copy(RESULTS / name / "runs.jsonl.gz", tmp_path)
    settings: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    page = WRITERS[name](Store(tmp_path), tmp_path, *(settings[key] for key in FROM_CONFIG.get(name, ())))
    assert page.read_text() == (RESULTS / name / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.csv").read_text() == (RESULTS / name / f"{name}.csv").read_text()
    assert (RESULTS / name / f"{name}.png").stat().st_size > 10_000


def test_every_paper_has_its_page() -> None:
    assert {path.parent.name for path in RESULTS.glob("*/runs.jsonl.gz")} == set(WRITERS)
