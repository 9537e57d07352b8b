"""sigma-Reparam: trains ``(gain / sigma(W)) W`` in place of W. Formula: ``lightning_reg.functional.spectral_norm``.

The weight becomes a torch parametrization with a learnable ``gain`` and the leading singular vectors u and v; undo it
with ``merge_sigma_reparam``, not with torch's own function. Nothing is mutated in forward: u and v follow W once per
optimizer step, so gradients are exact under activation checkpointing, accumulation and compilation. Outside training
nothing of this is visible: ``state_dict()`` and checkpoints hold plain ``weight`` keys, and the model is merged back
when the fit ends.
"""

import os
import re
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, takewhile
from pathlib import Path
from pickle import UnpicklingError
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_reg import capture, classes
from lightning_reg.capture import Targets
from lightning_reg.functional.spectral_norm import (
    MOST_JOINT,
    JointReparam,
    Operand,
    PowerIteration,
    leading_singular_triplet,
    rayleigh,
    spectral_reparam,
    weight_matrices,
)

Init = Literal["preserve", "one"]
FusedQKV = Literal["split", "fused"]

# query_key_value (GPT-NeoX, BLOOM, Falcon) is left out: its rows interleave the three per head
_FUSED_QKV = re.compile(r"qkv|c_attn|in_proj", re.IGNORECASE)
_LIVE_KEY = re.compile(r"(?P<prefix>.*?)parametrizations\.(?P<name>[^.]+)\.original")

