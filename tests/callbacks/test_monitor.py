"""The monitor reports the model's own numbers, at logging steps only, and leaves the training bit for bit as it was."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import plotting, regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, RegMonitor, SigmaReparam
from lightning_reg.capture import SITE
from lightning_reg.engine import Engine
from tests import tiny
from tests.test_engine import CASES, Crashing, assert_untouched

ATTENTION = ["net.blocks.0.attention", "net.blocks.1.attention"]
DOWN = ["net.blocks.0.fc2", "net.blocks.1.fc2"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the history of a Trainer without a logger goes to its default_root_dir


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    trainer = tiny.trainer(list(callbacks), **{"log_every_n_steps": 1, **settings})
    trainer.fit(module)
    return trainer


def read(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


# --- values ----------------------------------------------------------------------------------------------------------


def head_entropies(net: tiny.Net, x: Tensor, valid: Tensor | None = None) -> list[list[float]]:
    """By the definition, in float64, from the model's own projections: [layer][head]."""
    x, found = x.double(), []
    for block in net.blocks:
        q, k, _ = block.attention.qkv(x).unflatten(-1, (3, tiny.HEADS, -1)).permute(2, 0, 3, 1, 4)
        log_p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(tiny.TOKENS)
        weight = torch.ones_like(x[..., 0]) if valid is None else valid.double()
        found.append(((entropy * weight[:, None]).sum((0, 2)) / weight.sum()).tolist())
        x = block(x)
    return found


def active_shares(net: tiny.Net, x: Tensor, threshold: float, valid: Tensor | None = None) -> list[float]:
    x, found = x.double(), []
    for block in net.blocks:
        middle = x + block.attention(x)
        active = (torch.tanh(block.fc1(middle)).abs() > threshold).double().mean(-1)
        found.append(float(active.mean() if valid is None else active[valid].mean()))
        x = block(x)
    return found


def test_values_equal_a_float64_computation_from_the_models_own_tensors() -> None:
    module, monitor = tiny.Tiny(batches=1), RegMonitor(threshold=0.3)
    (x,) = next(iter(tiny.loader(1)))
    with torch.no_grad():
        reference = tiny.Tiny().net.double()
        entropies, shares = head_entropies(reference, x), active_shares(reference, x, 0.3)
    trainer = fit(module, monitor)
    (record,) = monitor.history
    assert list(record["attention_entropy"]) == ATTENTION
    for site, wanted in zip(ATTENTION, entropies, strict=True):
        assert record["attention_entropy"][site] == pytest.approx(wanted, abs=1e-6)
    assert record["activation_density"] == pytest.approx(dict(zip(DOWN, shares, strict=True)), abs=1e-6)
    # the spectral norms are those after the step; query, key and value of a fused projection count apart
    for site, norm in record["spectral_norm"].items():
        weight = module.get_submodule(site).weight.detach().double()
        parts = weight.chunk(3) if site.endswith("qkv") else [weight]
        assert norm == pytest.approx(max(float(torch.linalg.svdvals(part)[0]) for part in parts), rel=1e-6)

    flat = [value for layer in entropies for value in layer]
    logged = trainer.callback_metrics
    assert float(logged["reg/attention_entropy/value"]) == pytest.approx(sum(flat) / len(flat), abs=1e-6)
    assert float(logged["reg/attention_entropy/min_head"]) == pytest.approx(min(flat), abs=1e-6)
    p10 = torch.tensor(flat).quantile(0.1)
    assert float(logged["reg/attention_entropy/p10_head"]) == pytest.approx(float(p10), abs=1e-6)
    assert float(logged["reg/activation_density/mean_active"]) == pytest.approx(sum(shares) / 2, abs=1e-6)
    assert float(logged["reg/spectral_norm/max"]) == pytest.approx(max(record["spectral_norm"].values()))


class Padded(tiny.Tiny):
    def train_dataloader(self) -> DataLoader:
        x = torch.randn(4, tiny.TOKENS, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, VALID), batch_size=4)


VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)


