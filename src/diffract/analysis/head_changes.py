"""Which attention heads change between a base and its tuned checkpoints: from inner products of changes to tables."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations
from typing import Any

import numpy as np
import polars as pl

from diffract import schemas
from diffract.analysis.drawn import foretold_seconds
from diffract.analysis.facts import MetricPlan
from diffract.analysis.notable import NAME_CHARACTERS, related
from diffract.analysis.scan import Options, open_all
from diffract.analysis.tables import Member, describe, model_row, status_warnings, tensor_table, with_lineage
from diffract.analysis.work import GRAMS, GRAMS_VERSION, HeadTask, Part, Worker, run_all, tensor_tasks
from diffract.attention import (
    PER_KV_HEAD,
    PER_QUERY_HEAD,
    PROJECTIONS,
    as_heads,
    concentration,
    concentration_noise,
    head_numbers,
    head_sums,
    independent_entries,
    lorenz_rows,
    query_heads,
)
from diffract.checkpoints import Reference
from diffract.engine import ENGINES, choose_device
from diffract.errors import CheckpointError, SelectionError, choose, printable
from diffract.matrices import Layout, Matrix, merge_strange_adapters, pair, restrict
from diffract.matrices.lineage import tell_lineage
from diffract.metrics.agreement import cosine_chance
from diffract.metrics.pair import delta_cosine, delta_cosine_chance, split_domains
from diffract.schemas import MODELS
from diffract.stats import reference_score, spearman
from diffract.store import MOST_BYTES, Cache, cache_folder
from diffract.tables import Tables, frame
from diffract.timing import timed


@dataclass(frozen=True)
class Slices:
    """What the pass over the checkpoints found; S slices, D domains.

    Attributes:
        heads: All query heads, as of ``query_heads``.
        labels: One row per slice, in file order: tensor, layer, block, projection, head, kv_head, entries.
        grams: (S, 1 + D, 1 + D), inner products of W0 and the changes; NaN where the domain lacks the slice.
        absent: (S, D), whether it does.
    """

    heads: pl.DataFrame
    labels: pl.DataFrame
    grams: np.ndarray
    absent: np.ndarray


@dataclass(frozen=True)
class Grams:
    """The same in groups of slices, n of them: query heads, or the slices themselves.

    Attributes:
        entries: (n,), the independent entries of the group; see ``attention.HEADS``.
        base: (n,), ||W0||^2.
        changes: (n, D, D), <D_a, D_b>; NaN where one of them is unknown or not finite.
        absent: (n, D), whether the domain lacks a slice of the group.
    """

    entries: np.ndarray
    base: np.ndarray
    changes: np.ndarray
    absent: np.ndarray

    @property
    def squares(self) -> np.ndarray:
        """(n, D), ||D_a||^2."""
        return np.diagonal(self.changes, axis1=1, axis2=2)


def slice_grams(slices: Slices) -> Grams:
    """Return the slices as they are, each once."""
    grams = np.where(np.isfinite(slices.grams), slices.grams, np.nan)
    return Grams(slices.labels["entries"].to_numpy(), grams[:, 0, 0], grams[:, 1:, 1:], slices.absent)


def head_grams(slices: Slices) -> Grams:
    """Return the sums over each query head's slices; of a shared key-value head each of its heads has an equal part."""
    single = slice_grams(slices)
    count = single.changes.shape[1]
    upper = np.triu_indices(count)
    columns = {"base": single.base}
    columns |= {f"gram.{i}": values for i, values in enumerate(single.changes[:, *upper].T)}
    columns |= {f"absent.{i}": values.astype(np.int64) for i, values in enumerate(single.absent.T)}
    sums = head_sums(slices.heads, slices.labels.with_columns(**columns), list(columns))
    changes = np.full((sums.height, count, count), np.nan)
    changes[:, *upper] = sums.select(f"gram.{i}" for i in range(len(upper[0]))).to_numpy()
    changes = np.triu(changes) + np.triu(changes, 1).transpose(0, 2, 1)
    absent = sums.select(f"absent.{i}" for i in range(count)).to_numpy() != 0
    entries = independent_entries(slices.heads, slices.labels)
    return Grams(entries.to_numpy(), sums["base"].to_numpy(), changes, absent)


