"""Follow a training run: every checkpoint alone, and what changed since another one. Two are open at a time.

Each checkpoint is analysed like in a scan, which may be known from one; of the pair only what speaks of two matrices is
computed. So no metric is computed twice, and a bad matrix in one checkpoint does not touch the numbers of the next.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import polars as pl
import torch

from diffract.analysis.assemble import Member, assemble
from diffract.analysis.models import model_numbers
from diffract.analysis.pairing import pair, scan_tasks
from diffract.analysis.plan import Plan
from diffract.analysis.run import Options, choose, choose_device, gather, open_layout, other_digests
from diffract.analysis.series import find_series
from diffract.analysis.stack import Held
from diffract.analysis.timeline import Stop
from diffract.analysis.trends import join, place
from diffract.analysis.work import Outcome, Part, TensorTask, Worker
from diffract.cache import Cache, cache_folder
from diffract.checkpoints import Reference
from diffract.errors import CheckpointError, printable
from diffract.matrices import Layout
from diffract.tables import Tables

AGAINST = ("previous", "first")
OWN = 1
"""Number of the checkpoint itself in its tasks; its base is 0, as ``pairing.pair`` has it."""


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


@dataclass(frozen=True)
class StepWorker:
    """Does tasks of one checkpoint, alone and against its base; each tensor is read once for both.

    Attributes:
        alone: What is computed of one matrix.
        apart: What is computed of two.
    """

    alone: Worker
    apart: Worker

    def __call__(self, task: TensorTask) -> Outcome:
        """Do one task; only parts of the checkpoint itself come of it."""
        held = {i: Held(self.alone.checkpoints[i], task.tensor) for i in (task.model, *task.tuned)}
        digests = {i: one.digest() for i, one in held.items()}
        own = self.alone.parts(replace(task, model=OWN, tuned=()), held, digests)
        if task.tuned and self.apart.plan.metrics:
            changes = (part for part in self.apart.parts(task, held, digests) if part.model == OWN)
            own = [replace(o, rows=_beside(o.rows, c.rows)) for o, c in zip(own, changes, strict=True)]
        return Outcome(own, digests)


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
    choose("against", against, AGAINST)
    plan, device = options.plan(pair=True), choose_device(options.device)
    series, warnings = find_series(references, by)
    costs = _survey(series, options, against, allow_unmatched=allow_unmatched)
    found: list[Tables] = []
    with ExitStack() as stack:
        cache = stack.enter_context(Cache(cache_folder())) if options.cache else None
        opened = stack.enter_context(closing(visits(series, options, against)))
        for visit in opened:
            step = _Step(plan, device, cache, _shifted(options, costs, len(found), visit.stop.name))
            tables = step.run(visit, allow_unmatched=allow_unmatched)
            base = found[0 if against == "first" else -1].metrics if found else None
            change = {} if base is None else model_numbers(base, tables.metrics)
            compared = visit.base_stop.name if visit.base_stop else None
            found.append(place(tables, len(found), visit.stop.place, compared, change))
            del visit
    settings = {**options.settings(), "by": by, "against": against, "device": device.type}
    manifest = {"kind": "trajectory", "settings": settings, "seconds": round(time.monotonic() - begun, 3)}
    return join(found, manifest, warnings)


def visits(
    series: Sequence[Stop], options: Options, against: str, *, check_ties: bool = True
) -> Generator[Visit, None, None]:
    """Open one checkpoint after the other, each beside the one that it is compared with; at most two are open."""
    base: tuple[Visit, ExitStack] | None = None
    try:
        for stop in series:
            with ExitStack() as stack:
                layout = open_layout(stop.reference, options, stack, check_ties=check_ties)
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


def _survey(series: Sequence[Stop], options: Options, against: str, *, allow_unmatched: bool) -> list[float]:
    """Return the work of each checkpoint from headers alone, so that what is wrong is said before hours of work."""
    costs = []
    with closing(visits(series, options, against, check_ties=False)) as opened:
        for visit in opened:
            _refuse_other_family(visit)
            tasks = _tasks(visit, allow_unmatched=allow_unmatched)[0]
            if not tasks:
                raise CheckpointError(f"{visit.layout.checkpoint.reference} holds no matrix that could be analysed.")
            costs.append(sum(task.cost for task in tasks))
            del visit
    return costs


def _refuse_other_family(visit: Visit) -> None:
    """Names of matrices must mean the same in all checkpoints."""
    if visit.base is None or visit.base_stop is None:
        return
    before, after = (layout.architecture.family for layout in (visit.base, visit.layout))
    if before != after:
        one, other = (printable(stop.name) for stop in (visit.base_stop, visit.stop))
        raise CheckpointError(
            f"{one!r} is read as {before}, {other!r} as {after}, expected one architecture. Put the same config.json "
            "beside both, or pass --architecture FILE."
        )


@dataclass(frozen=True)
class _Step:
    """How one checkpoint is analysed."""

    plan: Plan
    device: torch.device
    cache: Cache | None
    options: Options

    def run(self, visit: Visit, *, allow_unmatched: bool) -> Tables:
        tasks, layout = _tasks(visit, allow_unmatched=allow_unmatched)
        base = visit.base or layout
        parts, digests = gather(
            tasks, self._worker(base, layout), self.device, self.options.progress, ["", visit.stop.name], None
        )
        own = {(0, name): digest for (i, name), digest in digests.items() if i == OWN}
        own |= other_digests([layout], own, complete=self.options.select is None)
        rows = [Part(0, part.matrices, part.rows) for part in parts]
        return assemble([Member(visit.stop.name, "checkpoint", layout)], rows, own, self.plan, {})

    def _worker(self, base: Layout, layout: Layout) -> StepWorker:
        checkpoints = [base.checkpoint, layout.checkpoint]
        # An adapter's factors are its change from its own base, which is not what it is compared with here.
        merged = [replace(checkpoint, factors={}) for checkpoint in checkpoints]
        pairs = tuple(m for m in self.plan.metrics if m.pair)
        alone, apart = replace(self.plan, metrics=self.plan.single), replace(self.plan, metrics=pairs)
        return StepWorker(
            Worker(checkpoints, alone, self.device, self.cache), Worker(merged, apart, self.device, self.cache)
        )


def _tasks(visit: Visit, *, allow_unmatched: bool) -> tuple[list[TensorTask], Layout]:
    """The tasks of a checkpoint, and its layout with what became of each tensor."""
    if visit.base is None:
        return [replace(task, model=OWN) for task in scan_tasks(visit.layout)], visit.layout
    (_, layout), tasks = pair(visit.base, [visit.layout], allow_unmatched=allow_unmatched)
    return [task for task in tasks if task.tuned or task.model == OWN], layout


def _beside(own: pl.DataFrame, change: pl.DataFrame) -> pl.DataFrame:
    """Rows of a checkpoint with what the pair adds to them."""
    return own.hstack([column for column in change.get_columns() if column.name not in own.columns])


def _shifted(options: Options, costs: Sequence[float], done: int, name: str) -> Options:
    """Options whose progress is that of the whole series."""
    progress, before, total = options.progress, sum(costs[:done]), sum(costs)
    if progress is None:
        return options
    return replace(
        options,
        progress=lambda part, _all, what: progress(min(before + part, total), total, f"{name}: {what}"),
    )
