"""The small weights of a block, scaled at once: the numbers of numpy, and of each alone, in any order of events."""

import copy
import gc
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_reg import kernels, reparam
from lightning_reg.callbacks import apply_sigma_reparam, merge_sigma_reparam, update_sigma_reparam
from lightning_reg.functional import spectral_norm
from lightning_reg.functional.spectral_norm import JointReparam
from lightning_reg.kernels import Unsupported, operators
from lightning_reg.kernels import spectral_norm as kernel
from tests.kernels.test_spectral_norm import DTYPES, LAYOUTS, assert_close, blocks, exact, joined, operands

module = sys.modules[spectral_norm.__module__]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """`torch.empty` returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# --- numbers ---------------------------------------------------------------------------------------------------------


def in_numpy(operand: tuple[Any, ...], grad: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight in use, gradients of weight and gain."""
    weight, gain, u, v, transposed = operand
    matrices, grads = (blocks(exact(tensor), len(gain), transposed) for tensor in (weight, grad))
    used, for_weight, for_gain = [], [], []
    for w, g, a, b, factor in zip(matrices, grads, exact(u), exact(v), exact(gain)):
        sigma = a @ w @ b
        slope = (g * w).sum() / sigma
        used.append(factor / sigma * w)
        for_weight.append(factor / sigma * (g - slope * np.outer(a, b)))
        for_gain.append(slope)
    return *(joined(part, weight.shape, transposed) for part in (used, for_weight)), np.array(for_gain)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    "layouts", [list(LAYOUTS)[:5], list(LAYOUTS)[5:], list(LAYOUTS)[:8]], ids=["plain", "parts", "8"]
)
def test_weights_in_use_and_gradients_equal_numpy(layouts: list[str], dtypes: str, device: str) -> None:
    dtype, used, relative = DTYPES[dtypes]
    if device == "cpu" and used == torch.bfloat16:
        relative *= 2  # the interpreter cuts off where a GPU rounds
    together = [operands(layout, dtype, device) for layout in layouts]
    grads = [torch.randn(operand[0].shape, device=device).to(used) for operand in together]
    joint = kernel.Together(together, used)
    scaled, sums = joint.scaled()
    for_weights, for_gains = joint.gradients(grads, sums)
    for operand, grad, result, for_weight, for_gain in zip(together, grads, scaled, for_weights, for_gains):
        wanted = in_numpy(operand, grad)
        assert (result.dtype, for_weight.dtype, for_gain.dtype) == (used, dtype, operand[1].dtype)
        assert_close(result, wanted[0], relative)
        assert_close(for_weight, wanted[1], relative if dtype == used else 2e-6)
        scale = np.linalg.norm(exact(grad)) * np.linalg.norm(exact(operand[0])) / np.abs(wanted[2]).max()
        assert np.abs(exact(for_gain) - wanted[2]).max() <= 1e-5 * max(scale, np.abs(wanted[2]).max())


