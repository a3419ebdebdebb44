"""What a search will evaluate, in which order of importance, and what is left out where a budget does not suffice.

Importance: both ends of the curves; the effect of every head alone, all or none; the curves on the selection split,
one group after another, coarse before fine, each with two evaluations of what it chooses on the held-out split; then
all of them on the held-out split, in the same order. The first that does not fit ends the plan.

Nothing heavy is imported here: what a search costs can be read without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from diffract.errors import SelectionError, printable
from diffract.settings import MOST_IN_ROW, decimal_row

if TYPE_CHECKING:
    from diffract.corpora import Split
    from diffract.edits.edit import Edit

Which = Literal["best", "without-loss"]
"""What is chosen of a curve: its highest gain, or its furthest point without loss."""


@dataclass(frozen=True)
class Point:
    """A model as edits make it, and what tables say of it.

    Attributes:
        key: Equal for models that are known to be the same, wherever they are met.
        steps: The edits that make it of the live model; none for that model itself.
        at: Where it lies on its curve.
        labels: What tables say of it, such as order, fraction and heads.
    """

    key: Hashable
    steps: tuple[Edit, ...] = ()
    at: float = 0.0
    labels: Mapping[str, Any] = field(default_factory=dict)


UNCHANGED = Point("unchanged")
"""The live model itself."""


@dataclass(frozen=True)
class SearchCurve:
    """A row of models between two ends.

    Attributes:
        name: What is said of it while it is measured.
        labels: What tables say of all its points, such as order and seed.
        at: Where its points lie, ascending, both ends included.
        control: Whether it stands beside others to be compared with, and never gives the choice.
        group: What its points are called; where a budget does not suffice, groups that begin later are left out first.
        needs_effects: Whether its models are known only when the effects of single heads are.
        ends: Whether its first and its last point are models that are evaluated in any case.
        points: Its models, as far as they are planned and known.
    """

    name: str
    labels: Mapping[str, Any]
    at: tuple[float, ...]
    control: bool = False
    group: str = "points of curves"
    needs_effects: bool = False
    ends: bool = True
    points: tuple[Point, ...] = ()

    @property
    def between(self) -> tuple[float, ...]:
        """The places that cost evaluations of their own."""
        return self.at[1:-1] if self.ends else self.at


def parse_fractions(given: str | Sequence[float]) -> tuple[float, ...]:
    """Read ``FROM:TO:STEP``, a list ``0,0.1,0.5``, or numbers; ascending, with 0 and 1 always among them.

    Raises:
        SelectionError: They cannot be read, or leave 0 to 1.

    >>> parse_fractions("0:1:0.5"), parse_fractions([0.25])
    ((0.0, 0.5, 1.0), (0.0, 0.25, 1.0))
    """
    try:
        listed = given.split(",") if isinstance(given, str) and ":" not in given else given
        found = [float(v) for v in (decimal_row(listed) if isinstance(listed, str) else listed)]
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
    # Spans are halved level by level: a beginning of any length is coarse everywhere before it is fine anywhere.
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
class SearchBudget:
    """The most that a search may cost.

    Attributes:
        evaluations: How many evaluations there may be, of either split.
        seconds: How long evaluations may take together, about.
    """

    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SearchPlan:
    """What will be evaluated.

    Attributes:
        effects: Whether the effects of single units are measured.
        places: For each split and curve (by its number) where its points lie; a curve that is left out has none.
        counts: Evaluations in each split, at most: equal models are evaluated once.
        left_out: What the budget leaves out, in words.
    """

    effects: bool
    places: Mapping[tuple[Split, int], tuple[float, ...]]
    counts: Mapping[Split, int]
    left_out: tuple[str, ...] = ()

    @property
    def evaluations(self) -> int:
        """How many evaluations that are in all splits, at most."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Estimate:
    """What a search would cost.

    Attributes:
        evaluations: Evaluations in each split, at most.
        seconds_each: How long one evaluation takes in each split, as measured.
        seconds: How long all of them take.
        left_out: What a budget leaves out, in words.
    """

    evaluations: Mapping[Split, int]
    seconds_each: Mapping[Split, float]
    seconds: float
    left_out: tuple[str, ...] = field(default=())


def parse_budget(given: str | int | None) -> SearchBudget:
    """Read a number of evaluations, or a time such as ``90s``, ``30m``, ``2h``.

    Raises:
        SelectionError: It is neither.

    >>> parse_budget("200"), parse_budget("1.5h")
    (SearchBudget(evaluations=200, seconds=None), SearchBudget(evaluations=None, seconds=5400.0))
    """
    if given is None:
        return SearchBudget()
    text = str(given).strip()
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return SearchBudget(evaluations=int(text))
    if found := _TIME.fullmatch(text):
        return SearchBudget(seconds=float(found["value"]) * SECONDS[found["unit"]])
    raise SelectionError(f"budget: expected evaluations such as 200, or a time such as 30m; got {printable(given)!r}.")


