"""Composes our configs and checks them against the signatures they are for."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.run_info import ROOT

CONF, PRESETS = ROOT / "conf", ROOT / "lightning_reg" / "conf" / "lightning_reg"
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_args_", "_recursive_"}


def options(group: str) -> list[str]:
    """Names of the choices of a group of ours."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def presets() -> list[str]:
    """Names of the presets that the package ships."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def compose(*overrides: str, output: Path | str = "unused") -> DictConfig:
    """Our train config with overrides."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", [*overrides, f"output_dir={output}", "arm=regularized"])


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node with a ``_target_``, at any depth."""
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}")


def parameters(target: str) -> dict[str, inspect.Parameter]:
    """Arguments that a target takes."""
    return dict(inspect.signature(hydra.utils.get_object(target)).parameters)


def unknown_keys(node: DictConfig) -> set[str]:
    """Keys of a node that its target does not take."""
    taken = parameters(node._target_)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return set()
    return set(map(str, node)) - HYDRA_KEYS - set(taken)


def repeated_defaults(node: DictConfig) -> set[str]:
    """Keys of a node that only say what the target does anyway."""
    taken = parameters(node._target_)
    plain = OmegaConf.to_container(node, resolve=True)
    return {key for key, value in plain.items() if key in taken and _same(taken[key].default, value)}


def _same(default: Any, value: Any) -> bool:
    return type(default) is type(value) and bool(default == value)
