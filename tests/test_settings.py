"""Records of settings that are filled with a verb's arguments."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from diffract.settings import filled


@dataclass(frozen=True)
class Wanted:
    """Settings of some verb."""

    size: int
    name: str = "none"


def test_a_record_takes_the_arguments_that_are_called_like_its_fields() -> None:
    assert filled(Wanted, {"size": 3, "other": 5}) == Wanted(3)
    assert filled(Wanted, {"size": 3, "name": "two"}) == Wanted(3, "two")


def test_what_is_said_of_a_field_counts_more_than_the_argument_of_its_name() -> None:
    assert filled(Wanted, {"size": 3, "name": "two"}, name="one") == Wanted(3, "one")


def test_a_field_without_a_default_must_be_given() -> None:
    with pytest.raises(TypeError, match="size"):
        filled(Wanted, {"name": "two"})
