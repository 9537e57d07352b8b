"""PPL-p% against brute force over a fine grid, and a model that is left as it was."""

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import rewriting
from lightning_reg.calibration import PerplexitySparsity, perplexity_sparsity

VOCABULARY, WIDTH, HIDDEN = 11, 16, 48
Batch = dict[str, Tensor]


class Mlp(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN) if gated else None
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.up(x)) if self.gate is None else F.relu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.hidden(x)))


class LanguageModel(nn.Module):
    """Predicts the next token from the last two, which the data allows."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mlps = nn.ModuleList(Mlp(gated) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x + F.pad(x[:, :-1], (0, 0, 1, 0)).flip(-1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for mlp in self.mlps:
            x = x + mlp(F.rms_norm(x, (WIDTH,)))
        return self.head(x)


def sequences(rows: int, length: int = 13) -> Tensor:
    """A chain in which each pair of tokens has two likely successors."""
    successors = torch.randint(0, VOCABULARY, (VOCABULARY,) * 2 + (2,), generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, VOCABULARY, (rows, 2))
    for _ in range(length - 2):
        chosen = successors[ids[:, -2], ids[:, -1], torch.randint(0, 2, (rows,))]
        ids = torch.cat([ids, chosen.unsqueeze(1)], 1)
    return ids


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch["ids"]
    losses = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses[batch["valid"].flatten()]


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    losses = token_losses(model, batch)
    return losses.sum(), len(losses)


_TRAINED: dict[bool, dict[str, Tensor]] = {}


def trained(gated: bool = False) -> LanguageModel:
    """A trained model; the random state does not move, so tests do not depend on which of them comes first.

    Trained in float64: in float32 rounding, which differs between machines, grows into another model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = LanguageModel(gated)
        if gated not in _TRAINED:
            model.double()
            optimizer = torch.optim.Adam(model.parameters(), 1e-2)
            for _ in range(250):
                batch = {"ids": sequences(32), "valid": torch.ones(32, 12, dtype=torch.bool)}
                optimizer.zero_grad()
                token_losses(model, batch).mean().backward()
                optimizer.step()
            _TRAINED[gated] = {name: value.float() for name, value in model.state_dict().items()}
            model.float()
    model.load_state_dict(_TRAINED[gated])
    return model.eval()


def make_batches(rows: tuple[int, ...] = (28, 15, 37)) -> list[Batch]:
    return [{"ids": sequences(n), "valid": torch.ones(n, 12, dtype=torch.bool)} for n in rows]


# --- brute force -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def truncated(model: LanguageModel, batches: list[Batch], thresholds: list[float]) -> tuple[float, list[float]]:
    """Mean loss and sparsity by layer, with the forward written out again."""
    losses, dropped = [], [[], []]
    for batch in batches:
        x = model.embed(batch["ids"][:, :-1])
        for layer, (mlp, threshold) in enumerate(zip(model.mlps, thresholds)):
            hidden = mlp.hidden(F.rms_norm(x, (WIDTH,)))
            norms = hidden.abs() * mlp.down.weight.norm(dim=0)
            dropped[layer].append(((norms < threshold) | (norms == 0))[batch["valid"]])
            x = x + mlp.down(torch.where(norms < threshold, 0.0, hidden))
        logits = model.head(x)[batch["valid"]]
        losses.append(F.cross_entropy(logits, batch["ids"][:, 1:][batch["valid"]], reduction="none"))
    return torch.cat(losses).mean().item(), [torch.cat(layer).double().mean().item() for layer in dropped]


