"""Schemas of the tables, and run folders: a run is a few Parquet tables and one manifest that names its kind.

Every kind has

``models``    one row per model: what it is, and model-level numbers
``tensors``   one row per model and stored tensor: what became of it (analysed, tied, unmatched, ...)

A scan or a comparison

``metrics``   one row per model and matrix: labels, how it was computed, then one column per metric
``spectra``   one row per model, matrix and quantity (``sigma``, ``delta_sigma``, ``left_agreement``, ...): a list
``heads``     of a comparison: one row per tuned model and head

The heads of several domains

``heads``     one row per domain and head: how much it changed, and what of that other domains share
``domains``   one row per pair of domains
``scores``    one row per domain, reference domain and head
``lorenz``    the points of each domain's Lorenz curve
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import polars as pl

from diffract.attention import HEADS, compared_heads
from diffract.errors import RunError
from diffract.store import refuse_existing, whole_file, whole_folder, write_text

__all__ = [
    "DOMAINS",
    "FORMAT",
    "HEADS",
    "LABELS",
    "LORENZ",
    "MANIFEST",
    "MODELS",
    "OUTCOME",
    "SCORES",
    "SPECTRA",
    "TENSORS",
    "HeadTables",
    "RunTables",
    "Tables",
    "frame",
    "load",
    "read_manifest",
    "refuse_existing",
    "whole_file",
    "whole_folder",
    "write",
    "write_text",
]

FORMAT = 1
"""Number of the run-folder layout; a reader refuses a newer one."""

LABELS: dict[str, Any] = {
    "model": pl.String,
    "name": pl.String,
    "tensor": pl.String,
    "layer": pl.Int32,
    "block": pl.String,
    "projection": pl.String,
    "head": pl.Int32,
    "kv_head": pl.Int32,
    "expert": pl.Int32,
    "rows": pl.Int64,
    "cols": pl.Int64,
    "dtype": pl.String,
}
"""Columns that say which matrix a row speaks of; ``(model, name)`` is unique."""

OUTCOME: dict[str, Any] = {
    "status": pl.String,
    "method": pl.String,
    "resolved": pl.Float64,
    "warning": pl.String,
}
"""``status`` ok | zero | non_finite | unpaired; ``method`` of the spectrum, and the smallest sigma that it resolves;
``warning``: what speaks against the fitted power law, where there is one.
"""

SPECTRA: dict[str, Any] = {
    "model": pl.String,
    "name": pl.String,
    "quantity": pl.String,
    "values": pl.List(pl.Float64),
}

MODELS: dict[str, Any] = {
    "model": pl.String,
    "role": pl.String,
    "reference": pl.String,
    "family": pl.String,
    "parameters": pl.Int64,
    "size_bytes": pl.Int64,
    "tensors": pl.Int32,
    "matrices": pl.Int32,
    "digest": pl.String,
}
"""``role`` is ``model`` (scan), ``base`` or ``tuned`` (compare), ``checkpoint`` (trajectory); model-level numbers
follow as further columns.
"""

TIMELINE: dict[str, Any] = {"order": pl.Int32, "stage": pl.Int32, "step": pl.Int64, "tokens": pl.Int64}
"""Columns of ``metrics`` and ``models`` in a trajectory: place in the series from 0 on, and what the names tell."""

AGAINST: dict[str, Any] = {"against": pl.String}
"""Column of ``models`` in a trajectory: which checkpoint each is compared with; null for the first."""

TENSORS: dict[str, Any] = {
    "model": pl.String,
    "tensor": pl.String,
    "shape": pl.List(pl.Int64),
    "dtype": pl.String,
    "size_bytes": pl.Int64,
    "outcome": pl.String,
    "note": pl.String,
}
"""``outcome``: analysed | retyped | unmatched | resized | tied | not_selected | vector | not_matrix | not_float |
empty.

``retyped`` tensors are compared, though base and tuned store other dtypes; ``unmatched`` and ``resized`` ones are
analysed alone.
"""

DOMAINS: dict[str, Any] = {
    "a": pl.String,
    "b": pl.String,
    "heads": pl.Int32,
    "entries": pl.Int64,
    "spearman": pl.Float64,
    "cosine": pl.Float64,
    "cosine_chance": pl.Float64,
    "cosine_chance_abs": pl.Float64,
}
"""Columns of ``domains``: Spearman's correlation of ``head_delta`` over ``heads`` heads, and the cosine of the changes
themselves over ``entries`` entries, every slice once. The cosine of random directions has mean 0, standard deviation
``cosine_chance`` = 1 / sqrt(entries) and mean absolute value ``cosine_chance_abs``, about sqrt(2 / (pi entries))."""

SCORES: dict[str, Any] = {
    "domain": pl.String,
    "reference": pl.String,
    "layer": pl.Int32,
    "block": pl.String,
    "head": pl.Int32,
    "score": pl.Float64,
}
"""Columns of ``scores``: scale01(``head_delta`` of the domain) - scale01(that of the reference), in [-1, 1]."""

LORENZ: dict[str, Any] = {"model": pl.String, "heads_share": pl.Float64, "change_share": pl.Float64}
"""Columns of ``lorenz``: what the least changed ``heads_share`` of heads have of the sum of ||D||_F^2."""

COMPARE = "compare"
"""Kind of the runs that write ``heads`` beside the tables of a scan."""

MANIFEST = ("diffract", "kind", "created", "seconds", "settings", "models", "metrics", "warnings")
"""What a manifest holds besides the layout's number."""


