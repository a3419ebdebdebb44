"""From the tables of single checkpoints to those of a series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from diffract.analysis.assemble import row_warnings
from diffract.analysis.timeline import Place
from diffract.tables import AGAINST, LABELS, MODELS, OUTCOME, TIMELINE, Tables

PEAKS = "peak_count"
"""The metric whose rise above one is followed."""

PEAKS_APPEAR = {
    "summary": "step (place in the series, where steps do not rise along it) of the first checkpoint at which the "
    "spectrum of this matrix has at least two peaks; null if it never has",
    "unit": "1",
    "range": "[0, inf)",
    "source": "",
    "version": 1,
}


def place(tables: Tables, order: int, at: Place, against: str | None, change: dict[str, float | None]) -> Tables:
    """Return one checkpoint's tables with its place in the series.

    Args:
        tables: Of the checkpoint.
        order: Its place, from 0 on.
        at: What its names tell.
        against: The checkpoint that it is compared with.
        change: Numbers of the whole change since that one.
    """
    where = {"order": order, "stage": at.stage, "step": at.step, "tokens": at.tokens}
    columns = [pl.lit(where[name], dtype).alias(name) for name, dtype in TIMELINE.items()]
    numbers = [pl.lit(value, pl.Float64).alias(name) for name, value in (change | _middles(tables.metrics)).items()]
    models = tables.models.with_columns(*columns, pl.lit(against, pl.String).alias(*AGAINST), *numbers)
    manifest = {**tables.manifest, "models": [{**m, **where, "against": against} for m in tables.manifest["models"]]}
    return Tables(tables.metrics.with_columns(*columns), tables.spectra, models, tables.tensors, manifest)


def join(found: Sequence[Tables], manifest: dict[str, Any], warnings: Sequence[str]) -> Tables:
    """Return the tables of several checkpoints as those of their series.

    Args:
        found: One for each checkpoint, in order.
        manifest: What the caller knows; the rest is taken from theirs.
        warnings: Of the series; those of its checkpoints follow.
    """
    widest = max((tables.metrics.columns for tables in found), key=len)
    numbers = [name for name in widest if name not in LABELS | OUTCOME | TIMELINE]
    metrics = pl.concat([t.metrics for t in found], how="diagonal").select(*LABELS, *OUTCOME, *TIMELINE, *numbers)
    models = pl.concat([t.models for t in found], how="diagonal")
    described = found[-1].manifest["metrics"]
    if PEAKS in numbers:
        metrics = metrics.join(peaks_appear(metrics), on="name", how="left", maintain_order="left")
        models = models.join(_peaked(metrics), on="model", how="left", maintain_order="left")
        described = {**described, "peaks_appear": PEAKS_APPEAR}
    models = models.select(*MODELS, *TIMELINE, *AGAINST, pl.exclude(*MODELS, *TIMELINE, *AGAINST))
    joined = {
        **found[-1].manifest,
        **manifest,
        "models": [model for tables in found for model in tables.manifest["models"]],
        "metrics": described,
        "warnings": [*warnings, *_warnings(found), *row_warnings(metrics)],
    }
    return Tables(metrics, pl.concat([t.spectra for t in found]), models, pl.concat([t.tensors for t in found]), joined)


def peaks_appear(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return when the spectrum of each matrix first has at least two peaks.

    Args:
        metrics: Rows of a series, with ``peak_count``, ``order`` and ``step``.

    Returns:
        Columns name, ``peaks_appear``: the step, or the place in the series where steps do not rise along it, as over
        several stages; null for a matrix that never has two.
    """
    when = "step" if _rises(metrics) else "order"
    first = pl.col(when).cast(pl.Float64).sort_by("order").filter(pl.col(PEAKS).sort_by("order") >= 2).first()
    return metrics.group_by("name", maintain_order=True).agg(peaks_appear=first)


def _rises(metrics: pl.DataFrame) -> bool:
    steps = metrics.select("order", "step").unique().sort("order")["step"]
    return not steps.null_count() and bool((steps.diff().drop_nulls() > 0).all())


def _peaked(metrics: pl.DataFrame) -> pl.DataFrame:
    return metrics.group_by("model").agg(peaked_matrices=(pl.col(PEAKS) >= 2).sum().cast(pl.Float64))


def _middles(metrics: pl.DataFrame) -> dict[str, float | None]:
    """What a table over time shows of a whole model; a single row or column always has stable rank 1."""
    if "stable_rank" not in metrics.columns:
        return {}
    middle = metrics.filter(pl.min_horizontal("rows", "cols") > 1)["stable_rank"].median()
    return {"stable_rank_median": middle if isinstance(middle, float) else None}


def _warnings(found: Sequence[Tables]) -> list[str]:
    """What was said of checkpoints as wholes; what holds for several is said once."""
    told: dict[str, list[str]] = {}
    for tables in found:
        start = f"{tables.models['model'][0]}: "
        for text in tables.manifest["warnings"]:
            if text.startswith(start):
                told.setdefault(text.removeprefix(start), []).append(start.removesuffix(": "))
    return [f"{_who(names, len(found))}: {text}" for text, names in told.items()]


def _who(names: Sequence[str], count: int) -> str:
    if len(names) == count:
        return "all checkpoints"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