@torch.no_grad()
def tables(model: LanguageModel, batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
    """For each layer of the dense model, 300 thresholds and their CETT."""
    found = []
    x = torch.cat([model.embed(batch["ids"][:, :-1])[batch["valid"]] for batch in batches])
    for mlp in model.mlps:
        hidden, weight = mlp.hidden(F.rms_norm(x, (WIDTH,))), mlp.down.weight
        norms = hidden.abs() * weight.norm(dim=0)
        thresholds = torch.linspace(0, norms.max().item(), 300)
        errors = [
            (torch.where(norms < threshold, hidden, 0.0) @ weight.mT).norm(dim=1) / (hidden @ weight.mT).norm(dim=1)
            for threshold in thresholds
        ]
        found.append((thresholds, torch.stack([error.mean() for error in errors])))
        x = x + mlp.down(hidden)
    return found


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("increase", [0.01, 0.1])
def test_result_is_that_of_brute_force_over_a_fine_grid(gated: bool, increase: float) -> None:
    model, batches = trained(gated), make_batches()
    dense = truncated(model, batches, [0.0, 0.0])[0]
    curve = []
    by_layer = tables(model, batches)
    for cett in torch.linspace(0, 0.99, 200).tolist():
        thresholds = [float(values[errors <= cett].max()) for values, errors in by_layer]
        mean, sparsity = truncated(model, batches, thresholds)
        curve.append((cett, math.exp(mean - dense), sum(sparsity) / 2))
    # the curve is not quite monotone: it crosses the limit once, or a few times close together
    first = next(row for row in curve if row[1] > 1 + increase)
    last = [row for row in curve if row[1] <= 1 + increase][-1]
    assert last[0] - first[0] < 0.025
    found = perplexity_sparsity(model, batches, loss=loss, increase=increase, grid=128)
    assert first[0] - 0.015 <= found.cett <= last[0] + 0.015
    assert min(first[2], last[2]) - 0.01 <= found.sparsity <= max(first[2], last[2]) + 0.01
    assert found.perplexity_dense == pytest.approx(math.exp(dense), rel=1e-5)
    assert 1 + 0.5 * increase < found.perplexity_sparse / found.perplexity_dense <= 1 + increase


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_numbers_are_those_of_the_model_truncated_by_hand(gated: bool) -> None:
    model, batches = trained(gated), make_batches()
    found = perplexity_sparsity(model, batches, loss=loss, increase=0.05)
    assert list(found.thresholds) == ["mlps.0.down", "mlps.1.down"]
    mean, sparsity = truncated(model, batches, list(found.thresholds.values()))
    assert found.perplexity_sparse == pytest.approx(math.exp(mean), rel=1e-5)
    assert list(found.layer_sparsity.values()) == pytest.approx(sparsity, abs=2e-4)
    assert found.sparsity == pytest.approx(sum(found.layer_sparsity.values()) / 2)
    errors = [
        float(table[(values - threshold).abs().argmin()])
        for (values, table), threshold in zip(tables(model, batches), found.thresholds.values())
    ]
    assert errors == pytest.approx([found.cett] * 2, abs=0.03), "one CETT for all layers"


def test_more_perplexity_buys_more_sparsity() -> None:
    model, batches = trained(), make_batches()
    found = [perplexity_sparsity(model, batches, loss=loss, increase=value) for value in (0.01, 0.1, 0.4)]
    assert found[0].sparsity < found[1].sparsity < found[2].sparsity
    assert found[0].cett < found[1].cett < found[2].cett


def test_no_price_leaves_what_drops_zeros_only() -> None:
    model, batches = trained(), make_batches()
    outputs = [model(batch["ids"][:, :-1]).detach() for batch in batches]
    ids = {id(batch): output for batch, output in zip(batches, outputs)}

    def distance(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch["ids"][:, :-1]) - ids[id(batch)]).square().sum() * 1e6

    found = perplexity_sparsity(model, batches, loss=distance, increase=1e-9)
    assert (found.cett, found.perplexity_sparse, found.perplexity_dense) == (0.0, 1.0, 1.0)
    zeros = truncated(model, batches, [0.0, 0.0])[1]
    assert list(found.layer_sparsity.values()) == pytest.approx(zeros)
    assert found.sparsity > 0.1


def test_where_nothing_costs_nearly_everything_goes() -> None:
    found = perplexity_sparsity(trained(), make_batches(), loss=lambda m, b: token_losses(m, b).mean() * 0 + 1)
    assert 0.9 < found.cett < 1
    assert found.sparsity > 0.95


