"""Which directions each rule keeps: counted by hand, by plain references, and on planted signals."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.edits.directions import exact, kept, require_same_shape, widened, wider, work_dtype
from diffract.edits.rule import Rule, rounded


def sigmas(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def count(S: torch.Tensor, rule: Rule, long: int | None = None) -> int:
    found = kept(S, (len(S), long or len(S)), rule)
    assert found.start == 0
    return found.stop


FIVE = sigmas(5, 4, 3, 2, 1)
"""Squares 25, 16, 9, 4, 1: running sums 25, 41, 50, 54, 55."""


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (Rule(drop=0.0), 5),
        (Rule(drop=0.09), 5),  # 0.45
        (Rule(drop=0.1), 4),  # 0.5, half up
        (Rule(drop=0.3), 3),  # 1.5, half up
        (Rule(drop=0.9), 0),  # 4.5, half up
        (Rule(drop=1.0), 0),
        (Rule(rank=1), 1),
        (Rule(rank=5), 5),
        (Rule(rank=600), 5),
        (Rule(energy=1e-9), 1),
        (Rule(energy=25 / 55), 1),
        (Rule(energy=0.46), 2),
        (Rule(energy=50 / 55), 3),
        (Rule(energy=1.0), 5),
        (Rule(above=0.0), 5),
        (Rule(above=3.0), 2),
        (Rule(above=2.99), 3),
        (Rule(above=5.0), 0),
    ],
    ids=str,
)
def test_counts_by_hand(rule: Rule, want: int) -> None:
    assert count(FIVE, rule) == want


@pytest.mark.parametrize(
    ("band", "want"),
    [
        ((0.0, 1.0), (0, 5)),
        ((0.2, 0.6), (1, 3)),
        ((0.1, 0.5), (1, 3)),  # 0.5 and 2.5, half up
        ((0.6, 0.65), (3, 3)),  # both ends round to the same: nothing
    ],
)
def test_bands_by_hand(band: tuple[float, float], want: tuple[int, int]) -> None:
    assert kept(FIVE, (5, 9), Rule(band=band)) == slice(*want)


def test_the_tail_is_what_the_head_drops() -> None:
    assert kept(FIVE, (5, 5), Rule(rank=2, side="tail")) == slice(2, 5)
    assert kept(FIVE, (5, 5), Rule(drop=0.0, side="tail")) == slice(5, 5)
    assert kept(FIVE, (5, 5), Rule(drop=1.0, side="tail")) == slice(0, 5)


def test_fractions_mean_the_number_that_was_written() -> None:
    # In floats 0.145 * 100 < 14.5 and 0.1 + 0.2 > 0.3.
    assert rounded(0.145, 100) == 15
    assert rounded(1e-5, 50_000) == 1
    assert count(torch.ones(100).double(), Rule(drop=0.145)) == 85


@given(st.integers(0, 1000), st.integers(1, 400))
def test_a_dropped_fraction_is_the_nearest_count(thousandths: int, total: int) -> None:
    dropped = total - count(torch.ones(total).double(), Rule(drop=thousandths / 1000))
    off = Fraction(thousandths, 1000) * total - dropped
    assert -Fraction(1, 2) <= off < Fraction(1, 2)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
    st.sampled_from(["drop", "energy", "above", "rank"]),
)
def test_head_and_tail_share_out_all_directions(values: list[float], number: float, name: str) -> None:
    S = sigmas(*sorted(values, reverse=True))
    value = {"drop": number, "energy": number, "above": number * 10, "rank": math.ceil(number * 20)}[name]
    head = kept(S, (len(S), 40), Rule(**{name: value}))  # type: ignore[arg-type]
    tail = kept(S, (len(S), 40), Rule(**{name: value}, side="tail"))  # type: ignore[arg-type]
    assert (head.start, head.stop, tail.stop) == (0, tail.start, len(S))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 99))
def test_energy_is_the_smallest_count_that_suffices(values: list[int], percent: int) -> None:
    squares = [v * v for v in sorted(values, reverse=True)]
    want = next(k for k in range(1, len(squares) + 1) if 100 * sum(squares[:k]) >= percent * sum(squares))
    found = count(sigmas(*(math.sqrt(s) for s in squares)), Rule(energy=percent / 100))
    # Where the share is met to the last digit, rounding may ask for one more.
    met = 100 * sum(squares[:want]) == percent * sum(squares)
    assert found == want or (met and found == want + 1)


def test_all_the_energy_is_every_direction_that_is_there() -> None:
    # 1e-12 squared is lost in a sum of squares near one.
    assert count(sigmas(1, 1e-12, 0, 0), Rule(energy=1.0)) == 2


@pytest.mark.parametrize("shape", [(120, 120), (80, 320), (320, 80)])
@pytest.mark.parametrize("name", ["donoho-gavish", "mp-edge"])
def test_noise_rules_find_planted_directions(shape: tuple[int, int], name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    noise, left, right = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (shape[0], 4), (shape[1], 4))
    )
    # Noise has sigmas up to sqrt(m) + sqrt(n) = 27 at most; the signal's are 100.
    signal = 100 * torch.linalg.qr(left).Q @ torch.linalg.qr(right).Q.mT
    S = torch.linalg.svdvals(noise + signal)
    assert kept(S, shape, Rule(rule=name)) == slice(0, 4)  # type: ignore[arg-type]
    assert kept(S, shape, Rule(rule=name, side="tail")) == slice(4, min(shape))  # type: ignore[arg-type]
    assert kept(torch.linalg.svdvals(noise), shape, Rule(rule="donoho-gavish")) == slice(0, 0)


@pytest.mark.parametrize("name", ["donoho-gavish", "mp-edge"])
def test_noise_rules_keep_all_of_a_low_rank_without_noise(name: str) -> None:
    assert count(sigmas(9, 5, *[0] * 18), Rule(rule=name), long=30) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["donoho-gavish", "mp-edge"])
def test_a_lone_direction_is_kept(name: str) -> None:
    assert kept(sigmas(3), (1, 7), Rule(rule=name)) == slice(0, 1)  # type: ignore[arg-type]
    assert kept(sigmas(3), (7, 1), Rule(rule=name, side="tail")) == slice(1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule",
    [
        Rule(drop=0.0), Rule(rank=2), Rule(energy=1.0), Rule(above=0.0), Rule(rule="mp-edge"),
        Rule(rule="donoho-gavish"), Rule(band=(0.0, 1.0)), Rule(drop=1.0, side="tail"),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_kept_of_nothing(rule: Rule) -> None:
    assert kept(sigmas(0, 0, 0), (3, 5), rule) == slice(0, 0)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "exactly one of drop, rank, energy, above, rule, band; got none"),
        ({"drop": 0.1, "rank": 2}, "got drop and rank"),
        ({"drop": 1.5}, "drop: expected a fraction from 0 to 1; got 1.5"),
        ({"drop": math.nan}, "drop: expected"),
        ({"rank": 0}, "rank: expected a whole number from 1; got 0"),
        ({"rank": 2.0}, "rank: expected"),
        ({"rank": True}, "rank: expected"),
        ({"energy": 0.0}, "energy: expected a share above 0, up to 1; got 0.0"),
        ({"energy": 1.1}, "energy: expected"),
        ({"above": -1.0}, "above: expected a finite number from 0; got -1.0"),
        ({"above": math.inf}, "above: expected"),
        ({"rule": "elbow"}, "rule: expected donoho-gavish or mp-edge; got 'elbow'"),
        ({"band": (0.5, 0.5)}, "band: expected two fractions"),
        ({"band": (-0.1, 0.5)}, "band: expected"),
        ({"band": (0.1, 1.1)}, "band: expected"),
        ({"band": (0.1, 0.5), "side": "tail"}, "side: expected head with a band"),
        ({"rank": 1, "side": "middle"}, "side: expected head or tail or random; got 'middle'"),
    ],
    ids=str,
)
def test_what_is_not_a_rule(given_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        untyped_rule(**given_)


def untyped_rule(**values: object) -> Rule:
    """A rule as it is made where shapes and types are not checked at run time."""
    rule = object.__new__(Rule)
    defaults = dict.fromkeys(("drop", "rank", "energy", "above", "rule", "band")) | {"side": "head"}
    for name, value in (defaults | values).items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule


@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (torch.float64, torch.float64), (torch.float32, torch.float64), (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32), (torch.float8_e4m3fn, torch.float32), (torch.float8_e5m2, torch.float32),
    ],
)  # fmt: skip
def test_results_have_room_for_what_is_stored(dtype: torch.dtype, want: torch.dtype) -> None:
    assert work_dtype(dtype) == want
    every = torch.tensor([[1.0, -0.5, 0.0, 2.0]]).to(dtype)
    assert torch.equal(widened(every, want).to(dtype).float(), every.float())


def test_the_wider_dtype_counts() -> None:
    assert wider(torch.bfloat16, torch.float32) == torch.float32
    assert wider(torch.float8_e5m2) == torch.float8_e5m2


def test_copies_are_the_callers_own() -> None:
    w = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    copy = widened(w.mT, torch.float64)
    assert copy.is_contiguous()
    copy.zero_()
    assert w[1, 2] == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="expected finite values, got NaN or an infinity"):
        exact(torch.tensor([[1.0, bad]]))


def test_shapes_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a matrix with entries, got shape \(0, 3\)"):
        exact(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and, at place 2, \(3, 2\)"):
        require_same_shape(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2))
