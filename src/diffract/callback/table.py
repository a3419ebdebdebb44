"""The table that grows with training, and the copy of the model as it was in the beginning."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from torch import nn

from diffract import tables
from diffract._version import __version__
from diffract.checkpoints import TensorWriter, open_checkpoint
from diffract.errors import RunError

START = "start"
"""The base that is the model as training begins."""

NAMED = tables.LABELS | tables.OUTCOME | tables.TIMELINE
"""Columns of the table before those of the metrics."""


def rows_before(step: int, table: Path) -> pl.DataFrame:
    """Return the rows of earlier steps, none if there is no table.

    Raises:
        RunError: Something else is there.
    """
    if not table.exists():
        return pl.DataFrame(schema=NAMED)
    try:
        found = pl.read_parquet(table)
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RunError(f"{str(table)!r} is there and cannot be read: {error}. Choose another output.") from error
    if any(found.schema.get(name) != dtype for name, dtype in NAMED.items()):
        raise RunError(f"{str(table)!r} is there and no table of SpectralCallback. Choose another output.")
    earlier = found.filter(pl.col("step") < step)
    return earlier if len(earlier) else pl.DataFrame(schema=NAMED)  # nothing of it, no column either


def placed(found: pl.DataFrame, step: int, tokens: int | None, order: int) -> pl.DataFrame:
    """Return rows of a metrics table with their place in training.

    Args:
        found: Rows of one model.
        step: Optimizer steps so far, which also name the model.
        tokens: Seen so far, if they are counted.
        order: Measurements so far.
    """
    where = {"order": order, "step": step, "tokens": tokens}
    columns = [pl.lit(where.get(name), dtype).alias(name) for name, dtype in tables.TIMELINE.items()]
    rows = found.with_columns(pl.lit(f"step{step}").alias("model"), *columns)
    return rows.select(*NAMED, pl.exclude(*NAMED))


def keep(model: nn.Module, folder: Path) -> None:
    """Write a model's tensors, each once, and its configuration."""
    with tables.whole_folder(folder, force=True) as draft, open_checkpoint(model) as found:
        manifest = {"format": tables.FORMAT, "kind": START, "diffract": __version__}
        (draft / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        (draft / "config.json").write_text(json.dumps(dict(found.config), default=str), encoding="utf-8")
        with TensorWriter(draft) as writer:
            for name in found.names:
                if name not in found.tied:
                    writer.add(name, found.read(name))
