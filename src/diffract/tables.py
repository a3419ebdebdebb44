"""Schemas of the tables, and run folders: a run is four Parquet tables and one manifest.

``metrics``   one row per model and matrix: labels, how it was computed, then one column per metric
``spectra``   one row per model, matrix and quantity (``sigma``, ``delta_sigma``, ``left_agreement``, ...): a list
``models``    one row per model: what it is, and model-level numbers
``tensors``   one row per model and stored tensor: what became of it (analysed, tied, unmatched, ...)
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from diffract.errors import RunError

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

OUTCOME: dict[str, Any] = {"status": pl.String, "method": pl.String, "resolved": pl.Float64}
"""``status`` ok | zero | non_finite | unpaired; ``method`` of the spectrum, and the smallest sigma that it resolves."""

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

TABLES = ("metrics", "spectra", "models", "tensors")
MANIFEST = ("diffract", "kind", "created", "seconds", "settings", "models", "metrics", "warnings")
"""What a manifest holds besides the layout's number."""


@dataclass(frozen=True)
class Tables:
    """The four tables of a run and its manifest; what a run folder holds.

    Attributes:
        metrics: One row per model and matrix.
        spectra: One row per model, matrix and quantity.
        models: One row per model.
        tensors: One row per model and stored tensor.
        manifest: Version, command, settings, models with digests, warnings.
    """

    metrics: pl.DataFrame
    spectra: pl.DataFrame
    models: pl.DataFrame
    tensors: pl.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)


def frame(rows: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    """Return rows as a frame whose first columns follow ``schema``; further keys become Float64 columns."""
    further = {key: None for row in rows for key in row if key not in schema}
    floats = {key: pl.Float64 for key in further}
    return pl.DataFrame(rows, schema={**schema, **floats}, orient="row")


def write(tables: Tables, folder: Path) -> None:
    """Write the files of a run into a folder; within ``whole_folder``, so that they appear together."""
    for name in TABLES:
        getattr(tables, name).write_parquet(folder / f"{name}.parquet", compression="zstd")
    manifest = json.dumps({"format": FORMAT, **tables.manifest}, indent=2)
    (folder / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def load(folder: str | Path) -> Tables:
    """Read a run folder.

    Raises:
        RunError: A file is missing or unreadable, or the folder was written by a newer layout.
    """
    folder = Path(folder)
    missing = [n for n in ("manifest.json", *(f"{t}.parquet" for t in TABLES)) if not (folder / n).is_file()]
    if missing:
        raise RunError(
            f"expected a run folder with {', '.join(missing)}, got {str(folder)!r}. "
            "Make one with `diffract scan MODEL -o RUN` or `diffract compare BASE TUNED -o RUN`."
        )
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        frames = {name: pl.read_parquet(folder / f"{name}.parquet") for name in TABLES}
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise RunError(
            f"run folder {str(folder)!r} has layout {found!r}, this version reads {FORMAT}. "
            "Use the version of diffract that wrote it."
        )
    if lost := [key for key in MANIFEST if key not in manifest]:
        raise _damaged(folder, f"manifest.json lacks {', '.join(lost)}")
    schemas = {"metrics": LABELS | OUTCOME, "spectra": SPECTRA, "models": MODELS, "tensors": TENSORS}
    for name, schema in schemas.items():
        if lost := [c for c, dtype in schema.items() if frames[name].schema.get(c) != _dtype(dtype)]:
            raise _damaged(folder, f"{name}.parquet lacks {', '.join(lost)}")
    return Tables(**frames, manifest=manifest)


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(f"run folder {str(folder)!r} is damaged: {why}. Run the scan or comparison again.")


def _dtype(dtype: Any) -> pl.DataType:
    """A column type as an instance."""
    return dtype() if isinstance(dtype, type) else dtype


@contextmanager
def whole_folder(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a draft folder beside ``folder`` and rename it there when the block ends well.

    An error inside the block, a full disk included, removes the draft and leaves what was there untouched.
    """
    folder = Path(folder)
    refuse_existing(folder, force=force)
    draft = folder.parent / f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        yield draft
        _replace(draft, folder)
    except OSError as error:
        raise RunError(
            f"cannot write {str(folder)!r}: {error.strerror or error}. Nothing was changed there."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` and rename it there when the block ends well."""
    path = Path(path)
    draft = path.parent / f"{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        draft.unlink(missing_ok=True)


def refuse_existing(folder: str | Path, *, force: bool) -> None:
    """Raise unless ``folder`` is free, or is a run folder (or empty) that ``force`` may replace."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{str(folder)!r} is a file, expected a folder to write to. Choose another name.")
    if not any(folder.iterdir()):
        return
    if not force:
        raise RunError(f"{str(folder)!r} exists. Choose another name, or pass --force to replace it.")
    if not (folder / "manifest.json").is_file():
        raise RunError(f"{str(folder)!r} is not a run folder (no manifest.json), so --force does not replace it.")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all, UTF-8."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return Path(path)


def _replace(draft: Path, folder: Path) -> None:
    """Rename ``draft`` to ``folder``; an older folder of that name is moved aside first and removed last."""
    if not folder.exists():
        draft.replace(folder)
        return
    aside = folder.parent / f"{folder.name}.tmp-old-{uuid.uuid4().hex[:8]}"
    folder.replace(aside)
    draft.replace(folder)
    shutil.rmtree(aside, ignore_errors=True)
