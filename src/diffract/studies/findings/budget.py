"""Does a base that was pre-trained for longer make a better tuned model?"""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go
import polars as pl

from diffract.plots.searches import curves
from diffract.studies.finding import Evidence, better, finding
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
    return Evidence(
        verdict,
        because,
        numbers=numbers,
        figures=[_figure(table, task.name, task.unit) for task in study.tasks],
        tables={"quality": table, "all_domains": _all_domains(study)},
    )


def _figure(table: pl.DataFrame, task: str, unit: str) -> tuple[str, go.Figure]:
    rows = table.filter(pl.col("task") == task).select("name", "low", "high", x="tokens", y="quality")
    made = curves(rows, x="pre-training tokens", y=f"{task}, {unit}", log_x=True)
    return f"Held-out quality in {task} against the pre-training budget; bands are 95% intervals over items.", made


def _all_domains(study: Study) -> pl.DataFrame:
    """Return the quality of every base and tuned model in every task."""
    return pl.concat(
        study.quality(ref).with_columns(tokens=pl.lit(tokens), model=pl.lit(domain))
        for tokens, models in study.family.tuned.items()
        for domain, ref in {"base": study.family.bases[tokens], **models}.items()
    )
