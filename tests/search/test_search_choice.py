"""Which point is chosen, by cases that are counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from diffract.search.plan import Point
from diffract.search.run import best_point, furthest_without_loss, winner


def points(*at: float) -> list[Point]:
    return [Point(a, at=a) for a in at]


def gains(*triples: tuple[float, float, float]) -> list[dict[str, float]]:
    return [{"gain": g, "gain_low": low, "gain_high": high} for g, low, high in triples]


CURVE = points(0, 0.25, 0.5, 0.75, 1)
MEASURED = gains((0, 0, 0), (0.3, 0.1, 0.5), (0.3, 0.2, 0.4), (-0.1, -0.4, 0.1), (-0.5, -0.7, -0.3))


def test_best_is_the_highest_gain_and_of_equals_the_nearest() -> None:
    assert best_point(CURVE, MEASURED).at == 0.25
    assert best_point(CURVE[:1] + CURVE[3:], MEASURED[:1] + MEASURED[3:]).at == 0


@pytest.mark.parametrize(
    ("tolerance", "want"),
    [
        (None, 0.75),  # the interval of its gain, -0.4 to 0.1, reaches 0
        (0.0, 0.5),  # no loss at all can be excluded only where the whole interval is a gain
        (0.39, 0.5),
        (0.4, 0.75),  # a loss of more than 0.4 is excluded
        (0.7, 1.0),
    ],
)
def test_furthest_without_loss(tolerance: float | None, want: float) -> None:
    assert furthest_without_loss(CURVE, MEASURED, tolerance).at == want


def test_the_tuned_model_is_always_without_loss() -> None:
    lost = gains((0, 0, 0), (-1, -2, -0.5))
    assert furthest_without_loss(points(0, 1), lost, None).at == 0
    assert furthest_without_loss(points(0, 1), lost, 0.1).at == 0


def test_controls_never_win() -> None:
    def row(name: str, gain: float, far: float, *, control: bool = False, which: str = "best") -> dict[str, Any]:
        return {"name": name, "selection_gain": gain, "far": far, "control": control, "which": which}

    rows = [row("greedy", 1, 0.1), row("magnitude", 1, 0.5), row("random", 5, 0.9, control=True)]
    rows += [row("greedy", -1, 0.2, which="without-loss"), row("magnitude", 0, 0.1, which="without-loss")]
    assert winner(rows, "best", lambda r: r["far"])["name"] == "greedy"  # the first of equals
    assert winner(rows, "without-loss", lambda r: r["far"])["name"] == "greedy"
    assert winner([], "best", lambda r: r["far"]) is None
