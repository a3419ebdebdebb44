"""TIES: thresholds against sorting, elections against a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.edits.mixing import elect_and_merge, magnitude_threshold, ties, trim

DTYPES = [torch.float32, torch.float64]


def once(*blocks: torch.Tensor) -> Callable[[], Iterable[torch.Tensor]]:
    return lambda: iter(blocks)


def sorted_threshold(x: torch.Tensor, keep: int) -> float:
    return x.flatten().abs().sort(descending=True).values[keep - 1].item()


def cut(x: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    edges = [0, *sorted(cuts), len(x)]
    return [x[start:stop] for start, stop in pairwise(edges)]


def reference_entry(deltas: list[float], weights: list[float]) -> float:
    """TIES at one entry, word by word."""
    vote = sum(weight * d for d, weight in zip(deltas, weights, strict=True))
    agreeing = [(d, weight) for d, weight in zip(deltas, weights, strict=True) if d * vote > 0]
    if not agreeing:
        return 0.0
    return sum(d * weight for d, weight in agreeing) / sum(weight for _, weight in agreeing)


@given(
    values=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_thresholds_against_sort(values: list[float], cuts: list[int], dtype: torch.dtype, data: st.DataObject):
    # Hypothesis draws zeros of both signs, subnormals, infinities and repeated values.
    x = torch.tensor(values, dtype=dtype)
    keep = data.draw(st.integers(1, len(x)))
    assert magnitude_threshold(once(*cut(x, [min(c, len(x)) for c in cuts])), keep) == sorted_threshold(x, keep)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_large_blocks(dtype: torch.dtype):
    x = torch.randn(1000, 1200, generator=torch.Generator().manual_seed(0), dtype=dtype)
    descending = x.flatten().abs().sort(descending=True).values
    for keep in (1, 2, 777, 600_000, 1_199_999, 1_200_000):
        wanted = descending[keep - 1].item()
        assert magnitude_threshold(once(x[:3], x[3:900], x[900:]), keep) == wanted
        assert magnitude_threshold(once(x.mT), keep) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_special_numbers(dtype: torch.dtype):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
    x = torch.tensor([-0.0, tiny, -3 * tiny, 0.0, torch.inf, -torch.inf, 2 * tiny], dtype=dtype)
    found = [magnitude_threshold(once(x), keep) for keep in range(1, 8)]
    assert found == [math.inf, math.inf, 3 * tiny, 2 * tiny, tiny, 0.0, 0.0]
    same = torch.full((9, 2), -0.3, dtype=dtype)
    assert {magnitude_threshold(once(same), keep) for keep in range(1, 19)} == {same[0, 0].abs().item()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("payload", [1, -1])
def test_nan_has_no_place_in_the_order(dtype: torch.dtype, payload: int):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    # The least and the greatest bit patterns that are NaN: infinity's and the next, and all ones.
    x.view(integers)[500] = torch.tensor(torch.inf, dtype=dtype).view(integers) + 1 if payload == 1 else -1
    assert x.isnan().sum() == 1
    with pytest.raises(ValueError, match="NaN"):
        magnitude_threshold(once(x[:400], x[400:]), 10)


def test_how_many_can_be_kept():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="at least one"):
        magnitude_threshold(once(x), 0)
    with pytest.raises(ValueError, match="at most all 6"):
        magnitude_threshold(once(x, x), 7)
    with pytest.raises(ValueError, match="at most all 0"):
        magnitude_threshold(once(), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 500), keep=st.integers(1, 200))
def test_trimming_keeps_the_largest_and_their_equals(dtype: torch.dtype, seed: int, keep: int):
    x = (
        torch.randn(200, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)
    )  # bfloat16: equal magnitudes
    threshold = sorted_threshold(x, keep)
    got = trim(x, threshold)
    assert torch.equal(got, torch.where(x.abs() >= threshold, x, 0))
    assert int((got != 0).sum()) >= keep


def test_trimming_at_the_ends():
    x = torch.tensor([1e-45, -1e-45, 0.0, 2.0, torch.inf])
    assert trim(x, 0.0) is x
    assert torch.equal(trim(x, x[0].item()), x)
    assert trim(x, math.inf).tolist() == [0, 0, 0, 0, math.inf]
    assert trim(torch.tensor([torch.nan]), 1.0).isnan().all()


def test_hand_computed_election():
    x = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0, 1.0, -1.0])
    y = torch.tensor([1.0, -3.0, -2.0, 0.0, 5.0, 2.0, -4.0])
    assert elect_and_merge([x, y], [1.0, 1.0]).tolist() == [2, -3, 0, 0, 5, 1.5, -2.5]
    # 4 x outvotes y where it did not; the mean of those that agree is weighted.
    assert elect_and_merge([x, y], [4.0, 1.0]).tolist() == pytest.approx(
        [2.6, 1, 2, 0, 5, 1.2, -1.6], abs=1e-6
    )  # float32


@given(
    data=st.data(),
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_election_against_a_loop(data: st.DataObject, weights: list[float], dtype: torch.dtype):
    # Whole numbers and eighths: votes that cancel do so exactly in the reference and in the function.
    weights = [max(1, round(8 * weight)) / 8 for weight in weights]
    entries = st.lists(st.integers(-3, 3), min_size=12, max_size=12)
    deltas = [torch.tensor(data.draw(entries), dtype=dtype).view(3, 4) for _ in weights]
    got = elect_and_merge(deltas, weights)
    columns = np.stack([d.numpy().ravel() for d in deltas], axis=1)
    reference = [reference_entry(column.tolist(), weights) for column in columns]
    # One division, each sum exact.
    np.testing.assert_allclose(got.numpy().ravel(), reference, rtol=2 * torch.finfo(dtype).eps)


@given(
    # A tenth of the smallest subnormal number is 0.
    deltas=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=6),
    weights=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7, 1.0, 3.0]), min_size=6, max_size=6),
    dtype=st.sampled_from(DTYPES),
)
def test_election_against_exact_arithmetic(deltas: list[float], weights: list[float], dtype: torch.dtype):
    """The elected sign is that of the exact sum of weights as they are written, or none within its rounding."""
    exact = [Fraction(str(weight)) * Fraction(d) for d, weight in zip(deltas, weights, strict=False)]
    vote, cast = sum(exact), sum(map(abs, exact))
    got = elect_and_merge([torch.tensor([d], dtype=dtype) for d in deltas], weights[: len(deltas)]).item()
    if abs(vote) > 2 * len(deltas) * Fraction(2.0**-52) * cast:
        assert got * vote > 0
    elif vote == 0:
        assert got == 0


def test_sides_of_equal_weight_elect_nobody():
    """In floating point 0.1 + 0.2 is above 0.3, and in float32 1e8 + 1 is 1e8."""
    one = torch.ones(3)
    assert elect_and_merge([one, one, -one], [0.1, 0.2, 0.3]).tolist() == [0, 0, 0]
    assert elect_and_merge([one / 3, one / 3, -2 * one / 3], [1.0, 1.0, 1.0]).tolist() == [0, 0, 0]
    assert elect_and_merge([1e8 * one, one, -1e8 * one], [1.0, 1.0, 1.0]).tolist() == [5e7] * 3  # of the two that agree
    infinite = torch.tensor([torch.inf])
    assert elect_and_merge([infinite, -infinite / torch.inf], [1.0, 1.0]).isnan().all()
    assert elect_and_merge([infinite, torch.ones(1)], [1.0, 1.0]).tolist() == [torch.inf]


@given(seed=st.integers(0, 1000), count=st.integers(1, 4))
def test_identities_of_the_election(seed: int, count: int):
    deltas = list(torch.randn(count, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    weights = [1.0 + i for i in range(count)]
    before = [d.clone() for d in deltas]
    got = elect_and_merge(deltas, weights)
    assert torch.equal(elect_and_merge([-d for d in deltas], weights), -got)
    assert all(torch.equal(d, kept) for d, kept in zip(deltas, before, strict=True))
    # Weights count by their ratios; powers of two change no rounding.
    assert torch.equal(elect_and_merge(deltas, [4 * weight for weight in weights]), got)
    # A change merged with itself is that change: three roundings.
    torch.testing.assert_close(elect_and_merge([deltas[0]] * 3, [1.0, 2.0, 4.0]), deltas[0], rtol=3 * 2.0**-52, atol=0)


def test_tiny_changes_vote_too():
    tiny = torch.tensor([1e-44, -1e-44, 1e-44])
    assert torch.equal(elect_and_merge([tiny, torch.zeros(3)], [1.0, 1.0]), tiny)


def test_nan_is_not_lost():
    x, y = torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, 1.0])
    assert elect_and_merge([x, y], [1.0, 1.0]).isnan().tolist() == [True, False]
    assert elect_and_merge([y, x], [1.0, 1.0]).isnan().tolist() == [True, False]


def test_whole_merge_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    base, *tuned = torch.randn(4, 8, 25, generator=generator, dtype=torch.float64)
    weights, scale, keep = [1.0, 2.0, 0.5], 0.7, 80
    thresholds = [magnitude_threshold(once(*(one - base).split(3)), keep) for one in tuned]
    got = ties(base, tuned, thresholds, weights, scale)
    deltas = [(one - base).numpy().ravel() for one in tuned]
    kept = [np.where(np.abs(d) >= np.sort(np.abs(d))[-keep], d, 0) for d in deltas]
    merged = [reference_entry([float(d[i]) for d in kept], weights) for i in range(base.numel())]
    reference = base.numpy().ravel() + scale * np.array(merged)
    # Ten roundings of numbers below 10.
    np.testing.assert_allclose(got.numpy().ravel(), reference, rtol=0, atol=100 * 2.0**-52)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_one_model_untrimmed_rounds_to_itself(stored: torch.dtype):
    base = torch.randn(5000, generator=torch.Generator().manual_seed(2)).to(stored)
    tuned = (base.float() + 1e-2 * torch.randn(5000, generator=torch.Generator().manual_seed(3))).to(stored)
    assert torch.equal(ties(base.float(), [tuned.float()], [0.0], [1.0]).to(stored), tuned)
    unchanged = ties(base.float(), [base.float(), base.float()], [0.0, 1.0], [1.0, 2.0])
    assert torch.equal(unchanged.to(stored), base)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
def test_weights_are_above_zero(weights: list[float]):
    with pytest.raises(ValueError, match="above zero"):
        elect_and_merge([torch.ones(2), torch.ones(2)], weights)


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="one weight for each"):
        elect_and_merge([torch.ones(2)], [1.0, 1.0])
    with pytest.raises(ValueError, match="shorter"):
        ties(torch.ones(2), [torch.ones(2), torch.ones(2)], [0.0], [1.0, 1.0])
