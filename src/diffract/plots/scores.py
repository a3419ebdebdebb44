"""Which heads a domain changed more than a reference domain did."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import polars as pl

from diffract.plots.head_maps import Grid, head_grids, heat_panels
from diffract.plots.style import DIVERGING, label


def reference_scores(heads: pl.DataFrame, reference: str) -> go.Figure:
    """Draw s = scale01(d of the domain) - scale01(d of the reference) for every other domain.

    Args:
        heads: The heads table: model, layer, block, head, ``head_delta``.
        reference: A model of it.
    """
    found = head_grids(heads, "head_delta")
    against = found.grids[reference]
    grids = {name: score(grid, against) for name, grid in found.grids.items() if name != reference}
    title = f"scaled change minus that of {label(reference)}"
    return heat_panels(grids, found.layers, found.heads, scale="score", colours=DIVERGING, title=title, centred=True)


def score(domain: Grid, reference: Grid) -> Grid:
    """Return scale01(domain) - scale01(reference), in [-1, 1]; high where a head is specific to the domain.

    >>> score([[0.0, 2.0]], [[3.0, 1.0]])
    [[-1.0, 1.0]]
    """
    pairs = zip(scale01(domain), scale01(reference), strict=True)
    return [[None if a is None or b is None else a - b for a, b in zip(*rows, strict=True)] for rows in pairs]


def scale01(grid: Grid) -> Grid:
    """(X - min X) / (max X - min X) over all cells; ``None`` throughout where all are equal."""
    known = [v for row in grid for v in row if v is not None and math.isfinite(v)]
    low, spread = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    return [
        [None if v is None or not math.isfinite(v) or not spread else (v - low) / spread for v in row] for row in grid
    ]
