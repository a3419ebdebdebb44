"""``diffract search rewind``: which heads of a tuned model can go back to the base, and what that gains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import polars as pl

from diffract.cache import Cache
from diffract.edits.parts import find_units
from diffract.edits.settings import Shared
from diffract.errors import SelectionError
from diffract.search.choice import Which, winner
from diffract.search.curves import Sketch, parse_fractions
from diffract.search.effects import effect_table, measure_effects
from diffract.search.head_scores import Sources, head_scores, order_table
from diffract.search.measure import Rows, build, measure, planned
from diffract.search.orders import HeadOrder, parse_orders
from diffract.search.plan import SPLITS, Budget, Estimate, Plan, parse_budget
from diffract.search.rewinding import Rewinder, in_order, sketches_of
from diffract.search.scorer import TUNED, Progress, Scorer
from diffract.search.setup import How, Model, Stage, described, in_memory, manifest, require_word, set_up
from diffract.search.tables import CHOICE, ITEMS, ON_CURVE, QUALITY, RewindTables
from diffract.search.work import finish, working
from diffract.search.written import write_chosen
from diffract.tables import frame

ENDS = 3
"""States that are scored in any case: the tuned model, all heads rewound, the base."""


@dataclass(frozen=True)
class Wish:
    """What is searched, as validated."""

    orders: tuple[HeadOrder, ...]
    at: tuple[float, ...]
    seeds: int
    kv: Shared
    tolerance: float | None
    choose_by: Which
    budget: Budget
    reference: Model | None
    text: str | None

    def settings(self) -> dict[str, Any]:
        """Return them as a manifest keeps them."""
        return {
            "order": list(self.orders),
            "fractions": list(self.at),
            "seeds": self.seeds,
            "kv": self.kv,
            "tolerance": self.tolerance,
            "choose_by": self.choose_by,
            "budget": vars(self.budget),
            "text": self.text,
        }


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
    begun = time.monotonic()
    orders = parse_orders(order, reference=reference is not None)
    require_word("kv", kv, get_args(Shared))
    require_word("choice", choose_by, get_args(Which))
    if seeds < 1:
        raise SelectionError(f"seeds: expected 1 or more, got {seeds}.")
    at, most = parse_fractions(fractions), parse_budget(budget)
    wish = Wish(orders, at, seeds, kv, tolerance, choose_by, most, reference, text)
    how = How(eval, data, limit, shots, device, dtype, tokenizer, architecture)
    with working(None if dry_run else output, force=force) as cache:
        stage = set_up(tuned, how)
        search = _Search(stage, in_memory(base, stage), wish)
        if dry_run:
            return search.estimate()
        models = [described("base", "base", base, search.base), described("tuned", "tuned", tuned, stage.subject.model)]
        tables = search.run(cache, progress)
        tables.manifest.update(manifest("search rewind", stage, models, settings=how.settings() | wish.settings(),
                                        seconds=round(time.monotonic() - begun, 3), **search.found))  # fmt: skip
        if write is not None:
            tables.manifest["written"] = search.write(write, base, tuned, force=force)
        if output is not None:
            finish(tables, output, cache, force=force)
    return tables


class _Search:
    """A search that is under way.

    Attributes:
        found: What the manifest says of it.
    """

    def __init__(self, stage: Stage, base: Any, wish: Wish) -> None:
        self.stage, self.base, self.wish = stage, base, wish
        self.other = stage.live.bench.other(base)
        self.units = find_units(stage.live.bench, "head", None)
        self.rewinder = Rewinder(base, self.units, wish.kv)
        self.sketches = sketches_of(wish.orders, wish.seeds, wish.at)
        self.found: dict[str, Any] = {}

    def plan(self, *, time_it: bool) -> tuple[Plan, Estimate | None]:
        effects = len(self.units.names) if "greedy" in self.wish.orders else 0
        return planned(self.stage, self.sketches, ends=ENDS, effects=effects, budget=self.wish.budget, time_it=time_it)

    def estimate(self) -> Estimate:
        _, found = self.plan(time_it=True)
        assert found is not None
        return found

    def run(self, cache: Cache | None, progress: Progress | None) -> RewindTables:
        plan, _ = self.plan(time_it=False)
        self.scorer = self.stage.scorer(cache, progress)
        self.scorer.total = plan.evaluations
        score_ends(self.scorer, (TUNED, self.rewinder.state(self.units.names), self.rewinder.whole()))
        effects = None
        if plan.effects:
            effects = measure_effects(self.scorer, self.units.names, lambda name: self.rewinder.state([name]))
        sources = Sources(self.stage, self.other, self.units, self.wish.reference, self.wish.text)
        scores = head_scores(sources, self.wish.orders) | ({"greedy": effects.gains()} if effects else {})
        points, chosen = self._curves(plan, scores)
        self.chosen = winner(chosen, self.wish.choose_by, lambda row: row["fraction"])
        self.found = {
            "evaluations": self.scorer.done, "left_out": list(plan.left_out), "chosen": self.chosen,
        }  # fmt: skip
        return RewindTables(
            points=frame(points, ON_CURVE | QUALITY),
            effects=effect_table(self.units, effects, scores, self.stage.tasks["selection"]),
            orders=order_table(scores),
            choice=frame(chosen, CHOICE),
            items=self.scorer.items().select(*ITEMS),
        )

    def _curves(self, plan: Plan, scores: Mapping[str, Any]) -> tuple[Rows, Rows]:
        """Return rows of points, those of the base at the end, and of what is chosen."""

        def point_of(number: int, at: float) -> Any:
            sketch: Sketch = self.sketches[number]
            return self.rewinder.point(sketch, at, in_order(sketch, self.units, scores))

        curves = build(self.sketches, plan, point_of)
        points, chosen = measure(self.scorer, self.sketches, curves, plan, self.wish.tolerance)
        return points + base_rows(self.scorer, self.rewinder), chosen

    def write(self, output: str | Path, base: Model, tuned: Model, *, force: bool) -> dict[str, Any]:
        """Write the chosen checkpoint; the tuned model itself where nothing gains."""
        names = self.chosen["heads"]
        steps = [{"rewind": {"to": base, "heads": ",".join(names), "kv": self.wish.kv}}] if names else []
        live: pl.DataFrame = self.scorer.score("held-out", self.rewinder.state(names))
        return write_chosen(output, self.stage, live, tuned, steps, force=force)


def score_ends(scorer: Scorer, ends: Sequence[Any]) -> None:
    """Score both ends of all curves on both splits, the tuned model first."""
    for state in ends:
        for split in SPLITS:
            scorer.score(split, state, "ends of curves")


def base_rows(scorer: Scorer, rewinder: Rewinder) -> Rows:
    """Return rows of the base, for comparison."""
    return [{"order": "base", **row} for split in SPLITS for row in scorer.rows(split, rewinder.whole())]
