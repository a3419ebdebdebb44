"""Does rewinding heads raise quality, and how many can go back to the base without loss?"""

from __future__ import annotations

from typing import Any

import polars as pl

from diffract.plots.heads import head_effects
from diffract.plots.searches import rewind_curves
from diffract.run import Run
from diffract.search import search_rewind
from diffract.studies.finding import Evidence, Number, better, finding
from diffract.studies.study import Study

SAID = ("greedy", "reference")
"""The orders that the claim is about."""

LEVEL = 0.05
FORWARD = ~pl.col("reverse").fill_null(value=False)


@finding(
    title="Rewinding heads",
    claim="Rewinding some heads to the base raises quality; many can go back without loss.",
    control="random orders, chosen and reported in the same way; and every order reversed",
)
def rewind(study: Study) -> Evidence:
    """Search rewind curves of the target; random and reversed orders are the control."""
    run = _search(study)
    task, unit = study.target.name, study.target.unit
    chosen = run.choice.filter(FORWARD)
    best = chosen.filter(pl.col("which") == "best")
    random = _median(best, "random", "held_out_gain")
    rows = best.filter(pl.col("order").is_in(SAID)).sort("selection_gain", descending=True).to_dicts()
    gains = [_gain(row, unit, random) for row in rows]
    verdict, because = better(gains[0], "rewinding these heads raises held-out quality")
    at = f"The best of the orders {', '.join(SAID)} on the selection items: {rows[0]['fraction']:.3g} of the heads."
    return Evidence(
        verdict,
        f"{because} {at} {_furthest(chosen)} {study.tuning()}",
        numbers=[*gains, *_without_loss(chosen), *_of_heads(run)],
        figures=[
            (
                f"Gain in {task} over the tuned model against the share of rewound heads, on the items that fractions "
                "and orders are chosen by, and on others. Bands are paired 95% intervals; controls are thin.",
                rewind_curves(run.points, task),
            ),
            ("What rewinding each head alone gains, on the selection items.", head_effects(run.effects)),
        ],
        tables={
            "points": run.points.drop("heads"),
            "effects": run.effects,
            "orders": run.orders,
            "choice": run.choice.drop("heads"),
        },
    )


def _search(study: Study) -> Run:
    asked = study.recipe.search
    study.say(f"rewinding heads of {study.recipe.target}: {', '.join(asked.orders)}")
    run = search_rewind(
        study.base,
        study.tuned[study.recipe.target],
        order=asked.orders,
        reference=study.tuned[study.recipe.reference],
        fractions=asked.fractions,
        seeds=asked.seeds,
        tolerance=study.recipe.quality.tolerance,
        output=study.folder / "searches" / "rewind",
        force=True,
        **study.searching(),
    )
    assert isinstance(run, Run), "only a dry run gives something else"
    return run


def _gain(row: dict[str, Any], unit: str, random: float | None) -> Number:
    name = f"held-out gain of the best fraction, order {row['order']}"
    low, high = row["held_out_gain_low"], row["held_out_gain_high"]
    return Number(name, row["held_out_gain"], low=low, high=high, unit=unit, chance=random)


def _median(choice: pl.DataFrame, order: str, column: str) -> float | None:
    """Return the median over the seeds of an order."""
    return choice.filter(pl.col("order") == order)[column].median()  # pyright: ignore[reportReturnType] (Float64)


def _without_loss(chosen: pl.DataFrame) -> list[Number]:
    rows = chosen.filter(pl.col("which") == "without-loss")
    random = _median(rows, "random", "fraction")
    return [
        Number(f"largest fraction without loss, order {row['order']}", row["fraction"], chance=random)
        for row in rows.filter(pl.col("order") != "random").iter_rows(named=True)
    ]


def _furthest(chosen: pl.DataFrame) -> str:
    rows = chosen.filter(pl.col("which") == "without-loss").sort("fraction", descending=True)
    row = rows.row(0, named=True)
    return f"The largest fraction without loss, on the same items: {row['fraction']:.3g} (order {row['order']})."


def _of_heads(run: Run) -> list[Number]:
    """Return how many heads matter alone, and how well each cheaper order ranks them."""
    known = run.effects.filter(pl.col("effect").is_not_null())
    sure = known.filter(pl.col("p_holm") < LEVEL)
    unit = f"of {known.height}"
    return [
        Number("heads whose rewinding alone helps (Holm, 5%)", sure.filter(pl.col("effect") > 0).height, unit=unit),
        Number("heads whose rewinding alone hurts (Holm, 5%)", sure.filter(pl.col("effect") < 0).height, unit=unit),
        *(
            Number(f"rank correlation of order {row['order']} with measured effects", row["spearman"], chance=0.0)
            for row in run.orders.iter_rows(named=True)
        ),
    ]
