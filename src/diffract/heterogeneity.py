"""``diffract.heads``: which heads change, in one domain or in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract import tables
from diffract.analysis import Options, Progress
from diffract.analysis.head_changes import analyse_heads
from diffract.attention import PROJECTIONS
from diffract.checkpoints import Reference
from diffract.errors import SelectionError

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class HeadsRun:
    """What ``heads`` found; ``diffract.tables`` says what the columns mean.

    Attributes:
        tables: Its tables and manifest.
    """

    tables: tables.HeadTables

    @property
    def heads(self) -> pl.DataFrame:
        """One row per domain and head: how much it changed, and what of that other domains share."""
        return self.tables.heads

    @property
    def domains(self) -> pl.DataFrame:
        """One row per pair of domains: rank correlation of the heads' changes, cosine of the changes, its chance."""
        return self.tables.domains

    @property
    def scores(self) -> pl.DataFrame:
        """One row per domain, reference domain and head: the reference-domain score."""
        return self.tables.scores

    @property
    def lorenz(self) -> pl.DataFrame:
        """One row per domain and point of its Lorenz curve."""
        return self.tables.lorenz

    @property
    def models(self) -> pl.DataFrame:
        """One row per model; of the tuned ones how concentrated the change is, and how much of it is shared."""
        return self.tables.models

    @property
    def tensors(self) -> pl.DataFrame:
        """One row per model and stored tensor: what became of it."""
        return self.tables.tensors

    @property
    def manifest(self) -> dict[str, Any]:
        """Version, settings, models, warnings."""
        return self.tables.manifest

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a run folder; it appears whole or not at all.

        Args:
            folder: Where; must not exist unless ``force``.
            force: Replace an existing run folder; any other folder is refused.

        Raises:
            RunError: The folder exists, is no run folder, or cannot be written.
        """
        with tables.whole_folder(folder, force=force) as draft:
            tables.write(self.tables, draft)
        return Path(folder)


def heads(
    base: Reference,
    *tuned: Reference,
    projections: Sequence[str] = PROJECTIONS,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    allow_unmatched: bool = False,
    download: bool = False,
    device: str = "auto",
    engine: str = "local",
    cache: bool = True,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> HeadsRun:
    """Find out which attention heads change, in one domain or in all.

    One pass over the attention tensors; entries only, no spectra. A head's change D is that of its slices together;
    several query heads that share a key-value head each count its slices.

    Args:
        base: As of ``compare``.
        tuned: One or more, one for each domain; ``"math=PATH"`` names one. Numbers between domains need two.
        projections: Which slices of a head count, of q, k, v and o.
        architecture: As of ``compare``.
        adapter_base: As of ``compare``.
        allow_unmatched: Go on when attention tensors have no partner; their heads get a status and no numbers.
        download: As of ``compare``.
        device: As of ``compare``.
        engine: As of ``compare``.
        cache: As of ``compare``.
        output: Write a run folder here.
        force: As of ``compare``.
        progress: As of ``compare``.

    Returns:
        The run: tables of heads, of pairs of domains, of reference-domain scores.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    if not tuned:
        raise SelectionError("heads needs a base and at least one tuned checkpoint.")
    if output is not None:
        tables.refuse_existing(output, force=force)
    options = Options(
        architecture=architecture,
        adapter_base=adapter_base,
        download=download,
        device=device,
        engine=engine,
        cache=cache,
        progress=progress,
    )
    found = analyse_heads([base, *tuned], options, projections=projections, allow_unmatched=allow_unmatched)
    run = HeadsRun(found)
    if output is not None:
        run.save(output, force=force)
    return run