def test_a_pass_for_each_step_of_the_bisection_and_two_before() -> None:
    calls = []

    def counted(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        calls.append(batch)
        return loss(model, batch)

    batches = make_batches()
    found = perplexity_sparsity(trained(), batches, loss=counted, grid=64)
    assert len(calls) == found.passes * len(batches)
    assert found.passes <= 2 + math.ceil(math.log2(2 * 65))


def test_loss_that_is_nan_when_truncated_is_no_solution() -> None:
    model, batches = trained(), make_batches()
    dense = {id(batch): loss(model, batch)[0].item() for batch in batches}

    def fragile(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        total, number = loss(model, batch)
        return (total if abs(total.item() - dense[id(batch)]) < 1e-2 else total * math.nan), number

    found = perplexity_sparsity(model, batches, loss=fragile, increase=0.5)
    assert found.perplexity_sparse == pytest.approx(found.perplexity_dense, rel=1e-3)


def test_a_loss_beyond_the_largest_float_is_compared_all_the_same() -> None:
    found = perplexity_sparsity(trained(), make_batches(), loss=lambda m, b: token_losses(m, b).mean() + 2000)
    assert found.perplexity_dense == found.perplexity_sparse == math.inf
    assert 0 < found.cett < 0.9


# --- what counts -----------------------------------------------------------------------------------------------------


def same(found: PerplexitySparsity, expected: PerplexitySparsity) -> None:
    assert found.cett == pytest.approx(expected.cett, rel=1e-5)
    assert found.thresholds == pytest.approx(expected.thresholds, rel=1e-5)
    assert found.layer_sparsity == pytest.approx(expected.layer_sparsity, abs=1e-3)
    assert found.perplexity_sparse == pytest.approx(expected.perplexity_sparse, rel=1e-4)


@pytest.mark.parametrize("mask", ["valid", lambda batch: batch["valid"].long()], ids=["key", "function"])
def test_padding_changes_nothing(mask: Any) -> None:
    model, batches = trained(), make_batches()
    padded = [
        {"ids": F.pad(batch["ids"], (0, 20), value=3), "valid": F.pad(batch["valid"], (0, 20))} for batch in batches
    ]
    expected = perplexity_sparsity(model, batches, loss=loss)
    same(perplexity_sparsity(model, padded, loss=loss, mask=mask), expected)
    ignored = perplexity_sparsity(model, padded, loss=loss)
    assert ignored.layer_sparsity != pytest.approx(expected.layer_sparsity, abs=1e-3)


def test_mask_fits_a_model_that_flattens_its_tokens() -> None:
    class Flat(LanguageModel):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids).flatten(0, 1)
            for mlp in self.mlps:
                x = x + mlp(F.rms_norm(x, (WIDTH,)))
            return self.head(x).unflatten(0, ids.shape)

    model, flat = trained(), Flat()
    flat.load_state_dict(model.state_dict())
    batches = [{**batch, "valid": torch.rand(batch["valid"].shape) > 0.3} for batch in make_batches()]
    expected = perplexity_sparsity(model, batches, loss=loss, mask="valid")
    same(perplexity_sparsity(flat, batches, loss=loss, mask="valid"), expected)


def test_a_mean_weighs_every_batch_alike() -> None:
    model, batches = trained(), make_batches((6, 6, 6))
    expected = perplexity_sparsity(model, batches, loss=loss)
    same(perplexity_sparsity(model, batches, loss=lambda m, b: token_losses(m, b).mean()), expected)
    same(perplexity_sparsity(model, batches, loss=lambda m, b: token_losses(m, b).mean().item()), expected)
    ragged = make_batches((1, 9))
    means = perplexity_sparsity(model, ragged, loss=lambda m, b: token_losses(m, b).mean())
    halves = [token_losses(model, batch).mean().item() for batch in ragged]
    assert means.perplexity_dense == pytest.approx(math.exp(sum(halves) / 2), rel=1e-5)


def test_targets_select_layers() -> None:
    model, batches = trained(), make_batches()
    found = perplexity_sparsity(model, batches, loss=loss, targets="mlps.1.down")
    assert list(found.thresholds) == list(found.layer_sparsity) == ["mlps.1.down"]
    mean, sparsity = truncated(model, batches, [0.0, found.thresholds["mlps.1.down"]])
    assert found.perplexity_sparse == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.sparsity == pytest.approx(sparsity[1], abs=2e-4)


def test_a_shuffling_loader_gives_the_same_twice() -> None:
    ids = sequences(20)
    loader = DataLoader(TensorDataset(ids), batch_size=6, shuffle=True)

    def mean(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return token_losses(model, {"ids": batch[0], "valid": torch.ones(len(batch[0]), 12, dtype=torch.bool)}).mean()

    model = trained()
    first = perplexity_sparsity(model, loader, loss=mean)
    assert perplexity_sparsity(model, loader, loss=mean) == first


# --- models ----------------------------------------------------------------------------------------------------------


def replaced(make: Callable[[nn.Linear], nn.Module]) -> LanguageModel:
    model = trained()
    for mlp in model.mlps:
        mlp.down = make(mlp.down)
    return model


def test_conv1d_of_gpt2_keeps_its_weight_transposed() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def make(linear: nn.Linear) -> nn.Module:
        module = conv1d(WIDTH, HIDDEN)
        module.weight.data, module.bias.data = linear.weight.data.mT.contiguous(), linear.bias.data
        return module

    batches = make_batches()
    expected = perplexity_sparsity(trained(), batches, loss=loss)
    same(perplexity_sparsity(replaced(make), batches, loss=loss, targets="down"), expected)


def test_convolution_has_its_channels_in_front() -> None:
    class Mixer(LanguageModel):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for mlp in self.mlps:
                hidden = mlp.hidden(F.rms_norm(x, (WIDTH,)))
                x = x + mlp.down(hidden.mT.unsqueeze(-1)).squeeze(-1).mT
            return self.head(x)

    def make(linear: nn.Linear) -> nn.Module:
        module = nn.Conv2d(HIDDEN, WIDTH, 1)
        module.weight.data, module.bias.data = linear.weight.data[..., None, None], linear.bias.data
        return module

    model, batches = replaced(make), make_batches()
    model.__class__ = Mixer
    expected = perplexity_sparsity(trained(), batches, loss=loss)
    same(perplexity_sparsity(model, batches, loss=loss, targets="down"), expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH}
    config = {
        "gpt2": lambda: transformers.GPT2Config(**sizes, n_positions=20),
        "llama": lambda: transformers.LlamaConfig(**sizes, intermediate_size=HIDDEN, num_key_value_heads=1),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # its initial predictions hardly depend on anything
    batches = make_batches((6, 3))
    for batch in batches:
        batch["valid"][1:, 8:] = False

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        valid = batch["valid"]
        logits = model(input_ids=batch["ids"][:, :-1], attention_mask=valid.long()).logits
        losses = F.cross_entropy(logits[valid], batch["ids"][:, 1:][valid], reduction="sum")
        return losses, int(valid.sum())

    found = perplexity_sparsity(model, batches, loss=loss, increase=0.02, mask="valid")
    assert len(found.thresholds) == 2
    assert 0 < found.sparsity < 1
    for name, threshold in found.thresholds.items():
        module = model.get_submodule(name)
        norms = module.weight.detach().norm(dim=1 if kind == "gpt2" else 0)

        def drop(_: nn.Module, args: tuple, norms: Tensor = norms, threshold: float = threshold) -> tuple:
            return (args[0].masked_fill(args[0].abs() * norms < threshold, 0.0),)

        module.register_forward_pre_hook(drop)
    with torch.no_grad():
        sums, numbers = zip(*(loss(model.eval(), batch) for batch in batches))
    assert found.perplexity_sparse == pytest.approx(math.exp(float(sum(sums)) / sum(numbers)), rel=1e-4)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_of_torch_takes_no_fast_path_past_the_down_projection() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True)
            self.embedding, self.encoder = nn.Embedding(VOCABULARY, WIDTH), nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
            return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=~valid))

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        logits = model(batch["ids"][:, :-1], batch["valid"])[batch["valid"]]
        return F.cross_entropy(logits, batch["ids"][:, 1:][batch["valid"]], reduction="sum"), len(logits)

    batches = make_batches((6, 3))
    for batch in batches:
        batch["valid"][:, 9:] = False  # torch would pack these tokens into a nested tensor
    gc.collect()
    rewriting.release_unused()  # a rewritten model that another test left behind holds the fast path off
    found = perplexity_sparsity(Encoder(), batches, loss=loss, increase=0.05, mask="valid")
    assert len(found.thresholds) == 2
    assert found.cett > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_compiled_model_gives_the_same() -> None:
    model, batches = trained(), make_batches()
    expected = perplexity_sparsity(model, batches, loss=loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for batch in batches:
            compiled(batch["ids"][:, :-1])  # what is compiled by now does not ask for hooks
    same(perplexity_sparsity(compiled, batches, loss=loss), expected)


def test_half_precision_model() -> None:
    model, batches = trained(), make_batches()
    expected = perplexity_sparsity(model, batches, loss=loss, increase=0.1)
    found = perplexity_sparsity(trained().bfloat16(), batches, loss=loss, increase=0.1)
    assert found.cett == pytest.approx(expected.cett, abs=0.1)
    assert found.sparsity == pytest.approx(expected.sparsity, abs=0.05)


def test_a_layer_without_output_is_all_sparse_and_does_not_stop_the_others() -> None:
    model, batches = trained(), make_batches()
    with torch.no_grad():
        model.mlps[1].up.bias.fill_(-1e3)
    found = perplexity_sparsity(model, batches, loss=loss)
    assert found.layer_sparsity["mlps.1.down"] == 1
    assert found.cett > 0
    assert 0 < found.layer_sparsity["mlps.0.down"] < 1


# --- undo ------------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple:
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad is None and parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), set(model.__dict__))
    return hooks, modes, gradients, flags, torch.get_rng_state().tolist(), {k: v.tolist() for k, v in state.items()}


