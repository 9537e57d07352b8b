"""Puts norms on the queries and keys of each head of a model. Formula: ``lightning_reg.functional.qk_norm``.

Modules ``q_norm`` and ``k_norm`` become children of the attention, under the keys that timm and Hugging Face give them.
Where the attention has places for them (timm), its own code applies them; else a hook on the output of the projections
does, before rotary embedding; in ``nn.MultiheadAttention``, which does not call its projections, a rewrite of its
attention function. Weights that were trained with them need them: ``qk_norm_record`` describes them for a checkpoint,
``load_qk_norm`` puts them in place, ``remove_qk_norm`` takes them away.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg import capture, reparam, rewriting
from lightning_reg.attention import (
    NOTHING_FOUND,
    SLOTS,
    Attention,
    Projection,
    check_heads,
    check_not_tied,
    find_attentions,
    has_slots,
)
from lightning_reg.capture import Targets
from lightning_reg.functional.qk_norm import Norm, check_norm, qk_norm

_PLAN = "_lightning_reg_qk_norm"  # on a projection: which of its outputs are normalised by what
_REPLACED = "_lightning_reg_replaced"  # on a norm: the identity that was in its place


# --- modules ---------------------------------------------------------------------------------------------------------


class HeadNorm(nn.Module):
    """RMSNorm or LayerNorm of one head, shared by the heads of a layer.

    Args:
        head_dim: Width of a head.
        norm: ``"rms"`` or ``"layer"``.
        eps: Added to the mean square or the variance.
        affine: Learn a gain, and with ``"layer"`` a bias.
        heads: Their number, for records.
        like: Tensor whose device and dtype the parameters get.

    Example:
        >>> HeadNorm(2, "rms")(torch.tensor([3.0, 3.0])).tolist()
        [0.9999999403953552, 0.9999999403953552]
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        norm: Norm = "rms",
        eps: float = 1e-6,
        affine: bool = True,
        heads: int = 1,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_norm(norm, eps)
        self.head_dim, self.norm, self.eps, self.affine, self.heads = head_dim, norm, float(eps), affine, heads
        floating = like is not None and like.is_floating_point()
        where: dict[str, Any] = (
            {} if like is None else {"device": like.device, "dtype": like.dtype if floating else None}
        )
        self.weight = nn.Parameter(torch.ones(head_dim, **where)) if affine else None
        self.bias = nn.Parameter(torch.zeros(head_dim, **where)) if affine and norm == "layer" else None
        self.fired = False  # it has run

    def forward(self, x: Tensor) -> Tensor:
        """Queries or keys of the shape and dtype of ``x``, (..., head_dim)."""
        self.fired = True
        return qk_norm(x, self.weight, self.bias, norm=self.norm, eps=self.eps)

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"{self.head_dim}, {self.norm!r}, eps={self.eps:g}, affine={self.affine}"


class _Plan:
    """Which outputs of a projection are normalised, by head: (first output, heads, norm), in order."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int, HeadNorm]] = []

    def add(self, projection: Projection, norm: HeadNorm) -> None:
        self.parts = sorted([*self.parts, (projection.start, projection.heads, norm)], key=lambda part: part[0])

    def __call__(self, output: Tensor) -> Tensor:
        """``output`` (..., features) with its parts normalised."""
        pieces, at = [], 0
        for start, heads, norm in self.parts:
            end = start + heads * norm.head_dim
            pieces.append(output[..., at:start])
            pieces.append(norm(output[..., start:end].unflatten(-1, (heads, norm.head_dim))).flatten(-2))
            at = end
        pieces = [piece for piece in (*pieces, output[..., at:]) if piece.shape[-1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _normalise_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return module.__dict__[_PLAN](output)


class _NormaliseInside(rewriting.Rewrite):
    """Norms of an attention that does not call its projections."""

    kind = "qk_norm"
    order = -1  # before what looks at the logits

    def attention(
        self, module: nn.Module, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        **arguments: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of the normalised queries and keys."""
        query, key = (module._modules[slot](x) for slot, x in zip(SLOTS, (query, key), strict=True))  # type: ignore[misc]
        return attend(query, key, value, **arguments)

    def scores(self, module: nn.Module, scores: Tensor, dim: int) -> Tensor:
        """Refuse: queries and keys are multiplied already."""
        raise RuntimeError(
            "QK-norm cannot reach the queries and keys of nn.MultiheadAttention when it returns its weights. Call it "
            "with `need_weights=False`, or leave it out with `targets=`."
        )


