"""What the page's script works with: rows, curves and empty figures, as JSON that is safe inside HTML."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import polars as pl

from diffract import plots
from diffract.tables import LABELS, OUTCOME, TIMELINE, Tables

CURVE_BUDGET = 4_000_000
"""Numbers in all curves together; beyond it every curve is thinned evenly."""

FEWEST_POINTS = 32

ROW_BUDGET = 20_000
"""Matrices of all checkpoints of a series together; beyond it some checkpoints are left out of the page."""

HEAT_METRIC = ("delta_relative", "stable_rank", "frobenius_norm")
"""What the page shows first, of these the first that was computed."""


def payload(tables: Tables) -> dict[str, Any]:
    """Return everything that the script needs."""
    tables = on_page(tables)
    metrics = [c for c in tables.metrics.columns if c not in LABELS | OUTCOME | TIMELINE]
    points = points_per_curve(tables.spectra)
    return {
        "kind": tables.manifest["kind"],
        "models": _models(tables.models),
        "metrics": metrics,
        "first": next((m for m in HEAT_METRIC if m in metrics), metrics[0] if metrics else None),
        "rows": _rows(tables.metrics, metrics),
        "curves": _curves(tables.spectra, points),
        "thinned": points if points is not None else 0,
        "tensors": tables.tensors.with_columns(
            shape=pl.col("shape").cast(pl.List(pl.String)).list.join(" x ")
        ).to_dicts(),
        "glossary": tables.manifest.get("metrics", {}),
        "figures": _figures(),
    }


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


def _models(models: pl.DataFrame) -> list[dict[str, Any]]:
    """Name and role of each, and the model beside which it is drawn."""
    first = pl.lit(models["model"][0]).alias("base")
    base = pl.col("against").fill_null(pl.col("model")).alias("base") if "against" in models.columns else first
    return models.select("model", "role", base).to_dicts()


def embed(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in, nor break JavaScript."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def points_per_curve(spectra: pl.DataFrame) -> int | None:
    """Return to how many points curves are thinned, ``None`` if they are kept whole."""
    total = spectra["values"].list.len().sum() if len(spectra) else 0
    return None if total <= CURVE_BUDGET else max(FEWEST_POINTS, CURVE_BUDGET // len(spectra))


def _rows(metrics: pl.DataFrame, names: list[str]) -> dict[str, list[Any]]:
    """Columns of the metrics table; numbers to six digits, which is what a page can show."""
    part = pl.when(pl.col("projection").is_null() | (pl.col("block") == pl.col("projection"))).then("block")
    table = metrics.with_columns(part=part.otherwise(pl.concat_str("block", "projection", separator=".")))
    plain = [
        "model",
        "name",
        "part",
        "layer",
        "head",
        "kv_head",
        "expert",
        "rows",
        "cols",
        "status",
        "method",
    ]
    columns = {name: table[name].to_list() for name in plain}
    columns["status"] = [s if s != "ok" else "" for s in columns["status"]]
    return columns | {name: [_short(v) for v in table[name].to_list()] for name in names}


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _curves(spectra: pl.DataFrame, points: int | None) -> list[list[Any]]:
    """(model, matrix, quantity, length, float32 values in base64) of every curve."""
    return [
        [row["model"], row["name"], row["quantity"], len(row["values"]), _pack(row["values"], points)]
        for row in spectra.iter_rows(named=True)
    ]


def _pack(values: list[float], points: int | None) -> str:
    kept = np.asarray(values, dtype="<f4")
    if points is not None and len(kept) > points:
        kept = kept[np.linspace(0, len(kept) - 1, points).round().astype(int)]
    return base64.b64encode(kept.tobytes()).decode()


def _figures() -> dict[str, Any]:
    """Figures without data: the script fills them in, so that their looks are defined once."""
    empty = {
        "heatmap": plots.heatmap(z=[], x=[], y=[], title="", metric=""),
        "spectrum": plots.spectrum_lines({"base": [], "tuned": [], "delta": []}),
        "agreement": plots.agreement_lines({}, {}),
        "layers": plots.layer_boxes([], [], [], metric=""),
    }
    return {name: json.loads(str(made.to_json())) for name, made in empty.items()}
