"""Does continual pre-training leave singular values alone and turn singular vectors, and where along the spectrum?"""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from diffract.api import compare
from diffract.plots.agreement import profile
from diffract.plots.searches import curves
from diffract.studies.finding import Evidence, Number, better, finding, median, shown
from diffract.studies.study import NOISE, Study

METRICS = (
    "delta_frobenius", "delta_relative", "value_share", "value_share_chance", "spectral_shift_share",
    "left_agreement_mean",
    "left_agreement_chance", "left_subspace_8", "left_subspace_8_chance", "profile",
)  # fmt: skip
MOST = 0.9
"""Share of the change that the claim has in vectors."""


@finding(
    title="Singular values against singular vectors",
    claim="Continual pre-training hardly touches singular values; it turns singular vectors.",
    control="noise of the same norm in every tensor; and 1 / max(m, n), what random directions put into values",
)
def vectors(study: Study) -> Evidence:
    """Split each matrix's change into values and vectors; noise of the same norms is the control."""
    tuned = study.tuned
    study.say(f"base against {len(tuned)} domains and noise")
    models = [f"{name}={ref}" for name, ref in {**tuned, NOISE: study.noise(study.recipe.target)}.items()]
    run = compare(study.base, *models, metrics=METRICS, cache=False)
    changed = run.metrics.filter(pl.col("delta_frobenius") > 0, pl.col("block").is_in(["attn", "mlp"]))
    of = {name: changed.filter(pl.col("model") == name) for name in [*tuned, NOISE]}
    shares = {
        name: median(
            f"share of the change in singular values, {name}, median over matrices",
            rows["value_share"].to_list(),
            chance=rows["value_share_chance"].median(),  # pyright: ignore[reportArgumentType] (Float64)
        )
        for name, rows in of.items()
    }
    target = shares[study.recipe.target]
    value, low, high = (None if v is None else 1 - v for v in (target.value, target.high, target.low))
    in_vectors = Number("share of the change in singular vectors", value, low=low, high=high)
    verdict, because = better(in_vectors, "nine tenths of the change and more turn vectors", than=MOST)
    return Evidence(
        verdict,
        f"{because} {_of_noise(shares[NOISE], target)}",
        numbers=[in_vectors, *shares.values()],
        figures=[
            _figure(of, "value_share", "share of the change in singular values"),
            _figure(of, "left_agreement_mean", "mean |cos| of left vectors"),
            (
                "Where along the spectrum of the base the change sits, beside what noise and turns would give.",
                profile(run.metrics, run.spectra, model=study.recipe.target),
            ),
        ],
        tables={"metrics": run.metrics, "models": run.models},
    )


def _of_noise(noise: Number, share: Number) -> str:
    said = f"Noise of the same norms has {shown(noise)} in values"
    if not noise.value or noise.high is None or share.value is None or noise.high > 1 - MOST:
        return f"{said}."
    times = share.value / noise.value
    return (
        f"{said}: any small change in many dimensions mostly turns vectors, and this one has {times:.2g} times as much."
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
