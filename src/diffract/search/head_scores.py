"""What the cheaper orders go by: one number for each head, found without evaluating anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from diffract.edits.bench import Other
from diffract.edits.order import change_norms, reference_scores
from diffract.edits.parts import Units
from diffract.evaluate import load_tasks
from diffract.search.activation import activation_changes
from diffract.search.first_order import first_order_gains
from diffract.search.orders import HeadOrder, Scores, agreement
from diffract.search.samples import Sample, take_sample, task_texts
from diffract.search.setup import Model, Stage, in_memory
from diffract.search.tables import ORDERS
from diffract.tables import frame


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
    return frame(rows, ORDERS).with_columns(pl.col("spearman").fill_nan(None))
