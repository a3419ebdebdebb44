"""What the Trainer's reporters get: medians, and a warning where measuring costs too much."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars as pl

from diffract.callback.table import NAMED

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler

SHARE = 0.02
"""Part of the training time above which a warning is given."""


def medians(rows: pl.DataFrame) -> dict[str, float]:
    """Return the median of each metric over all rows and over those of each block and projection, where there is one.

    Returns:
        ``spectral/METRIC/all``, ``spectral/METRIC/attn.q``, ``spectral/METRIC/embed``, ...
    """
    numbers = [name for name in rows.columns if name not in NAMED]
    whole = pl.col("projection").is_null() | (pl.col("block") == pl.col("projection"))
    part = pl.when(whole).then("block").otherwise(pl.concat_str("block", "projection", separator="."))
    labelled = [rows.with_columns(part=pl.lit("all")), rows.with_columns(part=part)]
    middles = pl.concat(labelled).group_by("part", maintain_order=True).agg(pl.col(numbers).median())
    found = {f"spectral/{name}/{row['part']}": row[name] for name in numbers for row in middles.iter_rows(named=True)}
    return {name: value for name, value in found.items() if value is not None}


def log(numbers: Mapping[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """Report numbers as ``Trainer.log`` does: in the history of its state, and to its callbacks."""
    logs = {**numbers, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    handler = _handler()
    if handler is not None:
        handler.call_event("on_log", args, state, control, logs=logs)


def _handler() -> CallbackHandler | None:
    """The Trainer's handler, which is calling us.

    A callback is given no trainer, and reporters stand before it in the list of callbacks, so that what it adds to the
    logs of ``on_log`` comes too late for them. (``handler.on_log`` would also cancel logging that is due at this step.)
    """
    from transformers.trainer_callback import CallbackHandler

    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def warn_of_cost(seconds: float, trained: float, steps: int) -> bool:
    """Warn if a measurement took too much of the time that was trained before it, and return whether it did.

    Args:
        seconds: That it took.
        trained: Seconds of training before it.
        steps: Steps in that time.
    """
    if seconds <= SHARE * trained:
        return False
    enough = seconds * steps / (SHARE * trained)
    unit = 10 ** max(0, math.floor(math.log10(enough)) - 1)
    warnings.warn(
        f"SpectralCallback took {seconds:.2g} s, {seconds / trained:.1%} of the {trained:.3g} s of the {steps} steps "
        f"before. every={math.ceil(enough / unit) * unit} would keep it below {SHARE:.0%}; fewer matrices (select) or "
        "metrics cost less.",
        stacklevel=2,
    )
    return True
