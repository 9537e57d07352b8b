"""Entropy-guided thresholds as a callback: one for each layer and head, in the optimizer, in the callback's checkpoint.

The loss is `losses.entropy_guided`. A layer's heads are known once it has run, so its thresholds are made in the first
forward and join an optimizer before its first step.
"""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.callbacks.attention_entropy import AttentionEntropyRegularizer
from lightning_reg.callbacks.building import extend_schedules, nested_schedulers, takes_groups
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine, Tap
from lightning_reg.functional.entropy_guided import GuidedObjective, check_share_of_entropy, head_count
from lightning_reg.losses import EntropyGuidedLoss
from lightning_reg.schedules import Schedule

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group, all in the unit of its learning rate
_RATE_LISTS = ("base_lrs", "min_lrs", "max_lrs", "base_values", "_last_lr")  # of a scheduler, one for each group


class EntropyGuidedRegularizer(AttentionEntropyRegularizer):
    """Holds the entropy of each head near a threshold of its own, learned with the model.

    The penalty is the mean over sites and heads of ``(E - threshold)^2`` where the distance exceeds ``margin``; E is
    the mean entropy of the head's valid rows, as a share of log(visible keys). Each site, which is a module that
    computes attention, has one fp32 parameter (heads,). It gets its gradient from the penalty alone, is trained by the
    optimizer that trains the module, in a parameter group without weight decay, stays in [0, 1], and is kept in the
    callback's part of a checkpoint: the model's ``state_dict`` and the model itself stay as they were. Data parallelism
    averages its gradient; sharded strategies, LBFGS, and heads that are folded into the batch are refused. In code that
    is compiled with ``fullgraph`` the modules must say how many heads they have (``num_heads``).

    Args:
        weight: Strength, >= 0. The default is the paper's for small models; 0 measures and logs only.
        margin: Distance that costs nothing, in [0, 1].
        threshold: Where all thresholds start, in [0, 1].
        learnable: Train the thresholds. They drift to where their heads are; ``False`` holds them.
        threshold_lr: Learning rate of the thresholds, > 0, scheduled as that of the optimizer's first parameter group
            is; the same as that group's when left out.
        objective: Which side of the threshold counts: ``band``, ``floor`` (below) or ``ceiling`` (above).
        targets: The modules in whose forward the attention is computed, or any of their parents; all when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single layers, as for ``Regularizer``.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch; limits the queries
            that count.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.

    Example:
        >>> EntropyGuidedRegularizer(learnable=False).definition()
        {'margin': 0.2, 'threshold': 0.5, 'learnable': False, 'objective': 'band'}
    """

    per_site = True

    def __init__(
        self,
        weight: float = 1e-5,
        *,
        margin: float = 0.2,
        threshold: float = 0.5,
        learnable: bool = True,
        threshold_lr: float | None = None,
        objective: GuidedObjective = "band",
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "entropy_guided",
    ) -> None:
        super().__init__(
            weight, targets=targets, schedule=schedule, layer_weights=layer_weights, mask=mask,
            allow_unused=allow_unused, name=name,
        )  # fmt: skip
        self.loss: Any = EntropyGuidedLoss(margin, objective=objective)
        self.threshold, self.learnable = check_share_of_entropy("threshold", threshold), bool(learnable)
        self.threshold_lr = _check_rate(threshold_lr)
        self.raises_value = objective == "floor"
        self._thresholds: dict[str, nn.Parameter] = {}
        self._placed: dict[str, tuple[int, nn.Parameter]] = {}  # the optimizer, by its number, that has it
        self._processes = self._optimizers = 1
        self._agreed: set[int] = set()  # optimizers before whose first step the processes have agreed on the sites
        self._declared: dict[str, int | None] = {}  # heads, as the modules say themselves
        self._unused: set[str] = set()  # made before it was known whether the module computes attention
        self._taps: list[Tap] = []
        self._handles: list[Any] = []

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity and the direction."""
        return {
            "margin": self.loss.margin, "threshold": self.threshold, "learnable": self.learnable,
            "objective": self.loss.objective,
        }  # fmt: skip

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        return {**super().hyperparameters(), "threshold_lr": self.threshold_lr}

    # --- thresholds ---

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """Thresholds (heads,) by site, detached; they stay readable after the fit."""
        return {site: threshold.detach() for site, threshold in self._thresholds.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Thresholds as parameters, for the optimizer of a hand-written loop.

        They exist once a training forward has run, so add them before the first step:
        ``optimizer.add_param_group({"params": callback.parameters(), "weight_decay": 0.0})``. ``regularize`` keeps them
        in [0, 1].
        """
        self._drop_unused()
        return list(self._thresholds.values())

    @override
    def see_attention(
        self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None, site: str = ""
    ) -> tuple[Tensor, Tensor]:
        """``(penalty, value)`` of attention rows."""
        heads, declared = head_count(entropy), self._declared.get(site)
        if heads == 1 and declared is not None and declared > 1:
            raise ValueError(
                f"`{self.name}` at {site}: its {declared} heads are folded into the batch, where they cannot be told "
                "apart. Call `nn.MultiheadAttention` with `need_weights=False`, or leave it out with `targets=`."
            )
        threshold: Tensor | float = self.threshold
        if self.learnable:
            threshold = self._threshold(site, heads, entropy.device)
            # attention that nothing trains must leave a penalty without gradient, which is refused
            threshold = threshold if entropy.requires_grad else threshold.detach()
        return self.loss.reduce(entropy, visible, threshold, valid)

    def _threshold(self, site: str, heads: int, device: torch.device) -> nn.Parameter:
        threshold = self._thresholds.get(site)
        if threshold is None:
            threshold = self._create(site, heads, device)
        if threshold.shape[0] != heads:
            raise ValueError(
                f"`{self.name}` at {site}: {heads} heads, but its thresholds are of {threshold.shape[0]}. Name the "
                "modules inside that compute attention with `targets=`, so that each has thresholds of its own; a "
                "checkpoint needs the model it was trained with."
            )
        return threshold

    def _create(self, site: str, heads: int, device: torch.device) -> nn.Parameter:
        if self._processes > 1 and len(self._agreed) == self._optimizers:
            raise RuntimeError(
                f"`{self.name}` at {site}: attention ran here for the first time after the first step, where the "
                "processes can no longer agree on its thresholds. Leave it out with `targets=`, or set "
                "`learnable=False`."
            )
        self._thresholds[site] = nn.Parameter(torch.full((heads,), self.threshold, device=device))
        return self._thresholds[site]

    @torch.no_grad()
    def _clamp(self, optimizer: int | None = None) -> None:
        for site, threshold in self._thresholds.items():
            if optimizer is None or (site in self._placed and self._placed[site][0] == optimizer):
                threshold.clamp_(0.0, 1.0)

    # --- without a Trainer ---

    @override
    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Register with the engine of ``model``."""
        super().attach(model, total_steps)
        modules, self._taps = capture.named_modules(model), Engine.of(model).taps[self]
        self._declared = {tap.site.label: _declared_heads(modules[tap.site.name]) for tap in self._taps}
        if unknown := sorted(set(self._thresholds) - set(self._declared)):
            raise ValueError(
                f"`{self.name}` has thresholds of {', '.join(unknown)}, which this model does not have: load the "
                "checkpoint into the model it was trained with, with the same `targets`."
            )
        if self.learnable and any(capture.is_compiled(module) for module in model.modules()):
            self._create_declared(model)

    def _create_declared(self, model: nn.Module) -> None:
        """In compiled code no parameter can be made: here, for every module that says how many heads it has."""
        modules = capture.named_modules(model)
        for tap in self._taps:
            module = modules[tap.site.name]
            heads = self._declared[tap.site.label] or _declared_heads(getattr(module, "config", None))
            parameter = next(module.parameters(), None)
            if heads is not None and parameter is not None and tap.site.label not in self._thresholds:
                self._create(tap.site.label, heads, parameter.device)
                self._unused.add(tap.site.label)

    def _drop_unused(self) -> None:
        """Forget what was made for modules that computed no attention."""
        ran = {tap.site.label for tap in self._taps if tap.fired} if self._unused else set()
        if ran:
            for site in self._unused - ran:
                del self._thresholds[site]
            self._unused = set()

    @override
    def after_step(self, model: nn.Module) -> None:
        """Keep the thresholds in [0, 1]."""
        super().after_step(model)
        self._clamp()

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, with thresholds at their start."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.learnable and isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise RuntimeError(
                f"learned thresholds do not work with {type(trainer.strategy).__name__}, whose optimizers take only "
                "parameters of the model. Set `learnable=False`, or use `DDPStrategy`."
            )
        self._thresholds, self._placed, self._agreed, self._unused = {}, {}, set(), set()
        self._processes = trainer.world_size

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach, and watch the optimizers: their steps, and the loading of their state."""
        super().on_fit_start(trainer, pl_module)
        if not self.learnable or self._handles:
            return
        self._optimizers = len(trainer.optimizers)
        self._to(pl_module.device)
        for number, optimizer in enumerate(trainer.optimizers):
            if not takes_groups(optimizer):
                raise RuntimeError(
                    f"{type(optimizer).__name__} takes no other parameter group, so it cannot train thresholds. Set "
                    "`learnable=False`, or use another optimizer."
                )
            self._handles += self._watch(trainer, pl_module, optimizer, number)

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any, number: int) -> list[Any]:
        def clamp(*_: Any) -> None:
            self._clamp(number)

        def load(*_: Any) -> None:  # not earlier: other callbacks add groups when the fit starts, and came first then
            self._remove(optimizer, number)
            self._to(pl_module.device)
            self._place(trainer, pl_module, number)

        return [optimizer.register_step_post_hook(clamp), optimizer.register_load_state_dict_pre_hook(load)]

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give new thresholds to an optimizer: before it steps, and before its gradients are unscaled or clipped."""
        super().on_after_backward(trainer, pl_module)
        self._drop_unused()
        self._place(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Average the gradients of the thresholds over processes."""
        if not self.learnable or self._processes == 1:
            return
        number = next(i for i, candidate in enumerate(trainer.optimizers) if candidate is optimizer)
        if number not in self._agreed:
            self._agree(pl_module.device)
            self._place(trainer, pl_module)
            self._agreed.add(number)
        own = [threshold for _, (place, threshold) in sorted(self._placed.items()) if place == number]
        _average_gradients(own, self._processes)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Unhook until the next batch, and log."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._thresholds and trainer._logger_connector.should_update_logs:
            mean = torch.cat([threshold.detach() for threshold in self._thresholds.values()]).mean()
            pl_module.log(f"reg/{self.name}/threshold", mean, batch_size=1)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave model and optimizers alone."""
        super().teardown(trainer, pl_module, stage)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --- optimizers ---

    def _to(self, device: torch.device) -> None:
        for site, threshold in self._thresholds.items():
            if site not in self._placed:
                threshold.data = threshold.data.to(device)

    def _place(self, trainer: pl.Trainer, pl_module: pl.LightningModule, only: int | None = None) -> None:
        """See to it that every threshold is in an optimizer. No-op where it is."""
        for site in [site for site in self._thresholds if site not in self._placed]:
            number = _optimizer_of(site, trainer.optimizers, pl_module)
            if only not in (None, number):
                continue
            threshold, optimizer = self._thresholds[site], trainer.optimizers[number]
            group = self._own_group(optimizer, number)
            if group is None:
                _add_group(trainer, optimizer, f"{self.name}.{site}", threshold, self.threshold_lr)
            else:
                group["params"].append(threshold)
                if "param_names" in group:
                    group["param_names"].append(f"{self.name}.{site}")
            self._placed[site] = number, threshold

    def _own_group(self, optimizer: Any, number: int) -> dict[str, Any] | None:
        own = {id(threshold) for place, threshold in self._placed.values() if place == number}
        groups = (group for group in optimizer.param_groups if any(id(p) in own for p in group["params"]))
        return next(groups, None)

    def _remove(self, optimizer: Any, number: int) -> None:
        """Take the thresholds out again: a checkpoint is loaded that may not have them, as the rate finder does."""
        group = self._own_group(optimizer, number)
        if group is None:
            return
        index = next(i for i, candidate in enumerate(optimizer.param_groups) if candidate is group)
        del optimizer.param_groups[index]
        for threshold in group["params"]:
            optimizer.state.pop(threshold, None)
        self._placed = {site: place for site, place in self._placed.items() if place[0] != number}

    # --- processes ---

    def _agree(self, device: torch.device) -> None:
        """Make the thresholds of what ran on another process only."""
        sites = sorted(self._declared)
        own = [len(self._thresholds[site]) if site in self._thresholds else 0 for site in sites]
        heads = torch.tensor(own, device=device)
        torch.distributed.all_reduce(heads, op=torch.distributed.ReduceOp.MAX)
        for site, count in zip(sites, heads.tolist(), strict=True):
            if count and site not in self._thresholds:
                self._create(site, count, device)

    # --- checkpoints ---

    @override
    def state_dict(self) -> dict[str, Any]:
        """The definition and the thresholds by site."""
        return {**super().state_dict(), "thresholds": {site: t.cpu().clone() for site, t in self.thresholds.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the thresholds; the optimizers get them when their own state is loaded."""
        super().load_state_dict(state_dict)
        saved = state_dict.get("thresholds", {}) if self.learnable else {}
        self._thresholds = {site: nn.Parameter(value.detach().clone()) for site, value in saved.items()}


