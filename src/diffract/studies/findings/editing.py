"""What edits do to quality: rewound heads, truncated changes, paths between models."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from diffract.plots.heads import head_effects
from diffract.plots.searches import connectivity_matrix, curves, model_paths, rewind_curves, truncation_curves
from diffract.run import Run
from diffract.search import connect, search_rewind, search_truncate
from diffract.studies.finding import Evidence, Number, Verdict, better, finding, rank_correlation, shown
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
    run = _search_heads(study)
    task, unit = study.target.name, study.target.unit
    chosen = run.choice.filter(FORWARD)
    best = chosen.filter(pl.col("which") == "best")
    random = _median(best, "random", "held_out_gain")
    # By the gain on the selection items: the largest held-out gain of several would be so by luck too.
    rows = best.filter(pl.col("order").is_in(SAID)).sort("selection_gain", descending=True).to_dicts()
    gains = [
        Number(
            f"held-out gain of the best fraction, order {row['order']}",
            row["held_out_gain"],
            low=row["held_out_gain_low"],
            high=row["held_out_gain_high"],
            unit=unit,
            chance=random,
        )
        for row in rows
    ]
    verdict, because = better(gains[0], "rewinding these heads raises held-out quality")
    without_loss = chosen.filter(pl.col("which") == "without-loss")
    furthest = without_loss.sort("fraction", descending=True).row(0, named=True)
    at = f"The best of the orders {', '.join(SAID)} on the selection items: {rows[0]['fraction']:.3g} of the heads."
    return Evidence(
        verdict,
        f"{because} {at} The largest fraction without loss, on the same items: "
        f"{furthest['fraction']:.3g} (order {furthest['order']}). {study.tuning()}",
        numbers=[*gains, *_orders_without_loss(chosen), *_of_heads(run)],
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


def _search_heads(study: Study) -> Run:
    asked = study.recipe.search
    study.say(f"rewinding heads of {study.recipe.target}: {', '.join(asked.orders)}")
    # The search replaces its folder but not its scores, so that a study that was stopped goes on here too.
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


def _median(choice: pl.DataFrame, order: str, column: str) -> float | None:
    """Return the median over the seeds of an order."""
    return choice.filter(pl.col("order") == order)[column].median()  # pyright: ignore[reportReturnType] (Float64)


def _orders_without_loss(chosen: pl.DataFrame) -> list[Number]:
    rows = chosen.filter(pl.col("which") == "without-loss")
    random = _median(rows, "random", "fraction")
    return [
        Number(f"largest fraction without loss, order {row['order']}", row["fraction"], chance=random)
        for row in rows.filter(pl.col("order") != "random").iter_rows(named=True)
    ]


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


HALF = 0.5
"""Share of the directions that the claim drops."""

DROP = "drop"

BASE = "base"
"""What searches call the base; curves that lead to it, and paths from it, are not what the claims are about."""


@finding(
    title="Truncating the change",
    claim="Half and more of the change's singular directions can be dropped without loss.",
    control="the smallest directions, random ones and DARE at equal energy or equal bytes; medians over seeds",
)
def truncation(study: Study) -> Evidence:
    """Search truncation curves of the target; DARE and random directions at equal energy and bytes are the control."""
    run = _search_directions(study)
    task, tolerance = study.target.name, study.recipe.quality.tolerance
    held_out = run.points.filter(pl.col("split") == "held-out", pl.col("task") == task, pl.col("rule") != BASE)
    half = {row["rule"]: _rule_gain(row, study.target.unit) for row in _nearest(held_out, HALF).iter_rows(named=True)}
    verdict, because = better(half[DROP], f"half of the directions cost at most {tolerance:g}", than=-tolerance)
    return Evidence(
        verdict,
        f"{because} {_furthest_drop(run.choice)} {study.tuning()}",
        numbers=[*half.values(), *_rules_without_loss(run.choice)],
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


def _search_directions(study: Study) -> Run:
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


def _rule_gain(row: dict[str, Any], unit: str) -> Number:
    name = f"held-out gain at fraction {row['fraction']:.3g}, {_kept(row)}"
    return Number(name, row["gain"], low=row["gain_low"], high=row["gain_high"], unit=unit)


def _rules_without_loss(choice: pl.DataFrame) -> list[Number]:
    rows = choice.filter(pl.col("which") == "without-loss", pl.col("fraction").is_not_null())
    found = rows.group_by("rule", maintain_order=True).agg(pl.col("fraction", "bytes", "energy").median())
    return [
        Number(f"largest fraction without loss, {_kept(row)}", row["fraction"]) for row in found.iter_rows(named=True)
    ]


def _kept(row: dict[str, Any]) -> str:
    return f"{row['rule']} (energy {row['energy']:.3g}, bytes {row['bytes']:.3g})"


def _furthest_drop(choice: pl.DataFrame) -> str:
    rows = choice.filter(pl.col("which") == "without-loss", pl.col("rule") == DROP)
    if not rows.height:
        return "No fraction was without loss."
    row = rows.row(0, named=True)
    at = f"{row['fraction']:.3g}, with {row['energy']:.1%} of the energy"
    return f"The largest fraction without loss on the items that it is chosen by is {at}."


@finding(
    title="Connectivity of domains",
    claim="Checkpoints of different domains from one base are connected: no barrier on the straight path.",
    control="the straight line between the ends' qualities; a barrier is how far quality falls behind it",
)
def connectivity(study: Study) -> Evidence:
    """Walk from every domain to every other, from each budget."""
    runs = {tokens: _paths(study, tokens) for tokens in study.family.tuned}
    pairs = pl.concat(run.pairs.with_columns(tokens=pl.lit(tokens)) for tokens, run in runs.items())
    paths = pl.concat(run.paths.with_columns(tokens=pl.lit(tokens)) for tokens, run in runs.items())
    judged = pairs.filter(pl.col("counts"), pl.col("a") != BASE, pl.col("b") != BASE)
    last = judged.filter(pl.col("tokens") == study.family.last)
    barriers = [
        Number(
            f"barrier in {r['task']} between {r['a']} and {r['b']}",
            r["barrier"],
            low=r["low"],
            high=r["high"],
            chance=0.0,
        )
        for r in last.iter_rows(named=True)
    ]
    means = judged.group_by("tokens").agg(pl.col("barrier").mean()).sort("tokens")
    by_budget = [Number(f"mean barrier from {tokens:,} tokens", mean) for tokens, mean in means.iter_rows()]
    # Pairs and tasks differ in how high their barriers are at all; only what the budget changes is to be ranked.
    own = judged.with_columns(rest=pl.col("barrier") - pl.col("barrier").mean().over("a", "b", "task"))
    trend = rank_correlation(
        "rank correlation of barriers with the budget", np.log(own["tokens"].to_numpy()), own["rest"].to_numpy()
    )
    highest = judged.group_by("a", "b", "tokens", maintain_order=True).agg(pl.col("barrier").max())
    rows = highest.select(name=pl.format("{} and {}", "a", "b"), x="tokens", y="barrier")
    verdict, because = _judge(last, study.recipe.quality.tolerance)
    return Evidence(
        verdict,
        f"{because} Barriers against the budget: {shown(trend)}.",
        numbers=[*barriers, *by_budget, trend],
        figures=[
            (
                "Quality on the path of each pair from the largest budget, in every task; dotted is the line between "
                "the ends, a red bar the barrier.",
                model_paths(runs[study.family.last].paths),
            ),
            ("Barriers of all pairs from the largest budget.", connectivity_matrix(runs[study.family.last].pairs)),
            (
                "Highest barrier of each pair of domains against the budget.",
                curves(rows, x="pre-training tokens", y="highest barrier", log_x=True),
            ),
        ],
        tables={"pairs": pairs, "paths": paths, "simplex": runs[study.family.last].simplex},
    )


def _paths(study: Study, tokens: int) -> Run:
    study.say(f"paths between domains from {tokens:,} tokens")
    asked, tuned = study.recipe.search.paths, study.family.tuned[tokens]
    run = connect(
        study.family.bases[tokens],
        *tuned.items(),
        eval=[study.recipe.quality.tasks[domain] for domain in tuned],
        steps=asked.steps,
        tolerance=study.recipe.quality.tolerance,
        output=study.folder / "searches" / f"connect-{tokens}",
        data=study.data,
        limit=asked.limit,
        force=True,
    )
    assert isinstance(run, Run), "only a dry run gives something else"
    return run


def _judge(pairs: pl.DataFrame, tolerance: float) -> tuple[Verdict, str]:
    """Judge whether all pairs are connected, or one surely is not."""
    by_pair = pairs.group_by("a", "b").agg(pl.col("connected").all(), pl.col("low").max())
    connected, apart = by_pair["connected"].sum(), (by_pair["low"] > tolerance).sum()
    said = (
        f"{connected} of {by_pair.height} pairs have barriers surely below {tolerance:g} in both domains, {apart} "
        f"surely above in one; the highest is {pairs['barrier'].max():.3g}."
    )
    if connected == by_pair.height:
        return "holds", said
    return ("does not hold" if apart else "cannot tell"), said
