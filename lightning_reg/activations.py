"""Sparse activations as modules, and their substitution for those of a model. Formulas: ``sparse_activations``.

A substitution replaces the attribute that holds an MLP's activation, module or function, and remembers what was there
on the replacement itself, so it can be undone and a copy of the model can undo it too. Nothing of it enters the
``state_dict``. The weights that were trained with it need it again: ``activation_record`` describes it in plain values
for a checkpoint, ``load_activations`` puts it in place, and ``fold_activations`` leaves plain torch modules.
"""

import warnings
from collections.abc import Collection, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg import capture
from lightning_reg.capture import Targets
from lightning_reg.functional.sparse_activations import (
    check_fat_threshold,
    check_share,
    check_shift,
    check_sparsity,
    fatrelu,
    relu2,
    shifted_relu,
    statistical_topk,
    topk,
)

_NESTED = "_lightning_reg_nested"  # on an encoder that would use nested tensors
_CONFIG_KEYS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn")  # of Hugging Face
_SMOOTH_PROBE = torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)


# --- modules ---------------------------------------------------------------------------------------------------------


class ReLU2(nn.Module):
    """``max(0, x)^2`` (Primer).

    Example:
        >>> ReLU2()(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the shape of ``x``."""
        return relu2(x)


class FATReLU(nn.Module):
    """``x`` above a threshold, else 0.

    Args:
        threshold: >= 0; a number, or one for each channel (width,).
        sharpness: Steepness of a smooth step at the threshold, > 0; hard when left out.

    Example:
        >>> FATReLU(0.5)(torch.tensor([-1.0, 0.2, 0.7]))
        tensor([0.0000, 0.0000, 0.7000])
    """

    def __init__(self, threshold: float | Tensor = 0.01, *, sharpness: float | None = None) -> None:
        super().__init__()
        if isinstance(threshold, Tensor):
            if threshold.dim() > 1 or not bool((threshold >= 0).all()):
                raise ValueError("`threshold` must be a number or (width,), all >= 0; see the smallest of yours.")
            threshold = threshold.detach().clone() if threshold.dim() else float(threshold)
        check_fat_threshold(threshold)
        fatrelu(torch.zeros(()), 0.0, sharpness=sharpness)
        self.sharpness = sharpness
        self.number = None if isinstance(threshold, Tensor) else float(threshold)
        # not persistent: a model's checkpoint keeps its plain keys
        self.register_buffer("channels", threshold if isinstance(threshold, Tensor) else None, persistent=False)

    @property
    def threshold(self) -> float | Tensor:
        """The threshold, a number or (width,)."""
        return self.channels if self.number is None else self.number  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the shape of ``x``."""
        return fatrelu(x, self.threshold, sharpness=self.sharpness)

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        shown = f"{self.number:g}" if self.number is not None else f"({len(self.channels)},)"  # type: ignore[arg-type]
        return shown if self.sharpness is None else f"{shown}, sharpness={self.sharpness:g}"


class ShiftedReLU(nn.Module):
    """``max(0, x - shift)`` (ReLU Strikes Back, Mirzadeh et al. 2023).

    Args:
        shift: What pre-activations must exceed.

    Example:
        >>> ShiftedReLU(0.5)(torch.tensor([-1.0, 0.2, 0.75]))
        tensor([0.0000, 0.0000, 0.2500])
    """

    def __init__(self, shift: float = 1.0) -> None:
        super().__init__()
        self.shift = check_shift(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the shape of ``x``."""
        return shifted_relu(x, self.shift)

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"{self.shift:g}"


class TopK(nn.Module):
    """ReLU, then the largest activations of each token.

    Args:
        share: Of the width to keep, in (0, 1].
        straight_through: Pass the gradient to everything the ReLU let through instead of what was kept.

    Example:
        >>> TopK(0.5)(torch.tensor([1.0, -4.0, 2.0, 0.5]))
        tensor([1., 0., 2., 0.])
    """

    def __init__(self, share: float = 0.1, *, straight_through: bool = True) -> None:
        super().__init__()
        self.share, self.straight_through = check_share(share), straight_through

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the shape of ``x``."""
        return topk(F.relu(x), self.share, straight_through=self.straight_through)

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"{self.share:g}, straight_through={self.straight_through}"


class StatisticalTopK(nn.Module):
    """What exceeds each token's mean by enough deviations, the rest 0 (Gemma 3n, Spark Transformer).

    Args:
        sparsity: Share of each token's elements to become 0 if they are normally distributed, in (0, 1).

    Example:
        >>> StatisticalTopK(0.5)(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0., 0., 1.])
    """

    def __init__(self, sparsity: float = 0.95) -> None:
        super().__init__()
        self.sparsity = check_sparsity(sparsity)

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the shape of ``x``."""
        return statistical_topk(x, self.sparsity)

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"{self.sparsity:g}"


