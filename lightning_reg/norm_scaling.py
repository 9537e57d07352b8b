"""Scales the norms of a stack of blocks by depth. Formula: ``lightning_reg.functional.layer_norm_scaling``.

A norm gets a forward hook, a module-level function that reads the number of its layer from the module: copies, pickles
and averaged models keep it, and compiled blocks share their code because the factor is a tensor. Nothing enters the
``state_dict``. The weights that were trained with it need it again: ``norm_scaling_record`` describes it for a
checkpoint, ``load_layer_norm_scaling`` puts it in place, and ``fold_layer_norm_scaling`` leaves a plain model.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg import capture
from lightning_reg.capture import Targets
from lightning_reg.functional.layer_norm_scaling import layer_scale

LAYER, FACTOR = "_lightning_reg_layer", "_lightning_reg_factor"  # on a scaled norm
_NORM_CLASS = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)
_INNER_NORM = re.compile(
    r"(^|[._])(q|k|v|qk|kv|query|key|value)_?(a_|b_)?(layer_?)?(norm|ln)|norm_(q|k|v)$", re.IGNORECASE
)
_POST_NORM = re.compile(r"post_?(feed_?forward|mlp|ffn|ffw)", re.IGNORECASE)
_STACKS = (nn.ModuleList, nn.Sequential)


# --- which norms -----------------------------------------------------------------------------------------------------


def find_norms(model: nn.Module, *, targets: Targets = None) -> dict[str, int]:
    """Norms to scale and the numbers of their layers, counted from 1.

    A stack is a ``ModuleList`` or ``Sequential`` of at least two blocks of one class, each with a norm; stages such as
    ``layers.0.blocks`` and ``layers.1.blocks`` count on. Left out are norms of queries and keys.

    Args:
        model: Model with pre-norm blocks.
        targets: Norms, or modules that hold them, in any stack; those of the longest stack, and of others whose blocks
            are of the same class, when left out.

    Raises:
        ValueError: If there are none, or their blocks are post-norm as far as attributes say.
    """
    modules = capture.named_modules(model)
    stacks = _stacks(modules)
    layers = {norm: number for blocks in stacks for number, names in enumerate(blocks.values(), 1) for norm in names}
    if targets is not None:
        return _selected(targets, modules, layers)
    if not stacks:
        raise ValueError(
            "no stack of blocks was found: no ModuleList or Sequential holds two or more blocks of one class that have "
            "a LayerNorm or RMSNorm each. Number the norms by hand with `functional.layer_norm_scaling`."
        )
    kind = _block_class(modules, max(stacks, key=len))
    chosen = {
        norm
        for blocks in stacks
        if _block_class(modules, blocks) is kind
        for names in blocks.values()
        for norm in names
    }
    for blocks in stacks:
        for block, names in blocks.items():
            if chosen.intersection(names):
                _refuse_post_norm(block, modules[block], names)
    return {norm: number for norm, number in layers.items() if norm in chosen}


def is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module normalises the residual stream: LayerNorm or RMSNorm of torch, timm or Hugging Face."""
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or bool(_NORM_CLASS.search(type(module).__name__))
    return known and not any(True for _ in module.children()) and not _INNER_NORM.search(name)


def _stacks(modules: dict[str, nn.Module]) -> list[dict[str, list[str]]]:
    """Norms of each block by stack; a norm belongs to the innermost."""
    norms = [name for name, module in modules.items() if is_norm(name, module)]
    found: dict[str, dict[str, list[str]]] = {}
    taken: set[str] = set()
    for name in sorted(modules, key=lambda name: -name.count(".")):
        blocks = _blocks(name, modules)
        own = {
            block: [norm for norm in norms if norm.startswith(f"{block}.") and norm not in taken] for block in blocks
        }
        if own and all(own.values()):
            taken |= {norm for names in own.values() for norm in names}
            found[name] = own
    stages: dict[str, dict[str, list[str]]] = {}
    for name in modules:
        if name in found:  # the stages of one network differ in their number only
            stages.setdefault(re.sub(r"\d+", "*", name), {}).update(found[name])
    return list(stages.values())


def _blocks(name: str, modules: dict[str, nn.Module]) -> list[str]:
    if not isinstance(modules[name], _STACKS):
        return []
    blocks = [f"{name}.{child}".lstrip(".") for child in modules[name]._modules]
    kinds = {type(modules[block]) if block in modules else None for block in blocks}
    return blocks if len(blocks) > 1 and len(kinds) == 1 and None not in kinds else []


def _block_class(modules: dict[str, nn.Module], blocks: Mapping[str, Any]) -> type:
    return type(modules[next(iter(blocks))])


