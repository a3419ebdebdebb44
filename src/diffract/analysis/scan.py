"""Scan one checkpoint, or compare a base with its tuned checkpoints."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffract.analysis.circuits import circuit_tasks, gains_left_out
from diffract.analysis.drawn import choose_noise, choose_nulls, foretold_seconds
from diffract.analysis.facts import MetricPlan
from diffract.analysis.noise import NOISES
from diffract.analysis.notable import Pass, add_notable
from diffract.analysis.parts import Parts, ShareDraft
from diffract.analysis.tables import Member, assemble
from diffract.analysis.vectors import read_vectors
from diffract.analysis.work import (
    AnyTask,
    Outcomes,
    Part,
    Worker,
    on_ray,
    on_this_machine,
    run_all,
    tensor_tasks,
)
from diffract.architectures import Architecture
from diffract.checkpoints import Checkpoint, Reference, open_checkpoint
from diffract.engine import ENGINES, choose_device
from diffract.errors import CheckpointError, SelectionError, choose
from diffract.linalg import Method
from diffract.matrices import Layout, lay_out, merge_strange_adapters, pair
from diffract.metrics import CATALOG, Metric, choose_metrics, split_names
from diffract.settings import Progress
from diffract.store import MOST_BYTES, Cache, cache_folder
from diffract.tables import Tables

METHODS = ("auto", "exact")

NULLS = ("some", "all")

NOISE = ("some", "all", "none")

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]{0,63})=(?P<reference>.+)", re.ASCII)


@dataclass(frozen=True)
class Options:
    """What analyses have in common; the public functions say what each means.

    Attributes:
        share: Takes the outcomes of a share of the tasks; what needs those of all is left to whoever joins the shares.
        parts: Knows the outcomes of all tasks already.
    """

    metrics: str | Sequence[str | Metric] | None = None
    select: str | None = None
    heads: bool = True
    circuits: bool = False
    vectors: bool = False
    architecture: str | Path | None = None
    adapter_base: Reference | None = None
    download: bool = False
    method: Method = "auto"
    device: str = "auto"
    engine: str = "local"
    cache: bool = True
    nulls: str = "some"
    noise: str = "none"
    progress: Progress | None = None
    share: ShareDraft | None = None
    parts: Parts | None = None

    def outcomes(self, again: Callable[[], Worker]) -> Outcomes:
        """Return what yields the outcomes of tasks; ``again`` makes the same worker in another process."""
        if self.parts is not None:
            return self.parts.outcomes
        return partial(on_ray, again=again) if self.engine == "ray" else on_this_machine

    @property
    def elsewhere(self) -> Options:
        """The options of a process that does tasks for this one."""
        return replace(self, progress=None, share=None, parts=None)

    def plan(self, *, pair: bool) -> MetricPlan:
        """Return what is to be computed."""
        choose("engine", self.engine, ENGINES)
        choose("method", self.method, METHODS)
        choose("nulls", self.nulls, NULLS)
        choose("noise", self.noise, NOISE)
        metrics = choose_metrics(self.metrics, pair=pair)
        names = {m.name for m in metrics}
        # That of a whole model is not made of those of its matrices but of their norms, which cost nothing beside.
        if "delta_relative" in names and "frobenius_norm" not in names:
            metrics = [CATALOG["frobenius_norm"], *metrics]
        return MetricPlan(tuple(metrics), self.method, self.vectors)

    def with_nulls(self, plan: MetricPlan, layout: Layout, tasks: Sequence[AnyTask]) -> MetricPlan:
        """Return the plan with the matrices of a layout chosen for which nulls are drawn, beside what tasks take."""
        if self.nulls == "all" or not plan.needs("drawn"):
            return plan
        return replace(plan, nulls=choose_nulls(layout.matrices, plan, tasks))

    def with_noise(self, plan: MetricPlan, tasks: Sequence[AnyTask], *, times: int = 1) -> MetricPlan:
        """Return the plan with the noises that are drawn, and the matrices chosen for which they are.

        Args:
            plan: What else is computed.
            tasks: Of one comparison.
            times: How many there are like it.
        """
        if self.noise == "none":
            return plan
        if self.noise == "all":
            return replace(plan, noises=tuple(NOISES))
        return replace(plan, noises=("noise",), noise=choose_noise(tasks, times=times))

    def settings(self) -> dict[str, Any]:
        """Return the options as a manifest keeps them."""
        chosen = split_names(self.metrics) if isinstance(self.metrics, str) else self.metrics
        names = None if chosen is None else [m if isinstance(m, str) else m.name for m in chosen]
        kept = ("select", "heads", "circuits", "vectors", "method", "engine", "nulls", "noise")
        architecture = str(self.architecture) if self.architecture else None
        return {"metrics": names, **{k: getattr(self, k) for k in kept}, "architecture": architecture}


@dataclass(frozen=True)
class Opened:
    """The models of an analysis while they are open, and what there is to do.

    Attributes:
        names: What the models are called.
        layouts: Their tensors, paired where there are several.
        tasks: Everything that is to be done.
        worker: Who does it.
    """

    names: list[str]
    layouts: list[Layout]
    tasks: list[AnyTask]
    worker: Worker


def open_analysis(
    references: Sequence[Reference], options: Options, stack: ExitStack, *, allow_unmatched: bool
) -> Opened:
    """Open models and decide what is computed of them, from headers alone; they are closed with the stack."""
    plan = options.plan(pair=len(references) > 1)
    names, layouts = open_all(references, options, stack)
    if len(layouts) > 1:
        layouts = merge_strange_adapters(pair(layouts, allow_unmatched=allow_unmatched))
    tasks: list[AnyTask] = [*tensor_tasks(layouts)]
    if not tasks:
        raise CheckpointError(f"{layouts[0].checkpoint.reference} holds no matrix that could be analysed.")
    if options.circuits:
        tasks += circuit_tasks(layouts)
        layouts = [replace(one, warnings=(*one.warnings, *gains_left_out(one))) for one in layouts]
    plan = options.with_nulls(plan, layouts[0], tasks)
    plan = options.with_noise(plan, tasks)
    # the cache keeps no vectors, so whatever is to be saved has to be computed
    cached = options.cache and not options.vectors
    cache = stack.enter_context(Cache(cache_folder(), most_bytes=MOST_BYTES)) if cached else None
    checkpoints = [layout.checkpoint for layout in layouts]
    return Opened(names, layouts, tasks, Worker(checkpoints, plan, choose_device(options.device), cache))


def make_worker(references: Sequence[Reference], options: Options, *, allow_unmatched: bool) -> Worker:
    """Return who does the tasks of an analysis, with models that stay open as long as the process lives."""
    return open_analysis(references, options, ExitStack(), allow_unmatched=allow_unmatched).worker


def analyse(
    references: Sequence[Reference],
    options: Options,
    *,
    allow_unmatched: bool = False,
    vectors_to: Any = None,
) -> Tables:
    """Scan the only checkpoint, or compare the first with the others.

    Args:
        references: What to open; text may begin with ``name=``.
        options: How, as the public functions say.
        allow_unmatched: Whether more than embeddings may be without a partner.
        vectors_to: Takes the singular vectors, ``add(name, tensor)``, where they are to be saved.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    with ExitStack() as stack:
        opened = open_analysis(references, options, stack, allow_unmatched=allow_unmatched)
        names, layouts, tasks, worker = opened.names, opened.layouts, opened.tasks, opened.worker
        plan = worker.plan
        if options.share is not None:
            options.share.cut([foretold_seconds(task, plan) for task in tasks])
            options.share.do(tasks, worker, options.progress)
            return options.share.tables(names, [plan.key, plan.choices])

        def save_vectors(part: Part) -> None:
            for side, vectors in part.vectors.items():
                for matrix, found in zip(part.matrices, vectors, strict=True):
                    vectors_to.add(f"{names[part.model]}/{matrix.name}.{side}", found.float().cpu().contiguous())

        parts, digests, correlations = run_all(
            tasks,
            worker,
            outcomes=options.outcomes(
                partial(make_worker, references, options.elsewhere, allow_unmatched=allow_unmatched)
            ),
            progress=options.progress,
            keep=save_vectors,
        )
        roles = ["base", *["tuned"] * (len(layouts) - 1)] if len(layouts) > 1 else ["model"]
        members = [Member(*m) for m in zip(names, roles, layouts, strict=True)]
        kind = "compare" if len(layouts) > 1 else "scan"
        vectors: list[dict[str, Any]] | None = None
        if kind == "compare" and options.select is None:
            vectors, read = read_vectors(members)
            digests |= read
        digests |= other_digests(layouts, digests, complete=options.select is None)
        manifest = {"kind": kind, "settings": {**options.settings(), "device": worker.device.type}}
        if plan.needs("drawn"):
            of = len(layouts[0].matrices)
            manifest["nulls"] = {"drawn": of if plan.nulls is None else len(plan.nulls), "of": of}
        manifest["seconds"] = round(time.monotonic() - begun, 3)
        found = assemble(members, parts, digests, plan=plan, manifest=manifest)
        return found if kind == "scan" else add_notable(found, Pass(members, digests, correlations), vectors)


