"""Does rewinding heads raise quality, and how many can go back to the base without loss?"""

from __future__ import annotations

from typing import Any

import polars as pl

from diffract.plots.curves import curves
from diffract.search import search_rewind
from diffract.search.tables import RewindTables
from diffract.studies.finding import Finding, Number
from diffract.studies.study import Study
from diffract.studies.verdicts import better

SAID = ("greedy", "reference")
"""The orders that the claim is about."""


def rewind(study: Study) -> Finding:
    """Search rewind curves of the target; random and reversed orders are the control."""
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
    assert isinstance(run, RewindTables)
    task = study.target.name
    best = {order: _best(run.choice, order, task) for order in SAID if order in asked.orders}
    gains = {order: _gain(row, f"held-out gain of the best fraction, order {order}", study.target.unit) for order, row in best.items()}
    control = _control(run.choice, task)
    order, gain = max(gains.items(), key=lambda pair: pair[1].value if pair[1].value is not None else float("-inf"))
    verdict, because = better(gain, "rewinding these heads raises held-out quality")
    return Finding(
        name="rewind",
        title="Rewinding heads",
        claim="Rewinding some heads to the base raises quality; many can go back without loss.",
        verdict=verdict,
        because=f"{because} The fraction was {best[order]['fraction']:.3g}, chosen on other items. {_furthest(run.choice, task, asked.orders)}",
        control="random orders, and every order reversed, chosen and reported in the same way",
        numbers=[
            *(Number(n.name, n.value, n.low, n.high, n.unit, control) for n in gains.values()),
            *(
                Number(f"largest fraction without loss, order {o}", row["fraction"], chance=_random_fraction(run.choice, task))
                for o in asked.orders
                if (row := _row(run.choice, o, task, "without-loss")) is not None
            ),
            *_of_heads(run),
        ],
        figures=[
            (f"Held-out gain in {task} over the tuned model against the share of rewound heads; bands are paired 95% "
             "intervals over items.", _figure(run.points, task, "held-out")),
            ("The same on the items that fractions and the greedy order are chosen by.", _figure(run.points, task, "selection")),
        ],
        tables={"points": run.points.drop("heads"), "effects": run.effects, "orders": run.orders, "choice": run.choice.drop("heads")},
    )  # fmt: skip


def _row(choice: pl.DataFrame, order: str, task: str, which: str) -> dict[str, Any] | None:
    rows = choice.filter(
        pl.col("order") == order, ~pl.col("reverse").fill_null(value=False), pl.col("task") == task, pl.col("which") == which
    )
    return rows.row(0, named=True) if rows.height else None


def _best(choice: pl.DataFrame, order: str, task: str) -> dict[str, Any]:
    row = _row(choice, order, task, "best")
    assert row is not None, "every order has a best point"
    return row


def _gain(row: dict[str, Any], name: str, unit: str) -> Number:
    return Number(name, row["held_out_gain"], row["held_out_gain_low"], row["held_out_gain_high"], unit)


def _control(choice: pl.DataFrame, task: str) -> float | None:
    """The median of what random orders gain, each at its best fraction."""
    rows = choice.filter(pl.col("order") == "random", pl.col("task") == task, pl.col("which") == "best")
    return rows["held_out_gain"].median() if rows.height else None  # pyright: ignore[reportReturnType] (Float64)


def _random_fraction(choice: pl.DataFrame, task: str) -> float | None:
    rows = choice.filter(pl.col("order") == "random", pl.col("task") == task, pl.col("which") == "without-loss")
    return rows["fraction"].median() if rows.height else None  # pyright: ignore[reportReturnType] (Float64)


def _furthest(choice: pl.DataFrame, task: str, orders: list[str]) -> str:
    found = {o: row["fraction"] for o in orders if (row := _row(choice, o, task, "without-loss")) is not None}
    if not found:
        return "No fraction is without loss on the items that it is chosen by."
    order = max(found, key=lambda name: found[name])
    return f"The largest fraction without loss on the items that it is chosen by is {found[order]:.3g} (order {order})."


def _of_heads(run: RewindTables) -> list[Number]:
    known = run.effects.filter(pl.col("effect").is_not_null())
    helped = known.filter(pl.col("effect") > 0, pl.col("p_holm") < 0.05).height
    hurt = known.filter(pl.col("effect") < 0, pl.col("p_holm") < 0.05).height
    return [
        Number("heads whose rewinding alone helps (Holm, 5%)", helped, unit=f"of {known.height}"),
        Number("heads whose rewinding alone hurts (Holm, 5%)", hurt, unit=f"of {known.height}"),
        *(
            Number(f"rank correlation of order {row['order']} with measured effects", row["spearman"], chance=0.0)
            for row in run.orders.iter_rows(named=True)
            if row["order"] not in ("greedy", "random")
        ),
    ]


def _figure(points: pl.DataFrame, task: str, split: str) -> Any:
    rows = points.filter(pl.col("task") == task, pl.col("split") == split, pl.col("fraction").is_not_null())
    name = pl.concat_str(
        pl.col("order"),
        pl.when(pl.col("reverse")).then(pl.lit(" reversed")).otherwise(pl.lit("")),
        pl.when(pl.col("order") == "random").then(pl.concat_str(pl.lit(" "), pl.col("seed").cast(pl.String))).otherwise(pl.lit("")),
    )
    table = rows.select(name=name, x="fraction", y="gain", low="gain_low", high="gain_high")
    return curves(table, x="share of heads rewound", y=f"gain in {task}", zero=True, height=420)
