"""Finds the attention of a model by its parts: the projections of queries and keys, their heads, and norms on them.

The rule for models that are written by hand: an attention is a module with children (Linear, GPT-2 Conv1D, 1x1
convolution, or a LoRA around one) whose names say query and key: ``q``, ``k``, ``query``, ``key``, with or without
``to_``, ``w``, ``fc``, ``linear`` before or ``_proj``, ``_lin``, ``_linear``, ``_layer`` behind; or one child for
several, ``qkv``, ``qk``, ``kv``, ``c_attn``, ``in_proj``, whose outputs are all queries, then all keys, then all
values. The number of heads is an attribute of that module or of its ``config``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_reg import capture
from lightning_reg.capture import Targets

_BEFORE, _AFTER = r"(?:to|w|fc|lin|linear|proj|c|in)", r"(?:proj|projection|lin|linear|layer|fc|dense|attn)"
_ROLE_NAME = re.compile(
    rf"(?:{_BEFORE}_?)?(?P<role>qkv|qk|kv|q|k|query_key_value|key_value|query|queries|keys?)(?:_?{_AFTER})?",
    re.IGNORECASE,
)
_ROLES = {"query": "q", "queries": "q", "key": "k", "keys": "k", "key_value": "kv"}
_INTERLEAVED = "query_key_value"  # GPT-NeoX, BLOOM, Falcon: query, key and value of a head beside each other
_LATENT = re.compile(r"(q_a|q_b|kv_a|kv_b)_proj\w*", re.IGNORECASE)
_NORM_NAME = re.compile(
    r"(q|k|qk|query|key)_?(layer_?norm|rms_?norm|norm|ln)\d*|(layer_?norm|rms_?norm|norm|ln)_?(q|k|qk|query|key)",
    re.IGNORECASE,
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_attn_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_HEAD_DIMS = ("head_dim", "attention_head_size", "dim_head", "key_value_proj_dim", "head_size")
_CONFIGS = ("config", "cfg", "args")
SLOTS = ("q_norm", "k_norm")


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Where the outputs of a projection lie in a parameter: from ``start`` on along ``axis``."""

    owner: nn.Module
    tensor: str
    start: int
    axis: int = 0

    @property
    def parameter(self) -> Tensor | None:
        """The trained tensor; None if it is none: it is absent, computed or packed."""
        return self.owner._parameters.get(self.tensor)

    def by_head(self, heads: int, head_dim: int) -> Tensor:
        """The part as a view, (..., heads, head_dim, ...), with the heads on ``axis``."""
        assert self.parameter is not None
        part = self.parameter.narrow(self.axis, self.start, heads * head_dim)
        return part.unflatten(self.axis, (heads, head_dim))


@dataclass(frozen=True)
class Projection:
    """The map from tokens to the queries, or keys, of all heads.

    Args:
        name: Qualified name of the module whose output, or weight, it is.
        module: That module; a LoRA around the linear map, where there is one.
        weight: Its part of the weight: rows, or columns of GPT-2's transposed Conv1D.
        biases: Its parts of the bias, and of what else adds to the outputs.
        start: Its first output, of a module that computes more.
        heads: Number of its heads.
        head_dim: Width of each.
    """

    name: str
    module: nn.Module
    weight: Piece
    biases: tuple[Piece, ...]
    start: int
    heads: int
    head_dim: int

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out)."""
        return self.weight.axis == 1

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All that is linear in the outputs."""
        return (self.weight, *self.biases)


@dataclass(frozen=True)
class Attention:
    """An attention by its parts.

    Args:
        name: Qualified name of the module that owns the projections.
        module: That module.
        query: Projection of the queries.
        key: Projection of the keys; with fewer heads under grouped-query attention.
        norm: What normalises queries or keys already, as an attribute of the module; None if nothing does.
    """

    name: str
    module: nn.Module
    query: Projection
    key: Projection
    norm: str | None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.heads

    @property
    def groups(self) -> int:
        """Number of query heads that share a key head."""
        return self.query.heads // self.key.heads

    @property
    def label(self) -> str:
        """Name for messages."""
        return self.name or type(self.module).__name__


# --- discovery -------------------------------------------------------------------------------------------------------


