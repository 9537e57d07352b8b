"""Watches a training for the signs of attention collapse and divergence, warns early, and changes nothing in it.

The quantities are those of `functional`, taken from sampled rows; the engine shows the monitor what passes at its
sites at measured steps and at no others.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.alarms import Alarm, Alarms, check_levels
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.recording import (
    History,
    Monitor,
    Watcher,
    check_count,
    check_quantities,
    described,
    known,
    logged_step,
    reaches_loggers,
    reparametrized,
    to_host,
)
from lightning_reg.capture import AttentionCall, Targets
from lightning_reg.early_warning import EarlyWarning
from lightning_reg.engine import Engine
from lightning_reg.functional._scores import HIDDEN_SCORE, shift_of
from lightning_reg.functional.attention_entropy import normalize_entropy, scores_tap
from lightning_reg.functional.attention_logits import max_attention_logit_from_scores
from lightning_reg.functional.attention_support import attention_support, effective_keys, largest_weight
from lightning_reg.functional.entropy_floor import entropy_floor_from_scores
from lightning_reg.functional.gradient_rms import gradient_rms
from lightning_reg.functional.massive_activations import magnitudes
from lightning_reg.sampling import sample_positions, sample_rows
from lightning_reg.spectra import Weights

ATTENTION, LOGITS, MASSIVE, WEIGHTS, GRADIENTS = "attention", "logits", "massive_activations", "weights", "gradient_rms"
QUANTITIES = (ATTENTION, LOGITS, MASSIVE, WEIGHTS, GRADIENTS)
FEW_SCORES = 2**18  # of an attention's sample, which may wait for those of the other layers
MEDIAN_OF = 2**14  # activations of a site that its median is taken of
MAX_LOGIT_WARN, MAX_LOGIT_STOP = 1e3, 1e4  # Wortsman et al.: worse from the first, diverged beyond the second
LOG_Z_DRIFT = 50.0  # exp of it is beyond half precision many times over

HEADLINES = {
    "max_logit": "largest |attention logit|; inf when one is NaN",
    "entropy_mean": "mean over heads of the mean normalised entropy",
    "entropy_min": "least mean normalised entropy of a head",
    "entropy_p10": "10 % quantile over heads of the mean normalised entropy",
    "collapsed_share": "share of heads whose mean normalised entropy is below `collapse`",
    "entropy_floor_min": "least mean normalised floor of Theorem 3.1 of a head",
    "k90_min": "least mean support of a head",
    "k90_max": "largest mean support of a head",
    "effective_keys_min": "least mean exp(entropy) of a head",
    "q_norm_max": "largest mean l2 norm of a head's queries",
    "k_norm_max": "largest mean l2 norm of a head's keys",
    "output_logit": "largest |logit| of the model's head; inf when one is NaN",
    "log_z": "mean logarithm of the partition function of the output logits",
    "log_z_drift": "how far `log_z` is from its first value",
    "massive_activation": "largest ratio of max to median magnitude of a block's output",
    "spectral_norm_max": "largest spectral norm of the attention's weights",
    "effective_rank_min": "least effective rank of the attention's weights",
    "gradient_rms": "root mean square of the gradient",
    "gradient_rms_max": "that of the layer where it is largest",
    "predicted_step": "optimizer step at which `max_logit` is predicted to cross 1e4, while there is one",
}
LOW = ("entropy_mean", "entropy_min", "entropy_p10", "entropy_floor_min", "k90_min", "effective_keys_min",
       "effective_rank_min", "predicted_step")  # fmt: skip
MEANS = ("entropy_mean", "entropy_p10", "collapsed_share", "log_z", "gradient_rms")  # over processes
IN_BAR = ("max_logit", "entropy_min")
THROUGH_LOG = (*IN_BAR, "alarm")  # also for callbacks that follow a metric; each costs more than what it says
LEAST_STEPS = 20  # between two measurements, where the user names no number
PER_HEAD = ("entropy", "max_logit", "k90")  # logged for each head; the others are in the history

# columns of a head's record: (sum, count) pairs, which add up over calls, and extremes, which do not
_ROWS, _ENTROPY, _FLOOR, _P10, _SEEN, _K90, _EFFECTIVE, _LARGEST, _QUERY, _KEY, _KEYS, _MIN, _MAX = range(13)

Sample = tuple[Tensor, Tensor | None, Tensor | None]  # the parts of `sampling.Rows`
Action = Callable[[pl.Trainer, pl.LightningModule, Alarm], Any]
Levels = Mapping[str, float]


# --- what is seen in the forward -------------------------------------------------------------------------------------


class _Sampler(Watcher):
    """Looks at a sample that moves with the step."""

    def __init__(self, name: str, sites: list[str], mask: Mask, rows: int, device: torch.device) -> None:
        super().__init__(name, sites, mask)
        self.rows, self.shift = rows, torch.zeros((), device=device)


class _AttentionWatcher(_Sampler):
    role = "attention_scores"

    def see_scores(self, call: AttentionCall, mask: Tensor | None) -> tuple[None, Any]:
        """Record of each head, (heads, columns); of a small sample itself, to be looked at with those of others."""
        rows = sample_rows(call, self.rows, self.shift, mask)
        sample = (rows.scores, rows.query_norms, rows.key_norms)
        return None, sample if rows.scores.numel() <= FEW_SCORES else _head_record(*sample)


class _LogitsWatcher(_Sampler):
    role = "logits"

    def see_activations(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None, Tensor]:
        """Positions, sum of log Z and largest magnitude, (3,), from logits (..., classes)."""
        logits, valid = sample_positions(x, _fitting(mask, x), self.rows, self.shift)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        # classes that are ruled out by a fill are no logits
        size = logits.masked_fill(logits <= HIDDEN_SCORE, 0.0).abs().amax(-1)
        log_z = logits.logsumexp(-1)
        if valid is not None:
            size, log_z = size.masked_fill(~valid, 0.0), torch.where(valid, log_z, 0.0)
        count = torch.full_like(log_z[:1].sum(), len(log_z)) if valid is None else valid.sum().to(log_z)
        return x, None, torch.stack([count, log_z.sum(), size.amax() if len(size) else size.sum()])


class _OutputWatcher(_Sampler):
    role = "module"

    def see_activations(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None, Tensor]:
        """Largest and median magnitude, (2,), of activations (..., width)."""
        return x, None, torch.stack(magnitudes(x, mask=_fitting(mask, x), most=MEDIAN_OF))


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The batch's valid tokens where they are positions of ``x``; a pooled head has none of them."""
    return mask if mask is not None and mask.shape == x.shape[:-1] else None


