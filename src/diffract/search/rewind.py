"""``diffract search rewind``: which heads of a tuned model can go back to the base, and what that gains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch

from diffract.edits import Interpolate, Rewind
from diffract.edits.edit import Shared
from diffract.edits.heads import Units, change_norms, find_units, least_first, reference_scores, shuffled
from diffract.edits.rule import rounded
from diffract.errors import SelectionError, choose
from diffract.evaluate import load_tasks
from diffract.schemas import CHOICE, EFFECTS, ITEMS, ON_CURVE, ORDER_ROWS, QUALITY
from diffract.search.plan import UNCHANGED, Point, SearchCurve
from diffract.search.predictions import activation_changes, first_order_gains
from diffract.search.run import QualitySearch
from diffract.search.sample import Sample, take_sample, task_texts
from diffract.search.scorer import RESAMPLES, Rows, Scorer, difference_rows
from diffract.search.stage import Model, Stage
from diffract.stats import holm, spearman
from diffract.tables import frame

HeadOrder = Literal["greedy", "reference", "magnitude", "random", "first-order", "activation"]
ORDERS: tuple[HeadOrder, ...] = get_args(HeadOrder)

BEST_FIRST: tuple[HeadOrder, ...] = ("greedy", "first-order")
"""Orders whose score is a gain: the highest goes first. Of the others the lowest does."""

HeadScores = Mapping[str, float]
"""One number for each head by its name, in the model's order."""

QUARTER = 0.25
"""How far all heads are on their way back where order first-order takes the slope of the loss: at the tuned model it
says nothing, as training made it vanish."""

LEVEL = 0.05
"""That p-values of single heads must be able to fall below when they are adjusted for all heads."""


def parse_orders(given: str | Sequence[str] | None, *, reference: bool) -> tuple[HeadOrder, ...]:
    """Read names of orders, separated by commas; all that can be had for nothing.

    Args:
        given: The names.
        reference: Whether there is a reference, without which order ``reference`` cannot be had.

    Raises:
        SelectionError: One is unknown, or needs a reference.
    """
    if given is None:
        return tuple(order for order in ORDERS if order != "reference" or reference)
    words = given.split(",") if isinstance(given, str) else given
    wanted = [choose("order", word.strip(), ORDERS) for word in words if word.strip()]
    if "reference" in wanted and not reference:
        raise SelectionError("order reference needs a reference: the base tuned on reference text. Pass --reference.")
    if not wanted:
        raise SelectionError(f"expected orders, got none. Known: {', '.join(ORDERS)}.")
    return tuple(order for order in ORDERS if order in wanted)


def rewind_curves(orders: Sequence[HeadOrder], seeds: int, at: tuple[float, ...]) -> list[SearchCurve]:
    """Return the curves of orders, then the same from their other end; random ones and reversed ones are controls.

    A random order and its reverse share out the heads: what the one has rewound at a fraction f, the other has at 1 - f
    left.
    """
    return [
        SearchCurve(
            order,
            {"order": order, "seed": seed, "reverse": reverse},
            at,
            control=reverse or order == "random",
            group="points of reversed curves" if reverse else "points of curves",
            needs_effects=order == "greedy",
        )
        for reverse in (False, True)
        for order in orders
        for seed in range(seeds if order == "random" else 1)
    ]


def in_order(curve: SearchCurve, names: Sequence[str], scores: Mapping[str, HeadScores]) -> list[str]:
    """Return all heads in a curve's order, as ``diffract rewind`` would take them.

    Raises:
        SelectionError: A head has no score.
    """
    order = curve.labels["order"]
    if order == "random":
        found = shuffled(tuple(names), curve.labels["seed"])
    else:
        found = least_first(scores[order])
        if order in BEST_FIRST:
            found.reverse()
    return found[::-1] if curve.labels["reverse"] else found


