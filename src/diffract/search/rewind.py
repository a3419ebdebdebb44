"""``diffract search rewind``: which heads of a tuned model can go back to the base, and what that gains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch

from diffract.edits import Interpolate, Rewind
from diffract.edits.bench import Other
from diffract.edits.edit import Shared
from diffract.edits.heads import Units, change_norms, find_units, least_first, reference_scores, shuffled
from diffract.edits.rule import rounded
from diffract.errors import SelectionError, choose
from diffract.evaluate import Task, load_tasks
from diffract.run import Run
from diffract.search.plan import SPLITS, Estimate, Plan, Point, Sketch, State, parse_fractions
from diffract.search.predictions import Sample, activation_changes, first_order_gains, take_sample, task_texts
from diffract.search.run import Asked, Found, run_search
from diffract.search.scorer import RESAMPLES, TUNED, Scorer, Which, difference_rows
from diffract.search.stage import How, Model, Rows, Stage, build, in_memory, measure
from diffract.settings import Progress
from diffract.stats import holm, spearman
from diffract.tables import CHOICE, EFFECTS, ITEMS, ON_CURVE, ORDER_ROWS, QUALITY, frame

HeadOrder = Literal["greedy", "reference", "magnitude", "random", "first-order", "activation"]
ORDERS: tuple[HeadOrder, ...] = get_args(HeadOrder)

BEST_FIRST: tuple[HeadOrder, ...] = ("greedy", "first-order")
"""Orders whose score is a gain: the highest goes first. Of the others the lowest does."""

Scores = Mapping[str, float]
"""One number for each head by its name, in the model's order."""


@dataclass(frozen=True)
class Ordered:
    """Heads in the order in which they are rewound.

    Attributes:
        order: How it was found.
        seed: Of order random.
        reverse: Whether it is taken from its end.
        names: The heads.
    """

    order: HeadOrder
    seed: int
    reverse: bool
    names: tuple[str, ...]


def parse_orders(given: str | Sequence[str] | None, *, reference: bool) -> tuple[HeadOrder, ...]:
    """Read names of orders, separated by commas; all that can be had for nothing.

    Args:
        given: Their names.
        reference: Whether there is a reference, without which order ``reference`` cannot be had.

    Raises:
        SelectionError: One is unknown, or needs a reference.
    """
    if given is None:
        return tuple(order for order in ORDERS if order != "reference" or reference)
    words = given.split(",") if isinstance(given, str) else given
    wanted = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    for word in wanted:
        choose("order", word, ORDERS)
    if "reference" in wanted and not reference:
        raise SelectionError("order reference needs a reference: the base tuned on reference text. Pass --reference.")
    if not wanted:
        raise SelectionError(f"expected orders, got none. Known: {', '.join(ORDERS)}.")
    return tuple(order for order in ORDERS if order in wanted)


def variants(orders: Sequence[HeadOrder], seeds: int) -> Iterator[tuple[HeadOrder, int, bool]]:
    """Yield order, seed and reverse of every curve; a random order taken from its end would be another random one."""
    for order in orders:
        for seed in range(seeds if order == "random" else 1):
            yield order, seed, False
    for order in orders:
        if order != "random":
            yield order, 0, True


def arrange(order: HeadOrder, seed: int, reverse: bool, names: Sequence[str], scores: Scores | None) -> Ordered:
    """Return heads in an order, as ``diffract rewind`` would take them.

    Raises:
        SelectionError: A head has no score.
    """
    if order == "random":
        found = shuffled(tuple(names), seed)
    else:
        assert scores is not None
        found = least_first(scores)
        if order in BEST_FIRST:
            found.reverse()
    return Ordered(order, seed, reverse, tuple(found[::-1] if reverse else found))


def agreement(effects: Scores, scores: Scores, order: HeadOrder) -> float:
    """Return the rank correlation of an order's scores with measured effects; 1 if it ranks heads as greedy does."""
    gains, found = (np.array([values[name] for name in effects], float) for values in (effects, scores))
    return float(spearman(gains, found if order in BEST_FIRST else -found))


LEVEL = 0.05
"""That p-values of single heads must be able to fall below when they are adjusted for all heads."""


