"""Curves: states of a model along a number, such as the share of heads that is rewound."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from diffract.edits.settings import Settings
from diffract.errors import SelectionError, printable

MOST = 1000
"""Fractions of one curve."""


@dataclass(frozen=True)
class State:
    """A model as steps make it.

    Attributes:
        key: Equal for states that are known to be the same.
        steps: What makes it of the model that is searched; nothing for that model itself.
    """

    key: Hashable
    steps: tuple[Settings, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """A curve before its states are known: what planning needs.

    Attributes:
        labels: What tables say of all its points, such as order and seed.
        at: Where its points lie, ascending, both ends included.
        control: Whether it stands beside others to be compared with, and never gives the choice.
        group: What its points are called; where a budget does not suffice, groups that begin later are left out first.
        needs_effects: Whether its states are known only when the effects of single heads are.
    """

    labels: Mapping[str, Any]
    at: tuple[float, ...]
    control: bool = False
    group: str = "points of curves"
    needs_effects: bool = False


@dataclass(frozen=True)
class Point:
    """A place on a curve.

    Attributes:
        at: Where.
        state: The model there.
        labels: What tables say of it, those of its curve included.
    """

    at: float
    state: State
    labels: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A curve, its points ascending."""

    sketch: Sketch
    points: tuple[Point, ...] = field(default=())


def parse_fractions(given: str | Sequence[float]) -> tuple[float, ...]:
    """Read ``FROM:TO:STEP``, a list ``0,0.1,0.5``, or numbers; ascending, with 0 and 1 always among them.

    Raises:
        SelectionError: They cannot be read, or leave 0 to 1.

    >>> parse_fractions("0:1:0.5"), parse_fractions([0.25])
    ((0.0, 0.5, 1.0), (0.0, 0.25, 1.0))
    """
    try:
        found = [float(v) for v in (_row(given) if isinstance(given, str) else given)]
    except (ValueError, TypeError, ArithmeticError, InvalidOperation):
        found = [-1.0]
    if not all(0 <= v <= 1 for v in found) or len(found) > MOST:
        raise SelectionError(
            f"fractions: expected FROM:TO:STEP within 0 to 1, such as 0:1:0.125, or a list such as 0,0.1,0.5; "
            f"got {printable(given)!r}."
        )
    return tuple(sorted({0.0, 1.0, *found}))


def _row(text: str) -> list[Decimal]:
    if ":" not in text:
        return [Decimal(word) for word in text.split(",")]
    first, last, step = (Decimal(word) for word in text.split(":"))
    count = int((last - first) / step) + 1
    if not (step > 0 and last >= first) or count > MOST:
        raise ValueError(text)
    return [first + i * step for i in range(count)]


def coarse_first(count: int) -> list[int]:
    """Return 0 .. count - 1 in an order in which every beginning is spread evenly, by halving.

    >>> coarse_first(7)
    [3, 1, 5, 0, 2, 4, 6]
    """
    found, spans = [], [(0, count)]
    while spans:
        spans = [(a, b) for a, b in spans if a < b]
        found += [(a + b) // 2 for a, b in spans]
        spans = [span for a, b in spans for span in ((a, (a + b) // 2), ((a + b) // 2 + 1, b))]
    return found
