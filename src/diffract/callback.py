"""``SpectralCallback``: the spectra of a model while the Trainer of Hugging Face transformers trains it."""

from __future__ import annotations

import inspect
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from torch import Tensor, nn

from diffract import schemas, store, tables
from diffract._version import __version__
from diffract.api import compare, scan
from diffract.checkpoints import Checkpoint, Reference, TensorWriter, open_checkpoint
from diffract.errors import CheckpointError, DiffractError, RunError, SelectionError
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
    from transformers.trainer_callback import CallbackHandler

START = "start"
"""The base that is the model as training begins."""

NAMED = schemas.LABELS | schemas.OUTCOME | schemas.TIMELINE
"""Columns of the table before those of the metrics."""

EVERY = 500
"""Steps from one measurement to the next."""

CHEAP = ("frobenius_norm", "spectral_norm", "stable_rank", "effective_rank")
"""Metrics unless others are named: one eigensolver without vectors for each matrix."""

CHANGE = ("delta_relative",)
"""Metrics that are added to these where there is a base: sums over entries."""

SHARE = 0.02
"""Part of the training time above which a warning is given."""


class SpectralCallback(TrainerCallback):
    """Measures chosen matrices of a model in training: when it begins, every so many steps, and at the last.

    A table, Parquet, gets a row for each step and matrix; what reports the loss (TensorBoard, W&B, ...) gets medians
    over matrices of one kind, ``spectral/METRIC/attn.q``, over all of them, ``spectral/METRIC/all``, and the time that
    it took, ``spectral/seconds``. Training itself is what it would be without. In training on several processes the
    main one measures, and the model must be whole on it.

    When training resumes, rows from its step on are dropped and measured anew; training that begins at step 0 begins
    the table anew.

    Args:
        metrics: Names or metrics as ``diffract.scan`` takes them, and as ``diffract.compare`` does where there is a
            base. By default norms, stable and effective rank, and ``delta_relative`` where there is a base.
        select: Which matrices are measured, in the words of ``diffract.scan``: ``"layers 0-3, attn"``.
        every: Optimizer steps from one measurement to the next.
        base: What the model is compared with: a reference, or ``"start"`` for the model as training begins, of which a
            copy is kept beside the table.
        output: The table; ``spectra.parquet`` in the Trainer's ``output_dir`` by default.
        heads: Whether attention heads are measured one by one, too.
        architecture: A JSON file that describes the model, where diffract does not know it.
        device: Where is computed; ``auto`` is CUDA where there is one.

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
            # Fetched once, as a network may not be there at every step.
            return open_checkpoint(self.base, download=True)
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
        rows = placed(found, step=state.global_step, tokens=tokens, order=order)
        self._rows = pl.concat([self._rows, rows], how="diagonal")
        with store.whole_file(self._table(args)) as draft:
            tables.write_table(self._rows, draft)
        seconds = time.perf_counter() - begun
        log({**medians(rows), "spectral/seconds": seconds}, args, state, control)
        return seconds

    def _look(self, model: nn.Module) -> pl.DataFrame:
        """Return the rows of the model in the metrics table of a scan, or of a comparison with the base."""
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


def rows_before(step: int, table: Path) -> pl.DataFrame:
    """Return the rows of earlier steps, none if there is no table.

    Raises:
        RunError: The file is no table of SpectralCallback.
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


def placed(found: pl.DataFrame, *, step: int, tokens: int | None, order: int) -> pl.DataFrame:
    """Return rows of a metrics table with their place in training.

    Args:
        found: Rows of one model.
        step: Optimizer steps so far, which also name the model.
        tokens: Tokens seen so far, if they are counted.
        order: Measurements so far.
    """
    where = {"order": order, "step": step, "tokens": tokens}
    columns = [pl.lit(where.get(name), dtype).alias(name) for name, dtype in schemas.TIMELINE.items()]
    rows = found.with_columns(pl.lit(f"step{step}").alias("model"), *columns)
    return rows.select(*NAMED, pl.exclude(*NAMED))


def keep(model: nn.Module, folder: Path) -> None:
    """Write a model's tensors, each once, and its configuration."""
    with store.whole_folder(folder, force=True) as draft, open_checkpoint(model) as found:
        manifest = {"format": tables.FORMAT, "kind": START, "diffract": __version__}
        (draft / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        (draft / "config.json").write_text(json.dumps(dict(found.config), default=str), encoding="utf-8")
        with TensorWriter(draft) as writer:
            for name in found.names:
                if name not in found.tied:
                    writer.add(name, found.read(name))


def refuse_sharded(model: nn.Module) -> None:
    """Raise unless every parameter of a model is whole in this process."""
    found = _sharding(model)
    if found:
        raise CheckpointError(
            f"SpectralCallback sees only a part of each matrix: the model is sharded ({found}). Train with whole "
            "parameters (DDP, ZeRO-1 or ZeRO-2), or leave it out and run `diffract trajectory` on the saved "
            "checkpoints."
        )


def _sharding(model: nn.Module) -> str | None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return "DTensor, as of FSDP2"
    return "tensor parallelism" if (getattr(model, "tp_size", None) or 1) > 1 else None


def refuse_adapter(model: nn.Module) -> None:
    """Raise if a model is trained through a PEFT adapter: its own matrices never change, and the sum is nowhere."""
    if getattr(model, "peft_config", None):
        raise CheckpointError(
            "the model is trained through an adapter, whose sum with the model SpectralCallback does not see. Leave it "
            "out and run `diffract trajectory` on the saved adapters."
        )


def refuse_shared(base: Reference, model: nn.Module) -> None:
    """Raise if a base in memory holds the very tensors that are trained."""
    if isinstance(base, str | Path | Checkpoint):
        return
    held = (base.state_dict(keep_vars=True) if isinstance(base, nn.Module) else base).values()
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    if any(isinstance(value, Tensor) and value.data_ptr() in trained for value in held):
        raise CheckpointError(
            "base holds the very tensors that are trained, so that nothing would ever differ. Pass base='start'."
        )


def medians(rows: pl.DataFrame) -> dict[str, float]:
    """Return the median of each metric over all rows and over those of each block and projection, where there is one.

    Returns:
        ``spectral/METRIC/all``, ``spectral/METRIC/attn.q``, ``spectral/METRIC/embed``, ...
    """
    numbers = [name for name in rows.select(pl.selectors.numeric()).columns if name not in NAMED]
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
    """Return the Trainer's handler, which is calling us; nothing where the callback is called by something else."""
    from transformers.trainer_callback import CallbackHandler

    # A callback is given no trainer, so the handler is looked for among the callers. Adding to the logs of ``on_log``
    # would be simpler, but reporters stand before us in the list of callbacks and would not see what is added; and
    # ``handler.on_log`` cancels logging that is due at this step.
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
        seconds: How long the measurement took.
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