def test_padded_tokens_do_not_count() -> None:
    module, monitor = Padded(), RegMonitor(mask=1, threshold=0.3)
    x = next(iter(module.train_dataloader()))[0]
    with torch.no_grad():
        reference = Padded().net.double()
        entropies, shares = head_entropies(reference, x, VALID), active_shares(reference, x, 0.3, VALID)
    fit(module, monitor)
    (record,) = monitor.history
    for site, wanted in zip(ATTENTION, entropies, strict=True):
        assert record["attention_entropy"][site] == pytest.approx(wanted, abs=1e-6)
    assert record["activation_density"] == pytest.approx(dict(zip(DOWN, shares, strict=True)), abs=1e-6)


class Cross(nn.Module):
    """Self- and cross-attention with different numbers of heads in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        for heads in (2, 4):
            q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
            x = x + nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return x


def test_calls_with_different_heads_become_one_value() -> None:
    module, monitor = tiny.Tiny(batches=1), RegMonitor()
    module.net.blocks.append(Cross())
    fit(module, monitor)
    (value,) = monitor.history[0]["attention_entropy"]["net.blocks.2"]
    assert 0 < value < 1


def test_spectral_norms_follow_the_weights() -> None:
    module, monitor = tiny.Tiny(optimizer="adam", batches=40), RegMonitor(quantities="spectral_norm")
    fit(module, monitor, log_every_n_steps=40)
    for site, norm in monitor.history[-1]["spectral_norm"].items():
        weight = module.get_submodule(site).weight.detach().double()
        parts = weight.chunk(3) if site.endswith("qkv") else [weight]
        assert norm == pytest.approx(max(float(torch.linalg.svdvals(part)[0]) for part in parts), rel=1e-5)


def test_a_weight_that_starts_at_zero_is_followed() -> None:
    module = tiny.Tiny(batches=12)
    nn.init.zeros_(module.net.blocks[1].fc2.weight)
    monitor = RegMonitor(quantities=["spectral_norm"])
    fit(module, monitor)
    wanted = float(torch.linalg.svdvals(module.net.blocks[1].fc2.weight.detach().double())[0])
    assert monitor.history[-1]["spectral_norm"]["net.blocks.1.fc2"] == pytest.approx(wanted, rel=1e-4)


def test_sigma_reparam_gives_its_norms_and_leaves_no_weight_out() -> None:
    class Gains(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            self.norms = {site: float(norm.max()) for site, norm in sigma.spectral_norms().items()}

    sigma, gains, monitor = SigmaReparam(), Gains(), RegMonitor()
    trainer = fit(tiny.Tiny(batches=3), sigma, gains, monitor)
    assert monitor.history[-1]["spectral_norm"] == pytest.approx(gains.norms, rel=1e-6)
    assert float(trainer.callback_metrics["reg/spectral_norm/max"]) == pytest.approx(max(gains.norms.values()))

    plain = RegMonitor()
    fit(tiny.Tiny(batches=1), plain)
    assert set(plain.history[0]["spectral_norm"]) == set(gains.norms)

    partial = RegMonitor()
    fit(tiny.Tiny(batches=1), SigmaReparam(targets="fc1"), partial)
    assert set(partial.history[0]["spectral_norm"]) == set(gains.norms)


def test_what_is_not_finite_is_null() -> None:
    module, monitor = tiny.Tiny(batches=1), RegMonitor()
    with torch.no_grad():
        module.net.blocks[1].attention.qkv.weight[0, 0] = math.nan
    fit(module, monitor)
    assert read("reg_monitor.jsonl") == monitor.history
    assert None in monitor.history[0]["attention_entropy"][ATTENTION[1]]
    assert monitor.history[0]["spectral_norm"]["net.blocks.1.attention.qkv"] is None


# --- changes nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_regularizers", [False, True], ids=["alone", "with_regularizers"])
@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical(case: str, with_regularizers: bool) -> None:
    module, arguments, settings = CASES[case]
    regularizers = tiny.regularizers if with_regularizers else list
    settings = {"log_every_n_steps": 2, **settings}
    wanted = tiny.fit(module(**arguments), regularizers(), **settings)
    for order in (1, -1):
        monitor = RegMonitor(threshold=0.1, histogram_every_n_epochs=1)
        got = tiny.fit(module(**arguments), [*regularizers(), monitor][::order], **settings)
        assert torch.equal(got, wanted)
        seen = [{"attention_entropy", "activation_density"} <= set(record) for record in monitor.history]
        assert all(seen) or case == "returns_none"
        assert any(seen)


class Eager(nn.Module):
    """Attention with a written-out softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(tiny.WIDTH, 3 * tiny.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, tiny.HEADS, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("regularizers", [[], [AttentionEntropyRegularizer(0.0)]], ids=["alone", "weight_0"])
def test_written_out_softmax_is_measured_and_untouched(regularizers: list[pl.Callback]) -> None:
    def eager() -> tiny.Tiny:
        module = tiny.Tiny()
        for block in module.net.blocks:
            block.attention = Eager()
        return module

    wanted = tiny.fit(eager())
    monitor = RegMonitor()
    assert torch.equal(tiny.fit(eager(), [*regularizers, monitor], log_every_n_steps=2), wanted)
    assert list(monitor.history[-1]["attention_entropy"]) == ATTENTION


@pytest.mark.parametrize("part", ["block", "net", "module"])
def test_compiled_code_has_a_variant_that_sees_and_one_that_does_not(part: str) -> None:
    from torch._dynamo.utils import counters

    def build() -> tuple[tiny.Tiny, Any]:
        torch.compiler.reset()
        counters.clear()
        module = tiny.Tiny(batches=9)
        if part == "block":
            for block in module.net.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        elif part == "net":
            module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        return module, torch.compile(module, backend="aot_eager") if part == "module" else module

    plain, target = build()
    tiny.trainer().fit(target)
    graphs = counters["stats"]["unique_graphs"]
    module, target = build()
    monitor = RegMonitor()
    tiny.trainer([monitor], log_every_n_steps=3).fit(target)
    assert torch.equal(tiny.parameters(module), tiny.parameters(plain))
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] <= 2 * graphs
    assert [record["step"] for record in monitor.history] == [0, 2, 5, 8]
    assert all(list(record["attention_entropy"]) == ATTENTION for record in monitor.history)