@dataclass(frozen=True)
class Effects:
    """Measured effects of single heads.

    Attributes:
        rows: By head, for each task what ``difference_rows`` says, with the head's ``state``.
    """

    rows: Mapping[str, Sequence[Mapping[str, Any]]]

    def gains(self) -> dict[str, float]:
        """Return what rewinding each head alone gains on the first task."""
        return {name: rows[0]["gain"] for name, rows in self.rows.items()}


def measure_effects(scorer: Scorer, names: Sequence[str], state_of: Callable[[str], State]) -> Effects:
    """Return the effect of each head alone, on all tasks.

    P-values of the sign-flip test are at least 1 / (1 + resamples); there are enough for Holm's adjustment over all
    heads to reach half of 5%.
    """
    tuned, tasks = scorer.score("selection", TUNED), scorer.tasks["selection"]
    resamples = max(RESAMPLES, round(2 * len(names) / LEVEL))
    found = {}
    for name in names:
        state = state_of(name)
        rows = difference_rows(tuned, scorer.score("selection", state, name), tasks, resamples=resamples)
        found[name] = [{**row, "state": scorer.number(state)} for row in rows]
    return Effects(found)


def effect_table(
    units: Units, effects: Effects | None, scores: Mapping[str, Mapping[str, float]], tasks: Sequence[Task]
) -> pl.DataFrame:
    """Return the table of heads: measured effects, where there are any, and what the cheaper orders go by."""
    adjusted = holm([rows[0]["p"] for rows in effects.rows.values()]) if effects else []
    rows = []
    for index, name in enumerate(units.names):
        row = {"name": name, **units.heads[name]._asdict(), "task": tasks[0].name}
        for order in ("magnitude", "reference", "first-order", "activation"):
            row[order.replace("-", "_")] = scores.get(order, {}).get(name)
        if effects:
            first, *others = effects.rows[name]
            row |= {"state": first["state"], "effect": first["gain"], "low": first["gain_low"]}
            row |= {"high": first["gain_high"], "p": first["p"], "p_holm": adjusted[index]}
            row |= {f"effect_{task.name}": o["gain"] for task, o in zip(tasks[1:], others, strict=True)}
        rows.append(row)
    return frame(rows, EFFECTS)


@dataclass
class Sources:
    """What scores are computed from.

    Attributes:
        stage: The live model.
        base: The base, matched to it.
        units: The heads.
        reference: The base tuned on reference text.
        text: A task of text to take the sample from; the first of the search by default.
    """

    stage: Stage
    base: Other
    units: Units
    reference: Model | None = None
    text: str | None = None

    @cached_property
    def sample(self) -> Sample:
        """Sample text, of the selection split."""
        task = self.stage.tasks["selection"][0]
        if self.text is not None:
            task = load_tasks(self.text, split="selection", data=self.stage.how.data)[0]
        return take_sample(self.stage.subject, task_texts(task))

    @cached_property
    def magnitude(self) -> Scores:
        """||W1 - W0||_F of each head."""
        return change_norms(self.units, self.stage.live.bench.draft().blocks, self.base)

    def of_reference(self) -> Scores:
        """Reference-domain scores."""
        assert self.reference is not None
        other = self.stage.live.bench.other(in_memory(self.reference, self.stage))
        return reference_scores(self.magnitude, change_norms(self.units, other.blocks, self.base))

    def first_order(self) -> Scores:
        """What the slope of the loss promises."""
        return first_order_gains(self.stage.subject.model, self.base, self.units, self.sample)

    def activation(self) -> Scores:
        """How much the change changes what heads compute."""
        return activation_changes(self.stage.subject.model, self.base, self.units, self.sample)


def head_scores(sources: Sources, orders: Sequence[HeadOrder]) -> dict[str, Scores]:
    """Return the scores of those orders that need no measured effects and no chance."""
    makers = {
        "magnitude": lambda: sources.magnitude,
        "reference": sources.of_reference,
        "first-order": sources.first_order,
        "activation": sources.activation,
    }
    return {order: makers[order]() for order in orders if order in makers}


