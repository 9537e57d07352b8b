"""What our configs may compute: lists as the choices of a sweep, the names of a run's presets, its tags."""

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

NONE = "none"


def choices(values: Iterable[Any]) -> str:
    """Values as Hydra's sweepers read them: ``1,2``."""
    return ",".join(str(value) for value in values)


def preset_choices(remedies: Iterable[str]) -> str:
    """Each remedy as a list of presets: ``none``, ``a`` and ``a+b`` give ``[],[a],[a,b]``."""
    return ",".join("[]" if remedy == NONE else f"[{remedy.replace('+', ',')}]" for remedy in remedies)


def remedy(*, _root_: DictConfig) -> str:
    """The presets of a run as one name, the counterpart of ``preset_choices``.

    A setting of a preset that is not there leaves a node without a target, and counts for nothing.
    """
    nodes = {key: _root_.callbacks[key] for key in _root_.callbacks}
    return "+".join(str(key) for key, node in nodes.items() if node is not None and "_target_" in node) or NONE


def run_tags(*, _root_: DictConfig) -> list[str]:
    """Seed and methods of a run, for W&B; the plain arm has no methods, and what only looks is none."""
    nodes = {key: node for key, node in _root_.callbacks.items() if node is not None and "_target_" in node}
    methods = [
        str(key)
        for key, node in nodes.items()
        if node._target_.startswith("lightning_reg.") and not node._target_.endswith("Monitor")
    ]
    return [f"seed={_root_.seed}", *(methods if _root_.arm != "plain" else [])]


OmegaConf.register_new_resolver("choices", choices, replace=True)
OmegaConf.register_new_resolver("preset_choices", preset_choices, replace=True)
OmegaConf.register_new_resolver("remedy", remedy, replace=True)
OmegaConf.register_new_resolver("run_tags", run_tags, replace=True)