# --- insertion -------------------------------------------------------------------------------------------------------


def apply_qk_norm(
    model: nn.Module,
    *,
    norm: Norm = "rms",
    eps: float = 1e-6,
    affine: bool = True,
    targets: Targets = None,
    heads: int | None = None,
) -> list[str]:
    """Put norms on the queries and keys of each attention, in place; those that have ours keep them.

    Needed only where the callback comes too late, or in a hand-written loop: call it before the optimizer is built.

    Args:
        model: Model whose weights exist.
        norm: As for ``QKNorm``.
        eps: As for ``QKNorm``.
        affine: As for ``QKNorm``.
        targets: As for ``QKNorm``.
        heads: As for ``QKNorm``.

    Returns:
        Names of the attentions that got norms.

    Raises:
        ValueError: If an argument is invalid, nothing is found, or an attention cannot have them; nothing has changed.
        RuntimeError: If a weight is sharded.
    """
    check_norm(norm, eps)
    check_heads(heads)
    attentions = find_attentions(model, targets=targets, heads=heads)
    if not attentions:
        raise ValueError(NOTHING_FOUND.format("QKNorm"))
    return insert(attentions, norm, eps, affine)


def insert(attentions: list[Attention], norm: Norm, eps: float, affine: bool) -> list[str]:
    """Put norms on attentions that have none of ours; all of them are checked before one is changed."""
    new = [attention for attention in attentions if not is_normalised(attention.module)]
    check_not_tied(new)
    for attention in new:
        _check_insertable(attention)
    rewrite = _NormaliseInside()
    for attention in new:
        projections = attention.query, attention.key
        norms = [_new(part, norm, eps, affine).train(attention.module.training) for part in projections]
        slots = has_slots(attention.module)
        for slot, projection, own in zip(SLOTS, projections, norms, strict=True):
            if slots:
                own.__dict__[_REPLACED] = attention.module._modules[slot]
            attention.module._modules[slot] = own
            if not slots and not isinstance(attention.module, nn.MultiheadAttention):
                _hook(projection, own)
        if isinstance(attention.module, nn.MultiheadAttention):
            rewriting.install(attention.module, rewrite, attention.name)
    return [attention.name for attention in new]


def _new(part: Projection, norm: Norm, eps: float, affine: bool) -> HeadNorm:
    return HeadNorm(part.head_dim, norm, eps, affine, part.heads, part.weight.parameter)


def is_normalised(module: nn.Module) -> bool:
    """Whether an attention has norms of ours."""
    return all(isinstance(module._modules.get(slot), HeadNorm) for slot in SLOTS)


def norms_of(model: nn.Module) -> dict[str, tuple[HeadNorm, HeadNorm]]:
    """Norms of queries and keys by attention."""
    modules = capture.named_modules(model).items()
    return {
        name: (module._modules["q_norm"], module._modules["k_norm"])  # type: ignore[misc]
        for name, module in modules
        if is_normalised(module)
    }


def _check_insertable(attention: Attention) -> None:
    if attention.norm is not None:
        raise ValueError(
            f"{attention.label!r} normalises its queries and keys already ({attention.norm!r}). Leave it out with "
            "`targets=`, or remove QKNorm."
        )
    taken = [slot for slot in SLOTS if hasattr(attention.module, slot)]
    if taken and not has_slots(attention.module):
        raise ValueError(
            f"{attention.label!r} has an attribute {taken[0]!r} of its own. Give it an `nn.Identity` as `q_norm` and "
            "`k_norm` that its forward calls by head, or leave it out with `targets=`."
        )
    for projection in (attention.query, attention.key):
        parameter = projection.weight.parameter
        if parameter is not None and reparam.is_sharded(parameter):
            raise RuntimeError(
                f"the weight of {projection.name!r} is sharded already. Call `apply_qk_norm(net)` of "
                "`lightning_reg.qk_norm` in `configure_model` before `fully_shard`, or create the net in `__init__`."
            )
        if isinstance(projection.module, nn.Conv2d) and not has_slots(attention.module):
            raise ValueError(
                f"{projection.name!r} is a convolution, whose channels are not the last axis, and {attention.label!r} "
                "has no `nn.Identity` as `q_norm` and `k_norm`. Add them, or leave it out with `targets=`."
            )