def _head_records(samples: list[Sample]) -> list[Tensor]:
    """``_head_record`` of each sample, those of one shape together: a small model spends its time on launches."""
    alike: dict[Any, list[int]] = {}
    for place, (scores, norms, _) in enumerate(samples):
        alike.setdefault((scores.shape, scores.dtype, scores.device, norms is None), []).append(place)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        parts = [samples[place] for place in places]
        joined = [None if part[0] is None else torch.cat(part, 1) for part in zip(*parts, strict=True)]
        tables = _head_record(*joined).split(  # type: ignore[arg-type]
            [scores.shape[1] for scores, *_ in parts]
        )
        found |= dict(zip(places, tables, strict=True))
    return [found[place] for place in range(len(samples))]


def _head_record(scores: Tensor, query_norms: Tensor | None, key_norms: Tensor | None) -> Tensor:
    """Sums, counts and extremes of each head, (heads, columns), of rows of ``sampling.Rows``."""
    probs, entropy, visible = scores_tap(scores)
    seen, counted = _by_head(visible > 0), _by_head(visible > 1)
    normalized = _by_head(normalize_entropy(entropy, visible))
    floor = normalize_entropy(entropy_floor_from_scores(scores), visible)
    columns: list[Tensor] = [torch.empty(0)] * 13
    columns[_ROWS], columns[_SEEN] = counted.sum(1), seen.sum(1)
    columns[_ENTROPY] = _sum(normalized, counted)
    columns[_FLOOR] = _sum(_by_head(floor), counted)
    columns[_P10] = _lower_tenth(normalized, counted) * columns[_ROWS]
    columns[_K90] = _sum(_by_head(attention_support(probs)), seen)
    columns[_EFFECTIVE] = _sum(_by_head(effective_keys(entropy)), seen)
    columns[_LARGEST] = _sum(_by_head(largest_weight(probs)), seen)
    columns[_MIN] = normalized.masked_fill(~counted, torch.inf).amin(1)
    columns[_MAX] = _by_head(max_attention_logit_from_scores(scores)).amax(1)
    columns[_QUERY] = columns[_KEY] = columns[_KEYS] = torch.zeros_like(columns[_MAX])
    if query_norms is not None and key_norms is not None:
        shown = _by_head((scores > -torch.inf).any(2))
        columns[_QUERY] = _sum(_by_head(query_norms), seen)
        columns[_KEY], columns[_KEYS] = _sum(_by_head(key_norms), shown), shown.sum(1)
    return torch.stack([column.to(normalized.dtype) for column in columns], 1)


