"""Watches attention entropy, activation density and spectral norms of a training, and changes nothing in it.

The quantities are those of `functional`; the regularizers' engine shows the monitor what passes at their sites, at the
steps whose metrics Lightning hands to the loggers and at no others.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_reg import capture, plotting
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.recording import (
    History,
    Monitor,
    Watcher,
    check_count,
    check_quantities,
    described,
    every,
    known,
    logged_step,
    mean,
    number,
    reaches_loggers,
    reparametrized,
    show,
    sigma_reparams,
    spaced,
    to_host,
    when,
)  # fmt: skip
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine
from lightning_reg.functional.activation_density import check_threshold, count_active
from lightning_reg.functional.attention_entropy import normalize_entropy, rows_with_choice
from lightning_reg.spectra import Weights

ENTROPY, DENSITY, NORM = "attention_entropy", "activation_density", "spectral_norm"
QUANTITIES = (ENTROPY, DENSITY, NORM)
ENTROPY_EDGES = [step / 20 for step in range(1, 20)]
# half decades: what an exact zero, a GELU's tail and an outlier differ by
MAGNITUDE_EDGES = [10 ** (step / 2) for step in range(-13, 5)]

Seen = dict[str, dict[str, Tensor]]  # records by quantity and site


# --- what is seen in the forward -------------------------------------------------------------------------------------


class _EntropyWatcher(Watcher):
    """A record is (heads, 2 + edges): sum, count, and the counts at or above each edge."""

    role = "attention"

    def __init__(self, name: str, sites: list[str], mask: Mask, histogram: bool) -> None:
        super().__init__(name, sites, mask)
        self.edges = ENTROPY_EDGES if histogram else []

    def see_attention(self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None) -> tuple[None, Tensor]:
        """Record of each head, from rows in nats (batch, heads, queries)."""
        counted = rows_with_choice(entropy, visible, normalize=True)
        counted = (counted if valid is None else counted & valid).expand(entropy.shape)
        entropy, counted = _by_head(normalize_entropy(entropy, visible)), _by_head(counted)
        above = [((entropy >= edge) & counted).sum(1) for edge in self.edges]
        total = torch.where(counted, entropy, 0.0).sum(1)
        return None, torch.stack([total, *(column.to(total.dtype) for column in (counted.sum(1), *above))], 1)


class _DensityWatcher(Watcher):
    """A record is (1, 2 + edges), as above."""

    role = "mlp_hidden"

    def __init__(self, name: str, sites: list[str], mask: Mask, threshold: float, histogram: bool) -> None:
        super().__init__(name, sites, mask)
        self.threshold = threshold
        self.edges = MAGNITUDE_EDGES if histogram else []

    def see_activations(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None, Tensor]:
        """Record of a layer, one row, from a down-projection's input (..., width)."""
        active, valid = count_active(x, threshold=self.threshold, mask=mask)
        above = [count_active(x, threshold=edge, mask=mask)[0] for edge in self.edges]
        return x, None, torch.stack([active, valid, *above]).float().unsqueeze(0)


def _by_head(rows: Tensor) -> Tensor:
    """(batch, heads, queries) as (heads, batch * queries); fewer axes have one head."""
    return rows.reshape(1, -1) if rows.dim() < 3 else rows.movedim(-2, 0).flatten(1)


