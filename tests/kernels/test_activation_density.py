"""Density kernels against float64, and what all activation penalties share: the way through the activation function."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_reg import kernels, regularize
from lightning_reg.callbacks import ActivationDensityRegularizer
from lightning_reg.functional._fusing import producer
from lightning_reg.functional.activation_density import density_tap
from lightning_reg.functional.activation_hoyer import hoyer_tap
from lightning_reg.functional.activation_l1 import l1_tap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 5), (2, 7, 300), (5, 512), (2, 0, 8), (4, 0)]
# every shape in float32, one in the others: on a GPU each is compiled
CASES = [(torch.float32, shape) for shape in SHAPES] + [(dtype, (2, 7, 300)) for dtype in DTYPES[1:]]
# of the mean magnitude of the gradient; Triton's interpreter cuts bfloat16 off instead of rounding it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-2, torch.float16: 1e-2}
TAPS: dict[str, Callable] = {
    "density": partial(density_tap, epsilon=0.1),
    "relative density": partial(density_tap, epsilon=0.1, relative=True),
    "l1": l1_tap,
    "hoyer": hoyer_tap,
}
FORMULAS: dict[str, Callable] = {
    "density": lambda x: (x.square() / (x.square() + 0.1)).mean(),
    "relative density": lambda x: (x.square() / (x.square() + 0.1 * x.detach().square().mean())).mean(),
    "l1": lambda x: x.abs().mean(),
    "hoyer": lambda x: (x.abs().sum(-1).square() / (x.shape[-1] * x.square().sum(-1))).mean(),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh buffers hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = wanted.abs().mean().item() if wanted.numel() else 0.0
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale)


# --- density ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_value_and_gradient(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], relative: bool, masked: bool
) -> None:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    mask = torch.rand(shape[:-1], device=device) < 0.6 if masked else None
    grad = torch.randn(shape, device=device).to(dtype)
    passed, density = density_tap(x, epsilon=0.1, mask=mask, relative=relative)
    (got,) = torch.autograd.grad((passed, density), x, (grad, torch.tensor(-3.0, device=device)))
    assert density.dtype == torch.float32
    assert got.dtype == dtype

    exact = x.detach().double().requires_grad_()
    valid = torch.ones_like(exact) if mask is None else mask.double().unsqueeze(-1).expand(shape)
    count = valid.sum().clamp_min(1)
    epsilon = 0.1 * ((exact.detach().square() * valid).sum() / count if relative else 1)
    wanted = (valid * exact.square() / (exact.square() + epsilon).clamp_min(1e-30)).sum() / count
    (wanted_alone,) = torch.autograd.grad(wanted, exact, retain_graph=True)
    (wanted_grad,) = torch.autograd.grad(wanted * -3 + (exact * grad.double()).sum(), exact)
    torch.testing.assert_close(density.double(), wanted, rtol=0, atol=1e-6)
    assert_near(got, wanted_grad, TOLERANCE[dtype])
    (alone,) = torch.autograd.grad(density_tap(x, epsilon=0.1, mask=mask, relative=relative)[1], x)
    assert_near(alone, wanted_alone, TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded gradient"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_layout_does_not_matter(device: str, layout: str, masked: bool) -> None:
    x = torch.randn(40, 7, device=device).t() if layout == "transposed" else torch.randn(7, 80, device=device)[:, ::2]
    mask = torch.arange(7, device=device) % 3 > 0 if masked else None
    tap = partial(density_tap, epsilon=0.1, mask=mask)
    grads = []
    for value in (x, x.contiguous()):
        value = value.detach().requires_grad_()
        passed, density = tap(value)
        (grad,) = torch.autograd.grad(passed.sum() + density, value)
        grads.append((density, grad.contiguous()))
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(grads[0][0], grads[1][0])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, in the interpreter
def test_numbers_at_the_ends_of_the_range(device: str) -> None:
    x = torch.tensor([0.0, 1e-15, 1e-4, 1.0, 1e15, -3e38], device=device, requires_grad=True)
    for epsilon in (1e-40, 1e-20, 1e-7):
        density = density_tap(x, epsilon=epsilon)[1]
        (grad,) = torch.autograd.grad(density * 65536, x)
        assert 0 <= density <= 1
        assert grad.isfinite().all()
        assert grad[0] == 0
    invalid = torch.full((2, 3), torch.nan, device=device, requires_grad=True)
    mask = torch.zeros(2, dtype=torch.bool, device=device)
    density = density_tap(invalid, mask=mask)[1]
    (grad,) = torch.autograd.grad(density, invalid)
    assert density == 0
    assert grad.eq(0).all()
    assert density_tap(torch.tensor([1.0, torch.nan], device=device))[1].isnan()


def test_kernel_and_torch_agree_on_every_density(device: str) -> None:
    for epsilon in (1e-7, 1e-2, 20.0):
        x = torch.randn(3, 700, device=device) * 0.1
        value = density_tap(x, epsilon=epsilon)[1]
        with kernels.disabled():
            torch.testing.assert_close(value, density_tap(x, epsilon=epsilon)[1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", TAPS)
def test_two_runs_are_bit_equal(device: str, name: str) -> None:
    x = torch.randn(5, 3000, device=device)
    runs = []
    for _ in range(2):
        pre = x.clone().requires_grad_()
        passed, value = TAPS[name](F.gelu(pre))
        runs.append((value, *torch.autograd.grad(passed.sin().sum() + value, pre)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_float64_is_left_to_torch_with_one_warning(device: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match=r"activation_density.* in plain torch.* float32 and was given torch.float64"):
        density_tap(x)[1].backward()


# --- through the activation function ---------------------------------------------------------------------------------


class Gated(nn.Module):
    """A projection to gate and up, multiplied either way around."""

    def __init__(self, activation: Callable, swapped: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 40), nn.Linear(6, 40)
        self.activation, self.swapped = activation, swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.activation(self.gate(x)), self.up(x)
        return up * gate if self.swapped else gate * up


def plain(activation: Callable) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), activation)


FUSED: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: plain(nn.GELU()),
    "gelu_tanh": lambda: plain(nn.GELU("tanh")),
    "silu": lambda: plain(nn.SiLU()),
    "without dropout": lambda: nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Dropout(0.0), nn.Identity()),
    "gated": lambda: Gated(F.silu),
    "gated, swapped": lambda: Gated(F.gelu, swapped=True),
}
APART: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: plain(nn.ReLU()),
    "mish": lambda: plain(nn.Mish()),
    "scaled": lambda: nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.LayerNorm(40)),
    "none": lambda: nn.Linear(6, 40),
    "gate without activation": lambda: Gated(torch.sigmoid),
}


class Mlp(nn.Module):
    """Up, activation, down, with a penalty on what enters down."""

    def __init__(self, first: nn.Module, measure: Callable) -> None:
        super().__init__()
        self.first, self.down, self.measure = first, nn.Linear(40, 6), measure
        self.fused = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        self.fused = bool(producer(x)[0])
        x, penalty = self.measure(x)
        return self.down(x).sin().sum(), penalty


def build(name: str, tap: str, device: str) -> tuple[Mlp, Mlp, Tensor]:
    """A model, the same in float64 with the formula instead of the tap, and an input."""
    model = Mlp({**FUSED, **APART}[name](), TAPS[tap]).to(device)
    exact = Mlp({**FUSED, **APART}[name](), lambda x: (x, FORMULAS[tap](x))).to(device).double()
    exact.load_state_dict(model.state_dict())
    return model, exact, torch.randn(2, 9, 6, device=device)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("name", [*FUSED, *APART])
def test_gradients_of_a_model(device: str, name: str, tap: str) -> None:
    model, exact, x = build(name, tap, device)
    for module, value in ((model, x), (exact, x.double())):
        loss, penalty = module(value)
        (0.7 * loss + 40 * penalty).backward()
    assert model.fused == (name in FUSED)
    assert not exact.fused
    for got, wanted in zip(model.parameters(), exact.parameters()):
        assert_near(got.grad, wanted.grad, 2e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "gated"])
def test_each_precision(device: str, activation: str, tap: str, dtype: torch.dtype, masked: bool) -> None:
    """Against the same steps in float64 on the numbers that the forward rounded to."""
    activate = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}.get(activation, F.silu)
    pre, up = ((3 * torch.randn(4, 3, 50, device=device)).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(4, 3, 50, device=device).to(dtype)
    mask = torch.rand(4, 3, device=device) < 0.6 if masked else None
    x = activate(pre) * up if activation == "gated" else activate(pre)
    leaves = (pre, up) if activation == "gated" else (pre,)
    assert producer(x)[0] == ("silu" if activation == "gated" else activation)
    passed, penalty = TAPS[tap](x, mask=mask)
    assert torch.equal(passed, x)
    got = torch.autograd.grad((passed, penalty), leaves, (grad, torch.tensor(30.0, device=device)))

    fixed = x.detach().double().requires_grad_()
    valid = fixed if mask is None else fixed[mask]
    (total,) = torch.autograd.grad(30 * FORMULAS[tap](valid) + (fixed * grad.double()).sum(), fixed)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    product = activate(exact[0]) * exact[1] if activation == "gated" else activate(exact[0])
    for one, wanted in zip(got, torch.autograd.grad(product, exact, total)):
        assert one.dtype == dtype
        assert_near(one, wanted, TOLERANCE[dtype])


def test_gelu_far_from_zero_keeps_its_digits(device: str) -> None:
    pre = torch.tensor([-12.0, -8.0, -5.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 9.0, 200.0], device=device, requires_grad=True)
    passed, density = density_tap(F.gelu(pre), epsilon=1e-7)
    (got,) = torch.autograd.grad((passed, density), pre, (torch.ones_like(pre), torch.tensor(0.0, device=device)))
    exact = pre.detach().double().requires_grad_()
    # 1 + erf loses them, erfc does not
    (wanted,) = torch.autograd.grad((exact * torch.special.erfc(-exact / 2**0.5) / 2).sum(), exact)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


def test_value_used_elsewhere_too(device: str) -> None:
    up, down = nn.Linear(6, 40).to(device), nn.Linear(40, 6).to(device)
    x = torch.randn(5, 6, device=device)
    grads = []
    for fused in (True, False):
        hidden = F.gelu(up(x) if fused else up.double()(x.double()))
        passed, penalty = density_tap(hidden, epsilon=0.1) if fused else (hidden, FORMULAS["density"](hidden))
        down = down if fused else down.double()
        loss = down(passed).square().sum() + hidden.sin().sum() + 10 * penalty
        grads.append(torch.autograd.grad(loss, [*up.parameters(), *down.parameters()]))
    for got, wanted in zip(*grads):
        assert_near(got, wanted, 2e-5)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("used", ["value", "penalty"])
@pytest.mark.parametrize("name", ["gelu", "gated"])
def test_either_output_may_be_unused(device: str, name: str, used: str, tap: str) -> None:
    first, x = FUSED[name]().to(device), torch.randn(3, 6, device=device)
    passed, penalty = TAPS[tap](first(x))
    got = torch.autograd.grad(passed.sin().sum() if used == "value" else penalty, list(first.parameters()))
    exact = FUSED[name]().to(device).double()
    exact.load_state_dict(first.state_dict())
    hidden = exact(x.double())
    wanted = torch.autograd.grad(
        hidden.sin().sum() if used == "value" else FORMULAS[tap](hidden), list(exact.parameters())
    )
    for a, b in zip(got, wanted):
        assert_near(a, b, 2e-5)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "gated"])
def test_gradients_of_gradients(device: str, name: str, tap: str) -> None:
    model, exact, x = build(name, tap, device)
    found = []
    for module, value in ((model, x), (exact, x.double())):
        value = value.requires_grad_()
        loss, penalty = module(value)
        (grad,) = torch.autograd.grad(loss + 30 * penalty, value, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), list(module.first.parameters())))
    assert model.fused
    for got, wanted in zip(*found):
        assert_near(got, wanted, 1e-4)


def test_backward_twice_and_under_anomaly_detection(device: str) -> None:
    pre = torch.randn(3, 20, device=device, requires_grad=True)
    passed, penalty = density_tap(F.gelu(pre), epsilon=0.1)
    first, second = (torch.autograd.grad(passed.sum() + penalty, pre, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.autograd.set_detect_anomaly(True):
        passed, penalty = density_tap(F.gelu(pre), epsilon=0.1)
        (passed.sum() + penalty).backward()
    assert torch.equal(pre.grad, first)


def untouched(x: Tensor) -> Tensor:
    return x


def hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: None)
    return x


def retained(x: Tensor) -> Tensor:
    x.retain_grad()
    return x


def changed(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(0.5)
    return x


def changed_before(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.grad_fn._saved_self.mul_(0.5)
    return x


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (untouched, True), (hooked, False), (retained, False), (changed, False), (changed_before, False),
        (lambda x: x[1:], False), (lambda x: x.view(-1), False), (Tensor.detach, False), (Tensor.t, False),
    ],
    ids=["untouched", "hooked", "retained", "changed", "changed before", "part", "view", "detached", "transposed"],
)  # fmt: skip
def test_only_what_nobody_could_tell_apart_is_fused(
    device: str, change: Callable[[Tensor], Tensor], fused: bool
) -> None:
    pre = torch.randn(4, 8, device=device, requires_grad=True)
    x = change(F.gelu(pre * 1.0))
    assert bool(producer(x)[0]) == fused


def test_what_cannot_be_fused(device: str) -> None:
    pre = torch.randn(4, 8, device=device, requires_grad=True)
    assert producer(F.gelu(pre))[0] == "gelu"
    assert producer(F.gelu(pre.double()))[0] == ""
    assert producer(F.gelu(pre.t()))[0] == ""
    assert producer(F.silu(pre) * pre[:, :1])[0] == ""
    assert producer(F.silu(pre) * 2.0)[0] == ""
    assert producer(F.silu(pre) * pre.detach())[0] == ""
    gate = F.silu(pre)
    gate.register_hook(lambda grad: None)
    assert producer(gate * pre)[0] == ""
    with kernels.disabled():
        assert producer(F.gelu(pre))[0] == ""
    with torch.no_grad():
        assert producer(F.gelu(pre))[0] == ""
    x = F.gelu(pre)
    with torch.no_grad():
        assert producer(x)[0] == ""
    with torch.autograd.graph.save_on_cpu():
        assert producer(F.gelu(pre))[0] == ""
        assert producer(x)[0] == ""
        y = F.gelu(pre)
    assert producer(y)[0] == ""
    x = F.gelu(pre)
    x.sum().backward()
    assert producer(x)[0] == ""


def test_a_torch_that_cannot_tell_of_hooks_is_not_fused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = F.gelu(torch.randn(4, 8, device=device, requires_grad=True))
    monkeypatch.setattr(torch._C, "_autograd", object())
    assert producer(x)[0] == ""


def test_a_hook_on_the_value_sees_the_joined_gradient(device: str) -> None:
    pre = torch.randn(4, 8, device=device, requires_grad=True)
    x = F.gelu(pre)
    x.retain_grad()
    passed, penalty = density_tap(x, epsilon=0.1)
    (passed.sum() + 5 * penalty).backward()
    exact = x.detach().double().requires_grad_()
    (exact.sum() + 5 * FORMULAS["density"](exact)).backward()
    assert_near(x.grad, exact.grad, 1e-5)


def test_tapped_value_refuses_in_place_changes(device: str) -> None:
    passed, _ = density_tap(F.gelu(torch.randn(4, 8, device=device, requires_grad=True)))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        passed.mul_(2)


def test_two_penalties_on_one_value(device: str) -> None:
    pre = torch.randn(4, 8, device=device, requires_grad=True)
    x, density = density_tap(F.gelu(pre), epsilon=0.1)
    x, l1 = l1_tap(x)
    (got,) = torch.autograd.grad(x.sin().sum() + 5 * density + 7 * l1, pre)
    exact = pre.detach().double().requires_grad_()
    x = F.gelu(exact)
    loss = x.sin().sum() + 5 * FORMULAS["density"](x) + 7 * FORMULAS["l1"](x)
    assert_near(got, torch.autograd.grad(loss, exact)[0], 1e-5)


# --- through the engine ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """An MLP with a residual, perhaps in a checkpoint."""

    def __init__(self, reentrant: bool | None, dropout: float) -> None:
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(6, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 6)
        self.reentrant = reentrant

    def inner(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_regularized_model_has_the_gradients_of_torch(device: str, dropout: float, reentrant: bool | None) -> None:
    model = nn.Sequential(nn.Linear(6, 6), *(Block(reentrant, dropout) for _ in range(2))).to(device)
    x = torch.randn(3, 5, 6, device=device)
    grads = []
    for off in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        with regularize(model, [ActivationDensityRegularizer(5.0, epsilon=0.1)]) as reg:
            if off:
                with kernels.disabled():
                    reg.add(model(x).square().mean()).backward()
            else:
                reg.add(model(x).square().mean()).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for got, wanted in zip(*grads):
        assert_near(got, wanted, 2e-5)


def test_evaluation_without_gradient(device: str) -> None:
    x = torch.randn(4, 8, device=device)
    with torch.no_grad():
        passed, density = density_tap(F.gelu(x), epsilon=0.1)
    assert not passed.requires_grad
    assert density.item() == pytest.approx(FORMULAS["density"](F.gelu(x.double())).item(), abs=1e-6)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("tap", TAPS)
def test_more_than_two_billion_elements(tap: str, masked: bool) -> None:
    pre = torch.zeros(2**19 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    pre[-2:] = torch.randn(2, 4096, device="cuda").bfloat16()
    last = pre[-2:].clone().requires_grad_()
    pre.requires_grad_()
    # only the last rows count
    mask = torch.arange(len(pre), device="cuda") >= len(pre) - 2 if masked else None
    with torch.no_grad():
        few = TAPS[tap](F.gelu(last))[1]
    penalty = TAPS[tap](F.gelu(pre), mask=mask)[1]
    share = 1.0 if masked else 2 / len(pre)
    if "relative" not in tap or masked:
        torch.testing.assert_close(penalty, few * share, rtol=1e-3, atol=0)
    penalty.backward(torch.tensor(1 / share, device="cuda"))
    assert pre.grad[:-2].count_nonzero() == 0
    if "relative" not in tap or masked:
        (wanted,) = torch.autograd.grad(TAPS[tap](F.gelu(last))[1], last)
        torch.testing.assert_close(pre.grad[-2:], wanted, rtol=1e-2, atol=1e-7)
