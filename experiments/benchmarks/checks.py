"""What an arm must compute before it is timed: compared on a small copy of the model, in float32 and in bf16.

The expected gradients are those of the usual way; under sigma-Reparam those of its formula by singular value
decomposition, ``G - <G, W> / sigma * u v^T``; of a sample of queries those of all, to the error of the mean; under a
monitor those of no callback. QK-clip must leave the logits it promises.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from experiments.benchmarks import usual
from experiments.benchmarks.arms import ARMS, NONE, Addition, Arm, Regularized, Usual
from experiments.benchmarks.harness import Variant, full_precision, gradients, quiet
from experiments.benchmarks.tasks import Task
from experiments.benchmarks.training import Fit, Training, attach_of, new_model, release
from lightning_reg.callbacks import QKClip

Gradients = dict[str, Tensor]

WEIGHT = 100.0  # on the weights of penalties, so that their gradients are not lost beside the loss's
TOLERANCE = 1e-4  # of the largest gradient, in float32: the usual entropy carries an epsilon inside its log
HALF_FACTOR, HALF_FLOOR = 1.5, 0.01  # on the error that bf16 makes of the usual way, relative to the norm
DRAWS = 24  # samples of queries, whose mean is compared
SAMPLE_SIGMAS = 3.0


@dataclass(frozen=True)
class Errors:
    """How far an arm is from what is expected; NaN where there is nothing to compare.

    Args:
        single: Largest difference in float32, relative to the largest gradient (weight, logit).
        half: Difference of bf16 to the expected float32 gradients, relative in norm; compiled, to those of eager code.
        usual: The same of the usual way.
    """

    single: float = float("nan")
    half: float = float("nan")
    usual: float = float("nan")


@cache
def check(task: Task, arm: Arm, device: torch.device) -> Errors:
    """Compare an arm with what it must compute.

    Raises:
        RuntimeError: If it computes something else, or leaves the gradients as they are.
    """
    if arm.expected is None:
        return Errors()
    small = task.small()
    try:
        with quiet(), full_precision():
            if arm.expected == "plain":
                errors = _check_monitor(small, arm)
            elif arm.expected == "clip":
                errors = Errors(_clip_error(replace(small, layers=1), device))  # of a second, inputs would change
            elif arm.expected == "sample":
                errors = _check_sample(small, arm, device)
            else:
                errors = _check_gradients(small, arm, device)
    finally:
        release(device)
    if not errors.single <= TOLERANCE:
        raise RuntimeError(f"{arm.name}: differs by {errors.single:.1e} of the largest; its cost means nothing.")
    if not (errors.half <= HALF_FACTOR * errors.usual + HALF_FLOOR or errors.half != errors.half):
        raise RuntimeError(
            f"{arm.name}: gradients in bf16 are off by {errors.half:.1e}, those of the usual way by {errors.usual:.1e}."
        )
    return errors


def _check_gradients(task: Task, arm: Arm, device: torch.device) -> Errors:
    expected = _expected(task, arm, device, bf16=False)
    ours = _gradients(task, attach_of(arm), device)
    single = distance(ours, expected)
    plain = _gradients(task, Addition, device)
    if distance(plain, expected) < 10 * TOLERANCE:
        raise RuntimeError(f"{arm.name}: the expected gradients are those of nothing, so the comparison shows nothing.")
    half = norm_distance(_gradients(task, attach_of(arm), device, bf16=True), expected)
    return Errors(single, half, norm_distance(_expected(task, arm, device, bf16=True), expected))


def _expected(task: Task, arm: Arm, device: torch.device, bf16: bool) -> Gradients:
    found = _gradients(task, lambda model, weight: Usual(model, weight, arm.parts), device, bf16=bf16)
    return reparametrized(found, new_model(task, device, sharp=True)) if arm.expected == "decomposition" else found


def check_compiled(training: Training, arm: Arm, errors: Errors) -> float:
    """Relative norm of the difference between the gradients of a compiled training and of the same in eager code.

    The compiled one takes the sharpened weights of the other for the comparison; its own are put back.

    Raises:
        RuntimeError: If they differ by more than bf16 explains.
    """
    if arm.expected not in ("usual", "decomposition"):
        return float("nan")
    eager = Training(training.task, attach_of(arm), training.device, weight=WEIGHT, sharp=True)
    before = [tensor.detach().clone() for tensor in training.tensors()]
    training.take(eager.tensors())
    training.addition.scale(WEIGHT)
    error = norm_distance(training.gradients(), eager.gradients())
    training.addition.scale(1 / WEIGHT)
    training.take(before)
    eager.close()
    if not error <= HALF_FACTOR * errors.usual + HALF_FLOOR:
        raise RuntimeError(
            f"{arm.name}: compiled, its gradients differ by {error:.1e} from those of eager code, where bf16 explains "
            f"{errors.usual:.1e}."
        )
    return error


def _gradients(
    task: Task, attach: Callable[[nn.Module, float], Addition], device: torch.device, *, bf16: bool = False
) -> Gradients:
    training = Training(task, attach, device, weight=WEIGHT, bf16=bf16, sharp=True)
    found = training.gradients()
    training.close()
    return found


def reparametrized(plain: Gradients, model: nn.Module) -> Gradients:
    """Gradients under sigma-Reparam from plain ones, by decomposition; a gain for each part of a fused projection."""
    expected = dict(plain)
    for name, module in usual.matrices(model).items():
        key = f"{name}.weight"
        axis = -1 if type(module).__name__ == "Conv1D" else 0  # of the outputs
        parts = 3 if name.endswith(("qkv", "c_attn")) else 1
        weight = module.weight.detach()  # type: ignore[operator, union-attr]
        pairs = zip(plain[key].chunk(parts, axis), weight.chunk(parts, axis), strict=True)
        expected[key] = torch.cat([_without_scale(*pair) for pair in pairs], axis)
    return expected


def _without_scale(gradient: Tensor, weight: Tensor) -> Tensor:
    flat = weight.flatten(1).double()
    u, sigma, v = torch.linalg.svd(flat, full_matrices=False)
    along = (gradient.flatten(1).double() * flat).sum() / sigma[0]
    return (gradient - (along * torch.outer(u[:, 0], v[0])).view_as(weight)).to(gradient.dtype)


def _check_sample(task: Task, arm: Arm, device: torch.device) -> Errors:
    """The mean over samples must be the whole: an error within what their spread allows, in units of the whole."""
    plain = _gradients(task, Addition, device)
    whole = _gradients(task, attach_of(ARMS["entropy"]), device)
    training = Training(
        task, attach_of(arm), device, weight=WEIGHT, bf16=False, sharp=True, optimizer=torch.optim.SGD, lr=0.0
    )
    total = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    squares = 0.0
    for _ in range(DRAWS):
        found = training.gradients()
        squares += sum(float((found[name] - whole[name]).square().sum()) for name in whole)
        for name, gradient in found.items():
            total[name] += gradient / DRAWS
        training.warm_up(1)  # the next step has the next sample
        training.steps = 0  # of the same batch
    training.close()
    off = sum(float((total[name] - whole[name]).square().sum()) for name in whole) ** 0.5
    penalty = sum(float((plain[name] - whole[name]).square().sum()) for name in whole) ** 0.5
    allowed = SAMPLE_SIGMAS * squares**0.5 / DRAWS
    if off > allowed + TOLERANCE * penalty or off > 0.5 * penalty:
        raise RuntimeError(
            f"{arm.name}: the mean of {DRAWS} samples is off by {off / penalty:.1e} of the whole, of which their "
            f"spread explains {allowed / penalty:.1e}."
        )
    return Errors(single=0.0)


def _clip_error(task: Task, device: torch.device) -> float:
    """Largest relative distance of the logits after a clip to what it promises: heads that share keys shrink alike."""
    model = new_model(task, device, sharp=True)
    batch = task.batches(device)[0]
    before = _largest_logits(task, model, batch)
    threshold = float(before.median())
    addition = Regularized(model, [QKClip(threshold=threshold)])
    task.loss(model, batch).backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    addition.close()
    after = _largest_logits(task, model, batch)
    shared = before.unflatten(-1, (task.key_heads or task.heads, -1)).amax(-1, keepdim=True)
    promised = before * (threshold / shared).clamp(max=1).expand(*shared.shape[:-1], task.groups).flatten(-2)
    return float(((after - promised) / before).abs().max())


def _largest_logits(task: Task, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """(layers, heads)."""
    clip = usual.Clip(model, float("inf"))
    with clip.watching(), torch.no_grad():
        task.loss(model, batch)
    return torch.stack(clip.largest)


def _check_monitor(task: Task, arm: Arm) -> Errors:
    batches = task.batches(torch.device("cpu"))
    model = partial(Fit, task)
    plain = gradients(Variant(NONE, model), batches)
    return Errors(distance(gradients(Variant(arm.name, model, arm.callbacks), batches), plain))


def distance(ours: Gradients, expected: Gradients) -> float:
    """Largest difference of two sets of gradients in units of the largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((ours[name] - gradient).abs().max()) for name, gradient in expected.items()) / largest


def norm_distance(ours: Gradients, expected: Gradients) -> float:
    """Norm of the difference of two sets of gradients, relative to that of the expected."""
    difference = sum(float((ours[name] - gradient).double().square().sum()) for name, gradient in expected.items())
    return (difference / sum(float(gradient.double().square().sum()) for gradient in expected.values())) ** 0.5
