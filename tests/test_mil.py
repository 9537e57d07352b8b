"""Adapters read what frameworks return: against numpy in float64, and against what must be refused."""

import dataclasses
import math
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.mil import ADAPTERS, MilAdapter, MilReader, as_adapter, structure

MASKED = -1e9


def entropy(scores: np.ndarray) -> float:
    """Of softmax(scores), from the definition."""
    p = np.exp(scores - scores.max())
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


def slope(scores: np.ndarray) -> np.ndarray:
    """dH / dscores = -p (log p + H)."""
    p = np.exp(scores - scores.max())
    p /= p.sum()
    return -p * (np.log(p) - (p * np.log(p)).sum())


# scores (bags, branches, instances), valid (bags, instances) -> what the framework returns
OUTPUTS: dict[str, tuple[tuple[int, int, int], Callable[[Tensor, Tensor], Any]]] = {
    "clam": ((1, 3, 7), lambda s, v: (None, None, None, s[0], {})),
    "abmil": ((1, 2, 7), lambda s, v: (torch.rand(1, 1), torch.ones(1, 1), s[0].softmax(-1))),
    "dsmil": ((1, 3, 7), lambda s, v: (torch.rand(7, 3), torch.rand(1, 3), s[0].softmax(-1).T, torch.rand(1, 3, 6))),
    "dsmil_aem": ((1, 3, 7), lambda s, v: (torch.rand(7, 3), torch.rand(1, 3), s[0])),
    "acmil": ((1, 5, 7), lambda s, v: (torch.rand(5, 2), torch.rand(1, 2), s)),
    "aem_abmil": ((1, 1, 7), lambda s, v: (torch.rand(1, 2), s)),
    "aem_mha": ((1, 4, 7), lambda s, v: (torch.rand(1, 2), s[0].unsqueeze(1))),
    "torchmil": ((3, 1, 7), lambda s, v: (torch.rand(3), s[:, 0])),
    "trident": ((3, 4, 7), lambda s, v: (None, s.masked_fill(~v[:, None], MASKED).unflatten(1, (2, 2)))),
    "mil_lab": (
        (3, 2, 7),
        lambda s, v: ({}, {"attention": s + (1 - v[:, None].double()) * torch.finfo(torch.float64).min, "loss": 0.5}),
    ),
}
SIZES = [7, 4, 1]  # valid instances of three bags; the last has no choice