def agreement(effects: HeadScores, scores: HeadScores, order: str) -> float:
    """Return the rank correlation of an order's scores with measured effects; 1 if it ranks heads as greedy does."""
    gains, found = (np.array([values[name] for name in effects], float) for values in (effects, scores))
    return float(spearman(gains, found if order in BEST_FIRST else -found))


@dataclass(frozen=True)
class Rewinder:
    """Makes points of a tuned model whose heads go back.

    Attributes:
        base: What heads go back to, in memory.
        units: The heads.
        kv: When shared key-value heads go.
    """

    base: torch.nn.Module
    units: Units
    kv: Shared

    def rewound(self, names: Collection[str]) -> Point:
        """Return the model with these heads rewound."""
        if not names:
            return UNCHANGED
        # Which heads, not in which order: curves meet in the same model, which is then scored once.
        return Point(frozenset(names), (Rewind(to=self.base, heads=tuple(names), kv=self.kv),))

    def whole(self) -> Point:
        """Return the base itself, which differs from the tuned model in more than its heads."""
        return Point("base", (Interpolate(other=self.base, at=1),), labels={"order": "base"})

    def point(self, curve: SearchCurve, at: float, ordered: Sequence[str]) -> Point:
        """Return the model whose first heads in an order, a fraction of all, are rewound."""
        names = list(ordered[: rounded(at, len(self.units.names))])
        labels = {**curve.labels, "fraction": at, "count": len(names), "heads": names}
        found = self.rewound(names)
        return Point(found.key, found.steps, at, labels=labels)


