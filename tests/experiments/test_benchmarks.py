"""The harness pairs, rotates and measures; the benchmark gives no numbers for a callback that computes another term."""

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from experiments.benchmarks import harness, overhead
from experiments.benchmarks.harness import Variant, gradients, interleave, paired_ratio, peak_allocation
from experiments.benchmarks.overhead import Contest, Setup, check, contests


class Model(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.down(self.up(batch).relu()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


BATCHES = [torch.randn(256, 4)]


def test_ratios_are_paired() -> None:
    ratio = paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)


def test_the_order_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(harness, "_seconds", lambda variant, *_: order.append(variant.name) or 1.0)
    times = interleave([Variant(name, Model) for name in "abc"], BATCHES, rounds=3, steps=1)
    assert "".join(order) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_step_takes_time() -> None:
    assert all(value > 0 for value in interleave([Variant("a", Model)], BATCHES, rounds=1, steps=2)["a"])


def test_a_wider_model_allocates_more() -> None:
    narrow, wide = (peak_allocation(Variant("", lambda width=width: Model(width)), BATCHES) for width in (64, 1024))
    assert narrow > 256 * 64 * 4
    assert wide > 8 * narrow


def test_gradients_are_those_of_the_first_step() -> None:
    found = gradients(Variant("", Model), BATCHES)
    torch.manual_seed(0)
    model = Model()
    model.training_step(BATCHES[0], 0).backward()
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in model.named_parameters())


def test_the_callbacks_compute_what_they_are_compared_with() -> None:
    check(Setup(sharpness=10), contests())


def test_a_callback_that_computes_something_else_gets_no_numbers() -> None:
    rows = {row.name: row for row in contests()}
    wrong = Contest("density loss", rows["attention entropy"].callbacks, rows["density loss"].usual)
    with pytest.raises(RuntimeError, match="density loss: gradients differ"):
        check(Setup(sharpness=10), [wrong])


def test_a_term_without_gradient_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "TOLERANCE", 1.0)
    with pytest.raises(RuntimeError, match="leaves the gradients as they are"):
        check(Setup(sharpness=10), contests()[:1])