def test_model_is_as_it_was_after_the_fit() -> None:
    module, plain = tiny.Tiny(), tiny.Tiny()
    fit(module, RegMonitor())
    fit(plain)
    assert_untouched(module)
    assert set(module.__dict__) == set(plain.__dict__)


@pytest.mark.parametrize("crash", ["training_step", "backward", "start", "validation"])
def test_nothing_is_left_after_a_crash(crash: str) -> None:
    module, monitor = Crashing(), RegMonitor()
    module.crash = crash
    with pytest.raises(RuntimeError, match=r"^crash$"):
        fit(module, monitor, limit_val_batches=1)
    assert_untouched(module)
    module.crash = None
    fit(module.train(), monitor)
    assert [record["step"] for record in monitor.history] == list(range(8))


def test_a_regularizer_sees_what_it_saw() -> None:
    """A target of the monitor must not make a softmax attention for the regularizers."""
    module = tiny.Tiny(batches=1)
    module.net.blocks[0].fc1 = Routed()
    regularizer = AttentionEntropyRegularizer(1.0)
    wanted = tiny.fit(module, [regularizer])
    module = tiny.Tiny(batches=1)
    module.net.blocks[0].fc1 = Routed()
    assert torch.equal(tiny.fit(module, [AttentionEntropyRegularizer(1.0), RegMonitor(targets=".*")]), wanted)


