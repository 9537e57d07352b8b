"""Changes what an attention computes, in training and evaluation alike, in any module that computes one.

A ``Rewrite`` is put on modules. While one of them runs, the attention functions that it calls, which ``capture.py``
replaces for as long as there is a rewrite, first go through it: with queries, keys and values where the module calls
``F.scaled_dot_product_attention``, with scores where it calls softmax. Regularizers and monitors see what comes out.
A rewritten module has a subclass of its class, one for all of that class, so that compiled blocks still share code.
"""

import copy
import re
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg import capture, classes
from lightning_reg.capture import Targets

REWRITTEN = "rewritten"  # kind of the class of a module with rewrites
_OTHER_NAME = re.compile(r"norm|mlp|feed_?forward|ffn|embed|rotary|act(ivation)?(_fn)?\b|drop|loss", re.IGNORECASE)
_installed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_holding = False  # the attention functions are replaced, and the fast paths are off
_fast_path = True  # as it was before
_kinds: dict[str, type["Rewrite"]] = {}


class Rewrite:
    """One way to change attention. Shared by the modules it is put on, also by copies of them.

    Its arguments are plain values, kept as attributes of the same names, so that a checkpoint can hold them.
    """

    kind = ""  # its name in checkpoints, one a module
    order = 0  # of application
    active = True  # False leaves attention as it is
    fired = False  # it has changed an attention

    def __init_subclass__(cls) -> None:
        """Make the kind known to ``load``."""
        _kinds[cls.kind] = cls

    def attention(
        self, module: nn.Module, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        **arguments: Any,
    ) -> Tensor:  # fmt: skip
        """Output of an attention; ``attend`` and ``arguments`` are those of ``F.scaled_dot_product_attention``."""
        raise NotImplementedError

    def scores(self, module: nn.Module, scores: Tensor, dim: int) -> Tensor:
        """Scores that enter a softmax over ``dim``, hidden keys at or below ``MASKED_BIAS``."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """What makes an equal rewrite again."""
        return {}

    def __deepcopy__(self, memo: dict) -> "Rewrite":
        return self


class _Rewritten(nn.Module):
    """First base of the classes of rewritten modules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _hold(self)  # it may be a copy, also from another process
        capture.rewriting.append(self)
        try:
            return super().forward(*args, **kwargs)
        finally:
            capture.rewriting.pop()

    def __deepcopy__(self, memo: dict) -> nn.Module:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        _hold(copied)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        if classes.kinds_of(self) != [REWRITTEN]:
            return super().__reduce_ex__(protocol)  # classes of others, which say how, or that they cannot
        return _remake, (classes.bare_class(self),), self.__getstate__()


def _remake(plain: type) -> nn.Module:
    module: nn.Module = object.__new__(_rewritten_class(plain))
    _hold(module)  # now: a fast path would not enter its forward
    return module


@cache
def _rewritten_class(plain: type) -> type:
    own = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    if issubclass(plain, nn.MultiheadAttention):
        # compiled code would enter it without its Python, and so without what is rewritten
        own["forward"] = torch.compiler.disable(_Rewritten.forward)
    return type(plain.__name__, (_Rewritten, plain), {**own, **classes.marked(REWRITTEN, plain, _rewritten_class)})


class _Rewrites(dict[str, Rewrite]):
    """Rewrites of a module by kind, in the order in which they apply."""

    def __init__(self, path: str, explicit: bool) -> None:
        super().__init__()
        self.path, self.explicit = path, explicit

    def add(self, rewrite: Rewrite) -> None:
        self[rewrite.kind] = rewrite
        for kind in sorted(self, key=lambda kind: self[kind].order):
            self[kind] = self.pop(kind)


def install(module: nn.Module, rewrite: Rewrite, name: str = "", explicit: bool = False) -> None:
    """Let ``rewrite`` change the attention of a module, in place of another of its kind.

    The fast path of ``nn.TransformerEncoder`` does not run its modules: while there is a rewrite, it is off.

    Args:
        module: In whose forward the attention is computed.
        rewrite: What to do.
        name: Of the module in its model.
        explicit: Any softmax in its forward is attention.
    """
    if rewrites_of(module).get(rewrite.kind) is rewrite:
        return
    module.__dict__.setdefault(capture.REWRITES, _Rewrites(f"{name} {type(module).__name__}", explicit)).add(rewrite)
    if not isinstance(module, _Rewritten):
        classes.put_on(module, _rewritten_class)
    _hold(module)


