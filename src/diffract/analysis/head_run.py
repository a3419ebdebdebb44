"""Which heads change, in one domain or in all: from a base and its tuned checkpoints to tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import polars as pl

from diffract.analysis.assemble import Member, describe, model_row, status_warnings, tensor_table
from diffract.analysis.head_grams import Slices, head_grams, slice_grams
from diffract.analysis.head_pairing import choose_projections, pair_heads, uncut_notes
from diffract.analysis.head_tables import (
    cosine_table,
    domain_numbers,
    domain_table,
    head_table,
    lorenz_table,
    score_table,
)
from diffract.analysis.head_work import HeadTask, HeadWorker
from diffract.analysis.heads import PROJECTIONS, query_heads
from diffract.analysis.pairing import adapter_notes, base_adapters
from diffract.analysis.run import ENGINES, Options, Progress, choose, choose_device, open_all
from diffract.cache import Cache, cache_folder
from diffract.checkpoints import Reference
from diffract.engine import run_tasks
from diffract.matrices import Layout, Matrix
from diffract.tables import MODELS, HeadTables, frame

GLOSSARY: dict[str, dict[str, Any]] = {
    name: {"summary": summary, "unit": unit, "range": span, "source": source, "version": 1}
    for name, summary, unit, span, source in (
        ("head_delta", "||D||_F over the head's slices, D = W1 - W0", "weight", "[0, inf)", ""),
        ("head_delta_relative", "||D||_F / ||W0||_F over the head's slices", "ratio", "[0, inf)", ""),
        ("change_share", "the head's part of the sum of ||D||_F^2 over heads", "share", "[0, 1]", ""),
        ("head_gini", "Gini coefficient of ||D||_F^2 over heads", "ratio", "[0, 1)", "Gini 1912"),
        ("head_top10_share", "what the most changed tenth of heads has of the sum of ||D||_F^2", "share", "[0, 1]", ""),
        ("shared_cosine", "cosine of D and the mean D of the other domains", "cosine", "[-1, 1]", ""),
        ("shared_share", "shared_cosine^2: the domain-agnostic part of ||D||_F^2", "share", "[0, 1]", ""),
        ("agnostic_share", "mean <D_a, D_b> over a != b by mean ||D_a||_F^2", "share", "[-1, 1]", ""),
        ("spearman", "rank correlation of head_delta over heads", "correlation", "[-1, 1]", "Spearman 1904"),
        ("cosine", "cosine of the changes of two domains", "cosine", "[-1, 1]", ""),
        ("score", "scale01(head_delta of the domain) - scale01(that of the reference)", "difference", "[-1, 1]", ""),
    )
}


def analyse_heads(
    references: Sequence[Reference],
    options: Options,
    *,
    projections: Sequence[str] = PROJECTIONS,
    allow_unmatched: bool = False,
) -> HeadTables:
    """Find out which heads change between a base and its tuned checkpoints.

    Args:
        references: The base, then one tuned checkpoint per domain; text may begin with ``name=``.
        options: How; metrics, selection, vectors and method do not apply.
        projections: Which slices of a head count.
        allow_unmatched: Whether attention tensors may be without a partner.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    wanted = choose_projections(projections)
    choose("engine", options.engine, ENGINES)
    device = choose_device(options.device)
    with ExitStack() as stack:
        names, opened = open_all(references, options, stack)
        layouts, tasks = pair_heads(opened, wanted, allow_unmatched=allow_unmatched)
        cache = stack.enter_context(Cache(cache_folder())) if options.cache else None
        worker = HeadWorker([layout.checkpoint for layout in layouts], base_adapters(layouts), device, cache)
        found = _run(tasks, worker, options.progress)
        slices = _slices(opened[0], layouts, found)
        roles = ["base", *["tuned"] * (len(layouts) - 1)]
        members = [Member(*m) for m in zip(names, roles, layouts, strict=True)]
        settings = {
            "projections": list(wanted),
            "engine": options.engine,
            "architecture": str(options.architecture) if options.architecture else None,
            "device": device.type,
        }
        notes = uncut_notes(layouts[0], wanted) + adapter_notes(names, layouts)
        manifest = {"kind": "heads", "settings": settings, "seconds": round(time.monotonic() - begun, 3)}
        return _assemble(members, slices, manifest, notes)


def _run(
    tasks: Sequence[HeadTask], worker: HeadWorker, progress: Progress | None
) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    total, done = sum(t.cost for t in tasks), 0.0
    found = {}
    for task, grams in run_tasks(tasks, worker, device=worker.device):
        found[task.info.name] = (task.tuned, grams)
        done += task.cost
        if progress:
            progress(done, total, task.info.name)
    return found


def _slices(base: Layout, layouts: Sequence[Layout], found: dict[str, tuple[tuple[int, ...], np.ndarray]]) -> Slices:
    """All slices in file order; NaN where a domain lacks one."""
    domains = len(layouts) - 1
    grams, absent = [], []
    for name, entry in layouts[0].entries.items():
        count = len(entry.matrices)
        one, lacks = np.full((count, 1 + domains, 1 + domains), np.nan), np.ones((count, domains), dtype=bool)
        if name in found:
            tuned, known = found[name]
            at = [0, *tuned]
            one[:, np.array(at)[:, None], at] = known
            lacks[:, [i - 1 for i in tuned]] = False
        grams.append(one)
        absent.append(lacks)
    labels = _labels(layouts[0].matrices)
    return Slices(query_heads(_labels(base.matrices)), labels, np.concatenate(grams), np.concatenate(absent))


def _labels(matrices: Sequence[Matrix]) -> pl.DataFrame:
    schema = {"layer": pl.Int32, "block": pl.String, "projection": pl.String, "head": pl.Int32, "kv_head": pl.Int32}
    rows = [{**{name: getattr(m, name) for name in schema}, "entries": m.entries} for m in matrices]
    return pl.DataFrame(rows, schema={**schema, "entries": pl.Int64}, orient="row")


def _assemble(members: Sequence[Member], slices: Slices, manifest: dict[str, Any], notes: Sequence[str]) -> HeadTables:
    names = [member.name for member in members[1:]]
    places, heads, single = slices.heads, head_grams(slices), slice_grams(slices)
    rows = [model_row(m, len(slices.labels) if i == 0 else int((~slices.absent[:, i - 1]).sum()))
            for i, m in enumerate(members)]  # fmt: skip
    numbers = domain_numbers(heads, single)
    models = frame([rows[0], *(row | own for row, own in zip(rows[1:], numbers, strict=True))], MODELS)
    table = head_table(names, places, heads)
    return HeadTables(
        heads=table,
        domains=domain_table(names, heads, single),
        head_cosines=cosine_table(names, places, heads),
        scores=score_table(names, places, heads),
        lorenz=lorenz_table(names, heads),
        models=models,
        tensors=tensor_table(members),
        manifest=describe(members, models, manifest, GLOSSARY, [*notes, *_row_warnings(table)]),
    )


def _row_warnings(heads: pl.DataFrame) -> list[str]:
    texts = {
        "non_finite": "heads hold NaN or Inf; they have no numbers",
        "unpaired": "heads lack a slice in the tuned checkpoint; they have no numbers",
    }
    return status_warnings(heads, texts, "{model} layer {layer} head {head}")
