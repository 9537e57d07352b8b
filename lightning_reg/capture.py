"""Finds the places a regularizer acts on, and sees what passes there: the only code that hooks or patches.

Six roles. ``mlp_hidden`` is the input of an MLP's down-projection, so the gated product where there is a gate.
``mlp_pre_activation`` is what enters its activation: the input of that module, or the output of the projection before
it where the activation is a function. ``logits`` is the output of a model's head, ``module`` that of any module.
``attention`` (entropy of rows) and ``attention_scores`` (all that enters an attention) are caught where attention is
computed: while a training batch is in flight, ``F.scaled_dot_product_attention`` and ``softmax`` are replaced, in
every spelling, by versions that look at the innermost module running and, if a regularizer wants it, show the queries
and keys, or the scores, to the engine.
Hooks are module-level functions that read the ``Site`` stored on the module: nothing about a site is baked into
compiled code, so compiled blocks still share it.
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from lightning_reg.functional.attention_entropy import MASKED_BIAS

if TYPE_CHECKING:
    from lightning_reg.engine import Engine, SharedEntropy, Tap

Target = str | type | Callable[[str, nn.Module], bool]
Targets = Target | Sequence[Target] | None

# classes of one's own that derive from these are still what they derive from
_NEVER_ATTENTION = (
    torchmetrics.Metric, nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase,
    nn.modules.conv._ConvNd, nn.modules.dropout._DropoutNd,
)  # fmt: skip

SITE = "_lightning_reg_site"
REWRITES = "_lightning_reg_rewrites"  # on a module: what changes its attention, by kind
ORIGINAL = "_lightning_reg_original"  # on a substituted activation: what was there before
ATTENTION_NAME = re.compile(r"att(n|ention)|mil|pool", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"router|expert|moe", re.IGNORECASE)
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")
_WRAPPER_CLASSES = ("OptimizedModule", "FullyShardedDataParallel", "CheckpointWrapper")
_ATTENTION_PATH = re.compile(r"(^|\.)\w*(attn|attention|mha)(\.|$)", re.IGNORECASE)
_HEAD_GETTERS = ("get_output_embeddings", "get_classifier")
_NEVER_ACTIVATION = (
    nn.Identity, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention, nn.LayerNorm,
    nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, torchmetrics.Metric,
)  # fmt: skip
_GATE_NAME = re.compile(r"gate|^wi_0$|^w1$|^fc1_g$", re.IGNORECASE)
_ACTIVATION_CLASS = re.compile(r"([rgsce]e|si|^e)lu|relu|swish|mish|activation", re.IGNORECASE)
_ACTIVATION_NAME = re.compile(
    r"(\w*_)?(act|activation|non_?linearity)(_?(fn|fun|func|function|layer))?\d*", re.IGNORECASE
)


# --- targets ---------------------------------------------------------------------------------------------------------


def match_targets(targets: Targets, modules: dict[str, nn.Module], argument: str = "targets") -> set[str]:
    """Names of the modules that ``targets`` selects.

    Args:
        targets: A regular expression that must match a whole name or a dotted ending of it (``fc2`` selects every
            ``...fc2``), a module type, a predicate on (name, module), or a sequence of these.
        modules: Candidates by qualified name.
        argument: Name of the argument, for messages.

    Raises:
        ValueError: If an entry selects nothing; the message lists near names.
        TypeError: If an entry is none of the kinds.
    """
    entries = [targets] if isinstance(targets, (str, type)) or callable(targets) else list(targets or [])
    if not entries:
        raise ValueError(f"`{argument}` must not be empty; leave it out for automatic discovery.")
    selected: set[str] = set()
    for entry in entries:
        found = {name for name, module in modules.items() if _selects(entry, name, module, argument)}
        if not found:
            raise ValueError(
                f"`{argument}` entry {_describe_target(entry)} matches no module. {_near_names(entry, modules)}"
            )
        selected |= found
    return selected


def explicit_targets(targets: Targets, model: nn.Module) -> set[str] | None:
    """Names that ``targets`` selects among all modules; None when it is left out."""
    return None if targets is None else match_targets(targets, named_modules(model))


def _selects(entry: Target, name: str, module: nn.Module, argument: str) -> bool:
    if isinstance(entry, str):
        try:
            return re.fullmatch(rf"(?:.*\.)?(?:{entry})", name) is not None
        except re.error as error:
            raise ValueError(f"`{argument}` entry {entry!r} is not a valid regular expression: {error}.") from error
    if isinstance(entry, type):
        return isinstance(module, entry)
    if callable(entry):
        return bool(entry(name, module))
    raise TypeError(f"`{argument}` must hold strings, types or predicates, got {entry!r} of {type(entry).__name__}.")


def _describe_target(entry: Target) -> str:
    return repr(entry) if isinstance(entry, str) else getattr(entry, "__qualname__", repr(entry))


def _near_names(entry: Target, modules: dict[str, nn.Module]) -> str:
    names = [name for name in modules if name]
    wanted = _describe_target(entry).strip("'")
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.4)
    near = near or difflib.get_close_matches(wanted, [type(module).__name__ for module in modules.values()], n=3)
    shown = near or names[:5]
    return f"Near names: {', '.join(dict.fromkeys(shown))}." if shown else "The model has no modules."


# --- discovery -------------------------------------------------------------------------------------------------------


def projection_sizes(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` features of a linear map, also GPT-2's ``Conv1D`` and a 1x1 convolution; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return module.nx, module.nf  # type: ignore[return-value]
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        return module.in_channels, module.out_channels
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear map with a transposed weight, without importing transformers."""
    return any(cls.__name__ == "Conv1D" and "transformers" in cls.__module__ for cls in type(module).__mro__)


