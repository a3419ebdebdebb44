"""Look at a checkpoint: what is in it, how it will be sliced, what a scan will cost. Reads headers only."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffract.checkpoints import Reference, open_checkpoint
from diffract.matrices import Entry, Layout, lay_out, scan_cost, workspace_bytes

SCAN_RATE = 1.2e10
"""Multiplications per second and core that a scan reaches, as ``matrices.cost`` counts them; measured on two cores."""


@dataclass(frozen=True)
class Kind:
    """Matrices of one part and shape.

    Attributes:
        part: ``attn.q``, ``mlp.gate``, ...
        shape: Of each matrix, (out, in).
        dtype: Stored dtype.
        count: How many.
    """

    part: str
    shape: tuple[int, int]
    dtype: str
    count: int


@dataclass(frozen=True)
class Inspection:
    """What the headers of a checkpoint tell.

    Attributes:
        reference: What was opened.
        family: The architecture, ``generic`` if nothing describes it.
        dimensions: Layers, width, heads, kv_heads, head_dim, as far as the configuration tells.
        parameters: Entries of all tensors.
        size_bytes: Of all tensors.
        tensors: Number of stored tensors.
        matrices: Number of matrices that a scan takes.
        kinds: The matrices, by part and shape.
        left_out: Tensors that are not analysed: outcome to number.
        multiplications: What a scan costs, about.
        seconds_per_core: The same in seconds, about.
        peak_bytes: Workspace of the largest matrix, about.
        warnings: What to know.
    """

    reference: str
    family: str
    dimensions: dict[str, int | None]
    parameters: int
    size_bytes: int
    tensors: int
    matrices: int
    kinds: tuple[Kind, ...]
    left_out: dict[str, int]
    multiplications: float
    seconds_per_core: float
    peak_bytes: int
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)


def inspect(
    ref: Reference,
    *,
    select: str | None = None,
    heads: bool = True,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    download: bool = False,
) -> Inspection:
    """Look at a checkpoint without reading its weights.

    Args:
        ref: As of ``scan``.
        select: As of ``scan``.
        heads: As of ``scan``.
        architecture: As of ``scan``.
        adapter_base: As of ``scan``.
        download: As of ``scan``.

    Raises:
        DiffractError: The checkpoint cannot be opened or contradicts its configuration.
    """
    checkpoint = open_checkpoint(ref, base=adapter_base, download=download)
    try:
        layout = lay_out(checkpoint, select_text=select, heads=heads, spec_file=architecture, check_ties=False)
        return _summarise(layout)
    finally:
        if checkpoint is not ref:
            checkpoint.close()


def _summarise(layout: Layout) -> Inspection:
    entries = list(layout.entries.values())
    analysed = [entry for entry in entries if entry.matrices]
    work = sum(scan_cost(entry.matrices) for entry in analysed)
    return Inspection(
        reference=layout.checkpoint.reference,
        family=layout.architecture.family,
        dimensions=asdict(layout.architecture.dimensions),
        parameters=sum(entry.info.entries for entry in entries),
        size_bytes=sum(entry.info.size_bytes for entry in entries),
        tensors=len(entries),
        matrices=sum(len(entry.matrices) for entry in analysed),
        kinds=_kinds(analysed),
        left_out=dict(Counter(entry.outcome for entry in entries if not entry.matrices)),
        multiplications=work,
        seconds_per_core=work / SCAN_RATE,
        peak_bytes=max((workspace_bytes(e.matrices, e.info.size_bytes) for e in analysed), default=0),
        warnings=layout.warnings,
    )


def _kinds(entries: list[Entry]) -> tuple[Kind, ...]:
    counted = Counter(
        (".".join(dict.fromkeys(p for p in (m.block, m.projection) if p)) or "other", m.shape, m.dtype)
        for entry in entries
        for m in entry.matrices
    )
    return tuple(Kind(*key, count) for key, count in counted.items())
