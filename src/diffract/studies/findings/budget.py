"""Does a base that was pre-trained for longer make a better tuned model?"""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go
import polars as pl

from diffract.plots.searches import curves
from diffract.studies.finding import Finding, Number, better
from diffract.studies.study import Study


def budget(study: Study) -> Finding:
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
        *(_gain_of_tuning(study, tokens, bases[tokens], tuned[tokens]) for tokens in tuned),
    ]
    verdict, because = better(gain, f"the model tuned from {last:,} tokens is better than that from {first:,}")
    return Finding(
        name="budget",
        title="Quality after continual pre-training against the pre-training budget",
        claim="Longer pre-training makes better continual pre-training.",
        verdict=verdict,
        because=because,
        control="the bases themselves, without continual pre-training, on the same items",
        numbers=numbers,
        figures=[_figure(table, task.name, task.unit) for task in study.tasks],
        tables={"quality": table, "all_domains": _all_domains(study)},
    )


def _gain_of_tuning(study: Study, tokens: int, base: str, tuned: str) -> Number:
    return replace(study.gain(base, tuned), name=f"gain of tuning from {tokens:,} tokens")


def _figure(table: pl.DataFrame, task: str, unit: str) -> tuple[str, go.Figure]:
    rows = table.filter(pl.col("task") == task).select("name", "low", "high", x="tokens", y="quality")
    made = curves(rows, x="pre-training tokens", y=f"{task}, {unit}", log_x=True)
    return f"Held-out quality in {task} against the pre-training budget; bands are 95% intervals over items.", made


def _all_domains(study: Study) -> pl.DataFrame:
    """Quality of every tuned model in every task."""
    return pl.concat(
        study.quality(ref).with_columns(tokens=pl.lit(tokens), model=pl.lit(domain))
        for tokens, models in study.family.tuned.items()
        for domain, ref in {"base": study.family.bases[tokens], **models}.items()
    )