@dataclass(frozen=True)
class Mlp:
    """An MLP of a model, by the names of its parts.

    Args:
        block: The innermost module that holds all of it.
        ups: Its narrow-to-wide maps: one, or gate and up, or both fused in one of twice the width.
        down: Its wide-to-narrow map.
        activations: Attributes that hold its activation, a module or a function; empty when its code calls it inline.
    """

    block: str
    ups: tuple[str, ...]
    down: str
    activations: tuple[str, ...]


def find_mlps(root: nn.Module) -> list[Mlp]:
    """MLPs: a wide-to-narrow map preceded, in the same block, by the matching narrow-to-wide.

    The same block means a common parent or grandparent; a fused gate and up projection counts with half its width.
    Projections of attention are left out by the names of their parents.
    """
    sizes = {name: size for name, module in named_modules(root).items() if (size := projection_sizes(module))}
    found: list[Mlp] = []
    earlier: list[str] = []
    for name, (wide, narrow) in sizes.items():
        parent = name.rpartition(".")[0]
        grandparent = parent.rpartition(".")[0] if "." in parent else parent
        local = ".".join(name.split(".")[-3:])
        for scope in dict.fromkeys((parent, grandparent)):
            ups = [up for up in earlier if _inside(up, scope) and _feeds(sizes[up], wide, narrow)]
            if wide > narrow and ups and not _ATTENTION_PATH.search(local):
                after = max((earlier.index(mlp.down) for mlp in found if _inside(mlp.down, scope)), default=-1)
                ups = [up for up in ups if earlier.index(up) > after] or ups[-1:]
                if len([up for up in ups if sizes[up][1] == wide]) > 2:
                    break  # query, key and value: attention by another name
                block = _common([*ups, name])
                found.append(Mlp(block, tuple(ups), name, _activations_of(root, block, ups, name)))
                break
        earlier.append(name)
    return found


