"""Scores of states of one live model, on the split for choosing and on the one for reporting; each state once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import polars as pl

from diffract.corpora import Split
from diffract.edits.live import LiveModel
from diffract.errors import CorpusError, printable
from diffract.evaluate import Task, paired, summarise
from diffract.search.plan import SPLITS, Curve, Point, State
from diffract.settings import Progress

TUNED = State("tuned")
"""The model itself."""

RESAMPLES = 2000


class Scores(Protocol):
    """What evaluates a model as it stands: ``diffract.evaluate.Evaluator``."""

    def scores(self) -> pl.DataFrame:
        """Return task, item, value, weight, output."""
        ...


class Scorer:
    """Scores states of a model.

    Attributes:
        tasks: For each split; their names are the same.
        numbers: Of each state, by its key; the model itself is 0.
        states: Each state by its number.
        total: How many evaluations there will be.
    """

    def __init__(
        self,
        live: LiveModel,
        evaluators: Mapping[Split, Scores],
        tasks: Mapping[Split, Sequence[Task]],
        *,
        progress: Progress | None = None,
    ) -> None:
        """Take a model and what evaluates it.

        Args:
            live: The model.
            evaluators: For each split.
            tasks: What these score, for each split.
            progress: Takes evaluations done, all of them, and what is done now.
        """
        self.live, self.evaluators, self.tasks, self.progress = live, evaluators, tasks, progress
        self.numbers: dict[Hashable, int] = {TUNED.key: 0}
        self.states: list[State] = [TUNED]
        self.total = 0
        self._what = ""
        self._found: dict[tuple[Split, int], pl.DataFrame] = {}
        self._rows: dict[tuple[Split, int], list[dict[str, Any]]] = {}

    @property
    def first(self) -> str:
        """The name of the task that decides."""
        return self.tasks[SPLITS[0]][0].name

    @property
    def done(self) -> int:
        """How many evaluations were made."""
        return len(self._found)

    def number(self, state: State) -> int:
        """Return the number that stands for a state in tables."""
        if state.key not in self.numbers:
            self.numbers[state.key] = len(self.states)
            self.states.append(state)
        return self.numbers[state.key]

    def score(self, split: Split, state: State, what: str = "") -> pl.DataFrame:
        """Return the scores of a state."""
        key = split, self.number(state)
        if key not in self._found:
            self._what = what
            self.tell(0.0)
            with self.live.edited(*state.steps):
                self._found[key] = self.evaluators[split].scores()
            if state.key == TUNED.key and all((other, 0) in self._found for other in SPLITS):
                refuse_overlap(*(self._found[other, 0] for other in SPLITS))
        return self._found[key]

    def scored(self, split: Split, state: State) -> bool:
        """Whether a state was scored already."""
        return (split, self.numbers.get(state.key)) in self._found

    def tell(self, share: float) -> None:
        """Say how far work has come: a share of the evaluation that is being made."""
        if self.progress:
            done = self.done + share
            self.progress(done, max(self.total, done, 1), self._what)

    def rows(self, split: Split, state: State, what: str = "") -> list[dict[str, Any]]:
        """Return for each task the quality of a state and its paired difference to the model, with intervals."""
        key = split, self.number(state)
        if key not in self._rows:
            items, tuned, tasks = self.score(split, state, what), self.score(split, TUNED), self.tasks[split]
            qualities = summarise(items, tasks, resamples=RESAMPLES).rows(named=True)
            differences = difference_rows(tuned, items, tasks)
            kept = ("task", "quality", "low", "high", "items")
            self._rows[key] = [
                {"state": key[1], "split": split, **{k: q[k] for k in kept}, **d}
                for q, d in zip(qualities, differences, strict=True)
            ]
        return self._rows[key]

    def items(self) -> pl.DataFrame:
        """Return the scores of all items in all states."""
        frames = [
            frame.select(pl.lit(number, pl.Int32).alias("state"), pl.lit(split).alias("split"), pl.all())
            for (split, number), frame in sorted(self._found.items())
        ]
        return pl.concat(frames)


def difference_rows(
    tuned: pl.DataFrame, items: pl.DataFrame, tasks: Sequence[Task], *, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Return for each task the difference to the tuned model and the gain, both with their interval, and p.

    The gain is the difference with the sign that makes better positive.
    """
    found = []
    for task, row in zip(tasks, paired(tuned, items, tasks, resamples=resamples).rows(named=True), strict=True):
        low, high = row["low"], row["high"]
        gains = (low, high) if task.better == "higher" else (0.0 - high, 0.0 - low)  # which makes no -0.0
        found.append({
            "difference": row["difference"], "diff_low": low, "diff_high": high,
            "gain": row["gain"] + 0.0, "gain_low": gains[0], "gain_high": gains[1], "p": row["p"],
        })  # fmt: skip
    return found