def _selected(targets: Targets, modules: dict[str, nn.Module], layers: dict[str, int]) -> dict[str, int]:
    single = isinstance(targets, (str, type)) or callable(targets)
    chosen: set[str] = set()
    for entry in [targets] if single else list(targets or []):  # type: ignore[arg-type]
        selected = capture.match_targets(entry, modules)  # type: ignore[arg-type]
        below = {norm for norm in layers for top in selected if capture.at_or_below(norm, top)}
        if not below:
            raise ValueError(
                f"`targets` entry selects {', '.join(sorted(selected)[:5])}, where no norm of a stack of equal blocks "
                "is, or only those of queries and keys: name LayerNorm or RMSNorm modules, or their blocks; there are "
                f"{', '.join(list(layers)[:5]) or 'none'}."
            )
        chosen |= below
    if not chosen:
        raise ValueError("`targets` must not be empty; leave it out for automatic discovery.")
    return {norm: number for norm, number in layers.items() if norm in chosen}


def _refuse_post_norm(name: str, block: nn.Module, norms: list[str]) -> None:
    after = [norm for norm in norms if _POST_NORM.search(norm.rpartition(".")[2])]
    if getattr(block, "norm_first", True) is False or after:
        why = f"it has {after[0]!r}" if after else "`norm_first` is False"
        raise ValueError(
            f"{name!r} ({type(block).__name__}) normalises after its sub-layers ({why}), where scaling by depth is not "
            "what the paper does. Use a pre-norm model (`norm_first=True`), or name its pre-norms with `targets=`."
        )


class Probe:
    """Watches one forward pass of a scaled model: that every norm of a block that runs is called, and none comes last.

    Args:
        model: Model with scaled norms, not compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules, self._norms = capture.named_modules(model), list(norm_scaling_record(model))
        stacks = _stacks(self._modules)
        self._blocks = {block: norms for blocks in stacks for block, norms in blocks.items()}
        self._ran: set[str] = set()
        self._last: Tensor | None = None
        self._handles = [self._modules[name].register_forward_hook(self._norm(name)) for name in self._norms]
        self._handles += [
            self._modules[block].register_forward_hook(self._block(block))
            for block, norms in self._blocks.items()
            if set(norms) & set(self._norms)
        ]

    def close(self) -> None:
        """Stop watching."""
        self._last = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self) -> None:
        """Raise a RuntimeError if a norm was passed by."""
        idle = [
            norm
            for block, norms in self._blocks.items()
            for norm in norms
            if block in self._ran and norm in self._norms and norm not in self._ran
        ]
        if idle:
            raise RuntimeError(
                f"{', '.join(idle[:5])} did not run when their blocks did, so they are not scaled: the block's code "
                "uses their weights directly. Call the modules, or leave them out with `targets=`."
            )

    def _norm(self, name: str) -> Any:
        def seen(module: nn.Module, args: Any, output: Any) -> None:
            if self._handles:
                self._ran.add(name)
                self._last = output

        return seen

    def _block(self, name: str) -> Any:
        def seen(module: nn.Module, args: Any, output: Any) -> None:
            if not self._handles:
                return
            self._ran.add(name)
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            last, self._last = self._last, None
            if last is not None and first is last:
                raise RuntimeError(
                    f"{name!r} ({type(module).__name__}) is post-norm: it returns what its last norm gives, so scaling "
                    "by depth would scale the residual itself. Use a pre-norm model, or name its pre-norms with "
                    "`targets=`."
                )

        return seen


# --- what is done to them --------------------------------------------------------------------------------------------


def _scaled_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * getattr(module, FACTOR)


def apply_layer_norm_scaling(model: nn.Module, *, targets: Targets = None, offset: int = 0) -> list[str]:
    """Multiply the outputs of the norms of layer l by ``1 / sqrt(l + offset)`` from now on, in training and evaluation.

    Args:
        model: Model with pre-norm blocks.
        targets: As for ``find_norms``.
        offset: Layers before the first of the stack, >= 0.

    Returns:
        Names of the norms that this call scaled; those that already are stay as they are.

    Raises:
        ValueError: If an argument is invalid, nothing is found, or a norm is scaled by another number; nothing has
            changed then.
    """
    check_offset(offset)
    return load_layer_norm_scaling(
        model, {name: number + offset for name, number in find_norms(model, targets=targets).items()}
    )


def check_offset(offset: Any) -> int:
    """Return ``offset`` or raise a ValueError."""
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"`offset` must be an integer >= 0, the number of layers before the stack, got {offset!r}.")
    return offset


def norm_scaling_record(model: nn.Module) -> dict[str, int]:
    """Numbers of the layers of scaled norms, by name; plain values for a checkpoint."""
    scaled = {name: getattr(module, LAYER, None) for name, module in capture.named_modules(model).items()}
    return {name: layer for name, layer in scaled.items() if layer is not None}


def load_layer_norm_scaling(model: nn.Module, record: Mapping[str, Any]) -> list[str]:
    """Scale the norms that a model was trained with.

    Args:
        model: Model as it was before the training.
        record: ``norm_scaling_record`` of the trained model, or a Lightning checkpoint that holds one.

    Returns:
        Names of the norms that this call scaled.

    Raises:
        ValueError: If the record does not fit the model, or holds none; nothing has changed then.
    """
    entries, modules, present = _entries(record), capture.named_modules(model), norm_scaling_record(model)
    if missing := [name for name in entries if name not in modules]:
        raise ValueError(
            f"the checkpoint scaled {', '.join(missing[:5])}, which this model does not have: load it into the model "
            "it was trained with."
        )
    for name, layer in entries.items():
        layer_scale(layer)
        if present.get(name, layer) != layer:
            raise ValueError(
                f"{name!r} is scaled as layer {present[name]} already, not {layer}: call "
                "`remove_layer_norm_scaling(model)` first, or leave it out with `targets=`."
            )
    new = [name for name in entries if name not in present]
    for name in new:
        module = modules[name]
        # a tensor, so that compiled blocks of different depth share their code; a scalar works on every device
        module.__dict__[LAYER] = entries[name]
        module.__dict__[FACTOR] = torch.tensor(layer_scale(entries[name]), dtype=torch.float64)
        module.register_forward_hook(_scaled_output)
    _forget_compiled(model, new)
    return new


def remove_layer_norm_scaling(model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Stop scaling, in any model or in a copy of it. No-op where nothing is scaled.

    Args:
        model: The model.
        names: Norms to leave alone from now on; all when left out.

    Returns:
        Names of the norms that were scaled.
    """
    modules = capture.named_modules(model)
    scaled = [name for name in norm_scaling_record(model) if names is None or name in names]
    for name in scaled:
        _unhook(modules[name])
    _forget_compiled(model, scaled)
    return scaled


