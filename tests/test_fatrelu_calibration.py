"""Threshold shift after training: thresholds against brute force, and the model they leave."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_reg.activations import (
    FATReLU,
    activation_record,
    fold_activations,
    load_activations,
    restore_activations,
    substitute_activations,
)
from lightning_reg.calibration import calibrate_fatrelu
from tests.test_activations import Gated, Inline, Plain, Two, encoder, llama


def model_of(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = {"plain": lambda: Plain(F.relu), "gated": Gated, "encoder": encoder}[kind]()
    substitute_activations(model, "relu")
    return model


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(2, 7, 16) for _ in range(count)]


def seen(model: nn.Module, data: list[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ReLU output, hidden activations and weight of a Plain or Gated MLP, in float64."""
    x = torch.cat(data).flatten(0, -2).double().numpy()

    def linear(name: str) -> np.ndarray:
        part = model.get_submodule(name)
        return x @ part.weight.detach().double().numpy().T + part.bias.detach().double().numpy()

    if isinstance(model, Gated):
        after = np.maximum(linear("w1"), 0)
        return after, after * linear("w3"), model.w2.weight.detach().double().numpy()
    after = np.maximum(linear("fc1"), 0)
    return after, after, model.fc2.weight.detach().double().numpy()


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("target", [0.0, 0.1, 0.37, 0.9])
def test_quantile_cuts_that_share_of_what_is_active(kind: str, target: float) -> None:
    model = model_of(kind)
    after, _, _ = seen(model, batches())
    (path, threshold), *rest = calibrate_fatrelu(model, batches(), target=target).items()
    assert rest == []
    active = after[after > 0]
    lost = (active <= threshold * (1 + 1e-6)).sum()
    assert lost == int(target * len(active))
    assert path == ("act_fn" if kind == "plain" else "act")


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
def test_cett_threshold_is_the_largest_that_meets_the_error(kind: str, target: float) -> None:
    model = model_of(kind)
    after, hidden, weight = seen(model, batches())
    (threshold,) = calibrate_fatrelu(model, batches(), target=target, method="cett").values()

    def error(cut: float) -> float:
        lost = np.where(after <= cut, hidden, 0.0) @ weight.T
        return float((np.linalg.norm(lost, axis=1) / np.linalg.norm(hidden @ weight.T, axis=1)).mean())

    candidates = np.unique(after[after > 0])
    chosen = int(np.abs(candidates - threshold).argmin())
    assert candidates[chosen] == pytest.approx(threshold, rel=1e-6)
    assert error(candidates[chosen]) <= target + 1e-7
    assert error(candidates[chosen + 1]) > target - 1e-7


@pytest.mark.parametrize("method", ["quantile", "cett"])
@pytest.mark.parametrize("kind", ["plain", "gated", "encoder"])
def test_shifted_model_is_saved_and_folded_bit_for_bit(kind: str, method: str) -> None:
    model = model_of(kind).eval()
    x = batches()[0]
    before = model(x)
    found = calibrate_fatrelu(model, batches(), target=0.3, method=method)
    shifted = model(x)
    assert not torch.equal(shifted, before)
    other = model_of(kind).eval()
    load_activations(other, activation_record(model))
    assert torch.equal(other(x), shifted)
    assert all(threshold > 0 for threshold in found.values())
    folded = fold_activations(other)
    assert torch.equal(folded(x), shifted)
    assert {type(part) for part in folded.modules() if "Threshold" in type(part).__name__} == {nn.Threshold}
    restore_activations(model)  # back to what the model's code has


def test_calibrating_again_starts_from_relu() -> None:
    model = model_of("gated")
    first = calibrate_fatrelu(model, batches(), target=0.5)
    second = calibrate_fatrelu(model, batches(), target=0.1)
    assert second == calibrate_fatrelu(model_of("gated"), batches(), target=0.1)
    assert second["act"] < first["act"]


