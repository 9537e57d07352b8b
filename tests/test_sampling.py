"""Rows of an attention: all of them exactly where they are few, else a spread sample of true rows."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_reg.capture import AttentionCall
from lightning_reg.functional._scores import shift_of
from lightning_reg.sampling import sample_positions, sample_rows

ZERO = torch.zeros(())


def call(query: Tensor, key: Tensor, **arguments: object) -> AttentionCall:
    return AttentionCall("site", nn.Identity(), query=query, key=key, **arguments)  # type: ignore[arg-type]


def full_scores(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """By the definition, in float64: (batch, heads, queries, keys), -inf where hidden."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    scores = torch.einsum("bhmd,bhnd->bhmn", query.double(), key) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = (scores + mask).masked_fill(mask.expand(scores.shape) <= -5e3, -math.inf)
    return scores


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "boolean": (torch.rand(3, 1, 7, 9, generator=torch.Generator().manual_seed(1)) > 0.3, False),
    "keys": (torch.rand(3, 1, 1, 9, generator=torch.Generator().manual_seed(2)) > 0.3, False),
    "bias": (torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(3)), False),
    "fill": (torch.zeros(3, 1, 7, 9).masked_fill(torch.arange(9) > 5, -1e9), False),
}


@pytest.mark.parametrize("rows", [21, 4])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_sampled_rows_are_rows_of_the_attention(name: str, rows: int, key_heads: int) -> None:
    mask, causal = MASKS[name]
    query, key = torch.randn(3, 4, 7, 6), torch.randn(3, key_heads, 9, 6)
    wanted = full_scores(query, key, mask, causal, 0.7)
    sample = sample_rows(
        call(query, key, attn_mask=mask, is_causal=causal, scale=0.7, enable_gqa=key_heads < 4), rows, ZERO + 0.3
    )
    norms, key_norms = query.double().norm(dim=-1), key.double().norm(dim=-1).repeat_interleave(4 // key_heads, 1)
    if rows == 21:
        torch.testing.assert_close(sample.scores.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample.query_norms.double(), norms, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample.key_norms.double(), key_norms, rtol=1e-5, atol=1e-5)
        return
    assert sample.scores.shape == (2, 4, 2, 9)  # two queries of two samples
    places = set()
    for b in range(2):
        for m in range(2):
            distance = (sample.query_norms[b, :, m, None, None].double() - norms.transpose(0, 1)).abs().sum(0)
            sample_of, query_of = divmod(int(distance.argmin()), 7)
            places.add((sample_of, query_of))
            torch.testing.assert_close(
                sample.scores[b, :, m].double(), wanted[sample_of, :, query_of], rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(sample.key_norms[b].double(), key_norms[sample_of], rtol=1e-5, atol=1e-5)
    assert len(places) == 4
    assert len({sample_of for sample_of, _ in places}) == 2


def test_rows_move_with_the_step_and_meet_every_query() -> None:
    query = torch.arange(1.0, 101).view(1, 1, 100, 1).expand(2, 1, 100, 1)
    seen: set[float] = set()
    for step in range(60):
        norms = sample_rows(call(query, torch.ones(2, 1, 3, 1)), 8, ZERO + shift_of(step)).query_norms
        assert len(norms[0].unique()) == 4
        seen |= set(norms.flatten().tolist())
    assert len(seen) == 100
    assert 0 <= shift_of(10**9) < 1


def test_few_queries_are_taken_from_many_samples() -> None:
    scores = sample_rows(call(torch.randn(50, 2, 1, 4), torch.randn(50, 2, 5, 4)), 16, ZERO).scores
    assert scores.shape == (16, 2, 1, 5)


@pytest.mark.parametrize(
    ("shape", "key_shape", "wanted"),
    [
        ((7, 4), (9, 4), (1, 1, 7, 9)),
        ((3, 7, 4), (3, 9, 4), (3, 1, 7, 9)),
        ((2, 3, 2, 7, 4), (2, 3, 2, 9, 4), (6, 2, 7, 9)),
    ],
    ids=["2d", "3d", "5d"],
)
def test_any_number_of_axes(shape: tuple[int, ...], key_shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    query, key = torch.randn(shape), torch.randn(key_shape)
    scores = sample_rows(call(query, key), 1000, ZERO).scores
    torch.testing.assert_close(scores, (query @ key.mT / 2).reshape(wanted))


def test_padding_is_hidden_altogether() -> None:
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    query = torch.randn(2, 2, 3, 4)
    for rows in (6, 4):
        sample = sample_rows(call(query, query), rows, ZERO, tokens)
        hidden = (sample.scores == -math.inf).all(-1).all(1)
        norms = sample.query_norms[:, 0]
        for b in range(len(hidden)):
            for m in range(hidden.shape[1]):
                where = (query[:, 0].norm(dim=-1) - norms[b, m]).abs().argmin()
                assert bool(hidden[b, m]) == (not bool(tokens.flatten()[where]))


@pytest.mark.parametrize("dim", [-1, 3, 2])
def test_scores_caught_at_a_softmax(dim: int) -> None:
    scores = torch.randn(2, 3, 5, 6)
    scores[0, 0, 1, 2] = -1e4
    caught = AttentionCall("site", nn.Identity(), scores=scores, dim=dim)
    moved = scores.movedim(dim, -1)
    sample = sample_rows(caught, 100, ZERO)
    torch.testing.assert_close(sample.scores, moved.masked_fill(moved == -1e4, -math.inf))
    assert sample.query_norms is sample.key_norms is None
    assert sample_rows(caught, 4, ZERO).scores.shape == (2, 3, 2, moved.shape[-1])


def test_scores_of_a_bag() -> None:
    bag = torch.randn(9, 1)
    caught = AttentionCall("site", nn.Identity(), scores=bag, dim=0)
    torch.testing.assert_close(sample_rows(caught, 64, ZERO).scores, bag.T.view(1, 1, 1, 9))
    caught = AttentionCall("site", nn.Identity(), scores=bag.flatten(), dim=0)
    torch.testing.assert_close(sample_rows(caught, 64, ZERO).scores, bag.view(1, 1, 1, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    query = (30 * torch.randn(1, 1, 4, 64)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sample_rows(call(query, query), 4, ZERO).scores
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), query.double() @ query.double().mT / 8, rtol=1e-5, atol=1e-2)


def test_positions() -> None:
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.5
    flat, valid = sample_positions(x, mask, 20, ZERO)
    assert torch.equal(flat, x.view(20, 3))
    assert torch.equal(valid, mask.view(20))
    few, valid = sample_positions(x, mask, 6, ZERO + 0.9)
    assert few.shape == (6, 3)
    rows = [int((x.view(20, 3) == row).all(1).nonzero()) for row in few]
    assert len(set(rows)) == 6
    assert torch.equal(valid, mask.view(20)[rows])


def test_no_random_numbers_are_drawn() -> None:
    state = torch.get_rng_state()
    sample_rows(call(torch.ones(9, 2, 30, 4), torch.ones(9, 2, 30, 4)), 8, ZERO)
    assert torch.equal(torch.get_rng_state(), state)