_STATE = ("gain", "u", "v")
PARAMETRIZED = "parametrized"  # kind of the class of a reparametrized module


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
        self.casts = False  # all that use the weight would cast it under autocast
        self.plain_keys = True  # state_dict() shows the weight in use under its plain name
        self.updates: Updates | None = None  # of a hand-written loop, on the first layer of the model
        self.bundle: Bundle | None = None  # weights that are computed at once with this one
        self.manager = ""  # name of the callback that updates u and v
        self.adopted = False  # attached by the user, not by that callback

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use; under autocast on a CUDA device in its dtype, where it would be cast anyway."""
        dtype = self.dtype_in_use(weight)
        if self.training:
            return spectral_reparam(weight, self.gain, self.u, self.v, self.transposed, dtype)
        return self.folded(weight, dtype)

    def dtype_in_use(self, weight: Tensor) -> torch.dtype:
        """That of the weight in use."""
        cast = self.casts and weight.is_cuda and torch.is_autocast_enabled("cuda")
        return torch.get_autocast_dtype("cuda") if cast and weight.dtype == torch.float32 else weight.dtype

    def folded(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in use outside training. An averaged copy of the model averages u and v: they lose unit norm."""
        u, v = nn.functional.normalize(self.u, dim=-1), nn.functional.normalize(self.v, dim=-1)
        return spectral_reparam(weight, self.gain, u, v, self.transposed, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(lambda tensor: _at_least_float32(tensor, fn(tensor)), recurse)


def _at_least_float32(before: Tensor, after: Tensor) -> Tensor:
    # sigma rounded to half precision would change the function by more than a step of training does
    return before.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after


@dataclass(frozen=True)
class Layer:
    """A weight of a module that is reparametrized; a tied weight has several layers with one ``spectral``."""

    label: str
    key: str
    owner: nn.Module
    tensor: str

    @property
    def container(self) -> Any:
        """The parametrization list of the weight."""
        # past `nn.Module.__getattr__`, which is slow for something asked for in every step
        return self.owner._modules["parametrizations"]._modules[self.tensor]  # type: ignore[union-attr]

    @property
    def original(self) -> Tensor:
        """The trained raw weight."""
        return self.container._parameters["original"]

    @property
    def spectral(self) -> SpectralParametrization:
        """Gain and singular vectors."""
        return self.container._modules["0"]

    def state(self) -> dict[str, Tensor]:
        """Raw weight, gain, u and v by name."""
        tensors = {"original": self.original, **{name: getattr(self.spectral, name) for name in _STATE}}
        return {name: tensor.detach() for name, tensor in tensors.items()}


def find_layers(model: nn.Module, manager: str | None = None) -> list[Layer]:
    """Reparametrized weights of a model, by order of appearance; those of one ``manager`` if given."""
    return [
        layer
        for name, module in capture.named_modules(model).items()
        for tensor in live_weights(module)
        for layer in [Layer(_label(name, tensor), f"{name}.{tensor}".lstrip("."), module, tensor)]
        if manager is None or layer.spectral.manager == manager
    ]


def unique_layers(layers: list[Layer]) -> list[Layer]:
    """The first layer of each weight."""
    return list({id(layer.spectral): layer for layer in reversed(layers)}.values())[::-1]


def live_weights(module: nn.Module) -> list[str]:
    """Names of a module's reparametrized weights."""
    if not parametrize.is_parametrized(module):
        return []
    containers: Any = module.parametrizations
    return [name for name, container in containers.items() if isinstance(container[0], SpectralParametrization)]


def _label(name: str, tensor: str) -> str:
    return (name if tensor in ("weight", "in_proj_weight") else f"{name}.{tensor}") or tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a shard of a distributed one."""
    return hasattr(tensor, "full_tensor")


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; a plain one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


# --- attach ----------------------------------------------------------------------------------------------------------


def apply_sigma_reparam(
    model: nn.Module, *, targets: Targets = None, init: Init = "preserve", fused_qkv: FusedQKV = "split"
) -> list[str]:
    """Reparametrize the weights of a model in place; the callback then trains them.

    Needed only where the callback comes too late: call it before ``fully_shard`` in ``configure_model``. In a
    hand-written loop call ``update_sigma_reparam`` after each optimizer step, and pass ``broadcast_buffers=False`` to
    ``DistributedDataParallel``: u and v are the same in all processes, their broadcast would only take time.

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
    check_choices(init, fused_qkv)
    attached = attach(model, targets, init, fused_qkv)
    if not attached and not find_layers(model):
        raise ValueError(NOTHING_FOUND)
    return [layer.label for layer in attached]


@torch.no_grad()
def update_sigma_reparam(model: nn.Module) -> None:
    """Bring u and v up to date by one power iteration: once after each optimizer step of a hand-written loop."""
    if layers := unique_layers(find_layers(model)):
        Updates.of(layers).step()


NOTHING_FOUND = (
    "SigmaReparam found no Linear, convolution, Conv1D or MultiheadAttention weight to reparametrize. Create the "
    "layers in `__init__`, `setup` or `configure_model`, or remove the callback."
)


def check_choices(init: str, fused_qkv: str) -> None:
    """Raise a ValueError for an unknown ``init`` or ``fused_qkv``."""
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


def attach(
    model: nn.Module, targets: Targets, init: str, fused_qkv: str, lenient: bool = False, manager: str = ""
) -> list[Layer]:
    """Plan everything before anything is changed, so that an error leaves the model as it was."""
    modules = capture.named_modules(model)
    selected = select_owners(targets, modules, lenient)
    owners_of = _owners(modules)
    known = {id(layer.original): layer.spectral for layer in find_layers(model)}
    plan: dict[int, tuple[SpectralParametrization, list[tuple[str, nn.Module, str]]]] = {}
    for name, module in modules.items():
        for tensor in _weight_names(module) if name in selected else []:
            weight = module._parameters.get(tensor)
            if tensor in live_weights(module) or id(weight) in plan:
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
                spectral.casts = all(_casts(owner) for _, owner, _ in owners)
            spectral.manager = spectral.manager or manager
            plan[id(weight)] = (spectral, owners)
    layers = [
        _register(name, owner, tensor, spectral) for spectral, owners in plan.values() for name, owner, tensor in owners
    ]
    _bundle(layers)
    return layers


def select_owners(targets: Targets, modules: dict[str, nn.Module], lenient: bool) -> set[str]:
    """Names of the modules whose weights ``targets`` select."""
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


def _casts(module: nn.Module) -> bool:
    """Whether a module does nothing with its weight but multiply by it, which autocast does in low precision."""
    forward = getattr(classes.bare_class(module), "forward", None)
    stock = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return capture.is_conv1d(module) or any(forward is kind.forward for kind in stock)


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
    if not weight.is_floating_point() or (type(weight.data) is not Tensor and not is_sharded(weight)):
        return f"is quantised ({type(weight.data).__name__} of {weight.dtype})"
    return None


def _check_attachable(label: str, weight: Tensor, model: nn.Module) -> None:
    if is_sharded(weight) or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
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


def _register(name: str, owner: nn.Module, tensor: str, spectral: SpectralParametrization) -> Layer:
    """What ``parametrize.register_parametrization`` of torch does, but with one class for all modules of a kind."""
    ours, parameter = live_weights(owner), owner._parameters[tensor]
    assert parameter is not None
    if ours:
        classes.take_off(owner, PARAMETRIZED)
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
    classes.put_on(owner, _parametrizing((*ours, tensor)))
    return Layer(_label(name, tensor), f"{name}.{tensor}".lstrip("."), owner, tensor)


@cache
def _parametrizing(tensors: tuple[str, ...]) -> Callable[[type], type]:
    views = type("_InUse", (), {tensor: _in_use(tensor) for tensor in tensors})

    @cache
    def make(base: type) -> type:
        own = {"__module__": parametrize.__name__, **classes.marked(PARAMETRIZED, base, make)}
        return type(f"Parametrized{base.__name__}", (base, views), own)

    return make


def _in_use(tensor: str) -> property:
    def in_use(self: Any) -> Tensor:
        # not `self.parametrizations[tensor]()`: it comes to the same through four more calls
        container = self._modules["parametrizations"]._modules[tensor]
        spectral, weight = container._modules["0"], container._parameters["original"]
        if not torch.compiler.is_compiling() and spectral.bundle is not None and spectral.training:
            found = spectral.bundle.take(spectral, weight, sys._getframe(1).f_code)
            if found is not None:
                return found
        return spectral(weight)

    return property(in_use)


# --- weights of a block at once --------------------------------------------------------------------------------------

LARGEST = 1 << 22  # elements of a weight that is computed with others; a larger one keeps a GPU busy by itself
MOST_MOVES = 8  # how often weights may be found elsewhere in memory before they are left alone
MOST_IN_VAIN = 3  # passes in a row in which nobody asks for a weight before it is left alone
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.)")


