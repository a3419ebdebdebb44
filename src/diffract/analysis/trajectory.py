"""Follow a training run: every checkpoint alone, and what changed since another one. Two are open at a time.

Each checkpoint is analysed like in a scan, which may be known from one; of the pair only what speaks of two matrices is
computed. So no metric is computed twice, and a bad matrix in one checkpoint does not touch the numbers of the next.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from diffract.analysis.drawn import foretold_seconds
from diffract.analysis.facts import MetricPlan
from diffract.analysis.parts import ShareDraft
from diffract.analysis.scan import Options, open_layout, other_digests
from diffract.analysis.tables import Member, assemble, model_numbers, row_warnings, with_lineage
from diffract.analysis.timeline import Milestone, Stop, find_series
from diffract.analysis.work import TensorTask, Worker, run_all, tensor_tasks
from diffract.attention import changed_heads
from diffract.checkpoints import Reference
from diffract.engine import choose_device
from diffract.errors import CheckpointError, choose, printable
from diffract.matrices import Layout, pair
from diffract.matrices.lineage import RELATED, Lineage, tell_lineage
from diffract.schemas import AGAINST, BREAKS, LABELS, MODELS, OUTCOME, TIMELINE
from diffract.settings import Progress
from diffract.stats import out_of_line
from diffract.store import MOST_BYTES, Cache, cache_folder
from diffract.tables import Tables
from diffract.timing import timed

PEAKS = "peak_count"
"""The metric whose rise above one is followed."""

PEAKS_BY_CHANCE = "peak_count_rowcol_pvalue"
"""The metric that says whether row and column norms alone give as many, where it was asked for."""

BY_CHANCE = 0.05
"""The largest p-value at which peaks are more than chance."""

PEAKS_APPEAR = {
    "summary": "step (place in the series, where steps do not rise along it) of the first checkpoint at which the "
    "spectrum of this matrix has at least two peaks; where peak_count_rowcol_pvalue is computed, more than the norms "
    "of its rows and columns give at that step (p at most 0.05); null if it never has, and where no nulls were drawn",
    "unit": "1",
    "range": "[0, inf)",
    "source": "",
    "version": 1,
}


def place(tables: Tables, order: int, at: Milestone, *, against: str | None, change: dict[str, float | None]) -> Tables:
    """Return one checkpoint's tables with its place in the series.

    Args:
        tables: Of the checkpoint.
        order: Its place, from 0 on.
        at: What its names tell.
        against: The checkpoint that it is compared with.
        change: Numbers of the whole change since that one.
    """
    where = {"order": order, "stage": at.stage, "step": at.step, "tokens": at.tokens}
    columns = [pl.lit(where[name], dtype).alias(name) for name, dtype in TIMELINE.items()]
    numbers = [pl.lit(value, pl.Float64).alias(name) for name, value in change.items()]
    if "stable_rank" in tables.metrics.columns:  # a single row or column always has stable rank 1
        middle = tables.metrics.filter(pl.min_horizontal("rows", "cols") > 1)["stable_rank"].median()
        numbers.append(pl.lit(middle, pl.Float64).alias("stable_rank_median"))
    models = tables.models.with_columns(*columns, pl.lit(against, pl.String).alias(*AGAINST), *numbers)
    manifest = {**tables.manifest, "models": [{**m, **where, "against": against} for m in tables.manifest["models"]]}
    return Tables(manifest, tables.frames | {"metrics": tables.metrics.with_columns(*columns), "models": models})


@timed("tables")
def join(found: Sequence[Tables], manifest: dict[str, Any], warnings: Sequence[str]) -> Tables:
    """Return the tables of several checkpoints as those of their series.

    Args:
        found: One for each checkpoint, in order.
        manifest: What the caller knows; the rest is taken from theirs.
        warnings: Of the series; those of its checkpoints follow.
    """
    widest = max((tables.metrics.columns for tables in found), key=len)
    numbers = [name for name in widest if name not in LABELS | OUTCOME | TIMELINE]
    metrics = pl.concat([t.metrics for t in found], how="diagonal").select(*LABELS, *OUTCOME, *TIMELINE, *numbers)
    models = pl.concat([t.models for t in found], how="diagonal")
    described = found[-1].manifest["metrics"]
    if PEAKS in numbers:
        metrics = metrics.join(peaks_appear(metrics), on="name", how="left", maintain_order="left")
        several = has_peaks(metrics)
        peaked = metrics.group_by("model").agg(
            peaked_matrices=several.sum().cast(pl.Float64), peaked_of=several.count().cast(pl.Float64)
        )
        models = models.join(peaked, on="model", how="left", maintain_order="left")
        described = {**described, "peaks_appear": PEAKS_APPEAR}
    models = models.select(*MODELS, *TIMELINE, *AGAINST, pl.exclude(*MODELS, *TIMELINE, *AGAINST))
    joined = {
        **found[-1].manifest,
        **manifest,
        "models": [model for tables in found for model in tables.manifest["models"]],
        "metrics": described,
        "warnings": [*warnings, *_warnings(found), *row_warnings(metrics)],
    }
    spectra, tensors = (pl.concat([t[name] for t in found]) for name in ("spectra", "tensors"))
    return Tables(joined, {"metrics": metrics, "spectra": spectra, "models": models, "tensors": tensors})


def has_peaks(metrics: pl.DataFrame) -> pl.Expr:
    """Whether a spectrum has at least two peaks, beyond its null where there is one; null where none was drawn."""
    several, p = pl.col(PEAKS) >= 2, pl.col(PEAKS_BY_CHANCE)
    if PEAKS_BY_CHANCE not in metrics.columns:
        return several
    return pl.when(p.is_not_null()).then(several & (p <= BY_CHANCE))


def peaks_appear(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return when the spectrum of each matrix first has at least two peaks, see ``has_peaks``.

    Args:
        metrics: Rows of a series, with ``peak_count``, ``order`` and ``step``, and the p-value where it was computed.

    Returns:
        Columns name, ``peaks_appear``: the step, or the place in the series where steps do not rise along it, as over
        several stages; null for a matrix that never has two.
    """
    steps = metrics.select("order", "step").unique().sort("order")["step"]
    # Steps that begin anew, as of several stages, do not say when.
    rise = not steps.null_count() and bool((steps.diff().drop_nulls() > 0).all())
    when = "step" if rise else "order"
    first = pl.col(when).cast(pl.Float64).sort_by("order").filter(has_peaks(metrics).sort_by("order")).first()
    return metrics.group_by("name", maintain_order=True).agg(peaks_appear=first)


