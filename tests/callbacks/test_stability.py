"""The stability monitor reports the model's own numbers, warns once, and leaves the training bit for bit as it was."""

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
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import regularize
from lightning_reg.alarms import Alarm
from lightning_reg.callbacks import AttentionEntropyRegularizer, RegMonitor, SigmaReparam, StabilityMonitor
from lightning_reg.callbacks.stability import HEADLINES, LOW, MEANS, block_outputs
from lightning_reg.capture import SITE
from lightning_reg.engine import Engine
from tests import tiny
from tests.callbacks.test_monitor import Classifier, Eager, Nothing, Probe, ProbeEnd
from tests.test_capture import MODELS
from tests.test_engine import CASES, Crashing, assert_untouched

SITES = ["net.blocks.0.attention", "net.blocks.1.attention"]
BLOCKS = ["net.blocks.0", "net.blocks.1"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:StabilityMonitor"),
    pytest.mark.filterwarnings("ignore:.*enable_nested_tensor is True.*"),
]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the history of a Trainer without a logger goes to its default_root_dir


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    trainer = tiny.trainer(list(callbacks), **{"log_every_n_steps": 1, **settings})
    trainer.fit(module)
    return trainer


def read(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- values ----------------------------------------------------------------------------------------------------------


def floor_of(sigma: float, keys: int) -> float:
    beta = math.exp(-sigma * math.sqrt(keys / (keys - 1)))
    rest = 1 + (keys - 1) * beta
    return math.log(rest) + sigma * math.sqrt(keys * (keys - 1)) * beta / rest


def reference(net: tiny.Net, x: Tensor, valid: Tensor) -> tuple[list[dict[str, list[float]]], list[float]]:
    """By the definitions, in float64, row by row: ([layer][quantity][head], [block])."""
    x, layers, massive = x.double(), [], []
    for block in net.blocks:
        q, k, _ = block.attention.qkv(x).unflatten(-1, (3, tiny.HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        found: dict[str, list[float]] = {}
        for head in range(tiny.HEADS):
            rows = [scores[b, head, m] for b in range(len(x)) for m in range(tiny.TOKENS) if valid[b, m]]
            probs = [row.softmax(-1) for row in rows]
            nats = [float(-(p * p.log()).sum()) for p in probs]
            entropy = sorted(h / math.log(tiny.TOKENS) for h in nats)
            sigmas = [float((row - row.mean()).norm()) for row in rows]
            support = [
                next(n for n in range(1, 9) if p.sort(descending=True).values[:n].sum() >= 0.9 - 1e-9) for p in probs
            ]
            count = len(rows)
            for name, value in {
                "entropy": sum(entropy) / count,
                "entropy_min": entropy[0],
                "entropy_p10": entropy[(count - 1) // 10],
                "entropy_floor": sum(floor_of(s, tiny.TOKENS) for s in sigmas) / math.log(tiny.TOKENS) / count,
                "max_logit": max(float(row.abs().max()) for row in rows),
                "k90": sum(support) / count,
                "effective_keys": sum(math.exp(h) for h in nats) / count,
                "largest_weight": sum(float(p.max()) for p in probs) / count,
                "q_norm": float(q[:, head].norm(dim=-1)[valid].mean()),
            }.items():
                found.setdefault(name, []).append(value)
            # every key is seen by the rows of a bag with a valid row
            found.setdefault("k_norm", []).append(float(k[valid.any(1), head].norm(dim=-1).mean()))
        layers.append(found)
        x = block(x)
        size = x[valid].abs().flatten().sort().values
        massive.append(float(size[-1] / size[(len(size) - 1) // 2]))
    return layers, massive


class Padded(tiny.Tiny):
    def train_dataloader(self) -> DataLoader:
        x = torch.randn(4, tiny.TOKENS, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, VALID), batch_size=4)


VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)


def sharpened(module: Any) -> Any:
    """At the start attention is all but uniform."""
    with torch.no_grad():
        for block in module.net.blocks:
            block.attention.qkv.weight.mul_(4)
    return module


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_values_equal_a_float64_computation_from_the_models_own_tensors(masked: bool) -> None:
    module = sharpened(Padded() if masked else tiny.Tiny(batches=1))
    monitor = StabilityMonitor(mask=1 if masked else None)
    x = next(iter(module.train_dataloader()))[0]
    valid = VALID if masked else torch.ones(4, tiny.TOKENS, dtype=torch.bool)
    double = sharpened(tiny.Tiny()).double()
    with torch.no_grad():
        layers, massive = reference(double.net, x, valid)
        outputs: list[Tensor] = []  # of the last linear map, which stands for a head here
        handle = double.net.blocks[1].fc2.register_forward_hook(lambda *args: outputs.append(args[2]))
        double(x.double())
        handle.remove()
    output = outputs[0][valid]
    double.loss(x.double()).backward()
    gradients = [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in double.net.blocks]
    fit(module, monitor)
    (record,) = monitor.history
    for site, wanted in zip(SITES, layers, strict=True):
        assert set(record["attention"][site]) == set(wanted)
        for name, values in wanted.items():
            assert record["attention"][site][name] == pytest.approx(values, rel=2e-5, abs=1e-6), name
    assert record["massive_activations"] == pytest.approx(dict(zip(BLOCKS, massive, strict=True)), rel=1e-5)
    rms = [float(gradient.square().mean().sqrt()) for gradient in gradients]
    assert record["gradient_rms"] == pytest.approx(dict(zip(BLOCKS, rms, strict=True)), rel=1e-4)
    (logits,) = record["logits"].values()
    assert logits["max_logit"] == pytest.approx(float(output.abs().max()), rel=1e-5)
    assert logits["log_z"] == pytest.approx(float(output.logsumexp(-1).mean()), rel=1e-5)
    for site in [f"{site}.{part}" for site in SITES for part in ("qkv", "out")]:
        weight = module.get_submodule(site).weight.detach().double()  # those after the step
        values = [torch.linalg.svdvals(part) for part in (weight.chunk(3) if site.endswith("qkv") else [weight])]
        assert record["spectral_norm"][site] == pytest.approx(max(float(v[0]) for v in values), rel=1e-6)
        ranks = [float(torch.special.entr(v / v.sum()).sum().exp()) for v in values]
        assert record["effective_rank"][site] == pytest.approx(min(ranks), rel=1e-6)
    assert set(record["spectral_norm"]) == set(record["effective_rank"]) == {
        f"{site}.{part}" for site in SITES for part in ("qkv", "out")
    }  # fmt: skip

    flat = {name: [value for layer in layers for value in layer[name]] for name in layers[0]}
    latest = monitor.latest
    assert latest["max_logit"] == pytest.approx(max(flat["max_logit"]), rel=1e-5)
    assert latest["entropy_mean"] == pytest.approx(sum(flat["entropy"]) / 4, rel=1e-5)
    assert latest["entropy_min"] == pytest.approx(min(flat["entropy"]), rel=1e-5)
    p10 = torch.tensor(flat["entropy"]).quantile(0.1)
    assert latest["entropy_p10"] == pytest.approx(float(p10), rel=1e-5)
    for headline, name in (("k90_max", "k90"), ("q_norm_max", "q_norm"), ("k_norm_max", "k_norm")):
        assert latest[headline] == pytest.approx(max(flat[name]), rel=1e-5)
    for headline, name in (
        ("entropy_floor_min", "entropy_floor"),
        ("k90_min", "k90"),
        ("effective_keys_min", "effective_keys"),
    ):
        assert latest[headline] == pytest.approx(min(flat[name]), rel=1e-5)
    assert latest["massive_activation"] == pytest.approx(max(massive), rel=1e-5)
    assert latest["gradient_rms"] == pytest.approx(float(torch.cat(gradients).square().mean().sqrt()), rel=1e-4)
    assert latest["gradient_rms_max"] == pytest.approx(max(rms), rel=1e-4)
    assert latest["spectral_norm_max"] == pytest.approx(max(record["spectral_norm"].values()))
    assert latest["effective_rank_min"] == pytest.approx(min(record["effective_rank"].values()))
    assert latest["log_z_drift"] == 0
    assert set(latest) == set(HEADLINES) - {"predicted_step"}
    assert set(record["headlines"]) == set(latest)


@pytest.mark.parametrize("collapse", [0.3, 0.9])
def test_collapsed_heads_are_counted(collapse: float) -> None:
    monitor = StabilityMonitor(collapse=collapse, warn={})
    module = tiny.Tiny(batches=1)
    with torch.no_grad():
        module.net.blocks[0].attention.qkv.weight[: tiny.WIDTH // 2].mul_(300)  # queries of the first head
    fit(module, monitor)
    heads = [value for site in monitor.history[0]["attention"].values() for value in site["entropy"]]
    assert monitor.latest["collapsed_share"] == sum(value < collapse for value in heads) / 4
    assert monitor.latest["collapsed_share"] >= 0.25


def test_a_sample_lies_within_what_all_rows_give() -> None:
    exact, sampled = StabilityMonitor(), StabilityMonitor(rows=4)
    fit(sharpened(tiny.Tiny(batches=6)), exact)
    fit(sharpened(tiny.Tiny(batches=6)), sampled)
    differs = 0
    for whole, part in zip(exact.history, sampled.history, strict=True):
        for site in SITES:
            all_rows, few = whole["attention"][site], part["attention"][site]
            for head in range(tiny.HEADS):
                assert few["max_logit"][head] <= all_rows["max_logit"][head] * (1 + 1e-6)
                assert all_rows["entropy_min"][head] - 1e-6 <= few["entropy_min"][head] <= few["entropy"][head] + 1e-6
                assert few["entropy"][head] <= 1
                assert few["entropy"][head] == pytest.approx(all_rows["entropy"][head], abs=0.35)
                differs += few["entropy"][head] != all_rows["entropy"][head]
        assert part["spectral_norm"] == whole["spectral_norm"]
    assert differs > 20


class Wrapped(pl.LightningModule):
    """Any model, trained on anything."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, self.run, *_ = MODELS[name]
        self.net = make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.manual_seed(batch_idx)
        return self.run(self.net).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader:
        return tiny.loader(2)


@pytest.mark.parametrize("name", MODELS)
def test_models_nobody_touched(name: str) -> None:
    _, _, attention, down = MODELS[name]
    wanted = tiny.fit(Wrapped(name))
    monitor = StabilityMonitor()
    assert torch.equal(tiny.fit(Wrapped(name), [monitor], log_every_n_steps=1), wanted)
    record = monitor.history[-1]
    assert list(record["attention"]) == [f"net.{site}" for site in attention]
    assert len(record["massive_activations"]) == len(down)
    assert all(
        f"net.{site}".startswith(f"{block}.")
        for site, block in zip(attention, record["massive_activations"], strict=True)
    )
    assert record["spectral_norm"]
    for site in record["attention"].values():
        for low, high in zip(site["entropy_floor"], site["entropy"], strict=True):
            assert 0 <= low <= high <= 1 + 1e-6
        assert all(k90 >= 1 for k90 in site["k90"])
    if "unfused" in name or "eager" in name:
        assert record["attention"][f"net.{attention[0]}"]["q_norm"][0] is None  # only scores are seen


@pytest.mark.parametrize(
    "pair",
    [("timm_vit_fused", "timm_vit_unfused"), ("llama_sdpa", "llama_eager"), ("bert_sdpa", "bert_eager")],
    ids=["timm", "llama", "bert"],
)
def test_scores_and_queries_give_the_same(pair: tuple[str, str]) -> None:
    records = []
    for name in pair:
        monitor = StabilityMonitor()
        fit(Wrapped(name), monitor)
        records.append(monitor.history[0]["attention"])
    for ours, theirs in zip(*(record.values() for record in records), strict=True):
        for name in set(ours) - {"q_norm", "k_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_blocks_are_found_where_models_keep_them() -> None:
    assert block_outputs(tiny.Tiny()) == BLOCKS
    mixer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert block_outputs(mixer) == []
    pairs = nn.ModuleList([nn.ModuleList([nn.MultiheadAttention(4, 1), mixer])])
    assert block_outputs(pairs) == []  # the residual is added outside of any module


def test_sigma_reparam_gives_its_norms() -> None:
    plain, beside = StabilityMonitor(), StabilityMonitor()
    fit(tiny.Tiny(batches=1), plain)
    fit(tiny.Tiny(batches=1), SigmaReparam(), beside)
    assert set(beside.history[0]["spectral_norm"]) == set(plain.history[0]["spectral_norm"])
    assert beside.history[0]["spectral_norm"] == pytest.approx(plain.history[0]["spectral_norm"], rel=0.1)


def test_what_is_not_finite_is_beyond_all_levels_and_null_in_json() -> None:
    module = tiny.Tiny(batches=1)
    with torch.no_grad():
        module.net.blocks[1].attention.qkv.weight[0, 0] = math.nan
    monitor = StabilityMonitor()
    with pytest.warns(UserWarning, match="max_logit is inf"):
        fit(module, monitor)
    assert monitor.latest["max_logit"] == math.inf
    assert math.isnan(monitor.latest["entropy_min"])
    (record,) = read("stability.jsonl")
    assert record["headlines"]["max_logit"] is None
    assert {alarm["quantity"] for alarm in record["alarms"]} >= {"max_logit", "entropy_min"}
    assert monitor.history == [record]


# --- changes nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_regularizers", [False, True], ids=["alone", "with_regularizers"])
@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical(case: str, with_regularizers: bool) -> None:
    module, arguments, settings = CASES[case]
    regularizers = tiny.regularizers if with_regularizers else list
    settings = {"log_every_n_steps": 2, **settings}
    wanted = tiny.fit(module(**arguments), regularizers(), **settings)
    monitor = StabilityMonitor(rows=6)
    assert torch.equal(tiny.fit(module(**arguments), [monitor, *regularizers()], **settings), wanted)
    assert any({"attention", "logits", "massive_activations", "gradient_rms"} <= set(r) for r in monitor.history)


def test_it_stands_beside_the_other_monitor() -> None:
    reg, stability = RegMonitor(), StabilityMonitor()
    assert torch.equal(tiny.fit(tiny.Tiny(), [reg, stability], log_every_n_steps=1), tiny.fit(tiny.Tiny()))
    for ours, theirs in zip(stability.history, reg.history, strict=True):
        for site in SITES:
            assert ours["attention"][site]["entropy"] == pytest.approx(theirs["attention_entropy"][site], abs=1e-6)


@pytest.mark.parametrize("regularizers", [[], [AttentionEntropyRegularizer(0.0)]], ids=["alone", "weight_0"])
def test_written_out_softmax_is_measured_and_untouched(regularizers: list[pl.Callback]) -> None:
    def eager() -> tiny.Tiny:
        module = tiny.Tiny()
        for block in module.net.blocks:
            block.attention = Eager()
        return module

    wanted = tiny.fit(eager())
    monitor = StabilityMonitor()
    assert torch.equal(tiny.fit(eager(), [*regularizers, monitor], log_every_n_steps=2), wanted)
    assert list(monitor.history[-1]["attention"]) == SITES


@pytest.mark.parametrize("part", ["block", "net"])
def test_compiled_code_has_a_variant_that_sees_and_one_that_does_not(part: str) -> None:
    from torch._dynamo.utils import counters

    def build() -> tiny.Tiny:
        torch.compiler.reset()
        counters.clear()
        module = tiny.Tiny(batches=9)
        if part == "block":
            for block in module.net.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        else:
            module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        return module

    plain = build()
    tiny.trainer().fit(plain)
    graphs = counters["stats"]["unique_graphs"]
    module, monitor = build(), StabilityMonitor(rows=6)
    tiny.trainer([monitor], log_every_n_steps=3).fit(module)
    assert torch.equal(tiny.parameters(module), tiny.parameters(plain))
    assert not counters["graph_break"], dict(counters["graph_break"])
    # awake and asleep, and the block with the head is not like the others; four samples would give eight and more
    assert counters["stats"]["unique_graphs"] <= 3 * graphs
    assert [record["step"] for record in monitor.history] == [0, 2, 5, 8]
    eager = StabilityMonitor(rows=6)
    fit(tiny.Tiny(batches=9), eager, log_every_n_steps=3)
    for ours, theirs in zip(monitor.history, eager.history, strict=True):
        assert list(ours["attention"]) == SITES
        for site in SITES:
            assert ours["attention"][site]["max_logit"] == pytest.approx(
                theirs["attention"][site]["max_logit"], rel=1e-5
            )
        assert ours["massive_activations"] == pytest.approx(theirs["massive_activations"], rel=1e-5)


def test_model_is_as_it_was_after_the_fit() -> None:
    module, plain = tiny.Tiny(), tiny.Tiny()
    fit(module, StabilityMonitor())
    fit(plain)
    assert_untouched(module)
    assert set(module.__dict__) == set(plain.__dict__)


@pytest.mark.parametrize("crash", ["training_step", "backward", "start", "validation"])
def test_nothing_is_left_after_a_crash(crash: str) -> None:
    module, monitor = Crashing(), StabilityMonitor()
    module.crash = crash
    with pytest.raises(RuntimeError, match=r"^crash$"):
        fit(module, monitor, limit_val_batches=1)
    assert_untouched(module)
    module.crash = None
    fit(module.train(), monitor)
    assert [record["step"] for record in monitor.history] == list(range(8))


# --- costs nothing between measured steps ----------------------------------------------------------------------------


def probe_steps(*callbacks: pl.Callback) -> Probe:
    probe = Probe()
    fit(tiny.Tiny(batches=12), probe, *callbacks, ProbeEnd(probe), log_every_n_steps=5)
    return probe


def test_between_measured_steps_not_one_operation_hook_or_synchronisation_is_added() -> None:
    plain, watched = probe_steps(), probe_steps(StabilityMonitor())
    busy = [step for step in range(12) if watched.operations[step] != plain.operations[step]]
    assert busy == [0, 4, 9]
    assert [step for step in range(12) if watched.hooks[step] != plain.hooks[step]] == [0, 4, 9]
    # the probe does see what would wait for a device
    assert any("_local_scalar_dense" in call for step in busy for call in watched.operations[step])


def test_a_measured_step_copies_once_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    items: list[int] = []  # `item`, `bool`, `tolist` of what is not on the host yet
    stop: list[int] = []  # after the training Lightning moves the model itself
    cpu, local = Tensor.cpu, Tensor.item

    def counted(self: Tensor, *args: Any) -> Tensor:
        if not stop:
            copies.append(self.numel())
        return cpu(self, *args)

    monkeypatch.setattr(Tensor, "cpu", counted)
    monkeypatch.setattr(Tensor, "item", lambda self: (items.append(1), local(self))[1])
    monitor = StabilityMonitor()
    fit(tiny.Tiny(batches=3), monitor, LambdaCallback(on_train_end=lambda *_: stop.append(1)))
    # 2 layers x 2 heads x 13, logits 3, 2 blocks x 2, 8 matrices x (norm, rank), 2 gradients
    assert copies == [52 + 3 + 4 + 16 + 2] * 3


# --- when, and where it goes -----------------------------------------------------------------------------------------


def test_history_file_beside_the_logs(tmp_path: Path) -> None:
    logger, monitor = CSVLogger(tmp_path), StabilityMonitor()
    fit(tiny.Tiny(), monitor, logger=logger, log_every_n_steps=3, max_epochs=2)
    assert monitor.path == Path(logger.log_dir) / "stability.jsonl"
    assert read(monitor.path) == monitor.history
    assert [record["step"] for record in monitor.history] == [0, 2, 5, 8, 11, 14]
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {key for row in rows for key, value in row.items() if value}
    headlines = {f"reg/stability/{name}" for name in (*HEADLINES, "alarm")} - {"reg/stability/predicted_step"}
    heads = {
        f"reg/stability/{name}/{site}/{head}"
        for name in ("entropy", "max_logit", "k90")
        for site in SITES
        for head in (0, 1)
    }
    blocks = {f"reg/stability/{name}/{block}" for name in ("massive_activation", "gradient_rms") for block in BLOCKS}
    weights = {
        f"reg/stability/{name}/{site}.{part}"
        for name in ("spectral_norm", "effective_rank")
        for site in SITES
        for part in ("qkv", "out")
    }
    assert logged - {"step", "epoch"} == headlines | heads | blocks | weights
    for key, name in (("max_logit", "max_logit"), ("spectral_norm_max", "spectral_norm_max")):
        values = {int(row["step"]): float(row[f"reg/stability/{key}"]) for row in rows if row[f"reg/stability/{key}"]}
        assert values == pytest.approx({r["step"]: r["headlines"][name] for r in monitor.history[1:]}, rel=1e-5)


def test_every_n_steps_may_differ_from_the_loggers(tmp_path: Path) -> None:
    logger, monitor = CSVLogger(tmp_path), StabilityMonitor(every_n_steps=3)
    fit(tiny.Tiny(), monitor, logger=logger, log_every_n_steps=4)
    assert [record["step"] for record in monitor.history] == [0, 2, 5]
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["reg/stability/spectral_norm_max"]]
    assert steps == [0, 2, 5]


def test_accumulation_measures_the_accumulated_gradient() -> None:
    whole, parts = StabilityMonitor(), StabilityMonitor()

    class Once(tiny.Tiny):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(tiny.loader(8).dataset, batch_size=16)

    fit(Once(), whole)
    fit(tiny.Tiny(), parts, accumulate_grad_batches=4)
    assert [record["step"] for record in parts.history] == [0, 1]
    assert parts.history[0]["gradient_rms"] == pytest.approx(whole.history[0]["gradient_rms"], rel=1e-4)


def test_gradients_of_manual_optimizers_are_each_others_complement() -> None:
    monitor = StabilityMonitor()
    fit(tiny.Adversarial(), monitor)
    assert set(monitor.history[0]["gradient_rms"]) == {*BLOCKS, "other.blocks.0", "other.blocks.1"}


def test_progress_bar_and_metrics_for_other_callbacks(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", monitor="reg/stability/max_logit", mode="min", every_n_train_steps=2)
    trainer = fit(tiny.Tiny(), StabilityMonitor(), saver, enable_checkpointing=True)
    assert set(trainer.progress_bar_metrics) == {"reg/stability/max_logit", "reg/stability/entropy_min"}
    assert saver.best_model_score is not None


def test_targets_limit_what_is_watched() -> None:
    monitor = StabilityMonitor(targets=["blocks.1"])
    fit(tiny.Tiny(batches=1), monitor)
    (record,) = monitor.history
    assert list(record["attention"]) == SITES[1:]
    assert list(record["massive_activations"]) == BLOCKS[1:]
    assert all(label.startswith("net.blocks.1.") for label in record["spectral_norm"])


@pytest.mark.parametrize("quantity", ["attention", "logits", "massive_activations", "weights", "gradient_rms"])
def test_quantities_alone(quantity: str) -> None:
    monitor = StabilityMonitor(quantities=[quantity])
    fit(tiny.Tiny(batches=2), monitor)
    keys = {"weights": {"spectral_norm", "effective_rank"}}.get(quantity, {quantity})
    assert all(set(record) == {"step", "epoch", "headlines", *keys} for record in monitor.history)


def test_any_model_can_be_watched() -> None:
    monitor = StabilityMonitor()
    fit(Classifier(), monitor)
    assert set(monitor.latest) == {"output_logit", "log_z", "log_z_drift", "gradient_rms", "gradient_rms_max"}


# --- alarms ----------------------------------------------------------------------------------------------------------


class Heated(tiny.Tiny):
    """Attention logits that follow a table, by the factor on queries and keys: the fixture of a collapse."""

    def __init__(self, *factors: float, **arguments: Any) -> None:
        super().__init__(batches=len(factors), **arguments)
        self.factors = factors
        self.weights = [block.attention.qkv.weight.detach().clone() for block in self.net.blocks]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            for block, weight in zip(self.net.blocks, self.weights, strict=True):
                block.attention.qkv.weight.copy_(weight)
                block.attention.qkv.weight[: 2 * tiny.WIDTH].mul_(self.factors[batch_idx])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def test_an_alarm_goes_off_once_and_again_after_it_came_back(recwarn: pytest.WarningsRecorder) -> None:
    # about 1.3 times the square of the factor
    monitor = StabilityMonitor(warn={"max_logit": 1e3})
    fit(Heated(1, 40, 60, 30, 40, 1, 50, 50), monitor)
    values = [record["headlines"]["max_logit"] for record in monitor.history]
    wanted, active = [], False
    for value in values:
        wanted.append(value > 1e3 and not active)
        active = value > 1e3 or (active and value > 800)
    assert [("alarms" in record) for record in monitor.history] == wanted
    assert sum(wanted) == 2
    alarms = [record["alarms"] for record in monitor.history if "alarms" in record]
    assert alarms[0] == [{"kind": "warn", "quantity": "max_logit", "level": 1e3, "value": values[wanted.index(True)]}]
    assert len([w for w in recwarn if "StabilityMonitor: max_logit is" in str(w.message)]) == 2


def test_defaults_warn_and_do_not_stop() -> None:
    monitor = StabilityMonitor()
    with pytest.warns(UserWarning, match="StabilityMonitor: max_logit is"):
        trainer = fit(Heated(1, 200, 200), monitor)
    assert trainer.global_step == 3
    kinds = [(alarm["kind"], alarm["quantity"]) for record in monitor.history for alarm in record.get("alarms", [])]
    assert sorted(kinds) == [("warn", "entropy_min"), ("warn", "max_logit")]
    assert float(trainer.callback_metrics["reg/stability/alarm"]) == 2


def test_stop_stops() -> None:
    monitor = StabilityMonitor(stop=True)
    with pytest.warns(UserWarning, match=r"max_logit is .* The training stops\."):
        trainer = fit(Heated(1, 1, 200, 1, 1), monitor)
    assert trainer.global_step == 3
    assert {"max_logit"} == {alarm["quantity"] for alarm in monitor.history[-1]["alarms"] if alarm["kind"] == "stop"}
    assert fit(Heated(1, 1, 20), StabilityMonitor(stop={"entropy_min": 0.5})).global_step == 3
    assert fit(Heated(20, 1, 20), StabilityMonitor(stop={"entropy_min": 0.5})).global_step == 1


def test_output_logits_that_drift_are_noticed() -> None:
    class Drifting(tiny.Tiny):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.net.blocks[1].fc2.bias.fill_(-40.0 * batch_idx)
            return super().training_step(batch, batch_idx)

    monitor = StabilityMonitor(quantities=["logits"])
    fit(Drifting(batches=4), monitor)
    drifts = [record["headlines"]["log_z_drift"] for record in monitor.history]
    assert drifts == pytest.approx([0, 40, 80, 120], abs=2)
    assert [[a["quantity"] for a in record.get("alarms", [])] for record in monitor.history] == [
        [], [], ["log_z_drift"], [],
    ]  # fmt: skip


def test_an_action_is_called_with_each_alarm() -> None:
    seen: list[tuple[int, Alarm]] = []
    monitor = StabilityMonitor(warn={"max_logit": 1e3}, action=lambda t, m, alarm: seen.append((t.global_step, alarm)))
    fit(Heated(1, 60, 60, 1, 60), monitor)
    assert [step for step, _ in seen] == [2, 5]
    assert seen[0][1] == Alarm("warn", "max_logit", seen[0][1].value, 1e3)
    assert monitor.latest["max_logit"] == seen[1][1].value


def test_an_action_that_raises_is_recorded_and_training_goes_on_as_without() -> None:
    def fails(*_: Any) -> None:
        raise OSError("no such host")

    quiet = Heated(1, 60, 60)
    with pytest.warns(UserWarning, match="max_logit is"):
        fit(quiet, StabilityMonitor(warn={"max_logit": 1e3}))
    module, monitor = Heated(1, 60, 60), StabilityMonitor(warn={"max_logit": 1e3}, action=fails)
    with pytest.warns(UserWarning, match=r"the action raised OSError: no such host; the training goes on"):
        trainer = fit(module, monitor)
    assert trainer.global_step == 3
    assert torch.equal(tiny.parameters(module), tiny.parameters(quiet))
    assert monitor.history[1]["alarms"][0]["error"] == "OSError: no such host"
    assert_untouched(module)


def test_a_predicted_crossing_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, float]] = []

    class Prophet:
        until = math.inf

        def update(self, step: int, value: float) -> float | None:
            fed.append((step, value))
            return 500.0 + step if 3 <= step <= 5 or step == 7 else None

    monkeypatch.setattr("lightning_reg.callbacks.stability.EarlyWarning", Prophet)
    monitor = StabilityMonitor(every_n_steps=1)
    fit(tiny.Tiny(), monitor)
    assert [step for step, _ in fed] == list(range(1, 9))
    assert [value for _, value in fed] == pytest.approx([r["headlines"]["max_logit"] for r in monitor.history])
    kinds = [[alarm["kind"] for alarm in record.get("alarms", [])] for record in monitor.history]
    assert kinds == [[], [], ["predicted"], [], [], [], ["predicted"], []]
    assert [record["headlines"].get("predicted_step") for record in monitor.history] == [
        None, None, 503, 504, 505, None, 507, None,
    ]  # fmt: skip


class Same(Heated):
    """The same batch in each step."""

    def train_dataloader(self) -> DataLoader:
        (x,) = next(iter(tiny.loader(1)))
        return DataLoader(TensorDataset(x.repeat(len(self.factors), 1, 1)), batch_size=4)


def test_growth_towards_divergence_is_predicted_ahead() -> None:
    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 45

    monitor = StabilityMonitor(warn={}, quantities=["attention"])
    fit(Same(*(step for step in range(1, 61))), Early(), monitor, max_epochs=3)
    last = monitor.history[-1]
    assert last["step"] == 44
    crossing = 45 * math.sqrt(1e4 / last["headlines"]["max_logit"])  # logits like the square of the step
    assert 50 < crossing < 85
    ((step, (alarm,)),) = [(record["step"], record["alarms"]) for record in monitor.history if "alarms" in record]
    assert (alarm["kind"], alarm["quantity"], alarm["level"]) == ("predicted", "max_logit", 1e4)
    assert step < 44
    assert alarm["value"] == pytest.approx(crossing, rel=0.02)
    assert monitor.latest["predicted_step"] == pytest.approx(crossing, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_training_does_not_repeat_alarms(tmp_path: Path) -> None:
    factors = (1, 60, 60, 60)
    seen: list[str] = []

    def note(trainer: Any, module: Any, alarm: Alarm) -> None:
        seen.append(alarm.quantity)

    def run(epochs: int, checkpoint: Path | None = None) -> StabilityMonitor:
        monitor = StabilityMonitor(action=note, warn={"max_logit": 1e3})
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = tiny.trainer([monitor, saver], max_epochs=epochs, enable_checkpointing=True, log_every_n_steps=1)
        trainer.fit(Heated(*factors), ckpt_path=checkpoint)
        return monitor

    first = run(1)
    assert seen == ["max_logit"]
    again = run(2, tmp_path / "epoch=0.ckpt")
    assert seen == ["max_logit", "max_logit"]  # it came back in the first step of the second epoch, and went off again
    assert again._first_log_z == first._first_log_z
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for key, state in saved.items() if "StabilityMonitor" in key]
    assert state["active"] == [["warn", "max_logit"]]
    restored = StabilityMonitor(warn={"max_logit": 1e3})
    restored.load_state_dict(state)
    assert restored._alarms_of({"max_logit": 1e5}, 9) == []


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_headlines_are_those_of_all_processes_and_training_is_bit_identical(tmp_path: Path) -> None:
    def run(*callbacks: pl.Callback) -> Tensor:
        module = tiny.Tiny()
        ddp = DDPStrategy(process_group_backend="gloo", start_method="fork")
        fit(module, *callbacks, strategy=ddp, devices=2, log_every_n_steps=2)
        return tiny.parameters(module)

    class Save(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            own = [r["attention"] for r in monitor.history]
            torch.save((monitor.latest, own[-1], called), tmp_path / f"{trainer.global_rank}.pt")

    called: list[str] = []
    monitor = StabilityMonitor(
        warn={"max_logit": 1e-3}, action=lambda trainer, module, alarm: called.append(alarm.quantity)
    )
    assert torch.equal(run(monitor, Save()), run())
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["stability.jsonl"]
    (first, own, calls), (second, other, more) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert calls == more == ["max_logit"]
    largest = [max(v for site in record.values() for v in site["max_logit"]) for record in (own, other)]
    assert largest[0] != largest[1]
    assert first["max_logit"] == pytest.approx(max(largest))
    means = [sum(v for site in record.values() for v in site["entropy"]) / 4 for record in (own, other)]
    assert first["entropy_mean"] == pytest.approx(sum(means) / 2)
    least = [min(v for site in record.values() for v in site["entropy"]) for record in (own, other)]
    assert first["entropy_min"] == pytest.approx(min(least))


def test_every_headline_has_a_way_to_be_reduced() -> None:
    assert set(LOW) | set(MEANS) <= set(HEADLINES)
    assert all(name.endswith("_min") for name in set(LOW) - set(MEANS) - {"predicted_step"})


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": 0}, ValueError, "`rows` must be an integer >= 1, got 0"),
        ({"rows": 1.5}, ValueError, "`rows` must be an integer >= 1, got 1.5"),
        ({"collapse": 0.0}, ValueError, r"`collapse` must be in \(0, 1\), a normalised entropy, got 0.0"),
        ({"collapse": 1.2}, ValueError, r"`collapse` must be in \(0, 1\), a normalised entropy, got 1.2"),
        ({"collapse": math.nan}, ValueError, r"`collapse` must be in \(0, 1\)"),
        ({"quantities": ["entropy"]}, ValueError, "`quantities` must be among attention, .*, got 'entropy'"),
        ({"warn": {"maxlogit": 1.0}}, ValueError, "`warn` must name numbers that are measured, got 'maxlogit'"),
        ({"stop": {"max_logit": math.inf}}, ValueError, "`stop` of 'max_logit' must be a finite number, got inf"),
        ({"action": "mail"}, TypeError, r"`action` must be callable with \(trainer, pl_module, alarm\), got 'mail'"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be an integer >= 1, got 0"),
        ({"name": "a/b"}, ValueError, "`name` must be usable as a file name, got 'a/b'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StabilityMonitor(**arguments)


@pytest.mark.parametrize(
    ("module", "arguments", "error", "message"),
    [
        (
            Classifier,
            {"quantities": ["massive_activations"]},
            ValueError,
            "found nothing to watch for massive_activations",
        ),
        (Classifier, {"quantities": ["attention"]}, RuntimeError, "saw no attention in the first training step"),
        (Classifier, {"quantities": ["weights"]}, RuntimeError, "saw no weights in the first training step"),
        (Nothing, {"quantities": ["logits"]}, ValueError, "found nothing to watch for logits"),
        (tiny.Tiny, {"targets": "blokcs.0"}, ValueError, "`targets` entry 'blokcs.0' matches no module.*Near names"),
        (tiny.Tiny, {"mask": "valid"}, ValueError, "`mask='valid'` is not in the batch"),
    ],
    ids=["massive", "attention", "weights", "logits", "targets", "mask"],
)
def test_nothing_to_watch_raises_and_leaves_nothing(
    module: type, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = module()
    with pytest.raises(error, match=message):
        fit(model, StabilityMonitor(**arguments))
    assert Engine.find(model) is None
    assert not any(SITE in part.__dict__ for part in model.modules())


def test_two_monitors_need_two_names() -> None:
    with pytest.raises(ValueError, match="`name` must differ between monitors of one Trainer, got 'one' twice"):
        fit(tiny.Tiny(), RegMonitor(name="one"), StabilityMonitor(name="one"))
    one, two = StabilityMonitor(), StabilityMonitor(name="second", rows=3)
    fit(tiny.Tiny(batches=2), one, two)
    assert len(one.history) == len(two.history) == 2


def test_hand_written_loops_are_refused() -> None:
    with (
        pytest.raises(TypeError, match=r"StabilityMonitor needs a Trainer.*`lightning_reg\.metrics`"),
        regularize(tiny.Net(), [StabilityMonitor()]),
    ):
        pass


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["--trainer.callbacks+=StabilityMonitor", "--trainer.callbacks.rows=8",
                 "--trainer.callbacks.stop=true", "--trainer.callbacks.warn={\"max_logit\": 50.0}"]  # fmt: skip
    cli = LightningCLI(
        tiny.Manual, run=False, args=[*arguments, "--trainer.logger=false"], save_config_callback=None,
        seed_everything_default=False,
    )  # fmt: skip
    (monitor,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, StabilityMonitor)]
    assert (monitor.rows, monitor.stop, monitor.warn) == (8, {"max_logit": 1e4}, {"max_logit": 50.0})


def test_sigma_reparam_does_not_hide_blocks_or_gradients() -> None:
    histories = []
    for others in ([], [SigmaReparam()]):
        monitor = StabilityMonitor(warn={}, every_n_steps=1)
        tiny.fit(tiny.Tiny(), [*others, monitor])
        histories.append(monitor.history[-1])
    plain, reparametrized = histories
    for quantity in ("massive_activations", "gradient_rms"):
        assert list(plain[quantity]) == ["net.blocks.0", "net.blocks.1"]
        assert list(reparametrized[quantity]) == list(plain[quantity])
        assert all(value > 0 for value in reparametrized[quantity].values())


@pytest.mark.parametrize("levels", [1e4, ["max_logit"], "max_logit"], ids=str)
def test_levels_that_are_no_mapping_are_refused(levels: Any) -> None:
    with pytest.raises(TypeError, match=r"`warn` must map headlines to levels, as in \{'max_logit': 1e3\}, got"):
        StabilityMonitor(warn=levels)


@pytest.mark.default_cadence
@pytest.mark.parametrize(
    ("settings", "every", "steps"),
    [
        ({"log_every_n_steps": 1}, None, [0, 19, 39]),
        ({"log_every_n_steps": 8}, None, [0, 23]),
        ({"log_every_n_steps": 25}, None, [0, 24]),
        ({"log_every_n_steps": 25}, 15, [0, 14, 29]),
    ],
    ids=["often", "eight", "seldom", "asked_for"],
)
def test_measurements_lie_twenty_steps_apart_unless_asked_for(
    settings: dict[str, Any], every: int | None, steps: list[int]
) -> None:
    monitor = StabilityMonitor(warn={}, every_n_steps=every)
    tiny.fit(tiny.Tiny(batches=40), [monitor], **settings)
    assert [record["step"] for record in monitor.history] == steps
