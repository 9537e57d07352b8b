"""Reads attention out of what a multiple-instance model returns, whatever its layout.

Frameworks differ in where the attention is, before or after the softmax, which axis holds the instances, and how
padding is hidden. A ``MilAdapter`` says so; ``ADAPTERS`` holds the published layouts by name. A ``MilReader`` applies
one call after call, and refuses what would be silently wrong: probabilities taken for scores (a second softmax is
nearly uniform), products that are no distribution (Nystrom attention, weights after dropout), padding that counts, and
a wrong axis.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_reg.functional.attention_entropy import (
    MASKED_BIAS,
    attention_entropy_from_probs,
    normalize_entropy,
    scores_tap,
    visible_keys,
)

Step = str | int
Path = Step | Sequence[Step] | Callable[[Any], Any]
Kind = Literal["auto", "scores", "probs"]

ROUNDING = 1e-3  # of the sum of a row of probabilities
HALF_ROUNDING = 2e-2
NEAR_ONE = 0.5  # products of softmaxes and weights after dropout sum to 1 give or take this; scores only by chance


@dataclass(frozen=True)
class MilAdapter:
    """Where the attention is in the output of a multiple-instance model, and how to read it.

    Args:
        path: Keys, indices and attribute names that lead to the attention, one or a sequence; or a function of the
            output. Empty where the output is the attention. It ends at a tensor, or a list of one tensor for each bag.
        kind: ``scores`` before the softmax, ``probs`` after it; ``auto`` takes rows >= 0 that sum to 1 for
            probabilities and anything else for scores, and refuses what could be either.
        instance_axis: Axis of the instances.
        bag_axis: Axis of the bags; None where the attention is that of one bag. Every other axis (branches, heads,
            classes) is averaged: the mean of the entropies, not the entropy of the mean.
        mask_path: As ``path``, to the mask of valid instances in the output: (bags, instances), 1 = valid. Scores at or
            below ``MASKED_BIAS`` are hidden in any case.
        needs_mask: The model leaves its padding in the attention, so several bags at once need a mask.

    Example:
        >>> adapter = MilAdapter(path=("log", "attention"), kind="scores")
        >>> adapter.entropy({"log": {"attention": torch.zeros(1, 4)}}, normalize=True)
        tensor([[1.]])
    """

    path: Path = ()
    kind: Kind = "auto"
    instance_axis: int = -1
    bag_axis: int | None = None
    mask_path: Path | None = None
    needs_mask: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _as_path("path", self.path))
        if self.mask_path is not None:
            object.__setattr__(self, "mask_path", _as_path("mask_path", self.mask_path))
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        axes = [("instance_axis", self.instance_axis)]
        axes += [] if self.bag_axis is None else [("bag_axis", self.bag_axis)]
        for name, axis in axes:
            if isinstance(axis, bool) or not isinstance(axis, int):
                raise TypeError(f"`{name}` must be an integer, got {axis!r}.")
        if self.instance_axis == self.bag_axis:
            raise ValueError(f"`instance_axis` and `bag_axis` must differ, got {self.bag_axis} for both.")

    def entropy(
        self, output: Any, *, mask: Tensor | None = None, normalize: bool = False, top_k: int | None = None
    ) -> Tensor:
        """Entropy of the attention in one output.

        Args:
            output: What the model returned.
            mask: Valid instances, (bags, instances), 1 = valid.
            normalize: Divide by log(valid instances).
            top_k: Entropy of the ``top_k`` largest weights only.

        Returns:
            (bags, branches), float32 or float64; nats, or [0, 1] when normalised; 0 where there is no choice.
        """
        entropy, visible = MilReader(self).read(output, mask, top_k)
        return (normalize_entropy(entropy, visible) if normalize else entropy).squeeze(-1)

    def bags(self, output: Any, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """Attention (bags, branches, instances) and valid instances (bags, 1, instances) or None.

        One pair, or one for each bag of a list.

        Raises:
            ValueError: If the path, an axis or a mask does not fit, or padding would count.
        """
        found = _follow(output, self.path, "path")
        ragged = isinstance(found, list)
        attention = [self._as_rows(entry, output) for entry in (found if ragged else [found])]
        if not attention:
            raise ValueError(f"the attention at `path` {self._shown} is an empty list: there are no bags.")
        inside = None if self.mask_path is None else _follow(output, self.mask_path, "mask_path")
        given = [given for given in (mask, inside) if given is not None]
        if self.needs_mask and not given and not ragged and attention[0].shape[0] > 1:
            raise ValueError(
                "this model leaves its padding in the attention, so it would count as instances: give `mask=`, the key "
                "or index of the batch's valid instances (bags, instances), or a function of the batch."
            )
        return [
            (rows, _and(_as_valid(entry, rows, index if ragged else None, len(attention)) for entry in given))
            for index, rows in enumerate(attention)
        ]

    def describe(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers and checkpoints."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @property
    def _shown(self) -> str:
        return repr(_plain(self.path))

    def _as_rows(self, attention: Any, output: Any) -> Tensor:
        if not isinstance(attention, Tensor) or not torch.is_floating_point(attention):
            given = structure(attention)
            if attention is None:
                given = "None: ask the model for its attention, as with `return_attention=True`"
            raise ValueError(
                f"`path` {self._shown} must lead to a floating-point tensor, or a list of them, but leads to {given}. "
                f"The model returns {structure(output)}."
            )
        sizes = tuple(attention.shape)
        for name, axis in (("instance_axis", self.instance_axis), ("bag_axis", self.bag_axis)):
            if axis is not None and not -len(sizes) <= axis < len(sizes):
                raise ValueError(f"`{name}` {axis} is not an axis of the attention, which is {sizes}.")
        if self.bag_axis is None:
            moved = attention.movedim(self.instance_axis, -1).unsqueeze(0)
        elif self.bag_axis % len(sizes) == self.instance_axis % len(sizes):
            raise ValueError(
                f"`instance_axis` {self.instance_axis} and `bag_axis` {self.bag_axis} are the same axis of the "
                f"attention, which is {sizes}."
            )
        else:
            moved = attention.movedim((self.bag_axis, self.instance_axis), (0, -1))
        return moved.unsqueeze(1) if moved.dim() == 2 else moved.flatten(1, -2)


def as_adapter(adapter: str | MilAdapter) -> MilAdapter:
    """An adapter, or the published one of a name.

    Raises:
        ValueError: If there is none of that name; the message lists them.
        TypeError: If it is neither.
    """
    if isinstance(adapter, MilAdapter):
        return adapter
    if not isinstance(adapter, str):
        raise TypeError(
            f"`adapter` must be a MilAdapter or one of {', '.join(ADAPTERS)}, got {type(adapter).__name__}."
        )
    if adapter not in ADAPTERS:
        near = difflib.get_close_matches(adapter, ADAPTERS, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`adapter` must be one of {', '.join(ADAPTERS)}, got {adapter!r}.{meant} For another model say where its "
            "attention is with `lightning_reg.mil.MilAdapter`."
        )
    return ADAPTERS[adapter]


class MilReader:
    """Reads the calls of one training: settles what the attention is at the first, and watches the others.

    Args:
        adapter: How to read a call.
        single: All calls are of one module, so that their layout is one.
    """

    def __init__(self, adapter: MilAdapter, single: bool = True) -> None:
        self.adapter, self.single = adapter, single
        self.kind: Kind = adapter.kind
        self.settled = False  # `kind` is known to fit
        self.has_choice = self.had_choice = False  # a bag of more than one instance: in the last call, in any
        self.sizes: tuple[int, int] | None = None  # branches and instances of the first call
        self.same_instances = True

    def read(self, output: Any, mask: Tensor | None = None, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """Entropy in nats and visible instances of the bags of a call, (bags, branches, 1).

        Raises:
            ValueError: If the attention is not what the adapter says, naming the remedy.
        """
        bags = self.adapter.bags(output, mask)
        if not torch.compiler.is_compiling():
            self._check_axis(bags)
        self.has_choice = any(rows.shape[-1] > 1 for rows, _ in bags)
        self.had_choice |= self.has_choice
        kind = self._settle(bags)
        entropies, counts = zip(*(_entropy(rows, valid, kind, top_k) for rows, valid in bags), strict=True)
        return torch.cat(entropies).unsqueeze(-1), torch.cat(counts).unsqueeze(-1)

    def _check_axis(self, bags: list[tuple[Tensor, Tensor | None]]) -> None:
        """Bags differ in their instances, not in their branches."""
        for rows, _ in bags:
            branches, instances = rows.shape[1:]
            first = self.sizes = self.sizes or (branches, instances)
            self.same_instances &= instances == first[1]
            if self.single and self.same_instances and branches != first[0]:
                raise ValueError(
                    f"`instance_axis` {self.adapter.instance_axis} always has {instances} entries, while another axis "
                    f"of the attention has {branches} here and had {first[0]} before: that is where the instances are. "
                    "Set `MilAdapter(instance_axis=...)`, and `bag_axis` where there are several bags."
                )
        if len({rows.shape[1] for rows, _ in bags}) > 1:
            raise ValueError(
                f"the bags of a list must have the same branches, got {[tuple(rows.shape[1:]) for rows, _ in bags]} "
                "(branches, instances): choose other axes with `MilAdapter(instance_axis=..., bag_axis=...)`."
            )

    def _settle(self, bags: list[tuple[Tensor, Tensor | None]]) -> Kind:
        """``scores`` or ``probs``."""
        if torch.compiler.is_compiling():
            if self.kind == "auto":
                raise ValueError("`kind='auto'` has to look at values, which compiled code cannot: set `kind`.")
            return self.kind
        if not self.has_choice or (self.settled and self.kind == "scores"):
            return "scores" if self.kind == "auto" else self.kind
        facts, where = _Facts(bags), f"the attention at `path` {self.adapter._shown}"
        if facts.blind:
            raise ValueError(
                f"{where} is masked wherever `mask` says that instances are valid: `mask` must be 1 for valid "
                "instances and 0 for padding. Give its complement, or find out why the model masks the others."
            )
        if not facts.choice:
            return "scores" if self.kind == "auto" else self.kind
        if self.kind == "auto":
            self.kind = facts.guess(where)
        elif self.kind == "probs":
            facts.check_probs(where)
        else:
            facts.check_scores(where)
        self.settled = True
        return self.kind


class _Facts:
    """What one look at the attention tells about its rows with a choice, in one copy from the device."""

    def __init__(self, bags: list[tuple[Tensor, Tensor | None]]) -> None:
        half = bags[0][0].dtype in (torch.float16, torch.bfloat16)
        looks = [_look(rows.detach(), valid, HALF_ROUNDING if half else ROUNDING) for rows, valid in bags]
        any_of, all_of, sums, negative = (torch.stack(part) for part in zip(*looks, strict=True))
        seen = torch.stack([sums[:, 0].amin(), sums[:, 1].amax(), negative.mean()])
        flags, numbers = torch.cat([any_of.any(0), all_of.all(0), seen]).split([7, 3])
        self.choice, self.filled, self.blind, self.sums, self.sums_padded, self.sums_across, self.near = flags.tolist()
        low, high, share = numbers.tolist()
        self.seen = f"rows sum to {low:.3g} ... {high:.3g}, {share:.0%} of the entries are negative"

    def guess(self, where: str) -> Kind:
        if self.filled:
            return "scores"
        if self.sums:
            return "probs"
        if self.near or self.sums_padded or self.sums_across:
            self._refuse(where, "either scores or a product that is no distribution")
        return "scores"

    def check_probs(self, where: str) -> None:
        if not self.sums:
            self._refuse(where, "no distribution over the valid instances")

    def check_scores(self, where: str) -> None:
        if not self.filled and (self.sums or self.sums_padded):
            raise ValueError(
                f"{where} is already a distribution (rows >= 0 that sum to 1), so a softmax over it would be nearly "
                "uniform: set `MilAdapter(kind='probs')`."
            )
        if not self.filled and self.sums_across:
            self._refuse(where, "a distribution along another axis than `instance_axis`")

    def _refuse(self, where: str, what: str) -> None:
        if self.sums_padded:
            remedy = (
                "The rows sum to 1 only with the instances that `mask` hides: the model's softmax ran over its "
                "padding. Hide it there before the softmax, or return the scores and set `kind='scores'`."
            )
        elif self.sums_across:
            remedy = "They sum to 1 along another axis: set `MilAdapter(instance_axis=...)`."
        else:
            remedy = (
                "For scores before the softmax set `MilAdapter(kind='scores')`; return weights as they are before "
                "dropout; of Nystrom attention take one of its landmark softmaxes, or leave `adapter` out to catch "
                "them."
            )
        raise ValueError(f"{where} is {what}: {self.seen}. {remedy}")


def _look(attention: Tensor, valid: Tensor | None, rounding: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flags to join by or, flags to join by and, smallest and largest sum of a row, share of negative entries.

    Of attention (bags, branches, instances); rows without a choice say nothing.
    """
    exact = attention if attention.dtype == torch.float64 else attention.float()
    filled = exact <= MASKED_BIAS
    shown = ~filled if valid is None else valid & ~filled
    choice = shown.sum(-1) > 1
    inside = exact.masked_fill(~shown, 0.0)
    total = inside.sum(-1)
    blind = torch.zeros_like(choice) if valid is None else (valid.sum(-1) > 1) & ~shown.any(-1)
    near = _is_near_one(total, choice, (inside >= 0).all())
    across = _sums_to_one(exact, 1, rounding).all() if exact.shape[1] > 1 else torch.zeros_like(near)
    along = [_sums_to_one(inside, -1, rounding), _sums_to_one(exact, -1, rounding)]
    sums = torch.stack([total.masked_fill(~choice, math.inf).amin(), total.masked_fill(~choice, -math.inf).amax()])
    return (
        torch.stack([choice.any(), filled.any(), blind.any()]),
        torch.stack([*((flag | ~choice).all() for flag in along), across, near]),
        sums,
        (inside < 0).float().mean(),
    )


