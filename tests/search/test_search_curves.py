"""Fractions as they are typed, and the order in which a curve is filled."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.errors import SelectionError
from diffract.search.plan import coarse_first, parse_fractions


def test_decimals_are_what_they_print_as() -> None:
    assert parse_fractions("0:1:0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert parse_fractions("0.25:0.5:0.25") == (0.0, 0.25, 0.5, 1.0)
    assert parse_fractions("0.5,0.125") == (0.0, 0.125, 0.5, 1.0)
    assert parse_fractions([0.5, 0.5]) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    "text", ["", "half", "0:1", "0:1:0", "0:1:-0.1", "1:0:0.1", "0:2:0.5", "-1,0", "0:1:0.000001", "nan", "0:1:nan"]
)
def test_what_is_no_row_of_fractions(text: str) -> None:
    with pytest.raises(SelectionError, match="fractions: expected FROM:TO:STEP within 0 to 1"):
        parse_fractions(text)


@given(st.integers(0, 200))
def test_every_place_comes_once_and_beginnings_are_even(count: int) -> None:
    order = coarse_first(count)
    assert sorted(order) == list(range(count))
    for taken in range(1, count + 1):
        known = [-1, *sorted(order[:taken]), count]
        widest = max(b - a for a, b in pairwise(known))
        levels = (taken + 1).bit_length() - 1  # of whole halvings
        assert widest <= (count + 1) / 2**levels + 1