def _check_rate(rate: Any) -> float | None:
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate <= 0:
        raise ValueError(
            f"`threshold_lr` must be a finite number > 0, or None for the learning rate of the model, got {rate!r}; "
            "`learnable=False` holds the thresholds."
        )
    return float(rate)


def _declared_heads(module: Any) -> int | None:
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
    numbers = (getattr(module, name, None) for name in names)
    return next((number for number in numbers if isinstance(number, int)), None)


def _optimizer_of(site: str, optimizers: list[Any], model: nn.Module) -> int:
    """Number of the optimizer that trains a site, or what is around it."""
    modules = capture.named_modules(model)
    for name in _upwards(site if site in modules else ""):
        own = {id(parameter) for parameter in modules[name].parameters()}
        for number, optimizer in enumerate(optimizers):
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                return number
    return 0


def _upwards(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _add_group(trainer: pl.Trainer, optimizer: Any, name: str, threshold: nn.Parameter, rate: float | None) -> None:
    """A group without weight decay, otherwise as the first one of its optimizer, also for the schedulers."""
    first = optimizer.param_groups[0]
    own = {key: value for key, value in first.items() if key not in ("params", "param_names")}
    if "weight_decay" in own:
        own["weight_decay"] = 0.0
    base = float(first.get("initial_lr", first["lr"]))
    factor = 1.0 if rate is None else rate / base if base else 0.0
    for key in _RATES:
        if key in own:
            own[key] = own[key] * factor  # a learning rate kept in a tensor is written in place: not that of the model
    optimizer.add_param_group({**own, "params": [(name, threshold)] if "param_names" in first else [threshold]})
    for config in trainer.lr_scheduler_configs:
        for scheduler in nested_schedulers(config.scheduler):
            if getattr(scheduler, "optimizer", optimizer) is optimizer:
                extend_schedules(scheduler, 0, len(optimizer.param_groups) - 1)
                _scale_last(scheduler, len(optimizer.param_groups), factor)


def _scale_last(scheduler: Any, groups: int, factor: float) -> None:
    for attribute in _RATE_LISTS:
        values = getattr(scheduler, attribute, None)
        if isinstance(values, list) and len(values) == groups:
            setattr(scheduler, attribute, [*values[:-1], values[-1] * factor])


def _average_gradients(thresholds: list[nn.Parameter], processes: int) -> None:
    """Mean over processes, where data parallelism averages the gradients of the model; one packed reduction."""
    if not thresholds:
        return
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in thresholds]
    packed = torch.cat(gradients) / processes
    torch.distributed.all_reduce(packed)
    for threshold, mean in zip(thresholds, packed.split([len(t) for t in thresholds]), strict=True):
        threshold.grad = mean.clone()