class Routed(nn.Module):
    """A softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(tiny.WIDTH, 2 * tiny.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).softmax(-1)


# --- costs nothing between logging steps -----------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Every tensor operation, so also `.cpu()` and `.item()`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class Probe(pl.Callback):
    """Operations and hooks of each training step, callbacks included: put it first and last."""

    def __init__(self) -> None:
        self.operations: list[list[str]] = []
        self.hooks: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.mode = Counting()
        self.mode.__enter__()

    def on_before_zero_grad(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in pl_module.modules()]
        watched = torch.nn.functional.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
        self.hooks.append(sum(hooks) + watched)


class ProbeEnd(pl.Callback):
    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def on_train_batch_end(self, *args: Any) -> None:
        self.probe.mode.__exit__(None, None, None)
        self.probe.operations.append(self.probe.mode.calls)


def probe_steps(*callbacks: pl.Callback) -> Probe:
    probe = Probe()
    fit(tiny.Tiny(batches=12), probe, *callbacks, ProbeEnd(probe), log_every_n_steps=5)
    return probe


@pytest.mark.parametrize("with_regularizers", [False, True], ids=["alone", "with_regularizers"])
def test_between_logging_steps_not_one_operation_or_hook_is_added(with_regularizers: bool) -> None:
    regularizers = tiny.regularizers if with_regularizers else list
    plain, watched = probe_steps(*regularizers()), probe_steps(*regularizers(), RegMonitor(histogram_every_n_epochs=2))
    busy = [step for step in range(12) if watched.operations[step] != plain.operations[step]]
    assert busy == [0, 4, 9]
    hooked = [step for step in range(12) if watched.hooks[step] != plain.hooks[step]]
    assert hooked == ([] if with_regularizers else [0, 4, 9])


@pytest.mark.parametrize("quantities", [["attention_entropy", "activation_density"], None], ids=["forward", "all"])
def test_a_logging_step_copies_once_from_the_device(
    quantities: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    stop: list[int] = []  # after the training Lightning moves the model itself
    cpu = Tensor.cpu

    def counted(self: Tensor, *args: Any) -> Tensor:
        if not stop:
            copies.append(self.numel())
        return cpu(self, *args)

    monkeypatch.setattr(Tensor, "cpu", counted)
    fit(tiny.Tiny(batches=3), RegMonitor(quantities=quantities), LambdaCallback(on_train_end=lambda *_: stop.append(1)))
    # 2 layers x 2 heads x (sum, count), 2 MLPs x (active, valid), 8 weights
    assert copies == [12 if quantities else 20] * 3


# --- history ---------------------------------------------------------------------------------------------------------


def test_history_file_has_a_line_for_each_logging_step_beside_the_logs(tmp_path: Path) -> None:
    logger, monitor = CSVLogger(tmp_path), RegMonitor()
    fit(tiny.Tiny(), monitor, logger=logger, log_every_n_steps=3, max_epochs=2)
    assert monitor.path == Path(logger.log_dir) / "reg_monitor.jsonl"
    records = read(monitor.path)
    assert records == monitor.history
    assert [(record["step"], record["epoch"]) for record in records] == [
        (0, 0), (2, 0), (5, 0), (8, 1), (11, 1), (14, 1),
    ]  # fmt: skip
    assert set(records[0]) == {"step", "epoch", "attention_entropy", "activation_density", "spectral_norm"}
    assert all(len(heads) == tiny.HEADS for heads in records[0]["attention_entropy"].values())


def test_accumulation_measures_the_batch_that_is_logged() -> None:
    monitor = RegMonitor()
    fit(tiny.Tiny(), monitor, accumulate_grad_batches=4)
    assert [record["step"] for record in monitor.history] == [0, 1]


class Saver(pl.Callback):
    """Saves as ModelCheckpoint would, after an optimizer step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("saved_after", [5, 8, 9], ids=["mid_epoch", "epoch_end", "second_epoch"])
