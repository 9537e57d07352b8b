"""What the engine shows its sites to."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from lightning_reg.capture import AttentionCall
    from lightning_reg.engine import Tap

Mask = str | int | Callable[[Any], Tensor] | None


class Observer:
    """What the engine shows its sites to. A ``Regularizer`` is one that leaves penalties."""

    name, role = "", ""
    top_k: int | None = None
    query_fraction = 1.0  # share of an attention's rows that are looked at
    mask: Mask = None
    allow_unused = False
    penalizes = False
    per_site = False  # `see_attention` is told the site, as `site=`
    sizes = False  # `see_scores` reads no more than the largest score of each row, without gradient
    awake = True  # the sites are shown to it at the current step; at the others it costs nothing
    strength = 0.0  # weight * schedule at the current step
    coefficient: Tensor  # strength / number of calls, for repeated forwards

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Names of the modules to watch, each with whether the user named it."""
        raise NotImplementedError

    def layer_factor(self, site: str) -> float:
        """Factor on the penalty of a site."""
        return 1.0

    def check_layers(self, sites: list[str]) -> None:
        """Raise a ValueError if factors of layers do not fit the sites."""

    def see_attention(
        self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """``(penalty, value)`` of attention rows: entropy in nats and visible keys (batch, heads, queries)."""
        raise NotImplementedError

    def see_scores(self, call: "AttentionCall", mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """``(penalty, value)`` of an attention, from its queries and keys or its scores; ``mask`` (batch, tokens)."""
        raise NotImplementedError

    def see_activations(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """``(x, penalty, value)`` of activations (..., width)."""
        raise NotImplementedError

    def see_output(self, output: Any, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """``(penalty, value)`` of what a module returns; of the first tensor in it as of activations."""
        tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        _, penalty, value = self.see_activations(tensor, mask)
        return penalty, value

    def check_fired(self, taps: "list[Tap]") -> None:
        """Raise if a target did not run in the first step."""
        raise NotImplementedError

    @property
    def live(self) -> bool:
        """Whether the penalty acts at the current step."""
        return self.strength > 0

    def update_strength(self, step: int, total_steps: int | None) -> None:
        """Set the strength of an optimizer step; without a penalty there is none."""

    def observe(self, model: nn.Module, logged: Mapping[str, Any] | None = None) -> None:
        """Look at what a forward pass left, before it is cleared for the next."""

    def batch_mask(self, batch: Any) -> Tensor | None:
        """Valid tokens of a batch, or None."""
        if self.mask is None or batch is None:
            return None
        try:
            mask = self.mask(batch) if callable(self.mask) else batch[self.mask]
        except (KeyError, IndexError, TypeError) as error:
            keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, dict) else ""
            raise ValueError(
                f"`mask={self.mask!r}` is not in the batch, a {type(batch).__name__}{keys}; give its key, its "
                "index, or a function of the batch."
            ) from error
        if not isinstance(mask, Tensor):
            raise ValueError(f"`mask={self.mask!r}` must select a tensor, got {type(mask).__name__}.")
        return self.as_mask(mask)

    def as_mask(self, mask: Tensor) -> Tensor:
        """What the batch holds, as ``see_attention`` and ``see_activations`` take it."""
        return mask.bool()


class Prepares:
    """A callback that changes modules, and must have done so before others look for their sites."""

    def prepare(self, model: nn.Module) -> None:
        """Change what is to be changed. No-op where it is done."""
        raise NotImplementedError
