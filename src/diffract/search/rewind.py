"""``diffract search rewind``: which heads of a tuned model can go back to the base, and what that gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from diffract.edits.bench import Other
from diffract.edits.parts import Units, find_units
from diffract.edits.settings import Shared
from diffract.search.choice import Which
from diffract.search.curves import Point, Sketch, State, parse_fractions
from diffract.search.effects import effect_table, measure_effects
from diffract.search.head_scores import Sources, head_scores, order_table
from diffract.search.measure import Rows, build, measure
from diffract.search.orders import HeadOrder, Scores, parse_orders
from diffract.search.plan import SPLITS, Estimate, Plan
from diffract.search.rewinding import Rewinder, in_order, sketches_of
from diffract.search.running import Asked, Found, run_search
from diffract.search.scorer import Progress, Scorer
from diffract.search.setup import How, Model, Stage, require_word
from diffract.search.tables import CHOICE, ITEMS, ON_CURVE, QUALITY, RewindTables
from diffract.tables import frame


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
) -> RewindTables | Estimate:
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
    require_word("kv", kv, get_args(Shared))
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

    def run(self, scorer: Scorer, plan: Plan, tolerance: float | None) -> Found[RewindTables]:
        """Measure single heads, find all orders, measure curves, and choose."""
        effects = None
        if plan.effects:
            effects = measure_effects(scorer, self.units.names, lambda name: self.rewinder.state([name]))
        sources = Sources(self.stage, self.other, self.units, self.reference, self.text)
        scores = head_scores(sources, self.orders) | ({"greedy": effects.gains()} if effects else {})
        points, chosen = self._curves(scorer, plan, scores, tolerance)
        tables = RewindTables(
            points=frame(points, ON_CURVE | QUALITY),
            effects=effect_table(self.units, effects, scores, self.stage.tasks["selection"]),
            orders=order_table(scores),
            choice=frame(chosen, CHOICE),
            items=scorer.items().select(*ITEMS),
        )
        return Found(tables, chosen)

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