def _summed(records: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Record of all calls of a step. Calls with different numbers of heads, as cross-attention has, become one row."""
    rows = [value for _, value in records]
    if len({row.shape for row in rows}) > 1:
        rows = [row.sum(0, keepdim=True) for row in rows]
    return torch.stack(rows).sum(0)


# --- the callback ----------------------------------------------------------------------------------------------------


class RegMonitor(Monitor):
    """Logs attention entropy by head, activation density by layer and spectral norm by weight, of any model.

    Measured in training steps whose metrics reach the loggers, and in the first; between them it costs nothing, and
    training is bit-identical to one without it. Values are those of the batch on each process, not reduced: loggers
    and files show rank zero's. Spectral norms are those after the step. It works with or without regularizers, and
    leaves out what they log.

    Logs ``reg/attention_entropy/{value,min_head,p10_head,layers/<site>,heads/<site>/<head>}`` (normalised, in [0, 1]),
    ``reg/activation_density/{mean_active,active/<site>}`` (share of activations above ``threshold``) and
    ``reg/spectral_norm/{max,layers/<site>}``. Values of single sites go to the loggers only: Lightning would look at
    each in every step. Everything is also in ``history`` and in ``<name>.jsonl`` beside the logs.

    Args:
        quantities: Of ``attention_entropy``, ``activation_density`` and ``spectral_norm``, those to watch; a training
            without one of them raises. What the model has when left out.
        targets: Parts of the model to watch, with everything below them; all of it when left out.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch.
        threshold: Magnitude up to which an activation counts as zero; 0 counts exact zeros.
        per_head: Log each head as a scalar of its own.
        max_layers: Watch at most so many sites of each quantity, evenly spaced through the model.
        heatmap_every_n_epochs: Draw entropy by layer and head at the end of every so many epochs.
        histogram_every_n_epochs: Draw the distributions of row entropies and of activation magnitudes as often.
        name: Name of the history file and of the arguments in the loggers' configuration.
    """

    def __init__(
        self,
        *,
        quantities: Sequence[str] | None = None,
        targets: Targets = None,
        mask: Mask = None,
        threshold: float = 0.0,
        per_head: bool = True,
        max_layers: int | None = None,
        heatmap_every_n_epochs: int | None = None,
        histogram_every_n_epochs: int | None = None,
        name: str = "reg_monitor",
    ) -> None:
        super().__init__(name, targets, mask)
        self.quantities, self.per_head = check_quantities(quantities, QUANTITIES), per_head
        self.threshold = check_threshold(threshold)
        self.max_layers = check_count("max_layers", max_layers)
        self.heatmap_every_n_epochs = check_count("heatmap_every_n_epochs", heatmap_every_n_epochs)
        self.histogram_every_n_epochs = check_count("histogram_every_n_epochs", histogram_every_n_epochs)

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        names = ("threshold", "per_head", "max_layers", "heatmap_every_n_epochs", "histogram_every_n_epochs")
        return {
            "quantities": self.quantities,
            "targets": described(self.targets),
            **{name: getattr(self, name) for name in names},
        }

    # --- life ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, also after a crashed fit."""
        if stage == "fit" and (self.heatmap_every_n_epochs or self.histogram_every_n_epochs):
            plotting.check_matplotlib()
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to watch: here the model exists, however it was built."""
        sites = {quantity: self._sites(quantity, trainer, pl_module) for quantity in self.quantities or QUANTITIES}
        missing = [quantity for quantity in self.quantities or () if not sites[quantity]]
        if missing or not any(sites.values()):
            raise ValueError(
                f"RegMonitor found nothing to watch for {', '.join(missing or QUANTITIES)}: no module that computes "
                "attention, no MLP down-projection, or no weight of a linear map. Leave out `quantities` to watch what "
                "the model has, and check `targets`."
            )
        self._norm_sites += sites.get(NORM, [])
        self.begin(trainer, pl_module, self._make_watchers(sites))

    @override
    def is_due(self, trainer: pl.Trainer) -> bool:
        """The steps that reach the loggers, and the last of an epoch that is drawn."""
        epoch_ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        drawn = every(self.heatmap_every_n_epochs, trainer) or every(self.histogram_every_n_epochs, trainer)
        return (drawn and epoch_ends) or reaches_loggers(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, write and log."""
        engine = Engine.of(pl_module)
        engine.disarm()
        if self._unchecked and (outputs or not pl_module.automatic_optimization):
            self._check_fired(engine)
        if self._measured:
            seen = self._copy_to_host(trainer, pl_module, engine)
            if record := self._record(trainer, seen):
                self._write(record)
                self._log(trainer, pl_module, engine, record)
        self.wake(False)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what is asked for, from the last step of the epoch."""
        if not trainer.is_global_zero or not self.history or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if every(self.heatmap_every_n_epochs, trainer):
            self._draw_heatmap(trainer)
        if every(self.histogram_every_n_epochs, trainer):
            self._draw_histograms(trainer)

    def _forget(self) -> None:
        super()._forget()
        self._weights: Weights | None = None
        self._norm_sites: list[str] = []
        self._bins: dict[str, dict[str, list[float]]] = {}

    # --- what to watch ---

    def _sites(self, quantity: str, trainer: pl.Trainer, model: pl.LightningModule) -> list[str]:
        if quantity == ENTROPY:
            found = list(capture.attention_candidates(model))
        elif quantity == DENSITY:
            found = capture.find_down_projections(model)
        else:
            self._weights = Weights(model)
            found = [*reparametrized(trainer), *self._weights.entries]
        selected = capture.explicit_targets(self.targets, model)
        if selected is not None:
            found = [name for name in found if any(capture.at_or_below(name, top) for top in selected)]
        # attention is known by what runs: its sites are thinned out after the first step
        found = found if quantity == ENTROPY else spaced(found, self.max_layers)
        if quantity == NORM and self._weights is not None:
            entries = self._weights.entries
            self._weights.entries = {name: entries[name] for name in found if name in entries}
        return found

    def _make_watchers(self, sites: dict[str, list[str]]) -> dict[str, Watcher]:
        histogram = self.histogram_every_n_epochs is not None
        watchers: dict[str, Watcher] = {}
        if sites.get(ENTROPY):
            watchers[ENTROPY] = _EntropyWatcher(f"{self.name}/{ENTROPY}", sites[ENTROPY], self.mask, histogram)
        if sites.get(DENSITY):
            watchers[DENSITY] = _DensityWatcher(
                f"{self.name}/{DENSITY}", sites[DENSITY], self.mask, self.threshold, histogram
            )
        return watchers

    def _check_fired(self, engine: Engine) -> None:
        """After the first step: raise if something asked for did not run, and thin out the attention sites."""
        self._unchecked = False
        counts = {NORM: len(self._norm_sites)}
        for quantity, watcher in self._watchers.items():
            taps = engine.taps[watcher]
            kept = spaced([tap for tap in taps if tap.records], self.max_layers)
            for tap in taps:
                tap.dropped = self.max_layers is not None and tap not in kept
            counts[quantity] = len(kept)
        asked = set(self.quantities or ()) | ({ENTROPY} if self.heatmap_every_n_epochs else set())
        idle = [quantity for quantity in QUANTITIES if quantity in asked and not counts.get(quantity)]
        if idle or not any(counts.values()):
            raise RuntimeError(
                f"RegMonitor saw no {', '.join(idle) or 'attention and no MLP'} in the first training step. It sees "
                "modules in training mode that run with gradient enabled, and attention in "
                "`F.scaled_dot_product_attention` and softmax. Leave the quantity out of `quantities`, leave out "
                "`heatmap_every_n_epochs` for a model without attention, and check `targets`."
            )
        watched = [f"{quantity} at {counts[quantity]} sites" for quantity in QUANTITIES if counts.get(quantity)]
        rank_zero_info(f"RegMonitor watches {', '.join(watched)}.")

    # --- measure ---

    @torch.no_grad()
    def _copy_to_host(self, trainer: pl.Trainer, pl_module: pl.LightningModule, engine: Engine) -> Seen:
        """Records of each quantity by site, with one copy from the device."""
        seen: dict[tuple[str, str], Tensor] = {}
        for quantity, watcher in self._watchers.items():
            for tap in engine.taps[watcher]:
                if tap.records and not tap.dropped:
                    seen[quantity, tap.site.label] = _summed(tap.records)
        if self._norm_sites:
            norms = {**reparametrized(trainer), **(self._weights.norms() if self._weights else {})}
            seen |= {(NORM, site): norms[site].max() for site in self._norm_sites if site in norms}
        host: Seen = {}
        for (quantity, site), tensor in to_host(seen, pl_module.device).items():
            host.setdefault(quantity, {})[site] = tensor
        return host

    def _record(self, trainer: pl.Trainer, seen: Seen) -> History:
        record: History = {}
        for quantity in QUANTITIES:
            by_site = seen.get(quantity, {})
            if quantity == NORM:
                values: dict[str, Any] = {site: number(norm) for site, norm in by_site.items()}
            else:
                means = {site: [number(row[0] / row[1]) for row in rows] for site, rows in by_site.items()}
                values = means if quantity == ENTROPY else {site: mean[0] for site, mean in means.items()}
                self._bins[quantity] = {site: _bins(rows) for site, rows in by_site.items() if rows.shape[1] > 2}
            if values:
                record[quantity] = values
        return {"step": logged_step(trainer), "epoch": trainer.current_epoch, **record} if record else {}

    # --- log ---

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, engine: Engine, record: History) -> None:
        headline, details = self._scalars(trainer, engine, record)
        roles = {regularizer.role for regularizer in engine.regularizers}
        shown = {f"reg/{ENTROPY}/value": "attention", f"reg/{DENSITY}/mean_active": "mlp_hidden"}
        if not trainer.barebones:
            for key, value in headline.items():
                in_bar = key in shown and shown[key] not in roles
                pl_module.log(key, torch.tensor(value), prog_bar=in_bar, batch_size=1, rank_zero_only=False)
        if details and reaches_loggers(trainer):
            trainer._logger_connector.log_metrics(details)  # type: ignore[arg-type]

    def _scalars(
        self, trainer: pl.Trainer, engine: Engine, record: History
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Summaries, and values of single sites, without those that a regularizer logs."""
        headline: dict[str, float | None] = {}
        details: dict[str, float | None] = {}
        names = {regularizer.name for regularizer in engine.regularizers}
        if heads := record.get(ENTROPY):
            numbers = torch.tensor([value for row in heads.values() for value in row if value is not None])
            means = {site: mean(row) for site, row in heads.items()}
            if ENTROPY not in names:
                headline[f"reg/{ENTROPY}/value"] = mean(means.values())
            logged = engine.layers.get(ENTROPY, {}) if ENTROPY in names else {}
            details |= {f"reg/{ENTROPY}/layers/{site}": mean for site, mean in means.items() if site not in logged}
            if len(numbers):
                headline[f"reg/{ENTROPY}/min_head"] = float(numbers.min())
                headline[f"reg/{ENTROPY}/p10_head"] = float(numbers.quantile(0.1))
            if self.per_head:
                for site, row in heads.items():
                    details |= {f"reg/{ENTROPY}/heads/{site}/{head}": value for head, value in enumerate(row)}
        if density := record.get(DENSITY):
            headline[f"reg/{DENSITY}/mean_active"] = mean(density.values())
            details |= {f"reg/{DENSITY}/active/{site}": value for site, value in density.items()}
        if norms := record.get(NORM):
            if not any(callback.name == NORM for callback in sigma_reparams(trainer)):
                headline[f"reg/{NORM}/max"] = max((norm for norm in norms.values() if norm is not None), default=None)
            details |= {f"reg/{NORM}/layers/{site}": value for site, value in norms.items()}
        return known(headline), known(details)

    # --- figures ---

    def _draw_heatmap(self, trainer: pl.Trainer) -> None:
        record = self.history[-1]
        if ENTROPY in record:
            title = f"Attention entropy by layer and head, {when(record)}"
            figure = plotting.head_heatmap(record[ENTROPY], title=title)
            show(trainer, f"reg/{ENTROPY}/heatmap", figure, record["step"])

    def _draw_histograms(self, trainer: pl.Trainer) -> None:
        record = self.history[-1]
        if bins := self._bins.get(ENTROPY):
            figure = plotting.layer_histograms(
                bins,
                [f"{edge:g}" for edge in ENTROPY_EDGES],
                title=f"Entropy of attention rows, {when(record)}",
                axis="entropy / log(visible keys), 0 = one key, 1 = uniform",
                layers="attention layer",
                of="rows",
            )
            show(trainer, f"reg/{ENTROPY}/histogram", figure, record["step"])
        if bins := self._bins.get(DENSITY):
            figure = plotting.layer_histograms(
                bins,
                [f"{edge:.0e}" for edge in MAGNITUDE_EDGES],
                title=f"Magnitude of MLP activations, {when(record)}",
                axis="|x| at the input of the down-projection; exact zeros are at the left end",
                layers="MLP down-projection",
                of="activations",
            )
            show(trainer, f"reg/{DENSITY}/histogram", figure, record["step"])


# --- small parts -----------------------------------------------------------------------------------------------------


def _bins(rows: Tensor) -> list[float]:
    """Counts between the edges, of all rows, from counts at or above each edge."""
    totals = rows.sum(0).tolist()
    above = [*totals[1:], 0.0]
    return [low - high for low, high in pairwise(above)]