def test_many_tiles_a_program_and_the_same_bits_twice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "TILE", 64)
    monkeypatch.setattr(kernel, "WIDEST", 16)
    monkeypatch.setattr(kernel, "JOINT_PARTIALS", 3)
    together = [operands(layout, torch.float32, device) for layout in ("linear", "conv1d_qkv", "row")]
    grads = [torch.randn_like(operand[0]) for operand in together]
    joint = kernel.Together(together, torch.float32)
    runs = []
    for _ in range(2):
        scaled, sums = joint.scaled()
        runs.append([*scaled, *(tensor for column in joint.gradients(grads, sums) for tensor in column)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    for operand, grad, result, for_weight in zip(together, grads, runs[0], runs[0][3:]):
        wanted = in_numpy(operand, grad)
        assert_close(result, wanted[0], 2e-6)
        assert_close(for_weight, wanted[1], 2e-6)


def test_what_cannot_be_joined_says_why(device: str) -> None:
    one, other = operands("linear", torch.float32, device), operands("tall", torch.float16, device)
    with pytest.raises(Unsupported, match="differ in dtype"):
        kernel.Together([one, other], torch.float16)
    with pytest.raises(Unsupported, match="float64"):
        kernel.Together([one, one], torch.float64)


# --- in a model ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(12, 36), nn.Linear(12, 20), nn.Linear(20, 12)

    def attend(self, x: Tensor) -> Tensor:
        return x + self.qkv(x).unflatten(-1, (3, 12)).prod(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.down(self.up(x).tanh())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def reparametrized(device: str, seen: bool = True) -> Model:
    """A model whose bundles have ``seen`` a pass, which shows them the order."""
    torch.manual_seed(1)
    model = Model().to(device)
    apply_sigma_reparam(model)
    if seen:
        model(torch.zeros(1, 1, 12, device=device))
    return model


def spectral(layer: nn.Module) -> reparam.SpectralParametrization:
    return layer.parametrizations.weight[0]  # type: ignore[union-attr, index, return-value]


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original  # type: ignore[union-attr, return-value]


def batch(device: str) -> Tensor:
    return torch.randn(4, 5, 12, device=device)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], exact(tensor), relative)


def alone(run: Callable[[], Any]) -> Any:
    """What torch code gives, a weight at a time."""
    with kernels.disabled():
        return run()


@pytest.fixture
def joints(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of weights that were computed at once, one entry for each time."""
    sizes: list[int] = []
    call = JointReparam.__call__

    def counting(self: JointReparam, finished: Callable[[], None]) -> Sequence[Tensor]:
        results = call(self, finished)
        sizes.extend([len(results)] if results else [])
        return results

    monkeypatch.setattr(JointReparam, "__call__", counting)
    return sizes


def test_training_is_that_of_the_torch_code(device: str, joints: list[int]) -> None:
    def train() -> list[Tensor]:
        model = reparametrized(device, seen=False)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        torch.manual_seed(2)
        for step in range(4):
            (model(batch(device)) - 1).square().mean().backward()
            if step % 2:  # two batches a step
                optimizer.step()
                optimizer.zero_grad()
                update_sigma_reparam(model)
        return [*model.parameters(), *model.buffers()]

    wanted = alone(train)
    assert not joints
    for actual, expected in zip(train(), wanted):
        assert_close(actual, exact(expected), 1e-4)
    assert joints == [3] * 6, "each block in each forward but the first"


def test_weights_of_a_block_share_a_bundle_and_others_have_none() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict() for _ in range(2)]), "head": nn.Linear(12, 3)})
    first, second = model["blocks"]  # type: ignore[misc]
    first.update({f"fc{i}": nn.Linear(12, 12) for i in range(10)})
    first["large"] = nn.Linear(2049, 2048)
    second.update({"attn": nn.MultiheadAttention(12, 2), "fc": nn.Linear(12, 12), "tied": nn.Linear(12, 12)})
    second["tied"].weight = second["fc"].weight
    apply_sigma_reparam(model)
    bundles = [spectral(first[f"fc{i}"]).bundle for i in range(10)]
    assert None not in bundles
    assert [bundles.count(bundle) for bundle in dict.fromkeys(bundles)] == [8, 2]
    lonely = [spectral(layer) for layer in (first["large"], second["fc"], second["attn"].out_proj, model["head"])]
    assert [layer.bundle for layer in lonely] == [None] * 4


def test_the_bundle_is_left_with_the_reparametrization(device: str) -> None:
    model = reparametrized(device)
    one = spectral(model.blocks[0].up)
    assert copy.deepcopy(model).blocks[0].up.parametrizations.weight[0].bundle is None
    assert pickle.loads(pickle.dumps(one)).bundle is None
    merge_sigma_reparam(model)
    assert one.bundle is None


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "half"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: original(layer).data.mul_(1.1),  # no counter of torch notices
        lambda layer: setattr(original(layer), "data", original(layer).data * 1.1),
        lambda layer: spectral(layer).gain.data.mul_(1.1),
        lambda layer: original(layer).requires_grad_(False),
        lambda layer: spectral(layer).u.copy_(spectral(layer).u * 0.9),
    ],
    ids=["in_place", "replaced", "gain", "frozen", "vector"],
)
def test_changes_between_forwards_are_seen(change: Callable[[nn.Module], Any], whole: bool, device: str) -> None:
    model, x = reparametrized(device), batch(device)

    def run() -> dict[str, Tensor]:
        return gradients(model, lambda: model(x).square().sum())

    # a forward without a backward, which ends as it should or half-way
    model(x) if whole else model.blocks[1].attend(model.blocks[0](x))
    with torch.no_grad():
        change(model.blocks[1].up)
        change(model.blocks[1].qkv)
    wanted = alone(run)
    assert_alike(run(), wanted)
    assert_alike(run(), wanted)


def test_a_weight_read_by_others_or_twice_is_computed_alone(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    block = model.blocks[0]
    wanted = alone(lambda: gradients(block, lambda: block(x).sum() + block.down(block.up(x)).square().sum()))
    assert block.qkv.weight.requires_grad
    assert block.up.weight.requires_grad
    assert not joints, "reading a weight outside the forward of its module begins nothing"
    found = gradients(
        block, lambda: block(x).sum() + block.down(block.up(x)).square().sum() + 0 * block.up.weight.sum()
    )
    assert_alike(found, wanted)


def test_half_a_block_and_two_backwards(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    block = model.blocks[0]

    def parts() -> dict[str, Tensor]:
        block.zero_grad()
        attended = block.attend(x)
        result = block.down(block.up(attended.detach()).tanh())
        attended.square().sum().backward()  # one of the three weights
        result.square().sum().backward()  # the others
        return {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}

    wanted = alone(parts)
    assert_alike(parts(), wanted)
    assert_alike(parts(), wanted)
    half = alone(lambda: gradients(block, lambda: block.attend(x).square().sum()))
    for _ in range(5):
        assert_alike(gradients(block, lambda: block.attend(x).square().sum()), half)
    assert "up.parametrizations.weight.original" not in half
    assert spectral(block.up).bundle is None, "computed in vain again and again"
    joints.clear()
    assert_alike(gradients(block, lambda: block(x).sum()), alone(lambda: gradients(block, lambda: block(x).sum())))
    assert not joints


def another_gain(layer: nn.Module) -> None:
    """The same memory in another Parameter, which the gradient belongs to from then on."""
    spectral(layer).gain = nn.Parameter(spectral(layer).gain.data)


AMID: dict[str, Callable[[nn.Module], Any]] = {
    "replaced": lambda layer: setattr(original(layer), "data", original(layer).data * 1.1),
    "gain_thawed": lambda layer: spectral(layer).gain.requires_grad_(True),
    "another_gain": another_gain,
}


@pytest.mark.parametrize("when", ["out_of_turn", "counted", "after_a_backward", *AMID])
def test_changes_amid_a_block_are_seen(when: str, device: str) -> None:
    x, hidden = batch(device), torch.randn(4, 5, 20, device=device)

    def run() -> dict[str, Tensor]:
        block = reparametrized(device).blocks[0]
        spectral(block.up).gain.requires_grad_(when != "gain_thawed")
        attended = block.attend(x)  # where bundles are, all three weights are there
        if when == "out_of_turn":
            original(block.down).data.mul_(1.1)
            return gradients(block, lambda: block.down(hidden).square().sum())
        if when == "counted":
            with torch.no_grad():
                original(block.up).mul_(1.1)
        elif when in AMID:
            AMID[when](block.up)
        else:
            attended.sum().backward()
            original(block.up).data.mul_(1.1)
        return gradients(block, lambda: block.up(x).square().sum())

    assert_alike(run(), alone(run))


def test_a_step_between_the_backwards_of_two_losses(device: str) -> None:
    model, x = reparametrized(device), batch(device)
    block = model.blocks[0]

    def second() -> dict[str, Tensor]:
        attended = block.attend(x)
        result = block.down(block.up(attended.detach()).tanh())
        attended.square().sum().backward()
        with torch.no_grad():
            original(block.qkv).sub_(0.01)  # of another optimizer
        return gradients(block, lambda: result.square().sum())

    wanted = alone(second)
    with torch.no_grad():
        original(block.qkv).add_(0.01)
    assert_alike(second(), wanted)


def test_gradients_of_gradients(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)

    def second() -> dict[str, Tensor]:
        (slope,) = torch.autograd.grad(
            model(x).square().sum(), original(model.blocks[0].qkv), create_graph=True
        )  # fmt: skip
        return gradients(model, lambda: slope.square().sum())

    wanted = alone(second)
    assert_alike(second(), wanted, 1e-4)
    assert joints


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["block", "half"])
def test_checkpoints(part: str, reentrant: bool, device: str) -> None:
    model, x = reparametrized(device), batch(device).requires_grad_()

    def forward() -> Tensor:
        y = x
        for block in model.blocks:
            if part == "block":
                y = checkpoint(block, y, use_reentrant=reentrant)  # type: ignore[assignment]
            else:
                y = checkpoint(block.attend, y, use_reentrant=reentrant)  # type: ignore[assignment]
                y = y + checkpoint(lambda y, block=block: block.down(block.up(y).tanh()), y, use_reentrant=reentrant)
        return model.head(y).square().sum()

    wanted = alone(lambda: gradients(model, lambda: model(x).square().sum()))
    for _ in range(3):
        assert_alike(gradients(model, forward), wanted)


def test_weights_that_are_not_trained_stay_out(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device, seen=False), batch(device)

    def run() -> dict[str, Tensor]:
        return gradients(model, lambda: model(x).square().sum())

    up = spectral(model.blocks[0].up)
    for parameter in model.blocks[0].up.parameters():
        parameter.requires_grad_(False)
    for expected in ([], [2, 3]):
        assert_alike(run(), alone(run))
        assert joints == expected
    joints.clear()
    for parameter in model.blocks[0].up.parameters():
        parameter.requires_grad_(True)  # unfrozen later, and with the next step in the bundle
    for _ in range(4):
        assert_alike(run(), alone(run))
        update_sigma_reparam(model)
    assert joints == [2, 3, 3, 3, 3, 3, 3]
    joints.clear()
    up.gain.requires_grad_(False)
    assert_alike(run(), alone(run))
    joints.clear()
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    assert not joints


def test_weights_whose_gradient_somebody_waits_for_are_computed_alone(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    first, second = model.blocks
    seen: list[Tensor | None] = []
    original(first.up).register_hook(lambda grad: seen.append(grad))
    spectral(first.qkv).gain.register_post_accumulate_grad_hook(lambda gain: seen.append(gain.grad))
    second.down.register_full_backward_hook(lambda *_: seen.append(original(second.down).grad))  # type: ignore[arg-type]

    def run() -> dict[str, Tensor]:
        return gradients(model, lambda: model(x).square().sum())

    assert_alike(run(), alone(run))
    assert not joints
    assert all(isinstance(grad, Tensor) for grad in seen)
    half = alone(lambda: gradients(first, lambda: first.attend(x).square().sum()))
    assert_alike(gradients(first, lambda: first.attend(x).square().sum()), half)


def test_another_parameter_over_the_same_memory_gets_the_gradient(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    model(x)
    another_gain(model.blocks[0].up)
    wanted = alone(lambda: gradients(model, lambda: model(x).square().sum()))
    assert_alike(gradients(model, lambda: model(x).square().sum()), wanted)
    assert joints


def test_another_parameter_in_its_place_is_computed_alone(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    values = {name: p.detach() * 1.5 for name, p in model.named_parameters() if "blocks.0.up" in name}

    def run() -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        result = torch.func.functional_call(model, leaves, (x,))
        return list(torch.autograd.grad(result.square().sum(), list(leaves.values())))

    for found, wanted in zip(run(), alone(run)):
        assert_close(found, exact(wanted), 2e-5)
    assert joints == [3], "the other block"


def test_a_module_of_the_block_is_replaced(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    model.blocks[0].up = nn.Linear(12, 20, device=device)
    for _ in range(2):
        wanted = alone(lambda: gradients(model, lambda: model(x).square().sum()))
        assert_alike(gradients(model, lambda: model(x).square().sum()), wanted)
    assert joints == [3, 3], "the other block"


def test_no_gradient_is_none(device: str) -> None:
    model, x = reparametrized(device), batch(device)

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    (Cut.apply(model.blocks[0](x)).sum() + model.head(x).sum()).backward()  # type: ignore[attr-defined]
    assert model.head.bias.grad is not None
    used = original(model.blocks[0].up).grad
    assert used is None or not used.any()


def test_gradients_of_gains_know_nothing_of_each_other(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    gains = [spectral(layer).gain for layer in (model.blocks[0].qkv, model.blocks[0].up)]
    first, second = torch.autograd.grad(model(x).square().sum(), gains)
    assert joints
    factor = torch.ones(1, device=device, requires_grad=True)
    product = first * factor
    second.zero_()
    product.sum().backward()  # needs `first` as it was
    assert_close(factor.grad, exact(first.sum().view(1)), 1e-6)  # type: ignore[arg-type]


def test_a_model_dies_without_the_collector(device: str) -> None:
    model = reparametrized(device)
    model(batch(device)).sum().backward()
    gone = weakref.ref(original(model.blocks[0].up))
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("of", ["weight", "gain", "vector"])
def test_a_change_in_place_before_the_backward_is_refused(of: str, device: str) -> None:
    model = reparametrized(device)
    loss = model(batch(device)).sum()
    layer = model.blocks[0].up
    with torch.no_grad():
        {"weight": original(layer), "gain": spectral(layer).gain, "vector": spectral(layer).v}[of].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("joined", [True, False], ids=["together", "alone"])
def test_an_update_between_forward_and_backward_is_refused(joined: bool, device: str) -> None:
    model, x = reparametrized(device), batch(device)
    loss = model.blocks[0](x).sum() if joined else model.head(x).sum()
    update_sigma_reparam(model)
    with pytest.raises(RuntimeError, match=r"changed in place|inplace operation"):
        loss.backward()
    model(x).sum().backward()  # and the next step goes on


def test_weights_that_move_are_found_or_left_alone(device: str, joints: list[int]) -> None:
    model, x = reparametrized(device), batch(device)
    wanted = alone(lambda: gradients(model, lambda: model(x).square().sum()))

    def moved() -> Tensor:
        layer = model.blocks[0].up
        original(layer).data = original(layer).data.clone()
        return model(x).square().sum()

    keep = []  # what was left is not used again
    for _ in range(reparam.MOST_MOVES + 2):
        keep.append(original(model.blocks[0].up).data)
        assert_alike(gradients(model, moved), wanted)
    assert spectral(model.blocks[0].up).bundle is None
    assert spectral(model.blocks[1].up).bundle is not None
    assert joints.count(3) == 2 * (reparam.MOST_MOVES + 2) - 1

    loss = model(x).square().sum()
    original(model.blocks[1].up).data = original(model.blocks[1].up).data.clone()  # between forward and backward
    assert_alike(gradients(model, lambda: loss), wanted)


@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_that_fails_is_said_once_and_replaced(
    backward: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_warned", set())
    model, x = reparametrized(device), batch(device)
    wanted = alone(lambda: gradients(model, lambda: model(x).square().sum()))

    def fail(*_: Any) -> None:
        raise TypeError("no such kernel")

    monkeypatch.setattr(kernel.Together, "gradients" if backward else "scaled", fail)
    what = "gradients" if backward else "weights"
    with pytest.warns(UserWarning, match=f"the {what} of sigma-Reparam one by one.* its kernel failed with TypeError"):
        found = gradients(model, lambda: model(x).square().sum())
    assert_alike(found, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_alike(gradients(model, lambda: model(x).square().sum()), wanted)


def test_weights_of_another_layout_are_computed_alone(device: str, joints: list[int]) -> None:
    torch.manual_seed(1)
    block = nn.ModuleDict({"a": nn.Conv2d(3, 5, 3), "b": nn.Conv2d(5, 4, 3)}).to(
        device, memory_format=torch.channels_last
    )
    model = nn.ModuleList([block])
    apply_sigma_reparam(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            result = block["b"](block["a"](torch.randn(2, 3, 8, 8, device=device)))
    assert result.isfinite().all()
    assert not joints
    assert spectral(block["a"]).bundle is None
