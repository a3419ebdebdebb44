"""What the page's script works with: rows, curves and empty figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from diffract.plots.agreement import peak_runs
from diffract.plots.rows import part
from diffract.report.densities import densities, left_out
from diffract.report.domains import domain_part
from diffract.report.packing import pack, short, thin
from diffract.report.templates import templates
from diffract.report.training import bands
from diffract.tables import LABELS, OUTCOME, TIMELINE, HeadTables, Tables

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


def payload(tables: Tables | HeadTables) -> dict[str, Any]:
    """Return everything that the script needs."""
    common = {
        "kind": tables.manifest["kind"],
        "tensors": tables.tensors.with_columns(
            shape=pl.col("shape").cast(pl.List(pl.String)).list.join(" x ")
        ).to_dicts(),
        "domains": domain_part(tables),
    }
    return common | (_without_matrices(tables) if isinstance(tables, HeadTables) else _of_matrices(tables))


def on_page(tables: Tables) -> Tables:
    """Return the tables as far as a browser can bear them: of a long series, checkpoints evenly, both ends among them.

    A scan or a comparison is shown whole.
    """
    count, rows = len(tables.models), len(tables.metrics)
    if tables.manifest["kind"] != "trajectory" or rows <= ROW_BUDGET:
        return tables
    kept = max(2, ROW_BUDGET * count // rows)
    names = tables.models["model"].gather(np.linspace(0, count - 1, kept).round().astype(int)).to_list()
    own = {name: getattr(tables, name).filter(pl.col("model").is_in(names)) for name in Tables.SCHEMAS}
    return Tables(**own, manifest=tables.manifest)


def points_per_curve(spectra: pl.DataFrame) -> int | None:
    """Return to how many points curves are thinned, ``None`` if they are kept whole."""
    total = spectra["values"].list.len().sum() if len(spectra) else 0
    return None if total <= CURVE_BUDGET else max(FEWEST_POINTS, CURVE_BUDGET // len(spectra))


def _of_matrices(tables: Tables) -> dict[str, Any]:
    metrics = [c for c in tables.metrics.columns if c not in LABELS | OUTCOME | TIMELINE]
    evolution = bands(tables.metrics, metrics) if tables.manifest["kind"] == "trajectory" else None
    tables = on_page(tables)
    drawn = tables.spectra.filter(pl.col("quantity").is_in(DRAWN))
    points = points_per_curve(drawn)
    return {
        "models": _models(tables.models),
        "metrics": metrics,
        "first": next((m for m in HEAT_METRIC if m in metrics), metrics[0] if metrics else None),
        "rows": _rows(tables.metrics, metrics),
        "curves": _curves(drawn, points),
        "thinned": points if points is not None else 0,
        "peaks": _peaks(tables.spectra),
        "densities": densities(tables.metrics, tables.spectra),
        "left_out": left_out(tables.metrics),
        "evolution": evolution,
        "glossary": tables.manifest.get("metrics", {}),
        "figures": templates(),
    }


def _without_matrices(tables: HeadTables) -> dict[str, Any]:
    """A page that shows heads only."""
    return {
        "models": tables.models.select("model", "role", base=pl.lit(None, pl.String)).to_dicts(),
        "metrics": [],
        "first": None,
        "rows": {name: [] for name in PLAIN},
        "curves": [],
        "thinned": 0,
        "peaks": [],
        "densities": [],
        "left_out": 0,
        "evolution": None,
        "glossary": {},
        "figures": {},
    }


def _models(models: pl.DataFrame) -> list[dict[str, Any]]:
    """Name and role of each, and the model beside which it is drawn."""
    first = pl.lit(models["model"][0]).alias("base")
    base = pl.col("against").fill_null(pl.col("model")).alias("base") if "against" in models.columns else first
    return models.select("model", "role", base).to_dicts()


def _rows(metrics: pl.DataFrame, names: list[str]) -> dict[str, list[Any]]:
    """Columns of the metrics table."""
    table = metrics.with_columns(
        part=part(), status=pl.col("status").replace("ok", ""), warning=pl.col("warning").fill_null("")
    )
    columns = {name: table[name].to_list() for name in PLAIN}
    return columns | {name: [short(v) for v in table[name].to_list()] for name in names}


def _curves(spectra: pl.DataFrame, points: int | None) -> list[list[Any]]:
    """(model, matrix, quantity, length, float32 values in base64) of every curve."""
    return [
        [row["model"], row["name"], row["quantity"], len(row["values"]), pack(_numbers(thin(row["values"], points)))]
        for row in spectra.iter_rows(named=True)
    ]


def _numbers(values: Any) -> list[float]:
    return [float("nan") if v is None else v for v in values]


def _peaks(spectra: pl.DataFrame) -> list[list[Any]]:
    """(model, matrix, runs of ranks that belong to a peak) of every matrix whose peaks are known."""
    known = spectra.filter(pl.col("quantity") == "peak")
    return [
        [row["model"], row["name"], list(peak_runs(_numbers(row["values"])))] for row in known.iter_rows(named=True)
    ]
