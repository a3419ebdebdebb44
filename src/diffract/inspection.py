"""What is in a checkpoint, from its headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffract.errors import SelectionError

if TYPE_CHECKING:
    from diffract.checkpoints import Reference


@dataclass(frozen=True)
class MatrixKind:
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
        seconds_per_core: What a scan takes of one core, about.
        compare_seconds: What a comparison with another such model takes of one core, about, without noise.
        peak_bytes: Workspace of the largest matrix, about.
        warnings: What to know.
        scan_shares: Seconds of each share of a scan, where shares were asked for.
        compare_shares: The same of a comparison.
    """

    reference: str
    family: str
    dimensions: dict[str, int | None]
    parameters: int
    size_bytes: int
    tensors: int
    matrices: int
    kinds: tuple[MatrixKind, ...]
    left_out: dict[str, int]
    multiplications: float
    seconds_per_core: float
    compare_seconds: float
    peak_bytes: int
    warnings: tuple[str, ...]
    scan_shares: tuple[float, ...] = ()
    compare_shares: tuple[float, ...] = ()


def inspect(
    ref: Reference,
    *,
    select: str | None = None,
    heads: bool = True,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    download: bool = False,
    shards: int | None = None,
) -> Inspection:
    """Say what is in a checkpoint, how it is sliced, and what a scan costs, from its headers alone.

    Args:
        ref: A file, a folder, or ``org/name@revision`` on the hub. In Python also a mapping of arrays, an
            ``nn.Module``, or an open checkpoint.
        select: Which matrices, such as ``"layers 0-7, attn.q, attn.o"``; all by default.
        heads: Cut attention projections into heads.
        architecture: A JSON file that describes the model (docs/architectures.md); by default its config.json's
            ``model_type`` decides.
        adapter_base: The base of an adapter, where its config does not name one that can be opened.
        download: Fetch models of the hub whole instead of reading byte ranges.
        shards: Show how evenly the work is cut into so many shares (docs/cluster.md).

    Raises:
        DiffractError: The checkpoint cannot be opened or contradicts its configuration.
    """
    from diffract.checkpoints import open_checkpoint
    from diffract.matrices import lay_out, pair_seconds, scan_cost, scan_seconds, workspace_bytes
    from diffract.shares import MOST_SHARES, cut, loads

    if shards is not None and not 1 <= shards <= MOST_SHARES:
        raise SelectionError(f"--shards: expected 1 to {MOST_SHARES:,} shares, got {shards}.")

    checkpoint = open_checkpoint(ref, base=adapter_base, download=download)
    try:
        layout = lay_out(checkpoint, select_text=select, heads=heads, spec_file=architecture, check_ties=False)
    finally:
        if checkpoint is not ref:
            checkpoint.close()
    entries, aside = list(layout.entries.values()), layout.checkpoint.set_aside
    analysed = [entry for entry in entries if entry.matrices]
    kinds = Counter(
        (".".join(dict.fromkeys(p for p in (m.block, m.projection) if p)) or "other", m.shape, m.dtype)
        for entry in analysed
        for m in entry.matrices
    )
    scanned, compared = ([find(entry.matrices) for entry in analysed] for find in (scan_seconds, pair_seconds))
    shares = [tuple(loads(own, cut(own, shards), shards)) if shards else () for own in (scanned, compared)]
    return Inspection(
        reference=checkpoint.reference,
        family=layout.architecture.family,
        dimensions=asdict(layout.architecture.dimensions),
        parameters=sum(entry.info.entries for entry in entries),
        size_bytes=sum(entry.info.size_bytes for entry in entries),
        tensors=len(entries),
        matrices=sum(len(entry.matrices) for entry in analysed),
        kinds=tuple(MatrixKind(*kind, count) for kind, count in kinds.items()),
        left_out=dict(Counter([e.outcome for e in entries if not e.matrices] + ["set_aside"] * len(aside))),
        multiplications=sum(scan_cost(entry.matrices) for entry in analysed),
        seconds_per_core=sum(scanned),
        compare_seconds=sum(compared),
        peak_bytes=max((workspace_bytes(e.matrices, e.info.size_bytes) for e in analysed), default=0),
        warnings=layout.warnings,
        scan_shares=shares[0],
        compare_shares=shares[1],
    )