def _warnings(found: Sequence[Tables]) -> list[str]:
    """What was said of checkpoints as wholes; what holds for several is said once."""
    told: dict[str, list[str]] = {}
    for tables in found:
        start = f"{tables.models['model'][0]}: "
        for text in tables.manifest["warnings"]:
            if text.startswith(start):
                told.setdefault(text.removeprefix(start), []).append(start.removesuffix(": "))
    said = []
    for text, names in told.items():
        some = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        said.append(f"{'all checkpoints' if len(names) == len(found) else some}: {text}")
    return said


REFERENCES = ("previous", "first")


@dataclass(frozen=True)
class Visit:
    """A checkpoint while it is open.

    Attributes:
        stop: Which one it is.
        layout: Its tensors.
        base: The one that it is compared with, ``None`` for the first.
        base_stop: Which one that is.
    """

    stop: Stop
    layout: Layout
    base: Layout | None = None
    base_stop: Stop | None = None

    @property
    def stops(self) -> list[Stop]:
        """The one that it is compared with, if any, and the checkpoint itself."""
        return [self.stop] if self.base_stop is None else [self.base_stop, self.stop]


def follow(
    references: Sequence[Reference],
    options: Options,
    *,
    by: str = "step",
    against: str = "previous",
    allow_unmatched: bool = False,
) -> Tables:
    """Scan every checkpoint of a training run, and compare each with an earlier one.

    Args:
        references: The checkpoints, or one folder that holds them.
        options: How; vectors are not saved.
        by: What orders them.
        against: What each is compared with, ``previous`` or ``first``.
        allow_unmatched: Whether more than embeddings may be without a partner.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    choose("against", against, REFERENCES)
    plan, device = _plan(options), choose_device(options.device)
    series, warnings = find_series(references, by)
    # In a folder the run may still be writing; a checkpoint that is named is meant.
    unread: dict[str, CheckpointError] | None = {} if len(references) == 1 else None
    surveyed = _survey(series, options, against, allow_unmatched=allow_unmatched, unread=unread)
    if unread:
        series = [stop for stop in series if stop.name not in unread]
        warnings += [f"{printable(n)} is left out, as it cannot be read: {error}" for n, error in unread.items()]
    costs = [sum(task.cost for task in of_checkpoint) for of_checkpoint in surveyed]
    if options.share is not None:
        options.share.cut([foretold_seconds(task, plan) for of_checkpoint in surveyed for task in of_checkpoint])
        visiting = {"against": against, "allow_unmatched": allow_unmatched}
        return _do_share(options.share, series, options, plan=plan, first=surveyed[0], **visiting)
    found: list[Tables] = []
    kinship: list[Lineage | None] = []
    digested: list[dict[str, str]] = []
    with ExitStack() as stack:
        cache = stack.enter_context(Cache(cache_folder(), most_bytes=MOST_BYTES)) if options.cache else None
        opened = stack.enter_context(closing(visits(series, options, against)))
        for visit in opened:
            layouts, tasks = _tasks(visit, allow_unmatched=allow_unmatched)
            # For the same matrices of each checkpoint, so that what the first scan takes decides.
            drawing = options.with_nulls(plan, layouts[-1], surveyed[0])
            worker = _worker(layouts, options, options.with_noise(drawing, tasks, times=len(costs) - 1), cache=cache)
            progress = _shifted(options.progress, costs, len(found), visit.stop.name)
            again = partial(_make_worker, visit.stops, options.elsewhere, rest=replace(worker.plan, metrics=()))
            outcomes = options.outcomes(partial(again, allow_unmatched=allow_unmatched))
            done = run_all(tasks, worker, outcomes=outcomes, progress=progress)
            own_digests = {(0, name): digest for (i, name), digest in done.digests.items() if i == len(layouts) - 1}
            own_digests |= other_digests(layouts[-1:], own_digests, complete=options.select is None)
            tables = assemble(
                [Member(visit.stop.name, "checkpoint", layouts[-1])],
                [replace(part, model=0) for part in done.parts],
                own_digests,
                plan=worker.plan,
                manifest={"kind": "trajectory"},
            )
            base = found[0 if against == "first" else -1].metrics if found else None
            own = tables.metrics
            change = {} if base is None else model_numbers(base, own, changed_heads(base, own))
            digested.append({name: digest for (_, name), digest in own_digests.items()})
            if visit.base is None:
                kinship.append(None)
            else:
                both = digested[0 if against == "first" else -2], digested[-1]
                known = {name: r for (_, name), r in done.correlations.items()}
                whole = options.select is None
                kinship.append(tell_lineage(visit.base, visit.layout, whole=whole, known=known, digests=both))
            compared = visit.base_stop and visit.base_stop.name
            found.append(place(tables, len(found), visit.stop.place, against=compared, change=change))
            del visit, layouts, tasks, worker  # nothing of a checkpoint may live on while the next is opened
    settings = {**options.settings(), "by": by, "against": against, "device": device.type}
    manifest = {"kind": "trajectory", "settings": settings, "seconds": round(time.monotonic() - begun, 3)}
    neighbours = kinship if against == "previous" else _neighbours(series, options)
    broken = breaks(neighbours)
    joined = with_lineage(join(found, manifest, [*warnings, *_said(series, neighbours, broken)]), kinship)
    marks = pl.Series("breaks", broken, dtype=BREAKS["breaks"])
    return Tables(joined.manifest, joined.frames | {"models": joined.models.with_columns(marks)})


def _plan(options: Options) -> MetricPlan:
    return replace(options.plan(pair=True), apart=True)


def _worker(layouts: Sequence[Layout], options: Options, plan: MetricPlan, *, cache: Cache | None) -> Worker:
    # An adapter's factors are its change from its own base, which is not what it is compared with here.
    checkpoints = [replace(layout.checkpoint, factors={}) for layout in layouts]
    return Worker(checkpoints, plan, choose_device(options.device), cache)


def _make_worker(stops: Sequence[Stop], options: Options, *, rest: MetricPlan, allow_unmatched: bool) -> Worker:
    """Return who does the tasks of a checkpoint, the last of the stops; it and its base stay open.

    ``rest`` is the plan but for its metrics: functions of a user's own cannot be sent, and are found here again.
    """
    stack = ExitStack()
    layouts = [open_layout(stop.reference, options, stack) for stop in stops]
    if len(layouts) > 1:
        layouts = pair(layouts, allow_unmatched=allow_unmatched)
    cache = stack.enter_context(Cache(cache_folder(), most_bytes=MOST_BYTES)) if options.cache else None
    return _worker(layouts, options, replace(rest, metrics=_plan(options).metrics), cache=cache)


def _do_share(
    share: ShareDraft,
    series: Sequence[Stop],
    options: Options,
    *,
    plan: MetricPlan,
    first: Sequence[TensorTask],
    against: str,
    allow_unmatched: bool,
) -> Tables:
    """Do this process's share of the tasks of all checkpoints."""
    choices: list[object] = []
    with ExitStack() as stack:
        cache = stack.enter_context(Cache(cache_folder(), most_bytes=MOST_BYTES)) if options.cache else None
        opened = stack.enter_context(closing(visits(series, options, against)))
        for visit in opened:
            layouts, tasks = _tasks(visit, allow_unmatched=allow_unmatched)
            drawing = options.with_nulls(plan, layouts[-1], first)
            worker = _worker(layouts, options, options.with_noise(drawing, tasks, times=len(series) - 1), cache=cache)
            share.do(tasks, worker, options.progress)
            choices = worker.plan.choices
            del visit, layouts, tasks, worker
    return share.tables([stop.name for stop in series], [plan.key, choices])


