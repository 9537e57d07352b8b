"""One GPU: training with the library equals training with its penalties written by hand, in every precision.

Two bounds. Weights after training differ from those of the hand-written module, in the same precision, by at most
``BOUND``; and their distance from the hand-written training in float64 is at most ``RATIO`` times what the hand-written
one is away from it in its own precision, which tells a small error from rounding where the first bound cannot.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_reg import kernels, regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, WeightSparsity
from lightning_reg.functional.activation_density import density_tap
from lightning_reg.functional.activation_hoyer import hoyer_tap
from lightning_reg.functional.activation_l1 import l1_tap
from lightning_reg.schedules import Linear, TargetController
from tests import tiny
from tests.gpu import small
from tests.test_contracts import ALL
from tests.test_engine import assert_untouched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(
        "ignore:.*acts from here on", "ignore:.*missed its target", "ignore:.*of progressive_sparsity end at"
    ),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch itself captures one for its memory
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

PENALTIES = tuple(small.WEIGHTS)
KINDS = {"plain": None, "nonreentrant": False, "reentrant": True}
PRECISIONS = {
    # trainer arguments, the largest difference of a weight
    "float32": ({}, 1e-6),
    "bf16_mixed": ({"precision": "bf16-mixed"}, 2e-3),
    "fp16_mixed": ({"plugins": "scaler"}, 2e-4),
    "bf16_true": ({"precision": "bf16-true"}, 1e-2),
}
RATIO = 1.5
Regularizer = Callable[[Tensor], tuple[Tensor, Tensor]]
CASES: dict[str, tuple[type[small.Small], dict[str, Any], dict[str, Any]]] = {
    # name: module, its arguments, trainer arguments
    "accumulate_ragged": (small.Small, {}, {"accumulate_grad_batches": 3}),
    "clip_norm": (small.Small, {}, {"gradient_clip_val": 0.5}),
    "clip_value": (small.Small, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "manual_accumulate": (small.Manual, {}, {}),
    "nonreentrant_accumulate": (small.Small, {"use_reentrant": False}, {"accumulate_grad_batches": 3}),
    "reentrant_accumulate": (small.Small, {"use_reentrant": True}, {"accumulate_grad_batches": 3}),
    "reentrant_manual": (small.Manual, {"use_reentrant": True}, {}),
}


def scaler() -> MixedPrecision:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device, init_scale=1024.0))


def fit(module: small.Small, callbacks: list[pl.Callback] | None = None, **settings: Any) -> Tensor:
    if settings.get("plugins") == "scaler":
        settings = {**settings, "plugins": [scaler()]}
    return small.fit(module, callbacks, **settings)


@cache
def references(
    module: type[small.Small], names: tuple[str, ...], settings: tuple[tuple[str, Any], ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of hand-written trainings: in the precision of ``settings``, in float64, and without penalties."""
    chosen = dict(settings)
    with kernels.disabled():
        exact = {key: value for key, value in chosen.items() if key not in ("precision", "plugins")}
        return (
            fit(module(names), **chosen),
            fit(module(names), **exact, precision="64-true"),
            fit(module(), **chosen),
        )


def check(
    got: Tensor, names: tuple[str, ...], bound: float, settings: dict[str, Any], module: type = small.Small
) -> None:
    wanted, exact, without = references(module, names, tuple(settings.items()))
    rounding, error = small.rms(wanted - exact), small.rms(got - exact)
    figures = f"max {tiny.distance(got, wanted):.2e} of {bound}, rms {error:.2e} where by hand {rounding:.2e}"
    print(f"{'+'.join(names)} {settings}: {figures}, without {small.rms(without - exact):.2e}")
    assert tiny.distance(got, wanted) <= bound, figures
    assert error <= RATIO * rounding + 1e-8, figures
    assert small.rms(without - exact) > 5 * rounding, "the penalty is lost in rounding: the test shows nothing"


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16_mixed", "fp16_mixed"])
@pytest.mark.parametrize("name", small.NAMES)
def test_training_equals_the_handwritten_loss(name: str, precision: str) -> None:
    settings, bound = PRECISIONS[precision]
    module = small.Small()
    check(fit(module, small.callbacks([name]), **settings), (name,), bound, settings)
    assert_untouched(module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_together_equal_the_handwritten_loss(precision: str, kind: str) -> None:
    settings, bound = PRECISIONS[precision]
    got = fit(small.Small(use_reentrant=KINDS[kind]), small.callbacks(), **settings)
    check(got, small.NAMES, bound, settings)


@pytest.mark.parametrize("precision", ["float32", "fp16_mixed"])
@pytest.mark.parametrize("case", CASES)
def test_trainer_features_equal_the_handwritten_loss(case: str, precision: str) -> None:
    module, arguments, settings = CASES[case]
    own, bound = PRECISIONS[precision]
    settings = {**settings, **own}
    check(fit(module(**arguments), small.callbacks(), **settings), small.NAMES, bound, settings, module)


@pytest.mark.filterwarnings("ignore:lightning_reg computes .* is exact but slower")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_the_handwritten_loss(kind: str, optimizer: str) -> None:
    settings = {"precision": "64-true"}
    wanted = fit(small.Small(PENALTIES, optimizer=optimizer), **settings)
    got = fit(small.Small(optimizer=optimizer, use_reentrant=KINDS[kind]), small.callbacks(PENALTIES), **settings)
    assert tiny.distance(got, wanted) <= 1e-9


@pytest.mark.parametrize("precision", ["float32", "bf16_mixed"])
def test_sampled_queries_are_the_same_when_a_checkpoint_repeats_them(precision: str) -> None:
    settings, bound = PRECISIONS[precision]

    def run(kind: str) -> Tensor:
        sampled = AttentionEntropyRegularizer(small.WEIGHTS["attention_entropy"], query_fraction=0.25)
        return fit(small.Small(use_reentrant=KINDS[kind]), [sampled], **settings)

    plain = run("plain")
    for kind in ("nonreentrant", "reentrant"):
        assert tiny.distance(run(kind), plain) <= bound
    whole, _, without = references(small.Small, ("attention_entropy",), tuple(settings.items()))
    assert small.rms(plain - without) > 0.5 * small.rms(whole - without)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16_mixed", "fp16_mixed"])
@pytest.mark.parametrize("name", PENALTIES)
def test_kernels_and_torch_code_train_alike(name: str, precision: str, launched: set[str]) -> None:
    settings, bound = PRECISIONS[precision]
    with kernels.disabled():
        torch_code = fit(small.Small(), small.callbacks([name]), **settings)
    assert not launched
    check(torch_code, (name,), bound, settings)
    with_kernels = fit(small.Small(), small.callbacks([name]), **settings)
    assert launched
    assert tiny.distance(with_kernels, torch_code) <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PENALTIES)