def _is_near_one(total: Tensor, choice: Tensor, positive: Tensor) -> Tensor:
    """Whether rows sum to about 1; those of weights after dropout do so in their mean only."""
    rows = choice.sum()
    off = (total - 1).masked_fill(~choice, 0.0)
    return (rows == 0) | (off.abs().sum() <= NEAR_ONE * rows) | (positive & (off.sum().abs() <= NEAR_ONE * rows))


def _sums_to_one(attention: Tensor, dim: int, rounding: float) -> Tensor:
    return (attention >= 0).all(dim) & ((attention.sum(dim) - 1).abs() <= rounding)


def _entropy(rows: Tensor, valid: Tensor | None, kind: Kind, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Entropy in nats and visible instances (bags, branches) of attention (bags, branches, instances)."""
    if kind == "scores":
        _, entropy, visible = scores_tap(rows, mask=valid, top_k=top_k)
        return entropy, visible
    visible = visible_keys(rows, valid, -1)
    if top_k is not None and top_k < rows.shape[-1]:
        # the softmax of the largest scores, which are those of the largest probabilities
        kept = (rows if valid is None else rows.masked_fill(~valid, 0.0)).topk(top_k).values
        total = kept.sum(-1, keepdim=True)
        rows, valid, visible = kept / total.clamp_min(torch.finfo(total.dtype).tiny), None, visible.clamp_max(top_k)
    return attention_entropy_from_probs(rows, mask=valid), visible


# --- paths and masks -------------------------------------------------------------------------------------------------


def structure(value: Any, depth: int = 3) -> str:
    """What a value holds, for messages: ``tuple(0: Tensor (1, 2), 1: dict(attention: None))``."""
    if isinstance(value, Tensor):
        return f"Tensor {tuple(value.shape)}"
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        return "None" if value is None else type(value).__name__
    if not depth:
        return f"{type(value).__name__}(...)"
    return f"{type(value).__name__}({', '.join(f'{key}: {structure(entry, depth - 1)}' for key, entry in items[:12])})"


def _as_path(name: str, path: Any) -> Path:
    if callable(path):
        return path
    steps = (path,) if isinstance(path, (str, int)) else path
    if not isinstance(steps, Sequence) or any(isinstance(s, bool) or not isinstance(s, (str, int)) for s in steps):
        raise TypeError(
            f"`{name}` must be keys, indices or attribute names, or a function of the output, got {path!r}."
        )
    return tuple(steps)


def _follow(output: Any, path: Any, name: str) -> Any:
    try:
        if callable(path):
            return path(output)
        value = output
        for step in path:
            value = _take(value, step)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{name}` {_plain(path)!r} is not in what the model returns, which is {structure(output)}."
        ) from error
    return value


def _take(value: Any, step: Step) -> Any:
    if isinstance(value, Mapping) or (isinstance(step, int) and not isinstance(value, Tensor)):
        return value[step]  # type: ignore[index]
    if isinstance(step, int):
        raise TypeError("a tensor has no parts")
    return getattr(value, step)


def _as_valid(mask: Any, rows: Tensor, bag: int | None, bags: int) -> Tensor:
    """Valid instances (bags, 1, instances) of ``rows``; of a list of ``bags`` those of number ``bag``."""
    if bag is None:
        shape = (rows.shape[0], rows.shape[-1])
    else:
        if len(mask) != bags:
            raise ValueError(f"`mask` must have a row for each of the {bags} bags of the list, got {len(mask)}.")
        mask, shape = mask[bag], (1, rows.shape[-1])
        # a row of a padded mask says of a bag without padding what its first entries say
        mask = mask[..., : shape[1]] if isinstance(mask, Tensor) and mask.dim() == 1 else mask
    if not isinstance(mask, Tensor):
        raise ValueError(f"`mask` must be a tensor, got {type(mask).__name__}.")
    given = tuple(mask.shape)
    mask = mask.unsqueeze(0) if mask.dim() == 1 and shape[0] == 1 else mask
    if mask.shape != shape:
        raise ValueError(f"`mask` must be (bags, instances) = {shape}, 1 for valid instances, got {given}.")
    if torch.is_floating_point(mask) and not torch.compiler.is_compiling() and bool((mask < 0).any()):
        raise ValueError(
            "`mask` must be 1 for valid instances and 0 for padding, got negative entries: for an additive mask give "
            "`mask == 0`."
        )
    return mask.to(rows.device).bool().unsqueeze(1)


def _and(masks: Iterator[Tensor]) -> Tensor | None:
    joined = None
    for mask in masks:
        joined = mask if joined is None else joined & mask
    return joined


def _plain(value: Any) -> Any:
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return list(value) if isinstance(value, tuple) else value


# --- published layouts ----------------------------------------------------------------------------------------------

ADAPTERS: dict[str, MilAdapter] = {
    # classes before, attention of one bag (1, N), or by class (C, N)
    "clam": MilAdapter(path=3, kind="scores"),
    # (probability, label, A), A (K, N) after its softmax
    "abmil": MilAdapter(path=2, kind="probs"),
    # (instance classes, bag prediction, A, B), A (N, C) after a softmax over the instances
    "dsmil": MilAdapter(path=2, kind="probs", instance_axis=0),
    # the DSMIL of the AEM and ACMIL repositories: (instance classes, bag prediction, A), A (C, N) before its softmax
    "dsmil_aem": MilAdapter(path=2, kind="scores"),
    # (branch predictions, bag prediction, A), A (1, K, N) with -1e9 where instances are dropped
    "acmil": MilAdapter(path=2, kind="scores"),
    # (prediction, A), A (1, 1, N)
    "aem_abmil": MilAdapter(path=1, kind="scores"),
    # (prediction, A), A (H, 1, N)
    "aem_mha": MilAdapter(path=1, kind="scores"),
    # (prediction, f) of `return_att=True`, f (B, N) with the padding left in
    "torchmil": MilAdapter(path=1, kind="scores", bag_axis=0, needs_mask=True),
    # (features, A) of `return_raw_attention=True`, A (B, branches, H, N) with -1e9 on padding
    "trident": MilAdapter(path=1, kind="scores", bag_axis=0),
    # (results, log) of `return_attention=True`, log["attention"] (B, K, N) with finfo.min on padding, or a list
    "mil_lab": MilAdapter(path=(1, "attention"), kind="scores", bag_axis=0),
}
