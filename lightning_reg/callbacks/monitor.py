"""Watches attention entropy, activation density and spectral norms of a training, and changes nothing in it.

The quantities are those of `functional`; the regularizers' engine shows the monitor what passes at their sites, at the
steps whose metrics Lightning hands to the loggers and at no others.
"""

import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture, plotting, reparam
from lightning_reg.callbacks.observer import Mask, Observer
from lightning_reg.callbacks.regularizer import plain_targets
from lightning_reg.callbacks.spectral_norm import SigmaReparam
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine, Tap
from lightning_reg.functional.activation_density import check_threshold, count_active
from lightning_reg.functional.attention_entropy import normalize_entropy, rows_with_choice
from lightning_reg.functional.spectral_norm import (
    leading_singular_triplet,
    weight_matrices,
)

ENTROPY, DENSITY, NORM = "attention_entropy", "activation_density", "spectral_norm"
QUANTITIES = (ENTROPY, DENSITY, NORM)
BLOCK, ROUNDS = 16, 3  # of the subspace iteration for spectral norms: vectors, and products with W and its transpose
MOST_HELD = 2**26  # elements of the weights that are copied at a time
ENTROPY_EDGES = [step / 20 for step in range(1, 20)]
# half decades: what an exact zero, a GELU's tail and an outlier differ by
MAGNITUDE_EDGES = [10 ** (step / 2) for step in range(-13, 5)]

History = dict[str, Any]
Seen = dict[str, dict[str, Tensor]]  # records by quantity and site


# --- what is seen in the forward -------------------------------------------------------------------------------------


class _Watcher(Observer):
    """One quantity at its sites. A record is (rows, 2 + edges): sum, count, and the counts at or above each edge."""

    def __init__(self, name: str, sites: list[str], mask: Mask) -> None:
        self.name, self.mask = name, mask
        self.sites = sites
        self.awake = False
        self.allow_unused = True  # the monitor checks itself

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """The sites, never as explicit ones: that would change what a regularizer sees there."""
        return [(site, False) for site in self.sites]

    def check_fired(self, taps: list[Tap]) -> None:
        """Left to the monitor."""


class _EntropyWatcher(_Watcher):
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


class _DensityWatcher(_Watcher):
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


# --- what is seen in the weights -------------------------------------------------------------------------------------


class _Weights:
    """Spectral norms of plain weights: exact at first, then by a subspace iteration that goes on where it stopped.

    The power method of `functional.spectral_norm` follows a weight that moves a little in each step. Between two
    logging steps a new direction can take the lead: a few products with a block of vectors find it, with one vector
    take tens (measured on a small ViT, 50 AdamW steps apart: 0.7 % too low at worst, against 35 %).
    """

    def __init__(self, model: nn.Module) -> None:
        self.entries = dict(_default_weights(model))
        self.bases: dict[str, Tensor] = {}  # (parts, columns, block), the leading vector last

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Largest spectral norm of the parts of each weight, scalars."""
        norms: dict[str, Tensor] = {}
        for group in self._groups():
            matrices = {label: self._matrices(label) for label in group}
            for label in group:
                if label not in self.bases:
                    self.bases[label] = _first_basis(matrices[label])
            bases = {label: self.bases[label] for label in group}
            for _ in range(ROUNDS):
                images = _orthonormal({label: matrices[label] @ basis for label, basis in bases.items()})
                bases = _orthonormal({label: matrices[label].mT @ image for label, image in images.items()})
            for label, basis in bases.items():
                norms[label] = _norm_along(matrices[label], basis[..., -1])
                self.bases[label] = _revived(basis)
        return norms

    def _groups(self) -> list[list[str]]:
        """Labels whose weights are held at a time: in half precision or sharded they are copies."""
        groups: list[list[str]] = []
        held = MOST_HELD
        for label, (owner, tensor, *_) in self.entries.items():
            size = owner._parameters[tensor].numel()  # type: ignore[union-attr]
            if held + size > MOST_HELD:
                groups.append([])
                held = 0
            groups[-1].append(label)
            held += size
        return groups

    def _matrices(self, label: str) -> Tensor:
        owner, tensor, parts, transposed = self.entries[label]
        weight = reparam.whole_tensor(owner._parameters[tensor].detach())  # type: ignore[union-attr]
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight_matrices(exact, parts, transposed)


def _first_basis(matrices: Tensor) -> Tensor:
    """Random vectors, and the exact leading one, (parts, columns, block)."""
    _, _, leading = leading_singular_triplet(matrices)
    basis = _random_basis(matrices.shape[-1], min(BLOCK, *matrices.shape[1:]), leading)
    return torch.cat([basis.expand(len(matrices), -1, -1)[..., 1:], leading.nan_to_num(0.0).unsqueeze(-1)], -1)


def _random_basis(columns: int, block: int, like: Tensor) -> Tensor:
    basis = torch.randn(columns, block, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(basis, dim=0).to(like)


def _orthonormal(blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal bases of the columns of each block (parts, rows, block), the leading singular vector last.

    From the eigenvectors of the Gram matrices, all in one batch: a QR for each would be hundreds of small calls.
    """
    grams = [(block.mT @ block).nan_to_num(0.0, 0.0, 0.0) for block in blocks.values()]
    wide = [nn.functional.pad(gram, (0, BLOCK - gram.shape[-1]) * 2) for gram in grams]
    values, vectors = torch.linalg.eigh(torch.cat(wide))
    # directions below the rounding of the largest stay short, so that they are not taken for anything
    limits = torch.finfo(values.dtype)
    scale = values.maximum(values[:, -1:] * limits.eps).clamp_min(limits.tiny).rsqrt().unsqueeze(-2)
    turns = (vectors * scale).split([len(gram) for gram in grams])
    return {
        label: block @ turn[:, : block.shape[-1], -block.shape[-1] :]
        for (label, block), turn in zip(blocks.items(), turns, strict=True)
    }


