"""What a budget buys, counted by hand, and that it is never exceeded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.corpora import Split
from diffract.errors import SelectionError
from diffract.search.plan import Budget, Sketch, make_plan, parse_budget

AT = (0.0, 0.25, 0.5, 0.75, 1.0)
GREEDY = Sketch({"order": "greedy"}, AT, needs_effects=True)
CHEAP = Sketch({"order": "magnitude"}, AT)
REVERSED = Sketch({"order": "magnitude", "reverse": True}, AT, control=True, group="points of reversed curves")


def test_without_a_budget_everything_is_done() -> None:
    plan = make_plan([GREEDY, CHEAP, REVERSED], ends=3, effects=8)
    assert plan.effects
    assert plan.left_out == ()
    assert set(plan.points.values()) == {(1, 2, 3)}
    assert len(plan.points) == 6
    # selection: 3 ends, 8 heads, 3 curves of 3; held-out: 3 ends, 3 curves of 3, and 2 chosen points of each at most
    assert plan.counts == {"selection": 3 + 8 + 9, "held-out": 3 + 9 + 6}


def test_coarse_points_of_all_curves_come_before_fine_ones_of_any() -> None:
    plan = make_plan([CHEAP, CHEAP], ends=1, budget=Budget(evaluations=2 + 2 * 3 + 1))
    assert plan.points == {("selection", 0): (1, 2), ("selection", 1): (2,)}
    assert plan.evaluations == 9
    assert plan.left_out == ("3 points of curves on the selection split", "6 points of curves on the held-out split")


def test_reversed_curves_come_last_on_each_split() -> None:
    plan = make_plan([CHEAP, REVERSED, CHEAP], ends=1, budget=Budget(evaluations=2 + 3 * (3 + 2) + 6 + 1))
    assert plan.points == {
        **{("selection", curve): (1, 2, 3) for curve in range(3)},
        ("held-out", 0): (1, 2, 3),
        ("held-out", 2): (1, 2, 3),
        ("held-out", 1): (2,),
    }
    assert plan.left_out == ("2 points of reversed curves on the held-out split",)


def test_effects_are_measured_all_or_not_at_all() -> None:
    few = make_plan([GREEDY, CHEAP], ends=1, effects=8, budget=Budget(evaluations=2 + 8 + 2))
    assert not few.effects
    assert few.left_out[0] == "effects of 8 single heads, and what needs them"
    assert all(curve == 1 for _, curve in few.points)
    enough = make_plan([GREEDY, CHEAP], ends=1, effects=8, budget=Budget(evaluations=2 + 8 + 3))
    assert enough.effects
    assert enough.points == {("selection", 0): (2,)}


def test_a_budget_of_time_counts_what_each_split_takes() -> None:
    seconds: dict[Split, float] = {"selection": 1.0, "held-out": 10.0}
    plan = make_plan([CHEAP], ends=1, budget=Budget(seconds=33.5), seconds_each=seconds)  # 11 + 1 + 20 + 1
    assert plan.counts == {"selection": 3, "held-out": 3}
    with pytest.raises(SelectionError, match="budget: expected more"):
        make_plan([CHEAP], ends=1, budget=Budget(seconds=31.5), seconds_each=seconds)


def test_where_nothing_is_chosen_only_one_split_counts() -> None:
    plan = make_plan([CHEAP], ends=4, splits=("held-out",))
    assert plan.counts == {"held-out": 7}
    with pytest.raises(SelectionError, match="5 evaluations are the least"):
        make_plan([CHEAP], ends=4, splits=("held-out",), budget=Budget(evaluations=4))


@given(st.integers(1, 80), st.integers(0, 12), st.integers(1, 9))
def test_a_budget_is_never_exceeded(budget: int, effects: int, inner: int) -> None:
    at = tuple(i / (inner + 1) for i in range(inner + 2))
    curves = [
        Sketch({}, at, needs_effects=effects > 0),
        Sketch({}, at),
        Sketch({}, at, group="points of reversed curves"),
    ]
    try:
        plan = make_plan(curves, ends=2, effects=effects, budget=Budget(evaluations=budget))
    except SelectionError:
        assert budget < 7
        return
    assert plan.evaluations <= budget
    held = sum(len(points) for (split, _), points in plan.points.items() if split == "held-out")
    chosen = sum(split == "selection" for split, _ in plan.points)
    assert plan.counts["held-out"] == 2 + held + 2 * chosen
    everything = make_plan(curves, ends=2, effects=effects)
    assert (plan == everything) == (everything.evaluations <= budget)


def test_budgets_as_they_are_typed() -> None:
    assert parse_budget(None) == Budget()
    assert parse_budget(40) == parse_budget(" 40 ") == Budget(evaluations=40)
    assert parse_budget("90s") == Budget(seconds=90)
    assert parse_budget("1.5 h") == Budget(seconds=5400)
    for text in ("0", "-3", "30 minutes", "m", "1e3", "", "٣"):
        with pytest.raises(SelectionError, match="budget: expected evaluations such as 200, or a time such as 30m"):
            parse_budget(text)
