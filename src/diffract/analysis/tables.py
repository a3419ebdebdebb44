"""The tables of a run, assembled from what the workers found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import blake3
import numpy as np
import polars as pl
import torch

from diffract import schemas, tables
from diffract.analysis.facts import CURVE, MetricPlan
from diffract.analysis.noise import glossary, over_noise
from diffract.analysis.work import Part
from diffract.attention import (
    compared_heads,
    concentration,
    concentration_noise,
    concentration_of_base,
    head_squares,
    is_circuit,
    query_heads,
)
from diffract.matrices import Layout
from diffract.matrices.lineage import Lineage
from diffract.metrics.catalog import GROUPS
from diffract.metrics.peaks import peak_count
from diffract.timing import timed

POOLED = "pooled_peak_count"

TOLD = ("summary", "unit", "range", "source", "version")
"""What the manifest says of a metric, besides its group."""

MEANING = {
    "summary": "peaks in the density of ln sigma of all heads of a layer and projection together, on each one's row",
    "unit": "count",
    "range": "[1, inf)",
    "source": "Scott 1992, 6.3",
    "version": 1,
    "group": "spectral_shape",
}
"""The manifest's words for the column."""

POOL_PLACE = ("model", "layer", "block", "projection")


def pooled_peaks(metrics: pl.DataFrame, spectra: pl.DataFrame) -> pl.DataFrame:
    """Return the metrics with ``pooled_peak_count``, where they have ``peak_count``; null but on rows of heads.

    Sigmas that the method does not tell from zero do not count, as in ``peak_count``.
    """
    if "peak_count" not in metrics.columns:
        return metrics
    cut = pl.any_horizontal(pl.col("head", "kv_head").is_not_null())
    heads = metrics.filter(cut, pl.col("status") == "ok")
    sigmas = spectra.filter(quantity="sigma").select("model", "name", "values")
    joined = heads.join(sigmas, on=["model", "name"], how="inner").select(*POOL_PLACE, "resolved", "values")
    rows = []
    for place, group in joined.group_by(*POOL_PLACE, maintain_order=True):
        if len(group) > 1:
            known = zip(group["values"], group["resolved"], strict=True)
            pool = np.concatenate([np.where(v.to_numpy() > floor, v.to_numpy(), 0.0) for v, floor in known])
            rows.append((*place, peak_count(torch.from_numpy(pool)[None]).item()))
    schema = {name: metrics.schema[name] for name in POOL_PLACE} | {POOLED: pl.Float64}
    found = pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.col(POOLED).fill_nan(None))
    marked = metrics.join(found, on=[*POOL_PLACE], how="left", nulls_equal=True, maintain_order="left")
    return marked.with_columns(pl.when(cut).then(POOLED).alias(POOLED))


def model_numbers(base: pl.DataFrame, tuned: pl.DataFrame, heads: pl.DataFrame) -> dict[str, float | None]:
    """Return the numbers of one tuned model; ``None`` for what the computed metrics do not give.

    Shares are means over matrices weighted by ||D||_F^2, that is, shares of the whole model's change; heads are
    weighted by the squared norm of their change, so that shares add up. Circuits do not count.

    Args:
        base: The base's metric rows.
        tuned: The tuned model's metric rows.
        heads: Its rows of the ``heads`` table.
    """
    base, tuned = base.filter(~is_circuit()), tuned.filter(~is_circuit())
    squares = pl.col("frobenius_norm") ** 2 if "frobenius_norm" in base.columns else pl.lit(None, pl.Float64)
    pairs = tuned.filter(pl.col("status") != "unpaired").join(
        base.select("name", base_squares=squares), on="name", how="left"
    )
    numbers = {"changed_share": _mean(pairs, "delta_changed_share", pl.col("rows") * pl.col("cols"))}
    if (
        "delta_frobenius" not in pairs.columns
        and "delta_relative" in pairs.columns
        and "frobenius_norm" in base.columns
    ):
        pairs = pairs.with_columns(delta_frobenius=pl.col("delta_relative") * pl.col("base_squares").sqrt())
    if "delta_frobenius" not in pairs.columns:
        return _plain(numbers)
    pairs = pairs.filter(pl.col("delta_frobenius").is_not_null()).with_columns(d2=pl.col("delta_frobenius") ** 2)
    before = float(pairs["base_squares"].sum()) if pairs["base_squares"].null_count() == 0 else 0.0
    numbers["delta_relative"] = math.sqrt(float(pairs["d2"].sum()) / before) if before else math.nan
    of_the_whole = {
        "delta_free_relative": pl.col("delta_free_relative") ** 2 * pl.col("base_squares"),
        "rounding_relative": pl.col("delta_rounding_floor") ** 2,
    }
    for name, squared in of_the_whole.items():
        if before and set(squared.meta.root_names()) <= set(pairs.columns):
            numbers[name] = math.sqrt(float(pairs.select(squared.sum()).item()) / before)
    numbers["scale_change"] = _mean(pairs, "scale_change", pl.col("base_squares"))
    for name in ("value_share", "value_share_chance", "spectral_shift_share"):
        numbers[name] = _mean(pairs, name, pl.col("d2"))
    slices = base.select(
        *("name", "tensor", "projection", "layer", "block", "head", "kv_head"), entries=pl.col("rows") * pl.col("cols")
    ).filter(pl.any_horizontal(pl.col("head", "kv_head").is_not_null()))
    slices = slices.join(pairs.select("name", change="d2"), on="name", how="left", maintain_order="left")
    noise = concentration_noise(query_heads(base), slices.with_columns(pl.col("change").fill_null(math.nan)))
    spread = concentration(head_squares(heads)) | concentration_of_base(heads) | noise
    return _plain(numbers | spread) | over_noise(pairs)