def _norm_along(matrices: Tensor, vectors: Tensor) -> Tensor:
    # matrix-vector products do not round through TF32, whatever the user allowed
    vectors = nn.functional.normalize(vectors, dim=-1)
    return torch.stack(
        [torch.mv(matrix, vector).norm() for matrix, vector in zip(matrices, vectors, strict=True)]
    ).max()


def _revived(basis: Tensor) -> Tensor:
    """Replace what a weight of 0 (LoRA, adaLN-zero) or one that is not finite left behind by random vectors."""
    alive = basis.norm(dim=-2, keepdim=True) > 0.5
    return torch.where(alive, basis, _random_basis(basis.shape[-2], basis.shape[-1], basis))


def _default_weights(model: nn.Module) -> list[tuple[str, tuple[nn.Module, str, int, bool]]]:
    """The weights that `SigmaReparam` takes by default and has not taken: label, owner, tensor, parts, transposed."""
    modules = capture.named_modules(model)
    owners = reparam._owners(modules)
    found: dict[int, tuple[str, tuple[nn.Module, str, int, bool]]] = {}
    for name, module in modules.items():
        for tensor in reparam._weight_names(module):
            weight = module._parameters.get(tensor)
            if weight is None or reparam._unsupported(module, tensor, weight) or weight.dim() < 2:
                continue
            if id(weight) in found or any(isinstance(owner, nn.Embedding) for _, owner, _ in owners[id(weight)]):
                continue
            parts = reparam._parts(name, module, tensor, modules.get(name.rpartition(".")[0]))
            entry = module, tensor, parts, reparam._is_transposed(module)
            found[id(weight)] = reparam._label(name, tensor), entry
    return list(found.values())


# --- history ---------------------------------------------------------------------------------------------------------


class _HistoryFile:
    """One JSON object a line, one line a measured step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def restart(self, step: int) -> list[History]:
        """Keep what lies before ``step``, which a resumed training will not repeat; put a finished file aside."""
        if not self.path.exists():
            return []
        if step == 0:
            os.replace(self.path, self._free_name())
            return []
        kept = [record for line in self.path.read_text().splitlines() if (record := _parsed(line))["step"] < step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        os.replace(temporary, self.path)
        return kept

    def append(self, record: History) -> None:
        """Write one line at once, so that a crash leaves at most one line behind that is not whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{json.dumps(record)}\n")

    def _free_name(self) -> Path:
        number = 1
        while (path := self.path.with_suffix(f".{number}.jsonl")).exists():
            number += 1
        return path


def _parsed(line: str) -> History:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {"step": math.inf}  # the line a crash cut off


# --- the callback ----------------------------------------------------------------------------------------------------