def test_resumed_history_equals_the_uninterrupted_one(tmp_path: Path, saved_after: int, every: int) -> None:
    whole = RegMonitor()
    fit(tiny.Tiny(), whole, max_epochs=2, log_every_n_steps=every, default_root_dir=tmp_path / "whole")

    settings: dict[str, Any] = {"log_every_n_steps": every, "default_root_dir": tmp_path / "parts"}
    saver = Saver(tmp_path / "saved.ckpt", saved_after)
    fit(tiny.Tiny(), RegMonitor(), saver, max_steps=12, max_epochs=2, **settings)
    path = tmp_path / "parts" / "reg_monitor.jsonl"
    with path.open("a") as file:
        file.write('{"step": 99, "attention_en')  # cut off by a crash
    resumed = RegMonitor()
    tiny.trainer([resumed], max_epochs=2, **settings).fit(tiny.Tiny(), ckpt_path=tmp_path / "saved.ckpt")
    assert read(path) == resumed.history
    assert not list(path.parent.glob("*.tmp"))
    for record, wanted in zip(resumed.history, whole.history, strict=True):
        assert (record["step"], record["epoch"]) == (wanted["step"], wanted["epoch"])
        # in the middle of an epoch Lightning's loader starts again with other batches
        if saved_after == 8 or record["step"] < saved_after:
            assert record["attention_entropy"] == wanted["attention_entropy"]
            assert record["activation_density"] == wanted["activation_density"]
            # norms start exactly in a new process and go on from the last in an old one
            assert record["spectral_norm"] == pytest.approx(wanted["spectral_norm"], rel=1e-5)


def test_a_new_training_puts_the_old_file_aside() -> None:
    first, second, third = RegMonitor(), RegMonitor(), RegMonitor()
    for monitor in (first, second, third):
        fit(tiny.Tiny(batches=2), monitor)
        assert len(monitor.history) == 2
    assert read("reg_monitor.jsonl") == third.history
    assert read("reg_monitor.1.jsonl") == first.history
    assert read("reg_monitor.2.jsonl") == second.history


def test_fast_dev_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    monitor = RegMonitor(heatmap_every_n_epochs=1)
    fit(tiny.Tiny(), monitor, logger=CSVLogger(tmp_path), fast_dev_run=True)
    assert len(monitor.history) == 1
    assert monitor.path is None
    assert not list(tmp_path.rglob("*.jsonl"))


# --- logs ------------------------------------------------------------------------------------------------------------


def test_csv_columns(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = RegMonitor()
    fit(tiny.Tiny(), monitor, logger=logger, log_every_n_steps=4)
    rows = rows_of(logger)
    keys = {key for row in rows for key, value in row.items() if value}
    heads = {f"reg/attention_entropy/heads/{site}/{head}" for site in ATTENTION for head in range(tiny.HEADS)}
    weights = [f"{block}.{name}" for block in ("net.blocks.0", "net.blocks.1")
               for name in ("attention.qkv", "attention.out", "fc1", "fc2")]  # fmt: skip
    assert keys - {"step", "epoch"} == {
        "reg/attention_entropy/value", "reg/attention_entropy/min_head", "reg/attention_entropy/p10_head",
        "reg/activation_density/mean_active", "reg/spectral_norm/max", *heads,
        *(f"reg/attention_entropy/layers/{site}" for site in ATTENTION),
        *(f"reg/activation_density/active/{site}" for site in DOWN),
        *(f"reg/spectral_norm/layers/{site}" for site in weights),
    }  # fmt: skip
    for key in heads:
        logged = {int(row["step"]): float(row[key]) for row in rows if row[key]}
        site, head = key.removeprefix("reg/attention_entropy/heads/").split("/")
        wanted = {r["step"]: r["attention_entropy"][site][int(head)] for r in monitor.history[1:]}
        assert logged == pytest.approx(wanted)


def test_per_head_can_be_left_out_of_the_logs(tmp_path: Path) -> None:
    logger, monitor = CSVLogger(tmp_path), RegMonitor(per_head=False)
    fit(tiny.Tiny(batches=1), monitor, logger=logger)
    assert not [key for key in rows_of(logger)[0] if "/heads/" in key]
    assert len(monitor.history[0]["attention_entropy"][ATTENTION[0]]) == tiny.HEADS


def test_progress_bar_shows_what_no_regularizer_shows() -> None:
    alone = fit(tiny.Tiny(batches=1), RegMonitor())
    assert set(alone.progress_bar_metrics) == {"reg/attention_entropy/value", "reg/activation_density/mean_active"}
    entropy, _ = tiny.regularizers()
    beside = fit(tiny.Tiny(batches=1), entropy, RegMonitor())
    assert set(beside.progress_bar_metrics) == {"reg/attention_entropy/value", "reg/activation_density/mean_active"}
    both = fit(tiny.Tiny(batches=1), *tiny.regularizers(), RegMonitor())
    assert set(both.progress_bar_metrics) == {"reg/attention_entropy/value", "reg/activation_density/value"}


def test_a_regularizers_values_stay_its_own(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, version=str(version)) for version in range(2)]
    nats, monitor = AttentionEntropyRegularizer(2.0, normalize=False, targets="blocks.0.*"), RegMonitor()
    fit(tiny.Tiny(), nats, logger=loggers[0])
    fit(tiny.Tiny(), nats, monitor, logger=loggers[1])
    alone, beside = (
        {(row["step"], key): row[key] for row in rows_of(logger) for key in row if row[key] and key != "epoch"}
        for logger in loggers
    )
    assert {key: beside[key] for key in alone} == alone
    assert ("0", f"reg/attention_entropy/layers/{ATTENTION[1]}") in beside
    assert len(monitor.history[0]["attention_entropy"]) == 2