def _neighbours(series: Sequence[Stop], options: Options) -> list[Lineage | None]:
    """How each checkpoint is related to the one before it, where all are compared with the first: by a sample."""
    found: list[Lineage | None] = []
    with closing(visits(series, options, "previous", check_ties=False)) as opened:
        for visit in opened:
            found.append(tell_lineage(visit.base, visit.layout) if visit.base else None)
            del visit
    return found


def breaks(kinship: Sequence[Lineage | None]) -> list[bool]:
    """Return which checkpoints fall out of line with the one before: a restart, or another run under an old name.

    That is a stranger to it, or one whose distance 1 - correlation stands out among all steps; the first step of a
    series may be far, as weights move most at the beginning of training.

    Args:
        kinship: How each checkpoint is related to the one before; ``None`` for the first.
    """
    known = [one for one in kinship if one is not None]
    distances = np.array([1 - one.correlation if one.correlation is not None else 0.0 for one in known])
    # The first distance is of the start of training, where weights move most, and would hide later breaks.
    among = distances[1:] if len(known) > 1 else distances
    marked = (distances > 1 - RELATED) & out_of_line(distances, among) & (np.arange(len(known)) > 0)
    told = [bool(far) or one.word in ("stranger", "rearranged") for one, far in zip(known, marked, strict=True)]
    return [False] * (len(kinship) - len(known)) + told