@dataclass
class _Member:
    """A weight in a bundle, which must not keep its module alive: the module keeps the bundle."""

    owner: "weakref.ref[nn.Module]"
    tensor: str
    weight: Tensor  # as it was attached: another one, as of FSDP2 or `functional_call`, is none of ours
    reader: CodeType | None  # the forward of the module

    @property
    def container(self) -> Any:
        return self.owner()._modules["parametrizations"]._modules[self.tensor]  # type: ignore[union-attr]

    def operand(self) -> Operand:
        container = self.container
        spectral, weight = container._modules["0"], container._parameters["original"]
        parameters, buffers = spectral._parameters, spectral._buffers
        return weight, parameters["gain"], buffers["u"], buffers["v"], spectral.transposed

    def joins(self) -> bool:
        """Whether it can be computed with others: nobody waits for its gradient before that of the others is there."""
        owner = self.owner()
        if owner is None or owner._backward_hooks or owner._backward_pre_hooks:
            return False
        weight, gain, *_ = self.operand()
        watched = _hooked(weight) or _hooked(gain)
        return weight is self.weight and not watched and JointReparam.takes(weight)

    def source(self) -> list[Any]:
        """Differs where the weight in use would be another."""
        *tensors, _ = self.operand()
        facts = [fact for t in tensors for fact in (id(t), t._version, t.data_ptr(), t.requires_grad)]
        if self.weight.is_cuda:  # what is computed on one stream is not there for another
            facts.append(torch._C._cuda_getCurrentRawStream(self.weight.get_device()))
        return facts