_KINDS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": ReLU2,
    "shifted_relu": ShiftedReLU,
    "drelu": nn.ReLU,  # with the projections before it rectified too
    "fatrelu": FATReLU,
    "topk": TopK,
    "statistical_topk": StatisticalTopK,
}
_ARGUMENTS = {
    FATReLU: lambda module: {"threshold": module.threshold, "sharpness": module.sharpness},
    ShiftedReLU: lambda module: {"shift": module.shift},
    TopK: lambda module: {"share": module.share, "straight_through": module.straight_through},
    StatisticalTopK: lambda module: {"sparsity": module.sparsity},
}

Activation = str | nn.Module


def make_activation(activation: Activation) -> nn.Module:
    """A new activation from its name, or a copy of a module.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither.
    """
    if isinstance(activation, nn.Module):
        return deepcopy(activation)
    if not isinstance(activation, str):
        raise TypeError(f"`activation` must be a name or a module, got {type(activation).__name__}.")
    if activation not in _KINDS:
        raise ValueError(f"`activation` must be one of {', '.join(map(repr, _KINDS))} or a module, got {activation!r}.")
    return _KINDS[activation]()


# --- substitution ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """An attribute that holds an activation."""

    owner: nn.Module
    attribute: str
    path: str

    @property
    def value(self) -> Any:
        modules = self.owner._modules
        return modules[self.attribute] if self.attribute in modules else getattr(self.owner, self.attribute)

    def put(self, value: Any) -> None:
        """Replace what is there; a function leaves the modules again."""
        # `_modules` directly where it is one: a Sequential has no attributes "0", "1"
        if isinstance(value, nn.Module) and self.attribute in self.owner._modules:
            self.owner._modules[self.attribute] = value
        elif isinstance(value, nn.Module):
            self.owner.__dict__.pop(self.attribute, None)
            self.owner.add_module(self.attribute, value)
        else:
            self.owner._modules.pop(self.attribute, None)
            setattr(self.owner, self.attribute, value)
        if isinstance(self.owner, nn.TransformerEncoderLayer):
            # torch's evaluation path asks this number instead of calling the activation
            self.owner.activation_relu_or_gelu = _torch_fast_path(value)


def substitute_activations(model: nn.Module, activation: Activation = "relu", *, targets: Targets = None) -> list[str]:
    """Replace the activation of each MLP, in place. What is already that activation stays.

    Args:
        model: Model whose MLPs exist.
        activation: ``"relu"``, ``"relu2"``, ``"shifted_relu"``, ``"drelu"`` (gated MLPs: both branches rectified),
            ``"fatrelu"``, ``"topk"``, ``"statistical_topk"``, or a module, of which each MLP gets a copy.
        targets: Down-projections of the MLPs, as for the regularizers; all MLPs when left out.

    Returns:
        Paths of the activations that were replaced.

    Raises:
        ValueError: If no MLP is found, or one of them has an activation that cannot be replaced; nothing has changed
            then.
    """
    new = make_activation(activation)
    places, rectified = _plan(model, activation, targets)
    replaced = [place for place in places if not _same(place.value, new)]
    for place in replaced:
        _replace(place, deepcopy(new), model)
    for projection in rectified:
        _rectify(projection)
    _settle_encoders(model)
    return [place.path for place in replaced]


def find_activations(model: nn.Module, *, targets: Targets = None) -> list[str]:
    """Paths of the activations that ``substitute_activations`` would look at."""
    return [path for mlp in capture.select_mlps(targets, model) for path in mlp.activations]