def select_mlps(targets: Targets, model: nn.Module) -> list[Mlp]:
    """MLPs whose down-projections ``targets`` selects, all of them when it is left out.

    Raises:
        ValueError: If there are none, or something else is selected.
    """
    selected = explicit_targets(targets, model)
    found = {mlp.down: mlp for mlp in find_mlps(model)}
    modules = named_modules(model)
    if selected is None:
        if not found:
            names = [name for name, module in modules.items() if projection_sizes(module)]
            raise ValueError(
                "no MLP down-projection was found: no wide-to-narrow linear map follows the matching narrow-to-wide "
                f"one. Name it with `targets=`; the linear maps are {', '.join(names[:8]) or 'none'}."
            )
        return list(found.values())
    above = {up: mlp.down for mlp in found.values() for up in mlp.ups}
    for name in sorted(selected):
        if name in above and name not in found:
            raise ValueError(
                f"`targets` must name down-projections, whose input is regularized; {name!r} is the up-projection of "
                f"{above[name]!r}, which you may have meant."
            )
        if projection_sizes(modules[name]) is None:
            inside = [other for other in found if other.startswith(f"{name}.")]
            remedy = f" Its down-projections: {', '.join(inside[:5])}." if inside else ""
            raise ValueError(
                f"`targets` must name down-projections, whose input is regularized; {name or 'the model'!r} is a "
                f"{type(modules[name]).__name__}.{remedy}"
            )
    # one that was not found has no parts that are known
    return [found.get(name) or Mlp("", (), name, ()) for name in modules if name in selected]


def select_heads(targets: Targets, model: nn.Module) -> list[str]:
    """Modules whose output are logits: those ``targets`` selects, the model's own heads when it is left out.

    What a Hugging Face model returns from ``get_output_embeddings`` or a timm model from ``get_classifier``; else the
    last linear map outside attention and MLPs, or of all. Heads that are not trained are left out.

    Raises:
        ValueError: If there is none.
    """
    modules = named_modules(model)
    selected = explicit_targets(targets, model)
    if selected is not None:
        return [name for name in modules if name in selected]
    names = {id(module): name for name, module in modules.items()}
    asked = (getattr(module, way, None) for module in modules.values() for way in _HEAD_GETTERS)
    given = [getattr(get(), "_orig_mod", get()) for get in asked if callable(get)]
    heads = [names[id(head)] for head in given if id(head) in names and any(True for _ in head.parameters())]
    if not heads:
        linear = [name for name, module in modules.items() if projection_sizes(module)]
        inner = {part for mlp in find_mlps(model) for part in (*mlp.ups, mlp.down)}
        outer = [name for name in linear if name not in inner and not _ATTENTION_PATH.search(f".{name}")]
        heads = (outer or linear)[-1:]
    trained = [name for name in dict.fromkeys(heads) if any(p.requires_grad for p in modules[name].parameters())]
    if not (trained or heads):
        raise ValueError("no output head was found: the model has no linear map. Name it with `targets=`.")
    return trained or heads


