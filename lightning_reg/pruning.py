"""Holds weights at zero. Formula: ``lightning_reg.functional.weight_sparsity``.

Nothing is put on the model: masks are kept here, beside it, and pruned weights are true zeros in its own parameters,
so ``state_dict()`` and checkpoints are those of the plain model at any time. Zeros are held by masking the gradient
before the optimizer step, which keeps momentum and clipping to the weights that live, and the weight after it, which
holds for any optimizer. Both happen outside forward, so compiled graphs do not know of them.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg import capture, reparam
from lightning_reg.capture import Targets
from lightning_reg.functional.weight_sparsity import (
    count_zeros,
    erk_densities,
    keep_largest,
    magnitude_keys,
    n_m_mask,
    random_keys,
    ranking_dtype,
    rigl_mask,
    spread_zeros,
    zeros_of,
)

Method = Literal["magnitude", "random", "rigl"]
Scope = Literal["global", "layer", "erk"]
Pattern = tuple[int, int]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


# --- what is pruned --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A weight that is pruned; a tied weight is one, under its first name."""

    label: str
    key: str
    owner: nn.Module
    tensor: str

    @property
    def parameter(self) -> Tensor:
        """The trained tensor: with sigma-Reparam the raw weight, whose zeros are zeros of the weight in use."""
        return _raw(self.owner, self.tensor)  # type: ignore[return-value]

    @property
    def input_axis(self) -> int:
        """Axis along which N:M takes its groups."""
        transposed = isinstance(self.owner, nn.modules.conv._ConvTransposeNd) or reparam._is_transposed(self.owner)
        return 0 if transposed else 1


def find_weights(model: nn.Module, targets: Targets = None, exclude: Targets = None) -> list[Weight]:
    """The weights to prune, by order of appearance.

    Args:
        model: Model whose weights exist.
        targets: Modules that own them; every Linear, convolution, Conv1D and MultiheadAttention when left out, except
            weights that are tied to an embedding.
        exclude: Modules whose weights stay dense.

    Raises:
        ValueError: If nothing is left, an entry matches nothing, or a target cannot be pruned.
        RuntimeError: If a weight is sharded.
    """
    modules = capture.named_modules(model)
    candidates = {name: module for name, module in modules.items() if _weight_names(module)}
    selected = set(candidates) if targets is None else capture.match_targets(targets, candidates)
    left_out = set() if exclude is None else capture.match_targets(exclude, candidates, "exclude")
    dense = {id(_raw(modules[name], tensor)) for name in left_out for tensor in _weight_names(modules[name])}
    if targets is None:
        dense |= {id(_raw(module, "weight")) for module in modules.values() if isinstance(module, _EMBEDDINGS)}
    found: dict[int, Weight] = {}
    for name in [name for name in candidates if name in selected]:
        for tensor in _weight_names(modules[name]):
            weight = Weight(reparam._label(name, tensor), f"{name}.{tensor}".lstrip("."), modules[name], tensor)
            parameter = _raw(weight.owner, tensor)
            if id(parameter) not in dense and _is_prunable(weight, parameter, explicit=targets is not None):
                found.setdefault(id(parameter), weight)
    if not found:
        raise ValueError(
            "`targets` and `exclude` leave nothing to prune: no weight of a Linear, convolution, Conv1D or "
            f"MultiheadAttention among {len(modules)} modules. Check both, or remove WeightSparsity."
        )
    return list(found.values())


def _weight_names(module: nn.Module) -> list[str]:
    return ["weight"] if isinstance(module, nn.modules.conv._ConvTransposeNd) else reparam._weight_names(module)


def _raw(module: nn.Module, tensor: str) -> Tensor | None:
    if tensor in reparam.live_weights(module):
        return reparam.Layer("", "", module, tensor).original
    return module._parameters.get(tensor)


def _is_prunable(weight: Weight, parameter: Tensor | None, explicit: bool) -> bool:
    if parameter is not None and reparam.is_sharded(parameter):
        raise RuntimeError(
            f"The weight of {weight.label!r} is sharded; WeightSparsity ranks whole weights. Train with one device or "
            "`DDPStrategy`, or prune before sharding."
        )
    if weight.tensor in reparam.live_weights(weight.owner):
        return True
    reason = reparam._unsupported(weight.owner, weight.tensor, parameter)
    if reason and explicit:
        raise ValueError(f"`targets` selects {weight.label!r}, whose weight {reason}. Leave it out of `targets`.")
    return not reason


