"""Barriers by hand, and their intervals by a plain loop over the same draws."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.errors import RunError
from diffract.search.connectivity import barrier, gaps, stacked
from search_cases import HELD_OUT, score_frame

AT = (0.0, 0.25, 0.5, 1.0)


def test_a_dip_in_accuracy_by_hand() -> None:
    """Ends 0.5 and 1.0: the line is at 0.625 and 0.75; quality 0.5 and 0.25 falls 0.125 and 0.5 below it."""
    values = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=float)
    few = barrier(values, np.ones(4), AT, better="higher")
    assert np.isnan([few.low, few.high, *few.gap_low]).all()  # four documents are too few
    found = barrier(np.tile(values, 2), np.ones(8), AT, better="higher")
    assert found.gap.tolist() == [0.0, 0.125, 0.5, 0.0]
    assert (found.height, found.where) == (0.5, 2)
    assert found.low <= found.height <= found.high


def test_bits_have_the_opposite_sign_and_weights_count() -> None:
    """Bits 10 and 20 of 5 and 5 bytes: 3 a byte at every place; twice as many half way."""
    values = np.array([[10.0, 20.0], [20.0, 40.0], [10.0, 20.0]])
    found = barrier(values, np.array([5.0, 5.0]), (0.0, 0.5, 1.0), better="lower")
    assert found.gap.tolist() == pytest.approx([0, 3, 0])
    assert barrier(-values, np.array([5.0, 5.0]), (0.0, 0.5, 1.0), better="lower").height == 0
    heavy = barrier(values, np.array([1.0, 9.0]), (0.0, 0.5, 1.0), better="lower")
    assert heavy.gap.tolist() == pytest.approx([0, 3, 0])


def test_items_that_all_fall_alike_leave_no_doubt() -> None:
    values = np.repeat([[1.0], [0.2], [0.6]], 9, axis=1)
    found = barrier(values, np.ones(9), (0.0, 0.5, 1.0), better="higher")
    assert [found.height, found.low, found.high] == pytest.approx([0.6, 0.6, 0.6])
    assert found.gap_low.tolist() == pytest.approx(found.gap.tolist())


def test_intervals_are_those_of_a_plain_paired_bootstrap() -> None:
    rng = np.random.default_rng(4)
    values, weights = rng.normal(1, 0.3, (4, 30)), rng.uniform(0.5, 2, 30)
    found = barrier(values, weights, AT, better="lower", seed=7, resamples=400)
    draws = np.random.default_rng(7).multinomial(30, [1 / 30] * 30, size=400)
    heights = []
    for counts in draws:
        drawn = np.repeat(np.arange(30), counts)
        q = [sum(v[i] for i in drawn) / sum(weights[i] for i in drawn) for v in values]
        heights.append(max(q[k] - ((1 - a) * q[0] + a * q[3]) if 0 < a < 1 else 0.0 for k, a in enumerate(AT)))
    assert [found.low, found.high] == pytest.approx(np.quantile(heights, [0.025, 0.975]).tolist(), rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_ends_have_no_gap_and_a_line_has_none(quality: list[float]) -> None:
    at = np.linspace(0, 1, len(quality))
    for better in ("higher", "lower"):
        found = gaps(np.array(quality), at, better)
        assert found[0] == found[-1] == 0
        line = (1 - at) * quality[0] + at * quality[-1]
        assert np.abs(gaps(line, at, better)).max() < 1e-15  # the last bit of numbers up to 1


def test_states_are_compared_on_the_same_items() -> None:
    one, two = score_frame("quality", [1, 2, 3]), score_frame("quality", [4, 5, 6])
    values, weights = stacked([one, two[[2, 0, 1]]], HELD_OUT)
    assert values.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert weights.tolist() == [1, 1, 1]
    with pytest.raises(RunError, match="'quality': states were scored on different items"):
        stacked([one, pl.concat([two[:2], score_frame("quality", [6], prefix="other")])], HELD_OUT)
