"""What training did as it went on: longer budgets, spectra that evolve, metrics that track the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract.api import trajectory
from diffract.plots.searches import curves
from diffract.plots.training import evolution as draw
from diffract.stats import holm, spearman_pvalue
from diffract.studies.finding import FEWEST, Evidence, Number, Verdict, better, finding, median, rank_correlation, shown
from diffract.studies.study import Study


@finding(
    title="Quality after continual pre-training against the pre-training budget",
    claim="Longer pre-training makes better continual pre-training.",
    control="the bases themselves, without continual pre-training, on the same items",
)
def budget(study: Study) -> Evidence:
    """Compare the tuned models of all budgets; the bases themselves are the control."""
    tuned = {tokens: models[study.recipe.target] for tokens, models in study.family.tuned.items()}
    bases = {tokens: study.family.bases[tokens] for tokens in tuned}
    first, last = min(tuned), max(tuned)
    gain = study.gain(tuned[first], tuned[last])
    without = study.gain(bases[first], bases[last])
    table = pl.concat(
        study.quality(ref).with_columns(tokens=pl.lit(tokens), name=pl.lit(name))
        for name, models in (("base", bases), (f"tuned on {study.recipe.target}", tuned))
        for tokens, ref in models.items()
    )
    claimed = f"gain of the largest budget over the smallest, {study.recipe.target}-tuned"
    others = [task for task in study.tasks if task.name in study.recipe.quality.further]
    numbers = [
        replace(gain, name=claimed, chance=without.value),
        replace(without, name="the same of the bases"),
        *(replace(study.gain(tuned[first], tuned[last], task), name=f"{claimed}, in {task.name}") for task in others),
        *(replace(study.gain(bases[t], tuned[t]), name=f"gain of tuning from {t:,} tokens") for t in tuned),
    ]
    verdict, because = better(gain, f"the model tuned from {last:,} tokens is better than that from {first:,}")
    figures: list[tuple[str, go.Figure]] = []
    for task in study.tasks:
        rows = table.filter(pl.col("task") == task.name).select("name", "low", "high", x="tokens", y="quality")
        # Budgets grow by factors, and quality with their logarithm.
        made = curves(rows, x="pre-training tokens", y=f"{task.name}, {task.unit}", log_x=True)
        told = f"Held-out quality in {task.name} against the pre-training budget; bands are 95% intervals over items."
        figures.append((told, made))
    return Evidence(
        verdict,
        because,
        numbers=numbers,
        figures=figures,
        tables={"quality": table, "all_domains": _all_domains(study)},
    )


def _all_domains(study: Study) -> pl.DataFrame:
    """Return the quality of every base and tuned model in every task."""
    return pl.concat(
        study.quality(ref).with_columns(tokens=pl.lit(tokens), model=pl.lit(domain))
        for tokens, models in study.family.tuned.items()
        for domain, ref in {"base": study.family.bases[tokens], **models}.items()
    )


EVOLVING = (
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
    run = trajectory(*series, by=r"tokens(?P<tokens>\d+)", metrics=EVOLVING, cache=False)
    whole = run.metrics.filter(pl.col("block").is_in(["attn", "mlp"]))
    first, last = (whole.filter(pl.col("order") == order) for order in (whole["order"].min(), whole["order"].max()))
    outliers = _spectral_change(
        "outliers gained from the first base to the last, median over matrices", first, last, "mp_spikes_tw"
    )
    rank = _spectral_change("effective rank gained, median over matrices", first, last, "effective_rank")
    peaks = _spectral_change("peaks gained, median over matrices", first, last, "peak_count")
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


def _spectral_change(name: str, first: pl.DataFrame, last: pl.DataFrame, metric: str) -> Number:
    pairs = first.select("name", before=metric).join(last.select("name", after=metric), on="name")
    return median(name, (pairs["after"] - pairs["before"]).to_list(), chance=0.0)


DEGREE = 3
"""Degree of the polynomial in log tokens that is taken out of metric and loss."""

LEVEL = 0.05

TRACKED = (
    "alpha_hat",
    "pl_alpha",
    "stable_rank",
    "effective_rank",
    "spectral_norm",
    "frobenius_norm",
    "entry_std",
    "mp_soft_rank",
)


@finding(
    title="Do spectral metrics track held-out loss?",
    claim="Metrics such as alpha-hat and stable rank follow quality over training without any data.",
    control="the number of tokens, which needs no spectrum, and what remains once its logarithm is out of both",
)
def tracking(study: Study) -> Evidence:
    """Correlate the median of each metric with held-out quality over all bases; the token count is the control."""
    study.say(f"held-out quality and spectra of {len(study.family.bases)} bases")
    table = _table(study)
    task = study.task_of[study.recipe.reference]
    losses, tokens = table[task].to_numpy(), table["tokens"].to_numpy()
    control = rank_correlation("tokens", tokens, losses)
    raw = {name: rank_correlation(name, table[name].to_numpy(), losses) for name in TRACKED}
    beyond = {name: _beyond(name, table[name].to_numpy(), losses, tokens) for name in TRACKED}
    known = {name: number.value for name, number in beyond.items() if number.value is not None}
    count = int((tokens > 0).sum())
    # Each power of the logarithm that is taken out costs a checkpoint; Holm, as one metric of many follows by chance.
    adjusted = holm([spearman_pvalue(value, count - DEGREE) for value in known.values()])
    strong = [name for name, p in zip(known, adjusted, strict=True) if p < LEVEL]
    verdict, because = _judge(len(losses), raw, strong, control)
    return Evidence(
        verdict,
        because,
        numbers=[
            control,
            *(replace(n, name=f"rank correlation of {n.name} with {task}", chance=control.value) for n in raw.values()),
            *(replace(n, name=f"the same of {n.name} beyond log tokens") for n in beyond.values()),
        ],
        figures=[_loss_figure(table, task)],
        tables={"medians": table},
    )


def _table(study: Study) -> pl.DataFrame:
    """Return a row for each base: tokens, quality in each task, median of each metric over matrices."""
    series = [f"tokens{tokens}={ref}" for tokens, ref in study.family.bases.items()]
    run = trajectory(*series, by=r"tokens(?P<tokens>\d+)", metrics=TRACKED, heads=False, cache=False)
    medians = run.metrics.group_by("tokens").agg(pl.col(name).median() for name in TRACKED).sort("tokens")
    rows = []
    for tokens, ref in study.family.bases.items():
        quality = study.quality(ref)
        rows.append({"tokens": tokens} | dict(zip(quality["task"], quality["quality"], strict=True)))
    return pl.DataFrame(rows).join(medians, on="tokens").sort("tokens")


def _beyond(name: str, metric: np.ndarray, loss: np.ndarray, tokens: np.ndarray) -> Number:
    """Return the rank correlation of what a cubic in log tokens leaves of both, over checkpoints after zero tokens."""
    seen = tokens > 0
    if seen.sum() < FEWEST + DEGREE:
        return Number(name, None, chance=0.0)
    # Both fall with training whatever the metric is: only what the budget does not foretell counts for it.
    time = np.log(tokens[seen])
    rests = [values[seen] - np.polyval(np.polyfit(time, values[seen], DEGREE), time) for values in (metric, loss)]
    return rank_correlation(name, *rests, given=DEGREE)


def _judge(count: int, raw: dict[str, Number], strong: list[str], control: Number) -> tuple[Verdict, str]:
    best = max(raw.values(), key=lambda number: abs(number.value or 0))
    said = (
        f"Over {count} checkpoints {best.name} follows the loss best, rank correlation {shown(best)}; "
        f"the token count alone has {shown(control)}."
    )
    # Nothing can be refuted by few checkpoints either: the verdict is neither.
    if count < FEWEST + DEGREE + 1:
        return "cannot tell", f"{said} With so few checkpoints nothing beyond the token count can be told."
    if strong:
        return "holds", f"{said} Beyond the token count {', '.join(strong)} still follow it (Holm, 5%)."
    return "cannot tell", f"{said} Beyond the token count none of {len(raw)} is shown to follow it (Holm, 5%)."


def _loss_figure(table: pl.DataFrame, task: str) -> tuple[str, go.Figure]:
    scaled = pl.concat(
        table.select(name=pl.lit(name), x="tokens", y=(pl.col(name) - pl.col(name).mean()) / pl.col(name).std())
        for name in (task, *TRACKED)
    )
    caption = f"Quality in {task} and the medians of metrics over pre-training, each scaled to mean 0 and deviation 1."
    return caption, curves(scaled, x="pre-training tokens", y="standard deviations from the mean", log_x=True)