def restore_activations(model: nn.Module, paths: Collection[str] | None = None) -> list[str]:
    """Undo substitutions in a model, or in a copy of it. No-op without one.

    Args:
        model: The model.
        paths: Those to undo; all when left out.

    Returns:
        Paths of the activations that were put back.
    """
    substituted = [place for place in _substituted(model) if paths is None or place.path in paths]
    for place in substituted:
        place.put(place.value.__dict__[capture.ORIGINAL])
    if paths is None or not _substituted(model):
        for projection in _rectified(model).values():
            _unrectify(projection)
    _settle_encoders(model)
    return [place.path for place in substituted]


def fold_activations(model: nn.Module) -> nn.Module:
    """Leave plain torch activations in place of the substituted ones, and forget what was there before.

    A FATReLU with one threshold becomes ``nn.Threshold``, which gives the same bits; ReLU is plain already. Warns where
    the ``config`` of a Hugging Face model names another activation, which ``save_pretrained`` would write.

    Returns:
        The model itself.

    Raises:
        ValueError: If an activation has no plain counterpart, naming it; nothing has changed then.
    """
    places = _substituted(model)
    impossible = [f"{place.path} ({type(place.value).__name__})" for place in places if not _foldable(place.value)]
    impossible += [f"{name} (drelu)" for name in _rectified(model)]
    if impossible:
        raise ValueError(
            f"no torch module computes {', '.join(impossible)}: only ReLU and FATReLU with one hard threshold fold. "
            "Keep the library, and `load_activations` where the model is used."
        )
    for place in places:
        place.put(_plain(place.value))
    if places:
        _warn_of_configs(model)
    return model


