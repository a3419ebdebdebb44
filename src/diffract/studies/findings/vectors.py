"""Does continual pre-training leave singular values alone and turn singular vectors, and where along the spectrum?"""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from diffract.api import compare
from diffract.plots.agreement import profile
from diffract.plots.searches import curves
from diffract.studies.finding import Evidence, better, finding, median, shown
from diffract.studies.study import NOISE, Study

METRICS = (
    "delta_frobenius", "delta_relative", "value_share_free", "spectral_shift_share_free",
    "left_agreement_mean", "left_agreement_chance", "left_subspace_8", "left_subspace_8_chance", "profile",
)  # fmt: skip


@finding(
    title="Singular values against singular vectors",
    claim="Continual pre-training moves singular values less than noise of the same norm does; it turns vectors.",
    control="noise of the same norm in every tensor; of both changes, what scales a matrix as a whole is left out",
)
def vectors(study: Study) -> Evidence:
    """Split each matrix's change into values and vectors; noise of the same norms is the control.

    Of any small change in many dimensions nearly all turns vectors, of noise 99%: alone, the share says nothing.
    """
    tuned = study.tuned
    study.say(f"base against {len(tuned)} domains and noise")
    models = [f"{name}={ref}" for name, ref in {**tuned, NOISE: study.noise(study.recipe.target)}.items()]
    run = compare(study.base, *models, metrics=METRICS, cache=False, noise="none")
    changed = run.metrics.filter(pl.col("delta_frobenius") > 0, pl.col("block").is_in(["attn", "mlp"]))
    of = {name: changed.filter(pl.col("model") == name) for name in [*tuned, NOISE]}
    moved, along = (
        {name: median(f"{metric}, {name}, median over matrices", rows[metric].to_list()) for name, rows in of.items()}
        for metric in ("spectral_shift_share_free", "value_share_free")
    )
    target = study.recipe.target
    pairs = of[target].join(of[NOISE], on="name", suffix="_noise")
    less = median(
        "share of the change that moving singular values alone would take, noise's less its own, median over matrices",
        (pairs["spectral_shift_share_free_noise"] - pairs["spectral_shift_share_free"]).to_list(),
    )
    verdict, because = better(less, "singular values move less than noise of the same norm moves them")
    beside = f"Along directions of the base lie {shown(along[target])} of the change, {shown(along[NOISE])} of noise."
    return Evidence(
        verdict,
        f"{because} {beside}",
        numbers=[less, *moved.values(), *along.values()],
        figures=[
            _figure(of, "value_share_free", "share of the change in singular values"),
            _figure(of, "left_agreement_mean", "mean |cos| of left vectors"),
            (
                "Where along the spectrum of the base the change sits, beside what noise and turns would give.",
                profile(run.metrics, run.spectra, model=study.recipe.target),
            ),
        ],
        tables={"metrics": run.metrics, "models": run.models},
    )


def _figure(of: dict[str, pl.DataFrame], metric: str, title: str) -> tuple[str, go.Figure]:
    table = pl.concat(
        rows.group_by("layer").agg(
            y=pl.col(metric).median(), low=pl.col(metric).quantile(0.25), high=pl.col(metric).quantile(0.75)
        ).select(name=pl.lit(name), x="layer", y="y", low="low", high="high")
        for name, rows in of.items()
    )  # fmt: skip
    return f"{title[0].upper()}{title[1:]} by layer: median over matrices, band of quartiles.", curves(
        table, x="layer", y=title
    )
