"""What the file of an experiment says itself holds: no group it draws on may have the last word."""

from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.conf.configs import CONF

EXPERIMENTS = [path.stem for path in sorted(CONF.glob("*.yaml")) if "output_dir" in yaml.safe_load(path.read_text())]


def flat(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, part in node.items() for key, value in flat(part, (*path, name)).items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_own_values_are_those_of_the_composed_config(name: str) -> None:
    own = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = OmegaConf.to_container(compose(name))
    composed = flat(found)
    said = {key: value for key, value in flat(own).items() if key[0] not in ("defaults", "hydra")}
    assert said
    assert {key: composed.get(key) for key in said} == said
