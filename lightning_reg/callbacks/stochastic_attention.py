"""Attention to random keys in training, as a callback. The formula is `functional.stochastic_attention`."""

import zlib
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture, rewriting
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.callbacks.surgery import check_reached, collect_unreached, stop_collecting
from lightning_reg.capture import Targets
from lightning_reg.functional.stochastic_attention import check_keep, kept_keys, masked_to, stochastic_attention

KIND = "stochastic_attention"
SEED = "_lightning_reg_seed"  # on a module: of its draws in this batch, one integer on its device


class StochasticAttentionRewrite(rewriting.Rewrite):
    """Random keys in training mode; all keys otherwise."""

    kind = KIND
    order = 1

    def __init__(self, keep: float) -> None:
        self.keep = check_keep(keep)

    @override
    def attention(
        self, module: nn.Module, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        **arguments: Any,
    ) -> Tensor:  # fmt: skip
        """Attention to the keys that are drawn."""
        if not module.training:
            return attend(query, key, value, **arguments)
        return stochastic_attention(
            query, key, value, keep=self.keep, seed=module.__dict__[SEED], attention=attend, **arguments
        )

    @override
    def scores(self, module: nn.Module, scores: Tensor, dim: int) -> Tensor:
        """Scores with the keys that are not drawn hidden."""
        if not module.training or self.keep == 1:
            return scores
        keys = scores.shape[dim]
        rows = scores.movedim(dim, -1)
        kept = kept_keys(keys, self.keep, first=False, seed=module.__dict__[SEED])
        return masked_to(rows, kept, rows.shape[-2] if rows.dim() > 1 else 1, keys).movedim(-1, dim)

    @override
    def arguments(self) -> dict[str, Any]:
        """The share."""
        return {"keep": self.keep}


class StochasticAttention(Callback):
    """Lets attention see a random subset of the keys in training, and all of them otherwise (SSA).

    Drawn anew in every layer and batch, from the number of the batch: a resumed training draws what an uninterrupted
    one would, and so does a forward that activation checkpointing repeats. Nothing is left in the model after the fit.

    Args:
        keep: Share of the keys that is seen, in (0, 1]; 1 changes nothing.
        targets: The modules in whose forward the attention is computed, or any of their parents; all when left out.
        seed: Of the draws; processes of data parallel training draw differently.
    """

    def __init__(self, keep: float = 0.5, *, targets: Targets = None, seed: int = 0) -> None:
        super().__init__()
        self.keep, self.targets = check_keep(keep), plain_targets(targets)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"`seed` must be an integer in [0, 2**31), got {seed!r}.")
        self.seed = seed
        self._rewrite = StochasticAttentionRewrite(keep)
        self._names: list[str] = []
        self._seeds = torch.zeros(0, dtype=torch.int64)
        self._batches, self._checked = 0, False

    @property
    def enabled(self) -> bool:
        """Whether keys are left out; a ``Guard`` switches it."""
        return self._rewrite.active

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._checked &= self._rewrite.active or not enabled  # switched on, its first batch is checked
        self._rewrite.active = enabled

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Begin; each optimizer step draws anew."""
        self._begin(model)

    def after_step(self, model: nn.Module) -> None:
        """Draw anew."""
        self._draw(self._batches + 1, 0)

    def detach(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        stop_collecting()
        for module in rewriting.find(model, KIND).values():
            if rewriting.rewrites_of(module)[KIND] is self._rewrite:
                rewriting.remove(module, KIND)
                module.__dict__.pop(SEED, None)
        self._names = []

    # --- with a Trainer ---

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin: here the model exists, on its device."""
        self._begin(pl_module)
        for logger in trainer.loggers:
            arguments = {"keep": self.keep, "targets": str(describe_targets(self.targets)), "seed": self.seed}
            logger.log_hyperparams({f"reg/{KIND}/{key}": value for key, value in arguments.items()})

    def _begin(self, model: nn.Module) -> None:
        taken = rewriting.find(model, KIND)
        if two := [name for name in rewriting.select_modules(self.targets, model) if name in taken]:
            raise ValueError(
                f"two StochasticAttentions act on {two[0]!r}: give them `targets=` that do not overlap, or leave the "
                "other `regularize` block first."
            )
        self._names = rewriting.install_everywhere(model, self._rewrite, self.targets)
        rank_zero_info(f"StochasticAttention: a share of {self.keep:g} of the keys at {len(self._names)} sites")
        modules = capture.named_modules(model)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._seeds = torch.zeros(len(self._names), dtype=torch.int64, device=device)
        for place, name in enumerate(self._names):
            modules[name].__dict__[SEED] = self._seeds[place]
        self._checked = False
        self._draw(0, 0)

    def _draw(self, batch: int, rank: int) -> None:
        self._batches = batch
        own = [zlib.crc32(f"{self.seed} {rank} {batch} {name}".encode()) for name in self._names]
        self._seeds.copy_(torch.tensor(own, dtype=torch.int64), non_blocking=True)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw anew."""
        self._draw(trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)
        if not self._checked:
            collect_unreached(self._rewrite)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the first batch was reached."""
        if not self._checked:
            self._checked = True
            check_reached(self._rewrite, "StochasticAttention", everything=self.targets is None)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self.detach(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self.detach(pl_module)
