"""Gives modules a subclass of their class, in layers that come off in any order.

One class for all modules of a kind: torch makes one for every module, so that compiled blocks could not share code.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

LAYER = "_lightning_reg_layer"  # on a class: what it is for, what it is on, and how it is put on another
Layer = tuple[str, type, Callable[[type], type]]


def marked(kind: str, base: type, make: Callable[[type], type]) -> dict[str, Any]:
    """What a layer's class must hold: its kind, the class it is on, and the function that made it."""
    return {LAYER: (kind, base, make)}


def put_on(module: nn.Module, make: Callable[[type], type]) -> None:
    """Give a module the class that ``make`` returns for its class."""
    module.__class__ = make(type(module))


def take_off(module: nn.Module, kind: str) -> bool:
    """Take a layer away, from below others too; False where there is none, or it lies below a class of others."""
    above: list[Callable[[type], type]] = []
    cls = type(module)
    while (layer := _layer_of(cls)) is not None and layer[0] != kind:
        above.append(layer[2])
        cls = layer[1]
    if layer is None:
        return False
    cls = layer[1]
    for make in reversed(above):
        cls = make(cls)
    module.__class__ = cls
    return True


def kinds_of(module: nn.Module) -> list[str]:
    """Kinds of the layers of a module, the outermost first."""
    found, cls = [], type(module)
    while (layer := _layer_of(cls)) is not None:
        found.append(layer[0])
        cls = layer[1]
    return found


def bare_class(module: nn.Module) -> type:
    """The class below all layers."""
    cls = type(module)
    while (layer := _layer_of(cls)) is not None:
        cls = layer[1]
    return cls


def _layer_of(cls: type) -> Layer | None:
    return cls.__dict__.get(LAYER)