def activation_record(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was substituted, by path, in plain values and tensors that ``torch.load(weights_only=True)`` accepts."""
    record = {place.path: _describe(place.value) for place in _substituted(model)}
    return record | {name: {"kind": "rectified"} for name in _rectified(model)}


def load_activations(model: nn.Module, record: Mapping[str, Any]) -> list[str]:
    """Put the activations in place that a model was trained with; those that are there already stay.

    Args:
        model: Model as it was before the training.
        record: ``activation_record`` of the trained model, or a Lightning checkpoint that holds one.

    Returns:
        Paths of the activations that were replaced.

    Raises:
        ValueError: If the record does not fit the model, or holds none; nothing has changed then.
    """
    entries = _entries(record)
    modules = capture.named_modules(model)
    plan = [(_place(modules, path), path, entry) for path, entry in entries.items() if entry["kind"] != "rectified"]
    rectified = [path for path, entry in entries.items() if entry["kind"] == "rectified"]
    missing = [path for place, path, _ in plan if place is None or not capture.is_activation(path, place.value)]
    missing += [path for path in rectified if path not in modules]
    if missing:
        raise ValueError(
            f"the checkpoint substituted {', '.join(missing)}, which this model does not have: load it into the model "
            "it was trained with."
        )
    # mypy: none is missing
    wanted = [(place, path, entry) for place, path, entry in plan if place and not _is_described(place.value, entry)]
    made = [(place, _make(path, entry)) for place, path, entry in wanted]
    for place, new in made:
        _replace(place, new, model)
    for path in rectified:
        _rectify(modules[path])
    _settle_encoders(model)
    return [place.path for place, _ in made]


def gives_zeros(activation: Any) -> bool | None:
    """Whether an activation maps a part of its inputs to exactly 0; None if it cannot be told."""
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None
    try:
        with torch.no_grad():
            out = activation(_SMOOTH_PROBE.clone())
    except Exception:  # a function of something else
        return None
    if not isinstance(out, Tensor) or out.shape != _SMOOTH_PROBE.shape:
        return None
    return bool((out == 0).double().mean() > 0.1)


def is_relu(activation: Any) -> bool:
    """Whether an activation is ReLU, also one whose threshold was shifted before."""
    shifted = type(activation) is FATReLU and activation.number is not None and activation.sharpness is None
    return shifted or (_same(activation, nn.ReLU()) and not isinstance(activation, FATReLU))


def put_activation(model: nn.Module, path: str, activation: nn.Module) -> None:
    """Replace the activation at one path, as a substitution that can be undone."""
    place = _place(capture.named_modules(model), path)
    if place is None:
        raise ValueError(f"`path` {path!r} is no attribute of the model.")
    _replace(place, activation, model)


def describe(activation: Any) -> str:
    """Name of an activation, module or function."""
    return type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "?")


# --- how -------------------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, activation: Activation, targets: Targets) -> tuple[list[_Place], list[nn.Module]]:
    """Places to fill and projections to rectify; nothing is changed."""
    modules = capture.named_modules(model)
    mlps = capture.select_mlps(targets, model)
    chosen = {mlp.down for mlp in mlps}
    shared = {path: mlp.down for mlp in capture.find_mlps(model) if mlp.down not in chosen for path in mlp.activations}
    places: dict[str, _Place] = {}
    rectified: list[nn.Module] = []
    for mlp in mlps:
        _check_replaceable(mlp, modules, activation)
        for path in mlp.activations:
            if path in shared:
                raise ValueError(
                    f"the activation {path!r} serves the MLPs of {mlp.down!r} and {shared[path]!r}: select both with "
                    "`targets=`, or give each its own."
                )
            place = _place(modules, path)
            if place is not None:
                places[path] = place
        if activation == "drelu":
            rectified += _branches(mlp, modules)
    return list(places.values()), rectified


def _check_replaceable(mlp: capture.Mlp, modules: dict[str, nn.Module], activation: Activation) -> None:
    if not mlp.ups:
        raise ValueError(
            f"{mlp.down!r} was not recognised as the down-projection of an MLP: no matching narrow-to-wide map comes "
            "before it in its block, so its activation is unknown. Leave it out of `targets`."
        )
    if not mlp.activations:
        raise ValueError(
            f"the MLP of {mlp.down!r} calls its activation inline, where it cannot be replaced. Keep it in an "
            "attribute (`self.act = nn.GELU()`, used in `forward`), or leave this MLP out with `targets=`."
        )
    for path in mlp.activations:
        place = _place(modules, path)
        if place is not None and isinstance(place.value, nn.Module) and place.value.state_dict():
            raise ValueError(
                f"the activation {path!r} ({type(place.value).__name__}) has parameters, which a substitution "
                "would drop from the checkpoint. Leave this MLP out with `targets=`."
            )
    new = make_activation(activation)
    by_token = isinstance(new, (TopK, StatisticalTopK)) or (isinstance(new, FATReLU) and new.number is None)
    if by_token and isinstance(modules[mlp.down], nn.Conv2d):
        raise ValueError(
            f"{type(new).__name__} looks at the last axis, but the channels of {mlp.down!r}, a convolution, are in "
            "front. Use 'relu', 'relu2' or 'fatrelu', or leave it out with `targets=`."
        )


def _branches(mlp: capture.Mlp, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Projections whose outputs dReLU rectifies."""
    sizes = {name: capture.projection_sizes(modules[name]) or (0, 0) for name in (*mlp.ups, mlp.down)}
    if sum(sizes[up][1] for up in mlp.ups) != 2 * sizes[mlp.down][0]:
        raise ValueError(f"`activation='drelu'` needs a gated MLP; that of {mlp.down!r} is not. Use 'relu'.")
    return [modules[up] for up in mlp.ups]


def _place(modules: dict[str, nn.Module], path: str) -> _Place | None:
    owner, _, attribute = path.rpartition(".")
    module = modules.get(owner)
    return None if module is None or not _has(module, attribute) else _Place(module, attribute, path)


def _has(module: nn.Module, attribute: str) -> bool:
    return attribute in module._modules or hasattr(module, attribute)


def _replace(place: _Place, new: nn.Module, model: nn.Module) -> None:
    old = place.value
    if isinstance(old, nn.Module):
        new.train(old.training)
        old = old.__dict__.get(capture.ORIGINAL, old)  # a second substitution remembers the first original
    else:
        new.train(place.owner.training)
    new.__dict__[capture.ORIGINAL] = old
    like = next(place.owner.parameters(), next(model.parameters(), None))
    place.put(new if like is None else new.to(like.device))


def _same(value: Any, new: nn.Module) -> bool:
    if type(new) is nn.ReLU:  # one whose threshold was shifted, or folded, stays so
        folded = type(value) is nn.Threshold and value.value == 0
        return type(value) is nn.ReLU or folded or value in (F.relu, torch.relu) or _is_substitute(value, FATReLU)
    return _is_substitute(value, type(new)) and repr(value) == repr(new)


def _is_substitute(value: Any, kind: type) -> bool:
    return type(value) is kind and capture.ORIGINAL in value.__dict__


def _substituted(model: nn.Module) -> list[_Place]:
    return [
        _Place(owner, attribute, f"{name}.{attribute}".lstrip("."))
        for name, owner in capture.named_modules(model).items()
        for attribute, child in owner._modules.items()
        if child is not None and capture.ORIGINAL in child.__dict__
    ]


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = next((kind for kind, cls in _KINDS.items() if type(module) is cls), type(module).__qualname__)
    arguments = _ARGUMENTS.get(type(module), lambda _: {})(module)
    return {"kind": kind, **{key: _detached(value) for key, value in arguments.items()}}


def _is_described(value: Any, entry: Mapping[str, Any]) -> bool:
    """Whether a substitute is what an entry of a record describes."""
    if not isinstance(value, nn.Module) or capture.ORIGINAL not in value.__dict__:
        return entry["kind"] == "relu" and _same(value, nn.ReLU())
    own = _describe(value)
    return own.keys() == entry.keys() and all(_equal(own[key], entry[key]) for key in own)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def _detached(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _make(path: str, entry: Mapping[str, Any]) -> nn.Module:
    arguments = {key: value for key, value in entry.items() if key != "kind"}
    if entry["kind"] not in _KINDS:
        raise ValueError(
            f"the checkpoint substituted {path!r} by a {entry['kind']} of your own, which a checkpoint does not hold: "
            "call `substitute_activations` with it."
        )
    return _KINDS[entry["kind"]](**arguments)


def _entries(record: Mapping[str, Any]) -> dict[str, Any]:
    if "callbacks" not in record:
        return dict(record)
    states = [state.get("activations") for state in record["callbacks"].values() if isinstance(state, Mapping)]
    entries = [item for state in states if isinstance(state, Mapping) for item in state.items()]
    found = {path: entry for path, entry in entries if isinstance(entry, Mapping) and "kind" in entry}
    if not found:
        raise ValueError("the checkpoint holds no substituted activations: it was trained with the model's own.")
    return found


def _foldable(module: nn.Module) -> bool:
    hard = type(module) is FATReLU and module.number is not None and module.sharpness is None
    return hard or type(module).__module__.startswith("torch.nn.")


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, FATReLU):
        return nn.Threshold(module.number, 0.0).train(module.training)  # type: ignore[arg-type]
    plain = copy(module)
    plain.__dict__.pop(capture.ORIGINAL)
    return plain


def _warn_of_configs(model: nn.Module) -> None:
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        named = {key: value for key in _CONFIG_KEYS if isinstance(value := getattr(config, key, None), str)}
        if others := {key: value for key, value in named.items() if "relu" not in value}:
            shown = ", ".join(f"{key}={value!r}" for key, value in others.items())
            warnings.warn(
                f"the {type(config).__name__} of the model says {shown}, and `save_pretrained` will write that. Set it "
                "to 'relu' first if every activation is ReLU now; there is no name for a threshold: save the weights.",
                stacklevel=3,
            )


def _settle_encoders(model: nn.Module) -> None:
    """Padded batches become nested tensors in torch's encoder, which only its own two activations take."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            first = module.layers[0]
            fast = not isinstance(first, nn.TransformerEncoderLayer) or bool(first.activation_relu_or_gelu)
            if not fast and module.use_nested_tensor:
                module.use_nested_tensor = False
                module.__dict__[_NESTED] = True
            elif fast and module.__dict__.pop(_NESTED, False):
                module.use_nested_tensor = True


def _torch_fast_path(value: Any) -> int:
    if value is F.relu or isinstance(value, nn.ReLU):
        return 1
    return 2 if value is F.gelu or isinstance(value, nn.GELU) else 0


def _rectified_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return F.relu(output)


def _rectify(module: nn.Module) -> None:
    if _rectified_output not in module._forward_hooks.values():
        module.register_forward_hook(_rectified_output)


def _unrectify(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if hook is _rectified_output]:
        del module._forward_hooks[key]


def _rectified(model: nn.Module) -> dict[str, nn.Module]:
    modules = capture.named_modules(model)
    return {name: module for name, module in modules.items() if _rectified_output in module._forward_hooks.values()}
