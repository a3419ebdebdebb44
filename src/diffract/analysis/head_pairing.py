"""Which slices of which tensors make heads, and whether base and tuned checkpoints have the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffract.analysis.head_work import HeadTask
from diffract.analysis.heads import PER_KV_HEAD, PER_QUERY_HEAD, PROJECTIONS
from diffract.analysis.pairing import pair
from diffract.errors import CheckpointError, SelectionError, printable
from diffract.matrices import Layout, Matrix, restrict


def choose_projections(names: Sequence[str]) -> tuple[str, ...]:
    """Return the projections that are meant, each once.

    Raises:
        SelectionError: There are none, or one is unknown.
    """
    for name in names:
        if name not in PROJECTIONS:
            near = name.rpartition(".")[2][:1].lower()
            hint = f" Did you mean {near!r}?" if near in PROJECTIONS else ""
            known = ", ".join(PROJECTIONS)
            raise SelectionError(f"unknown projection {printable(name)!r}, expected some of: {known}.{hint}")
    if not names:
        raise SelectionError(f"no projection is named. Name some of: {', '.join(PROJECTIONS)}.")
    return tuple(p for p in PROJECTIONS if p in names)


def is_slice(matrix: Matrix, projections: Sequence[str] = PROJECTIONS) -> bool:
    """Whether a matrix is one head's part of an attention projection."""
    own = matrix.projection in PER_QUERY_HEAD and matrix.head is not None
    shared = matrix.projection in PER_KV_HEAD and matrix.kv_head is not None
    return matrix.projection in projections and matrix.index is None and (own or shared)


def pair_heads(
    opened: Sequence[Layout], wanted: Sequence[str], *, allow_unmatched: bool
) -> tuple[list[Layout], list[HeadTask]]:
    """Pair the attention slices of a base and its tuned checkpoints.

    Args:
        opened: The base's layout, then the others'.
        wanted: Which projections count.
        allow_unmatched: Whether attention tensors may be without a partner.

    Returns:
        The layouts, of which other matrices are left out, and the tasks.

    Raises:
        CheckpointError: There are no slices, or not all have a partner and that is not allowed.
    """
    base = restrict(opened[0], lambda m: is_slice(m, wanted))
    if not base.matrices:
        where, note = printable(base.checkpoint.reference), opened[0].architecture.note
        raise CheckpointError(
            f"{where}: no {', '.join(wanted)} that is cut into heads. {note or 'Choose other projections.'}"
        )
    ours = {name for name, entry in base.entries.items() if entry.matrices}
    # a tuned checkpoint may lack the configuration that tells its heads: names are enough, as in a comparison
    children = [restrict(child, lambda m: m.tensor in ours or is_slice(m, wanted)) for child in opened[1:]]
    layouts, tasks = pair(base, children, allow_unmatched=allow_unmatched)
    paired = [t for t in tasks if t.model == 0 and t.tuned]
    return layouts, [HeadTask(base.entries[t.tensor].info, t.matrices, t.tuned) for t in paired]


def uncut_notes(base: Layout, wanted: Sequence[str]) -> list[str]:
    """Say which projections a block does not cut into heads, as they do not count then."""
    blocks = dict.fromkeys(m.block for m in base.matrices)
    found = {block: {m.projection for m in base.matrices if m.block == block} for block in blocks}
    return [
        f"{block}: {', '.join(lost)} not cut into heads in this model; head_delta is over the rest."
        for block, parts in found.items()
        if (lost := [p for p in wanted if p not in parts])
    ]


def base_adapters(layouts: Sequence[Layout]) -> frozenset[int]:
    """Return which checkpoints are adapters over the first one itself."""
    base = layouts[0].checkpoint.reference
    return frozenset(i for i, layout in enumerate(layouts) if _same(layout.checkpoint.base_reference, base))


def adapter_notes(names: Sequence[str], layouts: Sequence[Layout]) -> list[str]:
    """Say which adapters lie over another base than the one that they are compared with."""
    own, base = base_adapters(layouts), layouts[0].checkpoint.reference
    return [
        f"{names[i]}: an adapter over {layout.checkpoint.base_reference}, not over {base}: "
        "its merged weights are compared, rounded to their dtype."
        for i, layout in enumerate(layouts)
        if layout.checkpoint.factors and i and i not in own
    ]


def _same(one: str | None, other: str) -> bool:
    if one is None or one == other:
        return one is not None
    paths = Path(one), Path(other)
    return all(p.exists() for p in paths) and paths[0].samefile(paths[1])