def test_checkpoints_can_follow_a_summary(tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path / "saved", monitor="reg/attention_entropy/min_head", mode="max", every_n_train_steps=2
    )
    fit(tiny.Tiny(), RegMonitor(), saver, enable_checkpointing=True)
    assert saver.best_model_score is not None


def test_sites_are_printed_once_and_those_of_a_regularizer_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[tuple[str, str]]] = []
    monkeypatch.setattr(
        "lightning_reg.engine._print_matches",
        lambda rows: shown.append([(regularizer.name, tap.site.label) for tap, regularizer in rows]),
    )
    watched = [("reg_monitor/attention_entropy", site) for site in ATTENTION]
    watched += [("reg_monitor/activation_density", site) for site in DOWN]
    fit(tiny.Tiny(), RegMonitor())
    fit(tiny.Tiny(), RegMonitor(), AttentionEntropyRegularizer(1.0, targets="blocks.0.attention"))
    assert shown[0] == watched
    assert sorted(shown[1]) == sorted([("attention_entropy", ATTENTION[0]), *watched[1:]])


# --- what is watched -------------------------------------------------------------------------------------------------


def test_targets_limit_every_quantity() -> None:
    monitor = RegMonitor(targets=["blocks.1"])
    fit(tiny.Tiny(batches=1), monitor)
    (record,) = monitor.history
    for quantity in ("attention_entropy", "activation_density", "spectral_norm"):
        assert record[quantity]
        assert all(site.startswith("net.blocks.1.") for site in record[quantity])


def test_max_layers_are_spread_from_the_first_to_the_last() -> None:
    module = tiny.Tiny(batches=3)
    module.net = tiny.Net(depth=7)
    monitor = RegMonitor(max_layers=3)
    fit(module, monitor)
    for record in monitor.history:
        assert list(record["attention_entropy"]) == [f"net.blocks.{block}.attention" for block in (0, 3, 6)]
        assert list(record["activation_density"]) == [f"net.blocks.{block}.fc2" for block in (0, 3, 6)]
        assert len(record["spectral_norm"]) == 3


