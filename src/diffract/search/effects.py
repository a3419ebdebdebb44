"""What rewinding each head alone does to quality, on the selection split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from diffract.edits.parts import Units
from diffract.evaluate import Task, holm
from diffract.search.curves import State
from diffract.search.scorer import RESAMPLES, TUNED, Scorer, difference_rows
from diffract.search.tables import EFFECTS
from diffract.tables import frame

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
        row = {**place_of_head(name), "task": tasks[0].name}
        for order in ("magnitude", "reference", "first-order", "activation"):
            row[order.replace("-", "_")] = scores.get(order, {}).get(name)
        if effects:
            first, *others = effects.rows[name]
            row |= {"state": first["state"], "effect": first["gain"], "low": first["gain_low"]}
            row |= {"high": first["gain_high"], "p": first["p"], "p_holm": adjusted[index]}
            row |= {f"effect_{task.name}": o["gain"] for task, o in zip(tasks[1:], others, strict=True)}
        rows.append(row)
    return frame(rows, EFFECTS)


def place_of_head(name: str) -> dict[str, Any]:
    """Return layer, block and head from a head's name.

    >>> place_of_head("L3.h5")
    {'name': 'L3.h5', 'layer': 3, 'block': 'attn', 'head': 5}
    """
    layer, *block, head = name.split(".")
    return {
        "name": name,
        "layer": int(layer.removeprefix("L")),
        "block": block[0] if block else "attn",
        "head": int(head.removeprefix("h")),
    }