def _hook(projection: Projection, norm: HeadNorm) -> None:
    if _PLAN not in projection.module.__dict__:
        # past `nn.Module.__setattr__`: the norms belong to the attention, not to the projection too
        projection.module.__dict__[_PLAN] = _Plan()
        projection.module.register_forward_hook(_normalise_output)
    projection.module.__dict__[_PLAN].add(projection, norm)


# --- undo ------------------------------------------------------------------------------------------------------------


def remove_qk_norm(model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Take the norms away, also from a copy of the model. The weights that were trained with them need them.

    Args:
        model: The model.
        names: Attentions to undo; all when left out.

    Returns:
        Names of the attentions that had norms; empty when there are none.
    """
    modules = capture.named_modules(model)
    found = [name for name in norms_of(model) if names is None or name in names]
    for name in found:
        module = modules[name]
        norms: list[Any] = [module._modules[slot] for slot in SLOTS]
        for slot, norm in zip(SLOTS, norms, strict=True):
            if _REPLACED in norm.__dict__:
                module._modules[slot] = norm.__dict__[_REPLACED]
            else:
                del module._modules[slot]
        rewriting.remove(module, _NormaliseInside.kind)
        for child in module.modules():
            _unhook(child, norms)
    return found


def _unhook(module: nn.Module, norms: list[HeadNorm]) -> None:
    plan = module.__dict__.get(_PLAN)
    if plan is None or not any(norm is own for _, _, norm in plan.parts for own in norms):
        return
    del module.__dict__[_PLAN]
    for key in [key for key, hook in module._forward_hooks.items() if hook is _normalise_output]:
        del module._forward_hooks[key]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def qk_norm_record(model: nn.Module, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """The norms of a model, or of some of its attentions, in plain values that a checkpoint can hold."""
    return {
        name: {key: getattr(query, key) for key in ("norm", "eps", "affine", "heads", "head_dim")}
        for name, (query, _) in norms_of(model).items()
        if names is None or name in names
    }


def load_qk_norm(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[str]:
    """Put the norms in place that a model was trained with, with their gains; those that are there already stay.

    Args:
        model: Model as it was before the training.
        checkpoint: A Lightning checkpoint of the trained model, or its ``qk_norm_record``.

    Returns:
        Names of the attentions that got norms.

    Raises:
        ValueError: If the record does not fit the model, or there is none; nothing has changed then.
    """
    entries = _entries(checkpoint)
    modules = capture.named_modules(model)
    missing = [name for name in entries if name not in modules]
    if missing:
        raise ValueError(
            f"the checkpoint has norms in {', '.join(missing)}, which this model does not have: load it into the model "
            "it was trained with."
        )
    wanted = [name for name in entries if not is_normalised(modules[name])]
    plan = [(_attention_of(model, name, entries[name]), entries[name]) for name in wanted]
    check_not_tied([attention for attention, _ in plan])
    for attention, _ in plan:
        _check_insertable(attention)
    for attention, entry in plan:
        insert([attention], entry["norm"], entry["eps"], entry["affine"])
    _load_gains(model, wanted, checkpoint.get("state_dict", {}))
    return wanted


def _attention_of(model: nn.Module, name: str, entry: Mapping[str, Any]) -> Attention:
    found = find_attentions(model, targets=lambda own, _: own == name, heads=entry["heads"])
    first = next((attention for attention in found if attention.name == name), None)
    if first is None or first.query.head_dim != entry["head_dim"]:
        raise ValueError(
            f"the checkpoint has norms of heads of width {entry['head_dim']} in {name!r}, which this model has not: "
            "load it into the model it was trained with."
        )
    return first


@torch.no_grad()
def _load_gains(model: nn.Module, names: list[str], state: Mapping[str, Any]) -> None:
    for name in names:
        for slot, norm in zip(SLOTS, norms_of(model)[name], strict=True):
            for part, parameter in norm.named_parameters():
                saved = state.get(f"{name}.{slot}.{part}".lstrip("."))
                if saved is not None:
                    parameter.copy_(saved)


def _entries(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    if "callbacks" not in checkpoint:
        return dict(checkpoint)
    states = [state.get("qk_norm") for state in checkpoint["callbacks"].values() if isinstance(state, Mapping)]
    found = {name: entry for state in states if isinstance(state, Mapping) for name, entry in state.items()}
    if not found:
        raise ValueError("the checkpoint holds no norms of queries and keys: it was trained without QKNorm.")
    return found