class Classifier(pl.LightningModule):
    """No attention, no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(tiny.WIDTH, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.linear(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return tiny.loader(2)


def test_any_model_can_be_watched() -> None:
    monitor = RegMonitor()
    fit(Classifier(), monitor)
    assert [set(record) for record in monitor.history] == [{"step", "epoch", "spectral_norm"}] * 2


def test_a_skipped_first_batch_is_not_held_against_the_model() -> None:
    class SkipsFirst(tiny.Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    monitor = RegMonitor(quantities=["attention_entropy"])
    fit(SkipsFirst(), monitor)
    assert [record["step"] for record in monitor.history] == list(range(1, 8))


@pytest.mark.distributed
def test_rank_zero_writes_and_training_is_bit_identical(tmp_path: Path) -> None:
    def run(*callbacks: pl.Callback) -> Tensor:
        module = tiny.Tiny()
        ddp = DDPStrategy(process_group_backend="gloo", start_method="fork")
        fit(module, *callbacks, strategy=ddp, devices=2, log_every_n_steps=2)
        return tiny.parameters(module)

    assert torch.equal(run(RegMonitor()), run())
    assert [record["step"] for record in read(tmp_path / "reg_monitor.jsonl")] == [0, 1, 3]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["reg_monitor.jsonl"]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["--trainer.callbacks+=RegMonitor", "--trainer.callbacks.quantities=[attention_entropy]",
                 "--trainer.callbacks.heatmap_every_n_epochs=2", "--trainer.callbacks.targets=[blocks.0]"]  # fmt: skip
    cli = LightningCLI(
        tiny.Manual,
        run=False,
        args=[*arguments, "--trainer.logger=false"],
        save_config_callback=None,
        seed_everything_default=False,
    )
    (monitor,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RegMonitor)]
    assert monitor.quantities == ["attention_entropy"]
    assert (monitor.heatmap_every_n_epochs, monitor.targets) == (2, ["blocks.0"])


# --- figures ---------------------------------------------------------------------------------------------------------


class Recorder(Logger):
    """Stands for a logger of another library: named like it, and noting the calls of its `experiment`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, dict]] = []

    name, version = "recorder", "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    @property
    def experiment(self) -> Any:
        recorder = self

        class Experiment:
            def __getattr__(self, method: str) -> Any:
                return lambda *args, **kwargs: recorder.calls.append((method, args, kwargs))

        return Experiment()


def named_like(name: str, **attributes: Any) -> Any:
    return type(name, (Recorder,), attributes)()


def test_every_logger_gets_the_heat_map_in_its_own_way(tmp_path: Path) -> None:
    csv_logger = CSVLogger(tmp_path)
    board, flow = named_like("TensorBoardLogger"), named_like("MLFlowLogger", run_id="r1")
    other = named_like("OtherLogger", save_dir=None, log_dir=str(tmp_path / "other"))
    fit(
        tiny.Tiny(), RegMonitor(heatmap_every_n_epochs=2), logger=[csv_logger, board, flow, other], max_epochs=4,
        log_every_n_steps=100,
    )  # fmt: skip
    names = [f"figures/reg_attention_entropy_heatmap_{step:08d}.png" for step in (15, 31)]
    for folder in (csv_logger.log_dir, tmp_path / "other"):
        for name in names:
            assert (Path(folder) / name).read_bytes().startswith(b"\x89PNG")
    assert [(method, args[0], kwargs["global_step"]) for method, args, kwargs in board.calls] == [
        ("add_figure", "reg/attention_entropy/heatmap", step) for step in (15, 31)
    ]
    assert [(method, args[0], args[2]) for method, args, _ in flow.calls] == [
        ("log_figure", "r1", f"reg/attention_entropy/heatmap/{step:08d}.png") for step in (15, 31)
    ]


def test_without_a_logger_figures_are_files(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    fit(tiny.Tiny(), RegMonitor(heatmap_every_n_epochs=1, histogram_every_n_epochs=1))
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "reg_activation_density_histogram_00000007.png",
        "reg_attention_entropy_heatmap_00000007.png",
        "reg_attention_entropy_histogram_00000007.png",
    ]
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_heat_map_shows_the_record() -> None:
    figure = plotting.head_heatmap({"a.attn": [0.1, 0.9, None], "b.attn": [0.5]}, title="Entropy")
    axes, bar = figure.axes
    shown = axes.images[0].get_array()
    assert shown.tolist() == [[0.1, 0.9, None], [0.5, None, None]]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Entropy", "head", "attention layer")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a.attn", "b.attn"]
    assert "log(visible keys)" in bar.get_ylabel()
    assert axes.images[0].get_clim() == (0.0, 1.0)