def choose_projections(names: Sequence[str]) -> tuple[str, ...]:
    """Return the projections that are meant, each once.

    Raises:
        SelectionError: There are none, or one is unknown.
    """
    for name in names:
        if name not in PROJECTIONS:
            near = name.rpartition(".")[2][:1].lower()
            hint = f" Did you mean {near!r}?" if near in PROJECTIONS else ""
            known = ", ".join(PROJECTIONS)
            raise SelectionError(f"unknown projection {printable(name)!r}, expected some of: {known}.{hint}")
    if not names:
        raise SelectionError(f"no projection is named. Name some of: {', '.join(PROJECTIONS)}.")
    return tuple(p for p in PROJECTIONS if p in names)


def is_slice(matrix: Matrix, projections: Sequence[str] = PROJECTIONS) -> bool:
    """Whether a matrix is one head's part of an attention projection."""
    own = matrix.projection in PER_QUERY_HEAD and matrix.head is not None
    shared = matrix.projection in PER_KV_HEAD and matrix.kv_head is not None
    return matrix.projection in projections and matrix.index is None and (own or shared)


def pair_heads(opened: Sequence[Layout], wanted: Sequence[str], *, allow_unmatched: bool) -> list[Layout]:
    """Pair the attention slices of a base and its tuned checkpoints.

    Args:
        opened: The base's layout, then the others'.
        wanted: Which projections count.
        allow_unmatched: Whether attention tensors may be without a partner.

    Returns:
        The layouts, of which other matrices are left out.

    Raises:
        CheckpointError: There are no slices, or not all have a partner and that is not allowed.
    """
    base = restrict(opened[0], lambda m: is_slice(m, wanted))
    if not base.matrices:
        where, note = printable(base.checkpoint.reference), opened[0].architecture.note
        raise CheckpointError(
            f"{where}: no {', '.join(wanted)} that is cut into heads. {note or 'Choose other projections.'}"
        )
    ours = {name for name, entry in base.entries.items() if entry.matrices}
    # a tuned checkpoint may lack the configuration that tells its heads: names are enough, as in a comparison
    children = [restrict(child, lambda m: m.tensor in ours or is_slice(m, wanted)) for child in opened[1:]]
    return merge_strange_adapters(pair([base, *children], allow_unmatched=allow_unmatched))


def uncut_notes(base: Layout, wanted: Sequence[str]) -> list[str]:
    """Say which projections a block does not cut into heads, as they do not count then."""
    blocks = dict.fromkeys(m.block for m in base.matrices)
    found = {block: {m.projection for m in base.matrices if m.block == block} for block in blocks}
    return [
        f"{block}: {', '.join(lost)} not cut into heads in this model; head_delta is over the rest."
        for block, parts in found.items()
        if (lost := [p for p in wanted if p not in parts])
    ]


def head_table(names: Sequence[str], places: pl.DataFrame, heads: Grams) -> pl.DataFrame:
    """Return one row per domain and head; ``tables.HEADS`` says what the columns mean."""
    split = split_domains(heads.changes)
    agnostic = _agnostic_share(heads.changes)
    frames = []
    for i, name in enumerate(names):
        own = head_numbers(heads.squares[:, i], heads.base, absent=heads.absent[:, i])
        between = {
            "entries": heads.entries,
            "shared_cosine": split.cosine[:, i],
            "shared_share": split.share[:, i],
            "specific_delta": np.sqrt(np.maximum(split.specific_squares[:, i], 0.0)),
            "agnostic_share": agnostic,
        }
        frames.append(places.with_columns(model=pl.lit(name), **own, **{k: pl.Series(v) for k, v in between.items()}))
    return as_heads(frames)


def domain_table(names: Sequence[str], heads: Grams, slices: Grams) -> pl.DataFrame:
    """Return one row per pair of domains: over what is known of both."""
    rows = []
    for a, b in combinations(range(len(names)), 2):
        known = np.isfinite(slices.changes[:, a, b])
        total = slices.changes[known][:, [[a, a], [b, b]], [[a, b], [a, b]]].sum(0)
        both = np.isfinite(heads.changes[:, a, b])
        entries = int(slices.entries[known].sum())
        rows.append({
            "a": names[a],
            "b": names[b],
            "heads": int(both.sum()),
            "entries": entries,
            "spearman": float(spearman(heads.squares[both, a], heads.squares[both, b])),
            "cosine": float(delta_cosine(total)[0, 1]),
            "cosine_chance": delta_cosine_chance(entries) if entries else math.nan,
            "cosine_chance_abs": cosine_chance(entries) if entries else math.nan,
        })  # fmt: skip
    return pl.DataFrame(rows, schema=schemas.DOMAINS, orient="row").with_columns(pl.selectors.float().fill_nan(None))


