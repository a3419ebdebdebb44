"""What a search will evaluate, in which order of importance, and what is left out where a budget does not suffice.

Importance: both ends of the curves; the effect of every head alone, all or none; the curves on the selection split,
one group after another, coarse before fine, each with two evaluations of what it chooses on the held-out split; then
all of them on the held-out split, in the same order. The first that does not fit ends the plan.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffract.corpora import Split
from diffract.edits.edit import Edit
from diffract.errors import SelectionError, printable
from diffract.settings import MOST_IN_ROW, decimal_row


@dataclass(frozen=True)
class State:
    """A model as steps make it.

    Attributes:
        key: Equal for states that are known to be the same.
        steps: What makes it of the model that is searched; nothing for that model itself.
    """

    key: Hashable
    steps: tuple[Edit, ...] = ()


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
        words = given.split(",") if isinstance(given, str) and ":" not in given else given
        found = [float(v) for v in (decimal_row(words) if isinstance(words, str) else words)]
    except (ValueError, TypeError):
        found = [-1.0]
    if not all(0 <= v <= 1 for v in found) or len(found) > MOST_IN_ROW:
        raise SelectionError(
            f"fractions: expected FROM:TO:STEP within 0 to 1, such as 0:1:0.125, or a list such as 0,0.1,0.5; "
            f"got {printable(given)!r}."
        )
    return tuple(sorted({0.0, 1.0, *found}))


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


SPLITS: tuple[Split, Split] = ("selection", "held-out")

CHOSEN = 2
"""Points of a curve that are chosen, at most: the best, and the furthest without loss."""

FIRST: Mapping[Split, int] = {"selection": 1, "held-out": CHOSEN}
"""What the first point of a curve costs."""

_TIME = re.compile(r"(?P<value>\d+(\.\d+)?)\s*(?P<unit>s|m|min|h)", re.ASCII)
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """The most that a search may cost.

    Attributes:
        evaluations: How many, of either split.
        seconds: How long they may take, about.
    """

    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What will be evaluated.

    Attributes:
        effects: Whether the effects of single units are.
        points: For each split and curve the numbers of its points between both ends.
        counts: Evaluations in each split, at most: equal states are evaluated once.
        left_out: What is not, in words.
    """

    effects: bool
    points: Mapping[tuple[Split, int], tuple[int, ...]]
    counts: Mapping[Split, int]
    left_out: tuple[str, ...] = ()

    @property
    def evaluations(self) -> int:
        """How many evaluations that are, at most."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Estimate:
    """What a search would cost.

    Attributes:
        evaluations: In each split, at most.
        seconds_each: Of one evaluation in each split, as measured.
        seconds: Of all.
        left_out: What a budget left out.
    """

    evaluations: Mapping[Split, int]
    seconds_each: Mapping[Split, float]
    seconds: float
    left_out: tuple[str, ...] = field(default=())


def parse_budget(given: str | int | None) -> Budget:
    """Read a number of evaluations, or a time such as ``90s``, ``30m``, ``2h``.

    Raises:
        SelectionError: It is neither.

    >>> parse_budget("200"), parse_budget("1.5h")
    (Budget(evaluations=200, seconds=None), Budget(evaluations=None, seconds=5400.0))
    """
    if given is None:
        return Budget()
    text = str(given).strip()
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return Budget(evaluations=int(text))
    if found := _TIME.fullmatch(text):
        return Budget(seconds=float(found["value"]) * SECONDS[found["unit"]])
    raise SelectionError(f"budget: expected evaluations such as 200, or a time such as 30m; got {printable(given)!r}.")


def make_plan(
    sketches: Sequence[Sketch],
    *,
    ends: int,
    effects: int = 0,
    splits: Sequence[Split] = SPLITS,
    budget: Budget | None = None,
    seconds_each: Mapping[Split, float] | None = None,
) -> Plan:
    """Return what will be evaluated.

    Args:
        sketches: The curves; which states both of their ends are is known, and counted under ``ends``.
        ends: States that are evaluated in every split in any case.
        effects: Single units whose effect is wanted, on the selection split.
        splits: What is evaluated; the held-out split alone where nothing is chosen.
        budget: The most that it may cost.
        seconds_each: Of one evaluation in each split; needed for a budget in seconds.

    Raises:
        SelectionError: The budget does not suffice for the ends and one point.
    """
    purse = _Purse(budget or Budget(), seconds_each or {})
    fits = purse.take(dict.fromkeys(splits, ends))
    alone: dict[Split, int] = {"selection": effects}
    measured = effects > 0 and purse.affords(_sum(alone, FIRST)) and purse.take(alone)
    left_out = [f"effects of {effects} single heads, and what needs them"] if effects and not measured else []
    taken: dict[tuple[Split, int], list[int]] = {}
    missed: Counter[tuple[Split, str]] = Counter()
    for split, curve, point in _by_importance(sketches, splits, effects=measured):
        first = split == "selection" and (split, curve) not in taken
        if not missed and purse.take(FIRST if first else {split: 1}):
            taken.setdefault((split, curve), []).append(point)
        else:
            missed[split, sketches[curve].group] += 1
    if not fits or (missed and not taken):
        least = len(splits) * ends + 1 + CHOSEN * (len(splits) - 1)
        raise SelectionError(f"budget: expected more, {least} evaluations are the least.")
    left_out += [f"{count} {group} on the {split} split" for (split, group), count in missed.items()]
    points = {key: tuple(sorted(found)) for key, found in taken.items()}
    return Plan(measured, points, dict(purse.spent), tuple(left_out))


class _Purse:
    """What has been spent, and whether there is more."""

    def __init__(self, budget: Budget, seconds_each: Mapping[Split, float]) -> None:
        self.budget, self.seconds_each = budget, seconds_each
        self.spent: dict[Split, int] = {}

    def affords(self, counts: Mapping[Split, int]) -> bool:
        """Whether there is enough left."""
        after, limit, seconds = _sum(self.spent, counts), self.budget.evaluations, self.budget.seconds
        if limit is not None and sum(after.values()) > limit:
            return False
        return seconds is None or cost(after, self.seconds_each) <= seconds

    def take(self, counts: Mapping[Split, int]) -> bool:
        """Spend evaluations in each split, if there is enough left."""
        if not self.affords(counts):
            return False
        self.spent = _sum(self.spent, counts)
        return True


def _sum(one: Mapping[Split, int], other: Mapping[Split, int]) -> dict[Split, int]:
    found = dict(one)
    for split, count in other.items():
        found[split] = found.get(split, 0) + count
    return found


def cost(counts: Mapping[Split, int], seconds_each: Mapping[Split, float]) -> float:
    """Return the seconds that evaluations take."""
    return sum(count * seconds_each[split] for split, count in counts.items())


def _by_importance(
    sketches: Sequence[Sketch], splits: Sequence[Split], *, effects: bool
) -> Iterator[tuple[Split, int, int]]:
    """Yield split, curve and point between both ends."""
    can_be = [(i, s) for i, s in enumerate(sketches) if effects or not s.needs_effects]
    longest = max((len(s.at) for _, s in can_be), default=0)
    for split in splits:
        for group in dict.fromkeys(s.group for _, s in can_be):
            curves = [(i, coarse_first(len(s.at) - 2)) for i, s in can_be if s.group == group]
            for level in range(longest):
                for i, order in curves:
                    if level < len(order):
                        yield split, i, 1 + order[level]
