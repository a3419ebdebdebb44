"""The tables that figures are drawn from, out of a run folder or a run in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

from diffract.errors import RunError
from diffract.tables import read_manifest

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
    read_manifest(folder)
    try:
        files = {name: folder / f"{name}.parquet" for name in names}
        return {name: pl.read_parquet(file) for name, file in files.items() if file.is_file()}
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RunError(f"run folder {str(folder)!r} is damaged: {error}. Make it again.") from error
