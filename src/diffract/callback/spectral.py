"""``SpectralCallback``: the spectra of a model while the Trainer of Hugging Face transformers trains it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from torch import nn

from diffract import tables
from diffract.api import compare, scan
from diffract.callback.refusals import refuse_adapter, refuse_sharded, refuse_shared
from diffract.callback.reporting import log, medians, warn_of_cost
from diffract.callback.table import NAMED, START, keep, placed, rows_before
from diffract.checkpoints import Checkpoint, Reference, open_checkpoint
from diffract.errors import DiffractError, RunError, SelectionError
from diffract.matrices import parse_selection
from diffract.metrics import Metric, choose_metrics

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise DiffractError(
        "SpectralCallback needs transformers, which is not installed: `pip install 'diffract-llm[train]'`."
    ) from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

EVERY = 500
"""Steps from one measurement to the next."""

CHEAP = ("frobenius_norm", "spectral_norm", "stable_rank", "effective_rank")
"""Metrics unless others are named: one eigensolver without vectors for each matrix."""

CHANGE = ("delta_relative",)
"""Metrics that are added to these where there is a base: sums over entries."""


class SpectralCallback(TrainerCallback):
    """Measures chosen matrices of a model in training: when it begins, every so many steps, and at the last.

    A table, Parquet, gets a row for each step and matrix; what reports the loss (TensorBoard, W&B, ...) gets medians
    over matrices of one kind, ``spectral/METRIC/attn.q``, over all of them, ``spectral/METRIC/all``, and the time that
    it took, ``spectral/seconds``. Training itself is what it would be without. In training on several processes the
    main one measures, and the model must be whole on it.

    When training resumes, rows from its step on are dropped and measured anew; training that begins at step 0 begins
    the table anew.

    Args:
        metrics: As of ``scan``, and as of ``compare`` where there is a base. By default norms, stable and effective
            rank, and ``delta_relative`` where there is a base.
        select: As of ``scan``.
        every: Optimizer steps from one measurement to the next.
        base: What the model is compared with: a reference, or ``"start"`` for the model as training begins, of which a
            copy is kept beside the table.
        output: The table; ``spectra.parquet`` in the Trainer's ``output_dir`` by default.
        heads: As of ``scan``.
        architecture: As of ``scan``.
        device: As of ``scan``.

    Raises:
        SelectionError: A metric or the selection is not understood, or ``every`` is below 1. What does not fit the
            model is refused when training begins, before its first step.
    """

    def __init__(
        self,
        metrics: str | Sequence[str | Metric] | None = None,
        select: str | None = None,
        every: int = EVERY,
        *,
        base: Reference | None = None,
        output: str | Path | None = None,
        heads: bool = True,
        architecture: str | Path | None = None,
        device: str = "auto",
    ) -> None:
        if every < 1:
            raise SelectionError(f"every is {every}, expected a number of steps, 1 or more.")
        parse_selection(select)
        self.metrics = _choose(metrics, base)
        self.select, self.every, self.base, self.output = select, every, base, output
        self.heads, self.architecture, self.device = heads, architecture, device
        self._rows = pl.DataFrame(schema=NAMED)
        self._opened: Checkpoint | None = None
        self._since = (0, 0.0)
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the model as it is, which refuses whatever does not fit it."""
        model = kwargs["model"]
        refuse_sharded(model)
        refuse_adapter(model)
        if not state.is_world_process_zero:
            return
        self._rows = rows_before(state.global_step, self._table(args))
        self._opened = self._open_base(model, state.global_step, self._table(args))
        self._measure(args, state, control, model)
        self._since = (state.global_step, time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the model if it is time."""
        due = state.global_step % self.every == 0
        if not (due or control.should_training_stop) or not state.is_world_process_zero:
            return
        steps, trained = state.global_step - self._since[0], time.perf_counter() - self._since[1]
        seconds = self._measure(args, state, control, kwargs["model"])
        if steps >= self.every and not self._warned:
            self._warned = warn_of_cost(seconds, trained, steps)
        self._since = (state.global_step, time.perf_counter())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the base."""
        if self._opened is not None and self._opened is not self.base:
            self._opened.close()
        self._opened = None

    def _table(self, args: TrainingArguments) -> Path:
        return Path(args.output_dir or ".") / "spectra.parquet" if self.output is None else Path(self.output)

    def _open_base(self, model: nn.Module, step: int, table: Path) -> Checkpoint | None:
        if self.base is None:
            return None
        if self.base != START:
            refuse_shared(self.base, model)
            return open_checkpoint(self.base, download=True)  # once, as a network may not be there at every step
        folder = table.with_name(f"{table.stem}-start")
        if step == 0:
            keep(model, folder)
        elif not folder.is_dir():
            raise RunError(
                f"training goes on at step {step}, but the weights from its beginning are not at {str(folder)!r}. "
                "Pass the checkpoint that it began with as base."
            )
        return open_checkpoint(folder)

    def _measure(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> float:
        """Measure, note and report; return the seconds that it took."""
        begun = time.perf_counter()
        found = self._look(model)
        order, tokens = self._rows["step"].n_unique(), state.num_input_tokens_seen or None
        rows = placed(found, state.global_step, tokens, order)
        self._rows = pl.concat([self._rows, rows], how="diagonal")
        with tables.whole_file(self._table(args)) as draft:
            self._rows.write_parquet(draft, compression="zstd")
        seconds = time.perf_counter() - begun
        log({**medians(rows), "spectral/seconds": seconds}, args, state, control)
        return seconds

    def _look(self, model: nn.Module) -> pl.DataFrame:
        """The rows of the model in the metrics table of a scan, or of a comparison with the base."""
        options: dict[str, Any] = {"metrics": self.metrics, "select": self.select, "heads": self.heads}
        options |= {"architecture": self.architecture, "device": self.device, "cache": False}
        if self._opened is None:
            return scan(model, **options).metrics
        run = compare(self._opened, model, **options)
        return run.metrics.filter(pl.col("model") == run.models.filter(pl.col("role") == "tuned")["model"].item())


def _choose(metrics: str | Sequence[str | Metric] | None, base: Reference | None) -> list[Metric]:
    """Return the metrics, and say of those that speak of a change that they need a base."""
    if metrics is None:
        metrics = CHEAP if base is None else CHEAP + CHANGE
    try:
        return choose_metrics(metrics, pair=base is not None)
    except SelectionError as error:
        if base is not None:
            raise
        choose_metrics(metrics, pair=True)  # refuses what is wrong with a base, too
        raise SelectionError(
            "these metrics speak of a change, and there is no base. Pass base='start', or the checkpoint to compare "
            "with, as base."
        ) from error