def remove(module: nn.Module, kind: str) -> None:
    """Counterpart of ``install``; the last one makes the module plain. No-op when it is not there."""
    rewrites = module.__dict__.get(capture.REWRITES, {})
    rewrites.pop(kind, None)
    if rewrites or not isinstance(module, _Rewritten):
        return
    if classes.take_off(module, REWRITTEN):
        module.__dict__.pop(capture.REWRITES, None)
    _installed.discard(module)
    release_unused()


def _hold(module: nn.Module) -> None:
    """Keep the attention functions replaced, and the fast paths off, while ``module`` lives."""
    global _holding, _fast_path
    _installed.add(module)
    if not _holding:
        _holding, _fast_path = True, torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        capture.hold_attention(capture.REWRITES)


def release_unused() -> None:
    """Put torch's attention functions back when no module with a rewrite is left. No-op otherwise.

    Called where trainings begin and end, not when the last module dies, which may be in the middle of a compilation.
    """
    global _holding
    if _holding and not any(True for _ in _installed):  # its length counts those that are dying
        _holding = False
        capture.release_attention(capture.REWRITES)
        torch.backends.mha.set_fastpath_enabled(_fast_path)


def remove_all(root: nn.Module, kind: str) -> list[str]:
    """Names of the modules from which a kind was removed."""
    found = find(root, kind)
    for module in found.values():
        remove(module, kind)
    return list(found)


def find(root: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Modules that have a rewrite of this kind, by name."""
    return {name: module for name, module in capture.named_modules(root).items() if kind in rewrites_of(module)}


def rewrites_of(module: nn.Module) -> Mapping[str, Rewrite]:
    """Rewrites of a module by kind."""
    return module.__dict__.get(capture.REWRITES, {})


def record(root: nn.Module, kind: str) -> dict[str, dict[str, Any]]:
    """Rewrites of one kind as plain values: arguments by module."""
    return {
        name: {"explicit": module.__dict__[capture.REWRITES].explicit, **rewrites_of(module)[kind].arguments()}
        for name, module in find(root, kind).items()
    }


def load(
    root: nn.Module, kind: str, saved: Mapping[str, Mapping[str, Any]], rewrite: Rewrite | None = None
) -> list[str]:
    """Counterpart of ``record``; returns the names of the modules. A ``rewrite`` takes the place of the saved one.

    Raises:
        ValueError: If a module is missing; nothing is changed then.
    """
    modules = capture.named_modules(root)
    if missing := [name for name in saved if name not in modules]:
        raise ValueError(
            f"the checkpoint has a {kind} in the attention {missing[0]!r}, which this model has not: build the model "
            "that was trained, or rename the record's modules as you rename the weights."
        )
    shared: dict[str, Rewrite] = {}
    for name, entry in saved.items():
        arguments = {key: value for key, value in entry.items() if key != "explicit"}
        own = rewrite or shared.setdefault(str(sorted(arguments.items())), _kinds[kind](**arguments))
        install(modules[name], own, name, entry["explicit"])
    return list(saved)


def install_everywhere(root: nn.Module, rewrite: Rewrite, targets: Targets = None) -> list[str]:
    """Install where ``select_modules`` says, in place of others of its kind; returns the names of those without one."""
    modules, candidates = capture.named_modules(root), capture.attention_candidates(root)
    selected = capture.explicit_targets(targets, root) or set()
    new = []
    for name in select_modules(targets, root):
        if rewrite.kind not in rewrites_of(modules[name]):
            new.append(name)
        # a parent that was named may compute a softmax of its own that is no attention
        install(modules[name], rewrite, name, name in selected and _computes(name, candidates))
    return new


def select_modules(targets: Targets, root: nn.Module) -> list[str]:
    """Modules that compute attention: those ``targets`` selects, or those below them; found when it is left out.

    Found are modules of the model's own code whose name says attention, or that hold no other such module and are not
    called a norm, an MLP or the like.

    Raises:
        ValueError: If there are none.
    """
    candidates = capture.attention_candidates(root)
    selected = capture.explicit_targets(targets, root)
    if selected is not None:
        below = [n for n in candidates if any(capture.at_or_below(n, top) for top in selected)]
        chosen = [name for name in below if name in selected or _computes(name, candidates)]
    else:
        chosen = [name for name in candidates if name and _computes(name, candidates)]
    if not chosen:
        raise ValueError(
            "no module that computes attention was found. Name the module whose forward calls "
            "`F.scaled_dot_product_attention` or `softmax` with `targets=`."
        )
    return chosen


def _computes(name: str, candidates: Mapping[str, nn.Module]) -> bool:
    own = f"{name.rpartition('.')[2]} {capture._own_class(candidates[name]).__name__}"
    if capture.ATTENTION_NAME.search(own):
        return True
    holds = any(other != name and (not name or other.startswith(f"{name}.")) for other in candidates)
    return not holds and not _OTHER_NAME.search(own)
