"""Attention read out of what a multiple-instance model returns, in training: against the loss written by hand."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer
from lightning_reg.callbacks.attention_entropy import find_mil_models
from lightning_reg.engine import Engine
from lightning_reg.mil import MilAdapter
from tests import mil, tiny

WEIGHT = 2.0
SIZES = [5, 3, 1, 7, 4, 6, 2]


def bags(batch: int) -> list[dict[str, Tensor]]:
    """Batches of padded bags; a bag of one instance among them."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for start in range(0, len(SIZES) - batch + 1, batch):
        sizes = SIZES[start : start + batch]
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        x = torch.randn(batch, max(sizes), 6, generator=generator)
        found.append({"x": x, "mask": mask.to(torch.uint8), "y": torch.randint(2, (batch,), generator=generator)})
    return found


def normalized(scores: Tensor, mask: Tensor) -> Tensor:
    """-mean of H / log N over bags with a choice and their branches, of scores (bags, branches, instances)."""
    terms = []
    for row, valid in zip(scores, mask.bool(), strict=True):
        if valid.sum() > 1:
            log_p = row[:, valid].log_softmax(-1)
            terms.append(-(log_p.exp() * log_p).sum(-1).mean() / math.log(valid.sum()))
    return -torch.stack(terms).mean() if terms else 0 * scores.sum()


class Slides(pl.LightningModule):
    """Classifies padded bags; optionally under activation checkpointing, optionally with the penalty by hand."""

    def __init__(
        self, net: nn.Module, batch: int, handwritten: bool = False, use_reentrant: bool | None = None
    ) -> None:
        super().__init__()
        self.net, self.batch, self.handwritten, self.use_reentrant = net, batch, handwritten, use_reentrant
        self.loss_function = nn.CrossEntropyLoss()
        self.calls = 1

    def run_net(self, x: Tensor, mask: Tensor) -> Any:
        arguments = (x,) if self.batch == 1 else (x, mask)
        if self.use_reentrant is None:
            return self.net(*arguments)
        return checkpoint(self.net, x.requires_grad_(), *arguments[1:], use_reentrant=self.use_reentrant)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        for _ in range(self.calls):
            features, scores = self.run_net(batch["x"], batch["mask"])[:2]
        loss = self.loss_function(features.reshape(self.batch, -1)[:, :2], batch["y"])
        scores = scores.reshape(self.batch, -1, scores.shape[-1])
        return loss + WEIGHT * normalized(scores, batch["mask"]) if self.handwritten else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(bags(self.batch), batch_size=None)  # type: ignore[arg-type]


class Manual(Slides):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def slides(name: str, kind: type[Slides] = Slides, **arguments: Any) -> Slides:
    torch.manual_seed(0)
    net = {"aem_mha": mil.AemMha, "trident": mil.TridentAbmil}[name]()
    with torch.no_grad():
        net.score.weight.mul_(8)  # attention that has something to gain
    return kind(net, 1 if name == "aem_mha" else 2, **arguments)


def regularizer(adapter: Any, **arguments: Any) -> AttentionEntropyRegularizer:
    return AttentionEntropyRegularizer(WEIGHT, adapter=adapter, mask="mask", **arguments)


CASES: dict[str, tuple[type[Slides], dict[str, Any], dict[str, Any]]] = {
    "plain": (Slides, {}, {}),
    "accumulate_ragged": (Slides, {}, {"accumulate_grad_batches": 2}),
    "clip": (Slides, {}, {"gradient_clip_val": 0.1}),
    "float64": (Slides, {}, {"precision": "64-true"}),
    "manual": (Manual, {}, {}),
    "nonreentrant": (Slides, {"use_reentrant": False}, {}),
    "reentrant": (Slides, {"use_reentrant": True}, {}),
    "nonreentrant_accumulate": (Slides, {"use_reentrant": False}, {"accumulate_grad_batches": 2}),
    "reentrant_accumulate": (Slides, {"use_reentrant": True}, {"accumulate_grad_batches": 2}),
    "reentrant_manual": (Manual, {"use_reentrant": True}, {}),
}


@pytest.mark.parametrize("name", ["aem_mha", "trident"])
@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_handwritten_loss(case: str, name: str) -> None:
    kind, arguments, settings = CASES[case]
    settings = {"max_epochs": 2, **settings}
    wanted = tiny.fit(slides(name, kind, handwritten=True), **settings)
    got = tiny.fit(slides(name, kind, **arguments), [regularizer(name)], **settings)
    assert tiny.distance(got, wanted) <= 1e-6
    assert tiny.distance(tiny.fit(slides(name, kind, **arguments), **settings), wanted) > 1e-3


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16"])
def test_low_precision_differs_by_rounding_only(precision: str) -> None:
    def settings() -> dict[str, Any]:
        if precision == "bf16-mixed":
            return {"precision": precision}
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}

    wanted = tiny.fit(slides("aem_mha", handwritten=True), **settings())
    assert tiny.distance(tiny.fit(slides("aem_mha"), [regularizer("aem_mha")], **settings()), wanted) <= 5e-3
    assert tiny.distance(tiny.fit(slides("aem_mha"), **settings()), wanted) > 2e-2


