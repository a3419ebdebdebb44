"""Scores of a live model as edits make it, on the split for choosing and on that for reporting; each model once."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import polars as pl

from diffract.corpora import Split
from diffract.edits.live import LiveModel
from diffract.errors import CorpusError, printable
from diffract.evaluate import Task, paired, summarise
from diffract.search.plan import SPLITS, UNCHANGED, Point
from diffract.settings import Progress

Rows = list[dict[str, Any]]

RESAMPLES = 2000
"""Draws of every bootstrap, and sign flips of every test, unless more are needed for many tests at once."""


class Judge(Protocol):
    """What evaluates a model as it stands: ``diffract.evaluate.Evaluator``."""

    def scores(self) -> pl.DataFrame:
        """Return task, item, value, weight, output."""
        ...


class Scorer:
    """Scores points of a search, and remembers them.

    Attributes:
        tasks: The tasks of each split; their names are the same in both.
        points: The first point that was met of each model, by the model's number in tables; the live model itself is 0.
        total: How many evaluations there will be.
    """

    def __init__(
        self,
        live: LiveModel,
        judges: Mapping[Split, Judge],
        tasks: Mapping[Split, Sequence[Task]],
        *,
        progress: Progress | None = None,
    ) -> None:
        """Take a model and what evaluates it.

        Args:
            live: The model.
            judges: What evaluates it on each split.
            tasks: What these evaluate it on, for each split.
            progress: Takes evaluations done, all of them, and what is done now.
        """
        self.live, self.judges, self.tasks, self.progress = live, judges, tasks, progress
        self.points: list[Point] = [UNCHANGED]
        self.total = 0
        self._numbers: dict[Hashable, int] = {UNCHANGED.key: 0}
        self._what = ""
        self._found: dict[tuple[Split, int], pl.DataFrame] = {}
        self._rows: dict[tuple[Split, int], Rows] = {}

    @property
    def done(self) -> int:
        """How many evaluations were made."""
        return len(self._found)

    def number(self, point: Point) -> int:
        """Return the number that stands for a point's model in tables."""
        if point.key not in self._numbers:
            self._numbers[point.key] = len(self.points)
            self.points.append(point)
        return self._numbers[point.key]

    def score(self, split: Split, point: Point, what: str = "") -> pl.DataFrame:
        """Return the scores of a point's model, which is edited and evaluated when it is met for the first time."""
        key = split, self.number(point)
        if key not in self._found:
            self._what = what
            self.tell(0.0)
            with self.live.edited(*point.steps):
                self._found[key] = self.judges[split].scores()
            if key[1] == 0 and all((other, 0) in self._found for other in SPLITS):
                # As soon as the items of both splits are known: nothing that is chosen on items of the other counts.
                refuse_overlap(*(self._found[other, 0] for other in SPLITS))
        return self._found[key]

    def tell(self, share: float) -> None:
        """Say how far work has come: a share of the evaluation that is being made."""
        if self.progress:
            done = self.done + share
            self.progress(done, max(self.total, done, 1), self._what)

    def rows(self, split: Split, point: Point) -> Rows:
        """Return for each task the quality of a point and its paired difference to the live model, with intervals.

        The first row is that of the task that decides.
        """
        key = split, self.number(point)
        if key not in self._rows:
            items, before, tasks = self.score(split, point), self.score(split, UNCHANGED), self.tasks[split]
            qualities = summarise(items, tasks, resamples=RESAMPLES).rows(named=True)
            differences = difference_rows(before, items, tasks)
            kept = ("task", "quality", "low", "high", "items")
            self._rows[key] = [
                {"state": key[1], "split": split, **{k: q[k] for k in kept}, **d}
                for q, d in zip(qualities, differences, strict=True)
            ]
        return self._rows[key]

    def labelled(self, points: Iterable[Point]) -> Rows:
        """Return the rows of points, each with the point's labels, in all splits in which they were scored."""
        return [
            {**point.labels, **row}
            for point in points
            for split in self.tasks
            if (split, self._numbers.get(point.key)) in self._found
            for row in self.rows(split, point)
        ]

    def items(self) -> pl.DataFrame:
        """Return the scores of all items of all models."""
        frames = [
            frame.select(pl.lit(number, pl.Int32).alias("state"), pl.lit(split).alias("split"), pl.all())
            for (split, number), frame in sorted(self._found.items())
        ]
        return pl.concat(frames)


def difference_rows(
    tuned: pl.DataFrame, items: pl.DataFrame, tasks: Sequence[Task], *, resamples: int = RESAMPLES
) -> Rows:
    """Return for each task the difference to the tuned model and the gain, both with their interval, and p.

    The gain is the difference with the sign that makes better positive.
    """
    found = []
    for task, row in zip(tasks, paired(tuned, items, tasks, resamples=resamples).rows(named=True), strict=True):
        low, high = row["low"], row["high"]
        # Subtracted from zero instead of negated, and zero added to the gain: a table shall not say -0.0.
        gains = (low, high) if task.better == "higher" or low is None else (0.0 - high, 0.0 - low)
        found.append({
            "difference": row["difference"], "diff_low": low, "diff_high": high,
            "gain": row["gain"] + 0.0, "gain_low": gains[0], "gain_high": gains[1], "p": row["p"],
        })  # fmt: skip
    return found


def seconds_of(judges: Mapping[Split, Judge]) -> dict[Split, float]:
    """Return how long one evaluation takes in each split, measured; the judges must keep no results."""
    found = {}
    for split, judge in judges.items():
        begun = time.monotonic()
        judge.scores()
        found[split] = time.monotonic() - begun
    return found


def refuse_overlap(selection: pl.DataFrame, held_out: pl.DataFrame) -> None:
    """Raise if what is chosen on and what is reported on have items in common.

    Raises:
        CorpusError: An item is in both.
    """
    common = selection.join(held_out, on=["task", "item"], how="semi")
    if not common.is_empty():
        row = common.row(0, named=True)
        raise CorpusError(
            f"task {printable(row['task'])!r}: {common.height} items are in both the selection and the held-out split, "
            f"first {printable(row['item'])!r}. What is chosen on them cannot be reported on them; take a task that "
            "has both splits."
        )
