"""The headline numbers in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from diffract.errors import printable


@dataclass(frozen=True)
class Headline:
    """One number and what it says.

    Attributes:
        model: Of which model it speaks.
        figure: The number, as it is shown large.
        text: The sentence that goes with it.
    """

    model: str
    figure: str
    text: str


def headlines(models: pl.DataFrame, metrics: pl.DataFrame) -> list[Headline]:
    """Return the headlines of a run; of a scan, those of its only model; of a trajectory, those of the series."""
    if models["role"][0] == "checkpoint":
        return _of_trajectory(models)
    tuned = models.filter(pl.col("role") == "tuned")
    if not len(tuned):
        return _of_scan(models, metrics)
    return [headline for row in tuned.iter_rows(named=True) for headline in _of_tuned(row)]


def _of_tuned(row: dict[str, Any]) -> list[Headline]:
    name = printable(row["model"], 60)
    found = []
    if (relative := row.get("delta_relative")) is not None:
        text = "is the size of the change relative to the base (Frobenius norm)"
        if (changed := row.get("changed_share")) is not None:
            text += f"; {changed:.1%} of the stored weights differ"
        found.append(Headline(name, percent(relative), text + "."))
    if (share := row.get("value_share")) is not None:
        chance = row["value_share_chance"]
        text = (
            f"of the change lies in singular vectors, {percent(share)} in singular values (chance {percent(chance)})."
        )
        found.append(Headline(name, percent(1 - share), text))
    if (top := row.get("head_top10_share")) is not None:
        even = row["head_top10_share_chance"]
        text = (
            f"of the change in attention is carried by the top tenth of heads (an even spread gives {percent(even)})."
        )
        found.append(Headline(name, percent(top), text))
    if (shift := row.get("spectral_shift_share")) is not None:
        text = "of the change is what moving the singular values alone would take (sum of squared shifts; Mirsky)."
        found.append(Headline(name, percent(shift), text))
    return found


def _of_scan(models: pl.DataFrame, metrics: pl.DataFrame) -> list[Headline]:
    name = printable(models["model"][0], 60)
    found = [Headline(name, f"{len(metrics):,}", "matrices and attention heads were analysed.")]
    if "stable_rank" in metrics.columns:
        heads = metrics.filter(pl.col("head").is_not_null() | pl.col("kv_head").is_not_null())
        rows = heads if len(heads) else metrics
        kind = "attention heads" if len(heads) else "matrices"
        middle = rows["stable_rank"].median()
        if isinstance(middle, float):
            found.append(Headline(name, f"{middle:.3g}", f"is the median stable rank of the {kind}."))
    return found


def _of_trajectory(models: pl.DataFrame) -> list[Headline]:
    first, last = models.row(0, named=True), models.row(-1, named=True)
    found = [Headline("", str(len(models)), f"checkpoints, from {_at(first)} to {_at(last)}.")]
    if "delta_relative" in models.columns:
        changes = models.filter(pl.col("delta_relative").is_not_null()).to_dicts()
        for row in (changes[:1] + changes[-1:]) if len(changes) > 1 else changes:
            start, end = printable(row["against"], 60), printable(row["model"], 60)
            text = f"is the size of the change from {start} to {end} relative to {start} (Frobenius norm)."
            found.append(Headline("", percent(row["delta_relative"]), text))
    if "peaked_matrices" in models.columns:
        before = f"{first['peaked_matrices']:.0f} in the first"
        text = f"matrices have at least two spectral peaks in the last checkpoint, {before}."
        found.append(Headline("", f"{last['peaked_matrices']:.0f}", text))
    return found


def _at(row: dict[str, Any]) -> str:
    told = [f"{what} {row[what]:,}" for what in ("stage", "step") if row[what] is not None]
    return " ".join(told) or printable(row["model"], 60)


def percent(value: float) -> str:
    """A share for people, with as many digits as it takes to be no zero.

    >>> percent(0.923), percent(0.0002), percent(0.999999)
    ('92%', '0.02%', '99.9999%')
    """
    distance = min(abs(value), abs(1 - value)) if 0 <= value <= 1 else abs(value)
    digits = 0
    while digits < 4 and 0 < distance * 100 * 10**digits < 1:
        digits += 1
    return f"{value:.{digits}%}"