def case(name: str) -> tuple[Tensor, Tensor, Any]:
    """Scores with gradient, valid instances, output."""
    shape, build = OUTPUTS[name]
    scores = (2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    valid = torch.arange(shape[2]) < torch.tensor(SIZES[: shape[0]])[:, None]
    return scores, valid, build(scores, valid)


def test_every_published_layout_has_a_case() -> None:
    assert set(OUTPUTS) == set(ADAPTERS)


@pytest.mark.parametrize("normalize", [False, True], ids=["nats", "normalized"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_values_and_gradients_are_those_of_the_formula(name: str, normalize: bool) -> None:
    scores, valid, output = case(name)
    mask = valid if name == "torchmil" else None
    got = ADAPTERS[name].entropy(output, mask=mask, normalize=normalize)
    upstream = torch.randn(got.shape, dtype=torch.float64)
    (got * upstream).sum().backward()
    wanted, pull = np.zeros(got.shape), np.zeros(scores.shape)
    for bag in range(scores.shape[0]):
        count = int(valid[bag].sum())
        unit = (math.log(count) if count > 1 else math.inf) if normalize else 1.0
        for branch in range(scores.shape[1]):
            row = scores[bag, branch, :count].detach().numpy()
            wanted[bag, branch] = entropy(row) / unit
            pull[bag, branch, :count] = slope(row) / unit * upstream[bag, branch].item()
    np.testing.assert_allclose(got.detach().numpy(), wanted, atol=1e-12)
    np.testing.assert_allclose(scores.grad.numpy(), pull, atol=1e-12)


@pytest.mark.parametrize("name", OUTPUTS)
def test_order_of_instances_does_not_matter(name: str) -> None:
    scores, valid, output = case(name)
    order = torch.randperm(7)
    again = OUTPUTS[name][1](scores[..., order], valid[:, order])
    masks = (valid, valid[:, order]) if name == "torchmil" else (None, None)
    torch.testing.assert_close(
        ADAPTERS[name].entropy(again, mask=masks[1]), ADAPTERS[name].entropy(output, mask=masks[0])
    )


@pytest.mark.parametrize("kind", ["scores", "probs"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_ragged_bags_equal_padded_bags(kind: str, dtype: torch.dtype) -> None:
    bags = [torch.randn(2, n, dtype=torch.float64) for n in SIZES]
    padded = torch.stack([torch.cat([bag, torch.full((2, 7 - bag.shape[1]), 3.0)], -1) for bag in bags])
    valid = torch.arange(7) < torch.tensor(SIZES)[:, None]
    if kind == "probs":
        bags = [bag.softmax(-1) for bag in bags]
        padded = padded.masked_fill(~valid[:, None], -math.inf).softmax(-1)
    ragged = MilAdapter(kind=kind).entropy(bags, normalize=True)
    whole = MilAdapter(kind=kind, bag_axis=0).entropy(padded, mask=valid.to(dtype), normalize=True)
    torch.testing.assert_close(ragged, whole)
    assert ragged.shape == (3, 2)
    assert (ragged[2] == 0).all()


def test_padded_mask_of_ragged_bags_is_cut_to_each() -> None:
    bags = [torch.randn(5), torch.randn(3)]
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 0, 0]])
    got = MilAdapter(kind="scores").entropy(bags, mask=mask)
    kept = [bags[0][[0, 1, 3, 4]], bags[1][[0, 2]]]
    np.testing.assert_allclose(got[:, 0], [entropy(bag.double().numpy()) for bag in kept], atol=1e-6)


def test_mask_in_the_output_and_mask_of_the_batch_both_hide() -> None:
    scores = torch.randn(2, 4)
    output = {"scores": scores, "valid": torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 1]])}
    adapter = MilAdapter("scores", kind="scores", bag_axis=0, mask_path="valid", needs_mask=True)
    got = adapter.entropy(output, mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    kept = [scores[0, [1, 2]], scores[1, [0, 1, 3]]]
    np.testing.assert_allclose(got[:, 0], [entropy(row.double().numpy()) for row in kept], atol=1e-6)
    output["valid"] = [output["valid"][0], output["valid"][1]]
    output["scores"] = [scores[0], scores[1]]
    ragged = dataclasses.replace(adapter, bag_axis=None)
    torch.testing.assert_close(ragged.entropy(output, mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])), got)


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4], ids=str)
def test_hidden_bags_and_bags_of_one_are_0_with_gradient_0(fill: float) -> None:
    scores = torch.randn(3, 1, 4, requires_grad=True)
    valid = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    adapter = MilAdapter(kind="scores", bag_axis=0)
    for output, mask in ((scores.masked_fill(~valid[:, None], fill), None), (scores, valid)):
        got = adapter.entropy(output, mask=mask, normalize=True)
        (grad,) = torch.autograd.grad(got.sum(), scores)
        assert got[0, 0] > 0
        assert (got[1:] == 0).all()
        assert grad.isfinite().all()
        assert (grad[1:] == 0).all()
        assert (grad[0, 0, [0, 1, 3]] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["scores", "probs"])
def test_half_precision_is_computed_in_single(kind: str, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 300)
    given = (scores if kind == "scores" else scores.softmax(-1)).to(dtype)
    got = MilAdapter(kind=kind).entropy(given)
    assert got.dtype == torch.float32
    wanted = [entropy(row.double().numpy()) for row in scores]
    np.testing.assert_allclose(got[0], wanted, rtol=2e-2 if dtype == torch.bfloat16 else 3e-3)
    torch.testing.assert_close(MilAdapter().entropy(given), got)  # and so by itself


# --- branches, bags, top-k -------------------------------------------------------------------------------------------