def find_attentions(root: nn.Module, *, targets: Targets = None, heads: int | None = None) -> list[Attention]:
    """The attentions of a model, by order of appearance.

    Args:
        root: Model whose weights exist.
        targets: Modules that are, or hold, attentions; all when left out.
        heads: Number of query heads, where the model does not say it.

    Raises:
        ValueError: If heads cannot be separated, an attention is one of those that have no such projections, or
            ``targets`` selects none; names the module and the remedy.
    """
    check_heads(heads)
    selected = capture.explicit_targets(targets, root)
    modules = capture.named_modules(root)
    found = [
        attention
        for name, module in modules.items()
        if selected is None or any(capture.at_or_below(name, top) for top in selected)
        if (attention := _attention(name, module, heads)) is not None
    ]
    if selected is not None and not found:
        raise ValueError(
            f"`targets` select {', '.join(sorted(selected))}, where no attention was found: no children named as "
            "query and key (`q_proj`, `to_k`, `query`, ...) or as both (`qkv`, `c_attn`, ...). Name the module that "
            "owns these projections, or one of its parents."
        )
    return found


def check_heads(heads: Any) -> None:
    """Raise a ValueError for a number of heads that is none."""
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
        raise ValueError(f"`heads` must be an integer >= 1, got {heads!r}; leave it out to take the model's own.")


NOTHING_FOUND = (
    "{} found no attention: no module has children named as query and key (`q_proj`, `to_k`, `query`, ...) or as both "
    "(`qkv`, `c_attn`, ...). Rename them, create them in `__init__`, `setup` or `configure_model`, or remove the "
    "callback."
)


def _attention(name: str, module: nn.Module, heads: int | None) -> Attention | None:
    if isinstance(module, nn.MultiheadAttention):
        return _torch_attention(name, module)
    parts = {role: child for child, role in _roles(module)}
    latent = [child for child in module._modules if _LATENT.fullmatch(child)]
    if latent:
        raise ValueError(
            f"{_shown(name, module)} is a latent attention ({', '.join(latent)}), whose keys are shared between heads "
            "before they are projected: QK-clip and QK-norm per head do not apply. Leave it out with `targets=`."
        )
    if _INTERLEAVED in parts:
        raise ValueError(
            f"{_shown(name, module)} projects with `query_key_value`, whose outputs interleave query, key and value by "
            "head in a way that differs between models. Leave it out with `targets=`."
        )
    holder = {part: next((role for role in roles if role in parts), None) for part, roles in _HOLDERS.items()}
    if holder["q"] is None or holder["k"] is None:
        return None
    query, key = (_Fused(parts[holder[part]], holder[part], module) for part in "qk")  # type: ignore[index, arg-type]
    if query.outputs is None or key.outputs is None:
        return None
    counts = _Counts(name, module, query, key, heads)
    starts = 0, counts.query_width if key.role in ("qkv", "qk") else 0
    return Attention(
        name,
        module,
        query.projection(name, starts[0], counts.heads, counts.head_dim, "q"),
        key.projection(name, starts[1], counts.key_heads, counts.head_dim, "k"),
        _norm_of(module),
    )


# which children can hold a part; the more specific first
_HOLDERS = {"q": ("q", "qk", "qkv"), "k": ("k", "kv", "qk", "qkv")}


