"""The chosen checkpoint on disk, and whether it scores as the live model did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from diffract.edits.to_files import apply
from diffract.evaluate import Evaluator, load_subject, summarise
from diffract.search.setup import Model, Stage

PER_ITEM = 1e-9
"""Relative difference of a value that still counts as the same: sums in another order, no other weights."""


def write_chosen(
    output: str | Path,
    stage: Stage,
    live: pl.DataFrame,
    model: Model,
    steps: Sequence[Mapping[str, Any]],
    *,
    force: bool,
) -> dict[str, Any]:
    """Write a checkpoint by a recipe, load it, and score it on the held-out split.

    Args:
        output: The folder to write.
        stage: How models are loaded and evaluated.
        live: The held-out scores of the same edit in memory.
        model: What the recipe edits.
        steps: Of the recipe; the references in them are the user's own, not copies in memory.
        force: Replace a folder that an edit has written.

    Returns:
        For the manifest: where it is, whether every item's score is the live model's, and both qualities.
    """
    recipe = {"model": model, "steps": list(steps), **_architecture(stage)}
    apply(recipe, output, force=force)
    tasks = stage.tasks["held-out"]
    subject = load_subject(output, device=stage.how.device, dtype=stage.how.dtype, tokenizer=stage.how.tokenizer)
    found = Evaluator(subject, tasks, batch_tokens=stage.how.batch_tokens).scores()
    qualities = [summarise(items, tasks, resamples=1)["quality"].to_list() for items in (live, found)]
    rows = [{"task": task.name, "live": a, "written": b} for task, a, b in zip(tasks, *qualities, strict=True)]
    return {"folder": str(output), "same_scores": same_scores(live, found), "held_out": rows}


def same_scores(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Whether two tables of scores agree, item by item, to rounding."""
    both = one.join(other, on=["task", "item"], how="full", suffix="_b")
    near = (pl.col("value") - pl.col("value_b")).abs() <= PER_ITEM * pl.col("value").abs()
    return bool(both.select(near.fill_null(value=False).all()).item())


def _architecture(stage: Stage) -> dict[str, str]:
    return {} if stage.how.architecture is None else {"architecture": str(stage.how.architecture)}