def test_weight_zero_is_bit_identical_to_no_callback(name: str, kind: str) -> None:
    def run(callbacks: list[pl.Callback]) -> Tensor:
        return fit(small.Small(use_reentrant=KINDS[kind]), callbacks, precision="bf16-mixed")

    without = run([])
    assert torch.equal(run([]), without), "the model itself does not train the same twice: the test shows nothing"
    assert torch.equal(run(small.callbacks([name], scale=0.0)), without)
    assert not torch.equal(run(small.callbacks([name])), without)


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16_mixed"])
@pytest.mark.parametrize("part", ["block", "checkpointed_block", "module"])
def test_compiled_training_equals_eager_without_graph_breaks(part: str, precision: str, compiling: None) -> None:
    from torch._dynamo.utils import counters

    settings, bound = PRECISIONS[precision]
    module = small.Small(use_reentrant=False if part == "checkpointed_block" else None)
    if part != "module":
        for block in module.net.blocks:
            block.compile(fullgraph=True)
    target = torch.compile(module) if part == "module" else module
    small.trainer(small.callbacks(), **settings).fit(target)
    check(small.weights(module), small.NAMES, bound, settings)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


class Mlps(torch.nn.Module):
    """Residual MLPs, whose hidden activations are most of what a step needs."""

    def __init__(self, regularizer: Regularizer | None) -> None:
        super().__init__()
        layers = ((torch.nn.Linear(64, 2048), torch.nn.Linear(2048, 64)) for _ in range(12))
        self.layers = torch.nn.ModuleList(torch.nn.ModuleList(pair) for pair in layers)
        self.regularizer = regularizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        penalty = x.new_zeros(())
        for up, down in self.layers:
            hidden = F.gelu(up(x))
            if self.regularizer is not None:
                hidden, value = self.regularizer(hidden)
                penalty = penalty + value
            x = x + down(hidden)
        return x, penalty


@pytest.mark.parametrize("name", ["density", "l1", "hoyer"])
def test_compiled_penalties_need_little_memory(name: str, compiling: None) -> None:
    """No more than one activation, which lives on until its gradient is there: none in float32, no second gradient."""
    taps: dict[str, Regularizer] = {
        "density": partial(density_tap, epsilon=1e-3), "l1": l1_tap, "hoyer": hoyer_tap,
    }  # fmt: skip
    peaks = {}
    for arm, tap in {"none": None, name: taps[name]}.items():
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Mlps(tap).cuda()
        step, x = torch.compile(model), torch.randn(8, 1024, 64, device="cuda")
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                output, penalty = step(x)
            (output.float().square().mean() + penalty).backward()
            model.zero_grad(set_to_none=True)
        peaks[arm] = torch.cuda.max_memory_allocated() - before
        del model, step, output, penalty
    activation = x.numel() // 64 * 2048 * 2
    assert peaks[name] - peaks["none"] <= 1.01 * activation


def test_cuda_graphs_of_compiled_blocks_equal_eager(compiling: None) -> None:
    from torch._dynamo.utils import counters

    settings, bound = PRECISIONS["bf16_mixed"]
    module = small.Small()
    for block in module.net.blocks:
        block.compile(mode="reduce-overhead", fullgraph=True)
    got = fit(module, small.callbacks(), **settings)
    check(got, small.NAMES, bound, settings)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert not counters["inductor"]["cudagraph_skips"], "no CUDA graph was made: the test shows nothing"


