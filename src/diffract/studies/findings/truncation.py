"""How much of the change's spectrum can go without loss, and is that more than what any other cut gives?"""

from __future__ import annotations

from typing import Any

import polars as pl

from diffract.plots.searches import truncation_curves
from diffract.run import Run
from diffract.search import search_truncate
from diffract.studies.finding import Evidence, Number, better, finding
from diffract.studies.study import Study

HALF = 0.5
"""Share of the directions that the claim drops."""

DROP, BASE = "drop", "base"


@finding(
    title="Truncating the change",
    claim="Half and more of the change's singular directions can be dropped without loss.",
    control="the smallest directions, random ones and DARE at equal energy or equal bytes; medians over seeds",
)
def truncation(study: Study) -> Evidence:
    """Search truncation curves of the target; DARE and random directions at equal energy and bytes are the control."""
    run = _search(study)
    task, tolerance = study.target.name, study.recipe.quality.tolerance
    held_out = run.points.filter(pl.col("split") == "held-out", pl.col("task") == task, pl.col("rule") != BASE)
    half = {row["rule"]: _gain(row, study.target.unit) for row in _nearest(held_out, HALF).iter_rows(named=True)}
    verdict, because = better(half[DROP], f"half of the directions cost at most {tolerance:g}", than=-tolerance)
    return Evidence(
        verdict,
        f"{because} {_furthest(run.choice)} {study.tuning()}",
        numbers=[*half.values(), *_without_loss(run.choice)],
        figures=[
            (
                f"Held-out gain in {task} over the untruncated model against what is kept of the change; bands are "
                "paired 95% intervals, seeds of one control have one colour. drop, energy, donoho-gavish and mp-edge "
                "keep the largest directions.",
                truncation_curves(run.points, task),
            )
        ],
        tables={"points": run.points, "choice": run.choice},
    )


def _search(study: Study) -> Run:
    study.say(f"truncating the change of {study.recipe.target}")
    run = search_truncate(
        study.base,
        study.tuned[study.recipe.target],
        fractions=study.recipe.search.fractions,
        seeds=study.recipe.search.seeds,
        tolerance=study.recipe.quality.tolerance,
        output=study.folder / "searches" / "truncate",
        force=True,
        **study.searching(),
    )
    assert isinstance(run, Run), "only a dry run gives something else"
    return run


def _nearest(points: pl.DataFrame, fraction: float) -> pl.DataFrame:
    """Return each rule's point at the fraction next to one; of several seeds the median."""
    known = points.filter(pl.col("fraction").is_not_null())
    away = (pl.col("fraction") - fraction).abs()
    at = known.filter(away == away.min().over("rule"))
    middle = pl.col(["fraction", "energy", "bytes", "gain", "gain_low", "gain_high"]).median()
    return at.group_by("rule", maintain_order=True).agg(middle)


def _gain(row: dict[str, Any], unit: str) -> Number:
    name = f"held-out gain at fraction {row['fraction']:.3g}, {_kept(row)}"
    return Number(name, row["gain"], low=row["gain_low"], high=row["gain_high"], unit=unit)


def _without_loss(choice: pl.DataFrame) -> list[Number]:
    rows = choice.filter(pl.col("which") == "without-loss", pl.col("fraction").is_not_null())
    found = rows.group_by("rule", maintain_order=True).agg(pl.col("fraction", "bytes", "energy").median())
    return [
        Number(f"largest fraction without loss, {_kept(row)}", row["fraction"]) for row in found.iter_rows(named=True)
    ]


def _kept(row: dict[str, Any]) -> str:
    return f"{row['rule']} (energy {row['energy']:.3g}, bytes {row['bytes']:.3g})"


def _furthest(choice: pl.DataFrame) -> str:
    rows = choice.filter(pl.col("which") == "without-loss", pl.col("rule") == DROP)
    if not rows.height:
        return "No fraction was without loss."
    row = rows.row(0, named=True)
    at = f"{row['fraction']:.3g}, with {row['energy']:.1%} of the energy"
    return f"The largest fraction without loss on the items that it is chosen by is {at}."