def order_table(scores: Mapping[str, Scores]) -> pl.DataFrame:
    """Return how well each order's scores rank heads as measured effects do; empty where there are none."""
    effects = scores.get("greedy")
    rows = [
        {"order": order, "spearman": agreement(effects, own, order), "heads": len(own)}  # pyright: ignore[reportArgumentType] (names of orders)
        for order, own in scores.items()
        if effects and order != "greedy"
    ]
    return frame(rows, ORDER_ROWS).with_columns(pl.col("spearman").fill_nan(None))


@dataclass(frozen=True)
class Rewinder:
    """Makes states of a tuned model.

    Attributes:
        base: What heads go back to, in memory.
        units: The heads.
        kv: When shared key-value heads go.
    """

    base: torch.nn.Module
    units: Units
    kv: Shared

    def state(self, names: Collection[str]) -> State:
        """Return the model with these heads rewound."""
        if not names:
            return TUNED
        return State(frozenset(names), (Rewind(to=self.base, heads=tuple(names), kv=self.kv),))

    def whole(self) -> State:
        """Return the base itself."""
        return State("base", (Interpolate(other=self.base, at=1),))

    def point(self, sketch: Sketch, at: float, ordered: Sequence[str]) -> Point:
        """Return a point of a curve."""
        names = list(ordered[: rounded(at, len(self.units.names))])
        labels = {**sketch.labels, "fraction": at, "count": len(names), "heads": names}
        return Point(at, self.state(names), labels)


def sketches_of(orders: Sequence[HeadOrder], seeds: int, at: tuple[float, ...]) -> list[Sketch]:
    """Return the curves of orders; random ones and reversed ones are controls."""
    return [
        Sketch(
            {"order": order, "seed": seed, "reverse": reverse},
            at,
            control=reverse or order == "random",
            group="points of reversed curves" if reverse else "points of curves",
            needs_effects=order == "greedy",
        )
        for order, seed, reverse in variants(orders, seeds)
    ]


def in_order(sketch: Sketch, units: Units, scores: Mapping[str, Scores]) -> tuple[str, ...]:
    """Return all heads in a curve's order."""
    labels: Mapping[str, Any] = sketch.labels
    return arrange(labels["order"], labels["seed"], labels["reverse"], units.names, scores.get(labels["order"])).names


