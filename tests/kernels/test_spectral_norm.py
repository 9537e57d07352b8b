"""The kernels of sigma-Reparam against float64 numpy, with every buffer full of NaN before it is written."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_reg import kernels
from lightning_reg.callbacks import apply_sigma_reparam, update_sigma_reparam
from lightning_reg.functional import spectral_norm, spectral_reparam
from lightning_reg.kernels import operators
from lightning_reg.kernels import spectral_norm as kernel

module = sys.modules[spectral_norm.__module__]

# shape, parts, transposed
LAYOUTS = {
    "linear": ((65, 33), 1, False),
    "wide": ((7, 515), 1, False),
    "tall": ((601, 3), 1, False),
    "row": ((1, 40), 1, False),
    "column": ((40, 1), 1, False),
    "qkv": ((39, 16), 3, False),
    "conv1d": ((19, 70), 1, True),
    "conv1d_qkv": ((20, 27), 3, True),
    "conv2d": ((6, 3, 5, 5), 1, False),
}
# weight, weight in use, relative error
DTYPES = {
    "float32": (torch.float32, torch.float32, 2e-6),
    "autocast": (torch.float32, torch.bfloat16, 2**-8),
    "half_autocast": (torch.float32, torch.float16, 2**-11),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 2**-8),
}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """`torch.empty` returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(layout: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Weight, gain, and unit vectors that are not its singular vectors."""
    shape, parts, transposed = LAYOUTS[layout]
    weight = torch.randn(shape).to(dtype)
    matrices = (weight.t() if transposed else weight.flatten(1)).chunk(parts)
    v = nn.functional.normalize(torch.randn(parts, matrices[0].shape[1]), dim=1)
    products = torch.stack([matrix.float() @ vector for matrix, vector in zip(matrices, v)])
    u = nn.functional.normalize(
        products + 0.3 * products.norm() * torch.randn(products.shape) / len(products[0]), dim=1
    )
    return *(tensor.to(device) for tensor in (weight, torch.rand(parts) + 0.5, u, v)), transposed


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def blocks(weight: np.ndarray, parts: int, transposed: bool) -> list[np.ndarray]:
    matrix = weight.T if transposed else weight.reshape(len(weight), -1)
    return np.split(matrix, parts)


def joined(parts: list[np.ndarray], shape: Any, transposed: bool) -> np.ndarray:
    return np.concatenate(parts).T if transposed else np.concatenate(parts).reshape(shape)


def assert_close(actual: Tensor, wanted: np.ndarray, relative: float) -> None:
    assert actual.shape == wanted.shape
    error = np.linalg.norm(exact(actual) - wanted)
    assert error <= relative * np.linalg.norm(wanted)  # false for NaN


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_in_use_and_gradients_equal_numpy(layout: str, dtypes: str, device: str) -> None:
    dtype, used, relative = DTYPES[dtypes]
    weight, gain, u, v, transposed = operands(layout, dtype, device)
    grad = torch.randn(weight.shape, device=device).to(used)
    matrices, grads = (blocks(exact(tensor), len(gain), transposed) for tensor in (weight, grad))
    vectors = list(zip(matrices, grads, exact(u), exact(v), exact(gain)))
    sigmas = [a @ matrix @ b for matrix, _, a, b, _ in vectors]
    wanted = [g / sigma * matrix for (matrix, _, _, _, g), sigma in zip(vectors, sigmas)]
    of_gain = [(slope * matrix).sum() / sigma for (matrix, slope, _, _, _), sigma in zip(vectors, sigmas)]
    of_weight = [
        g / sigma * (slope - d * np.outer(a, b)) for (_, slope, a, b, g), sigma, d in zip(vectors, sigmas, of_gain)
    ]

    scaled, found = kernel.scaled_weight(weight, gain, u, v, transposed, used)
    assert scaled.dtype == used
    assert_close(scaled, joined(wanted, weight.shape, transposed), relative)
    assert_close(found, np.array(sigmas), 2e-6)

    for_weight, for_gain = kernel.scaled_weight_gradients(grad, weight, gain, u, v, found, transposed)
    assert for_weight.dtype == dtype
    assert_close(for_weight, joined(of_weight, weight.shape, transposed), relative if dtype == used else 2e-6)
    scale = np.array([np.linalg.norm(slope) * np.linalg.norm(m) / abs(s) for (m, slope, *_), s in zip(vectors, sigmas)])
    assert (np.abs(exact(for_gain) - of_gain) <= 1e-6 * scale).all()


def test_a_worked_example(device: str) -> None:
    # sigma = u^T W v = 4; W_hat = W / 2; <G, W> = 12, so dgain = 3 and dW = (G - 3 u v^T) / 2
    weight, gain = torch.tensor([[4.0, 1.0], [0.0, 3.0]], device=device), torch.tensor([2.0], device=device)
    u = v = torch.tensor([[1.0, 0.0]], device=device)
    scaled, sigmas = kernel.scaled_weight(weight, gain, u, v, False, torch.float32)
    assert scaled.tolist() == [[2.0, 0.5], [0.0, 1.5]]
    assert sigmas.tolist() == [4.0]
    grad = torch.tensor([[2.0, 4.0], [5.0, 0.0]], device=device)
    for_weight, for_gain = kernel.scaled_weight_gradients(grad, weight, gain, u, v, sigmas, False)
    assert for_gain.tolist() == [3.0]
    assert for_weight.tolist() == [[-0.5, 2.0], [2.5, 0.0]]


@pytest.mark.parametrize("layout", ["linear", "qkv", "conv1d_qkv", "conv2d"])
def test_autograd_is_that_of_the_torch_code(layout: str, device: str) -> None:
    weight, gain, u, v, transposed = operands(layout, torch.float32, device)
    grad = torch.randn(weight.shape[::-1], device=device).permute(*reversed(range(weight.dim())))  # not contiguous

    def run() -> list[Tensor]:
        leaves = [weight.clone().requires_grad_(), gain.clone().requires_grad_()]
        result = spectral_reparam(*leaves, u, v, transposed)
        return [result.detach(), *torch.autograd.grad(result, leaves, grad)]

    with kernels.disabled():
        wanted = run()
    for actual, expected in zip(run(), wanted):
        assert_close(actual, exact(expected), 3e-6)


# the interpreter cuts bfloat16 off instead of rounding
@pytest.mark.parametrize("used", [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16])
def test_the_cast_weight_is_the_cast_of_the_weight(used: torch.dtype, device: str) -> None:
    arguments = operands("linear", torch.float32, device)
    whole, cast = (spectral_reparam(*arguments, dtype) for dtype in (torch.float32, used))
    assert torch.equal(cast, whole.to(used))


@pytest.mark.parametrize("layout", ["linear", "conv1d_qkv"])
def test_many_tiles_a_program_and_the_same_bits_twice(
    layout: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_plans", {})
    monkeypatch.setattr(kernel, "TILE", 64)
    monkeypatch.setattr(kernel, "WIDEST", 16)
    monkeypatch.setattr(kernel, "PARTIALS", 3)
    weight, gain, u, v, transposed = operands(layout, torch.float32, device)
    sigmas = [a @ w @ b for w, a, b in zip(blocks(exact(weight), len(gain), transposed), exact(u), exact(v))]
    first, second = (kernel.scaled_weight(weight, gain, u, v, transposed, torch.float32) for _ in range(2))
    assert_close(first[1], np.array(sigmas), 2e-6)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    grad = torch.randn_like(weight)
    first, second = (kernel.scaled_weight_gradients(grad, weight, gain, u, v, first[1], transposed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_an_empty_weight(device: str) -> None:
    weight, gain, u, v = (torch.ones(shape, device=device) for shape in ((5, 0), (1,), (1, 5), (1, 0)))
    scaled, sigmas = kernel.scaled_weight(weight, gain, u, v, False, torch.float32)
    assert (scaled.shape, sigmas.tolist()) == ((5, 0), [0.0])
    for_weight, _ = kernel.scaled_weight_gradients(weight, weight, gain, u, v, sigmas, False)
    assert for_weight.shape == (5, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weight: weight.double(), "because the weight is torch.float64"),
        (lambda weight: weight.to(memory_format=torch.channels_last), "because the weight is not contiguous"),
    ],
    ids=["float64", "channels_last"],
)
def test_what_the_kernel_cannot_do_is_said_once_and_computed(
    change: Any, reason: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_warned", set())
    weight, gain, u, v, _ = operands("conv2d", torch.float32, device)
    with pytest.warns(UserWarning, match=reason):
        result = spectral_reparam(change(weight), gain, u, v)
    sigma = exact(u)[0] @ exact(weight).reshape(6, -1) @ exact(v)[0]
    assert_close(result, exact(gain)[0] / sigma * exact(weight), 2e-6)
    spectral_reparam(change(weight), gain, u, v)  # a second warning would fail


# --- power iteration -------------------------------------------------------------------------------------------------


def matrices(device: str) -> list[Tensor]:
    shapes = [(37, 20), (1, 5), (5, 1), (3, 300), (140, 7), (4, 12), (16, 48)]
    single = [torch.randn(shape, device=device) for shape in shapes]
    return [*single, *torch.randn(9, 24, device=device).chunk(3, 1), torch.randn(8, 16, device=device).bfloat16()]


def iterated(matrix: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u = matrix @ v
    w = matrix.T @ u
    return u / np.linalg.norm(u), w / np.linalg.norm(w)


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_power_iteration_equals_numpy(scale: float, device: str) -> None:
    group = [matrix * scale for matrix in matrices(device)]
    v = [nn.functional.normalize(torch.randn(matrix.shape[1], device=device), dim=0) for matrix in group]
    u = [torch.full((len(matrix),), torch.nan, device=device) for matrix in group]
    wanted = [iterated(exact(matrix), exact(vector)) for matrix, vector in zip(group, v)]
    iteration = module.PowerIteration(group, u, v)
    iteration.step()
    for (left, right), a, b in zip(wanted, u, v):
        assert_close(a, left, 1e-6)
        assert_close(b, right, 1e-6)
    wanted = [iterated(exact(matrix), exact(vector)) for matrix, vector in zip(group, v)]
    iteration.step()
    for (left, right), a, b in zip(wanted, u, v):
        assert_close(a, left, 1e-6)
        assert_close(b, right, 1e-6)


def test_power_iteration_of_a_zero_matrix_is_zero(device: str) -> None:
    u, v = torch.ones(3, device=device), torch.ones(4, device=device)
    module.PowerIteration([torch.zeros(3, 4, device=device)], [u], [v]).step()
    assert (u.tolist(), v.tolist()) == ([0.0] * 3, [0.0] * 4)


def test_rows_of_two_processes_give_the_vectors_of_the_whole(device: str) -> None:
    whole = [torch.randn(shape, device=device) for shape in ((9, 5), (1, 6), (20, 33))]
    v = [torch.rand(matrix.shape[1], device=device) for matrix in whole]
    cuts = [-(-len(matrix) // 2) for matrix in whole]
    other: list[Tensor] = []
    processes = []
    for process, reduce in enumerate((lambda flat: flat.add_(other.pop()), lambda flat: other.append(flat.clone()))):
        own = [matrix.split([cut, len(matrix) - cut])[process] for matrix, cut in zip(whole, cuts)]
        left, right = [torch.full((len(matrix),), torch.nan, device=device) for matrix in whole], [b.clone() for b in v]
        iteration = module.PowerIteration(own, left, right, starts=[process * cut for cut in cuts], reduce=reduce)
        processes.append((iteration, left, right))
    for _ in range(2):
        wanted = [iterated(exact(matrix), exact(vector)) for matrix, vector in zip(whole, processes[0][2])]
        for iteration, _, _ in reversed(processes):  # the second process leaves its share for the first
            iteration.step()
        for found, vectors in zip(processes[0][1:], zip(*wanted)):
            for actual, expected in zip(found, vectors):
                assert_close(actual, expected, 1e-6)
        for mine, theirs in zip(processes[0][2], processes[1][2]):
            theirs.copy_(mine)


def test_power_iteration_goes_on_in_torch_when_its_kernel_fails(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_warned", set())
    matrix, v = torch.randn(6, 4, device=device), torch.rand(4, device=device)
    u, wanted = torch.zeros(6, device=device), iterated(exact(matrix), exact(v))
    iteration = module.PowerIteration([matrix], [u], [v])

    def launch(*_: torch.Tensor) -> None:
        raise TypeError("no such kernel")

    monkeypatch.setattr(kernel.Launch, "__call__", launch)
    with pytest.warns(UserWarning, match="power iteration in plain torch.* its kernel failed with TypeError"):
        iteration.step()
    assert_close(u, wanted[0], 1e-6)
    assert_close(v, wanted[1], 1e-6)


def test_double_vectors_are_iterated_in_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_warned", set())
    matrix, v = torch.randn(6, 4, device=device).double(), torch.rand(4, device=device).double()
    u, wanted = torch.zeros_like(matrix[:, 0]), iterated(exact(matrix), exact(v))
    with pytest.warns(UserWarning, match="because a weight is torch.float64 and its singular vectors torch.float64"):
        module.PowerIteration([matrix], [u], [v]).step()
    assert_close(u, wanted[0], 1e-14)


# --- in a model ------------------------------------------------------------------------------------------------------


def test_training_is_that_of_the_torch_code(device: str) -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.ModuleDict({"qkv": nn.Linear(24, 72)})["qkv"])
        apply_sigma_reparam(model.to(device))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.randn(3, 2, 4, 4, device=device)) - 1).square().mean().backward()
            optimizer.step()
            update_sigma_reparam(model)
        return [*model.parameters(), *model.buffers()]

    with kernels.disabled():
        wanted = train()
    for actual, expected in zip(train(), wanted):
        assert_close(actual, exact(expected), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("used", [torch.bfloat16, torch.float16])
def test_autocast_sees_the_weight_it_would_have_cast_to(used: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Linear(64, 48), nn.Conv1d(48, 6, 3), nn.Embedding(5, 7), nn.Linear(7, 5, bias=False)
    ).cuda()
    model[3].weight = model[2].weight
    apply_sigma_reparam(model, targets=["0", "1", "3"])
    for layer in (model[0], model[1]):
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(1.7)
            layer.parametrizations.weight[0].gain.mul_(1.3)
        whole = layer.weight
        with torch.autocast("cuda", dtype=used):
            assert torch.equal(layer.weight, whole.to(used))
            assert layer.weight.dtype == used
            folded = model.state_dict()
            assert model[3].weight.dtype == torch.float32  # the embedding would not cast it
        assert folded["0.weight"].dtype == torch.float32
    x = torch.randn(5, 64, device="cuda")
    with torch.autocast("cuda", dtype=used):
        result = model[0](x)
        assert torch.equal(result, nn.functional.linear(x, whole_of(model[0]), model[0].bias))
    slopes = []
    for run in (lambda: model[0](x), lambda: nn.functional.linear(x, whole_of(model[0]), model[0].bias)):
        with torch.autocast("cuda", dtype=used):
            loss = run().float().square().sum()
        slopes.append(torch.autograd.grad(loss, model[0].parametrizations.weight.original)[0])
    assert_close(slopes[0], exact(slopes[1]), 1e-6)


def whole_of(layer: Any) -> Tensor:
    """The weight in use without autocast."""
    with torch.autocast("cuda", enabled=False):
        return layer.weight


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_without_graph_breaks(autocast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).cuda()
    apply_sigma_reparam(model)
    x, results = torch.randn(32, 64, device="cuda"), []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            call(x).float().square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for compiled, eager in zip(results[1], results[0]):
        assert_close(compiled, exact(eager), 0.02 if autocast else 1e-3)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_two_to_the_31_elements() -> None:
    shape, chosen = (3, 70_000, 10_300), (2, 69_999)
    weight = torch.empty(shape[0] * shape[1], shape[2], device="cuda", dtype=torch.bfloat16).normal_()
    assert weight.numel() > 2**31
    u, v = (nn.functional.normalize(torch.randn(3, size, device="cuda"), dim=1) for size in shape[1:])
    gain = torch.tensor([1.0, 2.0, 3.0], device="cuda")
    scaled, sigmas = kernel.scaled_weight(weight, gain, u, v, False, torch.bfloat16)
    for part, rows in enumerate(weight.chunk(3)):
        y = torch.cat(
            [rows[start : start + 10_000].double() @ v[part].double() for start in range(0, shape[1], 10_000)]
        )
        assert sigmas[part].item() == pytest.approx((u[part].double() @ y).item(), rel=1e-4)
    row = chosen[0] * shape[1] + chosen[1]
    assert torch.equal(scaled[row], (weight[row].float() * (gain[2] / sigmas[2])).bfloat16())
    for_weight, for_gain = kernel.scaled_weight_gradients(scaled, weight, gain, u, v, sigmas, False)
    wanted = gain[2] / sigmas[2] * (scaled[row].float() - for_gain[2] * u[2, chosen[1]] * v[2])
    assert_close(for_weight[row], exact(wanted), 2**-8)