def with_lineage(run: tables.Tables, found: Sequence[Lineage | None]) -> tables.Tables:
    """Return a run with how each model is related to what it is compared with.

    Args:
        run: With ``models``, one row per model.
        found: How each is related; ``None`` for the first.

    Returns:
        The run: ``models`` with the columns ``RELATION``; ``metrics``, or of a run of heads ``heads``, with the word.
        Of strangers, and of rearranged models, whose matrices of one name do not belong together, the numbers of a
        whole change are null.
    """
    told = [
        (name, one and one.word, one and one.correlation) for name, one in zip(run.models["model"], found, strict=True)
    ]
    words = pl.DataFrame(told, schema={"model": pl.String, **schemas.RELATION}, orient="row")
    models = run.models.join(words, on="model", how="left", maintain_order="left")
    apart = pl.col("lineage").is_in(["stranger", "rearranged"]).fill_null(value=False)
    changes = [name for name in run.models.columns if name.startswith(CHANGES)]
    frames = {"models": models.with_columns(pl.when(~apart).then(pl.col(name)).alias(name) for name in changes)}
    rows = "heads" if run.kind == "heads" else "metrics"
    marked = run[rows].join(words.select("model", "lineage"), on="model", how="left", maintain_order="left")
    labels = [name for name in marked.columns if name in schemas.LABELS | schemas.OUTCOME | schemas.TIMELINE]
    frames[rows] = marked.select(*labels, "lineage", pl.exclude(*labels, "lineage"))
    return tables.Tables(run.manifest, run.frames | frames)


CHANGES = (
    *("changed_share", "delta_", "rounding_", "value_share", "spectral_shift", "sigma_change", "scale_", "head_"),
    *("intruders", "left_", "right_", "noise_"),
    *("attention_delta", "shared_", "agnostic_", "scale_change", "energy_tenth"),
)
"""How the names of numbers of a whole change begin."""

SUMMARISED = ("pl_alpha", "alpha_hat", "log10_alpha_norm")
"""Metrics whose mean over the matrices that could be measured describes a model (Martin, Peng & Mahoney 2021)."""


def tail_summaries(own: pl.DataFrame) -> dict[str, float | None]:
    """Return means of heavy-tail metrics over a model's matrices, and of how many; nothing if none was computed.

    Circuits do not count: they are products of matrices that do.
    """
    matrices = own.filter(~is_circuit())
    found: dict[str, float | None] = {}
    for name in SUMMARISED:
        if name in own.columns:
            known = matrices[name].drop_nulls().to_numpy()
            found |= {f"{name}_mean": float(known.mean()) if len(known) else None, f"{name}_count": float(len(known))}
    return found


def _mean(rows: pl.DataFrame, column: str, weight: pl.Expr) -> float:
    if column not in rows.columns:
        return math.nan
    known = rows.filter(pl.col(column).is_not_null()).select(value=column, weight=weight.cast(pl.Float64))
    total = float(known["weight"].sum())
    return float((known["value"] * known["weight"]).sum()) / total if total else math.nan


