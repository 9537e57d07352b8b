"""QK-norm in a Trainer: trained like norms written by hand, kept, and brought back by checkpoints."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, QKNorm, SigmaReparam
from lightning_reg.qk_norm import load_qk_norm, norms_of, remove_qk_norm
from tests import attentions, tiny
from tests.attentions import HEADS, WIDTH, Fit, Written, inputs, make

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*"),
]


def keep(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **kwargs)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("q_norm", "inner.0").replace("k_norm", "inner.1"): value for key, value in state.items()}


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("names", [("to_q", "to_k"), ("qkv",)], ids="-".join)
def test_training_equals_that_of_a_model_that_has_them_written(names: tuple[str, ...], optimizer: str) -> None:
    def build(**kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        return Written(names, **kwargs).double()

    ours = Fit(build(), lr=0.05, batches=6, optimizer=optimizer)
    twin = Fit(build(norm=lambda: nn.RMSNorm(WIDTH // HEADS, eps=1e-6)), lr=0.05, batches=6, optimizer=optimizer)
    plain = Fit(build(), lr=0.05, batches=6, optimizer=optimizer)
    tiny.fit(ours, [QKNorm()], accumulate_grad_batches=2, gradient_clip_val=0.5, precision="64-true")
    for module in (twin, plain):
        tiny.fit(module, accumulate_grad_batches=2, gradient_clip_val=0.5, precision="64-true")
    state, wanted = renamed(ours.net.state_dict()), twin.net.state_dict()
    assert state.keys() == wanted.keys()
    assert max(tiny.distance(state[key], wanted[key]) for key in state) <= 1e-9
    assert max(tiny.distance(value, wanted[key]) for key, value in plain.net.state_dict().items()) > 1e-3
    assert tiny.distance(ours.net.q_norm.weight.detach(), torch.ones(())) > 1e-3  # the gains learn


def test_timm_trains_as_with_its_own() -> None:
    def build(**kwargs: Any) -> Fit:
        torch.manual_seed(0)
        return Fit(attentions.Timm(**kwargs), lr=0.3, batches=4)

    ours, theirs = build(), build(qk_norm=True, norm_layer=nn.LayerNorm)  # its eps is 1e-5
    tiny.fit(ours, [QKNorm(norm="layer", eps=1e-5)])
    tiny.fit(theirs)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    def fit(**kwargs: Any) -> Tensor:
        return tiny.fit(tiny.Tiny(**kwargs), [QKNorm(heads=2), AttentionEntropyRegularizer(1.0)])

    assert tiny.distance(fit(use_reentrant=use_reentrant), fit()) <= 1e-6


@pytest.mark.parametrize("order", [1, -1])
def test_regularizers_see_the_normalised_attention(order: int) -> None:
    class Twin(Written):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(norm=lambda: nn.RMSNorm(WIDTH // HEADS, eps=1e-6))

    ours, twin = Fit(make("written"), lr=0.3, batches=4), Fit(Twin(), lr=0.3, batches=4)
    tiny.fit(ours, [QKNorm(), AttentionEntropyRegularizer(3.0)][::order])
    tiny.fit(twin, [AttentionEntropyRegularizer(3.0)])
    state, wanted = renamed(ours.net.state_dict()), twin.net.state_dict()
    for key, value in wanted.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_torchs_attention_learns_its_gains_and_keeps_them_in_evaluation() -> None:
    module = Fit(make("torch"), lr=0.3, batches=4)
    tiny.fit(module, [QKNorm()])
    assert tiny.distance(module.net.mha.q_norm.weight.detach(), torch.ones(())) > 1e-4
    (x,) = inputs()
    with torch.no_grad():
        evaluated, trained = module.eval()(x), module.train()(x)
    torch.testing.assert_close(evaluated, trained, rtol=1e-6, atol=1e-6)
    remove_qk_norm(module)
    assert tiny.distance(module(x).detach(), trained) > 1e-3


def test_hand_written_loop_equals_the_trainer() -> None:
    net, twin = make("written"), make("written")
    tiny.fit(Fit(net, lr=0.3, batches=3), [QKNorm()])
    module = Fit(twin)
    with regularize(twin, [QKNorm(), AttentionEntropyRegularizer(0.0)]) as reg:
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
        for x in inputs(3):
            optimizer.zero_grad()
            reg.add(module.training_step([x], 0)).backward()
            optimizer.step()
    assert torch.equal(tiny.parameters(net), tiny.parameters(twin))
    untrained = make("written")
    with regularize(untrained, [QKNorm(), AttentionEntropyRegularizer(0.0)]):
        assert norms_of(untrained)
    assert not norms_of(untrained)


def test_two_processes_train_alike(tmp_path: Path) -> None:
    from tests.distributed.test_weight_sparsity import Batches, ddp

    class Save(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            torch.save(tiny.parameters(pl_module), tmp_path / f"{trainer.global_rank}.pt")

    tiny.fit(Batches(4), [QKNorm(heads=2), Save()], **ddp())
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one, other)
    single = Batches(8)
    assert tiny.distance(tiny.fit(single, [QKNorm(heads=2)]), one) <= 1e-6


# --- when it is there ------------------------------------------------------------------------------------------------


class Built(tiny.Tiny):
    """Builds its net in a hook."""

    def __init__(self, hook: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hook, self.late = hook, self.net
        del self.net

    def build(self, hook: str) -> None:
        if hook == self.hook and not hasattr(self, "net"):
            self.net = self.late
            del self.late

    def setup(self, stage: str) -> None:
        self.build("setup")

    def configure_model(self) -> None:
        self.build("configure_model")


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_models_that_are_built_late_train_as_early_ones(hook: str) -> None:
    module = Built(hook, optimizer="adam")
    late = tiny.fit(module, [QKNorm(heads=2)])
    assert torch.equal(late, tiny.fit(tiny.Tiny(optimizer="adam"), [QKNorm(heads=2)]))
    assert not {"setup", "configure_model"} & set(module.__dict__)


def test_norms_stay_after_the_fit_and_go_with_a_copy() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [QKNorm(heads=2)])
    assert list(norms_of(module)) == ["net.blocks.0.attention", "net.blocks.1.attention"]
    (x,) = next(iter(tiny.loader(1)))
    before = module(x)
    assert torch.equal(copy.deepcopy(module)(x), before)
    tiny.fit(module, [QKNorm(heads=2)])  # goes on with the same norms
    assert not torch.equal(module(x), before)
    assert remove_qk_norm(module) == ["net.blocks.0.attention", "net.blocks.1.attention"]
    assert list(module.state_dict()) == list(tiny.Tiny().state_dict())


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_checkpoint_brings_the_norms_back(norm: Any, tmp_path: Path) -> None:
    module = tiny.Tiny()
    tiny.fit(module, [QKNorm(heads=2, norm=norm, eps=1e-4), keep(tmp_path)], enable_checkpointing=True)
    path = tmp_path / "epoch=0.ckpt"
    (x,) = next(iter(tiny.loader(1)))
    wanted = module.eval()(x)
    plain = tiny.Tiny().eval()
    checkpoint = torch.load(path, weights_only=True)
    assert load_qk_norm(plain, checkpoint) == ["net.blocks.0.attention", "net.blocks.1.attention"]
    plain.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(plain(x), wanted)
    for way in ("validate", "predict"):
        other = tiny.Tiny()
        trainer = tiny.trainer([QKNorm(heads=2, norm=norm, eps=1e-4)], limit_val_batches=1)
        data = other.val_dataloader()
        other.predict_step = lambda batch, index, other=other: other(batch[0])  # type: ignore[assignment]
        getattr(trainer, way)(other, data, ckpt_path=str(path))
        assert torch.equal(other.eval()(x), wanted)  # they stay


def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    def run(checkpoint: str | None = None) -> Tensor:
        module = tiny.Tiny(optimizer="adam")
        callbacks = [QKNorm(heads=2, norm="layer"), keep(tmp_path)]
        trainer = tiny.trainer(callbacks, max_epochs=2, enable_checkpointing=True)
        trainer.fit(module, ckpt_path=checkpoint)
        return tiny.parameters(module)

    whole = run()
    assert torch.equal(run(str(tmp_path / "epoch=0.ckpt")), whole)


def test_crash_before_the_first_step_leaves_the_model_as_it_was() -> None:
    class Crash(tiny.Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == self.when:
                raise KeyError("crash")
            return super().training_step(batch, batch_idx)

    for when in (0, 1):
        module = Crash()
        module.when = when
        with pytest.raises(KeyError):
            tiny.fit(module, [QKNorm(heads=2)])
        assert len(norms_of(module)) == 2 * when
        assert any(part._forward_hooks for part in module.modules()) == bool(when)


def test_evaluation_without_a_checkpoint_leaves_no_norms() -> None:
    module = tiny.Tiny()
    tiny.trainer([QKNorm(heads=2)], limit_val_batches=1).validate(module, verbose=False)
    assert not norms_of(module)
    assert list(module.state_dict()) == list(tiny.Tiny().state_dict())


def test_averaged_model_has_the_norms() -> None:
    averaging = EMAWeightAveraging(decay=0.5)
    module = tiny.Tiny()
    tiny.fit(module, [QKNorm(heads=2), averaging])
    assert averaging._average_model is not None
    assert len(norms_of(averaging._average_model)) == 2


def test_sigma_reparam_of_other_weights_goes_with_it() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [SigmaReparam(targets="fc1"), QKNorm(heads=2)])
    assert len(norms_of(module)) == 2


def test_arguments_are_logged_and_targets_limit(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = tiny.Tiny()
    tiny.fit(module, [QKNorm(heads=2, norm="layer", targets=r"blocks\.1")], logger=logger)
    logger.save()
    assert "reg/qk_norm/norm: layer" in (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert list(norms_of(module)) == ["net.blocks.1.attention"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "batch"}, "`norm` must be 'rms' or 'layer', got 'batch'"),
        ({"eps": 0.0}, "`eps` must be a finite number > 0, got 0.0"),
        ({"heads": 1.5}, "`heads` must be an integer >= 1, got 1.5"),
    ],
    ids=["norm", "eps", "heads"],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QKNorm(**arguments)


def untouched(module: nn.Module) -> bool:
    return not norms_of(module) and not any(part._forward_hooks for part in module.modules())


def test_heads_that_cannot_be_separated_and_models_without_attention_are_refused() -> None:
    module = tiny.Tiny()
    with pytest.raises(ValueError, match=r"the heads of 'net.blocks.0.attention' \(Attention\) cannot be separated"):
        tiny.fit(module, [QKNorm()])
    assert untouched(module)
    with pytest.raises(ValueError, match="QKNorm found no attention"):
        tiny.fit(Fit(nn.Sequential(nn.Linear(WIDTH, WIDTH)), lr=0.1), [QKNorm()])
    with pytest.raises(ValueError, match="the heads of 'net.blocks.0.attention'"):
        tiny.fit(Built("configure_model"), [QKNorm()])


def test_existing_norms_are_refused() -> None:
    module = Fit(attentions.Timm(qk_norm=True, norm_layer=nn.LayerNorm))
    with pytest.raises(ValueError, match=r"'net.attn' normalises its queries and keys already \('q_norm'\)"):
        tiny.fit(module, [QKNorm()])
    assert not norms_of(module)


def test_model_built_too_late_is_refused() -> None:
    class Late(tiny.Tiny):
        def configure_optimizers(self) -> Any:
            self.more = tiny.Block()
            return super().configure_optimizers()

    with pytest.raises(RuntimeError, match="'more.attention' was created after `configure_model`, too late for QKNorm"):
        tiny.fit(Late(), [QKNorm(heads=2)])


def test_gains_that_no_optimizer_trains_are_refused() -> None:
    class Chosen(tiny.Tiny):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for name, p in self.named_parameters() if "norm" not in name], lr=0.1)

    module = Chosen()
    with pytest.raises(RuntimeError, match="No optimizer trains the gains that QKNorm put into 'net.blocks.0.attent"):
        tiny.fit(module, [QKNorm(heads=2)])
    assert untouched(module)
    tiny.fit(module, [QKNorm(heads=2, affine=False)])
    assert len(norms_of(module)) == 2


class Bypass(Written):
    """Takes the weight instead of calling the projection, as BEiT of timm does."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, part.weight, part.bias).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for part in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.last(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("manual", [False, True])