def other_digests(
    layouts: Sequence[Layout], known: Mapping[tuple[int, str], str], *, complete: bool
) -> dict[tuple[int, str], str]:
    """Return digests of tensors that no task read, so that a whole checkpoint has one; none if a part is wanted."""
    if not complete:
        return {}
    return {
        (i, name): layout.checkpoint.digest(name)
        for i, layout in enumerate(layouts)
        for name in layout.entries
        if (i, name) not in known
    }


def open_all(references: Sequence[Reference], options: Options, stack: ExitStack) -> tuple[list[str], list[Layout]]:
    """Open checkpoints and lay them out; those that were opened here are closed with the stack."""
    split = [split_name(r) for r in references]
    layouts: list[Layout] = []
    for _, reference in split:
        like = layouts[0].architecture if layouts else None  # weights alone, as from memory, do not tell their heads
        layouts.append(open_layout(reference, options, stack, like=like))
    given = [name for name, _ in split]
    return _unique_names(given, layouts), layouts


def open_layout(
    reference: Reference,
    options: Options,
    stack: ExitStack,
    *,
    check_ties: bool = True,
    like: Architecture | None = None,
) -> Layout:
    """Open a checkpoint and lay it out, without a configuration ``like`` another; what was opened here is closed."""
    checkpoint = open_checkpoint(reference, base=options.adapter_base, download=options.download)
    if checkpoint is not reference:
        stack.callback(checkpoint.close)
    return lay_out(
        checkpoint,
        select_text=options.select,
        heads=options.heads,
        spec_file=options.architecture,
        check_ties=check_ties,
        like=like,
    )