@pytest.mark.parametrize("failing", [None, 1, 5, 8], ids=lambda call: "whole" if call is None else f"fails_at_{call}")
def test_everything_is_as_it_was(failing: int | None) -> None:
    model, calls = trained(), []
    model.train()
    model.mlps[0].eval()

    def noisy(model: nn.Module, batch: list[Tensor]) -> Tensor:
        calls.append(torch.rand(()))
        assert not model.training
        assert not torch.is_grad_enabled()
        if len(calls) == failing:
            raise RuntimeError("interrupted")
        return token_losses(model, {"ids": batch[0], "valid": torch.ones(len(batch[0]), 12, dtype=torch.bool)}).mean()

    loader = DataLoader(TensorDataset(sequences(12)), batch_size=6, shuffle=True)
    before = snapshot(model)
    if failing is None:
        perplexity_sparsity(model, loader, loss=noisy)
        assert calls[0] == calls[2] == calls[-2], "each pass begins with the same random state"
    else:
        with pytest.raises(RuntimeError, match="interrupted"):
            perplexity_sparsity(model, loader, loss=noisy)
    assert snapshot(model) == before


# --- errors ----------------------------------------------------------------------------------------------------------


def call(**changes: Any) -> PerplexitySparsity:
    arguments = {"model": LanguageModel(), "batches": make_batches((2,)), "loss": loss, **changes}
    return perplexity_sparsity(arguments.pop("model"), arguments.pop("batches"), **arguments)


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(False)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.mlp.hidden(self.embedding(ids))
        return self.head(F.linear(hidden, self.mlp.down.weight, self.mlp.down.bias))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"increase": 0.0}, "`increase` must be finite and > 0, got 0.0; 0.01 accepts 1%"),
        ({"increase": -0.1}, "`increase` must be finite and > 0, got -0.1"),
        ({"increase": math.nan}, "`increase` must be finite and > 0, got nan"),
        ({"grid": 1}, "`grid` must be >= 2 thresholds a layer, got 1"),
        (
            {"batches": iter(make_batches((2,)))},
            r"`batches` must be iterable again .* got list_iterator.* `list\(batch",
        ),
        ({"batches": (batch for batch in [])}, "`batches` must be iterable again and again, got generator"),
        ({"batches": []}, "`batches` and `loss` gave 0 tokens: there must be a batch"),
        ({"loss": lambda m, b: (token_losses(m, b).sum(), 0)}, "`batches` and `loss` gave 0 tokens"),
        ({"loss": lambda m, b: token_losses(m, b).mean() * math.nan}, "the loss of the dense model is nan"),
        ({"model": nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY))}, "no MLP down-projection was found"),
        ({"targets": "nothing"}, "`targets` entry 'nothing' matches no module"),
        ({"targets": "embedding"}, "`targets` must name down-projections"),
        ({"model": Bypassed()}, "the down-projections mlp.down were not called .* leave them out with `targets=`"),
        ({"mask": "absent"}, "`mask='absent'` is not in the batch, a dict; give its key"),
        ({"mask": lambda batch: 3}, "`mask=.*` must select a tensor, got int"),
        ({"mask": "ids"}, r"`mask` must have the shape .* \(2, 12\), got \(2, 13\)"),
        ({"mask": lambda batch: ~batch["valid"]}, "`mask` leaves no token at mlps.0.down, mlps.1.down: True must mark"),
    ],
)
def test_errors_name_the_argument(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("value", ["text", {"loss": 1}, torch.zeros(3), (torch.zeros(()), 1, 2), (torch.zeros(3), 2)])
def test_a_loss_of_another_kind_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"`loss\(model, batch\)` must give a mean, or \(sum of the token losses"):
        call(loss=lambda model, batch: value)