class Bundle:
    """Small weights of one block, computed at once.

    On a slow host a launch and a node of autograd cost more than the arithmetic of a layer. A first pass is computed
    weight by weight and shows the order in which the forwards of the modules ask. From then on the first of the order
    has all of them computed, and each other one is handed over when its turn comes. Who asks out of turn is served
    alone, and so are all until the next pass begins; a backward, or an update of u and v, ends a pass. So a result is
    used in the forward it was computed in, or not at all. Alone is computed also what others than the module's own
    forward ask for, what is not trained, or watched by hooks that wait for its gradient, what no kernel can, and
    everything under activation checkpoints, which repeat a part of a forward by itself.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._members = {
            id(layer.spectral): _Member(
                weakref.ref(layer.owner), layer.tensor, layer.original, _forward_of(layer.owner)
            )
            for layer in layers
        }  # fmt: skip
        for layer in layers:
            layer.spectral.bundle = self
        self._seen: list[int] = []  # of the pass that shows the order
        self._order: list[int] = []
        self._amid = False  # somebody new came amid a pass, which shows no order
        self._turn, self._number = 0, 0  # of the pass that runs: how many were handed over; of all passes
        self._waiting: dict[int, tuple[list[Any], Tensor]] = {}  # what it was made of, result
        self._in_vain: Counter[int] = Counter()  # passes in a row without a request
        self._joints: dict[torch.dtype, JointReparam] = {}
        self._moves = 0

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return _no_bundle, ()

    def take(self, spectral: SpectralParametrization, weight: Tensor, reader: CodeType) -> Tensor | None:
        """The weight in use, for the code that reads it; None where it is to be computed alone."""
        key = id(spectral)
        member = self._members.get(key)
        if member is None or member.reader is not reader:
            return None
        if not JointReparam.takes(weight) or (key not in self._order and not self._learn(key, member)):
            return None
        dtype = spectral.dtype_in_use(weight)
        if key == self._order[0]:
            self._begin(dtype)
        elif not self._turn or self._turn == len(self._order) or key != self._order[self._turn]:
            self.end()
        source, result = self._waiting.pop(key, (None, None))
        if result is None or result.dtype != dtype or source != member.source():
            self.end()
            return None
        self._turn += 1
        self._in_vain.pop(key, None)
        return result

    def end(self) -> None:
        """The pass is over, or u and v are other ones."""
        self._waiting.clear()
        self._amid = False
        unasked = self._order[self._turn :] if self._turn else []
        self._turn = 0
        self._in_vain.update(unasked)
        for key in unasked:
            if self._in_vain[key] >= MOST_IN_VAIN:
                self.leave(key)

    def leave(self, key: int) -> None:
        """Have a weight, by the number of its parametrization, computed alone from now on."""
        self._waiting.clear()
        self._joints.clear()
        self._turn = 0
        for keys in (self._seen, self._order):
            if key in keys:
                keys.remove(key)
        self._in_vain.pop(key, None)
        member = self._members.pop(key, None)
        if member is not None and member.owner() is not None:
            member.container._modules["0"].bundle = None

    def _dissolve(self) -> None:
        for key in list(self._members):
            self.leave(key)

    def _learn(self, key: int, member: _Member) -> bool:
        """Note who asks; True when that is the first of a known order."""
        if not member.joins():
            return False
        if self._order:
            self.end()
            self._order, self._amid = [], True
        if key not in self._seen:
            self._seen += [] if self._amid else [key]
            return False
        if key != self._seen[0]:
            self.leave(key)  # asked for twice in a pass
        if key != self._seen[0] or len(self._seen) == 1:
            return False
        self._order, self._seen = self._seen, []
        return True

    def _begin(self, dtype: torch.dtype) -> None:
        self.end()
        members = [self._members[key] for key in self._order]
        if len(members) < 2 or not all(member.joins() for member in members):
            return
        joint = self._joint([member.operand() for member in members], dtype)
        if joint is None:
            return
        self._number += 1
        results = joint(partial(_end, weakref.ref(self), self._number))
        if not results:
            return self._dissolve()
        self._waiting = {
            key: (member.source(), result)
            for key, member, result in zip(self._order, members, results, strict=True)
        }  # fmt: skip

    def _joint(self, operands: list[Operand], dtype: torch.dtype) -> JointReparam | None:
        joint = self._joints.get(dtype)
        if joint is not None and joint.is_of(operands):
            return joint
        if operands[0][0].is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a captured graph cannot copy the table of addresses
        self._moves += joint is not None
        if self._moves > MOST_MOVES:
            self._dissolve()
            return None
        self._joints[dtype] = JointReparam(operands, dtype)
        return self._joints[dtype]


def _no_bundle() -> None:
    return None


def _end(bundle: "weakref.ref[Bundle]", number: int) -> None:
    # a backward of the pass that bundle is in, not of an earlier one
    if (found := bundle()) is not None and found._number == number:
        found.end()


def _hooked(tensor: Any) -> bool:
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _forward_of(module: nn.Module) -> CodeType | None:
    cls: Any = classes.bare_class(module)
    return getattr(cls.forward, "__code__", None)


def _bundle(layers: list[Layer]) -> None:
    """Join the small weights of each block: what has the same number in its name.

    Tied weights and those of ``nn.MultiheadAttention``, which are asked for several times in a forward, stay alone.
    """
    uses = Counter(layer.spectral for layer in layers)
    blocks: dict[Any, list[Layer]] = {}
    for layer in layers:
        block, weight = _BLOCK.match(layer.key), layer.original
        alone = uses[layer.spectral] > 1 or isinstance(layer.owner, nn.MultiheadAttention) or weight.numel() > LARGEST
        if block and not alone and not is_sharded(weight):
            blocks.setdefault((block.group(), weight.dtype, layer.spectral.casts), []).append(layer)
    for members in blocks.values():
        for start in range(0, len(members), MOST_JOINT):
            if len(chosen := members[start : start + MOST_JOINT]) > 1:
                Bundle(chosen)


# --- update ----------------------------------------------------------------------------------------------------------


class Updates:
    """Power iteration of the weights of layers; what it works on is looked up again only when a weight moves."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self._places: list[int] = []
        self._iterations: list[PowerIteration] = []
        self._bundles: set[Any] = set()

    @staticmethod
    def of(layers: list[Layer]) -> "Updates":
        """Those of the step before, if the layers are the same."""
        first = layers[0].spectral
        if first.updates is None or first.updates.layers != layers:
            first.updates = Updates(layers)
        return first.updates

    def __deepcopy__(self, memo: dict) -> None:
        return None

    @torch.no_grad()
    def step(self) -> None:
        """Bring u and v of every layer up to date."""
        places = [place for layer in self.layers for place in _places(layer)]
        if places != self._places:
            self._iterations, self._places = _iterations(self.layers), places
            self._bundles = {layer.spectral.bundle for layer in self.layers} - {None}
        for iteration in self._iterations:
            iteration.step()
        for bundle in self._bundles:
            bundle.end()


