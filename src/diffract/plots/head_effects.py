"""What rewinding each head alone does to quality."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from diffract.plots.head_maps import head_grids, heat_panels
from diffract.plots.style import DIVERGING, SCALE

SIGNED = {
    "effect": "gain of rewinding the head alone",
    "first_order": "gain that the slope of the loss promises",
    "reference": "reference-domain score",
}
SIZES = {"magnitude": "Frobenius norm of the head's change D", "activation": "root mean square of D x"}


def head_effects(effects: pl.DataFrame, *, metric: str = "effect") -> go.Figure:
    """Draw a map over layers and heads; orange heads are better rewound, purple ones are needed.

    Args:
        effects: The effects table of ``search rewind``.
        metric: ``effect``, or what a cheaper order goes by: ``first_order``, ``reference``, ``magnitude``,
            ``activation``.
    """
    meaning, signed = (SIGNED | SIZES)[metric], metric in SIGNED
    task = effects["task"][0] if len(effects) else ""
    name = f"{meaning} ({task}, selection split)" if metric in ("effect", "first_order", "activation") else meaning
    found = head_grids(effects.with_columns(model=pl.lit(name)), metric)
    colours, scale = DIVERGING if signed else SCALE, metric.replace("_", " ")
    return heat_panels(found.grids, found.layers, found.heads, scale=scale, colours=colours, centred=signed)
