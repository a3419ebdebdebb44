"""A checkpoint in the names and tensors of another one, where projections are fused or split, experts stacked or alone.

What is the same part under another name goes by the other's. Where both hold the same matrices, by their labels, in
other tensors, those of the one are put together anew from parts of the other's when they are read, so that all that
works on pairs of tensors works on these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from diffract.architectures.names import bias_name
from diffract.checkpoints import Checkpoint, TensorInfo, renamed
from diffract.checkpoints.checkpoint import Range
from diffract.matrices.layout import Entry, Layout
from diffract.matrices.matrix import Matrix, cut

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

SHOWN = 3
"""Tensors that a note names."""


def counterparts(base: Layout, other: Layout) -> dict[str, str]:
    """Return what a base calls those tensors that another checkpoint has under another name.

    Two names mean one tensor where both are the same part of the model, stored the same way round, or, for what nothing
    describes (norms, biases), where they are equal without prefix and words of wrappers.
    """
    known = {_part(base, name): name for name in base.entries}
    found = ((name, known.get(_part(other, name))) for name in other.entries if name not in base.entries)
    return {name: own for name, own in found if own is not None and own not in other.entries}


def _part(layout: Layout, name: str) -> tuple[object, ...]:
    place = layout.architecture.place(name)
    if place is None:
        return (layout.architecture.bare.get(name, name),)
    return (place.role.part, place.role.stacked, place.role.transposed, place.layer, place.expert, place.head)


def renamed_like(base: Layout, layout: Layout) -> Layout:
    """Return a layout that goes by the names of its base; each entry notes its own."""
    names = counterparts(base, layout)
    if not names:
        return layout

    def moved(found: Mapping[str, T]) -> dict[str, T]:
        return {names.get(name, name): value for name, value in found.items()}

    entries = {}
    for name, entry in layout.entries.items():
        own = names.get(name, name)
        note = "; ".join(filter(None, (entry.note, f"called {name} here" if own != name else "")))
        matrices = tuple(replace(m, tensor=own) for m in entry.matrices)
        entries[own] = replace(entry, info=replace(entry.info, name=own), matrices=matrices, note=note)
    read = layout.architecture
    architecture = replace(read, places=moved(read.places), bare=moved(read.bare))
    return replace(layout, checkpoint=renamed(layout.checkpoint, names), architecture=architecture, entries=entries)


class PairedPart(NamedTuple):
    """One matrix: where it is to lie, and where it lies."""

    to: Matrix
    of: Matrix


@dataclass(frozen=True)
class PutTogether:
    """A source that makes a tensor of parts of others.

    Attributes:
        checkpoint: What holds the parts.
        pieces: All matrices of the tensor; of a bias its parts, as matrices of one column.
    """

    checkpoint: Checkpoint
    pieces: tuple[PairedPart, ...]

    def read(self, info: TensorInfo, rows: Range | None) -> Tensor:
        """Return entries ``rows`` of the leading axis; zeros where no piece lies, as of a part that is not selected."""
        import torch

        from diffract.checkpoints.dtypes import TORCH_DTYPES

        first, last = rows or (0, info.shape[0])
        made = torch.zeros(last - first, *info.shape[1:], dtype=TORCH_DTYPES[info.dtype])
        columns = made if made.ndim > 1 else made[:, None]
        for to, of in self.pieces:
            start, stop = to.rows or (0, info.shape[-2])
            if to.index is not None:
                if first <= to.index < last:
                    target = made[to.index - first][start:stop]
                    target[:, slice(*to.cols or (None, None))] = self._stored(to, of)
            elif (begin := max(start, first)) < (end := min(stop, last)):
                target = columns[begin - first : end - first]
                target[:, slice(*to.cols or (None, None))] = self._stored(to, of)[begin - start : end - start]
        return made

    def close(self) -> None:
        """Close what holds the parts."""
        self.checkpoint.close()

    def _stored(self, to: Matrix, of: Matrix) -> Tensor:
        """Return a matrix in the orientation that it is to be stored in; of a stack only its own slice is read."""
        span = of.rows if of.index is None else (of.index, of.index + 1)
        read = self.checkpoint.read(of.tensor, span)
        (matrix,) = cut(read if read.ndim > 1 else read[:, None], [of], span[0] if span else 0)
        return matrix.mT if to.transposed else matrix


def regrouped_like(base: Layout, layout: Layout) -> Layout:
    """Return a layout whose matrices lie in the base's tensors, where it has the same ones in others.

    Args:
        base: Whose tensors count.
        layout: What is regrouped. Tensors of which a matrix would be left over stay as they are.
    """
    known = counterparts(base, layout)
    paired = {*layout.entries, *known.values()}
    lacking = {n: parts for n, parts in _parts(base).items() if n not in paired}
    own = _parts(layout)
    spare = {m.name: m for n, parts in own.items() if n not in base.entries and n not in known for m in parts}
    made: dict[str, tuple[PairedPart, ...]] = {}
    for name, parts in lacking.items():
        found = [spare.get(m.name) for m in parts]
        pieces = tuple(PairedPart(m, of) for m, of in zip(parts, found, strict=True) if of and of.shape == m.shape)
        if len(pieces) == len(found) and len({piece.of.dtype for piece in pieces}) == 1:
            made[name] = pieces
    # Leaving a tensor out may leave another's parts over: until nothing changes.
    while broken := _left_over(made, own):
        made = {n: pieces for n, pieces in made.items() if not broken.intersection(p.of.tensor for p in pieces)}
    if not made:
        return layout
    used = {p.of.tensor for pieces in made.values() for p in pieces}
    entries = {n: e for n, e in layout.entries.items() if n not in used}
    infos, sources = dict(layout.checkpoint.infos), dict(layout.checkpoint.sources)
    for name, pieces in made.items():
        info = replace(base.entries[name].info, dtype=pieces[0].of.dtype, file=layout.checkpoint.reference, offset=0)
        infos[name], sources[name] = info, PutTogether(layout.checkpoint, pieces)
        whole = base.entries[name]
        matrices = tuple(replace(m, dtype=info.dtype) for m in whole.matrices)
        parts = list(dict.fromkeys(p.of.tensor for p in pieces))
        more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
        outcome = "analysed" if matrices else whole.outcome
        entries[name] = Entry(info, matrices, outcome, f"put together from {', '.join(parts[:SHOWN])}{more}")
    checkpoint = replace(
        layout.checkpoint,
        infos={n: info for n, info in infos.items() if n not in used},
        sources={n: source for n, source in sources.items() if n not in used},
        factors={n: made for n, made in layout.checkpoint.factors.items() if n not in used},
    )
    read, places = layout.architecture, base.architecture.places
    architecture = replace(read, places={**read.places, **{n: places[n] for n in made if n in places}})
    return replace(layout, checkpoint=checkpoint, architecture=architecture, entries=entries)


def _parts(layout: Layout) -> dict[str, tuple[Matrix, ...]]:
    """Return the matrices of every tensor, and the parts of every bias that go with the rows of its weight's."""
    found = {name: entry.matrices for name, entry in layout.entries.items() if entry.matrices}
    for name, matrices in [*found.items()]:
        entry = layout.entries.get(bias_name(name) or "")
        if entry is None or not entry.info.is_float:
            continue
        bias, dtype = entry.info.name, entry.info.dtype
        # heads of the output have their columns for themselves, and all of its rows in common: the first has its bias
        spans = {m.outputs: m for m in reversed(matrices)}
        parts = tuple(
            Matrix(f"{m.name}.bias", bias, (m.shape[0], 1), dtype, rows=rows) for rows, m in sorted(spans.items())
        )
        # experts have a row of a bias each, and a selection may lack some parts: neither is put together
        if entry.info.shape == (sum(m.shape[0] for m in parts),) and all(m.index is None for m in matrices):
            found[bias] = parts
    return found