def test_branches_are_averaged_as_entropies() -> None:
    probs = torch.tensor([[[0.999, 0.001], [0.001, 0.999]]])
    assert MilAdapter(kind="probs", bag_axis=0).entropy(probs).mean() < 0.01  # the mean weights are uniform: log 2


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((7,), {}),
        ((7, 1), {"instance_axis": 0}),
        ((7, 1), {"instance_axis": -2}),
        ((1, 1, 1, 7), {}),
        ((1, 7, 1), {"instance_axis": 1, "bag_axis": 0}),
        ((1, 7, 1), {"instance_axis": 1, "bag_axis": -1}),
        ((7, 1, 1, 1), {"instance_axis": 0, "bag_axis": 3}),
    ],
    ids=str,
)
def test_any_axis_can_hold_the_instances(shape: tuple[int, ...], axes: dict[str, int]) -> None:
    scores = torch.randn(7, dtype=torch.float64)
    got = MilAdapter(kind="scores", **axes).entropy(scores.view(shape))
    assert got.shape == (1, 1)
    assert got.item() == pytest.approx(entropy(scores.numpy()), abs=1e-12)


def test_bags_and_branches_keep_their_places() -> None:
    scores = torch.randn(5, 2, 3, dtype=torch.float64)  # instances, bags, branches
    got = MilAdapter(kind="scores", instance_axis=0, bag_axis=1).entropy(scores)
    wanted = [[entropy(scores[:, bag, branch].numpy()) for branch in range(3)] for bag in range(2)]
    np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("top_k", [2, 3, 50])
def test_top_k_of_weights_is_that_of_their_scores_and_the_public_formula(top_k: int) -> None:
    scores = torch.randn(1, 1, 9, dtype=torch.float64, requires_grad=True)
    values = scores.softmax(-1).topk(min(top_k, 9)).values
    values = values / values.sum(-1, keepdim=True)
    public = (values * values.log()).sum()
    wanted = torch.autograd.grad(public, scores)[0]
    for adapter, output in (
        (ADAPTERS["aem_abmil"], (None, scores)),
        (ADAPTERS["abmil"], (None, None, scores[0].softmax(-1))),
    ):
        got = -adapter.entropy(output, top_k=top_k)
        assert got.item() == pytest.approx(public.item(), abs=1e-12)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), scores)[0], wanted, atol=1e-12, rtol=0)


def test_softmax_of_a_hidden_bag_may_be_nan() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0], [math.nan] * 3], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    got = MilAdapter(kind="probs", bag_axis=0).entropy(probs, mask=mask, normalize=True)
    assert got.tolist() == [[1.0], [0.0]]
    assert torch.autograd.grad(got.sum(), probs)[0].isfinite().all()


def test_top_k_counts_valid_instances() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    got = MilAdapter(kind="probs", bag_axis=0).entropy(probs, mask=mask, top_k=3, normalize=True)
    assert got.tolist() == [[1.0], [0.0]]
    for kind, output in (("probs", torch.full((1, 4), 0.25)), ("scores", torch.zeros(1, 4))):
        assert MilAdapter(kind=kind).entropy(output, top_k=2, normalize=True).item() == pytest.approx(1.0)


# --- what the attention is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_auto_tells_weights_from_scores(masked: bool) -> None:
    scores = torch.randn(2, 6, dtype=torch.float64) * 3 + 4
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool() if masked else torch.ones(2, 6).bool()
    hidden = scores.masked_fill(~valid, MASKED)
    adapter = MilAdapter(bag_axis=0)
    for output in (hidden, hidden.softmax(-1), scores):
        got = adapter.entropy(output, mask=valid)
        wanted = [entropy(row[keep].numpy()) for row, keep in zip(scores, valid, strict=True)]
        np.testing.assert_allclose(got[:, 0], wanted, atol=1e-12)


def test_what_is_filled_is_scores_whatever_the_others_sum_to() -> None:
    row = np.array([0.3, 0.7])
    for kind in ("auto", "scores"):
        got = MilAdapter(kind=kind).entropy(torch.tensor([[*row, MASKED]]))
        assert got.item() == pytest.approx(entropy(row), abs=1e-6)