def parse_pattern(pattern: Any) -> Pattern | None:
    """``(n, m)`` of a pattern such as ``"2:4"``.

    Raises:
        ValueError: If it is no pattern.
    """
    if pattern is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    n, m = (int(number) for number in match.groups()) if match else (0, 0)
    if not 0 < n < m:
        raise ValueError(
            f"`pattern` must be 'n:m' with 0 < n < m, got {pattern!r}: '2:4' keeps two of four. YAML needs the quotes."
        )
    return n, m


def check_choices(method: str, scope: str, pattern: Pattern | None) -> None:
    """Raise a ValueError for an unknown ``method`` or ``scope``, or a pattern that does not go with them."""
    for argument, value, choices in (("method", method, get_args(Method)), ("scope", scope, get_args(Scope))):
        if value not in choices:
            raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if pattern is not None and (method == "rigl" or scope == "erk"):
        argument = "method='rigl'" if method == "rigl" else "scope='erk'"
        raise ValueError(
            f"`pattern='{pattern[0]}:{pattern[1]}'` fixes the density of every group, got {argument}, which moves it. "
            "Leave out one of the two."
        )


# --- the masks -------------------------------------------------------------------------------------------------------


class Pruner:
    """Masks of weights, and what they are held on. A new one is dense.

    Args:
        weights: From ``find_weights``.
        method: How the weights to prune are chosen.
        scope: How the sparsity is spread.
        pattern: ``(n, m)`` of N:M.
        seed: Of random masks.

    Raises:
        ValueError: If the pattern does not fit a weight.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        *,
        method: Method = "magnitude",
        scope: Scope = "global",
        pattern: Pattern | None = None,
        seed: int = 0,
    ) -> None:
        self.weights, self.method, self.pattern, self.seed = list(weights), method, pattern, seed
        # N:M is the same everywhere; a random choice among all weights is spread by ERK
        uneven: Scope = "erk" if pattern is None else "layer"
        self.scope: Scope = uneven if scope == "global" and method != "magnitude" else scope
        self.pruned: dict[str, Tensor] = {}  # True = held at zero; weights without zeros have no entry
        self._check_pattern()

    @torch.no_grad()
    def prune(self, sparsity: float, at_random: bool = False) -> None:
        """Choose the masks of an absolute sparsity; what is pruned stays so, unless the sparsity falls."""
        at_random = at_random or self.method == "random"
        keys = self._keys(at_random)
        sizes = [key.numel() for key in keys]
        if self.scope == "global":
            masks = keep_largest(keys, zeros_of(sparsity, sum(sizes)))
        elif self.scope == "layer":
            masks = [keep_largest([key], zeros_of(sparsity, key.numel()))[0] for key in keys]
        else:
            zeros = spread_zeros(sizes, erk_densities([key.shape for key in keys], sparsity), sparsity)
            masks = [keep_largest([key], count)[0] for key, count in zip(keys, zeros, strict=True)]
        for weight, mask in zip(self.weights, masks, strict=True):
            self._set(weight, mask)

    @torch.no_grad()
    def exchange(self, weights: Iterable[Weight], share: float) -> bool:
        """One RigL update from the gradients at hand; False, with nothing changed, if one of them is not finite."""
        held = [weight for weight in weights if weight.key in self.pruned and weight.parameter.grad is not None]
        gradients = [weight.parameter.grad for weight in held]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):  # type: ignore[union-attr]
            return False
        for weight, gradient in zip(held, gradients, strict=True):
            self._set(weight, rigl_mask(weight.parameter, gradient, ~self._on(weight), share))  # type: ignore[arg-type]
        return True

    @torch.no_grad()
    def hold(self) -> None:
        """Set pruned weights to zero, after an optimizer step."""
        for weight in self.weights:
            if weight.key in self.pruned:
                weight.parameter.masked_fill_(self._on(weight), 0.0)

    @torch.no_grad()
    def hold_gradients(self, owned: set[int]) -> None:
        """Set the gradients of pruned weights to zero, before a step of the optimizer that has the ``owned`` ids."""
        for weight in self.weights:
            if weight.key in self.pruned and id(parameter := weight.parameter) in owned and parameter.grad is not None:
                parameter.grad.masked_fill_(self._on(weight), 0.0)

    @torch.no_grad()
    def settle(self, optimizers: Iterable[Any], copies: Iterable[nn.Module] = ()) -> None:
        """Let weights, optimizer state and averaged copies of the model follow new masks."""
        self.hold()
        optimizers = list(optimizers)
        for weight in self.weights:
            if weight.key in self.pruned:
                for optimizer in optimizers:
                    _reset_state(optimizer, weight.parameter, self._on(weight))
        for copy in copies:
            twins = {twin.key: twin for twin in _same_weights(copy, self.weights)}
            for weight in self.weights:
                if weight.key in self.pruned and weight.key in twins:
                    parameter = twins[weight.key].parameter
                    parameter.masked_fill_(self._on(weight).to(parameter.device), 0.0)

    @torch.no_grad()
    def counts(self) -> Tensor:
        """Exact zeros of each weight, int64, on the device of the first."""
        device = self.weights[0].parameter.device
        return torch.stack([count_zeros(weight.parameter).to(device) for weight in self.weights])

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each weight."""
        return [weight.parameter.numel() for weight in self.weights]

    def _keys(self, at_random: bool) -> list[Tensor]:
        parameters = [weight.parameter for weight in self.weights]
        if at_random:
            # a seed for each name, so what else is pruned does not matter; torch's generator takes 32 bits of it
            seeds = [zlib.crc32(f"{self.seed} {weight.key}".encode()) for weight in self.weights]
            pairs = zip(parameters, seeds, strict=True)
            keys = [random_keys(part.shape, seed).to(part.device) for part, seed in pairs]
        else:
            kept = [~self._on(weight) if weight.key in self.pruned else None for weight in self.weights]
            dtype = ranking_dtype(parameters)
            keys = [magnitude_keys(part, dtype, mask) for part, mask in zip(parameters, kept, strict=True)]
        if self.pattern is None:
            return keys
        masks = [n_m_mask(key, *self.pattern, dim=w.input_axis) for key, w in zip(keys, self.weights, strict=True)]
        # what the pattern keeps is pruned last, so that a growing sparsity ends at the pattern
        return [key.masked_fill(mask, torch.iinfo(key.dtype).max) for key, mask in zip(keys, masks, strict=True)]

    def _set(self, weight: Weight, mask: Tensor) -> None:
        if bool(mask.all()):
            self.pruned.pop(weight.key, None)
        else:
            self.pruned[weight.key] = ~mask.to(weight.parameter.device)

    def _on(self, weight: Weight) -> Tensor:
        pruned, device = self.pruned[weight.key], weight.parameter.device
        if pruned.device != device:
            pruned = self.pruned[weight.key] = pruned.to(device)
        return pruned

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        n, m = self.pattern
        misfits = [
            f"{weight.label!r} ({weight.parameter.shape[weight.input_axis]} inputs)"
            for weight in self.weights
            if weight.parameter.shape[weight.input_axis] % m
        ]
        if misfits:
            raise ValueError(
                f"`pattern='{n}:{m}'` needs a number of inputs that {m} divides, got {', '.join(misfits)}. Leave them "
                "dense with `exclude`."
            )

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """Shapes of all weights, and masks at a bit a weight."""
        return {
            "shapes": {weight.key: list(weight.parameter.shape) for weight in self.weights},
            "pruned": {key: pack(mask).cpu() for key, mask in self.pruned.items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError if a state does not fit the weights."""
        remedy = "as in the training that wrote the checkpoint, or load only the weights to start a new one."
        shapes, current = state["shapes"], {weight.key: list(weight.parameter.shape) for weight in self.weights}
        for key in [*shapes, *current]:
            if key not in current or key not in shapes:
                where = (
                    "in the checkpoint, not in the model" if key in shapes else "in the model, not in the checkpoint"
                )
                raise ValueError(f"{key!r} is pruned {where}: set `targets` and `exclude` of WeightSparsity {remedy}")
            if shapes[key] != current[key]:
                raise ValueError(
                    f"The mask of {key!r} has shape {tuple(shapes[key])} in the checkpoint, but the weight has "
                    f"{tuple(current[key])}: set the size of the layer {remedy}"
                )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take the masks of a state that ``check_state`` accepts."""
        self.pruned = {key: unpack(packed, state["shapes"][key]) for key, packed in state["pruned"].items()}


def _reset_state(optimizer: Any, parameter: Tensor, pruned: Tensor) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()  # its curvature pairs are of the space from before
        return
    for value in optimizer.state.get(parameter, {}).values():
        # integers of the same shape are codes of a quantised state
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            value.masked_fill_(pruned.to(value.device), 0.0)


def _same_weights(copy: nn.Module, weights: Iterable[Weight]) -> list[Weight]:
    modules = capture.named_modules(copy.module if isinstance(copy, torch.optim.swa_utils.AveragedModel) else copy)
    owners = {weight.key: modules.get(weight.key.rpartition(".")[0]) for weight in weights}
    return [
        Weight(weight.label, weight.key, owner, weight.tensor)
        for weight in weights
        if (owner := owners[weight.key]) is not None and _raw(owner, weight.tensor) is not None
    ]


def pack(mask: Tensor) -> Tensor:
    """A boolean mask as uint8, eight elements each."""
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Counterpart of ``pack``."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(tuple(shape)).bool()