def _by_head(rows: Tensor) -> Tensor:
    """(batch, heads, n) as (heads, batch * n)."""
    return rows.transpose(0, 1).flatten(1)


def _sum(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum(1)


def _lower_tenth(values: Tensor, counted: Tensor) -> Tensor:
    """The value that a tenth of the counted ones lies below, 0 where none is."""
    ordered = values.masked_fill(~counted, torch.inf).sort(1).values
    place = (counted.sum(1, keepdim=True) - 1).clamp_min(0) // 10
    return torch.where(counted.any(1), ordered.gather(1, place).squeeze(1), 0.0)


def _joined(quantity: str, records: list[Tensor]) -> Tensor:
    """One record of all calls of a site in a step.

    Calls with different numbers of heads, as cross-attention has, become one row.
    """
    if quantity == ATTENTION:
        if len({len(table) for table in records}) > 1:
            records = [_reduce(table, 0).unsqueeze(0) for table in records]
        return _reduce(torch.stack(records), 0) if len(records) > 1 else records[0]
    stacked = torch.stack(records)
    if quantity == MASSIVE:
        return torch.stack([stacked[:, 0].amax(), stacked[:, 1].mean()])
    return torch.cat([stacked[:, :2].sum(0), stacked[:, 2:].amax(0)])


def _reduce(table: Tensor, axis: int) -> Tensor:
    joined = table.sum(axis)
    joined[..., _MIN] = table[..., _MIN].amin(axis)
    joined[..., _MAX] = table[..., _MAX].amax(axis)
    return joined


# --- the callback ----------------------------------------------------------------------------------------------------


class StabilityMonitor(Monitor):
    """Warns of attention collapse and divergence before the loss shows them, in any model.

    Measured in training steps whose metrics reach the loggers (or every ``every_n_steps``), and in the first; between
    them it costs nothing, and training is bit-identical to one without it. ``rows`` query rows of each head are looked
    at, spread over batch and queries and moved with the step: the largest logit is that of the sample, so a bound from
    below. Everything else that is a mean is an estimate of the mean; with no more rows than ``rows`` all are exact.

    ``latest`` holds the headlines, by flat names that a ``Guard`` can use, and ``HEADLINES`` of this module says what
    each is: ``max_logit``, ``entropy_mean``, ``entropy_min``, ``entropy_p10``, ``collapsed_share``,
    ``entropy_floor_min``, ``k90_min``, ``k90_max``, ``effective_keys_min``, ``q_norm_max``, ``k_norm_max``,
    ``output_logit``, ``log_z``, ``log_z_drift``, ``massive_activation``, ``spectral_norm_max``,
    ``effective_rank_min``, ``gradient_rms``, ``gradient_rms_max``, ``predicted_step``; those that a model has not are
    missing. They are logged as ``reg/<name>/<headline>``, and single heads and sites as
    ``reg/<name>/{entropy,max_logit,k90}/<site>/<head>`` and ``reg/<name>/<quantity>/<site>``, to the loggers only.
    ``predicted_step`` needs six measurements in the later half of the steps, logits that grow, and a crossing before
    the training ends. Everything is also in ``history`` and in ``<name>.jsonl`` beside the logs. With several processes
    headlines are reduced over them, so that alarms go off on all alike; single heads and sites are rank zero's.

    An alarm goes off once when a headline crosses its level, and again only after it came back behind 80 % of it (125 %
    for those that warn below a level). It is a warning, an entry ``alarms`` of the record, and the call of ``action``.
    ``reg/<name>/alarm`` counts the alarms that are on. An action that raises is reported and recorded with its alarm,
    and training goes on: what it did to the model before it raised stays. Alarms are saved in checkpoints, so that a
    resumed training does not repeat them.

    Args:
        rows: Query rows of each head, and positions of the output logits, at a measured step.
        collapse: Heads with a mean normalised entropy below this count as collapsed.
        quantities: Of ``attention``, ``logits``, ``massive_activations``, ``weights`` and ``gradient_rms``, those to
            watch; a training without one of them raises. What the model has when left out.
        warn: Level of each headline to warn at; ``max_logit`` 1e3, ``entropy_min`` ``collapse`` and ``log_z_drift`` 50
            when left out; an empty mapping for none.
        stop: Level of each headline to stop the training at; True for ``max_logit`` 1e4.
        action: Called as ``action(trainer, pl_module, alarm)`` on every process, with an alarm's ``kind`` (warn, stop
            or predicted), ``quantity``, ``value`` and ``level``.
        targets: Parts of the model to watch, with everything below them; all of it when left out.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch. Used for attention,
            and for outputs where it has their shape.
        every_n_steps: Measure every so many optimizer steps. When left out, in steps that the Trainer logs, at least 20
            apart: the early warning was tested so, and at 10 the quickstart's model pays 8 % of its time.
        name: Name of the history file, in log keys, and of the arguments in the loggers' configuration.
    """

    def __init__(
        self,
        *,
        rows: int = 64,
        collapse: float = 0.1,
        quantities: Sequence[str] | None = None,
        warn: Levels | None = None,
        stop: Levels | bool = False,
        action: Action | None = None,
        targets: Targets = None,
        mask: Mask = None,
        every_n_steps: int | None = None,
        name: str = "stability",
    ) -> None:
        super().__init__(name, targets, mask)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"`rows` must be an integer >= 1, got {rows!r}. 64 rows of each head are the default.")
        if not 0 < collapse < 1:
            raise ValueError(f"`collapse` must be in (0, 1), a normalised entropy, got {collapse!r}.")
        if action is not None and not callable(action):
            raise TypeError(f"`action` must be callable with (trainer, pl_module, alarm), got {action!r}.")
        self.rows, self.collapse, self.action = rows, float(collapse), action
        self.quantities = check_quantities(quantities, QUANTITIES)
        default = {"max_logit": MAX_LOGIT_WARN, "entropy_min": self.collapse, "log_z_drift": LOG_Z_DRIFT}
        self.warn = check_levels("warn", default if warn is None else warn, HEADLINES)
        asked = {"max_logit": MAX_LOGIT_STOP} if stop is True else stop or {}
        self.stop = check_levels("stop", asked, HEADLINES)
        self.every_n_steps = check_count("every_n_steps", every_n_steps)
        self.latest: dict[str, float] = {}
        self._start_alarms()

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        names = ("rows", "collapse", "quantities", "warn", "stop", "every_n_steps")
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "targets": described(self.targets), "action": described(self.action)}

    # --- life ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, and with no alarm; a checkpoint's come after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start_alarms()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to watch: here the model exists, however it was built."""
        wanted = self.quantities or QUANTITIES
        found = {quantity: self._sites(quantity, pl_module) for quantity in wanted if quantity in _WATCHERS}
        missing = [quantity for quantity in self.quantities or () if not found.get(quantity, True)]
        if missing:
            raise ValueError(
                f"{type(self).__name__} found nothing to watch for {', '.join(missing)}: no module that computes "
                "attention, no output head, or no block of attention and MLP. Leave out `quantities` to watch what the "
                "model has, and check `targets`."
            )
        self._blocks: list[str] = block_outputs(pl_module)
        self._take_gradients = GRADIENTS in wanted
        watchers = {
            quantity: _WATCHERS[quantity](f"{self.name}/{quantity}", sites, self.mask, self.rows, pl_module.device)
            for quantity, sites in found.items()
            if sites
        }
        self.begin(trainer, pl_module, watchers)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the length of the training, beyond which nothing is predicted."""
        total = trainer.estimated_stepping_batches
        self._growth.until = total if 0 < total < math.inf else math.inf

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this step is measured, and which rows are."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._measured or self._unchecked:
            self._gradients.clear()
            for watcher in self._watchers.values():
                watcher.shift.fill_(shift_of(logged_step(trainer)))

    @override
    def is_due(self, trainer: pl.Trainer) -> bool:
        """Every so many steps, or those that reach the loggers and are not too close."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return reaches_loggers(trainer)
        if self.every_n_steps is not None:
            return (logged_step(trainer) + 1) % self.every_n_steps == 0
        between: int = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return reaches_loggers(trainer) and (logged_step(trainer) + 1) % (between * -(-LEAST_STEPS // between)) == 0

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients, unscaled and not yet clipped."""
        if self._measured and self._take_gradients:
            ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._gradients.update(_gradients(pl_module, ours, self._layer_of))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, write, log, and raise alarms."""
        engine = Engine.of(pl_module)
        engine.disarm()
        if self._unchecked and (outputs or not pl_module.automatic_optimization):
            self._check_fired(engine, pl_module)
        if self._measured:
            record = self._record(trainer, pl_module, engine)
            if headlines := _reduced(trainer, pl_module, self._headlines(record)):
                self._finish(trainer, pl_module, record, headlines)
        self.wake(False)

    def _finish(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: History, headlines: dict[str, float]
    ) -> None:
        alarms = self._alarms_of(headlines, logged_step(trainer) + 1)
        self.latest = headlines
        entries = [self._raise(trainer, pl_module, alarm) for alarm in alarms]
        head = {"step": logged_step(trainer), "epoch": trainer.current_epoch, "headlines": headlines}
        self._write(_plain({**head, **({"alarms": entries} if entries else {}), **record}))
        self._log(trainer, pl_module, headlines, record)

    def _forget(self) -> None:
        super()._forget()
        self._weights: Weights | None = None
        self._blocks = []
        self._layers: dict[str, str] = {}  # of parameters by name
        self._tops: list[str] = []  # modules that compute attention
        self._gradients: dict[str, tuple[Tensor, int]] = {}
        self._take_gradients = False

    # --- what to watch ---

    def _sites(self, quantity: str, model: pl.LightningModule) -> list[str]:
        if quantity == ATTENTION:
            found = list(capture.attention_candidates(model))
        elif quantity == MASSIVE:
            found = block_outputs(model)
        else:
            found = _output_heads(model)
        return self._selected(found, model)

    def _selected(self, names: list[str], model: nn.Module) -> list[str]:
        tops = capture.explicit_targets(self.targets, model)
        return (
            names if tops is None else [name for name in names if any(capture.at_or_below(name, top) for top in tops)]
        )

    def _check_fired(self, engine: Engine, model: pl.LightningModule) -> None:
        """After the first step: raise if something asked for did not run, and find the attention's weights."""
        self._unchecked = False
        fired = {
            quantity: [tap.site.name for tap in engine.taps[watcher] if tap.records]
            for quantity, watcher in self._watchers.items()
        }
        if WEIGHTS in (self.quantities or QUANTITIES):
            self._find_weights(model, fired.get(ATTENTION, []))
            fired[WEIGHTS] = list(self._weights.entries) if self._weights else self._tops
        idle = [quantity for quantity, sites in fired.items() if not sites and quantity in (self.quantities or ())]
        if idle or not (any(fired.values()) or self._take_gradients):
            raise RuntimeError(
                f"{type(self).__name__} saw no {', '.join(idle) or 'attention, output head or block'} in the first "
                "training step. It sees modules in training mode that run with gradient enabled, and attention in "
                "`F.scaled_dot_product_attention` and softmax. Leave the quantity out of `quantities`, and check "
                "`targets`."
            )
        watched = [f"{quantity} at {len(sites)} sites" for quantity, sites in fired.items() if sites]
        rank_zero_info(f"{type(self).__name__} watches {', '.join(watched) or 'gradients'}.")

    def _find_weights(self, model: pl.LightningModule, sites: list[str]) -> None:
        """Weights of the modules that computed attention, those of MLPs left out."""
        inner = {part for mlp in capture.find_mlps(model) for part in (*mlp.ups, mlp.down)}
        self._tops = sites or self._selected(_attention_modules(model), model)
        weights = Weights(model)
        weights.entries = {
            label: entry
            for label, entry in weights.entries.items()
            if label not in inner and any(capture.at_or_below(label, top) for top in self._tops)
        }
        self._weights = weights if weights.entries else None

    def _layer_of(self, name: str) -> str:
        """The block that a parameter belongs to, else the module."""
        if name not in self._layers:
            path = capture._plain_path(name)
            blocks = [block for block in self._blocks if capture.at_or_below(path, block)]
            self._layers[name] = max(blocks, key=len) if blocks else path.rpartition(".")[0]
        return self._layers[name]

    # --- measure ---

    @torch.no_grad()
    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, engine: Engine) -> History:
        """What was measured, as plain numbers, with one copy from the device."""
        taken: dict[tuple[str, str], list[Any]] = {}
        for quantity, watcher in self._watchers.items():
            for tap in engine.taps[watcher]:
                if tap.records:
                    taken[quantity, tap.site.label] = [value for _, value in tap.records]
                    tap.records.clear()
        tables = iter(_head_records([part for parts in taken.values() for part in parts if isinstance(part, tuple)]))
        seen = {
            (quantity, site): _joined(quantity, [next(tables) if isinstance(part, tuple) else part for part in parts])
            for (quantity, site), parts in taken.items()
        }
        norms: dict[str, Tensor] = {}
        if self._weights is not None:
            norms, ranks = self._weights.spectra()
            seen |= {("effective_rank", label): rank for label, rank in ranks.items()}
        if self._tops:
            others = {label: norm.max() for label, norm in reparametrized(trainer).items()}
            norms |= {
                label: norm for label, norm in others.items() if any(capture.at_or_below(label, t) for t in self._tops)
            }
        seen |= {("spectral_norm", label): norm for label, norm in norms.items()}
        seen |= {(GRADIENTS, layer): rms for layer, (rms, _) in self._gradients.items()}
        record: History = {}
        for (quantity, site), tensor in to_host(seen, pl_module.device).items():
            record.setdefault(quantity, {})[site] = _READERS.get(quantity, float)(tensor)
        return record

    def _headlines(self, record: History) -> dict[str, float]:
        """One number of each kind for the whole model."""
        found = _headlines(record, self.collapse)
        if self._gradients:
            sizes = {layer: size for layer, (_, size) in self._gradients.items()}
            squares = sum(record[GRADIENTS][layer] ** 2 * size for layer, size in sizes.items())
            found["gradient_rms"] = math.sqrt(squares / max(1, sum(sizes.values())))
        return found

    # --- alarms ---

    def _start_alarms(self) -> None:
        self._alarms = Alarms({"warn": self.warn, "stop": self.stop}, LOW)
        self._growth = EarlyWarning()
        self._predicted = False
        self._first_log_z: float | None = None

    def _alarms_of(self, headlines: dict[str, float], step: int) -> list[Alarm]:
        """Complete the headlines by what needs the past, and find the alarms that go off."""
        if "log_z" in headlines:
            if self._first_log_z is None and math.isfinite(headlines["log_z"]):
                self._first_log_z = headlines["log_z"]
            drift = headlines["log_z"] - (self._first_log_z or 0.0)
            headlines["log_z_drift"] = abs(drift)
        predicted = self._growth.update(step, headlines["max_logit"]) if "max_logit" in headlines else None
        predicted = None if predicted is None or predicted <= step else predicted  # it has crossed
        if predicted is not None:
            headlines["predicted_step"] = float(predicted)
        fired = self._alarms.check(headlines)
        if predicted is not None and not self._predicted:
            fired.append(Alarm("predicted", "max_logit", float(predicted), MAX_LOGIT_STOP))
        self._predicted = predicted is not None
        return fired

    def _raise(self, trainer: pl.Trainer, pl_module: pl.LightningModule, alarm: Alarm) -> dict[str, Any]:
        """Tell of an alarm and do what it asks for; returns its entry in the history."""
        entry: dict[str, Any] = {"kind": alarm.kind, "quantity": alarm.quantity, "level": alarm.level}
        entry["value"] = alarm.value
        text = f"{alarm}, at step {logged_step(trainer)}"
        if alarm.kind == "predicted":
            text = f"max_logit will cross {alarm.level:g} at about step {alarm.value:.0f}, where trainings diverge"
        rank_zero_warn(f"{type(self).__name__}: {text}.{' The training stops.' if alarm.kind == 'stop' else ''}")
        if alarm.kind == "stop":
            trainer.should_stop = True
        if self.action is not None:
            try:
                self.action(trainer, pl_module, alarm)
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
                rank_zero_warn(
                    f"{type(self).__name__}: the action raised {entry['error']}; the training goes on. What it had "
                    "done to the model stays."
                )
        return entry

    # --- log ---

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, headlines: dict[str, float], record: History
    ) -> None:
        values = {**headlines, "alarm": float(len(self._alarms.active) + self._predicted)}
        values = {f"reg/{self.name}/{name}": value for name, value in values.items()}
        values |= {f"reg/{self.name}/{key}": value for key, value in _details(record).items()}
        # few go through `log`: Lightning looks at each of them again in every step
        through = {key for key in values if key.rpartition("/")[2] in THROUGH_LOG} if not trainer.barebones else set()
        for key in sorted(through):
            in_bar = key.rpartition("/")[2] in IN_BAR
            pl_module.log(key, torch.tensor(values[key]), prog_bar=in_bar, batch_size=1, rank_zero_only=False)
        if reaches_loggers(trainer):
            values = {key: value for key, value in values.items() if key not in through}
        elif self.every_n_steps is None:
            return  # the first step, which is measured for the check
        trainer._logger_connector.log_metrics(values)  # type: ignore[arg-type]

    # --- checkpoints ---

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint. Lightning asks for it at every hook."""
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Alarms that are on, and what they go by."""
        state = {"first_log_z": self._first_log_z, "predicted": self._predicted}
        return {**state, **self._alarms.state_dict(), "growth": self._growth.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved: an alarm that went off then does not go off again."""
        self._first_log_z, self._predicted = state_dict["first_log_z"], state_dict["predicted"]
        self._alarms.load_state_dict(state_dict)
        self._growth.load_state_dict(state_dict["growth"])


# --- where -----------------------------------------------------------------------------------------------------------


def block_outputs(model: nn.Module) -> list[str]:
    """Names of the blocks whose output is the residual stream: entries of a list that hold an MLP and more linear maps.

    The innermost around each MLP, as the list of a transformer's layers has them.
    """
    modules = capture.named_modules(model)
    mlps = capture.find_mlps(model)
    inner = {part for mlp in mlps for part in (*mlp.ups, mlp.down)}
    others = [name for name, module in modules.items() if name not in inner and _has_matrix(module)]
    found: dict[str, None] = {}
    for mlp in mlps:
        name = mlp.down.rpartition(".")[0]
        while name:
            parent = name.rpartition(".")[0]
            listed = isinstance(modules.get(parent), (nn.ModuleList, nn.Sequential))
            runs = not isinstance(modules[name], (nn.ModuleList, nn.ModuleDict))
            if listed and runs and any(capture.at_or_below(other, name) for other in others):
                found[name] = None
                break
            name = parent
    return list(found)


def _has_matrix(module: nn.Module) -> bool:
    if capture.projection_sizes(module) is not None:  # also where a parametrization has taken the weight
        return True
    return any(weight is not None and weight.dim() > 1 for weight in module._parameters.values())


def _output_heads(model: nn.Module) -> list[str]:
    try:
        return capture.select_heads(None, model)
    except ValueError:
        return []


def _attention_modules(model: nn.Module) -> list[str]:
    """Modules that are called attention, for when none was watched."""
    return [name for name in capture.named_modules(model) if capture._ATTENTION_PATH.search(name)]


def _gradients(model: nn.Module, ours: set[int], layer_of: Callable[[str], str]) -> dict[str, tuple[Tensor, int]]:
    """Root mean square and number of elements of the gradients of each layer."""
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and id(parameter) in ours:
            layers.setdefault(layer_of(name), []).append(_local(parameter.grad))
    found: dict[str, tuple[Tensor, int]] = {}
    for device in dict.fromkeys(tensors[0].device for tensors in layers.values()):
        here = {layer: tensors for layer, tensors in layers.items() if tensors[0].device == device}
        groups = [number for number, tensors in enumerate(here.values()) for _ in tensors]
        values = gradient_rms([tensor for tensors in here.values() for tensor in tensors], groups)
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in here.values()]
        found |= dict(zip(here, zip(values, sizes, strict=True), strict=True))
    return found


def _local(gradient: Tensor) -> Tensor:
    """This process's shard of a sharded gradient, the values of a sparse one."""
    gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[operator]
    return gradient.coalesce().values() if gradient.is_sparse else gradient


# --- numbers ---------------------------------------------------------------------------------------------------------


def _read_heads(table: Tensor) -> dict[str, list[float | None]]:
    """Means and extremes of each head; None where nothing was counted."""
    columns = table.T
    of, count = {
        "entropy": columns[_ENTROPY] / columns[_ROWS],
        "entropy_min": columns[_MIN],
        "entropy_p10": columns[_P10] / columns[_ROWS],
        "entropy_floor": columns[_FLOOR] / columns[_ROWS],
        "max_logit": columns[_MAX],
        "k90": columns[_K90] / columns[_SEEN],
        "effective_keys": columns[_EFFECTIVE] / columns[_SEEN],
        "largest_weight": columns[_LARGEST] / columns[_SEEN],
        "q_norm": columns[_QUERY] / columns[_SEEN],
        "k_norm": columns[_KEY] / columns[_KEYS],
    }, dict.fromkeys(("entropy", "entropy_min", "entropy_p10", "entropy_floor"), columns[_ROWS].tolist())  # fmt: skip
    count |= dict.fromkeys(("max_logit", "k90", "effective_keys", "largest_weight"), columns[_SEEN].tolist())
    count |= dict.fromkeys(("q_norm", "k_norm"), columns[_KEYS].tolist())
    return {
        name: [value if number else None for value, number in zip(values.tolist(), count[name], strict=True)]
        for name, values in of.items()
    }


def _read_logits(record: Tensor) -> dict[str, float | None]:
    count, log_z, largest = record.tolist()
    return {"max_logit": largest if count else None, "log_z": log_z / count if count else None}


def _read_massive(record: Tensor) -> float:
    largest, median = record.tolist()
    return 0.0 if largest == 0 else largest / median if median else math.inf


def _read_norm(norms: Tensor) -> float:
    return float(norms.amax())


def _read_ranks(ranks: Tensor) -> float | None:
    """The least of the parts whose turn has come."""
    return _least([rank for rank in ranks.tolist() if rank != math.inf])


def _headlines(record: History, collapse: float) -> dict[str, float]:
    """The headlines that follow from a record."""
    found: dict[str, float | None] = {}
    heads: dict[str, list[float]] = {}
    for site in record.get(ATTENTION, {}).values():
        for name, values in site.items():
            heads.setdefault(name, []).extend(value for value in values if value is not None)
    if entropy := heads.get("entropy"):
        found["entropy_mean"], found["entropy_min"] = sum(entropy) / len(entropy), _least(entropy)
        found["entropy_p10"] = float(torch.tensor(entropy, dtype=torch.float64).quantile(0.1))
        found["collapsed_share"] = sum(not value >= collapse for value in entropy) / len(entropy)
    found["entropy_floor_min"] = _least(heads.get("entropy_floor"))
    found["max_logit"] = _infinite(_most(heads.get("max_logit")))
    found["k90_min"], found["k90_max"] = _least(heads.get("k90")), _most(heads.get("k90"))
    found["effective_keys_min"] = _least(heads.get("effective_keys"))
    found["q_norm_max"], found["k_norm_max"] = _most(heads.get("q_norm")), _most(heads.get("k_norm"))
    outputs = [output for output in record.get(LOGITS, {}).values() if output["log_z"] is not None]
    if outputs:
        found["output_logit"] = _infinite(_most([output["max_logit"] for output in outputs]))
        found["log_z"] = sum(output["log_z"] for output in outputs) / len(outputs)
    found["massive_activation"] = _most(record.get(MASSIVE, {}).values())
    found["spectral_norm_max"] = _most(record.get("spectral_norm", {}).values())
    found["effective_rank_min"] = _least(record.get("effective_rank", {}).values())
    found["gradient_rms_max"] = _most(record.get(GRADIENTS, {}).values())
    return {name: value for name, value in found.items() if value is not None}


def _extreme(choose: Callable[[Iterable[float]], float], values: Iterable[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    if any(map(math.isnan, known)):
        return math.nan
    return choose(known) if known else None


_least, _most = partial(_extreme, min), partial(_extreme, max)


def _infinite(value: float | None) -> float | None:
    """A logit that is not a number is beyond all others, also for a condition such as ``max_logit > 100``."""
    return math.inf if value is not None and math.isnan(value) else value


def _reduced(trainer: pl.Trainer, pl_module: pl.LightningModule, headlines: dict[str, float]) -> dict[str, float]:
    """The same on every process: the worst of extremes, the mean of means."""
    if trainer.world_size == 1:
        return headlines
    row = [[headlines.get(name, 0.0), float(name in headlines)] for name in HEADLINES]
    table = torch.tensor(row, dtype=torch.float64, device=pl_module.device)
    gathered = torch.stack(gather_all_tensors(table)).cpu()
    found: dict[str, float] = {}
    for place, name in enumerate(HEADLINES):
        values = [float(value) for value, known in gathered[:, place] if known]
        if values:
            worst = _least(values) if name.endswith("_min") else _most(values)
            found[name] = sum(values) / len(values) if name in MEANS else worst  # type: ignore[assignment]
    return found


def _details(record: History) -> dict[str, float]:
    """Values of single heads and sites by log key."""
    found: dict[str, float | None] = {}
    for site, measured in record.get(ATTENTION, {}).items():
        for name in PER_HEAD:
            found |= {f"{name}/{site}/{head}": value for head, value in enumerate(measured[name])}
    keys = {MASSIVE: "massive_activation", **dict.fromkeys(("spectral_norm", "effective_rank", GRADIENTS))}
    for quantity, key in keys.items():
        found |= {f"{key or quantity}/{site}": value for site, value in record.get(quantity, {}).items()}
    return known(found)


def _plain(value: Any) -> Any:
    """Numbers of eight digits, None for those that are not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value


_WATCHERS: dict[str, type[_Sampler]] = {ATTENTION: _AttentionWatcher, LOGITS: _LogitsWatcher, MASSIVE: _OutputWatcher}
_READERS: dict[str, Callable[[Tensor], Any]] = {
    ATTENTION: _read_heads, LOGITS: _read_logits, MASSIVE: _read_massive,
    "spectral_norm": _read_norm, "effective_rank": _read_ranks,
}  # fmt: skip
