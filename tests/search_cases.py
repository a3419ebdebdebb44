"""What the tests of searches share: tasks and models that cost nothing, and the sample family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from diffract.evaluate import Task
from diffract.schemas import ITEM_SCORES

SAMPLES = Path(__file__).parents[1] / "samples" / "tiny-olmo2"
BASE, MATH, NATURAL, CODE = (str(SAMPLES / name) for name in ("base", "math", "natural", "code"))

HELD_OUT = Task("quality", "bits", "held-out", "key of held-out", "lower", "bits per byte")


def score_frame(task: str, values: Sequence[float], prefix: str = "item", weight: float = 1.0) -> pl.DataFrame:
    """Scores of one task."""
    rows = [(task, f"{prefix}{i}", float(v), weight, None) for i, v in enumerate(values)]
    return pl.DataFrame(rows, schema=ITEM_SCORES, orient="row")