def split_name(reference: Reference) -> tuple[str | None, Reference]:
    """Split ``name=reference``; a path that is there with such a name stays whole."""
    match = _NAMED.fullmatch(reference) if isinstance(reference, str) else None
    if match is None or Path(str(reference)).exists():
        return None, reference
    return match["name"], match["reference"]


def _unique_names(given: Sequence[str | None], layouts: Sequence[Layout]) -> list[str]:
    names: list[str] = []
    for i, (name, layout) in enumerate(zip(given, layouts, strict=True)):
        if name in names:
            raise SelectionError(f"two checkpoints are called {name!r}. Give each a name of its own.")
        wanted = name or _default_name(layout.checkpoint, i, len(layouts))
        number, unique = 2, wanted
        # A name that somebody gave is never taken from a checkpoint that comes later.
        while unique in names or (not name and unique in given):
            unique, number = f"{wanted}-{number}", number + 1
        names.append(unique)
    return names


def _default_name(checkpoint: Checkpoint, index: int, count: int) -> str:
    """The last part of a reference that is a path or a hub name, else the model's role."""
    last = re.split(r"[/\\]", checkpoint.reference.rstrip("/\\"))[-1]
    stem = re.sub(r"\.(safetensors|bin|pt|pth|npz)$", "", last.partition("@")[0])
    if stem and not stem.startswith("<"):
        return stem
    return "model" if count == 1 else "base" if index == 0 else f"tuned-{index}" if count > 2 else "tuned"
