"""Are domains connected by straight paths, and does the barrier depend on the pre-training budget?"""

from __future__ import annotations

import numpy as np
import polars as pl

from diffract.plots.searches import connectivity_matrix, curves, model_paths
from diffract.run import Run
from diffract.search import connect
from diffract.studies.finding import Evidence, Number, Verdict, finding, rank_correlation, shown
from diffract.studies.study import Study

BASE = "base"
"""What paths from the base are called; the claim is about domains."""


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
