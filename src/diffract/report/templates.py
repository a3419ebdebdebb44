"""Figures without data: the script fills them in, so that their looks are defined once, in ``diffract.plots``."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract import plots
from diffract.plots.agreement import peak_shape
from diffract.plots.density import AXIS_TITLES

FITTED = {
    "mp_variance": 1.0,
    "mp_edge": 2.0,
    "pl_alpha": 3.0,
    "tpl_alpha": 3.0,
    "tpl_rate": 1.0,
    "exp_rate": 1.0,
    "ln_mu": 0.0,
    "ln_sigma": 1.0,
    **{f"{prefix}_xmin": 1.0 for prefix in ("pl", "tpl", "exp", "ln")},
    "pl_ks": 0.1,
    "pl_tail_count": 2.0,
}
"""A row for which figures hold everything that they can hold."""

ABOVE = {"y": 1, "yanchor": "bottom"}
"""A legend between the title and the plot, where the title is long."""


@cache
def templates() -> dict[str, Any]:
    """Return figures by name as JSON; only their looks are meant."""
    values = [4.0, 2.0, 1.0]
    below = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    density = plots.density_lines(values, (3, 3), FITTED, null=values).update_layout(height=410, legend=below)
    made = {
        "heatmap": plots.heatmap(z=[], x=[], y=[], title="", metric=""),
        "spectrum": plots.spectrum_lines({"base": [], "tuned": [], "delta": []}),
        "agreement": plots.agreement_lines({}, {}).update_layout(margin_t=54, legend=ABOVE),
        "layers": plots.layer_boxes([], [], [], metric=""),
        "density": density,
        "ks": plots.ks_lines(values, [0.2, 0.1, 0.2], FITTED).update_layout(margin_t=54),
        "band": plots.band_lines(_no_band(), "step", y=""),
    }
    return {name: _plain(figure) for name, figure in made.items()} | {
        "peak": peak_shape(0, 1, 1, named=True),
        "density_titles": AXIS_TITLES,
    }


def _plain(figure: go.Figure) -> dict[str, Any]:
    return json.loads(str(figure.to_json()))


def _no_band() -> pl.DataFrame:
    return pl.DataFrame({"step": [], "low": [], "middle": [], "high": []})