def _left_over(made: dict[str, tuple[PairedPart, ...]], parts: Mapping[str, tuple[Matrix, ...]]) -> set[str]:
    """Return the tensors of which some parts are asked for, but not all."""
    asked: dict[str, set[str]] = defaultdict(set)
    for pieces in made.values():
        for piece in pieces:
            asked[piece.of.tensor].add(piece.of.name)
    return {name for name, own in asked.items() if len(own) < len(parts[name])}


def untied_like(other: Layout, layout: Layout) -> Layout:
    """Return a layout in which what is tied is measured by itself, where another model has a tensor of its own for it.

    A head that shares its values with the embedding has the embedding's, whether they are stored once or twice.
    """
    found: dict[str, Entry] = {}
    checkpoint = layout.checkpoint
    for name, entry in other.entries.items():
        own, twin = layout.entries.get(name), layout.architecture.tied_to(name, checkpoint.infos)
        if entry.outcome == "analysed" and twin and twin != name and (own is None or own.outcome == "tied"):
            info = replace(checkpoint.info(twin), name=name)
            if info.shape[1:] == entry.info.shape[1:] and len(entry.matrices) == 1:
                matrices = (replace(entry.matrices[0], dtype=info.dtype, shape=(info.shape[0], info.shape[1])),)
                found[name] = Entry(info, matrices, "tied", f"shares its values with {twin}")
                if own is None:
                    alias = renamed(checkpoint, {twin: name})
                    infos, sources = {**checkpoint.infos, name: info}, {**checkpoint.sources, name: alias.sources[name]}
                    checkpoint = replace(checkpoint, infos=infos, sources=sources)
    return replace(layout, checkpoint=checkpoint, entries={**layout.entries, **found}) if found else layout