class RegMonitor(Callback):
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
        super().__init__()
        self.quantities = _check_quantities(quantities)
        self.targets, self.mask, self.per_head = plain_targets(targets), mask, per_head
        self.threshold = check_threshold(threshold)
        self.max_layers = _check_count("max_layers", max_layers)
        self.heatmap_every_n_epochs = _check_count("heatmap_every_n_epochs", heatmap_every_n_epochs)
        self.histogram_every_n_epochs = _check_count("histogram_every_n_epochs", histogram_every_n_epochs)
        if not name or any(separator in name for separator in "/\\"):
            raise ValueError(f"`name` must be usable as a file name, got {name!r}.")
        self.name = name
        self.history: list[History] = []
        self.path: Path | None = None
        self._watchers: dict[str, _Watcher] = {}
        self._forget()

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        names = ("threshold", "per_head", "max_layers", "heatmap_every_n_epochs", "histogram_every_n_epochs")
        return {
            "quantities": self.quantities,
            "targets": _described(self.targets),
            **{name: getattr(self, name) for name in names},
        }

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Refuse hand-written loops: they have no logging steps.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "RegMonitor needs a Trainer, whose logging steps it follows. In a hand-written loop use "
            "`lightning_reg.metrics`."
        )

    def detach(self, model: nn.Module) -> None:
        """Counterpart of ``attach``."""

    # --- life ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, also after a crashed fit."""
        if stage != "fit":
            return
        if self.heatmap_every_n_epochs or self.histogram_every_n_epochs:
            plotting.check_matplotlib()
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, RegMonitor) and other is not self and other.name == self.name for other in others):
            raise ValueError(f"`name` must differ between monitors of one Trainer, got {self.name!r} twice.")
        if (engine := Engine.find(pl_module)) is not None:
            engine.close()
        self._forget()

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
        engine = Engine.of(pl_module)
        for watcher in self._make_watchers(sites):
            engine.register(pl_module, watcher)
        engine.wrap(pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this step is measured."""
        if not self._started:
            self._start_history(trainer)
        self._measured = self._is_due(trainer)
        self._wake(self._measured or self._unchecked)

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
        self._wake(False)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what is asked for, from the last step of the epoch."""
        if not trainer.is_global_zero or not self.history or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if _every(self.heatmap_every_n_epochs, trainer):
            self._draw_heatmap(trainer)
        if _every(self.histogram_every_n_epochs, trainer):
            self._draw_histograms(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was; ``history`` stays."""
        if (engine := Engine.find(pl_module)) is not None:
            engine.close()
        self._forget()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was: Lightning does not call ``teardown`` after a crash."""
        self.teardown(trainer, pl_module, "fit")

    def _forget(self) -> None:
        self._watchers.clear()
        self._weights: _Weights | None = None
        self._norm_sites: list[str] = []
        self._bins: dict[str, dict[str, list[float]]] = {}
        self._file: _HistoryFile | None = None
        self._unchecked, self._started, self._measured = True, False, False

    # --- what to watch ---

    def _sites(self, quantity: str, trainer: pl.Trainer, model: pl.LightningModule) -> list[str]:
        if quantity == ENTROPY:
            found = list(capture.attention_candidates(model))
        elif quantity == DENSITY:
            found = capture.find_down_projections(model)
        else:
            self._weights = _Weights(model)
            found = [*_reparametrized(trainer), *self._weights.entries]
        selected = capture.explicit_targets(self.targets, model)
        if selected is not None:
            found = [name for name in found if any(_at_or_below(name, top) for top in selected)]
        # attention is known by what runs: its sites are thinned out after the first step
        found = found if quantity == ENTROPY else _spaced(found, self.max_layers)
        if quantity == NORM and self._weights is not None:
            entries = self._weights.entries
            self._weights.entries = {name: entries[name] for name in found if name in entries}
        return found

    def _make_watchers(self, sites: dict[str, list[str]]) -> list[_Watcher]:
        histogram = self.histogram_every_n_epochs is not None
        if sites.get(ENTROPY):
            self._watchers[ENTROPY] = _EntropyWatcher(f"{self.name}/{ENTROPY}", sites[ENTROPY], self.mask, histogram)
        if sites.get(DENSITY):
            self._watchers[DENSITY] = _DensityWatcher(
                f"{self.name}/{DENSITY}", sites[DENSITY], self.mask, self.threshold, histogram
            )
        return list(self._watchers.values())

    def _check_fired(self, engine: Engine) -> None:
        """After the first step: raise if something asked for did not run, and thin out the attention sites."""
        self._unchecked = False
        counts = {NORM: len(self._norm_sites)}
        for quantity, watcher in self._watchers.items():
            taps = engine.taps[watcher]
            kept = _spaced([tap for tap in taps if tap.records], self.max_layers)
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

    # --- when ---

    def _is_due(self, trainer: pl.Trainer) -> bool:
        loop = trainer.fit_loop
        if loop._should_accumulate():
            return False  # Lightning logs the last batch of a window
        epoch_ends = loop.epoch_loop._num_ready_batches_reached()
        drawn = _every(self.heatmap_every_n_epochs, trainer) or _every(self.histogram_every_n_epochs, trainer)
        begins = self._unchecked and _step(trainer) == 0
        return begins or (drawn and epoch_ends) or _reaches_loggers(trainer)

    def _wake(self, awake: bool) -> None:
        for watcher in self._watchers.values():
            watcher.awake = awake

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
            norms = {**_reparametrized(trainer), **(self._weights.norms() if self._weights else {})}
            seen |= {(NORM, site): norms[site].max() for site in self._norm_sites if site in norms}
        if not seen:
            return {}
        packed = torch.cat([tensor.to(pl_module.device).flatten() for tensor in seen.values()]).cpu()
        parts = packed.split([tensor.numel() for tensor in seen.values()])
        host: Seen = {}
        for (quantity, site), part in zip(seen, parts, strict=True):
            host.setdefault(quantity, {})[site] = part.view(seen[quantity, site].shape)
        return host

    def _record(self, trainer: pl.Trainer, seen: Seen) -> History:
        record: History = {}
        for quantity in QUANTITIES:
            by_site = seen.get(quantity, {})
            if quantity == NORM:
                values: dict[str, Any] = {site: _number(norm) for site, norm in by_site.items()}
            else:
                means = {site: [_number(row[0] / row[1]) for row in rows] for site, rows in by_site.items()}
                values = means if quantity == ENTROPY else {site: mean[0] for site, mean in means.items()}
                self._bins[quantity] = {site: _bins(rows) for site, rows in by_site.items() if rows.shape[1] > 2}
            if values:
                record[quantity] = values
        return {"step": _step(trainer), "epoch": trainer.current_epoch, **record} if record else {}

    # --- history ---

    def _start_history(self, trainer: pl.Trainer) -> None:
        self._started = True
        step = _step(trainer)
        kept = [record for record in self.history if record["step"] < step]
        self.path = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.path = _directory(trainer) / f"{self.name}.jsonl"
            self._file = _HistoryFile(self.path)
            kept = self._file.restart(step) or kept
        self.history = kept if step else []

    def _write(self, record: History) -> None:
        self.history.append(record)
        if self._file is not None:
            self._file.append(record)

    # --- log ---

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, engine: Engine, record: History) -> None:
        headline, details = self._scalars(trainer, engine, record)
        roles = {regularizer.role for regularizer in engine.regularizers}
        shown = {f"reg/{ENTROPY}/value": "attention", f"reg/{DENSITY}/mean_active": "mlp_hidden"}
        if not trainer.barebones:
            for key, value in headline.items():
                in_bar = key in shown and shown[key] not in roles
                pl_module.log(key, torch.tensor(value), prog_bar=in_bar, batch_size=1, rank_zero_only=False)
        if details and _reaches_loggers(trainer):
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
            means = {site: _mean(row) for site, row in heads.items()}
            if ENTROPY not in names:
                headline[f"reg/{ENTROPY}/value"] = _mean(means.values())
            logged = engine.layers.get(ENTROPY, {}) if ENTROPY in names else {}
            details |= {f"reg/{ENTROPY}/layers/{site}": mean for site, mean in means.items() if site not in logged}
            if len(numbers):
                headline[f"reg/{ENTROPY}/min_head"] = float(numbers.min())
                headline[f"reg/{ENTROPY}/p10_head"] = float(numbers.quantile(0.1))
            if self.per_head:
                for site, row in heads.items():
                    details |= {f"reg/{ENTROPY}/heads/{site}/{head}": value for head, value in enumerate(row)}
        if density := record.get(DENSITY):
            headline[f"reg/{DENSITY}/mean_active"] = _mean(density.values())
            details |= {f"reg/{DENSITY}/active/{site}": value for site, value in density.items()}
        if norms := record.get(NORM):
            if not any(callback.name == NORM for callback in _sigma_reparams(trainer)):
                headline[f"reg/{NORM}/max"] = max((norm for norm in norms.values() if norm is not None), default=None)
            details |= {f"reg/{NORM}/layers/{site}": value for site, value in norms.items()}
        return _known(headline), _known(details)

    # --- figures ---

    def _draw_heatmap(self, trainer: pl.Trainer) -> None:
        record = self.history[-1]
        if ENTROPY in record:
            title = f"Attention entropy by layer and head, {_when(record)}"
            figure = plotting.head_heatmap(record[ENTROPY], title=title)
            _show(trainer, f"reg/{ENTROPY}/heatmap", figure, record["step"])

    def _draw_histograms(self, trainer: pl.Trainer) -> None:
        record = self.history[-1]
        if bins := self._bins.get(ENTROPY):
            figure = plotting.layer_histograms(
                bins,
                [f"{edge:g}" for edge in ENTROPY_EDGES],
                title=f"Entropy of attention rows, {_when(record)}",
                axis="entropy / log(visible keys), 0 = one key, 1 = uniform",
                layers="attention layer",
                of="rows",
            )
            _show(trainer, f"reg/{ENTROPY}/histogram", figure, record["step"])
        if bins := self._bins.get(DENSITY):
            figure = plotting.layer_histograms(
                bins,
                [f"{edge:.0e}" for edge in MAGNITUDE_EDGES],
                title=f"Magnitude of MLP activations, {_when(record)}",
                axis="|x| at the input of the down-projection; exact zeros are at the left end",
                layers="MLP down-projection",
                of="activations",
            )
            _show(trainer, f"reg/{DENSITY}/histogram", figure, record["step"])


# --- small parts -----------------------------------------------------------------------------------------------------


def _described(targets: Any) -> Any:
    if targets is None or isinstance(targets, str):
        return targets
    if isinstance(targets, list):
        return [_described(entry) for entry in targets]
    return getattr(targets, "__qualname__", repr(targets))


def _check_quantities(quantities: Sequence[str] | None) -> list[str] | None:
    if quantities is None:
        return None
    listed = [quantities] if isinstance(quantities, str) else [str(quantity) for quantity in quantities]
    unknown = [quantity for quantity in listed if quantity not in QUANTITIES]
    if unknown or not listed:
        raise ValueError(
            f"`quantities` must be among {', '.join(QUANTITIES)}, got {', '.join(map(repr, unknown)) or 'none'}. "
            "Leave it out to watch what the model has."
        )
    return list(dict.fromkeys(listed))


def _check_count(argument: str, count: int | None) -> int | None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"`{argument}` must be an integer >= 1, got {count!r}. Leave it out for none.")
    return count