def _places(layer: Layer) -> list[int]:
    """Where the tensors of a layer lie; never the same for a weight that must be gathered or copied first."""
    weight: Any = layer.original
    if is_sharded(weight):
        weight = weight.to_local() if _sharding(weight) else None
    if weight is None or not weight.is_contiguous():
        return [next(_fresh)]
    buffers = layer.spectral._buffers
    return [tensor.data_ptr() for tensor in (weight, buffers["u"], buffers["v"])]  # type: ignore[union-attr]


_fresh = count(-1, -1)


def _sharding(weight: Tensor) -> tuple[Any, int] | None:
    """Device mesh and its axis over which the first axis of a weight is cut, if nothing else is."""
    if not is_sharded(weight):
        return None
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    # tensor parallelism beside it cuts in another order, as `_StridedShard`
    plain = len(cut) == 1 and placements[cut[0]].is_shard(0) and type(placements[cut[0]]).__name__ == "Shard"
    return (mesh, cut[0]) if plain else None


def _iterations(layers: list[Layer]) -> list[PowerIteration]:
    """One for the whole weights, and one for each mesh over which weights are sharded."""
    groups: dict[Any, list[tuple[Tensor, Tensor, Tensor, int]]] = {}
    for layer in layers:
        groups.setdefault(_sharding(layer.original), []).extend(_operands(layer))
    iterations = []
    for sharding, operands in groups.items():
        matrices, left, right, starts = (list(column) for column in zip(*operands, strict=True))
        iterations.append(PowerIteration(matrices, left, right, starts=starts, reduce=_sum_over(sharding)))
    return iterations


