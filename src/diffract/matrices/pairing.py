"""Which tensors of a base and of its tuned checkpoints belong together: those of exactly one name and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffract.errors import CheckpointError, printable
from diffract.matrices.layout import Entry, Layout

MAY_DIFFER = ("embed", "unembed")
"""Blocks that may be unmatched: a vocabulary grows, a head is tied."""


def pair(layouts: Sequence[Layout], *, allow_unmatched: bool = False) -> list[Layout]:
    """Pair the tensors of a base and of the checkpoints that descend from it by exact name and shape.

    Args:
        layouts: The base first.
        allow_unmatched: Whether more than embeddings may be without a partner.

    Returns:
        The layouts; their entries say what became of each tensor.

    Raises:
        CheckpointError: More than embeddings are unmatched and that is not allowed, or nothing is paired at all.
    """
    base, *tuned = layouts
    children = [replace(t, entries={n: _match(e, base.entries.get(n)) for n, e in t.entries.items()}) for t in tuned]
    for child in children:
        _check_matched(base, child, allow_unmatched=allow_unmatched)
    return [replace(base, entries={n: _match_any(n, e, children) for n, e in base.entries.items()}), *children]


def is_paired(entry: Entry | None) -> bool:
    """Whether a tuned checkpoint's tensor is compared with the base's."""
    return entry is not None and entry.outcome in ("analysed", "retyped")


def _match(entry: Entry, other: Entry | None) -> Entry:
    """Say how a tuned checkpoint's tensor relates to the base's of the same name."""
    if not entry.matrices:
        return entry
    if other is None or not other.info.is_float:
        return replace(entry, outcome="unmatched", note="the base has no such tensor")
    if other.info.shape != entry.info.shape:
        return replace(entry, outcome="resized", note=f"the base has {list(other.info.shape)}")
    if other.outcome == "tied":
        return replace(entry, outcome="unmatched", note=f"in the base it {other.note}")
    if other.info.dtype != entry.info.dtype:
        return replace(entry, outcome="retyped", note=f"compared; the base stores {other.info.dtype}")
    return entry


def _match_any(name: str, entry: Entry, children: Sequence[Layout]) -> Entry:
    """Say whether a tensor of the base has a partner in any tuned checkpoint."""
    others = [child.entries.get(name) for child in children]
    if not entry.matrices or any(is_paired(o) for o in others):
        return entry
    present = next((o for o in others if o is not None), None)
    if present is None or not present.info.is_float:
        return replace(entry, outcome="unmatched", note="no tuned checkpoint has such a tensor")
    if present.outcome == "tied":
        return replace(entry, outcome="unmatched", note=f"in the tuned checkpoint it {present.note}")
    return replace(entry, outcome="resized", note=f"the tuned checkpoint has {list(present.info.shape)}")


def _check_matched(base: Layout, child: Layout, *, allow_unmatched: bool) -> None:
    where = f"{printable(base.checkpoint.reference)} and {printable(child.checkpoint.reference)}"
    lost = [e for e in child.entries.values() if e.outcome in ("unmatched", "resized")]
    lost += [e for n, e in base.entries.items() if e.matrices and n not in child.entries]
    if not any(is_paired(e) and e.matrices for e in child.entries.values()):
        raise CheckpointError(
            f"{where} share no tensor of one name and shape{_example(lost, base, child)}. "
            "Compare a checkpoint with one that descends from it."
        )
    serious = [e for e in lost if not all(m.block in MAY_DIFFER for m in e.matrices)]
    if serious and not allow_unmatched:
        raise CheckpointError(
            f"{where}: {len(serious)} tensors besides embeddings have no partner{_example(serious, base, child)}. "
            "Pass --allow-unmatched to compare what matches and list the rest."
        )


def _example(entries: Sequence[Entry], base: Layout, child: Layout) -> str:
    if not entries:
        return ""
    name = entries[0].info.name
    shapes = [list(side.checkpoint.info(name).shape) if name in side.entries else "absent" for side in (base, child)]
    return f", first {printable(name)!r} (base: {shapes[0]}, tuned: {shapes[1]})"


def merge_strange_adapters(layouts: Sequence[Layout]) -> list[Layout]:
    """Return layouts in which an adapter over another base than the first counts by its merged weights, and says so.

    The factors of the others stay: they are the change from the first checkpoint itself.
    """
    base, *others = layouts
    return [base, *(_merged(layout, base.checkpoint.reference) for layout in others)]


def _merged(layout: Layout, base: str) -> Layout:
    own = layout.checkpoint.base_reference
    if not layout.checkpoint.factors or _same(own, base):
        return layout
    note = f"an adapter over {own}, not over {base}: its merged weights are compared, rounded to their dtype."
    return replace(layout, checkpoint=replace(layout.checkpoint, factors={}), warnings=(*layout.warnings, note))


def _same(one: str | None, other: str) -> bool:
    if one is None or one == other:
        return one is not None
    paths = Path(one), Path(other)
    return all(p.exists() for p in paths) and paths[0].samefile(paths[1])
