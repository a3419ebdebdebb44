"""The tables that figures are drawn from, out of a run folder or a run in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

from diffract.errors import RunError
from diffract.tables import FORMAT

Frames = Mapping[str, pl.DataFrame]


class Tabled(Protocol):
    """A run in memory: ``diffract.Run``, or another with tables as attributes."""

    @property
    def models(self) -> pl.DataFrame:
        """One row per model."""
        ...


def read_frames(run: str | Path | Tabled, names: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Return those of the named tables that the run has.

    Raises:
        RunError: It is no run folder, of another layout, or damaged.
    """
    if not isinstance(run, str | Path):
        held = {name: getattr(run, name, None) for name in names}
        return {name: frame for name, frame in held.items() if isinstance(frame, pl.DataFrame)}
    folder = Path(run)
    _check(folder)
    try:
        files = {name: folder / f"{name}.parquet" for name in names}
        return {name: pl.read_parquet(file) for name, file in files.items() if file.is_file()}
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RunError(f"run folder {str(folder)!r} is damaged: {error}. Make it again.") from error


def _check(folder: Path) -> None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"expected a run folder with manifest.json, got {str(folder)!r}. "
            "Make one with `diffract scan MODEL -o RUN` or `diffract compare BASE TUNED -o RUN`."
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise RunError(
            f"run folder {str(folder)!r} has layout {found!r}, this version reads {FORMAT}. "
            "Use the version of diffract that wrote it."
        )