def score_table(names: Sequence[str], places: pl.DataFrame, heads: Grams) -> pl.DataFrame:
    """Return the reference-domain score of every head, for every ordered pair of domains."""
    deltas = np.sqrt(heads.squares)
    frames = [
        places.with_columns(
            domain=pl.lit(names[a]),
            reference=pl.lit(names[b]),
            score=pl.Series(reference_score(deltas[:, a], deltas[:, b])),
        )
        for a, b in permutations(range(len(names)), 2)
    ]
    return _shaped(frames, schemas.REFERENCE_SCORES)


def lorenz_table(names: Sequence[str], heads: Grams) -> pl.DataFrame:
    """Return the points of each domain's Lorenz curve of ||D||_F^2 over heads."""
    frames = [lorenz_rows(name, _known(heads.squares[:, i])) for i, name in enumerate(names)]
    return _shaped(frames, schemas.LORENZ)


def domain_numbers(found: Slices, heads: Grams, slices: Grams) -> list[dict[str, float | None]]:
    """Return the numbers of each domain as a whole; of slices, each once, where a head's are not meant."""
    places, labels = found.heads, found.labels
    all_known = np.isfinite(slices.changes).all((1, 2))
    whole = slices.changes[all_known].sum(0)
    split = split_domains(whole)
    rows = []
    for i in range(len(whole)):
        known = np.isfinite(slices.squares[:, i])
        moved, before = slices.squares[known, i].sum(), slices.base[known].sum()
        numbers = {
            "attention_delta": math.sqrt(moved) if known.any() else math.nan,
            "attention_delta_relative": math.sqrt(moved / before) if before else math.nan,
            **concentration(_known(heads.squares[:, i])),
            **concentration_noise(places, labels.with_columns(change=pl.Series(slices.squares[:, i]))),
            "shared_cosine": float(split.cosine[i]),
            "shared_share": float(split.share[i]),
            "agnostic_share": float(_agnostic_share(whole)),
        }
        rows.append({name: None if math.isnan(value) else float(value) for name, value in numbers.items()})
    return rows