def test_projection_that_is_not_called_is_named_before_the_first_step(manual: bool) -> None:
    net = Bypass(key_heads=HEADS)
    before = tiny.parameters(net)
    module = Fit(net, lr=1.0)
    if manual:
        module.automatic_optimization = False
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> None:
            module.manual_backward(step(batch, batch_idx))
            module.optimizers().step()

        module.training_step = training_step  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="queries and keys of net did not pass its norms in the first step"):
        tiny.fit(module, [QKNorm()])
    assert untouched(module)
    assert torch.equal(tiny.parameters(net), before)


def test_compiled_attention_of_torch_has_its_norms_too() -> None:
    net, wanted = make("torch"), make("torch")
    wanted.load_state_dict(net.state_dict())
    torch.compiler.reset()
    net.compile(backend="eager")
    got = tiny.fit(Fit(net, lr=0.1), [QKNorm()])
    assert tiny.distance(got, tiny.fit(Fit(wanted, lr=0.1), [QKNorm()])) <= 1e-9


class Idle(tiny.Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.idle = tiny.Block()


def test_attention_that_does_not_run_is_named_or_allowed() -> None:
    with pytest.raises(RuntimeError, match="queries and keys of idle.attention did not pass"):
        tiny.fit(Idle(), [QKNorm(heads=2)], limit_val_batches=1)
    tiny.fit(Idle(), [QKNorm(heads=2, allow_unused=True)])


def test_two_optimizers_are_checked_each_before_its_own_step() -> None:
    module = tiny.Adversarial()
    tiny.fit(module, [QKNorm(heads=2)])
    assert len(norms_of(module)) == 4
    module = tiny.Adversarial()
    module.other.blocks[1].attention = nn.Sequential(nn.Linear(8, WIDTH), Bypass(key_heads=HEADS), nn.Linear(WIDTH, 8))
    with pytest.raises(RuntimeError, match=r"queries and keys of other.blocks.1.attention.1 did not pass"):
        tiny.fit(module, [QKNorm(targets=[r"other\.blocks\.1\.attention"])])


def test_averaging_before_it_is_refused() -> None:
    with pytest.raises(
        ValueError, match="EMAWeightAveraging comes before QKNorm in `callbacks`, so .* without the norms"
    ):
        tiny.fit(tiny.Tiny(), [EMAWeightAveraging(), QKNorm(heads=2)])


def test_checkpoint_of_other_norms_is_refused(tmp_path: Path) -> None:
    tiny.fit(tiny.Tiny(), [QKNorm(heads=2), keep(tmp_path)], enable_checkpointing=True)
    again = tiny.trainer([QKNorm(heads=2, eps=1e-3)], max_epochs=2)
    with pytest.raises(ValueError, match="`eps` of QKNorm is 0.001, but the checkpoint was trained with 1e-06 in 'net"):
        again.fit(tiny.Tiny(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
