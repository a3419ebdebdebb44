"""The tables of a run: their files, and the manifest that names its kind."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from diffract._version import __version__
from diffract.attention import compared_heads
from diffract.errors import RunError
from diffract.schemas import FINDINGS, KINDS, NUMBERS
from diffract.store import whole_folder

FORMAT = 1
"""Number of the run-folder layout; a reader refuses a newer one."""

VECTORS = "vectors"
"""Name of the folder within a run that holds singular vectors."""

STUDY_NUMBERS, EVIDENCE = "numbers.json", "findings"
"""File of a study's folder with all verdicts and numbers; folder of what each finding rests on."""

MANIFEST = ("diffract", "kind", "created", "seconds", "settings", "models", "metrics", "warnings")
"""What every manifest holds besides the layout's number."""

_UNTOLD: dict[str, Any] = {"seconds": None, "settings": {}, "metrics": {}, "warnings": []}


@dataclass(frozen=True)
class Tables:
    """The tables of a run by name, each an item and an attribute, and its manifest.

    Attributes:
        manifest: Version, kind, settings, models with digests, warnings.
        frames: The tables.
    """

    manifest: dict[str, Any]
    frames: dict[str, pl.DataFrame] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of run that they belong to, a name of ``KINDS``."""
        return self.manifest["kind"]

    def __getitem__(self, name: str) -> pl.DataFrame:
        return self.frames[name]

    def __getattr__(self, name: str) -> pl.DataFrame:
        # While a copy is made there are no frames yet, and asking for them would ask for ever.
        frames = self.__dict__.get("frames", {})
        if name not in frames:
            raise AttributeError(f"this run has no table {name!r}; it has {', '.join(frames)}")
        return frames[name]

    def __contains__(self, name: object) -> bool:
        return name in self.frames


def frame(rows: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    """Return rows as a frame whose first columns follow ``schema``; further keys become Float64 columns."""
    further = {key: None for row in rows for key in row if key not in schema}
    floats = {key: pl.Float64 for key in further}
    return pl.DataFrame(rows, schema={**schema, **floats}, orient="row")


def new_manifest(kind: str, *, models: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the manifest of a run that has just been made.

    Args:
        kind: A name of ``KINDS``.
        models: What is known of each model.
        more: Settings, seconds, metrics, warnings, and what else a kind tells of itself.
    """
    return {
        "diffract": __version__,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        **_UNTOLD,
        "models": list(models),
        **more,
    }


def write(tables: Tables, folder: Path) -> None:
    """Write the files of a run into a folder; within ``whole_folder``, so that they appear together."""
    for name, table in tables.frames.items():
        write_table(table, folder / f"{name}.parquet")
    manifest = json.dumps({"format": FORMAT, **tables.manifest}, indent=2)
    (folder / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def write_table(table: pl.DataFrame, path: Path) -> None:
    """Write a table as Parquet.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    try:
        table.write_parquet(path, compression="zstd")
    except pl.exceptions.PolarsError as error:  # which has no class for what the disk says
        raise OSError(str(error)) from error


def save(tables: Tables, folder: str | Path, *, force: bool) -> None:
    """Write a run folder that holds the tables alone; it appears whole or not at all.

    Raises:
        RunError: The folder exists, is no run folder, or cannot be written.
    """
    with whole_folder(folder, force=force) as draft:
        write(tables, draft)


def load(folder: str | Path, *kinds: str, only: Sequence[str] | None = None) -> Tables:
    """Read the tables of a run folder.

    Args:
        folder: Where the run is.
        kinds: Which kinds of run may be there; any by default.
        only: Names of tables, of which those are read that are there; by default all that the kind has.

    Raises:
        RunError: A file is missing or unreadable, the folder was written by a newer layout, or holds another kind.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["kind"] not in (expected := kinds or tuple(KINDS)):
        raise RunError(
            f"run folder {str(folder)!r} holds a run of `diffract {manifest['kind']}`, "
            f"expected one of {' or '.join(expected)}."
        )
    if manifest["kind"] == "study" and not (folder / "findings.parquet").is_file():  # which a saved copy has
        return Tables(manifest, _read_study(folder))
    schemas = KINDS[manifest["kind"]]
    # A comparison of before there was a table: its metrics say what stood in that of heads, of others nothing is known.
    later = [name for name in schemas if manifest["kind"] == "compare" and name not in KINDS["scan"]]
    lacking = [name for name in later if not (folder / f"{name}.parquet").is_file()]
    there = [name for name in schemas if name not in lacking]
    if only is None:
        _require(folder, [f"{name}.parquet" for name in there])
    names = there if only is None else [name for name in only if (folder / f"{name}.parquet").is_file()]
    found = {name: _read(folder, name, schemas.get(name, {})) for name in names}
    for name in LATER_COLUMNS.keys() & found.keys():
        absent = [column for column in LATER_COLUMNS[name] if column not in found[name].columns]
        found[name] = found[name].with_columns(pl.lit(None, schemas[name][column]).alias(column) for column in absent)
    for name in lacking if only is None else set(lacking) & set(only):
        known = name == "heads"
        found[name] = compared_heads(_read(folder, "metrics", {})) if known else pl.DataFrame(schema=schemas[name])
    return Tables(manifest, found)


LATER_COLUMNS = {"lineage": ("share", "moved"), "tree": ("rooted",)}
"""Columns that folders of before there were such lack; null in what is read from them."""


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of a run folder of any kind.

    Raises:
        RunError: It is missing, unreadable, or was written by a newer layout.
    """
    folder = Path(folder)
    _require(folder, ["manifest.json"])
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise RunError(
            f"run folder {str(folder)!r} has layout {found!r}, this version reads {FORMAT}. "
            "Use the version of diffract that wrote it."
        )
    if manifest.get("kind") == "study":  # a study says who it is before anything of it is known
        manifest = {"created": None, **_UNTOLD, "models": [], **manifest}
    if lost := [key for key in MANIFEST if key not in manifest]:
        raise _damaged(folder, f"manifest.json lacks {', '.join(lost)}")
    return manifest


def _require(folder: Path, names: list[str]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise RunError(
            f"expected a run folder with {', '.join(missing)}, got {str(folder)!r}. "
            "Make one with `diffract scan MODEL -o RUN` or `diffract compare BASE TUNED -o RUN`."
        )


def _read(folder: Path, name: str, schema: Mapping[str, Any]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(folder / f"{name}.parquet")
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise _damaged(folder, str(error)) from error
    wanted = {column: dtype for column, dtype in schema.items() if column not in LATER_COLUMNS.get(name, ())}
    if lost := [column for column, dtype in wanted.items() if table.schema.get(column) != dtype]:
        raise _damaged(folder, f"{name}.parquet lacks {', '.join(lost)}")
    return table


def _read_study(folder: Path) -> dict[str, pl.DataFrame]:
    """A study keeps its numbers as JSON, so that two runs of it can be compared byte for byte."""
    _require(folder, [STUDY_NUMBERS])
    try:
        found = json.loads((folder / STUDY_NUMBERS).read_text(encoding="utf-8"))
        reasons = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8"))["because"]
            for path in folder.glob(f"{EVIDENCE}/*/manifest.json")
        }
        findings = [{"finding": n, "verdict": own["verdict"], "because": reasons.get(n)} for n, own in found.items()]
        numbers = [{"finding": name, **number} for name, own in found.items() for number in own["numbers"]]
        return {"findings": frame(findings, FINDINGS), "numbers": frame(numbers, NUMBERS)}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        pl.exceptions.PolarsError,
    ) as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(f"run folder {str(folder)!r} is damaged: {why}. Run the command that made it again.")
