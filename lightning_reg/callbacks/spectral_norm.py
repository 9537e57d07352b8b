"""sigma-Reparam: trains ``(gain / sigma(W)) W`` in place of W. Formula: ``lightning_reg.functional.spectral_norm``.

The weight becomes a torch parametrization with a learnable ``gain`` and the leading singular vectors u and v; undo it
with ``merge_sigma_reparam``, not with torch's own function. Nothing is mutated in forward: u and v follow W once per
optimizer step, so gradients are exact under activation checkpointing, accumulation and compilation. Outside training
nothing of this is visible: ``state_dict()`` and checkpoints hold plain ``weight`` keys, and the model is merged back
when the fit ends.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.capture import Targets
from lightning_reg.functional.spectral_norm import (
    leading_singular_triplet,
    power_iteration_,
    rayleigh,
    spectral_reparam,
    weight_matrices,
)

Init = Literal["preserve", "one"]
FusedQKV = Literal["split", "fused"]

# query_key_value (GPT-NeoX, BLOOM, Falcon) is left out: its rows interleave the three per head
_FUSED_QKV = re.compile(r"qkv|c_attn|in_proj", re.IGNORECASE)
_LIVE_KEY = re.compile(r"(?P<prefix>.*?)parametrizations\.(?P<name>[^.]+)\.original")
_PER_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_values", "_last_lr")
_STATE = ("gain", "u", "v")


# --- the parametrization ---------------------------------------------------------------------------------------------


class SpectralParametrization(nn.Module):
    """State of one weight: ``gain`` (parts,) is trained, u (parts, rows) and v (parts, columns) follow the weight."""

    u: Tensor
    v: Tensor

    def __init__(self, gain: Tensor, u: Tensor, v: Tensor, transposed: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)
        self.register_buffer("u", u)
        self.register_buffer("v", v)
        self.transposed = transposed
        self.plain_keys = True  # state_dict() shows the weight in use under its plain name
        self.manager = ""  # name of the callback that updates u and v
        self.adopted = False  # attached by the user, not by that callback

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use."""
        if self.training:
            return spectral_reparam(weight, self.gain, self.u, self.v, self.transposed)
        return self.folded(weight)

    def folded(self, weight: Tensor) -> Tensor:
        """The weight in use outside training. An averaged copy of the model averages u and v: they lose unit norm."""
        u, v = nn.functional.normalize(self.u, dim=-1), nn.functional.normalize(self.v, dim=-1)
        return spectral_reparam(weight, self.gain, u, v, self.transposed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(lambda tensor: _at_least_float32(tensor, fn(tensor)), recurse)


def _at_least_float32(before: Tensor, after: Tensor) -> Tensor:
    # sigma rounded to half precision would change the function by more than a step of training does
    return before.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after


@dataclass(frozen=True)
class _Layer:
    """A weight of a module that is reparametrized; a tied weight has several layers with one ``spectral``."""

    label: str
    key: str
    owner: nn.Module
    tensor: str

    @property
    def container(self) -> Any:
        return self.owner.parametrizations[self.tensor]  # type: ignore[index,union-attr]

    @property
    def original(self) -> Tensor:
        return self.container.original

    @property
    def spectral(self) -> SpectralParametrization:
        return self.container[0]

    def state(self) -> dict[str, Tensor]:
        tensors = {"original": self.original, **{name: getattr(self.spectral, name) for name in _STATE}}
        return {name: tensor.detach() for name, tensor in tensors.items()}


def _layers(model: nn.Module, manager: str | None = None) -> list[_Layer]:
    return [
        layer
        for name, module in capture.named_modules(model).items()
        for tensor in _ours(module)
        for layer in [_Layer(_label(name, tensor), f"{name}.{tensor}".lstrip("."), module, tensor)]
        if manager is None or layer.spectral.manager == manager
    ]


def _unique(layers: list[_Layer]) -> list[_Layer]:
    """The first layer of each weight."""
    return list({id(layer.spectral): layer for layer in reversed(layers)}.values())[::-1]


def _ours(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    containers: Any = module.parametrizations
    return [name for name, container in containers.items() if isinstance(container[0], SpectralParametrization)]


def _label(name: str, tensor: str) -> str:
    return (name if tensor in ("weight", "in_proj_weight") else f"{name}.{tensor}") or tensor


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


# --- attach ----------------------------------------------------------------------------------------------------------


def apply_sigma_reparam(
    model: nn.Module, *, targets: Targets = None, init: Init = "preserve", fused_qkv: FusedQKV = "split"
) -> list[str]:
    """Reparametrize the weights of a model in place; the callback then trains them.

    Needed only where the callback comes too late: call it before ``fully_shard`` in ``configure_model``. In a
    hand-written loop call ``update_sigma_reparam`` after each optimizer step.

    Args:
        model: Model whose weights exist and are not sharded yet.
        targets: As for ``SigmaReparam``.
        init: As for ``SigmaReparam``.
        fused_qkv: As for ``SigmaReparam``.

    Returns:
        Names of the layers that this call reparametrized; those that were before are left as they are.

    Raises:
        ValueError: If an argument is invalid, nothing is found, or a target cannot be reparametrized.
        RuntimeError: If the model is sharded already.
    """
    _check_choices(init, fused_qkv)
    attached = _attach(model, targets, init, fused_qkv)
    if not attached and not _layers(model):
        raise ValueError(_NOTHING_FOUND)
    return [layer.label for layer in attached]


@torch.no_grad()
def update_sigma_reparam(model: nn.Module) -> None:
    """Bring u and v up to date by one power iteration: once after each optimizer step of a hand-written loop."""
    _update(_unique(_layers(model)))


_NOTHING_FOUND = (
    "SigmaReparam found no Linear, convolution, Conv1D or MultiheadAttention weight to reparametrize. Create the "
    "layers in `__init__`, `setup` or `configure_model`, or remove the callback."
)


def _check_choices(init: str, fused_qkv: str) -> None:
    if init not in ("preserve", "one"):
        raise ValueError(
            f"`init` must be 'preserve' or 'one', got {init!r}. 'preserve' keeps the function of the model, "
            "'one' is the paper's start from scratch."
        )
    if fused_qkv not in ("split", "fused"):
        raise ValueError(
            f"`fused_qkv` must be 'split' or 'fused', got {fused_qkv!r}. 'split' gives query, key and value their own "
            "gain."
        )


def _attach(
    model: nn.Module, targets: Targets, init: str, fused_qkv: str, lenient: bool = False, manager: str = ""
) -> list[_Layer]:
    """Plan everything before anything is changed, so that an error leaves the model as it was."""
    modules = capture.named_modules(model)
    selected = _select(targets, modules, lenient)
    owners_of = _owners(modules)
    known = {id(layer.original): layer.spectral for layer in _layers(model)}
    plan: dict[int, tuple[SpectralParametrization, list[tuple[str, nn.Module, str]]]] = {}
    for name, module in modules.items():
        for tensor in _weight_names(module) if name in selected else []:
            weight = module._parameters.get(tensor)
            if tensor in _ours(module) or id(weight) in plan:
                continue
            owners = owners_of.get(id(weight), [])
            reason = _unsupported(module, tensor, weight)
            if targets is None and (reason or any(isinstance(owner, nn.Embedding) for _, owner, _ in owners)):
                continue
            label = _label(name, tensor)
            if reason:
                raise ValueError(f"`targets` selects {label!r}, whose weight {reason}. Leave it out of `targets`.")
            assert weight is not None
            _check_attachable(label, weight, model)
            if (spectral := known.get(id(weight))) is None:
                parent = modules.get(name.rpartition(".")[0])
                parts = _parts(name, module, tensor, parent) if fused_qkv == "split" else 1
                spectral = _initial(label, weight, parts, _is_transposed(module), init)
            spectral.manager = spectral.manager or manager
            plan[id(weight)] = (spectral, owners)
    return [
        _register(name, owner, tensor, spectral) for spectral, owners in plan.values() for name, owner, tensor in owners
    ]


def _select(targets: Targets, modules: dict[str, nn.Module], lenient: bool) -> set[str]:
    candidates = {name: module for name, module in modules.items() if _weight_names(module)}
    if targets is None:
        return set(candidates)
    if not lenient:
        return capture.match_targets(targets, candidates)
    selected: set[str] = set()
    single = isinstance(targets, (str, type)) or callable(targets)
    for entry in [targets] if single else list(targets):  # type: ignore[arg-type]
        try:
            selected |= capture.match_targets(entry, candidates)  # type: ignore[arg-type]
        except ValueError:
            continue  # its module may be built later; `on_fit_start` insists
    return selected


def _weight_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):
        fused = module._qkv_same_embed_dim
        return ["in_proj_weight"] if fused else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    supported = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or _is_transposed(module)
    return ["weight"] if supported else []


def _is_transposed(module: nn.Module) -> bool:
    """Whether the module is GPT-2's ``Conv1D``, which keeps its weight as (in, out)."""
    return hasattr(module, "nf") and any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _owners(modules: dict[str, nn.Module]) -> dict[int, list[tuple[str, nn.Module, str]]]:
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in modules.items():
        for tensor, weight in module._parameters.items():
            if weight is not None:
                owners.setdefault(id(weight), []).append((name, module, tensor))
    return owners


def _unsupported(module: nn.Module, tensor: str, weight: Tensor | None) -> str | None:
    if parametrize.is_parametrized(module, tensor):
        return "is parametrized already"
    if weight is None:
        return "is no parameter of its own: it is computed, quantised or packed"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "is not initialised yet: run a batch through the lazy module first"
    if not weight.is_floating_point() or (type(weight.data) is not Tensor and not _is_sharded(weight)):
        return f"is quantised ({type(weight.data).__name__} of {weight.dtype})"
    return None


def _check_attachable(label: str, weight: Tensor, model: nn.Module) -> None:
    if _is_sharded(weight) or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise RuntimeError(
            f"The weight of {label!r} is sharded already. Call `lightning_reg.callbacks.apply_sigma_reparam(net)` in "
            "`configure_model` before `fully_shard`, or create the net in `__init__`."
        )
    if weight.is_meta:
        raise RuntimeError(
            f"The weight of {label!r} is on the meta device, so its spectral norm is unknown. Materialise the model "
            "before SigmaReparam is attached."
        )


def _parts(name: str, module: nn.Module, tensor: str, parent: nn.Module | None) -> int:
    """3 for a fused projection whose output is query, key and value in equal thirds, else 1."""
    if tensor == "in_proj_weight":
        return 3
    if tensor != "weight" or not _FUSED_QKV.search(name.rpartition(".")[2]):
        return 1
    size = capture.projection_sizes(module) or (0, 0)
    heads = [getattr(parent, attribute, 0) for attribute in ("num_heads", "head_dim")]
    wanted = {3 * size[0], 3 * heads[0] * heads[1] if all(isinstance(number, int) for number in heads) else 0}
    return 3 if size[1] and size[1] in wanted else 1


def _initial(label: str, weight: Tensor, parts: int, transposed: bool, init: str) -> SpectralParametrization:
    gain, u, v = _preserving(weight.detach(), parts, transposed)
    if not bool(((gain > 0) & torch.isfinite(gain)).all()):
        raise ValueError(
            f"The weight of {label!r} has spectral norm {gain.tolist()}, but sigma-Reparam divides by it. "
            "Initialise it to a finite matrix that is not zero, or leave it out: "
            f"`targets=lambda name, module: name != {label!r}`."
        )
    spectral = SpectralParametrization(gain if init == "preserve" else torch.ones_like(gain), u, v, transposed)
    spectral.gain.requires_grad_(weight.requires_grad)
    return spectral


def _preserving(weight: Tensor, parts: int, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(gain, u, v)`` with which the weight in use is the weight, bit for bit: gain is rounded as in forward."""
    matrices = weight_matrices(weight, parts, transposed)
    _, u, v = leading_singular_triplet(matrices)
    return rayleigh(matrices.to(u.dtype), u, v), u, v


def _register(name: str, owner: nn.Module, tensor: str, spectral: SpectralParametrization) -> _Layer:
    """What ``parametrize.register_parametrization`` of torch does, but with one class for all modules of a kind."""
    ours, parameter = _ours(owner), owner._parameters[tensor]
    assert parameter is not None
    base = type(owner).__bases__[0] if ours else type(owner)
    if not hasattr(owner, "parametrizations"):
        owner.parametrizations = nn.ModuleDict()
    containers: Any = owner.parametrizations
    container: Any = parametrize.ParametrizationList([spectral], parameter, unsafe=True)
    container.order = containers[ours[0]].order if ours else tuple(owner._parameters)
    if not ours:
        owner.register_state_dict_post_hook(_fold_state_dict)
        owner.register_load_state_dict_pre_hook(_unfold_state_dict)
    del owner._parameters[tensor]
    containers[tensor] = container
    spectral.train(owner.training)
    owner.__class__ = _parametrized_class(base, (*ours, tensor))
    return _Layer(_label(name, tensor), f"{name}.{tensor}".lstrip("."), owner, tensor)


@cache
def _parametrized_class(base: type, tensors: tuple[str, ...]) -> type:
    # torch makes a class for every module, so that each compiled block would differ from the others and be recompiled
    views = type("_InUse", (), {tensor: _in_use(tensor) for tensor in tensors})
    return type(f"Parametrized{base.__name__}", (base, views), {"__module__": parametrize.__name__})


def _in_use(tensor: str) -> property:
    def in_use(self: Any) -> Tensor:
        return self.parametrizations[tensor]()

    return property(in_use)


# --- update ----------------------------------------------------------------------------------------------------------


def _update(layers: list[_Layer]) -> None:
    matrices: list[Tensor] = []
    u: list[Tensor] = []
    v: list[Tensor] = []
    for layer in layers:
        spectral, weight = layer.spectral, _whole(layer.original.detach())
        matrices += weight_matrices(weight.to(spectral.u.dtype), len(spectral.u), spectral.transposed).unbind()
        u += spectral.u.unbind()
        v += spectral.v.unbind()
    power_iteration_(matrices, u, v)


# --- merge -----------------------------------------------------------------------------------------------------------


def merge_sigma_reparam(model: nn.Module) -> list[str]:
    """Replace every reparametrized weight in place by the weight in use: the values of eval mode, bit for bit.

    The Parameter objects, ties, the order of parameters and the classes of the modules are those from before.

    Args:
        model: Model, not sharded.

    Returns:
        Names of the merged layers; empty when there are none.

    Raises:
        RuntimeError: If the model is sharded.
    """
    return _merge(_layers(model))


@torch.no_grad()
def _merge(layers: list[_Layer]) -> list[str]:
    for layer in layers:
        if _is_sharded(layer.original):
            raise RuntimeError(
                f"The weight of {layer.label!r} is sharded and cannot be merged in place. Save a checkpoint, "
                "consolidate it, and use `fold_checkpoint`."
            )
    for layer in _unique(layers):
        layer.original.copy_(layer.spectral.folded(layer.original))
    for owner in {id(layer.owner): layer.owner for layer in layers}.values():
        _restore(owner, [layer.tensor for layer in layers if layer.owner is owner])
    return [layer.label for layer in layers]


def _restore(owner: nn.Module, tensors: list[str]) -> None:
    containers: Any = owner.parametrizations
    order = containers[tensors[0]].order
    originals = {tensor: containers[tensor].original for tensor in tensors}
    for tensor in tensors:
        del containers[tensor]
    if not containers:
        del owner.parametrizations
    owner.__class__ = type(owner).__bases__[0]
    for tensor, original in originals.items():
        owner.register_parameter(tensor, original)
    rank = {name: index for index, name in enumerate(order)}
    ordered = sorted(owner._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
    owner._parameters.clear()
    owner._parameters.update(ordered)
    _remove_hooks(owner)


def _remove_hooks(owner: nn.Module) -> None:
    for hooks, ours in (
        (owner._state_dict_hooks, _fold_state_dict),
        (owner._load_state_dict_pre_hooks, _unfold_state_dict),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is ours]:
            del hooks[key]


# --- state dicts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fold_state_dict(owner: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Show plain keys, where they were before: the state dict ends with the keys of ``owner`` when this runs."""
    layers = [_Layer("", "", owner, tensor) for tensor in _ours(owner)]
    layers = [layer for layer in layers if layer.spectral.plain_keys and not _is_sharded(layer.original)]
    if not layers:
        return
    own = {
        key: state_dict.pop(key) for key in list(takewhile(lambda key: key.startswith(prefix), reversed(state_dict)))
    }
    entries = dict(reversed(own.items()))
    for layer in layers:
        live = f"{prefix}parametrizations.{layer.tensor}."
        entries = {key: value for key, value in entries.items() if not key.startswith(live)}
        entries[prefix + layer.tensor] = layer.spectral.folded(layer.original)
    rank = {prefix + name: index for index, name in enumerate(layers[0].container.order)}
    state_dict.update(sorted(entries.items(), key=lambda item: rank.get(item[0], len(rank))))


def _unfold_state_dict(
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take a plain key as the new weight, with the gain, u and v that keep the function it describes."""
    for layer in [_Layer("", "", owner, tensor) for tensor in _ours(owner)]:
        key, live = prefix + layer.tensor, f"{prefix}parametrizations.{layer.tensor}."
        if key not in state_dict or live + "original" in state_dict:
            continue
        weight, state = state_dict.pop(key), layer.state()
        if weight.shape == state["original"].shape and not _is_sharded(weight):
            parts, transposed = len(state["gain"]), layer.spectral.transposed
            state |= zip(_STATE, _preserving(weight.to(state["original"].dtype), parts, transposed))
            if not bool((state["gain"] > 0).all()):
                error_msgs.append(f"{key!r} is zero or not finite, but sigma-Reparam divides by its spectral norm.")
        state_dict[live + "original"] = weight
        state_dict.update({f"{live}0.{name}": state[name] for name in _STATE})


def fold_checkpoint(path: str | Path, output: str | Path | None = None, *, weights_only: bool = True) -> Path:
    """Turn the live keys of a checkpoint (sharded training, consolidated) into plain ``weight`` keys.

    Args:
        path: A checkpoint file, or a file that holds a bare state dict. Replaced only once the result is complete.
        output: Where to write; over ``path`` when left out.
        weights_only: Refuse pickled objects other than tensors and plain containers. Turn off for your own checkpoint
            with, say, a config object among its hyper-parameters.

    Returns:
        The written file.

    Raises:
        ValueError: If ``path`` is no file, holds no such keys, or is refused by ``weights_only``.
    """
    path = Path(path)
    output = path if output is None else Path(output)
    if not path.is_file():
        raise ValueError(
            f"`path` must be a checkpoint file, got {str(path)!r}. Consolidate a sharded checkpoint first: "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except UnpicklingError as error:
        raise ValueError(
            f"`path` {str(path)!r} holds pickled objects. If you trust it, pass `weights_only=False`."
        ) from error
    states = [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint] or [checkpoint]
    if not sum(_fold_keys(state) for state in states):
        raise ValueError(f"`path` {str(path)!r} holds no sigma-Reparam keys; it is plain already.")
    _replace(checkpoint, output)
    return output


def _replace(checkpoint: Any, output: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=output.name, suffix=".tmp")
    os.close(handle)
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, output)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _fold_keys(state: dict[str, Any]) -> int:
    """Fold the live keys of a bare state dict in place, each weight before the other tensors of its module."""
    matches = [match for key in state if (match := _LIVE_KEY.fullmatch(key))]
    weights: dict[str, list[tuple[str, Tensor]]] = {}
    folded = set()
    for match in matches:
        prefix, name = match["prefix"], match["name"]
        live = f"{prefix}parametrizations.{name}."
        keys = [live + "original", *(f"{live}0.{part}" for part in _STATE)]
        if all(key in state for key in keys):
            weights.setdefault(prefix, []).append((prefix + name, _folded_tensor(*(state[key] for key in keys))))
            folded |= set(keys)
    entries: dict[str, Any] = {}
    for key, value in state.items():
        prefix = match["prefix"] if (match := _LIVE_KEY.match(key)) else key[: key.rfind(".") + 1]
        entries.update(weights.pop(prefix, []))
        if key not in folded:
            entries[key] = value
    state.clear()
    state.update(entries)
    return len(folded)


def _folded_tensor(original: Tensor, gain: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """A square weight can be read in two ways; u and v are its leading pair, so the right one has more ``u^T W v``."""
    u, v = nn.functional.normalize(u, dim=-1), nn.functional.normalize(v, dim=-1)
    readings = []
    for transposed in (False, True):
        axis = 1 if transposed else 0
        if original.dim() == 2 or not transposed:
            columns = original.numel() // original.shape[axis]
            if (original.shape[axis], columns) == (u.numel(), v.shape[1]):
                matrices = weight_matrices(original, len(gain), transposed).to(u.dtype)
                readings.append((float((u.unsqueeze(1) @ matrices @ v.unsqueeze(2)).sum()), transposed))
    return spectral_reparam(original, gain, u, v, max(readings)[1])


# --- optimizers ------------------------------------------------------------------------------------------------------


def _place_gains(trainer: pl.Trainer, layers: list[_Layer], decay: bool) -> None:
    """See to it that every gain is in an optimizer, and in a group without weight decay unless ``decay``."""
    groups = [(optimizer, group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    holder = {id(parameter): place for place in groups for parameter in place[1]["params"]}
    moves: dict[int, tuple[Any, dict[str, Any], list[_Layer]]] = {}
    for layer in layers:
        gain = layer.spectral.gain
        if not gain.requires_grad:
            continue
        place = holder.get(id(gain))
        if place is None:
            place = holder.get(id(layer.original))
            if place is None or not _takes_groups(place[0]):
                raise RuntimeError(
                    f"No optimizer trains the gain of {layer.label!r}, and none that takes another parameter group "
                    "holds its weight. Build the optimizer in `configure_optimizers` from `self.parameters()`."
                )
        elif decay or not place[1].get("weight_decay", 0):
            continue
        moves.setdefault(id(place[1]), (*place, []))[2].append(layer)
    for optimizer, group, moved in moves.values():
        _to_own_group(trainer, optimizer, group, moved, decay)


def _takes_groups(optimizer: Any) -> bool:
    return not isinstance(optimizer, torch.optim.LBFGS) and type(optimizer).__name__ != "ZeroRedundancyOptimizer"


def _to_own_group(trainer: pl.Trainer, optimizer: Any, group: dict[str, Any], moved: list[_Layer], decay: bool) -> None:
    gains = {id(layer.spectral.gain): layer for layer in moved}
    kept = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in gains]
    if not kept:
        group["weight_decay"] = 0.0
        return
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if "weight_decay" in own and not decay:
        own["weight_decay"] = 0.0
    names = group.get("param_names")
    group["params"] = [group["params"][index] for index in kept]
    parameters: list[Any] = [layer.spectral.gain for layer in moved]
    if names is not None:
        group["param_names"] = [names[index] for index in kept]
        parameters = [(f"{layer.key}.gain", layer.spectral.gain) for layer in moved]
    index = next(i for i, candidate in enumerate(optimizer.param_groups) if candidate is group)
    optimizer.add_param_group({**own, "params": parameters})
    for config in trainer.lr_scheduler_configs:
        for scheduler in _nested(config.scheduler):
            if getattr(scheduler, "optimizer", optimizer) is optimizer:
                _extend(scheduler, index, len(optimizer.param_groups) - 1)


def _nested(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", []):
        yield from _nested(inner)


def _extend(scheduler: Any, index: int, groups: int) -> None:
    """Give the new last group the schedule of group ``index``."""
    for attribute in _PER_GROUP:
        values = getattr(scheduler, attribute, None)
        if isinstance(values, list) and len(values) == groups:
            setattr(scheduler, attribute, [*values, values[index]])


# --- the callback ----------------------------------------------------------------------------------------------------


class SigmaReparam(Callback):
    """Trains ``(gain / sigma(W)) W`` in place of each weight W: sigma-Reparam (Zhai et al. 2023).

    Checkpoints hold plain ``weight`` keys and load without this library; raw state beside them makes a resumed run
    equal an uninterrupted one. After ``fit`` the model is merged, so a checkpoint that is saved *after* the fit
    continues the function, not the run. Sharded training (``ModelParallelStrategy``) keeps live keys in its checkpoints
    and stays reparametrized after the fit: consolidate and ``fold_checkpoint``. Put it before weight averaging.

    Args:
        targets: Modules that own the weights: a regular expression that matches a whole name or a dotted ending of it,
            a module type, a predicate on (name, module), or a list of these. Left out: every Linear, convolution,
            GPT-2 Conv1D and MultiheadAttention, except weights that are tied to an embedding.
        init: Start of the gain: ``"preserve"`` takes sigma(W), so the model computes what it did; ``"one"`` is the
            paper.
        fused_qkv: ``"split"`` gives query, key and value of a fused projection a gain each, ``"fused"`` one to all.
        decay_gain: Leave the gain in the weight decay of its optimizer; it shrinks the function.
        name: Name in logs and checkpoints; two instances in one Trainer need two names and disjoint targets.

    Logs ``reg/<name>/max``, the largest spectral norm of the weights in use.
    """

    def __init__(
        self,
        *,
        targets: Targets = None,
        init: Init = "preserve",
        fused_qkv: FusedQKV = "split",
        decay_gain: bool = False,
        name: str = "spectral_norm",
    ) -> None:
        super().__init__()
        _check_choices(init, fused_qkv)
        if not name:
            raise ValueError("`name` must not be empty; it names the logged values and the state in checkpoints.")
        self.targets, self.init, self.fused_qkv, self.decay_gain, self.name = targets, init, fused_qkv, decay_gain, name
        self._model: pl.LightningModule | None = None
        self._sharded = False
        self._patched: dict[str, tuple[Any, Any]] = {}
        self._updated_step: int | None = None
        self._pending: dict[str, Any] | None = None
        self._updates: list[_Layer] = []  # found once: walking the modules takes longer than the update
        self._loaded_groups: list[list[int]] = []

    def spectral_norms(self) -> dict[str, Tensor]:
        """Spectral norm of the weights in use, ``|gain|`` (parts,), by layer; empty outside ``fit``."""
        return {layer.label: _whole(layer.spectral.gain.detach()).abs() for layer in self._own_layers()}

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        names = ("init", "fused_qkv", "decay_gain")
        return {"targets": _plain(self.targets), **{name: getattr(self, name) for name in names}}

    @property
    def state_key(self) -> str:
        """Tells two instances apart in a checkpoint."""
        return self._generate_state_key(name=self.name)

    # --- life ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach to what exists, and to the rest once ``setup`` and ``configure_model`` have built it."""
        if stage != "fit":
            return
        self._check_trainer(trainer)
        self._release()
        self._model, self._updated_step, self._pending, self._loaded_groups = pl_module, None, None, []
        self._sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        for hook in ("setup", "configure_model"):
            if is_overridden(hook, pl_module):
                self._patch(pl_module, hook)
        self._attach(pl_module, lenient=bool(self._patched))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that everything is in place: here the model, the optimizers and the loaded checkpoint exist."""
        self._check_attached(pl_module)
        self._restore_pending(trainer, pl_module)
        _place_gains(trainer, self._own_layers(), self.decay_gain)
        self._check_optimizers(trainer)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the restored step; the learning rate finder loads a checkpoint after ``on_fit_start``."""
        self._restore_pending(trainer, pl_module)
        self._updates = self._own_layers()
        if self._updated_step is None:
            self._updated_step = trainer.global_step

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let u and v follow the weights after an optimizer step, and log."""
        if trainer.global_step != self._updated_step:
            _update(self._updates)
            self._updated_step = trainer.global_step
        if trainer._logger_connector.should_update_logs and not trainer.barebones:
            largest = torch.cat(list(self.spectral_norms().values())).max()
            pl_module.log(f"reg/{self.name}/max", largest, batch_size=1, rank_zero_only=False)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Merge: the model is plain again."""
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Merge: Lightning does not call ``teardown`` after a crash."""
        self._release()

    def _own_layers(self) -> list[_Layer]:
        return [] if self._model is None else _unique(_layers(self._model, self.name))

    def _check_trainer(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise RuntimeError(
                f"SigmaReparam does not work with {type(trainer.strategy).__name__}, which flattens the parameters. "
                "Use `ModelParallelStrategy` (FSDP2) or `DDPStrategy`."
            )
        callbacks = _callbacks(trainer)
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                raise ValueError(
                    f"{type(callback).__name__} comes before SigmaReparam in `callbacks`, so it would average a model "
                    "without the gains. Put SigmaReparam first."
                )

    def _patch(self, pl_module: pl.LightningModule, hook: str) -> None:
        before, original = pl_module.__dict__.get(hook), getattr(pl_module, hook)

        # no functools.wraps: Lightning would look through it, and not call it where only this callback overrides
        def attach_after(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._model is pl_module:
                self._attach(pl_module, lenient=True)
            return result

        setattr(pl_module, hook, attach_after)
        self._patched[hook] = (before, attach_after)

    def _attach(self, pl_module: pl.LightningModule, lenient: bool) -> None:
        _attach(pl_module, self.targets, self.init, self.fused_qkv, lenient, self.name)
        for layer in _layers(pl_module, ""):
            layer.spectral.manager, layer.spectral.adopted = self.name, True
        for layer in _layers(pl_module, self.name):
            layer.spectral.plain_keys = not self._sharded

    def _check_attached(self, pl_module: pl.LightningModule) -> None:
        if not self._own_layers() and self.targets is None:
            raise ValueError(_NOTHING_FOUND)
        modules = capture.named_modules(pl_module)
        for name in _select(self.targets, modules, lenient=False) if self.targets is not None else ():
            if not _ours(modules[name]):
                raise RuntimeError(
                    f"{name!r} was created after `configure_model`, too late for SigmaReparam. Create it earlier, or "
                    "call `lightning_reg.callbacks.apply_sigma_reparam` on it."
                )

    def _check_optimizers(self, trainer: pl.Trainer) -> None:
        current = [_group_sizes(optimizer.state_dict()) for optimizer in trainer.optimizers]
        if self._loaded_groups and self._loaded_groups != current:
            raise ValueError(
                f"The checkpoint was trained without {self.state_key}, so the state of its optimizer has no gains. "
                "Load its weights with `load_from_checkpoint` and fit without `ckpt_path`."
            )

    def _release(self) -> None:
        model, self._model, self._updates = self._model, None, []
        if model is None:
            return
        for hook, (before, patch) in self._patched.items():
            if model.__dict__.get(hook) is patch:
                delattr(model, hook)
                if before is not None:
                    setattr(model, hook, before)
        self._patched = {}
        layers = _layers(model, self.name)
        if not any(_is_sharded(layer.original) for layer in layers):
            _merge([layer for layer in layers if not layer.spectral.adopted])
        for layer in _layers(model, self.name):
            layer.spectral.manager, layer.spectral.adopted = "", False

    # --- checkpoints ---

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step at which u and v were last updated."""
        return {"updated_step": self._updated_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of ``state_dict``."""
        self._updated_step = state_dict["updated_step"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the raw tensors beside the plain weights, also those of averaged models."""
        if self._sharded or not self._own_layers():
            return
        raw = {key: _raw_state(model, self.name) for key, model in _copies(trainer, pl_module).items()}
        checkpoint.setdefault("lightning_reg", {})[self.state_key] = {"decay_gain": self.decay_gain, "models": raw}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the raw tensors; they are put back in ``on_fit_start``, after all callbacks have loaded theirs."""
        if self._model is None or self._sharded:
            return
        stash = checkpoint.get("lightning_reg", {}).get(self.state_key)
        if stash is None:
            rank_zero_info(
                f"The checkpoint holds no state of {self.state_key}: the training continues from the function of its "
                "weights, with fresh gains."
            )
            self._loaded_groups = [_group_sizes(state) for state in checkpoint.get("optimizer_states", [])]
            return
        self._check_stash(stash, pl_module)
        self._pending = stash

    def _check_stash(self, stash: Mapping[str, Any], pl_module: pl.LightningModule) -> None:
        remedy = "as in the training that wrote the checkpoint, or load only the weights to start a new one."
        if stash["decay_gain"] != self.decay_gain:
            raise ValueError(f"`decay_gain` is {self.decay_gain}, but the checkpoint has the opposite: set it {remedy}")
        saved, current = stash["models"][""], _raw_state(pl_module, self.name)
        for key in [*saved, *current]:
            if key not in current or key not in saved:
                where = "in the checkpoint, not in the model" if key in saved else "in the model, not in the checkpoint"
                raise ValueError(f"{key!r} is reparametrized {where}: set `targets` of SigmaReparam {remedy}")
            for name, tensor in current[key].items():
                if (shape := saved[key][name].shape) != tensor.shape:
                    argument = "`fused_qkv` of SigmaReparam" if name == "gain" else "the size of the layer"
                    raise ValueError(
                        f"`{name}` of {key!r} has shape {tuple(tensor.shape)}, but {tuple(shape)} in the checkpoint: "
                        f"set {argument} {remedy}"
                    )

    @torch.no_grad()
    def _restore_pending(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stash, self._pending = self._pending, None
        if stash is None:
            return
        for key, model in _copies(trainer, pl_module).items():
            saved = stash["models"].get(key, {})
            for layer in _unique(_layers(model, self.name)):
                for name, tensor in layer.state().items():
                    if layer.key in saved:
                        tensor.copy_(saved[layer.key][name])


def _callbacks(trainer: Any) -> list[Callback]:
    return trainer.callbacks


def _copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
    """The model, under an empty key, and the averaged models of other callbacks."""
    averaged = {callback.state_key: getattr(callback, "_average_model", None) for callback in _callbacks(trainer)}
    return {"": pl_module, **{key: model for key, model in averaged.items() if isinstance(model, nn.Module)}}


def _group_sizes(optimizer_state: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


def _raw_state(model: nn.Module, manager: str) -> dict[str, dict[str, Tensor]]:
    return {layer.key: layer.state() for layer in _unique(_layers(model, manager))}


def _plain(targets: Any) -> Any:
    if targets is None or isinstance(targets, str):
        return targets
    if isinstance(targets, type) or callable(targets):
        return getattr(targets, "__qualname__", repr(targets))
    return [_plain(entry) for entry in targets]