def make_plan(
    curves: Sequence[SearchCurve],
    *,
    ends: int,
    effects: int = 0,
    splits: Sequence[Split] = SPLITS,
    budget: SearchBudget | None = None,
    seconds_each: Mapping[Split, float] | None = None,
) -> SearchPlan:
    """Return what will be evaluated.

    Args:
        curves: The curves; which models both of their ends are is known, and counted under ``ends``.
        ends: Models that are evaluated in every split in any case.
        effects: Single units whose effect is wanted, on the selection split.
        splits: What is evaluated; the held-out split alone where nothing is chosen.
        budget: The most that it may cost.
        seconds_each: How long one evaluation takes in each split; needed for a budget in seconds.

    Raises:
        SelectionError: The budget does not suffice for the ends and one point.
    """
    purse = _Purse(budget or SearchBudget(), seconds_each or {})
    fits = purse.take(dict.fromkeys(splits, ends))
    # Half of the heads' effects give no order: they are measured all or not at all, and only if one point of a curve
    # can be afforded beside them.
    alone: Mapping[Split, int] = {"selection": effects} if effects else {}
    measured = effects > 0 and purse.affords(Counter(alone) + Counter(FIRST)) and purse.take(alone)
    left_out = [f"effects of {effects} single heads, and what needs them"] if effects and not measured else []
    known = {i: curve for i, curve in enumerate(curves) if measured or not curve.needs_effects}
    taken: dict[tuple[Split, int], list[float]] = {}
    missed: Counter[tuple[Split, str]] = Counter()
    for split, number, at in _by_importance(known, splits):
        first = split == "selection" and (split, number) not in taken
        # Nothing is taken after the first that is missed: cheaper ones of less importance would take its room.
        if not missed and purse.take(FIRST if first else {split: 1}):
            taken.setdefault((split, number), []).append(at)
        else:
            missed[split, curves[number].group] += 1
    if not fits or (missed and not taken):
        # The ends in each split, one point of one curve, and what may be chosen of it where results are reported.
        least = len(splits) * ends + 1 + CHOSEN * (len(splits) - 1)
        raise SelectionError(f"budget: expected more, {least} evaluations are the least.")
    left_out += [f"{count} {group} on the {split} split" for (split, group), count in missed.items()]
    places = {}
    for split in splits:
        for number, curve in known.items():
            between = taken.get((split, number), [])
            # Where something is chosen, all curves share their ends, so that ends alone are no curve, unless there is
            # nothing between them. Where nothing is, every pair of models has ends of its own, which are worth a row.
            if between or (curve.ends and (not curve.between or "selection" not in splits)):
                ends_of = {curve.at[0], curve.at[-1]} if curve.ends else set()
                places[split, number] = tuple(sorted({*between, *ends_of}))
    return SearchPlan(measured, places, dict(purse.spent), tuple(left_out))


class _Purse:
    """What has been spent, and whether there is more."""

    def __init__(self, budget: SearchBudget, seconds_each: Mapping[Split, float]) -> None:
        self.budget, self.seconds_each = budget, seconds_each
        self.spent: Counter[Split] = Counter()

    def affords(self, counts: Mapping[Split, int]) -> bool:
        """Whether there is enough left."""
        after, limit, seconds = self.spent + Counter(counts), self.budget.evaluations, self.budget.seconds
        if limit is not None and after.total() > limit:
            return False
        return seconds is None or cost(after, self.seconds_each) <= seconds

    def take(self, counts: Mapping[Split, int]) -> bool:
        """Spend evaluations in each split, if there is enough left."""
        if not self.affords(counts):
            return False
        self.spent += Counter(counts)
        return True


def cost(counts: Mapping[Split, int], seconds_each: Mapping[Split, float]) -> float:
    """Return the seconds that evaluations take."""
    return sum(count * seconds_each[split] for split, count in counts.items())


def _by_importance(curves: Mapping[int, SearchCurve], splits: Sequence[Split]) -> Iterator[tuple[Split, int, float]]:
    """Yield split, number of a curve, and place between its ends; of one group a point of each curve before the next.

    That way a budget that ends early leaves all curves of a group equally fine.
    """
    longest = max((len(curve.between) for curve in curves.values()), default=0)
    for split in splits:
        for group in dict.fromkeys(curve.group for curve in curves.values()):
            members = [
                (i, curve.between, coarse_first(len(curve.between)))
                for i, curve in curves.items()
                if curve.group == group
            ]
            for level in range(longest):
                for i, between, order in members:
                    if level < len(order):
                        yield split, i, between[order[level]]
