"""How spectra evolve over pre-training: do they leave what a random matrix shows, and do peaks appear?"""

from __future__ import annotations

import polars as pl

from diffract.api import trajectory
from diffract.plots.training import evolution as draw
from diffract.studies.finding import Evidence, Number, better, finding, median, shown
from diffract.studies.study import Study

METRICS = (
    "effective_rank",
    "stable_rank",
    "spectral_norm",
    "mp_spikes_tw",
    "mp_ks",
    "peak_count",
    "pl_alpha",
    "delta_relative",
)
SHOWN = ("effective_rank", "mp_spikes_tw", "peak_count", "pl_alpha", "delta_relative")

CAPTIONS = {
    "effective_rank": "Effective rank of every matrix over pre-training.",
    "mp_spikes_tw": "Eigenvalues above the 99% Tracy-Widom edge of the fitted Marchenko-Pastur law: outliers.",
    "peak_count": "Peaks in the density of ln sigma.",
    "pl_alpha": "Exponent of the power law fitted to the tail.",
    "delta_relative": "Change since the checkpoint before, relative.",
}


@finding(
    title="Evolution of spectra over pre-training",
    claim="Pre-training writes structure into spectra: outliers beyond random-matrix theory, peaks, a lower rank.",
    control="the Marchenko-Pastur law fitted to the same matrix: noise has an outlier in 1% of matrices",
)
def evolution(study: Study) -> Evidence:
    """Follow all bases; the Marchenko-Pastur law fitted to the same matrix is the control."""
    series = [f"tokens{tokens}={ref}" for tokens, ref in study.family.bases.items()]
    study.say(f"spectra of {len(series)} bases")
    run = trajectory(*series, by=r"tokens(?P<tokens>\d+)", metrics=METRICS, cache=False)
    whole = run.metrics.filter(pl.col("block").is_in(["attn", "mlp"]))
    first, last = (whole.filter(pl.col("order") == order) for order in (whole["order"].min(), whole["order"].max()))
    outliers = _change(
        "outliers gained from the first base to the last, median over matrices", first, last, "mp_spikes_tw"
    )
    rank = _change("effective rank gained, median over matrices", first, last, "effective_rank")
    peaks = _change("peaks gained, median over matrices", first, last, "peak_count")
    verdict, because = better(outliers, "matrices gain eigenvalues that noise would not have")
    return Evidence(
        verdict,
        f"{because} Effective rank: {shown(rank)}; peaks: {shown(peaks)}.",
        numbers=[
            outliers,
            rank,
            peaks,
            median(
                "outliers of the last base, median over matrices",
                last["mp_spikes_tw"].to_list(),
                unit="count",
                chance=0.01,
            ),
            median("power-law exponent of the last base, median over matrices", last["pl_alpha"].to_list()),
        ],
        figures=[(CAPTIONS[name], draw(run.metrics, name, over="tokens", axes="lin-log")) for name in SHOWN],
        tables={"metrics": run.metrics, "models": run.models},
    )


def _change(name: str, first: pl.DataFrame, last: pl.DataFrame, metric: str) -> Number:
    pairs = first.select("name", before=metric).join(last.select("name", after=metric), on="name")
    return median(name, (pairs["after"] - pairs["before"]).to_list(), chance=0.0)