class RunTables:
    """The tables of a run and its manifest; what a run folder holds. Subclasses are frozen dataclasses of frames.

    Attributes:
        KINDS: The kinds of run that consist of these tables.
        SCHEMAS: The first columns of each table, by its name.
        manifest: Version, kind, settings, models, warnings.
    """

    KINDS: ClassVar[tuple[str, ...]]
    SCHEMAS: ClassVar[dict[str, dict[str, Any]]]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Tables(RunTables):
    """The four tables of a scan, a comparison or a trajectory.

    Attributes:
        metrics: One row per model and matrix.
        spectra: One row per model, matrix and quantity.
        models: One row per model.
        tensors: One row per model and stored tensor.
        manifest: Version, command, settings, models with digests, warnings.
        heads: One row per tuned model and head; empty where nothing is compared, or nothing is cut into heads.
    """

    KINDS = ("scan", "compare", "trajectory")
    SCHEMAS = {"metrics": LABELS | OUTCOME, "spectra": SPECTRA, "models": MODELS, "tensors": TENSORS}  # noqa: RUF012

    metrics: pl.DataFrame
    spectra: pl.DataFrame
    models: pl.DataFrame
    tensors: pl.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)
    heads: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=HEADS))


@dataclass(frozen=True)
class HeadTables(RunTables):
    """The tables of a run over heads and domains.

    Attributes:
        heads: One row per domain and head.
        domains: One row per pair of domains.
        scores: One row per domain, reference and head.
        lorenz: One row per domain and point.
        models: One row per model.
        tensors: One row per model and stored tensor.
        manifest: Version, settings, models, warnings.
    """

    KINDS = ("heads",)
    SCHEMAS = {  # noqa: RUF012
        "heads": HEADS,
        "domains": DOMAINS,
        "scores": SCORES,
        "lorenz": LORENZ,
        "models": MODELS,
        "tensors": TENSORS,
    }

    heads: pl.DataFrame
    domains: pl.DataFrame
    scores: pl.DataFrame
    lorenz: pl.DataFrame
    models: pl.DataFrame
    tensors: pl.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)


T = TypeVar("T", bound=RunTables)


def frame(rows: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    """Return rows as a frame whose first columns follow ``schema``; further keys become Float64 columns."""
    further = {key: None for row in rows for key in row if key not in schema}
    floats = {key: pl.Float64 for key in further}
    return pl.DataFrame(rows, schema={**schema, **floats}, orient="row")


def write(tables: RunTables, folder: Path) -> None:
    """Write the files of a run into a folder; within ``whole_folder``, so that they appear together."""
    compared = ["heads"] if tables.manifest["kind"] == COMPARE else []
    for name in [*tables.SCHEMAS, *compared]:
        getattr(tables, name).write_parquet(folder / f"{name}.parquet", compression="zstd")
    manifest = json.dumps({"format": FORMAT, **tables.manifest}, indent=2)
    (folder / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def load(folder: str | Path, shape: type[T] = Tables) -> T:
    """Read a run folder.

    Args:
        folder: Where it is.
        shape: Which tables are expected.

    Raises:
        RunError: A file is missing or unreadable, the folder was written by a newer layout, or holds another kind.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["kind"] not in shape.KINDS:
        raise RunError(
            f"run folder {str(folder)!r} holds a run of `diffract {manifest['kind']}`, "
            f"expected one of {' or '.join(shape.KINDS)}."
        )
    _require(folder, [f"{name}.parquet" for name in shape.SCHEMAS])
    make = cast("Callable[..., T]", shape)
    found = {name: _read(folder, name, schema) for name, schema in shape.SCHEMAS.items()}
    if manifest["kind"] == COMPARE:
        found["heads"] = read_compared_heads(folder, found["metrics"])
    return make(**found, manifest=manifest)


def read_compared_heads(folder: Path, metrics: pl.DataFrame) -> pl.DataFrame:
    """Return the ``heads`` table of a comparison's folder; of one that was written before there was one, from metrics.

    Args:
        folder: Where it is.
        metrics: Its metrics table.
    """
    kept = (folder / "heads.parquet").is_file()
    return _read(folder, "heads", HEADS) if kept else compared_heads(metrics)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a run folder of any kind.

    Raises:
        RunError: It is missing, unreadable, or was written by a newer layout.
    """
    folder = Path(folder)
    _require(folder, ["manifest.json"])
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise RunError(
            f"run folder {str(folder)!r} has layout {found!r}, this version reads {FORMAT}. "
            "Use the version of diffract that wrote it."
        )
    if lost := [key for key in MANIFEST if key not in manifest]:
        raise _damaged(folder, f"manifest.json lacks {', '.join(lost)}")
    return manifest


def _require(folder: Path, names: list[str]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise RunError(
            f"expected a run folder with {', '.join(missing)}, got {str(folder)!r}. "
            "Make one with `diffract scan MODEL -o RUN` or `diffract compare BASE TUNED -o RUN`."
        )


def _read(folder: Path, name: str, schema: dict[str, Any]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(folder / f"{name}.parquet")
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise _damaged(folder, str(error)) from error
    if lost := [column for column, dtype in schema.items() if table.schema.get(column) != _dtype(dtype)]:
        raise _damaged(folder, f"{name}.parquet lacks {', '.join(lost)}")
    return table


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(f"run folder {str(folder)!r} is damaged: {why}. Run the command that made it again.")


def _dtype(dtype: Any) -> pl.DataType:
    """A column type as an instance."""
    return dtype() if isinstance(dtype, type) else dtype
