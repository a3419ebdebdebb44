"""What the page's script works with: rows, curves and empty figures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import polars as pl

from diffract import plots
from diffract.attention import lorenz_of, pairs_of
from diffract.densities import TAILS
from diffract.plots.agreement import peak_runs, peak_shape
from diffract.plots.choice import part
from diffract.plots.heads import Grid, HeadGrids, as_array
from diffract.plots.spectra import AXIS_TITLES, Bars, density_parts
from diffract.plots.style import DIVERGING
from diffract.plots.training import BREAK, places_of, quartiles, time_column
from diffract.schemas import LABELS, OUTCOME, RELATION, TIMELINE
from diffract.stats import scale01
from diffract.tables import Tables

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
    density = plots.density_lines(values, (3, 3), FITTED, null=values, norms=values).update_layout(
        height=410, legend=below
    )
    made = {
        "heatmap": plots.heatmap(z=[], x=[], y=[], title="", metric=""),
        "spectrum": plots.spectrum_lines({"base": [], "tuned": [], "delta": []}),
        "agreement": plots.agreement_lines({}, {}).update_layout(margin_t=54, legend=ABOVE),
        "layers": plots.layer_boxes([], [], [], metric=""),
        "density": density,
        "ks": plots.ks_lines(values, [0.2, 0.1, 0.2], FITTED).update_layout(margin_t=54),
        "band": plots.band_lines(pl.DataFrame({"step": [], "low": [], "middle": [], "high": []}), "step", y=""),
    }
    return {name: _plain_figure(figure) for name, figure in made.items()} | {
        "peak": peak_shape(0, 1, 1, named=True),
        "density_titles": AXIS_TITLES,
    }


def _plain_figure(figure: go.Figure) -> dict[str, Any]:
    return json.loads(str(figure.to_json()))


def embed(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in, nor break JavaScript."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # Data in a page must neither end its script nor begin a tag, and a line separator ends a line in old scripts.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def short(value: float | None) -> float | None:
    """A number to six digits, which is what a page can show; ``None`` for what is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def pack(values: npt.ArrayLike) -> str:
    """Little-endian float32 in base64."""
    # Four bytes a number: as text a page of a large model would have hundreds of megabytes.
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def thin(values: Sequence[Any], points: int | None) -> Sequence[Any]:
    """Return at most ``points`` values, evenly chosen, both ends among them; all if it is ``None``."""
    if points is None or len(values) <= points:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, points).round().astype(int)]


POINTS = 32
"""On each law."""

MOST = 5_000
"""Densities in a page, about 2 kB each."""

NEEDED = ("mp_variance", "pl_xmin", "tpl_xmin", "exp_xmin", "ln_xmin", "null_w1")
"""A page has densities if the run has one of these columns."""


def density_rows(metrics: pl.DataFrame, spectra: pl.DataFrame) -> Iterator[list[Any]]:
    """Yield (model, matrix, parts), long spectra first, of these the last model's; nothing if no law was fitted."""
    if not set(NEEDED) & set(metrics.columns):
        return
    found = spectra.select("quantity", "model", "name", "values")
    sigmas, nulls, norms = (
        {(model, name): np.array(values, float) for _, model, name, values in found.filter(quantity=wanted).rows()}
        for wanted in ("sigma", "null_sigma", "sep_sigma")
    )
    columns = [c for c in metrics.columns if c.startswith(("mp_", *(f"{prefix}_" for prefix in TAILS)))]
    places = {name: i for i, name in enumerate(metrics["model"].unique(maintain_order=True))}
    place = pl.col("model").replace_strict(places, return_dtype=pl.Int32)
    # The longest spectra first: of short ones a histogram says least.
    longest = metrics.sort(pl.min_horizontal("rows", "cols"), place, descending=True, maintain_order=True).head(MOST)
    for row in longest.select("model", "name", "rows", "cols", *columns).iter_rows(named=True):
        key, shape = (row["model"], row["name"]), (row["rows"], row["cols"])
        if key not in sigmas:
            continue
        values, null, even = (np.square(of.get(key, [])) / max(shape) for of in (sigmas, nulls, norms))
        parts = density_parts(values, shape, row, null=null, norms=even, points=POINTS)
        histograms = {"bars": parts.spectrum, "null": parts.null}
        yield [
            *key,
            {
                "total": parts.total,
                "zeros": parts.zeros,
                **{name: _bars(bars) for name, bars in histograms.items() if bars is not None},
                "laws": {name: pack(np.concatenate(curve)) for name, curve in parts.laws.items()},
            },
        ]