def seconds_of(evaluators: Mapping[Split, Scores]) -> dict[Split, float]:
    """Return how long one evaluation takes in each split, measured; they must keep no results."""
    found = {}
    for split, evaluator in evaluators.items():
        begun = time.monotonic()
        evaluator.scores()
        found[split] = time.monotonic() - begun
    return found


def refuse_overlap(selection: pl.DataFrame, held_out: pl.DataFrame) -> None:
    """Raise if what is chosen on and what is reported on have items in common.

    Raises:
        CorpusError: They have.
    """
    common = selection.join(held_out, on=["task", "item"], how="semi")
    if not common.is_empty():
        row = common.row(0, named=True)
        raise CorpusError(
            f"task {printable(row['task'])!r}: {common.height} items are in both the selection and the held-out split, "
            f"first {printable(row['item'])!r}. What is chosen on them cannot be reported on them; take a task that "
            "has both splits."
        )


Which = Literal["best", "without-loss"]

NUMBERS = ("quality", "low", "high", "gain", "gain_low", "gain_high", "p")
"""What is said of a chosen point in each split."""


def best(points: Sequence[Point], gains: Sequence[Mapping[str, Any]]) -> Point:
    """Return the point of the highest gain, of equal ones the nearest to the tuned model; that one gains 0."""
    pairs = zip(points, gains, strict=True)
    return max(pairs, key=lambda pair: (pair[1]["gain"], -pair[0].at))[0]


def without_loss(points: Sequence[Point], gains: Sequence[Mapping[str, Any]], tolerance: float | None) -> Point:
    """Return the furthest point without loss; the tuned model has none.

    Without a tolerance that is: no loss is shown, the paired interval of the gain reaches 0 (its upper end is not
    below). With a tolerance t: a loss of more than t is excluded, the interval's lower end is at least -t.
    """
    pairs = zip(points, gains, strict=True)
    return max((p for p, g in pairs if p.at == 0 or is_without_loss(g, tolerance)), key=lambda p: p.at)


def is_without_loss(gain: Mapping[str, Any], tolerance: float | None) -> bool:
    """Whether a gain with its interval counts as no loss."""
    return gain["gain_high"] >= 0 if tolerance is None else gain["gain_low"] >= -tolerance


def chosen_points(scorer: Scorer, curves: Iterable[Curve], tolerance: float | None) -> list[dict[str, Any]]:
    """Return two rows for each curve: its best point and the furthest without loss, with numbers of both splits.

    The task that is first decides. What is chosen is scored on the held-out split, if it was not yet.
    """
    found = []
    for curve in curves:
        gains = [of_first(scorer, "selection", point) for point in curve.points]
        chosen: dict[Which, Point] = {
            "best": best(curve.points, gains),
            "without-loss": without_loss(curve.points, gains, tolerance),
        }
        found += [chosen_row(scorer, which, point, curve) for which, point in chosen.items()]
    return found


def chosen_row(scorer: Scorer, which: Which, point: Point, curve: Curve) -> dict[str, Any]:
    """Return what both splits say of a point."""
    row = {**point.labels, "which": which, "state": scorer.number(point.state), "control": curve.sketch.control}
    for split in SPLITS:
        numbers, prefix = of_first(scorer, split, point), split.replace("-", "_")
        row |= {f"{prefix}_{name}": numbers[name] for name in NUMBERS}
    return {"task": scorer.first, **row}


def of_first(scorer: Scorer, split: Split, point: Point) -> dict[str, Any]:
    """Return the row of the task that decides."""
    return scorer.rows(split, point.state, "held-out")[0]


def winner(rows: Iterable[Mapping[str, Any]], which: str, far: Callable[[Mapping[str, Any]], float]) -> Any:
    """Return the row that is chosen of all curves that are no controls, by the selection split; the first of equals.

    ``best`` has the highest gain, ``without-loss`` goes furthest.
    """
    measure = far if which == "without-loss" else lambda row: row["selection_gain"]
    return max((row for row in rows if row["which"] == which and not row["control"]), key=measure, default=None)