@pytest.mark.parametrize("name", ["aem_mha", "trident"])
def test_weight_0_measures_without_touching_the_training(name: str) -> None:
    off = AttentionEntropyRegularizer(0.0, adapter=name, mask="mask")
    assert torch.equal(tiny.fit(slides(name), [off]), tiny.fit(slides(name)))


def test_compiled_model_equals_the_handwritten_loss() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    wanted = tiny.fit(slides("trident", handwritten=True), limit_train_batches=1)
    module = slides("trident")
    module.net.compile(backend="aot_eager")
    assert tiny.distance(tiny.fit(module, [regularizer("trident")], limit_train_batches=1), wanted) <= 1e-6
    assert tiny.distance(tiny.fit(slides("trident"), limit_train_batches=1), wanted) > 1e-3
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


def test_several_calls_in_a_step_count_once() -> None:
    module = slides("trident")
    module.calls = 2
    got = tiny.fit(module, [regularizer("trident")])
    assert tiny.distance(got, tiny.fit(slides("trident", handwritten=True))) <= 1e-6


# --- every published layout ------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "clam": lambda: (mil.Clam(branches=3), (torch.randn(9, 6),)),
    "abmil": lambda: (mil.AmlabAttention(), (torch.randn(1, 9, 6),)),
    "dsmil": lambda: (mil.Dsmil(branches=2), (torch.randn(9, 6),)),
    "dsmil_aem": lambda: (mil.AemDsmil(branches=2), (torch.randn(1, 9, 6),)),
    "acmil": lambda: (mil.Acmil(), (torch.randn(1, 9, 6),)),
    "aem_abmil": lambda: (mil.AemAbmil(), (torch.randn(1, 9, 6),)),
    "aem_mha": lambda: (mil.AemMha(), (torch.randn(1, 9, 6),)),
    "torchmil": lambda: (mil.TorchmilAbmil(), mil.bags([9, 4])),
    "trident": lambda: (mil.TridentAbmil(), mil.bags([9, 4])),
    "mil_lab": lambda: (mil.MilLab(branches=2), mil.bags([9, 4])),
    "mil_lab_list": lambda: (mil.MilLab(branches=2), ([torch.randn(9, 6), torch.randn(4, 6)],)),
}


@pytest.mark.parametrize("objective", ["maximize", "minimize"])
@pytest.mark.parametrize("name", MODELS)
def test_one_step_moves_the_entropy_where_it_should_go(name: str, objective: str) -> None:
    model, inputs = MODELS[name]()
    with torch.no_grad():
        model.score.weight.mul_(8)  # attention that has something to gain
    mask = (lambda batch: inputs[1]) if name == "torchmil" else None
    callback = AttentionEntropyRegularizer(1.0, adapter=name.removesuffix("_list"), mask=mask, objective=objective)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    with regularize(model, [callback]) as reg:
        for _ in range(2):
            Engine.of(model).begin(inputs)
            model(*inputs)
            loss = reg.add(torch.zeros((), requires_grad=True))
            optimizer.zero_grad()
            loss.backward()
            values.append(reg.values["attention_entropy/value"].item())
            optimizer.step()
    assert 0 < values[0] < 1
    assert (values[1] > values[0] + 1e-5) if objective == "maximize" else (values[1] < values[0] - 1e-5)