def _agnostic_share(changes: np.ndarray) -> np.ndarray:
    """Mean of <D_a, D_b> over a != b by the mean of ||D_a||^2."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return split_domains(changes).shared_squares / np.diagonal(changes, axis1=-2, axis2=-1).mean(-1)


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _shaped(frames: Sequence[pl.DataFrame], schema: dict[str, Any]) -> pl.DataFrame:
    """One table with the columns of a schema; what is no number becomes null."""
    if not frames:
        return pl.DataFrame(schema=schema)
    table = pl.concat(frames).select(pl.col(name).cast(dtype) for name, dtype in schema.items())
    return table.with_columns(pl.selectors.float().fill_nan(None))


# Version 2: squares of key-value slices are shared among the query heads of their group.
GLOSSARY: dict[str, dict[str, Any]] = {
    name: {"summary": summary, "unit": unit, "range": span, "source": source, "version": 2}
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
) -> Tables:
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
    with ExitStack() as stack:
        names, opened = open_all(references, options, stack)
        layouts = pair_heads(opened, wanted, allow_unmatched=allow_unmatched)
        paired = [task for task in tensor_tasks(layouts) if task.tuned]
        tasks = [HeadTask(task.info, task.matrices, task.model, task.tuned) for task in paired]
        worker = _worker(layouts, options, stack)
        if options.share is not None:
            options.share.cut([foretold_seconds(task, worker.plan) for task in tasks])
            options.share.do(tasks, worker, options.progress)
            return options.share.tables(names, [GRAMS_VERSION])
        how = {"wanted": wanted, "allow_unmatched": allow_unmatched}
        outcomes = options.outcomes(partial(_make_worker, references, options.elsewhere, **how))
        parts = run_all(tasks, worker, outcomes=outcomes, progress=options.progress).parts
        slices = _slices(opened[0], layouts, {task.tensor: task.tuned for task in tasks}, parts)
        roles = ["base", *["tuned"] * (len(layouts) - 1)]
        members = [Member(*m) for m in zip(names, roles, layouts, strict=True)]
        settings = {
            "projections": list(wanted),
            "engine": options.engine,
            "architecture": str(options.architecture) if options.architecture else None,
            "device": worker.device.type,
        }
        notes = uncut_notes(layouts[0], wanted)
        kinship = [tell_lineage(opened[0], one) for one in opened[1:]]
        named = printable(names[0], NAME_CHARACTERS)
        said = {n: [text] for n, one in zip(names[1:], kinship, strict=True) if (text := related(one, named))}
        manifest = {"kind": "heads", "settings": settings, "seconds": round(time.monotonic() - begun, 3)}
        return with_lineage(_assemble(members, slices, manifest | {"notable": said}, notes), [None, *kinship])


def _worker(layouts: Sequence[Layout], options: Options, stack: ExitStack) -> Worker:
    cache = stack.enter_context(Cache(cache_folder(), most_bytes=MOST_BYTES)) if options.cache else None
    return Worker([layout.checkpoint for layout in layouts], MetricPlan(), choose_device(options.device), cache)


def _make_worker(
    references: Sequence[Reference], options: Options, *, wanted: Sequence[str], allow_unmatched: bool
) -> Worker:
    """Return who does the tasks, with models that stay open as long as the process lives."""
    stack = ExitStack()
    _, opened = open_all(references, options, stack)
    return _worker(pair_heads(opened, wanted, allow_unmatched=allow_unmatched), options, stack)


def _slices(
    base: Layout, layouts: Sequence[Layout], paired: Mapping[str, tuple[int, ...]], parts: Sequence[Part]
) -> Slices:
    """Return all slices in file order; NaN where a domain lacks one."""
    domains = len(layouts) - 1
    found = {part.matrices[0].tensor: part.rows[GRAMS].to_numpy() for part in parts}
    grams, absent = [], []
    for name, entry in layouts[0].entries.items():
        count = len(entry.matrices)
        one, lacks = np.full((count, 1 + domains, 1 + domains), np.nan), np.ones((count, domains), dtype=bool)
        if name in found:
            tuned = paired[name]
            at = [0, *tuned]
            one[:, np.array(at)[:, None], at] = found[name].reshape(count, len(at), len(at))
            lacks[:, [i - 1 for i in tuned]] = False
        grams.append(one)
        absent.append(lacks)
    labels = _labels(layouts[0].matrices)
    return Slices(query_heads(_labels(base.matrices)), labels, np.concatenate(grams), np.concatenate(absent))


def _labels(matrices: Sequence[Matrix]) -> pl.DataFrame:
    schema: dict[str, Any] = {"tensor": pl.String, "layer": pl.Int32, "block": pl.String, "projection": pl.String}
    schema |= {"head": pl.Int32, "kv_head": pl.Int32}
    rows = [{**{name: getattr(m, name) for name in schema}, "entries": m.entries} for m in matrices]
    return pl.DataFrame(rows, schema={**schema, "entries": pl.Int64}, orient="row")


@timed("tables")
def _assemble(members: Sequence[Member], slices: Slices, manifest: dict[str, Any], notes: Sequence[str]) -> Tables:
    names = [member.name for member in members[1:]]
    places, heads, single = slices.heads, head_grams(slices), slice_grams(slices)
    rows = [model_row(m, len(slices.labels) if i == 0 else int((~slices.absent[:, i - 1]).sum()))
            for i, m in enumerate(members)]  # fmt: skip
    numbers = domain_numbers(slices, heads, single)
    models = frame([rows[0], *(row | own for row, own in zip(rows[1:], numbers, strict=True))], MODELS)
    table = head_table(names, places, heads)
    texts = {
        "non_finite": "heads hold NaN or Inf; they have no numbers",
        "unpaired": "heads lack a slice in the tuned checkpoint; they have no numbers",
    }
    doubts = status_warnings(table, texts, "{model} layer {layer} head {head}")
    described = describe(members, models, manifest, glossary=GLOSSARY, warnings=[*notes, *doubts])
    frames = {
        "heads": table,
        "domains": domain_table(names, heads, single),
        "scores": score_table(names, places, heads),
        "lorenz": lorenz_table(names, heads),
        "models": models,
        "tensors": tensor_table(members),
    }
    return Tables(described, frames)