def _said(series: Sequence[Stop], neighbours: Sequence[Lineage | None], broken: Sequence[bool]) -> list[str]:
    return [
        f"{stop.name} BREAKS THE SERIES: {one.word}, its weights correlate {one.correlation:.3f} with those of "
        f"{before.name}; a restart, or another run under this name."
        for (before, stop), one, far in zip(pairwise(series), neighbours[1:], broken[1:], strict=True)
        if far and one is not None
    ]


def visits(
    series: Sequence[Stop],
    options: Options,
    against: str,
    *,
    check_ties: bool = True,
    unread: dict[str, CheckpointError] | None = None,
) -> Generator[Visit, None, None]:
    """Open one checkpoint after the other, each beside the one that it is compared with; at most two are open.

    Those that cannot be read are passed over and noted in ``unread``, if that is given.
    """
    base: tuple[Visit, ExitStack] | None = None
    try:
        for stop in series:
            with ExitStack() as stack:
                try:
                    layout = open_layout(stop.reference, options, stack, check_ties=check_ties)
                except CheckpointError as error:
                    if unread is None:
                        raise
                    unread[stop.name] = error
                    continue
                visit = Visit(stop, layout)
                yield visit if base is None else Visit(stop, layout, base[0].layout, base[0].stop)
                if base is None or against == "previous":
                    if base is not None:
                        base[1].close()
                    base = visit, stack.pop_all()
            del layout, visit  # of the last one nothing may live on while the next is opened
    finally:
        if base is not None:
            base[1].close()


def _survey(
    series: Sequence[Stop],
    options: Options,
    against: str,
    *,
    allow_unmatched: bool,
    unread: dict[str, CheckpointError] | None,
) -> list[list[TensorTask]]:
    """Return the tasks of each checkpoint from headers alone; what is wrong is said before hours of work."""
    found = []
    with closing(visits(series, options, against, check_ties=False, unread=unread)) as opened:
        for visit in opened:
            if visit.base is not None and visit.base_stop is not None:  # names of matrices must mean the same in all
                before, after = (layout.architecture.family for layout in (visit.base, visit.layout))
                if before != after:
                    one, other = (printable(stop.name) for stop in (visit.base_stop, visit.stop))
                    raise CheckpointError(
                        f"{one!r} is read as {before}, {other!r} as {after}, expected one architecture. Put the same "
                        "config.json beside both, or pass --architecture FILE."
                    )
            tasks = _tasks(visit, allow_unmatched=allow_unmatched)[1]
            if not tasks:
                raise CheckpointError(f"{visit.layout.checkpoint.reference} holds no matrix that could be analysed.")
            found.append(tasks)
            del visit
    # Where hardly anything can be read, that is what has to be said.
    if unread and len(found) < 2:
        raise next(iter(unread.values()))
    return found


def _tasks(visit: Visit, *, allow_unmatched: bool) -> tuple[list[Layout], list[TensorTask]]:
    """Return the layouts of a checkpoint's base and its own, which is the last, and the tasks that concern it."""
    if visit.base is None:
        return [visit.layout], tensor_tasks([visit.layout])
    layouts = pair([visit.base, visit.layout], allow_unmatched=allow_unmatched)
    return layouts, [task for task in tensor_tasks(layouts) if task.tuned or task.model]


def _shifted(progress: Progress | None, costs: Sequence[float], done: int, name: str) -> Progress | None:
    """Return progress on one checkpoint as that of the whole series."""
    before, total = sum(costs[:done]), sum(costs)
    if progress is None:
        return None
    return lambda part, _all, what: progress(min(before + part, total), total, f"{name}: {what}")