def test_auto_is_settled_by_the_first_bag_with_a_choice() -> None:
    reader = MilReader(MilAdapter())
    reader.read(torch.tensor([[1.0]]))  # one instance: weight 1, or a score
    assert not reader.settled
    reader.read(torch.tensor([[1.0, 7.0]]), torch.tensor([[1, 0]]))
    assert not reader.settled
    weights = torch.tensor([[0.2, 0.3, 0.5]])
    reader.read(weights)
    assert (reader.kind, reader.settled) == ("probs", True)
    with pytest.raises(ValueError, match="no distribution over the valid instances: rows sum to 1.5"):
        reader.read(weights * 1.5)
    reader = MilReader(MilAdapter())
    reader.read(weights * 9)
    assert reader.kind == "scores"
    # from here on it is only a coincidence
    assert reader.read(weights)[0].item() == pytest.approx(entropy(weights[0].numpy()), abs=1e-6)


@pytest.mark.parametrize(
    "mask",
    [None, torch.ones(1, 4), torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1]])],
    ids=["none", "full", "padded", "weight_on_padding"],
)
def test_weights_taken_for_scores_are_refused(mask: Tensor | None) -> None:
    weights = torch.tensor([[0.5, 0.2, 0.3, 0.0]])
    with pytest.raises(ValueError, match=r"already a distribution.*set `MilAdapter\(kind='probs'\)`"):
        MilAdapter(kind="scores", bag_axis=0).entropy(weights, mask=mask)


@pytest.mark.parametrize("kind", ["auto", "probs"])
def test_weights_on_padding_are_refused(kind: str) -> None:
    weights = torch.tensor([[0.4, 0.4, 0.2]])
    with pytest.raises(ValueError, match="rows sum to 0.8 ... 0.8.*softmax ran over its padding"):
        MilAdapter(kind=kind, bag_axis=0).entropy(weights, mask=torch.tensor([[1, 1, 0]]))


@pytest.mark.parametrize("kind", ["auto", "scores", "probs"])
def test_weights_along_another_axis_are_refused(kind: str) -> None:
    weights = torch.randn(6, 4).softmax(0)
    with pytest.raises(ValueError, match=r"sum to 1 along another axis: set `MilAdapter\(instance_axis=...\)`"):
        MilAdapter(kind=kind).entropy(weights)


def test_scores_that_hide_what_the_mask_shows_are_refused() -> None:
    scores = torch.tensor([[1.0, 2.0, MASKED, MASKED], [1.0, 2.0, 3.0, MASKED]])
    with pytest.raises(ValueError, match="masked wherever `mask` says that instances are valid: `mask` must be 1 for"):
        MilAdapter(kind="scores", bag_axis=0).entropy(scores, mask=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]))


def test_scores_that_are_small_by_chance_need_a_word() -> None:
    scores = torch.tensor([[0.5, -0.1, 0.4]])
    with pytest.raises(ValueError, match=r"either scores or a product.*33% of the entries.*kind='scores'"):
        MilAdapter().entropy(scores)
    assert MilAdapter(kind="scores").entropy(scores).item() == pytest.approx(entropy(scores[0].numpy()), abs=1e-6)


def test_looking_takes_one_copy_from_the_device_and_scores_only_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []
    for name in ("tolist", "item", "__bool__"):
        original = getattr(Tensor, name)

        def spy(self: Tensor, name: str = name, original: Callable[[Tensor], Any] = original) -> Any:
            copies.append(name)
            return original(self)

        monkeypatch.setattr(Tensor, name, spy)
    reader = MilReader(ADAPTERS["trident"])
    mask = torch.ones(2, 5, dtype=torch.bool)
    for wanted in (2, 0, 0):  # flags and numbers, split
        copies.clear()
        reader.read((None, torch.randn(2, 1, 2, 5)), mask)
        assert len(copies) == wanted