def pre_activation_site(root: nn.Module, mlp: Mlp) -> str:
    """Name of the module where the pre-activation of an MLP passes: its activation, or the projection before it.

    Raises:
        ValueError: If the activation is a function and it is unknown which of several projections it follows.
    """
    names = {id(module): name for name, module in named_modules(root).items()}
    for path in mlp.activations:
        if (value := attribute(root, path)) is not None and id(value) in names:
            return names[id(value)]
    sizes = {name: projection_sizes(module) for name, module in named_modules(root).items()}
    if len(mlp.ups) == 1 and sizes[mlp.ups[0]][1] == sizes[mlp.down][0]:  # type: ignore[index]
        return mlp.ups[0]
    gates = [up for up in mlp.ups if _GATE_NAME.search(up.rpartition(".")[2])]
    if len(gates) == 1 and len(mlp.ups) > 1:
        return gates[0]
    raise ValueError(
        f"the MLP of {mlp.down!r} calls its activation as a function, and which of {', '.join(mlp.ups)} it follows "
        "is unknown. Name that projection with `targets=`."
    )


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute at a path, looking through wrappers."""
    owner, _, name = path.rpartition(".")
    value = getattr(named_modules(root)[owner], name)
    return getattr(value, "_orig_mod", value)


def find_down_projections(root: nn.Module) -> list[str]:
    """Names of MLP down-projections."""
    return [mlp.down for mlp in find_mlps(root)]


def _feeds(up: tuple[int, int], wide: int, narrow: int) -> bool:
    return up[0] == narrow and up[1] in (wide, 2 * wide)


def _common(names: list[str]) -> str:
    """The innermost module that holds all of them."""
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
    return ".".join(parts[0] for parts in shared)


def _activations_of(root: nn.Module, block: str, ups: list[str], down: str) -> tuple[str, ...]:
    """Attributes in a block that hold its activation.

    Those between up and down in its order; else the only one that is an attribute of the block itself, or of what holds
    up or down. Gates such as a sigmoid are activations only where there is nothing else in between.
    """
    paths = list(_attributes(named_modules(root)[block], block))
    found = [(path, value) for path, value in paths if is_activation(path, value)]
    place = {path: index for index, (path, _) in enumerate(paths)}
    first, last = place.get(ups[0], -1), place.get(down, -1)
    between = [(path, value) for path, value in found if first < place[path] < last]
    if proper := [path for path, value in between if not _is_gate(value)]:
        return tuple(proper)
    if len(between) == 1:
        return (between[0][0],)
    holders = {block, *(name.rpartition(".")[0] for name in (*ups, down))}
    near = [path for path, value in found if path.rpartition(".")[0] in holders and not _is_gate(value)]
    return tuple(near) if len(near) == 1 and not between else ()


def _is_gate(value: Any) -> bool:
    name = type(value).__name__ if isinstance(value, nn.Module) else getattr(value, "__name__", "")
    if ORIGINAL in getattr(value, "__dict__", {}):
        return False
    return name.lower().replace("_", "") in ("sigmoid", "hardsigmoid", "logsigmoid", "tanh", "hardtanh", "softplus")


def _attributes(module: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """Child modules and callables of a module by path, in its order, without those of attention."""
    for name, child in module._modules.items():
        path = _plain_path(f"{prefix}.{name}".lstrip("."))
        bare = getattr(child, "_orig_mod", child)
        if isinstance(bare, nn.Module):
            yield path, bare
            if not _ATTENTION_PATH.search(f".{name}") and not is_activation(path, bare):
                yield from _attributes(bare, path)
    for name, value in module.__dict__.items():
        if callable(value) and not isinstance(value, nn.Module) and not name.startswith("_"):
            yield f"{prefix}.{name}".lstrip("."), value


def is_activation(path: str, value: Any) -> bool:
    """Whether an attribute holds an activation function: put there by us, or by its class, or by its name."""
    attribute = path.rpartition(".")[2]
    if not isinstance(value, nn.Module):
        named = _ACTIVATION_CLASS.search(getattr(value, "__name__", "")) or _ACTIVATION_NAME.fullmatch(attribute)
        factory = isinstance(value, type) or isinstance(getattr(value, "func", None), type)
        return callable(value) and not factory and bool(named)
    if isinstance(value, _NEVER_ACTIVATION) or any(True for _ in value.children()) or projection_sizes(value):
        return False
    kind = type(value)
    return (
        ORIGINAL in value.__dict__
        or kind.__module__ == "torch.nn.modules.activation"
        or bool(_ACTIVATION_CLASS.search(kind.__name__))
        or bool(_ACTIVATION_NAME.fullmatch(attribute))
    )


def _inside(name: str, parent: str) -> bool:
    return not parent or name.startswith(parent + ".")


def at_or_below(name: str, top: str) -> bool:
    """Whether a module is another, or inside it."""
    return name == top or _inside(name, top)


def select_attention(targets: Targets, model: nn.Module) -> list[tuple[str, bool]]:
    """Modules that may compute attention, at or below the targets, each with whether it was named.

    Raises:
        ValueError: If there is none at or below the targets.
    """
    candidates = attention_candidates(model)
    selected = explicit_targets(targets, model)
    if selected is None:
        return [(name, False) for name in candidates]
    below = [name for name in candidates if any(at_or_below(name, top) for top in selected)]
    if not below:
        raise ValueError(
            f"`targets` select {', '.join(sorted(selected))}, where no attention can be computed: name the module "
            "whose forward calls `F.scaled_dot_product_attention` or `softmax`, or one of its parents."
        )
    return [(name, name in selected) for name in below]


def attention_candidates(root: nn.Module) -> dict[str, nn.Module]:
    """Modules whose own forward may compute attention: every module that is not a plain torch layer."""
    return {
        name: module
        for name, module in named_modules(root).items()
        if isinstance(module, nn.MultiheadAttention)
        or not (_own_class(module).__module__.startswith("torch.") or isinstance(module, _NEVER_ATTENTION))
    }


def named_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Modules by the name a user wrote: without the wrappers that compile, sharding and checkpointing put between."""
    return {
        _plain_path(name): module
        for name, module in root.named_modules()
        if type(module).__name__ not in _WRAPPER_CLASSES and ".parametrizations." not in name
    }


