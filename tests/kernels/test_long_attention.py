"""The kernels against float64, over shapes, masks and layouts; upstream gradients are random, fresh memory is NaN."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from lightning_reg.kernels import Unsupported, long_attention


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is to fill holds NaN."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *size, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def visible(query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Which keys each query sees, (B, H, M, N)."""
    position = options["offset"] + options["step"] * torch.arange(query.shape[2], device=query.device)[:, None]
    distance = position - torch.arange(key.shape[2], device=query.device)
    shown = torch.ones_like(distance, dtype=torch.bool)
    if options["is_causal"]:
        shown &= distance >= 0
    if options["window"] is not None:
        shown &= distance < options["window"]
        if not options["is_causal"]:
            shown &= -distance < options["window"]
    shown = shown.expand(*query.shape[:3], key.shape[2])
    shown = shown if bias is None else shown & (bias > -5e3)
    return shown if mask is None else shown & mask


def reference(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Output, entropy, log-sum-exp and largest magnitude in the dtype of ``query``, from the whole matrix."""
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).mT * options["scale"]
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    shown = visible(query, key, bias, mask, options)
    seen = shown.any(-1)
    lse = scores.masked_fill(~shown, -math.inf).logsumexp(-1).masked_fill(~seen, 0.0)
    log_probs = torch.where(shown, scores, 0.0) - lse[..., None]
    probs = torch.where(shown, log_probs.exp(), 0.0)
    entropy = -(probs * torch.where(shown, log_probs, 0.0)).sum(-1)
    output = None if value is None else probs @ value.repeat_interleave(repeats, 1)
    largest = torch.zeros_like(lse)
    if key.shape[2]:
        largest = scores.masked_fill(~shown, 0.0).abs().amax(-1)
    return output, entropy, lse, largest


def settings(query: Tensor, **options: Any) -> dict[str, Any]:
    found = dict(scale=query.shape[-1] ** -0.5, is_causal=False, window=None, offset=0, step=1) | options
    assert len(found) == 5
    return found


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels give: output, entropy, log-sum-exp and largest magnitude; gradients of query, key and value."""
    chosen = tuple(settings(query, **options).values())
    results = long_attention.forward(query, key, value, bias, mask, *chosen, True)
    *gradients, none = long_attention.backward(
        grad_output, grad_entropy, query, key, value, bias, mask, *results[:3], *chosen, True, False
    )
    assert none.shape == (0,)
    return list(results), gradients


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    grad_entropy: Tensor | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """The same in float64."""
    inputs = [None if t is None else t.detach().double().requires_grad_() for t in (query, key, value)]
    output, entropy, lse, largest = reference(*inputs, bias, mask, settings(query, **options))  # type: ignore[arg-type]
    loss = entropy.sum() * 0
    if output is not None and grad_output is not None:
        loss = loss + (output * grad_output.double()).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy.double()).sum()
    needed = [t for t in inputs if t is not None]
    gradients = torch.autograd.grad(loss, needed, allow_unused=True, materialize_grads=True)
    output = query.new_zeros(0) if output is None else output
    empty = [] if value is not None else [query.new_zeros(0)]
    return [t.detach() for t in (output, entropy, lse, largest)], [*gradients, *empty]


