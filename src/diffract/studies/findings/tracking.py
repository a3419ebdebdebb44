"""Do spectral metrics track held-out loss over pre-training, beyond what the token count already says?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract.api import trajectory
from diffract.plots.searches import curves
from diffract.stats import holm, spearman_pvalue
from diffract.studies.finding import FEWEST, Evidence, Number, Verdict, finding, rank_correlation, shown
from diffract.studies.study import Study

DEGREE = 3
"""Degree of the polynomial in log tokens that is taken out of metric and loss."""

LEVEL = 0.05

METRICS = (
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
    raw = {name: rank_correlation(name, table[name].to_numpy(), losses) for name in METRICS}
    beyond = {name: _beyond(name, table[name].to_numpy(), losses, tokens) for name in METRICS}
    known = {name: number.value for name, number in beyond.items() if number.value is not None}
    count = int((tokens > 0).sum())
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
        figures=[_figure(table, task)],
        tables={"medians": table},
    )


def _table(study: Study) -> pl.DataFrame:
    """Return a row for each base: tokens, quality in each task, median of each metric over matrices."""
    series = [f"tokens{tokens}={ref}" for tokens, ref in study.family.bases.items()]
    run = trajectory(*series, by=r"tokens(?P<tokens>\d+)", metrics=METRICS, heads=False, cache=False)
    medians = run.metrics.group_by("tokens").agg(pl.col(name).median() for name in METRICS).sort("tokens")
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
    time = np.log(tokens[seen])
    rests = [values[seen] - np.polyval(np.polyfit(time, values[seen], DEGREE), time) for values in (metric, loss)]
    return rank_correlation(name, *rests, given=DEGREE)


def _judge(count: int, raw: dict[str, Number], strong: list[str], control: Number) -> tuple[Verdict, str]:
    best = max(raw.values(), key=lambda number: abs(number.value or 0))
    said = (
        f"Over {count} checkpoints {best.name} follows the loss best, rank correlation {shown(best)}; "
        f"the token count alone has {shown(control)}."
    )
    if count < FEWEST + DEGREE + 1:
        return "cannot tell", f"{said} With so few checkpoints nothing beyond the token count can be told."
    if strong:
        return "holds", f"{said} Beyond the token count {', '.join(strong)} still follow it (Holm, 5%)."
    return "cannot tell", f"{said} Beyond the token count none of {len(raw)} is shown to follow it (Holm, 5%)."


def _figure(table: pl.DataFrame, task: str) -> tuple[str, go.Figure]:
    scaled = pl.concat(
        table.select(name=pl.lit(name), x="tokens", y=(pl.col(name) - pl.col(name).mean()) / pl.col(name).std())
        for name in (task, *METRICS)
    )
    caption = f"Quality in {task} and the medians of metrics over pre-training, each scaled to mean 0 and deviation 1."
    return caption, curves(scaled, x="pre-training tokens", y="standard deviations from the mean", log_x=True)