def left_out(metrics: pl.DataFrame) -> int:
    """How many matrices have no density in the page, though they could."""
    return max(0, len(metrics) - MOST) if set(NEEDED) & set(metrics.columns) else 0


def _bars(bars: Bars) -> list[Any]:
    """Ends of the edges, which are evenly spaced in ln lambda, and the share in each bin."""
    return [float(bars.edges[0]), float(bars.edges[-1]), pack(bars.shares)]


CURVE_POINTS = 257
"""On each Lorenz curve."""


def domain_part(tables: Tables) -> dict[str, Any] | None:
    """Return figures of heads and domains; ``None`` where the run compares nothing, or has no heads."""
    if tables.kind == "heads":
        domains, points = tables.domains, tables.lorenz
    elif tables.kind == "compare" and len(tables.heads):
        domains, points = pairs_of(tables.heads), lorenz_of(tables.heads)
    else:
        return None
    found = plots.head_grids(tables.heads, "head_delta")
    figures = {"maps": plots.head_maps(tables.heads), "lorenz": _lorenz(points, tables.models)}
    if len(domains):
        figures |= {c: plots.domain_matrix(domains, c) for c in ("spearman", "cosine") if c in domains.columns}
    return {
        "figures": {name: _plain_figure(made) for name, made in figures.items()},
        "names": list(found.grids),
        "score": _plain_figure(_empty_score(found)),
        "scaled": [[[short(v) for v in row] for row in scale01(as_array(g)).tolist()] for g in found.grids.values()],
        # The widest of the pairs' standard deviations.
        "chance": max(domains["cosine_chance"].to_list(), default=None) if "cosine_chance" in domains.columns else None,
    }


def _lorenz(points: pl.DataFrame, models: pl.DataFrame) -> go.Figure:
    """As wide as its place, and with no more points than can be seen."""
    made = plots.lorenz(points, models)
    made.for_each_trace(lambda t: t.update(x=thin(t["x"], CURVE_POINTS), y=thin(t["y"], CURVE_POINTS)))
    made.update_xaxes(constrain=None).update_yaxes(scaleanchor=None, constrain=None)
    return made.update_layout(width=None, height=340, title_text="How concentrated the change is")


def _empty_score(found: HeadGrids) -> go.Figure:
    """The figure of one score, with its axes and no values; a score is in [-1, 1]."""
    blank: Grid = [[None] * len(found.heads) for _ in found.layers]
    made = plots.heat_panels({"": blank}, found.layers, found.heads, scale="score", colours=DIVERGING)
    made.update_layout(title_text="Reference-domain score")
    return made.update_layout(height=340, coloraxis={"cmin": -1, "cmax": 1, "cmid": 0})


BAND = ("low", "middle", "high")


def bands(metrics: pl.DataFrame, names: list[str], broken: Sequence[str] = ()) -> dict[str, Any]:
    """Return median and quartiles of each metric, part and checkpoint, and where the series breaks.

    Args:
        metrics: The metrics table of a trajectory, with all its checkpoints.
        names: Of metrics.
        broken: Checkpoints that fall out of line with the one before.
    """
    over = time_column(metrics)
    ordered = metrics.sort("order", maintain_order=True)
    found = {}
    for name in names:
        known = quartiles(ordered.filter(pl.col(name).is_not_null()), name, over)
        parts = known.partition_by("part", as_dict=True, maintain_order=True)
        found[name] = {
            str(part): {"times": rows[over].to_list()} | {end: [short(v) for v in rows[end].to_list()] for end in BAND}
            for (part,), rows in parts.items()
        }
    marks = metrics.filter(pl.col("model").is_in(list(broken)))[over].unique().sort().to_list()
    parts = places_of(metrics)["part"].to_list()
    return {"over": over, "parts": parts, "bands": found, "breaks": [{**BREAK, "x": at} for at in marks]}


CURVE_BUDGET = 4_000_000
"""Numbers in all curves together; beyond it every curve is thinned evenly."""

FEWEST_POINTS = 32

ROW_BUDGET = 20_000
"""Matrices of all checkpoints of a series together; beyond it some checkpoints are left out of the page."""

HEAT_METRIC = ("delta_relative", "stable_rank", "frobenius_norm")
"""What the page shows first, of these the first that was computed."""

DRAWN = (
    "sigma",
    "delta_sigma",
    "left_agreement",
    "right_agreement",
    "left_agreement_window",
    "right_agreement_window",
    "pl_ks_scan",
)
"""Quantities along the spectrum that the page draws as curves."""

PLAIN = ("model", "name", "part", "layer", "head", "kv_head", "expert", "rows", "cols", "status", "method", "warning")