@pytest.mark.parametrize("name", ["clam", "mil_lab"])
def test_padding_and_order_do_not_change_the_penalty(name: str) -> None:
    model = {"clam": mil.Clam(branches=2), "mil_lab": mil.MilLab(branches=2)}[name]
    one, two = torch.randn(7, 6), torch.randn(4, 6)
    values = []
    for calls in (
        [(one,), (two,)] if name == "clam" else [([one, two],)],
        [(one.flip(0),), (two[[2, 0, 3, 1]],)]
        if name == "clam"
        else [(torch.stack([one, F.pad(two, (0, 0, 0, 3), value=5.0)]), torch.arange(7) < torch.tensor([[7], [4]]))],
    ):
        with regularize(model, [AttentionEntropyRegularizer(1.0, adapter=name)]) as reg:
            for call in calls:
                model(*call)
            reg.add(torch.zeros((), requires_grad=True))
            values.append(reg.values["attention_entropy/value"].item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_bag_of_one_instance_is_no_call_to_average() -> None:
    model, x = mil.Clam(), torch.randn(6, 6)
    gradients = []
    for calls in ([x], [x, x[:1]]):
        model.zero_grad()
        with regularize(model, [AttentionEntropyRegularizer(1.0, adapter="clam")]) as reg:
            for call in calls:
                model(call)
            reg.add(torch.zeros((), requires_grad=True)).backward()
        gradients.append(model.score.weight.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients)


def test_step_of_bags_of_one_instance_alone_goes_on() -> None:
    model = mil.Clam()
    with regularize(model, [AttentionEntropyRegularizer(1.0, adapter="clam")]) as reg:
        loss = reg.add(model(torch.randn(1, 6))[0].sum())
        loss.backward()
        assert reg.values["attention_entropy/weighted"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("normalize", [True, False])
def test_bags_without_a_choice_are_left_out_of_the_mean(normalize: bool) -> None:
    model, (x, _) = mil.TridentAbmil(), mil.bags([5, 5, 5])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    values = []
    for arguments in ((x, mask), (x[:1], mask[:1])):
        with regularize(model, [AttentionEntropyRegularizer(1.0, adapter="trident", normalize=normalize)]) as reg:
            model(*arguments)
            reg.add(torch.zeros((), requires_grad=True)).backward()
            values.append(reg.values["attention_entropy/value"].item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("objective", ["floor", "band", "target"])
def test_other_objectives_apply_to_each_branch(objective: str) -> None:
    bound = {"floor": 0.9, "band": [0.2, 0.9], "target": 0.9}[objective]
    model, x = mil.Clam(branches=3), torch.randn(6, 6)
    callback = AttentionEntropyRegularizer(1.0, adapter="clam", objective=objective, bound=bound, level="head")  # type: ignore[arg-type]
    with torch.no_grad():
        model.score.weight.mul_(8)
    with regularize(model, [callback]) as reg:
        output = model(x)
        reg.add(torch.zeros((), requires_grad=True))
        got = reg.values["attention_entropy/weighted"].item()
    log_p = output[3].log_softmax(-1)
    h = -(log_p.exp() * log_p).sum(-1) / math.log(6)
    below, above = (bound - h).relu() if objective == "floor" else (0.2 - h).relu(), (h - 0.9).relu()
    wanted = {"floor": below, "band": below + above, "target": (h - 0.9).square()}[objective]
    assert wanted.mean() > 1e-3
    assert got == pytest.approx(wanted.mean().item(), abs=1e-6)


# --- AEM, as it was published ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["aem_mha", "dsmil_aem", "aem_abmil"])
def test_published_value_and_gradient_in_nats(arch: str) -> None:
    model, inputs = MODELS[arch]()
    attention = model(*inputs)[2 if arch == "dsmil_aem" else 1]
    public = torch.sum(F.softmax(attention, dim=-1) * F.log_softmax(attention, dim=-1))
    public = public if arch == "aem_abmil" else public / attention.shape[0]
    (0.1 * public).backward()
    wanted = model.score.weight.grad.clone()
    model.zero_grad()
    with regularize(model, [AttentionEntropyRegularizer(0.1, adapter=arch, normalize=False)]) as reg:
        model(*inputs)
        reg.add(torch.zeros((), requires_grad=True)).backward()
    assert reg.values["attention_entropy/weighted"].item() == pytest.approx(0.1 * public.item(), abs=1e-6)
    torch.testing.assert_close(model.score.weight.grad, wanted, atol=1e-7, rtol=1e-5)


# --- which model -----------------------------------------------------------------------------------------------------


class Two(Slides):
    """Two parts with parameters, and a head that is not used."""

    def __init__(self) -> None:
        super().__init__(mil.TridentAbmil(), 2)
        self.other = nn.Linear(2, 2)


def test_model_is_named_where_there_are_several() -> None:
    with pytest.raises(ValueError, match="which module of Two that is, is not clear: it has net, other. Name it with"):
        tiny.fit(Two(), [regularizer("trident")])
    module = Two()
    tiny.fit(module, [regularizer("trident", targets="net")])
    with pytest.raises(ValueError, match="none of its children has parameters"):
        find_mil_models(None, Slides(nn.Identity(), 2))


class Itself(mil.TridentAbmil, pl.LightningModule):
    """A LightningModule that is the multiple-instance model."""

    training_step, configure_optimizers = Slides.training_step, Slides.configure_optimizers
    train_dataloader = Slides.train_dataloader
    batch, handwritten, loss_function, calls = 2, False, nn.CrossEntropyLoss(), 1

    def run_net(self, x: Tensor, mask: Tensor) -> Any:
        return self(x, mask)


def test_module_that_is_the_model_itself() -> None:
    module = Itself()
    module.load_state_dict(slides("trident").net.state_dict())
    got = tiny.fit(module, [regularizer("trident", targets="")])
    assert tiny.distance(got, tiny.fit(slides("trident", handwritten=True))) <= 1e-6


def test_two_models_have_their_own_branches() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mil.Clam(branches=1), mil.Clam(branches=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)[0] + self.b(x)[0]

    model, x = Pair(), torch.randn(5, 6)
    with regularize(model, [AttentionEntropyRegularizer(1.0, adapter="clam", targets=mil.Clam)]) as reg:
        reg.add(model(x).sum())
        got = reg.values["attention_entropy/value"].item()
    scores = [net(x)[3].log_softmax(-1) for net in (model.a, model.b)]
    wanted = [-(log_p.exp() * log_p).sum(-1).mean() / math.log(5) for log_p in scores]
    assert got == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-6)


# --- loud failure ----------------------------------------------------------------------------------------------------


class PastHooks(Slides):
    def run_net(self, x: Tensor, mask: Tensor) -> Any:
        return self.net.forward(x, mask)


class Detached(mil.TridentAbmil):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits, attention = super().forward(x, mask)
        return logits, attention.detach()


def failing(module: pl.LightningModule, callback: AttentionEntropyRegularizer, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.fit(module, [callback])
    assert Engine.find(module) is None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_what_would_do_nothing_raises_and_leaves_the_model_as_it_was() -> None:
    failing(
        PastHooks(mil.TridentAbmil(), 2), regularizer("trident"), RuntimeError, r"net returned nothing.*`model\(x\)`"
    )
    failing(Slides(Detached(), 2), regularizer("trident"), RuntimeError, "has no gradient: the model detaches it")
    for use_reentrant in (False, True):
        module = Slides(Detached(), 2, use_reentrant=use_reentrant)
        failing(module, regularizer("trident"), RuntimeError, "has no gradient: the model detaches it")
    failing(
        slides("trident"), regularizer("clam"), ValueError, r"`path` \[3\] is not in what the model returns.*Tensor"
    )
    failing(slides("trident"), regularizer(MilAdapter("A")), ValueError, r"which is tuple\(0: Tensor \(2, 1, 2\)")
    turned = AttentionEntropyRegularizer(1.0, adapter="trident", mask=lambda batch: batch["mask"].T)
    failing(slides("trident"), turned, ValueError, r"`mask` must be \(bags, instances\) = \(2, 5\).*got \(5, 2\)")
    inverted = AttentionEntropyRegularizer(1.0, adapter="trident", mask=lambda batch: 1 - batch["mask"])
    failing(slides("trident"), inverted, ValueError, "masked wherever `mask` says")


def test_attention_without_gradient_is_accepted_on_request() -> None:
    tiny.fit(Slides(Detached(), 2), [regularizer("trident", allow_unused=True)])


def test_epoch_of_bags_that_all_look_like_one_instance_raises() -> None:
    class One(Slides):
        def train_dataloader(self) -> DataLoader:
            return DataLoader([{**bag, "x": bag["x"][:, :1], "mask": bag["mask"][:, :1]} for bag in bags(1)], None)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match="every bag of the epoch had one instance.*`instance_axis` -1 is another"):
        tiny.fit(One(mil.AemMha(), 1), [AttentionEntropyRegularizer(1.0, adapter="aem_mha")])


def test_unknown_adapter_is_refused_when_written() -> None:
    with pytest.raises(ValueError, match="`adapter` must be one of clam, abmil"):
        AttentionEntropyRegularizer(0.1, adapter="transmil")


def test_checkpoint_of_another_layout_is_refused(tmp_path: Any) -> None:
    trainer = tiny.trainer([regularizer("trident")])
    trainer.fit(slides("trident"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = tiny.trainer([regularizer("trident")], max_epochs=2)
    resumed.fit(slides("trident"), ckpt_path=tmp_path / "a.ckpt")
    other = tiny.trainer([regularizer(MilAdapter(1, bag_axis=0))], max_epochs=2)
    with pytest.raises(ValueError, match="`adapter` of AttentionEntropyRegularizer"):
        other.fit(slides("trident"), ckpt_path=tmp_path / "a.ckpt")


def test_torchmil_itself() -> None:
    """The real package, where it is installed."""
    models = pytest.importorskip("torchmil.models")
    model = models.ABMIL(in_shape=(6,), att_dim=4)
    x, mask = mil.bags([5, 3])
    callback = AttentionEntropyRegularizer(1.0, adapter="torchmil", mask=lambda batch: mask)
    with regularize(model, [callback]) as reg:
        Engine.of(model).begin((x, mask))
        _, scores = model(x, mask.to(torch.uint8), return_att=True)
        reg.add(torch.zeros((), requires_grad=True)).backward()
    assert reg.values["attention_entropy/weighted"].item() == pytest.approx(
        normalized(scores.unsqueeze(1), mask).item(), abs=1e-6
    )
