"""Which tensors of a base and of its tuned checkpoints belong together: those of exactly one name and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffract.analysis.work import TensorTask
from diffract.errors import CheckpointError, printable
from diffract.matrices import Entry, Layout

MAY_DIFFER = ("embed", "unembed")
"""Blocks that may be unmatched: a vocabulary grows, a head is tied."""


def scan_tasks(layout: Layout) -> list[TensorTask]:
    """Return the tasks of a scan, in file order."""
    return [_task(name, entry, 0) for name, entry in layout.entries.items() if entry.matrices]


def pair(
    base: Layout, tuned: Sequence[Layout], *, allow_unmatched: bool = False
) -> tuple[list[Layout], list[TensorTask]]:
    """Pair tensors by exact name and shape.

    Args:
        base: The checkpoint that the others descend from.
        tuned: The others.
        allow_unmatched: Whether more than embeddings may be without a partner.

    Returns:
        The layouts, base first, whose entries say what became of each tensor; and the tasks.

    Raises:
        CheckpointError: More than embeddings are unmatched and that is not allowed, or nothing is paired at all.
    """
    children = [replace(t, entries={n: _match(e, base.entries.get(n)) for n, e in t.entries.items()}) for t in tuned]
    for child in children:
        _check_matched(base, child, allow_unmatched=allow_unmatched)
    parent = replace(base, entries={n: _match_any(n, e, children) for n, e in base.entries.items()})
    layouts = [parent, *children]
    return layouts, _pair_tasks(layouts)


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


def _pair_tasks(layouts: Sequence[Layout]) -> list[TensorTask]:
    base, tasks = layouts[0], []
    for name, entry in base.entries.items():
        partners = tuple(i for i, child in enumerate(layouts) if i and is_paired(child.entries.get(name)))
        if entry.matrices:
            tasks.append(replace(_task(name, entry, 0), tuned=partners))
    for i, child in enumerate(layouts[1:], start=1):
        alone = ((n, e) for n, e in child.entries.items() if e.matrices and not is_paired(e))
        tasks += [_task(name, entry, i) for name, entry in alone]
    return tasks


def _task(name: str, entry: Entry, model: int) -> TensorTask:
    return TensorTask(name, entry.matrices, entry.info.size_bytes, model)


def base_adapters(layouts: Sequence[Layout]) -> frozenset[int]:
    """Return which checkpoints are adapters over the first one itself."""
    base = layouts[0].checkpoint.reference
    return frozenset(i for i, layout in enumerate(layouts) if _same(layout.checkpoint.base_reference, base))


def adapter_notes(names: Sequence[str], layouts: Sequence[Layout]) -> list[str]:
    """Say which adapters lie over another base than the one that they are compared with."""
    own = base_adapters(layouts)
    strange = (i for i, layout in enumerate(layouts) if i and i not in own and layout.checkpoint.factors)
    return [f"{names[i]}: {_merged_note(layouts[0], layouts[i])}" for i in strange]


def _merged_note(base: Layout, layout: Layout) -> str:
    return (
        f"an adapter over {layout.checkpoint.base_reference}, not over {base.checkpoint.reference}: "
        "its merged weights are compared, rounded to their dtype."
    )


def merge_strange_adapters(layouts: Sequence[Layout]) -> list[Layout]:
    """Return layouts in which an adapter over another base than the first counts by its merged weights, and says so."""
    own = base_adapters(layouts)
    found = list(layouts)
    for i, layout in enumerate(layouts):
        if i and i not in own and layout.checkpoint.factors:
            merged = replace(layout.checkpoint, factors={})
            found[i] = replace(layout, checkpoint=merged, warnings=(*layout.warnings, _merged_note(layouts[0], layout)))
    return found


def _same(one: str | None, other: str) -> bool:
    if one is None or one == other:
        return one is not None
    paths = Path(one), Path(other)
    return all(p.exists() for p in paths) and paths[0].samefile(paths[1])