def _sigma_reparams(trainer: pl.Trainer) -> list[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SigmaReparam)]


def _reparametrized(trainer: pl.Trainer) -> dict[str, Tensor]:
    return {site: norm for callback in _sigma_reparams(trainer) for site, norm in callback.spectral_norms().items()}


def _at_or_below(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")


def _spaced(items: list[Any], most: int | None) -> list[Any]:
    """At most ``most`` items, evenly spaced from the first to the last."""
    if most is None or len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / max(1, most - 1))] for place in range(most)]


def _step(trainer: pl.Trainer) -> int:
    """The x-axis that Lightning gives the metrics of this step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _reaches_loggers(trainer: pl.Trainer) -> bool:
    return trainer._logger_connector.should_update_logs or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _every(epochs: int | None, trainer: pl.Trainer) -> bool:
    return epochs is not None and (trainer.current_epoch + 1) % epochs == 0


def _directory(trainer: pl.Trainer) -> Path:
    """Where the first logger keeps its files; for those without a `log_dir`, where checkpoints of the run go."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    if log_dir := getattr(logger, "log_dir", None):
        return Path(log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def _show(trainer: pl.Trainer, key: str, figure: Any, step: int) -> None:
    for logger in trainer.loggers:
        plotting.log_figure(logger, key, figure, step, directory=trainer.default_root_dir)
    if not trainer.loggers:
        plotting.save_figure(trainer.default_root_dir, key, figure, step)


def _when(record: History) -> str:
    return f"epoch {record['epoch']}, step {record['step']}"


def _number(value: Tensor) -> float | None:
    """Float of eight digits; None where nothing was counted or the value is not finite, which JSON cannot say."""
    number = float(value)
    return float(f"{number:.8g}") if math.isfinite(number) else None


def _bins(rows: Tensor) -> list[float]:
    """Counts between the edges, of all rows, from counts at or above each edge."""
    totals = rows.sum(0).tolist()
    above = [*totals[1:], 0.0]
    return [low - high for low, high in pairwise(above)]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _known(values: dict[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in values.items() if value is not None}
