"""How every metric evolves in a trajectory, for the page."""

from __future__ import annotations

from typing import Any

import polars as pl

from diffract.plots.evolution import places_of, quartiles, time_column
from diffract.report.packing import short

BAND = ("low", "middle", "high")


def bands(metrics: pl.DataFrame, names: list[str]) -> dict[str, Any]:
    """Return median and quartiles of each metric, part and checkpoint.

    Args:
        metrics: The metrics table of a trajectory, with all its checkpoints.
        names: Of metrics.
    """
    over = time_column(metrics)
    ordered = metrics.sort("order", maintain_order=True)
    found = {}
    for name in names:
        known = quartiles(ordered.filter(pl.col(name).is_not_null()), name, over)
        parts = known.partition_by("part", as_dict=True, maintain_order=True)
        found[name] = {str(part): _band(rows, over) for (part,), rows in parts.items()}
    return {"over": over, "parts": places_of(metrics)["part"].to_list(), "bands": found}


def _band(rows: pl.DataFrame, over: str) -> dict[str, list[Any]]:
    return {"times": rows[over].to_list()} | {name: [short(v) for v in rows[name].to_list()] for name in BAND}