def _operands(layer: Layer) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """``(matrix, its left vector, its right vector, where its rows begin)`` of each part, as it lies in memory.

    The rows of GPT-2's ``Conv1D`` are its inputs, so that v is to the left.
    """
    spectral, weight = layer.spectral, layer.original.detach()
    sharding, parts, height = _sharding(weight), len(layer.spectral.u), len(weight)
    if sharding is None:
        local, first = whole_tensor(weight), 0
    else:
        mesh, axis = sharding
        local = weight.to_local()  # type: ignore[attr-defined]
        first = min(mesh.get_local_rank(axis) * -(-height // mesh.size(axis)), height)  # as `torch.chunk` cuts
    local = local.flatten(1)
    if spectral.transposed:
        for columns, u, v in zip(local.chunk(parts, 1), spectral.u, spectral.v, strict=True):
            yield columns, v, u, first
        return
    rows = height // parts
    for part, (u, v) in enumerate(zip(spectral.u, spectral.v, strict=True)):
        begin, end = (min(max(edge, first), first + len(local)) for edge in (part * rows, (part + 1) * rows))
        yield local[begin - first : end - first], u, v, begin - part * rows if end > begin else 0


def _sum_over(sharding: tuple[Any, int] | None) -> Callable[[Tensor], None] | None:
    if sharding is None:
        return None
    group = sharding[0].get_group(sharding[1])

    def reduce(buffer: Tensor) -> None:
        torch.distributed.all_reduce(buffer, group=group)

    return reduce


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
    return merge_layers(find_layers(model))


@torch.no_grad()
def merge_layers(layers: list[Layer]) -> list[str]:
    """Merge some of the layers; their names."""
    for layer in layers:
        if is_sharded(layer.original):
            raise RuntimeError(
                f"The weight of {layer.label!r} is sharded and cannot be merged in place. Save a checkpoint, "
                "consolidate it, and use `fold_checkpoint`."
            )
    for layer in unique_layers(layers):
        if layer.spectral.bundle is not None:
            layer.spectral.bundle.leave(id(layer.spectral))
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
    classes.take_off(owner, PARAMETRIZED)
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
    layers = [Layer("", "", owner, tensor) for tensor in live_weights(owner)]
    layers = [layer for layer in layers if layer.spectral.plain_keys and not is_sharded(layer.original)]
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
    for layer in [Layer("", "", owner, tensor) for tensor in live_weights(owner)]:
        key, live = prefix + layer.tensor, f"{prefix}parametrizations.{layer.tensor}."
        if key not in state_dict or live + "original" in state_dict:
            continue
        weight, state = state_dict.pop(key), layer.state()
        if weight.shape == state["original"].shape and not is_sharded(weight):
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
            "`python -m lightning.fabric.utilities.consolidate_checkpoint`."
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