def _plain_path(path: str) -> str:
    return _WRAPPERS.sub("", path).rstrip(".")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, as a wrapper or in place."""
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"


def _own_class(module: nn.Module) -> type:
    """Class of a module before a parametrization or sharding replaced it by a subclass."""
    replaced = ("torch.nn.utils.parametrize", "torch.distributed.", "lightning_reg.rewriting")
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith(replaced))


def broadcast_leading(query: Tensor, key: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys with the same leading axes: torch's attention broadcasts them, learned latents rely on it."""
    own = 3 if enable_gqa else 2
    if query.shape[:-own] == key.shape[:-own]:
        return query, key
    lead = torch.broadcast_shapes(query.shape[:-own], key.shape[:-own])
    return query.expand(*lead, *query.shape[-own:]), key.expand(*lead, *key.shape[-own:])


@dataclass(frozen=True)
class AttentionCall:
    """One attention as it is computed: queries and keys, or scores.

    Args:
        site: Name of the module in whose forward it is computed.
        module: That module.
        query: (batch, heads, queries, dim) or fewer axes, after rotary embedding and QK-norm; None for ``scores``.
        key: (batch, heads, keys, dim), or fewer heads with ``enable_gqa``.
        attn_mask: Boolean (True = visible) or additive, broadcastable to (batch, heads, queries, keys).
        is_causal: Query i sees keys 0..i.
        scale: Factor on the scores, ``dim ** -0.5`` when None.
        enable_gqa: Share each key head among ``heads / key_heads`` query heads.
        scores: What enters a softmax; values at or below ``MASKED_BIAS`` are hidden keys. None for ``query``.
        dim: Axis of the keys in ``scores``.
        largest: Largest ``|score|`` of each row over its visible keys, (batch, heads, queries), where the attention
            found it on its way.
    """

    site: str
    module: nn.Module
    query: Tensor | None = None
    key: Tensor | None = None
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    scores: Tensor | None = None
    dim: int = -1
    largest: Tensor | None = None

    def describe(self) -> tuple[str, str]:
        """Shape, and where it was caught."""
        if self.scores is not None:
            return str(tuple(self.scores.shape)), f"softmax over axis {self.dim}"
        assert self.query is not None
        assert self.key is not None
        where = "scaled_dot_product_attention" + ("" if self.largest is None else ", fused kernel")
        return f"{tuple(self.query.shape)} x {tuple(self.key.shape)}", where

    def detach(self) -> "AttentionCall":
        """The same without gradient."""
        tensors = ("query", "key", "attn_mask", "scores")
        found = {name: tensor.detach() for name in tensors if (tensor := getattr(self, name)) is not None}
        return replace(self, **found)

    def valid_rows(self, tokens: Tensor | None = None) -> Tensor | None:
        """Rows that are no padding, broadcastable to (batch, heads, queries); None when all count.

        Args:
            tokens: Valid tokens of the batch, (batch, queries).
        """
        if self.scores is not None:
            scores = self.scores.detach()
            square = scores.dim() == 4 and scores.shape[-1] == scores.shape[-2] and self.dim in (-1, 3)
            valid = padding_free(scores > MASKED_BIAS, scores.shape[-1]) if square else None
            like = scores.select(self.dim, 0)
        else:
            assert self.query is not None
            valid = visible_padding(self.query, self.key, self.attn_mask)
            like = self.query[..., 0]
        return and_tokens(valid, tokens, like)


