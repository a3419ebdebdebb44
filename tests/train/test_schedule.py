"""Rates in closed form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.train.recipe import Schedule, rate_factor


def factors(steps: int, **settings: object) -> list[float]:
    return [rate_factor(Schedule.model_validate(settings), step, steps) for step in range(steps)]


def test_wsd_rises_stays_and_falls_along_lines() -> None:
    found = factors(10, kind="wsd", warmup=0.2, decay=0.4, floor=0.2)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rel=1e-12)  # exact up to rounding


def test_cosine_falls_from_one_to_the_floor() -> None:
    found = factors(5, kind="cosine", warmup=0.2, floor=0.1)
    expected = [1.0, *(0.1 + 0.45 * (1 + math.cos(math.pi * t)) for t in (0.25, 0.5, 0.75, 1.0))]
    assert found == pytest.approx(expected, rel=1e-12)  # exact up to rounding


def test_constant_only_warms_up() -> None:
    assert factors(6, kind="constant", warmup=0.5, decay=0.5, floor=0.0) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@given(
    steps=st.integers(1, 60),
    kind=st.sampled_from(["wsd", "cosine", "constant"]),
    warmup=st.floats(0, 1),
    rest=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_every_step_has_a_rate(steps: int, kind: str, warmup: float, rest: float, floor: float) -> None:
    found = factors(steps, kind=kind, warmup=warmup, decay=(1 - warmup) * rest, floor=floor)
    warm = round(warmup * steps)
    assert all(0 <= factor <= 1 + 1e-12 for factor in found)  # rounding of 1 - (1 - floor) t
    assert found[:warm] == sorted(found[:warm])
    assert found[warm:] == sorted(found[warm:], reverse=True)
    if kind == "cosine" and warm < steps:
        assert found[-1] == pytest.approx(floor, abs=1e-12)  # 1 + cos(pi) is 0 up to rounding
