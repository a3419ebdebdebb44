"""What a budget buys, counted by hand, and that it is never exceeded; fractions and budgets as they are typed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.corpora import Split
from diffract.errors import SelectionError
from diffract.search.plan import SearchBudget, SearchCurve, coarse_first, make_plan, parse_budget, parse_fractions

AT = (0.0, 0.25, 0.5, 0.75, 1.0)
GREEDY = SearchCurve("greedy", {}, AT, needs_effects=True)
CHEAP = SearchCurve("magnitude", {}, AT)
REVERSED = SearchCurve("magnitude", {"reverse": True}, AT, control=True, group="points of reversed curves")


def test_without_a_budget_everything_is_done() -> None:
    plan = make_plan([GREEDY, CHEAP, REVERSED], ends=3, effects=8)
    assert plan.effects
    assert plan.left_out == ()
    assert set(plan.places.values()) == {AT}
    assert len(plan.places) == 6
    # selection: 3 ends, 8 heads, 3 curves of 3; held-out: 3 ends, 3 curves of 3, and 2 chosen points of each at most
    assert plan.counts == {"selection": 3 + 8 + 9, "held-out": 3 + 9 + 6}


def test_coarse_points_of_all_curves_come_before_fine_ones_of_any() -> None:
    plan = make_plan([CHEAP, CHEAP], ends=1, budget=SearchBudget(evaluations=2 + 2 * 3 + 1))
    assert plan.places == {("selection", 0): (0, 0.25, 0.5, 1), ("selection", 1): (0, 0.5, 1)}
    assert plan.evaluations == 9
    assert plan.left_out == ("3 points of curves on the selection split", "6 points of curves on the held-out split")


def test_reversed_curves_come_last_on_each_split() -> None:
    plan = make_plan([CHEAP, REVERSED, CHEAP], ends=1, budget=SearchBudget(evaluations=2 + 3 * (3 + 2) + 6 + 1))
    assert plan.places == {
        **{("selection", curve): AT for curve in range(3)},
        ("held-out", 0): AT,
        ("held-out", 2): AT,
        ("held-out", 1): (0, 0.5, 1),
    }
    assert plan.left_out == ("2 points of reversed curves on the held-out split",)


def test_effects_are_measured_all_or_not_at_all() -> None:
    few = make_plan([GREEDY, CHEAP], ends=1, effects=8, budget=SearchBudget(evaluations=2 + 8 + 2))
    assert not few.effects
    assert few.left_out[0] == "effects of 8 single heads, and what needs them"
    assert all(curve == 1 for _, curve in few.places)
    enough = make_plan([GREEDY, CHEAP], ends=1, effects=8, budget=SearchBudget(evaluations=2 + 8 + 3))
    assert enough.effects
    assert enough.places == {("selection", 0): (0, 0.5, 1)}


def test_a_budget_of_time_counts_what_each_split_takes() -> None:
    seconds: dict[Split, float] = {"selection": 1.0, "held-out": 10.0}
    plan = make_plan([CHEAP], ends=1, budget=SearchBudget(seconds=33.5), seconds_each=seconds)  # 11 + 1 + 20 + 1
    assert plan.counts == {"selection": 3, "held-out": 3}
    with pytest.raises(SelectionError, match="budget: expected more"):
        make_plan([CHEAP], ends=1, budget=SearchBudget(seconds=31.5), seconds_each=seconds)


def test_where_nothing_is_chosen_only_one_split_counts() -> None:
    plan = make_plan([CHEAP], ends=4, splits=("held-out",))
    assert plan.counts == {"held-out": 7}
    few = make_plan([CHEAP, CHEAP], ends=4, splits=("held-out",), budget=SearchBudget(evaluations=5))
    assert few.places == {("held-out", 0): (0, 0.5, 1), ("held-out", 1): (0, 1)}  # every pair has ends of its own
    with pytest.raises(SelectionError, match="5 evaluations are the least"):
        make_plan([CHEAP], ends=4, splits=("held-out",), budget=SearchBudget(evaluations=4))


def test_a_curve_without_ends_costs_all_its_points_and_one_without_middle_none() -> None:
    simplex = SearchCurve("simplex", {}, (0.0, 1.0, 2.0), ends=False)
    plan = make_plan([simplex], ends=1, splits=("held-out",))
    assert (plan.places, plan.counts) == ({("held-out", 0): (0, 1, 2)}, {"held-out": 4})
    few = make_plan([CHEAP, simplex], ends=1, splits=("held-out",), budget=SearchBudget(evaluations=2))
    assert few.places == {("held-out", 0): (0, 0.5, 1)}
    single, unknown = SearchCurve("mp-edge", {}, (0.0, 1.0)), SearchCurve("greedy", {}, (0.0, 1.0), needs_effects=True)
    plan = make_plan([single, CHEAP, unknown], ends=2, effects=9, budget=SearchBudget(evaluations=4 + 3))
    assert plan.places["selection", 0] == (0, 1)
    assert ("selection", 2) not in plan.places


@given(st.integers(1, 80), st.integers(0, 12), st.integers(1, 9))
def test_a_budget_is_never_exceeded(budget: int, effects: int, inner: int) -> None:
    at = tuple(i / (inner + 1) for i in range(inner + 2))
    curves = [
        SearchCurve("", {}, at, needs_effects=effects > 0),
        SearchCurve("", {}, at),
        SearchCurve("", {}, at, group="points of reversed curves"),
    ]
    try:
        plan = make_plan(curves, ends=2, effects=effects, budget=SearchBudget(evaluations=budget))
    except SelectionError:
        assert budget < 7
        return
    assert plan.evaluations <= budget
    held = sum(len(places) - 2 for (split, _), places in plan.places.items() if split == "held-out")
    chosen = sum(split == "selection" for split, _ in plan.places)
    assert plan.counts["held-out"] == 2 + held + 2 * chosen
    everything = make_plan(curves, ends=2, effects=effects)
    assert (plan == everything) == (everything.evaluations <= budget)


def test_budgets_as_they_are_typed() -> None:
    assert parse_budget(None) == SearchBudget()
    assert parse_budget(40) == parse_budget(" 40 ") == SearchBudget(evaluations=40)
    assert parse_budget("90s") == SearchBudget(seconds=90)
    assert parse_budget("1.5 h") == SearchBudget(seconds=5400)
    for text in ("0", "-3", "30 minutes", "m", "1e3", "", "٣"):
        with pytest.raises(SelectionError, match="budget: expected evaluations such as 200, or a time such as 30m"):
            parse_budget(text)


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