def visible_padding(query: Tensor, key: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """``padding_free`` of an attention's arguments."""
    if attn_mask is None or key is None or query.shape[-2] != key.shape[-2]:
        return None
    shown = attn_mask if attn_mask.dtype == torch.bool else attn_mask > MASKED_BIAS
    return padding_free(shown, key.shape[-2])


def and_tokens(valid: Tensor | None, tokens: Tensor | None, rows: Tensor) -> Tensor | None:
    """Valid ones among ``rows`` (batch, heads, queries), from the mask and from the batch's valid tokens."""
    if tokens is None:
        return valid
    if tokens.shape != (rows.shape[0], rows.shape[-1]):
        raise ValueError(
            f"`mask` must be (batch, queries) = {(rows.shape[0], rows.shape[-1])} for attention, "
            f"got {tuple(tokens.shape)}."
        )
    counted = tokens.bool().view(tokens.shape[0], *(1,) * (rows.dim() - 2), tokens.shape[1])
    return counted if valid is None else counted & valid


def padding_free(shown: Tensor, rows: int) -> Tensor | None:
    """Queries that are no padding, (batch, heads, queries), from what each sees, (batch, heads, queries, keys).

    In self-attention a token that no query sees is padding, so its own row does not count either. None if unknown.
    """
    return shown.any(-2) if shown.dim() > 1 and shown.shape[-1] == rows else None


# --- sites -----------------------------------------------------------------------------------------------------------

_ROLES = {  # attribute of a site that holds the taps of a role
    "attention": "attention",
    "attention_scores": "scores",
    "mlp_hidden": "hidden",
    "mlp_pre_activation": "pre_activation",
    "logits": "logits",
    "module": "output",
}


class Site:
    """A module some regularizer looks at: its taps by role. A deep copy of the module (an averaged model) gets none."""

    def __init__(self, name: str, module: nn.Module, engine: "Engine") -> None:
        self.name, self.label = name, name or type(module).__name__
        self.engine: Engine | None = engine
        self.attention: list[Tap] = []
        self.entropies: list[SharedEntropy] = []  # the taps of ``attention``, by what they look at
        self.scores: list[Tap] = []
        self.hidden: list[Tap] = []
        self.pre_activation: list[Tap] = []
        self.logits: list[Tap] = []
        self.output: list[Tap] = []
        self.awake = True  # any tap is to see this step
        self.explicit = False  # the user named it: any softmax in its forward is attention
        self.path = f"{name} {type(module).__name__}"

    def __deepcopy__(self, memo: dict) -> "Site":
        copy = Site.__new__(Site)
        lists = ("entropies", *_ROLES.values())
        copy.__dict__.update(self.__dict__, engine=None, awake=False, **{attribute: [] for attribute in lists})
        return copy

    def __reduce__(self) -> tuple:
        return _no_site, ()

    def taps(self, role: str) -> "list[Tap]":
        """Those of a role."""
        return getattr(self, _ROLES[role])

    def takes_softmax(self, scores: Tensor, dim: int) -> bool:
        """Whether a softmax in this module's forward is attention rather than class probabilities or routing."""
        return self.explicit or takes_softmax(self.path, scores, dim)


def takes_softmax(path: str, scores: Tensor, dim: int) -> bool:
    """Whether a softmax is attention, by its shape and by the name and class of the module that calls it."""
    if _ROUTER_NAME.search(path):
        return False
    return (scores.dim() >= 4 and dim in (-1, scores.dim() - 1)) or bool(ATTENTION_NAME.search(path))


def _no_site() -> None:
    return None


def site_of(module: nn.Module) -> Site | None:
    """The site stored on a module, if any."""
    return module.__dict__.get(SITE)


def _enter(module: nn.Module, args: Any) -> None:
    getattr(module, SITE).engine.scope.append(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    scope = getattr(module, SITE).engine.scope
    # an exception on the way leaves inner modules behind
    while scope and scope.pop() is not module:
        pass


def _show_input(module: nn.Module, args: tuple) -> tuple | None:
    site = getattr(module, SITE)
    if not args or site.engine is None or not module.training:
        return None
    taps = site.hidden if projection_sizes(module) else site.pre_activation
    return (site.engine.observe_activations(site, taps, args[0], "input"), *args[1:]) if taps else None


def _show_output(module: nn.Module, args: tuple, output: Any) -> Any:
    site = getattr(module, SITE)
    if site.engine is None or not module.training:
        return None
    if site.pre_activation and projection_sizes(module):
        output = site.engine.observe_activations(site, site.pre_activation, output, "output")
    if site.logits:
        output = site.engine.observe_activations(site, site.logits, output, "output")
    if site.output:
        output = site.engine.observe_output(site, output)
    return output


def attach_hooks(sites: Iterable[tuple[nn.Module, Site]]) -> list[Any]:
    """Hook every site; the handles undo it.

    Plain hooks only: ``always_call`` and ``with_kwargs`` bake the number of a hook into compiled code, and blocks that
    could share it would be compiled one by one.
    """
    handles = []
    for module, site in sites:
        if site.attention or site.scores:
            handles.append(module.register_forward_pre_hook(_enter))
            handles.append(module.register_forward_hook(_leave))
        projection = projection_sizes(module) is not None
        if site.hidden or (site.pre_activation and not projection):
            handles.append(module.register_forward_pre_hook(_show_input))
        if site.logits or site.output or (site.pre_activation and projection):
            handles.append(module.register_forward_hook(_show_output))
    return handles


# --- attention, where it is computed ---------------------------------------------------------------------------------

# what stood there when watching began: another library may have replaced them before
_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
_f_softmax: Callable[..., Tensor] = F.softmax
_torch_softmax: Callable[..., Tensor] = torch.softmax
_tensor_softmax: Callable[..., Tensor] = Tensor.softmax
_active: list["Engine"] = []
_holders: set[Any] = set()  # who needs the replaced functions
rewriting: list[nn.Module] = []  # modules with rewrites whose forward runs, innermost last
unrewritten: list[str] | None = None  # collects the modules whose attention no rewrite reached


def _current_site(softmax: bool = False) -> Site | None:
    """The site of the innermost module running, or None when no regularizer wants its attention."""
    if not _active:
        return None
    scope = _active[-1].scope
    if torch.compiler.is_compiling() or (scope and not in_backward()):
        module = scope[-1] if scope else None
        entered = True
    else:
        module = _module_on_stack()
        entered = in_backward()
    site = None if module is None or not module.training else getattr(module, SITE, None)
    if site is None or not (site.attention or site.scores):
        return None
    # a softmax written in training_step itself is a prediction, unless the user named the LightningModule
    return None if softmax and not (entered or site.name or site.explicit) else site


def in_backward() -> bool:
    """Whether a checkpointed forward is being repeated inside backward."""
    return torch._C._current_graph_task_id() != -1


def _module_on_stack() -> nn.Module | None:
    """Innermost module with a site among the callers: for a forward that was entered past ``__call__``."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and site_of(owner) is not None:
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    attend: Callable[..., Tensor] = watched_attention
    module = rewriting[-1] if rewriting else None
    for rewrite in _active_rewrites(module)[::-1]:
        attend = partial(rewrite.attention, module, attend)
    return attend(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip


def watched_attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """``F.scaled_dot_product_attention``, shown to the engine where a regularizer wants it."""
    site = _current_site()
    attention = _sdpa if site is None or site.engine is None else partial(site.engine.observe_attention, site)
    return attention(query, key, value, **arguments)


def watched_softmax(scores: Tensor, dim: int) -> Tensor:
    """``softmax`` of attention scores, shown to the engine where a regularizer wants it."""
    site = _current_site()
    if site is None or site.engine is None:
        return _torch_softmax(scores, dim)
    return site.engine.observe_scores(site, scores, dim, None)


def _active_rewrites(module: nn.Module | None) -> list[Any]:
    """Rewrites of the innermost rewritten module that runs, in the order in which they apply."""
    if module is None:
        if unrewritten is not None and not torch.compiler.is_compiling():
            unrewritten.append(_innermost_module())
        return []
    rewrites = list(module.__dict__[REWRITES].values()) if REWRITES in module.__dict__ else []
    for rewrite in rewrites:
        rewrite.fired = True  # written, never read here: a read would become a guard
    return [rewrite for rewrite in rewrites if rewrite.active]


def _innermost_module() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return type(owner).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return "a function"


def _watched_softmax(
    original: Callable[..., Tensor], scores: Tensor, dim: int | None, args: tuple, kwargs: dict
) -> Tensor:
    floating = dim is not None and torch.is_floating_point(scores)
    if floating and rewriting:
        module = rewriting[-1]
        rewrites = module.__dict__.get(REWRITES)
        if rewrites is not None and (rewrites.explicit or takes_softmax(rewrites.path, scores, dim)):  # type: ignore[arg-type]
            for rewrite in _active_rewrites(module):
                scores = rewrite.scores(module, scores, dim)
                original = _torch_softmax  # F.softmax goes on to Tensor.softmax, which would come back here
    site = _current_site(softmax=True) if floating else None
    if dim is None or site is None or site.engine is None or not site.takes_softmax(scores, dim):
        return original(scores, dim, *args, **kwargs)
    dtype = kwargs.get("dtype") or next((arg for arg in args if isinstance(arg, torch.dtype)), None)
    return site.engine.observe_scores(site, scores, dim, dtype)


def _functional_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    return _watched_softmax(_f_softmax, input, dim, (), {"dtype": dtype})


def _torch_softmax_watched(input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    return _watched_softmax(_torch_softmax, input, dim, args, kwargs)


def _tensor_softmax_watched(self: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    return _watched_softmax(_tensor_softmax, self, dim, args, kwargs)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """``F.scaled_dot_product_attention`` as it was before watching began."""
    return _sdpa(query, key, value, **arguments)


def plain_softmax(scores: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """``torch.softmax`` as it was before watching began."""
    return _torch_softmax(scores, dim, dtype=dtype)


def watch_attention(engine: "Engine") -> None:
    """Show attention to an engine until ``unwatch_attention``."""
    if engine not in _active:
        _active.append(engine)
        hold_attention(engine)


def unwatch_attention(engine: "Engine") -> None:
    """Counterpart of ``watch_attention``; no-op when it does not watch."""
    if engine in _active:
        _active.remove(engine)
        release_attention(engine)


def hold_attention(holder: Any) -> None:
    """Replace the attention functions until the last holder has released them."""
    global _sdpa, _f_softmax, _torch_softmax, _tensor_softmax
    if not _holders:
        _sdpa, _f_softmax, _torch_softmax = F.scaled_dot_product_attention, F.softmax, torch.softmax
        _tensor_softmax = Tensor.softmax
        F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
        F.softmax, torch.softmax = _functional_softmax, _torch_softmax_watched  # type: ignore[assignment]
        Tensor.softmax = _tensor_softmax_watched  # type: ignore[method-assign, assignment]
    _holders.add(holder)


def release_attention(holder: Any) -> None:
    """Counterpart of ``hold_attention``; no-op when it holds nothing."""
    if holder not in _holders:
        return
    _holders.remove(holder)
    if not _holders:
        F.scaled_dot_product_attention = _sdpa  # type: ignore[assignment]
        F.softmax, torch.softmax = _f_softmax, _torch_softmax  # type: ignore[assignment]
        Tensor.softmax = _tensor_softmax  # type: ignore[method-assign, assignment]