def test_padding_is_left_out_and_reading_stops() -> None:
    data = batches(4)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[:, 4:] = False
    poisoned = [{"x": torch.where(valid.unsqueeze(-1), x, 1e3), "valid": valid} for x in data]

    def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    with_mask = calibrate_fatrelu(model_of("plain"), poisoned, target=0.2, run=run, mask="valid")
    wanted = calibrate_fatrelu(model_of("plain"), [x[:, :4] for x in data], target=0.2)
    assert with_mask == wanted

    used: list[int] = []

    def reading() -> Any:
        for index, x in enumerate(data):
            used.append(index)
            yield x

    few = calibrate_fatrelu(model_of("plain"), reading(), target=0.2, tokens=20)
    assert used == [0, 1]  # 14 tokens a batch
    head = torch.cat([x.flatten(0, 1) for x in data])[:20]
    assert few == calibrate_fatrelu(model_of("plain"), [head], target=0.2)


def test_hugging_face_model_called_with_keywords() -> None:
    model = llama()
    substitute_activations(model, "relu")
    model.train()
    ids = torch.randint(0, 50, (2, 9))
    found = calibrate_fatrelu(model, [{"input_ids": ids}], target=0.2, method="cett")
    assert set(found) == {f"model.layers.{index}.mlp.act_fn" for index in range(2)}
    assert model.training


def test_functions_in_attributes_are_shifted() -> None:
    model = Plain(F.relu)
    calibrate_fatrelu(model, batches(), target=0.2)
    assert type(model.act_fn) is FATReLU
    restore_activations(model)
    assert model.act_fn is F.relu


class InPlace(Gated):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.w1(x))
        hidden *= self.w3(x)
        return self.w2(hidden)


def test_model_that_goes_on_in_place_is_calibrated_the_same() -> None:
    torch.manual_seed(0)
    model = InPlace()
    substitute_activations(model, "relu")
    assert calibrate_fatrelu(model, batches(), target=0.3) == calibrate_fatrelu(
        model_of("gated"), batches(), target=0.3
    )


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "arguments", "message"),
    [
        (Plain(F.gelu), batches(), {}, r"the MLP of 'fc2' must have one ReLU .*, found gelu. Train it with `Prog"),
        (Inline(), batches(), {}, "the MLP of 'fc2' must have one ReLU in an attribute to shift, found none"),
        (nn.Linear(3, 3), batches(), {}, "no MLP down-projection was found"),
        (Plain(F.relu), batches(), {"target": 1.0}, r"`target` must be in \[0, 1\), .* got 1.0"),
        (Plain(F.relu), batches(), {"target": -0.1}, r"`target` must be in \[0, 1\)"),
        (Plain(F.relu), batches(), {"method": "topk"}, "`method` must be 'quantile' or 'cett', got 'topk'"),
        (Plain(F.relu), batches(), {"tokens": 0}, "`tokens` must be >= 1, got 0"),
        (Plain(F.relu), [], {}, "`batches` brought no valid token to fc2; see `run` and `mask`"),
        (Plain(F.relu), batches(), {"run": lambda model, batch: None}, "`batches` brought no valid token to fc2"),
    ],
)
def test_bad_input_leaves_the_model_alone(model: Any, data: Any, arguments: dict[str, Any], message: str) -> None:
    described = str(model)
    with pytest.raises(ValueError, match=message):
        calibrate_fatrelu(model, data, **{"target": 0.1, **arguments})
    assert str(model) == described
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_activation_shared_by_two_mlps_is_refused() -> None:
    with pytest.raises(ValueError, match="several MLPs share the activation act: give each its own"):
        calibrate_fatrelu(Two(), batches(), target=0.1)


def test_soft_and_per_channel_thresholds_are_not_overwritten() -> None:
    for own in (FATReLU(torch.ones(32)), FATReLU(0.1, sharpness=3.0)):
        model = Plain(F.relu)
        substitute_activations(model, own)
        with pytest.raises(ValueError, match="must have one ReLU in an attribute to shift, found FATReLU"):
            calibrate_fatrelu(model, batches(), target=0.1)


def test_exception_in_the_model_leaves_it_alone() -> None:
    model = Plain(F.relu)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate_fatrelu(model, [torch.randn(3, 5)], target=0.1)
    assert model.act_fn is F.relu
    assert model.training