@torch.no_grad()
def fold_layer_norm_scaling(model: nn.Module) -> nn.Module:
    """Multiply weights and biases of the scaled norms instead, so that a plain model computes the same to rounding.

    Norms that multiply by ``1 + weight`` (Gemma) are folded accordingly.

    Returns:
        The model itself.

    Raises:
        ValueError: If a norm has no weight to fold into, or shares it with another; nothing has changed then.
    """
    modules, record = capture.named_modules(model), norm_scaling_record(model)
    plan: list[tuple[nn.Module, dict[str, Tensor]]] = []
    owners = [id(p) for module in modules.values() for p in module._parameters.values() if p is not None]
    for name in record:
        own = {key: p for key, p in modules[name]._parameters.items() if p is not None}
        shared = any(owners.count(id(parameter)) > 1 for parameter in own.values())
        folded = None if shared or "weight" not in own else _folded(modules[name], own)
        if folded is None:
            raise ValueError(
                f"the norm {name!r} ({type(modules[name]).__name__}) has no weight of its own that its factor folds "
                "into. Keep the library, and `load_layer_norm_scaling` where the model is used."
            )
        plan.append((modules[name], folded))
    for module, folded in plan:
        for key, value in folded.items():
            module._parameters[key].copy_(value)  # type: ignore[union-attr]
        _unhook(module)
    _forget_compiled(model, list(record))
    return model


def _folded(module: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, Tensor] | None:
    """Parameters with which the plain norm computes what the scaled one does; None if there are none."""
    factor = float(getattr(module, FACTOR))
    weight = own["weight"]
    generator = torch.Generator().manual_seed(0)
    shape = (3, *weight.shape) if weight.dim() != 1 or not _channels_first(module) else (3, len(weight), 2, 2)
    probe = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
    saved = {key: parameter.data for key, parameter in own.items()}
    try:
        exact = {key: value.double() for key, value in saved.items()}
        wanted = _forward(module, own, exact, probe)
        for one in (0.0, 1.0):
            values = {key: value * factor for key, value in exact.items()}
            values["weight"] = (exact["weight"] + one) * factor - one
            if torch.allclose(_forward(module, own, values, probe), wanted * factor, rtol=1e-5, atol=1e-6):
                return values
    finally:
        for key, parameter in own.items():
            parameter.data = saved[key]
    return None


def _forward(module: nn.Module, own: dict[str, nn.Parameter], values: dict[str, Tensor], probe: Tensor) -> Tensor:
    for key, parameter in own.items():
        parameter.data = values[key]
    return module.forward(probe).double()  # past the hook


def _channels_first(module: nn.Module) -> bool:
    return type(module).__name__.endswith("2d")


def _unhook(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if hook is _scaled_output]:
        del module._forward_hooks[key]
    module.__dict__.pop(LAYER)
    module.__dict__.pop(FACTOR)


def _forget_compiled(model: nn.Module, changed: Collection[str]) -> None:
    if changed and any(capture.is_compiled(module) for module in model.modules()):
        torch.compiler.reset()  # code compiled before a hook came or went does not see it (pytorch#117758)


def _entries(record: Mapping[str, Any]) -> dict[str, int]:
    if "callbacks" not in record:
        return dict(record)
    states = [state.get("norm_scaling") for state in record["callbacks"].values() if isinstance(state, Mapping)]
    entries = {name: layer for state in states if isinstance(state, Mapping) for name, layer in state.items()}
    if not entries:
        raise ValueError("the checkpoint holds no scaled norms: it was trained without LayerNormScaling.")
    return entries