@dataclass
class RewindSearch(QualitySearch):
    """A search over heads.

    Attributes:
        stage: The live model.
        orders: The orders in which heads go back.
        at: Fractions of all heads that do.
        kv: When shared key-value heads go.
        reference: The base tuned on reference text, for order ``reference``.
        text: A task of text to take the sample for cheaper orders from; the first task of the search by default.
    """

    stage: Stage
    orders: tuple[HeadOrder, ...]
    at: tuple[float, ...]
    kv: Shared
    reference: Model | None
    text: str | None

    def __post_init__(self) -> None:
        stage = self.stage
        base = stage.in_memory(stage.asked.models["base"])
        self.kind = "search rewind"
        self.models = {"base": base, "tuned": stage.subject.model}
        units = find_units(stage.live.bench, "head", None)
        (self.base,) = stage.live.bench.meet([base], {part.tensor for part in units.parts}, chosen=True)
        self.units = units.shared_with(self.base)
        self.rewinder = Rewinder(base, self.units, self.kv)
        self.curves = rewind_curves(self.orders, stage.asked.seeds, self.at)
        self.ends = [self.rewinder.rewound(self.units.names), self.rewinder.whole()]
        self.effects = len(self.units.names) if "greedy" in self.orders else 0
        self.alone: dict[str, Rows] = {}
        self.scores: dict[str, HeadScores] = {}

    def told(self) -> dict[str, Any]:
        """Return the settings that this kind alone has, as a manifest keeps them."""
        reference = None if self.reference is None else str(self.reference)
        kept = {"kv": self.kv, "reference": reference, "text": self.text}
        return {"order": list(self.orders), "fractions": list(self.at), **kept}

    def learn(self, scorer: Scorer, *, effects: bool) -> None:
        """Measure the effect of each head alone, if that is planned, and what the cheaper orders go by.

        P-values of the sign-flip test are at least 1 / (1 + resamples); there are enough for Holm's adjustment over all
        heads to reach half of 5%.
        """
        model = self.stage.subject.model
        if effects:
            before, tasks = scorer.score("selection", UNCHANGED), scorer.tasks["selection"]
            # The least p of a test is one over its draws, and is multiplied by the number of heads.
            resamples = max(RESAMPLES, round(2 * len(self.units.names) / LEVEL))
            for name in self.units.names:
                point = self.rewinder.rewound([name])
                rows = difference_rows(before, scorer.score("selection", point, name), tasks, resamples=resamples)
                self.alone[name] = [{**row, "state": scorer.number(point)} for row in rows]
        # What an order goes by is computed only if it is asked for: some of it takes a pass through the model.
        makers = {
            "magnitude": lambda: self.magnitude,
            "reference": self._of_reference,
            "first-order": self._slopes,
            "activation": lambda: activation_changes(model, self.base, self.units.alone(), self.sample),
        }
        self.scores = {order: makers[order]() for order in self.orders if order in makers}
        if effects:
            self.scores["greedy"] = {name: rows[0]["gain"] for name, rows in self.alone.items()}

    @cached_property
    def magnitude(self) -> HeadScores:
        """||W1 - W0||_F of what moves with each head alone, which two orders go by."""
        return change_norms(self.units.alone(), self.stage.live.bench.draft().blocks, self.base)

    def _slopes(self) -> HeadScores:
        """What the slope of the loss promises of rewinding each head alone, with all of them a quarter of the way."""
        quarter = Rewind(to=self.models["base"], heads=self.units.names, amount=QUARTER, kv=self.kv)
        with self.stage.live.edited(quarter):
            return first_order_gains(
                self.stage.subject.model, self.base, self.units.alone(), self.sample, way_back=QUARTER
            )

    @cached_property
    def sample(self) -> Sample:
        """Sample text of the selection split, which two orders go by."""
        task = self.stage.tasks["selection"][0]
        if self.text is not None:
            task = load_tasks(self.text, split="selection", data=self.stage.asked.data)[0]
        return take_sample(self.stage.subject, task_texts(task))

    def _of_reference(self) -> HeadScores:
        assert self.reference is not None, "orders were read with it"
        reference, tensors = self.stage.in_memory(self.reference), {part.tensor for part in self.units.parts}
        (other,) = self.stage.live.bench.meet([reference], tensors, chosen=True)
        return reference_scores(self.magnitude, change_norms(self.units.alone(), other.blocks, self.base))

    def point(self, curve: SearchCurve, at: float) -> Point:
        """Return the model whose first heads in the curve's order, a fraction of all, are rewound."""
        return self.rewinder.point(curve, at, in_order(curve, self.units.names, self.scores))

    def tables(self, scorer: Scorer, curves: Sequence[SearchCurve], chosen: Rows) -> dict[str, pl.DataFrame]:
        """Return points of curves and of the base, effects of single heads, orders, what was chosen, and items."""
        points = [point for curve in curves for point in curve.points]
        effects = self.scores.get("greedy")
        orders = [
            {"order": order, "spearman": agreement(effects, own, order), "heads": len(own)}
            for order, own in self.scores.items()
            if effects and order != "greedy"
        ]
        return {
            "points": frame(scorer.labelled([*points, self.rewinder.whole()]), ON_CURVE | QUALITY),
            "effects": self._effects(scorer),
            "orders": frame(orders, ORDER_ROWS).with_columns(pl.col("spearman").fill_nan(None)),
            "choice": frame(chosen, CHOICE),
            "items": scorer.items().select(*ITEMS),
        }

    def _effects(self, scorer: Scorer) -> pl.DataFrame:
        """Return the table of heads: measured effects, where there are any, and what the cheaper orders go by."""
        tasks = scorer.tasks["selection"]
        adjusted = iter(holm([rows[0]["p"] for rows in self.alone.values()]) if self.alone else [])
        rows = []
        for name in self.units.names:
            row = {"name": name, **self.units.heads[name]._asdict(), "task": tasks[0].name}
            for order in ("magnitude", "reference", "first-order", "activation"):
                row[order.replace("-", "_")] = self.scores.get(order, {}).get(name)
            if self.alone:
                first, *others = self.alone[name]
                row |= {"state": first["state"], "effect": first["gain"], "low": first["gain_low"]}
                row |= {"high": first["gain_high"], "p": first["p"], "p_holm": next(adjusted)}
                row |= {f"effect_{task.name}": o["gain"] for task, o in zip(tasks[1:], others, strict=True)}
            rows.append(row)
        return frame(rows, EFFECTS)