def check(
    actual: tuple[list[Tensor], list[Tensor]], wanted: tuple[list[Tensor], list[Tensor]], tolerance: float
) -> None:
    names = "output", "entropy", "lse", "largest", "grad_query", "grad_key", "grad_value"
    for name, found, right in zip(names, [*actual[0], *actual[1]], [*wanted[0], *wanted[1]], strict=True):
        assert found.shape == right.shape, name
        atol = 1e-5 if name == "entropy" else tolerance  # entropy is taken from float32 sums whatever the inputs are
        torch.testing.assert_close(
            found.double(), right.double(), atol=atol, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def tensors(
    device: str,
    batch: int = 1,
    heads: int = 2,
    groups: int = 2,
    rows: int = 70,
    keys: int = 75,
    dim: int = 16,
    columns: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query, key, value and upstream gradients of output and entropy."""
    shapes = (heads, rows, dim), (groups, keys, dim), (groups, keys, columns), (heads, rows, columns)
    made = [torch.randn(batch, *shape, device=device).mul_(1.7).to(dtype) for shape in shapes]
    return [*made, torch.randn(batch, heads, rows, device=device).mul_(0.7)]


SHAPES = {
    "odd": dict(rows=37, keys=53),
    "several blocks": dict(rows=150, keys=140),
    "shared keys": dict(batch=2, heads=4, groups=2),
    "one key head": dict(heads=3, groups=1),
    "one key": dict(rows=5, keys=1),
    "one query": dict(rows=1, keys=90),
    "wide values": dict(dim=16, columns=40),
    "dim 20": dict(dim=20, columns=20),
    "dim 80": dict(dim=80, columns=72, rows=40, keys=40),
    "dim 7": dict(dim=7, columns=5),
    "dim 256": dict(dim=256, columns=256, heads=1, groups=1, rows=20, keys=40),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_float64(shape: str, is_causal: bool, device: str) -> None:
    given = tensors(device, **SHAPES[shape])  # type: ignore[arg-type]
    actual = run(*given, is_causal=is_causal)
    check(actual, expected(*given, is_causal=is_causal), 3e-5)


POSITIONS = {
    "window": dict(is_causal=True, window=9),
    "window of one": dict(is_causal=True, window=1),
    "wide window": dict(is_causal=True, window=66),
    "window on both sides": dict(window=9),
    "wide window on both sides": dict(window=70),
    "no window at all": dict(window=0),
    "cache": dict(is_causal=True, offset=61),
    "cache with a window": dict(is_causal=True, offset=61, window=23),
    "before the first key": dict(is_causal=True, offset=-20),
    "after the last key": dict(is_causal=True, offset=100, window=40),
    "sampled": dict(is_causal=True, offset=2, step=3),
    "sampled with a window": dict(is_causal=True, offset=2, step=3, window=11),
    "sampled with a window on both sides": dict(offset=-5, step=4, window=11),
    "sharp": dict(is_causal=True, scale=0.8),
}


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_decide_what_is_seen(position: str, device: str) -> None:
    options: dict[str, Any] = POSITIONS[position]
    given = tensors(device, heads=2, groups=1, rows=70, keys=150)
    check(run(*given, **options), expected(*given, **options), 5e-5)


TABLES = {"full": (2, 2, 70, 75), "keys": (2, 1, 1, 75), "queries": (1, 2, 70, 1), "shared": (1, 1, 70, 75)}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["mask", "bias", "both"])
@pytest.mark.parametrize("table", TABLES)
def test_masks_and_biases_of_every_broadcast_shape(table: str, kind: str, is_causal: bool, device: str) -> None:
    given = tensors(device, batch=2)
    mask = bias = None
    if kind != "bias":
        mask = torch.rand(TABLES[table], device=device) > 0.4
    if kind != "mask":
        bias = torch.randn(TABLES[table], device=device)
        bias = bias.masked_fill(torch.rand(TABLES[table], device=device) > 0.8, -1e9).to(torch.bfloat16)
    options = dict(bias=bias, mask=mask, is_causal=is_causal)
    check(run(*given, **options), expected(*given, **options), 5e-5)


@pytest.mark.parametrize("hiding", [-math.inf, torch.finfo(torch.float32).min, -1e4, -5e3])
def test_every_usual_fill_of_a_bias_hides(hiding: float, device: str) -> None:
    given = tensors(device, rows=20, keys=20)
    shown = torch.rand(1, 1, 20, 20, device=device) > 0.5
    bias = torch.zeros(1, 1, 20, 20, device=device).masked_fill(~shown, hiding)
    check(run(*given, bias=bias), expected(*given, mask=shown), 1e-5)


def test_sizes_are_given_only_when_asked_for(device: str) -> None:
    query, key, value, *_ = tensors(device, rows=33, keys=40)
    chosen = settings(query, is_causal=True).values()
    *asked, largest = long_attention.forward(query, key, value, None, None, *chosen, True)
    *others, nothing = long_attention.forward(query, key, value, None, None, *chosen)
    assert nothing.shape == (0,)
    assert largest.shape == query.shape[:3]
    assert all(torch.equal(a, b) for a, b in zip(asked, others, strict=True))


def test_the_size_of_a_row_with_nan_is_nan(device: str) -> None:
    query, key, value, *_ = tensors(device, rows=20, keys=40)
    key[0, 0, 17] = math.nan
    *_, largest = long_attention.forward(query, key, value, None, None, *settings(query).values(), True)
    assert largest[0, 0].isnan().all()
    assert largest[1:].isfinite().all()


def test_rows_that_see_nothing_are_zero(device: str) -> None:
    given = tensors(device, rows=33, keys=40)
    mask = torch.rand(1, 1, 33, 40, device=device) > 0.5
    mask[:, :, ::4] = False
    (output, entropy, lse, largest), gradients = run(*given, mask=mask)
    for found in (output, entropy, lse, largest, gradients[0]):
        assert (found[:, :, ::4] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("sizes", [dict(batch=0), dict(rows=0), dict(keys=0)], ids=str)
def test_nothing_in_is_nothing_out(sizes: dict[str, int], device: str) -> None:
    given = tensors(device, **sizes)  # type: ignore[arg-type]
    check(run(*given), expected(*given), 0.0)


@pytest.mark.parametrize("used", ["entropy", "output", "neither"])
def test_an_output_that_nobody_used_has_no_gradient(used: str, device: str) -> None:
    *given, grad_output, grad_entropy = tensors(device)
    given += [grad_output if used == "output" else None, grad_entropy if used == "entropy" else None]
    check(run(*given, is_causal=True), expected(*given, is_causal=True), 1e-5)


def test_entropy_alone_is_that_of_the_attention(device: str) -> None:
    query, key, value, _, grad_entropy = tensors(device, heads=4)
    given = query, key, None, None, grad_entropy
    actual = run(*given, is_causal=True, window=30)
    check(actual, expected(*given, is_causal=True, window=30), 1e-5)
    with_output, _ = run(query, key, value, None, grad_entropy, is_causal=True, window=30)
    for alone, beside in zip(actual[0][1:], with_output[1:]):
        assert torch.equal(alone, beside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 128])
def test_half_precision_is_as_exact_as_torch(dim: int, dtype: torch.dtype, device: str) -> None:
    given = tensors(device, heads=1, groups=1, rows=140, keys=140, dim=dim, columns=dim, dtype=dtype)
    *inputs, grad_output, _ = given
    actual = run(*given, is_causal=True)
    check(actual, expected(*given, is_causal=True), 0.2 if dtype == torch.bfloat16 else 0.01)

    (output, *_), gradients = run(*inputs, grad_output, None, is_causal=True)
    wanted, right = expected(*inputs, grad_output, None, is_causal=True)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    torch_output = F.scaled_dot_product_attention(*leaves, is_causal=True)
    torch_gradients = torch.autograd.grad(torch_output, leaves, grad_output)
    # Triton's interpreter cuts float32 to bfloat16 where the GPU rounds
    limit = 3.0 if device == "cpu" and dtype == torch.bfloat16 else 1.5
    for ours, theirs, exact in zip([output, *gradients], [torch_output, *torch_gradients], [wanted[0], *right]):
        assert (ours - exact).norm() <= limit * (theirs - exact).norm()


def test_entropy_is_exact_where_scores_are_large(device: str) -> None:
    given = tensors(device, rows=40, keys=60)
    bias = torch.full((1, 1, 1, 60), 1e3, device=device)  # log-sum-exp 1000: a difference of it has lost five digits
    (_, entropy, *_), _ = run(*given, bias=bias)
    wanted, _ = expected(*given)
    torch.testing.assert_close(entropy.double(), wanted[1], atol=2e-4, rtol=0.0)
    (_, entropy, _, _), _ = run(torch.zeros_like(given[0]), *given[1:], bias=bias)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(60)), atol=1e-6, rtol=0.0)


def test_one_certain_key_has_entropy_zero(device: str) -> None:
    query = torch.full((1, 1, 3, 16), 30.0, device=device)
    key = torch.zeros(1, 1, 40, 16, device=device)
    key[:, :, 7] = 30.0
    (_, entropy, _, largest), gradients = run(query, key, None, None, torch.ones(1, 1, 3, device=device))
    # a GPU scales and subtracts the maximum in one operation, rounded once; log-sum-exp 3600 is rounded by 1e-4
    exact = device == "cpu"
    assert entropy.abs().max() <= (0 if exact else 1e-6)
    torch.testing.assert_close(largest, torch.full_like(largest, 3600.0))
    assert all(gradient.abs().max() <= (0 if exact else 1e-2) for gradient in gradients if gradient.numel())


def test_nan_stays_nan(device: str) -> None:
    query, key, value, *_ = tensors(device)
    query[0, 1, 5, 3] = math.nan
    output, entropy, *_ = long_attention.forward(query, key, value, None, None, 0.25, True, None, 0, 1)
    assert output[0, 1, 5].isnan().all()
    assert entropy[0, 1, 5].isnan()
    assert output.isnan().sum() == output.shape[-1]
    assert entropy.isnan().sum() == 1


def _tokens_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


LAYOUTS = {
    "tokens first": _tokens_first,
    "every other row": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "part of wider rows": lambda t: torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]],
    "unaligned": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "columns first": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_numbers(layout: str, device: str) -> None:
    given = [LAYOUTS[layout](tensor) for tensor in tensors(device, batch=2)[:4]]
    given.append(torch.randn(70, 2, 2, device=device).permute(2, 1, 0))
    options = dict(is_causal=True, window=40)
    actual = run(*given, **options)
    plain = run(*(tensor.contiguous() for tensor in given), **options)
    check(actual, ([*plain[0]], [*plain[1]]), 1e-6)


def test_heads_of_results_lie_together(device: str) -> None:
    given = tensors(device, batch=2)
    (output, *rest), gradients = run(*given)
    assert all(found.transpose(1, 2).is_contiguous() for found in (output, *gradients))
    assert all(found.is_contiguous() for found in rest)


@pytest.mark.parametrize("axis", ["batch", "rows"])
@pytest.mark.parametrize("layout", ["described", "by pointer"])
def test_offsets_beyond_two_to_the_31(layout: str, axis: str, device: str) -> None:
    far = (2**31 if axis == "batch" else 2**27) + (64 if layout == "described" else 65)
    strides = (far, 320, 16, 1) if axis == "batch" else (320, 320, far, 1)
    extent = far * (1 if axis == "batch" else 19) + 4096
    held = torch.empty(extent, dtype=torch.float16, device=device)  # pages that nobody touches take no memory
    views = [held.as_strided((2, 1, 20, 16), strides, start) for start in (0, 640, 1280, 1920)]
    for view in views:
        view.copy_(torch.randn(view.shape))
    grad_entropy = torch.randn(2, 1, 20, device=device)
    check(run(*views, grad_entropy), expected(*views, grad_entropy), 4e-3)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
def test_more_than_two_to_the_31_elements() -> None:
    rows = 2**25 + 70
    query, key = (torch.randn(1, 1, rows, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    grad_entropy = torch.ones(1, 1, rows, device="cuda")
    whole = run(query, key, None, None, grad_entropy, is_causal=True, window=64)
    last = [tensor[:, :, -256:] for tensor in (query, key)]
    part = expected(*last, None, None, grad_entropy[:, :, -256:], is_causal=True, window=64)
    for found, right in ((whole[0][1], part[0][1]), *zip(whole[1][:2], part[1][:2])):
        torch.testing.assert_close(found[:, :, -128:].double(), right[:, :, -128:], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("with_value", [False, True])
def test_gradients_repeat_bit_for_bit(with_value: bool, device: str) -> None:
    query, key, value, grad_output, grad_entropy = tensors(device, rows=100, keys=100)
    given = (query, key, value, grad_output) if with_value else (query, key, None, None)
    first, second = (run(*given, grad_entropy, is_causal=True)[1] for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second))


REASONS = {
    "float64": ("float64", lambda q, k, v: (q.double(), k.double(), v.double(), None, None)),
    "two dtypes": ("one dtype", lambda q, k, v: (q, k.half(), v, None, None)),
    "wide": ("1 to 256", lambda q, k, v: (q, k, v.new_zeros(1, 2, 75, 257), None, None)),
    "heads": ("2 among 3", lambda q, k, v: (q.new_zeros(1, 3, 70, 16), k, v, None, None)),
    "bias": ("bias", lambda q, k, v: (q, k, v, q.new_zeros(1, 1, 1, 75, dtype=torch.int64), None)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_unsupported_is_refused_in_words(reason: str, device: str) -> None:
    words, change = REASONS[reason]
    given = change(*tensors(device)[:3])
    assert words in str(long_attention.unsupported(*given))
    with pytest.raises(Unsupported, match=words):
        long_attention.forward(*given, 0.25, False, None, 0, 1)
    assert long_attention.unsupported(*tensors(device)[:3], None, None) is None


def test_scales_and_gradients_that_it_does_not_know_are_refused(device: str) -> None:
    query, key, value, grad_output, grad_entropy = tensors(device)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(Unsupported, match="positive scale"):
            run(query, key, value, grad_output, grad_entropy, scale=scale)
    chosen = tuple(settings(query).values())
    results = long_attention.forward(query, key, value, None, None, *chosen)
    with pytest.raises(Unsupported, match="bias"):
        long_attention.backward(
            grad_output, grad_entropy, query, key, value, None, None, *results[:3], *chosen, True, True
        )