# --- a hand-written loop ---------------------------------------------------------------------------------------------


class Loop:
    """Steps of a hand-written loop on batches that lie at one place."""

    def __init__(self, reg: Any, net: small.Net) -> None:
        self.reg, self.net = reg, net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        self.x, self.labels = (tensor[: small.BATCH].to(next(net.parameters()).device) for tensor in small.data(1))

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(self.x).flatten(0, 1), self.labels.flatten())
        self.reg.add(loss).backward()
        self.optimizer.step()

    def batches(self) -> Any:
        """Put one batch after the other in place."""
        x, labels = small.data(8)
        for start in range(0, len(x), small.BATCH):
            self.x.copy_(x[start : start + small.BATCH])
            self.labels.copy_(labels[start : start + small.BATCH])
            yield


def by_hand(names: tuple[str, ...]) -> Tensor:
    module = small.Small(names)
    module.net.to("cuda")
    loop = Loop(None, module.net)
    for _ in loop.batches():
        loop.optimizer.zero_grad()
        module.loss(loop.x, loop.labels).backward()
        loop.optimizer.step()
        module.update()
    return small.weights(module)


@pytest.mark.parametrize("names", [PENALTIES, small.NAMES], ids=["penalties", "all"])
def test_handwritten_loop_equals_the_handwritten_loss(names: tuple[str, ...]) -> None:
    module = small.Small()
    module.net.to("cuda")
    with regularize(module.net, small.callbacks(names)) as reg:
        loop = Loop(reg, module.net)
        for _ in loop.batches():
            loop.step()
    assert tiny.distance(small.weights(module), by_hand(names)) <= 1e-6


def captured(loop: Loop) -> torch.cuda.CUDAGraph:
    """A graph of one step; the warm-up leaves no trace."""
    before = {name: tensor.clone() for name, tensor in loop.net.state_dict().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loop.step()
    torch.cuda.current_stream().wait_stream(stream)
    loop.net.load_state_dict(before)
    loop.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.step()
    return graph


@pytest.mark.parametrize("names", [PENALTIES, small.NAMES], ids=["penalties", "all"])
def test_captured_step_equals_the_handwritten_loss(names: tuple[str, ...]) -> None:
    module = small.Small()
    module.net.to("cuda")
    with regularize(module.net, small.callbacks(names)) as reg:
        loop = Loop(reg, module.net)
        graph = captured(loop)
        for _ in loop.batches():
            graph.replay()
    assert tiny.distance(small.weights(module), by_hand(names)) <= 1e-6


@pytest.mark.parametrize(
    ("argument", "value"),
    [("schedule", Linear(1.0, 0.0, duration=8)), ("query_fraction", 0.25)],
    ids=["schedule", "query_fraction"],
)
def test_captured_step_refuses_what_changes_from_step_to_step(argument: str, value: Any) -> None:
    net = small.Small().net.to("cuda")
    with regularize(net, [AttentionEntropyRegularizer(1.0, **{argument: value})]) as reg:
        with pytest.raises(
            RuntimeError, match=f"`{argument}` of attention_entropy changes from step to step, but a CUDA"
        ):
            captured(Loop(reg, net))


# --- no synchronisation ----------------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """From the third step on, waiting for the device raises between the first and the last callback of a step."""

    def __init__(self, begins: bool) -> None:
        super().__init__()
        self.begins = begins

    @property
    def state_key(self) -> str:
        return self._generate_state_key(begins=self.begins)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.begins and index >= 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.begins:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


WAITING = ("weight_sparsity", "rigl", "controlled", "together")  # when masks are chosen or a controller is updated
STEPS: dict[str, Any] = {
    "none": list,
    "all": small.callbacks,
    **{name: lambda name=name: small.callbacks([name]) for name in small.NAMES},
    **{f"contract_{name}": make for name, make in ALL.items() if name not in WAITING},
    "query_fraction": lambda: [AttentionEntropyRegularizer(1.0, query_fraction=0.25)],
    "controlled": lambda: [
        AttentionEntropyRegularizer(1.0, schedule=TargetController(0.9, quantity="value", every=100))
    ],
    "weight_sparsity_at_the_start": lambda: [WeightSparsity(0.7, begin=0, end=1)],
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_do_not_wait_for_the_device(name: str) -> None:
    watched = [Watch(True), *STEPS[name](), Watch(False)]
    settings = {"precision": "bf16-mixed", "log_every_n_steps": 1000}
    small.trainer(watched, **settings).fit(small.Small(batches=6))


@pytest.mark.parametrize("kind", ["nonreentrant", "reentrant"])
def test_checkpointed_steps_do_not_wait_for_the_device(kind: str) -> None:
    module = small.Small(batches=6, use_reentrant=KINDS[kind])
    small.trainer([Watch(True), *small.callbacks(), Watch(False)], log_every_n_steps=1000).fit(module)


def test_waiting_for_the_device_is_noticed() -> None:
    class Waiting(small.Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if loss.item() > 0 else -loss

    with pytest.raises(RuntimeError, match="synchroniz"):
        small.trainer([Watch(True), Watch(False)]).fit(Waiting())