def test_histograms_count_every_value_once() -> None:
    monitor = RegMonitor(histogram_every_n_epochs=5)
    kept: dict[str, Any] = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            kept.update({quantity: dict(bins) for quantity, bins in monitor._bins.items()})

    fit(tiny.Tiny(batches=1), monitor, Keep())
    (x,) = next(iter(tiny.loader(1)))
    net = tiny.Tiny().net
    hidden = torch.tanh(net.blocks[0].fc1(x + net.blocks[0].attention(x))).abs().detach()
    edges = torch.tensor([10 ** (step / 2) for step in range(-13, 5)])
    wanted = torch.bincount(torch.bucketize(hidden.flatten(), edges), minlength=len(edges) + 1)
    assert kept["activation_density"][DOWN[0]] == wanted.tolist()
    for site in ATTENTION:
        assert sum(kept["attention_entropy"][site]) == 4 * tiny.HEADS * tiny.TOKENS


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantities": ["entropy"]}, "`quantities` must be among attention_entropy, .*, got 'entropy'"),
        ({"quantities": []}, "`quantities` must be among .*, got none"),
        ({"threshold": -0.1}, "`threshold` must be >= 0, got -0.1"),
        ({"threshold": math.nan}, "`threshold` must be >= 0, got nan"),
        ({"max_layers": 0}, "`max_layers` must be an integer >= 1, got 0"),
        ({"heatmap_every_n_epochs": 0}, "`heatmap_every_n_epochs` must be an integer >= 1, got 0"),
        ({"histogram_every_n_epochs": 1.5}, "`histogram_every_n_epochs` must be an integer >= 1, got 1.5"),
        ({"name": "a/b"}, "`name` must be usable as a file name, got 'a/b'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegMonitor(**arguments)


class Nothing(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LayerNorm(tiny.WIDTH)


@pytest.mark.parametrize(
    ("module", "arguments", "error", "message"),
    [
        (Classifier, {"quantities": ["activation_density"]}, ValueError, "nothing to watch for activation_density"),
        (Classifier, {"quantities": ["attention_entropy"]}, RuntimeError, "saw no attention_entropy in the first"),
        (Classifier, {"heatmap_every_n_epochs": 1}, RuntimeError, "saw no attention_entropy in the first"),
        (Nothing, {}, RuntimeError, "saw no attention and no MLP in the first training step"),
        (tiny.Tiny, {"targets": "blocks.0.fc1", "quantities": ["attention_entropy"]}, ValueError, "nothing to watch"),
        (tiny.Tiny, {"targets": "blokcs.0"}, ValueError, "`targets` entry 'blokcs.0' matches no module.*Near names"),
        (tiny.Tiny, {"mask": "valid"}, ValueError, "`mask='valid'` is not in the batch"),
    ],
)
def test_nothing_to_watch_raises_and_leaves_nothing(
    module: type, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = module()
    with pytest.raises(error, match=message):
        fit(model, RegMonitor(**arguments))
    assert Engine.find(model) is None
    assert not any(SITE in part.__dict__ for part in model.modules())


def test_two_monitors_need_two_names() -> None:
    with pytest.raises(ValueError, match="`name` must differ between monitors of one Trainer, got 'reg_monitor' twice"):
        fit(tiny.Tiny(), RegMonitor(), RegMonitor())
    one, two = RegMonitor(), RegMonitor(name="coarse", max_layers=1)
    fit(tiny.Tiny(batches=2), one, two)
    assert [len(record["attention_entropy"]) for record in two.history] == [1, 1]
    assert [len(record["attention_entropy"]) for record in one.history] == [2, 2]


def test_hand_written_loops_are_refused() -> None:
    with (
        pytest.raises(TypeError, match=r"RegMonitor needs a Trainer.*`lightning_reg\.metrics`"),
        regularize(tiny.Net(), [RegMonitor()]),
    ):
        pass


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"figures need matplotlib: `pip install 'lightning_reg\[plots\]'`"):
        fit(tiny.Tiny(), RegMonitor(heatmap_every_n_epochs=1))


def test_a_logger_without_figures_or_directory_raises() -> None:
    figure = plotting.head_heatmap({"a": [0.5]}, title="")
    logger = named_like("OtherLogger", save_dir=None)
    with pytest.raises(ValueError, match="`logger` must take figures or have a `log_dir`, got OtherLogger"):
        plotting.log_figure(logger, "key", figure, 0)
