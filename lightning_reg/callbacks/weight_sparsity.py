"""Prunes weights while they train, to an absolute sparsity: when and how much.

The mechanism is `lightning_reg.pruning`, the masks are `lightning_reg.functional.weight_sparsity`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typing_extensions import override

from lightning_reg import pruning
from lightning_reg.callbacks.regularizer import _total_steps, plain_targets
from lightning_reg.capture import Targets
from lightning_reg.functional.weight_sparsity import check_sparsity, rigl_share
from lightning_reg.pruning import Method, Pruner, Scope
from lightning_reg.schedules import (
    Constant,
    Cubic,
    Linear,
    MultiStep,
    Schedule,
    TargetController,
    _check_time,
    _in_steps,
)

Ramp = Literal["cubic", "linear", "constant"]
_BEGIN, _END = 0, 0.75
_FOREVER = 2**62  # a step behind every schedule


# --- when ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The schedule of one training, in steps."""

    schedule: Schedule
    begin: int
    end: int
    every: int
    total: int | None

    def factor(self, step: int) -> float:
        factor = self.schedule(step, self.total)
        if factor > 1:
            raise ValueError(
                f"`schedule` must give factors in [0, 1] of `target`, got {factor:g} at step {step}. Raise `target` "
                "instead."
            )
        return factor

    def crosses(self, before: int | None, step: int) -> bool:
        """Whether a time to update lies after ``before`` and not after ``step``."""
        return before is None or (step - self.begin) // self.every > (before - self.begin) // self.every


# --- the callback ----------------------------------------------------------------------------------------------------


