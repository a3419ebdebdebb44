"""The run: what every verb returns, in memory and as a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract import tables
from diffract.errors import RunError
from diffract.store import whole_folder
from diffract.tables import VECTORS, Tables

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl
    from torch import Tensor

SHOWN_ROWS = 8
"""Rows of the main table that a notebook shows."""


@dataclass(frozen=True)
class Run:
    """What a scan, a comparison, a trajectory, an evaluation, a search or a study found.

    A table is an item, ``run["metrics"]``, and an attribute, ``run.metrics``; ``diffract.schemas`` says which tables a
    kind of run has and what their columns mean.

    Attributes:
        tables: The tables by name, and the manifest.
        vectors: Singular vectors by ``model/matrix.U`` and ``model/matrix.Vh``, float32, if they were asked for.
    """

    tables: Tables
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Which command makes such a run: ``scan``, ``compare``, ``eval``, ``search rewind``, ..."""
        return self.tables.kind

    @property
    def manifest(self) -> dict[str, Any]:
        """Version, settings, models with digests, warnings."""
        return self.tables.manifest

    def __getitem__(self, name: str) -> pl.DataFrame:
        if name not in self.tables:
            raise RunError(
                f"a run of `diffract {self.kind}` has no table {name!r}; it has {', '.join(self.tables.frames)}."
            )
        return self.tables[name]

    def __getattr__(self, name: str) -> pl.DataFrame:
        # While a copy is made there are no tables yet, and asking for them would ask for ever.
        if name == "tables" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tables, name)

    def __dir__(self) -> Iterator[str]:
        yield from (*super().__dir__(), *self.tables.frames)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a run folder, with a report where its kind has one; it appears whole or not at all.

        Args:
            folder: The folder to write; it must not exist unless ``force``.
            force: Replace an existing run folder; any other folder is refused.

        Raises:
            RunError: The folder exists, is no run folder, or cannot be written.
        """
        with whole_folder(folder, force=force) as draft:
            if self.vectors:
                from diffract.checkpoints import TensorWriter

                with TensorWriter(draft / VECTORS) as writer:
                    for name, tensor in self.vectors.items():
                        writer.add(name, tensor)
            write(self.tables, draft)
        return Path(folder)

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file that opens offline.

        Raises:
            RunError: This kind of run has no report, or the file cannot be written.
        """
        from diffract import report

        return report.write(self.tables, path)

    def figure(self, kind: str, **options: Any) -> go.Figure:
        """Draw a figure of the run.

        Args:
            kind: A name of ``diffract.plots.KINDS``.
            options: What ``diffract.plot`` takes.

        Raises:
            SelectionError: A name is not known, or the kind does not take an option.
            RunError: The run lacks what the figure needs; the message says which command makes it.
        """
        from diffract.plots import plot

        return plot(kind, self.tables, **options)

    def _repr_html_(self) -> str:
        """Return the headline numbers and the head of the main table, for a notebook."""
        from html import escape

        from diffract.report import PAGES, headlines

        found = headlines(self.tables) if self.kind in PAGES else []
        numbers = "".join(f"<li><b>{escape(h.figure)}</b> {escape(h.text)}</li>" for h in found if not h.minor)
        main = next(iter(self.tables.frames))
        table = self.tables[main]
        title = f"<b>diffract {escape(self.kind)}</b>: {main}, {len(table)} rows"
        return f"<div><ul>{numbers}</ul>{title}{table.head(SHOWN_ROWS)._repr_html_()}</div>"


def load_run(folder: str | Path) -> Run:
    """Read a run folder, whichever command made it.

    Raises:
        RunError: The folder is no run folder, or damaged.
    """
    found = tables.load(folder)
    saved = Path(folder) / VECTORS
    if not saved.is_dir():
        return Run(found)
    from diffract.checkpoints import open_checkpoint

    return Run(found, open_checkpoint(saved))


def written(make: Callable[[], Tables], output: str | Path | None, *, force: bool) -> Run:
    """Return the run of the tables that are made, in a folder where one is asked for."""
    with run_folder(output, force=force) as draft:
        found = make()
        if draft is not None:
            write(found, draft)
    return Run(found)


def write(found: Tables, draft: Path) -> None:
    """Write a run's files into a folder that is being made, with a report where its kind has one."""
    from diffract import report

    tables.write(found, draft)
    if found.kind in report.PAGES:
        report.write(found, draft / "report.html")


@contextmanager
def run_folder(folder: str | Path | None, *, force: bool) -> Iterator[Path | None]:
    """Yield a draft of a run's folder, which takes its name when it is whole; ``None`` where nothing is to be written.

    What is there already is refused at once, before hours of work.
    """
    if folder is None:
        yield None
        return
    with whole_folder(folder, force=force) as draft:
        yield draft
