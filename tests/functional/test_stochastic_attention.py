"""Attention to random keys: what is drawn, and that what is computed is attention to it."""

import pytest
import torch
import torch.nn.functional as F

from lightning_reg.functional import stochastic_attention
from lightning_reg.functional.stochastic_attention import kept_keys, masked_to


def seeded(number: int) -> torch.Tensor:
    return torch.tensor(number)


@pytest.mark.parametrize("seed", [None, 5], ids=["global", "seeded"])
def test_every_key_is_drawn_as_often(seed: int | None) -> None:
    counts = torch.zeros(10)
    for draw in range(3000):
        kept = kept_keys(10, 0.3, seed=None if seed is None else seeded(seed + draw))
        assert len(kept) == 3
        assert torch.equal(kept, kept.unique())
        counts[kept] += 1
    # 900 expected, standard deviation 25
    assert counts.min() > 800
    assert counts.max() < 1000


def test_pairs_are_drawn_together_as_often_as_chance_says() -> None:
    together = torch.zeros(8, 8)
    for draw in range(4000):
        kept = kept_keys(8, 0.5, seed=seeded(draw))
        together[kept[:, None], kept] += 1
    off = together[~torch.eye(8, dtype=torch.bool)]
    assert (off / 4000 - 4 * 3 / (8 * 7)).abs().max() < 0.04


def test_equal_seeds_draw_alike_and_others_do_not() -> None:
    assert torch.equal(kept_keys(100, 0.5, seed=seeded(3)), kept_keys(100, 0.5, seed=seeded(3)))
    assert not torch.equal(kept_keys(100, 0.5, seed=seeded(3)), kept_keys(100, 0.5, seed=seeded(4)))


def test_the_first_key_is_kept_where_asked() -> None:
    assert all(kept_keys(9, 0.2, first=True, seed=seeded(s))[0] == 0 for s in range(50))
    assert all(kept_keys(9, 0.2, first=True)[0] == 0 for _ in range(50))
    assert any(kept_keys(9, 0.2, seed=seeded(s))[0] != 0 for s in range(50))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [None, "bool", "bias"], ids=["unmasked", "bool", "bias"])
def test_equals_attention_with_the_other_keys_hidden(causal: bool, masked: str | None) -> None:
    q, k, v = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 3)
    mask = {None: None, "bool": torch.rand(2, 1, 6, 6) > 0.3, "bias": torch.randn(6, 6)}[masked]
    if masked == "bool":
        mask[..., 0] = True
    got = stochastic_attention(q, k, v, mask, is_causal=causal, keep=0.5, seed=seeded(1))
    drawn = torch.zeros(6, dtype=torch.bool)
    drawn[kept_keys(6, 0.5, first=causal, seed=seeded(1))] = True
    shown = drawn.expand(6, 6) & (torch.ones(6, 6, dtype=torch.bool).tril() if causal else True)
    bias = torch.zeros(2, 1, 6, 6)
    if masked == "bool":
        allowed = mask & (torch.ones(6, 6, dtype=torch.bool).tril() if causal else True)
        shown = allowed & drawn
        shown = torch.where(shown.any(-1, keepdim=True), shown, allowed)
    elif masked == "bias":
        bias = bias + mask
    scores = (q.double() @ k.double().mT) / 2 + bias
    wanted = scores.masked_fill(~shown, -torch.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, F.scaled_dot_product_attention(q, k, v, mask if not causal else None), atol=1e-2)


def test_rows_that_the_draw_empties_see_what_the_mask_shows() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    assert torch.equal(masked_to(mask, torch.tensor([1, 2]), 4, 4), mask)
    some = torch.tensor([[True, True, False, False]])
    assert torch.equal(masked_to(some, torch.tensor([1]), 1, 4), torch.tensor([[False, True, False, False]]))


def test_keeping_all_is_torch_s_attention_bit_for_bit() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
    assert torch.equal(stochastic_attention(q, k, v, keep=1.0), F.scaled_dot_product_attention(q, k, v))


def test_gqa_and_scale_reach_the_attention() -> None:
    q, k, v = torch.randn(1, 4, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    got = stochastic_attention(q, k, v, keep=0.4, scale=0.9, enable_gqa=True, seed=seeded(2))
    kept = kept_keys(5, 0.4, seed=seeded(2))
    wide_k, wide_v = (x[..., kept, :].repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(got, ((q @ wide_k.mT) * 0.9).softmax(-1) @ wide_v, atol=1e-6, rtol=1e-5)


def test_gradcheck() -> None:
    q, k, v = (torch.randn(1, 1, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: stochastic_attention(*x, keep=0.5, seed=seeded(7)), (q, k, v))


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, True, "half"], ids=str)
def test_bad_share(keep: object) -> None:
    with pytest.raises(ValueError, match=r"`keep` must be a share of the keys in \(0, 1\], got"):
        kept_keys(4, keep)  # type: ignore[arg-type]