def payload(tables: Tables) -> dict[str, Any]:
    """Return everything that the script needs."""
    common = {"kind": tables.kind, "tensors": [], "domains": domain_part(tables), "kinship": None}
    if tables.kind == "lineage":
        made = plots.kinship(tables.lineage, tables.tree)
        return common | _without_matrices(tables) | {"kinship": _plain_figure(made)}
    shapes = pl.col("shape").cast(pl.List(pl.String)).list.join(" x ")
    common["tensors"] = tables.tensors.with_columns(shape=shapes).to_dicts()
    return common | (_without_matrices(tables) if tables.kind == "heads" else _of_matrices(tables))


def on_page(tables: Tables) -> Tables:
    """Return the tables as far as a browser can bear them: of a long series, checkpoints evenly, both ends among them.

    A scan or a comparison is shown whole.
    """
    count, rows = len(tables.models), len(tables.metrics)
    if tables.manifest["kind"] != "trajectory" or rows <= ROW_BUDGET:
        return tables
    # Whole checkpoints are left out, evenly over the series, so that what is shown of one is all of it.
    kept = max(2, ROW_BUDGET * count // rows)
    names = tables.models["model"].gather(np.linspace(0, count - 1, kept).round().astype(int)).to_list()
    return Tables(
        tables.manifest, {name: table.filter(pl.col("model").is_in(names)) for name, table in tables.frames.items()}
    )


def points_per_curve(spectra: pl.DataFrame) -> int | None:
    """Return to how many points curves are thinned, ``None`` if they are kept whole."""
    total = spectra["values"].list.len().sum() if len(spectra) else 0
    return None if total <= CURVE_BUDGET else max(FEWEST_POINTS, CURVE_BUDGET // len(spectra))


def _of_matrices(tables: Tables) -> dict[str, Any]:
    metrics = [c for c in tables.metrics.columns if c not in LABELS | OUTCOME | TIMELINE | RELATION]
    broken = tables.models.filter("breaks")["model"].to_list() if "breaks" in tables.models.columns else []
    evolution = bands(tables.metrics, metrics, broken) if tables.manifest["kind"] == "trajectory" else None
    tables = on_page(tables)
    drawn = tables.spectra.filter(pl.col("quantity").is_in(DRAWN))
    points = points_per_curve(drawn)
    models = tables.models
    # what a model is drawn beside: what it was compared with, or itself
    base = pl.col("against").fill_null(pl.col("model")) if "against" in models.columns else pl.lit(models["model"][0])
    return {
        "models": models.select("model", "role", base=base).to_dicts(),
        "metrics": metrics,
        "first": next((m for m in HEAT_METRIC if m in metrics), metrics[0] if metrics else None),
        "rows": _rows(tables.metrics, metrics),
        # (model, matrix, quantity, length, float32 values in base64)
        "curves": [
            [*row[:3], len(row[3]), pack(_numbers(thin(row[3], points)))]
            for row in drawn.select("model", "name", "quantity", "values").iter_rows()
        ],
        "thinned": points if points is not None else 0,
        # (model, matrix, runs of ranks that belong to a peak)
        "peaks": [
            [row["model"], row["name"], list(peak_runs(_numbers(row["values"])))]
            for row in tables.spectra.filter(quantity="peak").iter_rows(named=True)
        ],
        "densities": list(density_rows(tables.metrics, tables.spectra)),
        "left_out": left_out(tables.metrics),
        "evolution": evolution,
        "glossary": tables.manifest.get("metrics", {}),
        "figures": templates(),
    }


def _without_matrices(tables: Tables) -> dict[str, Any]:
    """A page that shows heads or models only."""
    return {
        "models": tables.models.select("model", "role", base=pl.lit(None, pl.String)).to_dicts(),
        "rows": {name: [] for name in PLAIN},
        **{name: [] for name in ("metrics", "curves", "peaks", "densities")},
        **{name: {} for name in ("glossary", "figures")},
        **dict.fromkeys(("thinned", "left_out"), 0),
        **dict.fromkeys(("first", "evolution")),
    }


def _rows(metrics: pl.DataFrame, names: list[str]) -> dict[str, list[Any]]:
    """Columns of the metrics table."""
    table = metrics.with_columns(
        part=part(), status=pl.col("status").replace("ok", ""), warning=pl.col("warning").fill_null("")
    )
    columns = {name: table[name].to_list() for name in PLAIN}
    return columns | {name: [short(v) for v in table[name].to_list()] for name in names}


def _numbers(values: Any) -> list[float]:
    return [float("nan") if v is None else v for v in values]
