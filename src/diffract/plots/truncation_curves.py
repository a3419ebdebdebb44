"""Quality as less and less of a change is kept, against controls of equal energy and equal bytes."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.bands import banded, beside, curve, level
from diffract.plots.panels import panels
from diffract.plots.rewind_curves import MEASURES
from diffract.plots.style import CHANCE, COLOURS, label, line

AGAINST = {"energy": "share of ||ΔW||² kept", "bytes": "share of bytes kept"}
RULES = ("drop", "energy", "tail", "random", "random-energy", "dare-energy", "dare-bytes", "donoho-gavish", "mp-edge")
SINGLE = ("donoho-gavish", "mp-edge")
PLAIN = ("drop", "energy")


def truncation_curves(points: pl.DataFrame, task: str, *, measure: str = "gain") -> go.Figure:
    """Draw a panel against the energy that is kept, and one against the bytes; seeds of one control are one colour.

    The axis shows the rules and both models; single entries can do far worse, which zooming out shows.

    Args:
        points: The points table of ``search truncate``; the held-out split is drawn where it is as full as the other.
        task: A name in it.
        measure: ``gain`` over the tuned model with its paired interval, or ``quality``.
    """
    own = points.filter(pl.col("task") == task)
    split = _fuller(own)
    rows = own.filter(pl.col("split") == split)
    contents = [_panel(rows, against, measure, legend=not i) for i, against in enumerate(AGAINST)]
    y = f"{label(task)}, gain over the tuned model" if measure == "gain" else label(task)
    made = beside(panels(list(AGAINST.values()), contents, x=f"{split} split", y=y, height=400))
    return made.update_yaxes(range=_near(rows, measure))


def _near(rows: pl.DataFrame, measure: str) -> list[float] | None:
    """Return what the rules and both models span, and a quarter more on each side."""
    own = rows.filter(pl.col("rule").is_in(["base", *PLAIN]) | (pl.col("state") == 0))[measure].to_list()
    margin = 0.25 * (max(own, default=0.0) - min(own, default=0.0))
    return [min(own) - margin, max(own) + margin] if margin else None


def _fuller(points: pl.DataFrame) -> str:
    counts = [points.filter(pl.col("split") == split).height for split in ("held-out", "selection")]
    return "held-out" if counts[0] >= counts[1] else "selection"


def _panel(rows: pl.DataFrame, against: str, measure: str, *, legend: bool) -> list[go.Scatter]:
    low, high = MEASURES[measure]
    traces: list[go.Scatter] = []
    named: set[str] = set()
    for own in rows.filter(pl.col("rule") != "base").partition_by("rule", "seed", maintain_order=True):
        rule = own["rule"][0]
        shown = own.filter(pl.col("fraction") == 1) if rule in SINGLE else own.sort(against)
        words = _words(rule, legend=legend and rule not in named)
        x, y = shown[against].to_list(), shown[measure].to_list()
        if rule in PLAIN:
            traces += banded(x, y, shown[low].to_list(), shown[high].to_list(), **words)
        else:
            traces.append(curve(x, y, **words))
        named.add(rule)
    base = rows.filter(pl.col("rule") == "base")
    tuned = rows.filter(pl.col("state") == 0)
    for kind, look, own in (("tuned", {"color": COLOURS["tuned"], "dash": "dot", "width": 1}, tuned),
                            ("base", CHANCE, base)):  # fmt: skip
        if len(own):
            traces.append(level(own[measure][0], name=kind, look=look, legend=legend))
    for trace in traces:
        if trace.name in SINGLE:
            trace.update(mode="markers", marker={"size": 9, "symbol": "diamond"})
    return traces


def _words(rule: str, *, legend: bool) -> dict[str, Any]:
    index = RULES.index(rule) if rule in RULES else len(RULES)
    look = line(index, 2 if rule in PLAIN else 1)
    return {"name": label(rule), "look": look, "legend": legend, "hover": "%{x:.3g}: %{y:.4g}"}