def _roles(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Children that are projections, with what they compute."""
    beside = [child for child in module._modules if (match := _ROLE_NAME.fullmatch(child)) and _is_q(match)]
    for child, value in module._modules.items():
        sizes = None if value is None else capture.projection_sizes(_linear(value))
        if sizes is None:
            continue
        match = _ROLE_NAME.fullmatch(child)
        if child in ("c_attn", "in_proj") and sizes[1] == (2 if beside else 3) * sizes[0]:
            yield child, "kv" if beside else "qkv"
        elif match:
            role = match["role"].lower()
            yield child, _ROLES.get(role, role)


def _is_q(match: re.Match[str]) -> bool:
    return match["role"].lower() in ("q", "query", "queries")


def _linear(module: nn.Module) -> nn.Module:
    """The linear map inside wrappers of compilation and LoRA."""
    inner = getattr(module, "_orig_mod", module)
    base = inner._modules.get("base_layer")
    return inner if base is None else base


class _Fused:
    """A child that computes queries, keys, or both."""

    def __init__(self, role_child: str, role: str, module: nn.Module) -> None:
        self.child, self.role, self.parent = role_child, role, module
        inner: Any = module._modules[role_child]
        self.module: nn.Module = getattr(inner, "_orig_mod", inner)
        self.linear = _linear(self.module)
        sizes = capture.projection_sizes(self.linear)
        self.outputs = None if sizes is None else sizes[1]

    def projection(self, parent: str, start: int, heads: int, head_dim: int, part: str) -> Projection:
        axis = 1 if capture.is_conv1d(self.linear) else 0
        biases = [Piece(self.linear, "bias", start)] if self.linear._parameters.get("bias") is not None else []
        for tensor, first in ((f"{part}_bias", 0), ("qkv_bias", start)):  # EVA, BEiT: added by the attention itself
            if self.parent._parameters.get(tensor) is not None:
                biases.append(Piece(self.parent, tensor, first))
        name = f"{parent}.{self.child}".lstrip(".")
        return Projection(
            name, self.module, Piece(self.linear, "weight", start, axis), tuple(biases), start, heads, head_dim
        )


class _Counts:
    """Numbers and width of the heads, from attributes and shapes; they must agree."""

    def __init__(self, name: str, module: nn.Module, query: _Fused, key: _Fused, heads: int | None) -> None:
        self.name, self.module = name, module
        head_dim = _number(module, _HEAD_DIMS) if heads is None else None
        own = heads or _number(module, _HEADS)
        key_own = _number(module, _KEY_HEADS)
        alone = query.role == "q"
        outputs: int = query.outputs  # type: ignore[assignment]
        if own is None and head_dim is not None and alone and outputs % head_dim == 0:
            own = outputs // head_dim
        if own is None:
            self._refuse("their number is unknown")
        assert own is not None
        if alone:
            width = outputs / own
            of_keys: int = key.outputs // (2 if key.role == "kv" else 1)  # type: ignore[operator]
            self.heads, self.key_heads = own, int(of_keys // max(1, width))
            fits = width == int(width) and width * self.key_heads == of_keys
        else:
            copies = 2 if query.role == "qkv" else 1
            if key_own is None and head_dim is not None:  # what the shapes say
                key_own = (outputs // head_dim - own) // copies
            self.heads, self.key_heads = own, key_own or own
            width = outputs / (own + copies * self.key_heads)
            fits = width == (head_dim or int(width))
        if not fits or self.key_heads < 1 or own % self.key_heads:
            self._refuse(f"{own} of them do not divide the {outputs} outputs of {query.child!r}")
        self.head_dim = int(width)
        self.query_width = self.heads * self.head_dim

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"the heads of {_shown(self.name, self.module)} cannot be separated: {why}. Looked for "
            f"{', '.join(_HEADS)} on the module and on its `config`; give the number with `heads=`, or leave the "
            "module out with `targets=`."
        )


def _torch_attention(name: str, module: nn.MultiheadAttention) -> Attention:
    width = module.embed_dim
    fused = module._qkv_same_embed_dim
    projections = []
    for part, start in (("q", 0), ("k", width)):
        weight = Piece(module, "in_proj_weight", start) if fused else Piece(module, f"{part}_proj_weight", 0)
        biases = [Piece(module, "in_proj_bias", start)] if module.in_proj_bias is not None else []
        if part == "k" and module.bias_k is not None:
            biases.append(Piece(module, "bias_k", 0, 2))
        projections.append(
            Projection(name, module, weight, tuple(biases), start if fused else 0, module.num_heads, module.head_dim)
        )
    query, key = projections
    return Attention(name, module, query, key, _norm_of(module))


def _norm_of(module: nn.Module) -> str | None:
    for child, value in module._modules.items():
        if value is not None and _NORM_NAME.fullmatch(child) and not isinstance(value, nn.Identity):
            return child
    # Swin V2: cosine attention with a learned temperature
    return "logit_scale" if module._parameters.get("logit_scale") is not None else None


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    holders = [module, *(config for name in _CONFIGS if (config := getattr(module, name, None)) is not None)]
    for holder in holders:
        for name in names:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _shown(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__


def has_slots(module: nn.Module) -> bool:
    """Whether a module has places for norms of queries and keys, as timm's: both an identity."""
    return all(isinstance(module._modules.get(slot), nn.Identity) for slot in SLOTS)


def check_not_tied(attentions: list[Attention]) -> None:
    """Raise a ValueError where two projections share a parameter: it would be changed twice."""
    seen: dict[tuple[int, int], str] = {}
    for attention in attentions:
        for projection in (attention.query, attention.key):
            place = id(projection.weight.parameter), projection.weight.start
            if projection.weight.parameter is not None and place in seen:
                raise ValueError(
                    f"{attention.label!r} shares the weight of a query or key projection with {seen[place]!r}: its "
                    "heads have no logits of their own. Leave both out with `targets=`."
                )
            seen[place] = attention.label