class WeightSparsity(Callback):
    """Prunes weights during training until a share of ``target`` of them is exactly zero, and holds it there.

    The sparsity is absolute and counted in optimizer steps: after the schedule's end it is ``target``, whatever it was
    before. Pruned weights are true zeros in the model's own parameters: nothing is added to it, checkpoints load
    without this library, and the model stays pruned after ``fit``. Masks are saved with the callback, so that a resumed
    run equals an uninterrupted one. All processes of data parallel training have the same masks; sharded strategies
    (FSDP, DeepSpeed, ``ModelParallelStrategy``) raise. Averaged copies (``WeightAveraging``, stochastic weight
    averaging) get each new mask too, so they are as sparse as the model. With ``SigmaReparam`` the raw weight is
    pruned. Biases, norms and embeddings stay dense.

    Args:
        target: Share of zeros among the pruned weights at the end, in [0, 1). 0 changes nothing.
        schedule: ``"cubic"`` or ``"linear"`` from 0 at ``begin`` to ``target`` at ``end``; ``"constant"``: ``target``
            from ``begin`` on; or a ``Schedule`` whose factor times ``target`` is the sparsity, such as
            ``MultiStep([100, 200], [0, 0.5, 1])``. A named schedule never falls, also when a resumed training is
            longer than the first; where a ``Schedule`` falls, weights come back at 0.
        method: ``"magnitude"`` prunes the smallest weights; ``"random"`` any; ``"rigl"`` starts at random, or grows by
            magnitude where the schedule grows, and exchanges weights as RigL does between ``begin`` and ``end``.
        scope: ``"global"``: ``target`` holds for all weights together: magnitudes are ranked across layers, the other
            methods spread it by ERK. ``"layer"``: in each layer alike. ``"erk"``: by ERK, for magnitudes too.
        pattern: ``"n:m"``: only weights that N:M does not keep are pruned, ``"2:4"`` for semi-structured kernels;
            ``target`` must be ``1 - n/m``.
        begin: First step (int) or fraction of training (float) of a named schedule and of exchanges.
        end: Last step or fraction of the same.
        every: Steps or fraction of training between updates of the masks; a level at which a schedule stays is taken
            at once.
        regrow: Share of the active weights that RigL exchanges at first, falling to 0 along half a cosine.
        targets: Modules whose weights are pruned: a regular expression that matches a whole name or a dotted ending of
            it, a module type, a predicate on (name, module), or a list of these. Left out: every Linear, convolution,
            GPT-2 Conv1D and MultiheadAttention, except weights that are tied to an embedding.
        exclude: Modules whose weights stay dense, as for ``targets``.
        seed: Of random masks.
        name: Name in logs and checkpoints; two instances in one Trainer need two names and disjoint targets.

    Logs ``reg/<name>/value``, the measured share of zeros, ``reg/<name>/target``, that of the schedule, and
    ``reg/<name>/layers/<layer>``.
    """

    _pruner: Pruner | None
    _plan: _Plan | None
    _trainer: pl.Trainer | None
    _known: list[Any]  # optimizers of a hand-written loop
    _optimizer_hook: Any  # before a step of any optimizer, in a hand-written loop
    _step_hooks: dict[int, Any]  # after a step, by optimizer of the Trainer
    _step: int | None  # optimizer steps at the last look at the schedule
    _sparsity: float  # what the masks were last chosen for
    _due: list[str]  # weights whose RigL update waits for gradients
    _loaded: Mapping[str, Any] | None

    def __init__(
        self,
        target: float,
        *,
        schedule: Ramp | Schedule = "cubic",
        method: Method = "magnitude",
        scope: Scope = "global",
        pattern: str | None = None,
        begin: int | float = _BEGIN,
        end: int | float = _END,
        every: int | float = 0.01,
        regrow: float = 0.3,
        targets: Targets = None,
        exclude: Targets = None,
        seed: int = 0,
        name: str = "weight_sparsity",
    ) -> None:
        super().__init__()
        self.target, self.pattern = _check_target(target, pattern), pattern
        pruning.check_choices(method, scope, pruning.parse_pattern(pattern))
        self.method, self.scope = method, scope
        self.schedule, self.regrow = schedule, check_sparsity(regrow, "regrow")
        self.begin, self.end, self.every = _check_time("begin", begin), _check_time("end", end), _check_every(every)
        self._check_schedule()
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"`seed` must be an integer in [0, 2^31), got {seed!r}.")
        if not name:
            raise ValueError("`name` must not be empty; it names the logged values and the state in checkpoints.")
        self.targets, self.exclude = plain_targets(targets), plain_targets(exclude)
        self.seed, self.name = seed, name
        self._kept: dict[str, Any] | None = None  # state of a training that is over
        self._forget()

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, str):
            if self.schedule not in get_args(Ramp):
                raise ValueError(
                    f"`schedule` must be one of {', '.join(map(repr, get_args(Ramp)))} or a Schedule, got "
                    f"{self.schedule!r}. For steps give `lightning_reg.schedules.MultiStep(milestones, values)`."
                )
        elif isinstance(self.schedule, (type, TargetController)) or not callable(self.schedule):
            raise TypeError(
                f"`schedule` must be a name or a Schedule that follows from the step, got {self.schedule!r}. A "
                "`TargetController` moves the weight of a penalty."
            )
        elif self.method != "rigl" and (self.begin, self.end) != (_BEGIN, _END):
            raise ValueError(
                f"`begin={self.begin}` and `end={self.end}` belong to a named schedule, got a "
                f"{type(self.schedule).__name__}, which has its own times. Leave them out."
            )
        if self._has_end() and type(self.begin) is type(self.end) and self.end <= self.begin:
            raise ValueError(f"`end` must be after `begin`, got begin={self.begin} and end={self.end}.")

    def sparsities(self) -> dict[str, Tensor]:
        """Share of exact zeros of each weight, as scalars; empty outside training."""
        if self._pruner is None:
            return {}
        counts = zip(self._pruner.weights, self._pruner.counts(), self._pruner.sizes, strict=True)
        return {weight.label: (zeros.double() / size).float() for weight, zeros, size in counts}

    def definition(self) -> dict[str, Any]:
        """Arguments that define the masks: a checkpoint with others belongs to another training."""
        return {key: getattr(self, key) for key in ("target", "method", "scope", "pattern", "seed")}

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        schedule = self.schedule if isinstance(self.schedule, str) else type(self.schedule).__name__
        times = {key: getattr(self, key) for key in ("begin", "end", "every", "regrow")}
        return {**self.definition(), "schedule": schedule, **times}

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Start pruning ``model``, before the first optimizer step.

        Args:
            model: Model to prune.
            total_steps: Optimizer steps of the whole training, for times as fractions of it.
        """
        self._release()
        plan, self._pruner = self._make_plan(total_steps), self._find(model)
        self._plan = plan
        self._optimizer_hook = register_optimizer_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer))
        self._advance(0)

    def after_step(self, model: nn.Module) -> None:
        """Hold the zeros, and prune where the schedule says so, after an optimizer step."""
        if self._pruner is not None and self._step is not None:
            self._pruner.hold()
            self._advance(self._step + 1)

    def detach(self, model: nn.Module) -> None:
        """Stop; the weights stay pruned. No-op when nothing is attached."""
        self._release()

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start afresh, also after a crashed fit."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise RuntimeError(
                f"WeightSparsity does not work with {type(trainer.strategy).__name__}: it ranks whole weights, and a "
                "process has only a part of them. Use one device or `DDPStrategy`."
            )
        self._release()
        self._kept = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to prune and check the checkpoint: nothing is changed yet."""
        pruner = self._find(pl_module)
        self._check_overlap(trainer, pruner)
        self._check_checkpoint(pruner)
        self._pruner = pruner
        names = ", ".join(weight.label for weight in pruner.weights[:3]) + (", ..." if len(pruner.weights) > 3 else "")
        rank_zero_info(f"WeightSparsity prunes {sum(pruner.sizes)} elements in {len(pruner.weights)} weights: {names}.")
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from the checkpoint, or prune for the first step."""
        self._trainer = trainer
        self._plan = self._make_plan(_total_steps(trainer, Constant()))
        self._warn_if_cut_short()
        self._restore()
        self._advance(trainer.global_step)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Exchange weights and mask gradients: here they are summed, reduced and unscaled, and not clipped yet."""
        self._before_step(optimizer)
        if id(optimizer) not in self._step_hooks and self._pruner is not None:
            hold = self._pruner.hold
            self._step_hooks[id(optimizer)] = optimizer.register_step_post_hook(lambda *_: hold())

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune after an optimizer step where the schedule says so, and log."""
        if trainer.global_step != self._step:
            self._advance(trainer.global_step)
        if trainer._logger_connector.should_update_logs and not trainer.barebones:
            self._log(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model; its weights stay pruned."""
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model: Lightning does not call ``teardown`` after a crash."""
        self._release()

    # --- what happens at a step ---

    def _advance(self, step: int) -> None:
        """Bring the masks to what the schedule says after ``step`` optimizer steps."""
        plan, pruner = self._started()
        update = plan.crosses(self._step, step)
        wanted = self._wanted(step)
        # a level at which the schedule stays does not wait: it would be missed at the end of the training
        if wanted != self._sparsity and (update or wanted == self._wanted(step + 1)):
            pruner.prune(wanted, at_random=self.method == "rigl" and step == 0)
            pruner.settle(self._optimizers(), self._copies())
            self._sparsity = wanted
        if self.method == "rigl" and update and plan.begin < step < plan.end:
            self._due = [weight.key for weight in pruner.weights]
        self._step = step

    def _before_step(self, optimizer: Any) -> None:
        if self._pruner is None or self._plan is None:
            return
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(weight.parameter) in owned for weight in self._pruner.weights):
            return
        if self._trainer is None and optimizer not in self._known:
            self._known.append(optimizer)
        if self._due:
            self._exchange(owned)
        self._pruner.hold_gradients(owned)

    def _exchange(self, owned: set[int]) -> None:
        """RigL update of the weights that this optimizer trains: of others the gradients may not be complete."""
        plan, pruner = self._started()
        now = [weight for weight in pruner.weights if weight.key in self._due and id(weight.parameter) in owned]
        share = rigl_share((self._step or 0) - plan.begin, plan.end - plan.begin, self.regrow)
        if now and pruner.exchange(now, share):
            pruner.settle(self._optimizers(), self._copies())
            self._due = [key for key in self._due if key not in {weight.key for weight in now}]

    def _wanted(self, step: int) -> float:
        wanted = self.target * self._started()[0].factor(step)
        return max(wanted, self._sparsity) if isinstance(self.schedule, str) else wanted

    def _started(self) -> tuple[_Plan, Pruner]:
        assert self._plan is not None
        assert self._pruner is not None
        return self._plan, self._pruner

    def _optimizers(self) -> list[Any]:
        return self._known if self._trainer is None else list(self._trainer.optimizers)

    def _copies(self) -> list[nn.Module]:
        """Averaged models of other callbacks."""
        others: list[Any] = [] if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]
        averaged = [getattr(callback, "_average_model", None) for callback in others]
        return [model for model in averaged if isinstance(model, nn.Module)]

    # --- how it starts and ends ---

    def _find(self, model: nn.Module) -> Pruner:
        weights = pruning.find_weights(model, self.targets, self.exclude)
        pattern = pruning.parse_pattern(self.pattern)
        return Pruner(weights, method=self.method, scope=self.scope, pattern=pattern, seed=self.seed)

    def _make_plan(self, total: int | None) -> _Plan:
        begin, end = self._interval(total)
        every = max(1, round(_in_steps("every", self.every, total)))
        return _Plan(self._schedule_between(begin, end), begin, end, every, total)

    def _has_end(self) -> bool:
        return self.method == "rigl" or self.schedule in ("cubic", "linear")

    def _interval(self, total: int | None) -> tuple[int, int]:
        begin = _in_steps("begin", self.begin, total)
        if not self._has_end():
            return round(begin), round(begin)
        end = _in_steps("end", self.end, total)
        if end <= begin:
            raise ValueError(
                f"`end` must be after `begin`, got begin={self.begin} and end={self.end}, which are the steps "
                f"{begin:g} and {end:g} of {total}."
            )
        return round(begin), max(round(end), round(begin) + 1)

    def _schedule_between(self, begin: int, end: int) -> Schedule:
        if not isinstance(self.schedule, str):
            return self.schedule
        if self.schedule == "constant":
            return MultiStep([begin], [0.0, 1.0]) if begin else Constant()
        return (Cubic if self.schedule == "cubic" else Linear)(0.0, 1.0, begin=begin, duration=end - begin)

    def _check_overlap(self, trainer: pl.Trainer, pruner: Pruner) -> None:
        ours = {id(weight.parameter) for weight in pruner.weights}
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in others:
            if isinstance(other, WeightSparsity) and other is not self and other._pruner is not None:
                for weight in other._pruner.weights:
                    if id(weight.parameter) in ours:
                        raise ValueError(
                            f"`targets` of {self.name!r} and {other.name!r} both select {weight.label!r}. Leave it out "
                            "of one of them."
                        )

    def _warn_if_cut_short(self) -> None:
        plan, _ = self._started()
        if plan.total is None:
            return
        reached, final = (self.target * plan.factor(step) for step in (plan.total, _FOREVER))
        if reached < final:
            rank_zero_warn(
                f"The schedule of WeightSparsity {self.name!r} ends after the training: at its end, step {plan.total}, "
                f"the sparsity is {reached:.4g} of {final:.4g}. Set an earlier `end`, or train longer."
            )

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _, pruner = self._started()
        zeros, sizes = pruner.counts().cpu().double(), torch.tensor(pruner.sizes, dtype=torch.float64)
        shares = zip(pruner.weights, zeros / sizes, strict=True)
        # straight to the loggers: what goes through `log` Lightning looks at again in every step
        layers = {f"reg/{self.name}/layers/{weight.label}": float(share) for weight, share in shares}
        trainer._logger_connector.log_metrics(layers)  # type: ignore[arg-type]
        value, target = (zeros.sum() / sizes.sum()).float(), torch.tensor(self._wanted(trainer.global_step))
        pl_module.log(f"reg/{self.name}/value", value, prog_bar=True, batch_size=1, rank_zero_only=False)
        pl_module.log(f"reg/{self.name}/target", target, batch_size=1, rank_zero_only=False)

    def _release(self) -> None:
        if self._pruner is not None and self._step is not None:
            self._kept = self.state_dict()  # `trainer.save_checkpoint` after the fit must hold the masks
        for hook in (*self._step_hooks.values(), *([self._optimizer_hook] if self._optimizer_hook else [])):
            hook.remove()
        self._forget()

    def _forget(self) -> None:
        self._pruner = self._plan = self._trainer = self._optimizer_hook = self._step = self._loaded = None
        self._known, self._step_hooks, self._due, self._sparsity = [], {}, [], 0.0

    # --- checkpoints ---

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint. Lightning asks for it at every hook."""
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The definition, the masks, and how far the schedule has come; after the fit, those of its end."""
        if self._loaded is not None:
            return dict(self._loaded)
        if self._pruner is None or self._step is None:
            return self._kept or {"definition": self.definition(), "step": None}
        progress = {"step": self._step, "sparsity": self._sparsity, "due": list(self._due)}
        return {"definition": self.definition(), **progress, "masks": self._pruner.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep for ``on_fit_start``, which checks it, and ``on_train_start``."""
        self._loaded = state_dict

    def _check_checkpoint(self, pruner: Pruner) -> None:
        if self._loaded is None:
            return
        saved = self._loaded["definition"]
        for key, value in self.definition().items():
            if saved[key] != value:
                raise ValueError(
                    f"`{key}` of WeightSparsity {self.name!r} is {value!r}, but the checkpoint was trained with "
                    f"{saved[key]!r}: set `{key}={saved[key]!r}`, or load only the weights to start a new training."
                )
        if self._loaded["step"] is not None:
            pruner.check_state(self._loaded["masks"])

    def _restore(self) -> None:
        _, pruner = self._started()
        state, self._loaded = self._loaded, None
        if state is None or state["step"] is None:
            return
        pruner.load_state(state["masks"])
        self._step, self._sparsity, self._due = state["step"], state["sparsity"], list(state["due"])
        pruner.hold()


def _check_every(every: Any) -> int | float:
    if _check_time("every", every) == 0:
        raise ValueError("`every` must be > 0, got 0; 1 updates the masks after each optimizer step.")
    return every


def _check_target(target: Any, pattern: str | None) -> float:
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 <= target < 1:
        raise ValueError(
            f"`target` must be a share of zeros in [0, 1), got {target!r}: 0.9 prunes nine of ten weights."
        )
    if (parsed := pruning.parse_pattern(pattern)) is None:
        return float(target)
    exact = 1 - parsed[0] / parsed[1]
    if abs(target - exact) > 1e-3:
        raise ValueError(
            f"`target` must be {exact:.4g} with `pattern={pattern!r}`, got {target!r}: the pattern fixes the sparsity."
        )
    return exact