def search_rewind(
    base: Model,
    tuned: Model,
    *,
    order: str | Sequence[str] | None = None,
    reference: Model | None = None,
    eval: str | Sequence[str] = "math",
    output: str | Path | None = None,
    fractions: str | Sequence[float] = "0:1:0.125",
    seeds: int = 3,
    kv: Shared = "all",
    tolerance: float | None = None,
    choose_by: Which = "best",
    write: str | Path | None = None,
    dry_run: bool = False,
    budget: str | int | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    text: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    architecture: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run | Estimate:
    """Rewind heads in several orders, and measure what that does to quality.

    Everything is chosen on the selection split: the effect of each head alone, the greedy order by it (the best first;
    effects are not measured again after each step), and of each order the best fraction. The held-out split reports.

    Args:
        base: What the heads go back to.
        tuned: The model that is searched.
        order: ``greedy``, ``reference``, ``magnitude``, ``random``, ``first-order``, ``activation``, as a list or
            separated by commas; all that can be had by default. Each but random is taken in reverse too, as a control.
        reference: The base tuned on reference text; order ``reference`` needs it.
        eval: Tasks; the first decides.
        output: Write a run folder here; a search that was killed continues when it is started again.
        fractions: Of heads, ``FROM:TO:STEP`` or a list.
        seeds: How many random orders.
        kv: When shared key-value heads go, as of ``diffract rewind``.
        tolerance: Without one, no loss is one that is not shown: the interval of the gain reaches 0. With one, a loss
            of more than that must be excluded by the interval.
        choose_by: ``best`` or ``without-loss``: which point is written.
        write: Write the chosen checkpoint here.
        dry_run: Only say what it would cost; one evaluation of each split is timed.
        budget: The most evaluations (``200``), or the most time that they may take (``30m``).
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most, in each split.
        shots: Solved examples before each question.
        text: Sample text for orders first-order and activation, as a task of text; that of the first task by default.
        device: ``auto`` is CUDA where there is one.
        dtype: As of ``diffract.evaluate``.
        tokenizer: Where it is not beside the tuned model.
        architecture: A JSON file that describes the model.
        force: Replace an existing run folder, and the checkpoint.
        progress: Called with evaluations done, all of them, and what is done now.

    Returns:
        The tables of the run; of a dry run the estimate.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    choose("kv", kv, get_args(Shared))
    orders, at = parse_orders(order, reference=reference is not None), parse_fractions(fractions)
    how = How(eval, data, limit, shots, device, dtype, tokenizer, architecture)
    asked = Asked(seeds, tolerance, choose_by, budget, output, write, dry_run, force, progress)

    def make(stage: Stage, start: torch.nn.Module) -> RewindSearch:
        return RewindSearch(stage, start, orders, at, seeds, kv, reference, text)

    return run_search(base, tuned, how, asked, make)


@dataclass
class RewindSearch:
    """A search over heads.

    Attributes:
        stage: The live model.
        base: What heads go back to, in memory.
        orders: In which they do.
        at: Fractions of them.
        seeds: How many random orders.
        kv: When shared key-value heads go.
        reference: For order ``reference``.
        text: Of the sample for cheaper orders.
    """

    stage: Stage
    base: torch.nn.Module
    orders: tuple[HeadOrder, ...]
    at: tuple[float, ...]
    seeds: int
    kv: Shared
    reference: Model | None
    text: str | None

    def __post_init__(self) -> None:
        self.other: Other = self.stage.live.bench.other(self.base)
        self.units: Units = find_units(self.stage.live.bench, "head", None)
        self.rewinder = Rewinder(self.base, self.units, self.kv)
        self.kind: str = "search rewind"
        self.sketches: list[Sketch] = sketches_of(self.orders, self.seeds, self.at)

    @property
    def effects(self) -> int:
        """How many heads are measured alone."""
        return len(self.units.names) if "greedy" in self.orders else 0

    @property
    def ends(self) -> list[State]:
        """All heads rewound, and the base."""
        return [self.rewinder.state(self.units.names), self.rewinder.whole()]

    def settings(self) -> dict[str, Any]:
        """Return its settings as a manifest keeps them."""
        reference = None if self.reference is None else str(self.reference)
        kept = {"kv": self.kv, "reference": reference, "text": self.text}
        return {"order": list(self.orders), "fractions": list(self.at), **kept}

    def far(self, row: Mapping[str, Any]) -> float:
        """Say how far a chosen point goes."""
        return row["fraction"]

    def run(self, scorer: Scorer, plan: Plan, tolerance: float | None) -> Found:
        """Measure single heads, find all orders, measure curves, and choose."""
        effects = None
        if plan.effects:
            effects = measure_effects(scorer, self.units.names, lambda name: self.rewinder.state([name]))
        sources = Sources(self.stage, self.other, self.units, self.reference, self.text)
        scores = head_scores(sources, self.orders) | ({"greedy": effects.gains()} if effects else {})
        points, chosen = self._curves(scorer, plan, scores, tolerance)
        frames = {
            "points": frame(points, ON_CURVE | QUALITY),
            "effects": effect_table(self.units, effects, scores, self.stage.tasks["selection"]),
            "orders": order_table(scores),
            "choice": frame(chosen, CHOICE),
            "items": scorer.items().select(*ITEMS),
        }
        return Found(frames, chosen)

    def _curves(
        self, scorer: Scorer, plan: Plan, scores: Mapping[str, Scores], tolerance: float | None
    ) -> tuple[Rows, Rows]:
        """Return rows of points, those of the base at the end, and of what is chosen."""

        def point_of(sketch: Sketch, at: float) -> Point:
            return self.rewinder.point(sketch, at, in_order(sketch, self.units, scores))

        curves = build(self.sketches, plan, point_of)
        points, chosen = measure(scorer, self.sketches, curves, plan, tolerance)
        base = [{"order": "base", **row} for split in SPLITS for row in scorer.rows(split, self.rewinder.whole())]
        return points + base, chosen
