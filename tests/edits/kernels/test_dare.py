"""Entries dropped at random: how many, which, and that they do not hang together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.edits.mixing import dare, elect_and_merge, seeded

FALSE_ALARM = 5.5
"""Standard deviations: a right answer lies beyond with chance 4e-8, for each number that is looked at. Seeds are fixed,
so that a test that passes once always does."""


@pytest.mark.parametrize("drop", [1e-3, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_the_kept_share_is_binomial(drop: float):
    count = 1_000_000
    kept = int(dare(torch.ones(count), drop, seeded(1, str(drop))).count_nonzero())
    assert abs(kept - count * (1 - drop)) < FALSE_ALARM * math.sqrt(count * drop * (1 - drop))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_entries_are_scaled_and_the_rest_is_zero(dtype: torch.dtype):
    delta = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=dtype)
    before = delta.clone()
    got = dare(delta, 0.75, seeded(2))
    kept = got != 0
    assert torch.equal(got[kept], 4 * delta[kept])
    assert not got[~kept].signbit().any()
    assert got.dtype == dtype
    assert torch.equal(delta, before)


@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_the_expectation_is_the_change(drop: float):
    delta = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws = 20_000
    # Pieces of even size come out as the whole, so that one call draws what this many calls with one generator would.
    mean = dare(delta.repeat(draws, 1), drop, seeded(4)).mean(0)
    deviation = delta.abs() * math.sqrt(drop / (1 - drop) / draws)
    assert ((mean - delta).abs() < FALSE_ALARM * deviation).all()


def test_neighbours_are_independent():
    kept = dare(torch.ones(400_000), 0.5, seeded(5)).bool().double() - 0.5
    for lag in (1, 2, 3, 4, 624):  # within a random word, between words, and the length of the generator's state
        correlation = float((kept[:-lag] * kept[lag:]).mean() / 0.25)
        assert abs(correlation) < FALSE_ALARM / math.sqrt(len(kept) - lag)


def test_labels_are_independent_of_each_other():
    ones = torch.ones(400_000)
    labels = [("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), ("a", "c")]
    kept = [dare(ones, 0.5, seeded(0, *label)).bool().double() - 0.5 for label in labels]
    kept.append(dare(ones, 0.5, seeded(1, "a", "b")).bool().double() - 0.5)
    correlations = torch.stack(kept) @ torch.stack(kept).T / len(ones) / 0.25
    assert (correlations.triu(1).abs() < FALSE_ALARM / math.sqrt(len(ones))).all()


def test_the_same_seed_and_labels_drop_the_same_entries_in_both_dtypes():
    delta = torch.randn(7, 9, generator=torch.Generator().manual_seed(6))
    once, again = (dare(delta, 0.4, seeded(7, "model", "tensor", "0")) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(dare(delta.double(), 0.4, seeded(7, "model", "tensor", "0")) != 0, once != 0)


def test_seeds_do_not_change_between_versions():
    assert seeded(0, "model", "tensor").initial_seed() == 0x38E35813E62093E1


@given(cut=st.integers(0, 50), odd=st.integers(0, 1))
def test_pieces_of_even_size_come_out_as_the_whole(cut: int, odd: int):
    delta = torch.ones(100 + odd)
    generator = seeded(8)
    pieces = [dare(piece, 0.5, generator) for piece in (delta[: 2 * cut], delta[2 * cut :])]
    assert torch.equal(torch.cat(pieces), dare(delta, 0.5, seeded(8)))


def test_strided_changes():
    delta = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))
    assert torch.equal(dare(delta.mT, 0.5, seeded(9)), dare(delta.mT.contiguous(), 0.5, seeded(9)))


def test_nothing_dropped_is_the_change_itself():
    delta = torch.tensor([torch.nan, -0.0])
    assert dare(delta, 0.0, seeded(0)) is delta


def test_dropped_entries_are_zero_whatever_they_were():
    got = dare(torch.full((1000,), torch.nan), 0.5, seeded(10))
    assert ((got == 0) | got.isnan()).all()
    assert 0 < int(got.isnan().sum()) < 1000


def test_shares_next_to_the_ends():
    ones = torch.ones(1000)
    assert torch.equal(dare(ones, 1e-12, seeded(0)), ones)  # rounds to p = 0
    assert set(dare(ones, math.nextafter(1, 0), seeded(0)).unique().tolist()) <= {0.0, 2.0**32}


@pytest.mark.parametrize("drop", [-0.1, 1.0, 1.5, math.nan])
def test_shares_that_cannot_be_dropped(drop: float):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        dare(torch.ones(3), drop, seeded(0))


def test_with_elected_signs():
    delta = torch.randn(2, 500, generator=torch.Generator().manual_seed(11))
    dropped = [dare(one, 0.5, seeded(12, str(i))) for i, one in enumerate(delta)]
    got = elect_and_merge(dropped, [1.0, 1.0])
    x, y = dropped
    alone = torch.where(x == 0, y, x)
    only_one = (x == 0) != (y == 0)
    assert torch.equal(got[only_one], alone[only_one])  # the mean over the one that is left
    assert not got[(x == 0) & (y == 0)].any()
