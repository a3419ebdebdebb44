"""Which tensors of a base and of its tuned checkpoints belong together: those of one part and one shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from diffract.errors import CheckpointError, printable
from diffract.matrices.alike import regrouped_like, renamed_like, untied_like
from diffract.matrices.layout import Entry, Layout
from diffract.matrices.tokens import MAY_DIFFER, with_common_rows

FIRST_NUMBER = re.compile(r"(.*?)\.(\d+)(?:\.(.*))?$")


def pair(layouts: Sequence[Layout], *, allow_unmatched: bool = False) -> list[Layout]:
    """Pair the tensors of a base and of the checkpoints that descend from it, by name or part of the model, and shape.

    Of tables with a row for each token, the rows that all of the models have are paired where some have more.

    Args:
        layouts: The base first.
        allow_unmatched: Whether more than embeddings may be without a partner.

    Returns:
        The layouts; their entries say what became of each tensor, and go by the base's names.

    Raises:
        CheckpointError: More than embeddings are unmatched and that is not allowed, or nothing is paired at all.
    """
    base, *others = layouts
    tuned = [renamed_like(base, regrouped_like(base, other)) for other in others]
    for layout in tuned:
        base = untied_like(layout, base)
    base, tuned = with_common_rows(base, [untied_like(base, layout) for layout in tuned])
    children = [replace(t, entries={n: _match(e, base.entries.get(n)) for n, e in t.entries.items()}) for t in tuned]
    for child in children:
        _check_matched(base, child, allow_unmatched=allow_unmatched)
    return [replace(base, entries={n: _match_any(n, e, children) for n, e in base.entries.items()}), *children]


def is_paired(entry: Entry | None) -> bool:
    """Whether a tuned checkpoint's tensor is compared with the base's."""
    # What is tied has matrices where the other model has a tensor of its own for it.
    tied = entry is not None and entry.outcome == "tied" and bool(entry.matrices)
    return tied or (entry is not None and entry.outcome in ("analysed", "retyped"))


def _match(entry: Entry, other: Entry | None) -> Entry:
    """Say how a tuned checkpoint's tensor relates to the base's of the same name."""
    if not entry.matrices:
        return entry
    if other is None or not other.info.is_float:
        return replace(entry, outcome="unmatched", note="the base has no such tensor")
    if other.info.shape != entry.info.shape and not (_common_rows(entry) and _common_rows(other)):
        return replace(entry, outcome="resized", note=f"the base has {list(other.info.shape)}")
    if other.outcome == "tied" and not other.matrices:
        return replace(entry, outcome="unmatched", note=f"in the base it {other.note}")
    if other.info.dtype != entry.info.dtype:
        return replace(entry, outcome="retyped", note=f"compared; the base stores {other.info.dtype}")
    return entry


def _common_rows(entry: Entry) -> bool:
    """Whether an entry is a table of tokens of which the rows count that all models have."""
    # other pieces of tensors lie in rows too: heads, parts of fused projections
    return any(m.rows is not None and m.block in (*MAY_DIFFER, "other") for m in entry.matrices)


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
    alone = [e for e in child.entries.values() if e.outcome in ("unmatched", "resized")]
    gone = [e for n, e in base.entries.items() if e.matrices and n not in child.entries]
    lost = [*alone, *gone]
    if not any(is_paired(e) and e.matrices for e in child.entries.values()):
        raise CheckpointError(
            f"{where} share no tensor of one name and shape{_example(lost, base, child)}. "
            "Compare a checkpoint with one that descends from it."
        )
    ours, theirs = stacks(base), stacks(child)
    serious = [e for e in alone if within_layers(e, child, ours)] + [e for e in gone if within_layers(e, base, theirs)]
    if serious and not allow_unmatched:
        raise CheckpointError(
            f"{where}: {len(serious)} tensors besides embeddings have no partner{_example(serious, base, child)}. "
            "Pass --allow-unmatched to compare what matches and list the rest."
        )


def stacks(layout: Layout) -> set[str]:
    """Return what stands before the numbers of layers in a model's names: ``layers``, ``encoder.block``, ..."""
    return {stack for name in layout.entries if (stack := split_at_layer(layout, name)[0])}


def within_layers(entry: Entry, layout: Layout, stacks_of_other: Collection[str]) -> bool:
    """Whether a tensor holds matrices of layers that two models have in common.

    Neither ends of a model do (a vocabulary grows, a task has a head of its own), nor parts that only one of them has:
    a tower for images, a value head, layers past the last that predict further tokens.
    """
    if not entry.matrices or all(m.block in MAY_DIFFER for m in entry.matrices):
        return False
    stack, number, _ = split_at_layer(layout, entry.info.name)
    layers = layout.architecture.dimensions.layers
    return stack in stacks_of_other and (layers is None or number < layers)


def split_at_layer(layout: Layout, name: str) -> tuple[str, int, str]:
    """Split a name, without prefix and words of wrappers, at its first number; no text before where there is none."""
    found = FIRST_NUMBER.match(layout.architecture.bare.get(name, name))
    return (found[1], int(found[2]), found[3]) if found else ("", 0, name)


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