def _plain(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


@dataclass(frozen=True)
class Member:
    """One model of a run.

    Attributes:
        name: What tables call it.
        role: ``model``, ``base``, ``tuned`` or ``checkpoint``.
        layout: Its tensors and what became of them.
    """

    name: str
    role: str
    layout: Layout


@timed("tables")
def assemble(
    members: Sequence[Member],
    parts: Sequence[Part],
    digests: Mapping[tuple[int, str], str],
    plan: MetricPlan,
    manifest: dict[str, Any],
) -> tables.Tables:
    """Return the tables of a run.

    Args:
        members: The models.
        parts: Rows of their matrices, in any order.
        digests: Of every tensor that was read, by model and name.
        plan: What was computed.
        manifest: What the caller knows; models, metrics and warnings are added to it.
    """
    parts = _in_order(members, parts)
    rows, spectra = _metrics(members, parts), _spectra(members, parts)
    names = [m.name for m in plan.metrics]
    noises = glossary(plan)
    metrics = rows.select(*schemas.LABELS, *schemas.OUTCOME, *(n for n in (*names, *noises) if n in rows.columns))
    heads = compared_heads(metrics)
    models = _models(members, metrics, heads, digests)
    metrics = pooled_peaks(metrics, spectra)
    groups = {m.name: group for group, members in GROUPS.items() for m in members}
    meanings = {
        m.name: {name: getattr(m, name) for name in TOLD} | {"group": groups.get(m.name, "")} for m in plan.metrics
    }
    meanings |= {name: meaning for name, meaning in noises.items() if name in metrics.columns}
    if POOLED in metrics.columns:
        meanings[POOLED] = MEANING
    described = describe(members, models, manifest, glossary=meanings, warnings=row_warnings(metrics))
    frames = {"metrics": metrics, "spectra": spectra, "models": models, "tensors": tensor_table(members)}
    return tables.Tables(described, frames | ({"heads": heads} if manifest["kind"] == "compare" else {}))


SHAPE = ("heads", "kv_heads", "head_dim", "layers", "width")
"""Dimensions that the manifest tells of each model."""


def describe(
    members: Sequence[Member],
    models: pl.DataFrame,
    known: Mapping[str, Any],
    *,
    glossary: Mapping[str, Any],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Return the manifest of a run over checkpoints.

    Args:
        members: The models.
        models: The table of them.
        known: What the caller knows: kind, settings, seconds.
        glossary: What the numbers mean.
        warnings: What the numbers gave rise to; those of the models stand before them.
    """
    described = []
    for member, row in zip(members, models.iter_rows(named=True), strict=True):
        architecture = member.layout.architecture
        shape = {name: getattr(architecture.dimensions, name) for name in SHAPE}
        own = {k: row[k] for k in ("model", "role", "reference", "digest", "parameters", "size_bytes")}
        described.append(own | {"architecture": {"family": architecture.family, **shape, "note": architecture.note}})
    return tables.new_manifest(
        **known,
        models=described,
        metrics=dict(glossary),
        warnings=[f"{m.name}: {w}" for m in members for w in m.layout.warnings] + list(warnings),
    )


def _in_order(members: Sequence[Member], parts: Sequence[Part]) -> list[Part]:
    """Parts by model, then in file order; circuits, which lie in no file, come after all matrices."""
    places = {(i, m.name): k for i, member in enumerate(members) for k, m in enumerate(member.layout.matrices)}

    def place(part: Part) -> tuple[int, int, int, str]:
        first = part.matrices[0]
        at = places.get((part.model, first.name), len(places))
        return part.model, at, first.layer or 0, first.name

    return sorted(parts, key=place)


def _metrics(members: Sequence[Member], parts: Sequence[Part]) -> pl.DataFrame:
    """One row per model and matrix: labels, outcome and metrics."""
    # one frame for all parts: one for each takes more memory than what it holds
    placed = [(members[part.model], m) for part in parts for m in part.matrices]
    labels = [
        {"model": member.name, **m.labels, "dtype": member.layout.checkpoint.info(m.tensor).dtype}
        for member, m in placed
    ]
    numbers = pl.concat([part.rows for part in parts], how="diagonal").select(pl.exclude(f"^{CURVE}.*$")).rechunk()
    rows = pl.concat([pl.DataFrame(labels, schema=schemas.LABELS), numbers], how="horizontal")
    alone = pl.col("_alone") & (pl.col("status") == "ok")
    outcomes = tensor_table(members).select("model", "tensor", _alone=pl.col("outcome").is_in(["unmatched", "resized"]))
    rows = rows.join(outcomes, on=["model", "tensor"], how="left", maintain_order="left")
    return rows.with_columns(status=pl.when(alone).then(pl.lit("unpaired")).otherwise("status")).drop("_alone")


TOGETHER = 256
"""Parts whose curves are laid out at once: few enough to take little memory, enough to cost little time each."""


def _spectra(members: Sequence[Member], parts: Sequence[Part]) -> pl.DataFrame:
    """One row per model, matrix and quantity; some parts at a time, as together they are most of what a run keeps."""
    frames = [pl.DataFrame(schema=schemas.SPECTRA)]
    for start in range(0, len(parts), TOGETHER):
        some = parts[start : start + TOGETHER]
        curves = pl.concat([part.rows for part in some], how="diagonal").select(f"^{CURVE}.*$")
        if curves.width:
            places = [(members[p.model].name, m.name, i) for i, p in enumerate(some) for m in p.matrices]
            named = pl.DataFrame(places, schema=["model", "name", "part"], orient="row")
            long = pl.concat([named, curves], how="horizontal").unpivot(
                curves.columns, index=named.columns, variable_name="quantity", value_name="values"
            )
            known = long.filter(pl.col("values").is_not_null()).sort("part", maintain_order=True)
            frames.append(known.with_columns(pl.col("quantity").str.strip_prefix(CURVE)).select(*schemas.SPECTRA))
    return pl.concat(frames)


def _models(
    members: Sequence[Member], metrics: pl.DataFrame, heads: pl.DataFrame, digests: Mapping[tuple[int, str], str]
) -> pl.DataFrame:
    base = metrics.filter(model=members[0].name)
    rows = []
    for i, member in enumerate(members):
        own, names = metrics.filter(model=member.name), sorted(member.layout.entries)
        numbers = model_numbers(base, own, heads.filter(model=member.name)) if member.role == "tuned" else {}
        digest = None  # of a model of which only a part was read nothing can be said
        if all((i, name) in digests for name in names):
            digest = model_digest({name: digests[i, name] for name in names})
        rows.append(model_row(member, len(own), digest) | numbers | tail_summaries(own))
    return tables.frame(rows, schemas.MODELS)


def model_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of a model: that of all its tensors' names and digests, in order of the names."""
    return blake3.blake3("".join(f"{name}\0{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def model_row(member: Member, matrices: int, digest: str | None = None) -> dict[str, Any]:
    """Return what a model is: its row in ``models``, without numbers.

    Args:
        member: The model.
        matrices: How many were analysed.
        digest: Of all tensors' names and digests, in order of the names; ``None`` if some were not read.
    """
    # A tied head has matrices where it is measured beside one of its own; it is no further tensor for that.
    entries = member.layout.entries.values()
    infos = [entry.info for entry in entries if entry.outcome != "tied" or not entry.matrices]
    return {
        "model": member.name,
        "role": member.role,
        "reference": member.layout.checkpoint.reference,
        "family": member.layout.architecture.family,
        "parameters": sum(info.entries for info in infos),
        "size_bytes": sum(info.size_bytes for info in infos),
        "tensors": len(infos),
        "matrices": matrices,
        "digest": digest,
    }


def tensor_table(members: Sequence[Member]) -> pl.DataFrame:
    """Return what became of every stored tensor."""
    rows = [
        {
            "model": member.name,
            "tensor": entry.info.name,
            "shape": list(entry.info.stored_shape),
            "dtype": entry.info.dtype,
            "size_bytes": entry.info.size_bytes,
            "outcome": entry.outcome,
            "note": entry.note,
        }
        for member in members
        for entry in member.layout.entries.values()
    ]
    rows += [
        {
            "model": member.name,
            "tensor": name,
            "shape": list(found.shape),
            "dtype": found.dtype,
            "size_bytes": found.size_bytes,
            "outcome": "set_aside",
            "note": found.reason,
        }
        for member in members
        for name, found in member.layout.checkpoint.set_aside.items()
    ]
    return tables.frame(rows, schemas.TENSORS)


def row_warnings(metrics: pl.DataFrame) -> list[str]:
    """One sentence for each kind of row that has no numbers."""
    texts = {
        "non_finite": "matrices hold NaN or Inf; they have no metrics",
        "zero": "matrices are all zero; their ratios are null",
        "failed": "matrices could not be computed: every process that tried ended; they have no numbers",
    }
    return status_warnings(metrics, texts, "{model} {name}")


def status_warnings(rows: pl.DataFrame, texts: Mapping[str, str], first: str) -> list[str]:
    """Return a sentence for each status that some rows have.

    Args:
        rows: With a column ``status``.
        texts: What is said of their number, by status.
        first: How the first of them is called, a format over its columns.
    """
    found = []
    for status, text in texts.items():
        some = rows.filter(pl.col("status") == status)
        if len(some):
            found.append(f"{len(some)} {text}, first {first.format_map(some.row(0, named=True))}.")
    return found