# --- axes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 3])
def test_an_axis_that_is_not_the_instances_is_noticed_when_bags_differ(branches: int) -> None:
    reader = MilReader(MilAdapter(kind="scores"))
    reader.read(torch.randn(57, branches))
    with pytest.raises(ValueError, match=rf"-1 always has {branches} entries, while another axis.*43 here and had 57"):
        reader.read(torch.randn(43, branches))
    reader = MilReader(MilAdapter(kind="scores", instance_axis=0))
    for instances in (57, 43, 1):
        reader.read(torch.randn(instances, branches))
    reader = MilReader(MilAdapter(kind="scores"), single=False)  # two models, with their own branches
    for branches in (2, 4):
        reader.read(torch.randn(branches, 5))


def test_attention_of_every_instance_to_every_other_may_grow_in_both_axes() -> None:
    reader = MilReader(MilAdapter(kind="scores"))
    for instances in (5, 6, 5):
        reader.read(torch.randn(2, instances, instances))


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        (torch.rand(3), {"instance_axis": 1}, r"`instance_axis` 1 is not an axis of the attention, which is \(3,\)"),
        (torch.rand(3), {"bag_axis": -2}, r"`bag_axis` -2 is not an axis"),
        (torch.rand(3, 2), {"bag_axis": 1}, r"`instance_axis` -1 and `bag_axis` 1 are the same axis.*\(3, 2\)"),
        ([], {}, "is an empty list"),
        ([torch.rand(4, 1), torch.rand(3, 1)], {}, "that is where the instances are"),
        ([torch.rand(4, 2), torch.rand(3, 3)], {}, r"must have the same branches, got \[\(4, 2\), \(3, 3\)\]"),
        (torch.ones(1, 3).long(), {}, r"must lead to a floating-point tensor.*leads to Tensor \(1, 3\)"),
        ((torch.rand(1), torch.rand(3)), {}, r"leads to tuple\(0: Tensor \(1,\), 1: Tensor \(3,\)\)"),
        ((None, None), {"path": 1}, "leads to None: ask the model for its attention"),
    ],
    ids=str,
)
def test_wrong_axes_and_ends_say_what_is_there(output: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MilAdapter(kind="scores", **arguments).entropy(output)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "logits"}, ValueError, "`kind` must be one of auto, scores, probs, got 'logits'"),
        ({"instance_axis": "n"}, TypeError, "`instance_axis` must be an integer, got 'n'"),
        ({"bag_axis": True}, TypeError, "`bag_axis` must be an integer, got True"),
        ({"bag_axis": -1}, ValueError, "`instance_axis` and `bag_axis` must differ, got -1 for both"),
        ({"path": 1.5}, TypeError, "`path` must be keys, indices or attribute names, or a function.*got 1.5"),
        ({"path": [True]}, TypeError, "`path` must be keys"),
        ({"mask_path": {"a": 1}}, TypeError, "`mask_path` must be keys"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MilAdapter(**arguments)


# --- paths -----------------------------------------------------------------------------------------------------------

Output = namedtuple("Output", "logits attention")
ATTENTION = torch.tensor([[0.0, 0.0]])


@dataclasses.dataclass
class Structured:
    attention: Tensor


@pytest.mark.parametrize(
    ("output", "path"),
    [
        (ATTENTION, ()),
        ((1, ATTENTION), 1),
        ((1, ATTENTION), -1),
        ([1, ATTENTION], 1),
        ({"a": ATTENTION}, "a"),
        ({3: ATTENTION}, 3),
        ((1, {"a": [ATTENTION]}), (1, "a", 0)),
        ((1, {"a": [ATTENTION]}), [1, "a", 0]),
        (Output(1, ATTENTION), "attention"),
        (Output(1, ATTENTION), 1),
        (Structured(ATTENTION), "attention"),
        (SimpleNamespace(log={"a": ATTENTION}), ("log", "a")),
        ((1, ATTENTION.T), lambda output: output[1].T),
    ],
    ids=lambda value: type(value).__name__,
)
def test_path_leads_through_any_structure(output: Any, path: Any) -> None:
    assert MilAdapter(path, kind="scores").entropy(output, normalize=True).item() == 1


@pytest.mark.parametrize(
    ("output", "path", "message"),
    [
        ((ATTENTION,), 3, r"`path` \[3\] is not in what the model returns, which is tuple\(0: Tensor \(1, 2\)\)"),
        ({"logits": 1, "log": {}}, ("log", "attention"), r"which is dict\(logits: int, log: dict\(\)\)"),
        (ATTENTION, 0, r"which is Tensor \(1, 2\)"),
        (Structured(ATTENTION), "scores", r"which is Structured\(attention: Tensor \(1, 2\)\)"),
        (Output(None, ATTENTION), "scores", r"Output\(logits: None, attention: Tensor \(1, 2\)\)"),
        ({}, lambda output: output["scores"], r"`path` .*lambda.* is not in what the model returns"),
        (((((ATTENTION,),),),), "a", r"tuple\(0: tuple\(0: tuple\(0: tuple\(...\)\)\)\)"),
    ],
    ids=["index", "key", "tensor", "attribute", "field", "function", "deep"],
)
def test_path_that_leads_nowhere_shows_what_there_is(output: Any, path: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MilAdapter(path).entropy(output)


def test_structure_of_a_type_is_its_kind() -> None:
    assert structure(Structured) == "type"


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "mask", "message"),
    [
        (torch.rand(2, 5), torch.ones(5, 2), r"must be \(bags, instances\) = \(2, 5\), 1 for valid.*got \(5, 2\)"),
        (torch.rand(2, 5), torch.ones(5), r"\(2, 5\).*got \(5,\)"),
        (torch.rand(2, 5), torch.ones(2, 5, 1), r"\(2, 5\).*got \(2, 5, 1\)"),
        (torch.rand(2, 5), -torch.ones(2, 5), "negative entries: for an additive mask give `mask == 0`"),
        ([torch.rand(1, 5)], torch.ones(2, 5), "a row for each of the 1 bags of the list, got 2"),
        ([torch.rand(1, 5)], torch.ones(1, 4), r"\(1, 5\).*got \(4,\)"),
        ([torch.rand(1, 5)], [[1, 1, 1, 1, 1]], "`mask` must be a tensor, got list"),
    ],
    ids=["turned", "flat", "deep", "additive", "bags", "short", "list"],
)
def test_mask_that_does_not_fit_is_refused(output: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MilAdapter(kind="scores", bag_axis=0).entropy(output, mask=mask)


def test_mask_of_one_bag_may_lack_the_axis_of_bags() -> None:
    scores, mask = torch.randn(2, 5), torch.tensor([1, 1, 0, 1, 0])
    got = MilAdapter(kind="scores").entropy(scores, mask=mask)
    torch.testing.assert_close(got, MilAdapter(kind="scores").entropy(scores, mask=mask[None]))
    np.testing.assert_allclose(got[0, 0], entropy(scores[0, [0, 1, 3]].double().numpy()), atol=1e-6)


def test_padding_left_in_the_attention_needs_a_mask() -> None:
    with pytest.raises(ValueError, match="leaves its padding in the attention.*give `mask=`"):
        ADAPTERS["torchmil"].entropy((None, torch.randn(2, 5)))
    assert ADAPTERS["torchmil"].entropy((None, torch.randn(1, 5))).shape == (1, 1)


# --- names -----------------------------------------------------------------------------------------------------------


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match="one of clam, abmil, .*mil_lab, got 'clm'. Did you mean 'clam'"):
        as_adapter("clm")
    with pytest.raises(ValueError, match="got 'xyz'. For another model say where its attention is"):
        as_adapter("xyz")
    with pytest.raises(TypeError, match="must be a MilAdapter or one of clam.*got int"):
        as_adapter(3)  # type: ignore[arg-type]


def test_description_is_plain() -> None:
    assert as_adapter("mil_lab").describe() == {
        "path": [1, "attention"], "kind": "scores", "instance_axis": -1, "bag_axis": 0, "mask_path": None,
        "needs_mask": False,
    }  # fmt: skip
    assert MilAdapter(test_description_is_plain).describe()["path"] == "test_description_is_plain"
