"""Heads, matrices, experts and tensors as what is edited together: which parts of which tensors they are made of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from diffract.architectures.names import bias_name, norm_names
from diffract.checkpoints.checkpoint import Range
from diffract.edits.bench import Bench, Other
from diffract.edits.draft import Place, everything, overlap, place_of
from diffract.edits.edit import Shared, Unit
from diffract.edits.factors import read_table
from diffract.engine import one_torch_thread
from diffract.errors import SelectionError, printable, suggest
from diffract.matrices import Matrix
from diffract.settings import natural_key
from diffract.stats import reference_score

HEAD_PARTS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class TensorPart:
    """A part of a tensor.

    Attributes:
        tensor: The tensor's name.
        place: Where in it.
        owners: The units that it belongs to; several query heads share a key-value head.
        counts: Whether it counts when the unit's change is measured; biases and norms do not.
    """

    tensor: str
    place: Place
    owners: frozenset[str]
    counts: bool = True


class Head(NamedTuple):
    """An attention head: its layer, which of the layer's attentions it belongs to, and its number there."""

    layer: int | None
    block: str | None
    head: int | None

    @property
    def name(self) -> str:
        """``L3.h5``; the block is named where it is not the one attention of a layer."""
        return f"L{self.layer}.{'' if self.block == 'attn' else f'{self.block}.'}h{self.head}"


@dataclass(frozen=True)
class Units:
    """What can be chosen, in the model's order, and all their parts.

    Attributes:
        names: Of the units.
        parts: Of all of them.
        heads: Where units are heads, which one each name means.
    """

    names: tuple[str, ...]
    parts: tuple[TensorPart, ...]
    heads: Mapping[str, Head] = field(default_factory=dict)

    def known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return names of units that somebody gave.

        Raises:
            SelectionError: One is not in the model, or there are none.
        """
        for name in names:
            if name not in self.names:
                raise SelectionError(
                    f"no {printable(name)!r} in this model, expected names from {self.names[0]} to {self.names[-1]}."
                )
        if not names:
            raise SelectionError("the list names nothing. Write it as L3.h5,L7.h0.")
        return names

    def shared_with(self, other: Other) -> Units:
        """Return what of the units can be taken from another checkpoint; one that lacks a matrix there is left out."""
        there = [(part, other.shared(part.tensor, part.place)) for part in self.parts]
        lost = {owner for part, place in there if place is None and part.counts for owner in part.owners}
        parts = tuple(replace(part, place=place) for part, place in there if place is not None)
        return replace(self, names=tuple(name for name in self.names if name not in lost), parts=parts)

    def alone(self) -> Units:
        """Return what goes with one unit by itself: what several share stays, whatever the rule."""
        return replace(self, parts=tuple(part for part in self.parts if len(part.owners) == 1))

    def chosen(self, names: Collection[str], shared: Shared) -> tuple[TensorPart, ...]:
        """Return the parts that go with some units.

        Args:
            names: The units.
            shared: Whether a part with several owners goes when ``all`` of them are chosen, the ``majority`` (more
                than half), or ``never``.
        """

        def goes(part: TensorPart) -> bool:
            count, total = len(part.owners.intersection(names)), len(part.owners)
            # One more than all have: never.
            need = {"all": total, "majority": total // 2 + 1, "never": total + 1}[shared] if total > 1 else 1
            return count >= need

        return tuple(filter(goes, self.parts))


def find_units(bench: Bench, unit: Unit, select: str | None) -> Units:
    """Return the units of a model.

    Args:
        bench: The model.
        unit: What they are: attention heads; matrices; experts, all matrices of one; or tensors, 1-D ones included.
        select: Matrices that count; all by default.

    Raises:
        SelectionError: There are none.
    """
    find: dict[str, Callable[[Bench, str | None], Units]] = {
        "head": _heads,
        "matrix": _matrices,
        "expert": _experts,
        "tensor": _tensors,
    }
    units = bench.remember((unit, select), lambda: find[unit](bench, select))
    if not units.names:
        note = bench.layout.architecture.note
        raise SelectionError(
            f"{printable(bench.checkpoint.reference)}: no {unit} among what is selected. "
            f"{note or 'Choose another unit or selection.'}"
        )
    return units


def _heads(bench: Bench, select: str | None) -> Units:
    """Attention heads: q and o of a query head; k and v belong to all heads that share them, as do common norms.

    There are none where queries are not cut into heads.
    """
    matrices = [m for m in bench.matrices(select, heads=True) if m.projection in HEAD_PARTS]
    heads: dict[str, Head] = {}
    queries: dict[tuple[int | None, str | None, int | None], set[str]] = defaultdict(set)
    for m in bench.layout.matrices:
        if m.projection == "q" and m.head is not None:
            head = Head(m.layer, m.block, m.head)
            heads[head.name] = head
            queries[m.layer, m.block, m.kv_head].add(head.name)
    # Latent attention has no rows of queries for each head: only its output is cut, which is not the head.
    if not queries:
        return Units((), ())
    parts = []
    for m in matrices:
        own = m.projection in ("q", "o") and m.head is not None
        owners = {Head(m.layer, m.block, m.head).name} if own else queries[m.layer, m.block, m.kv_head]
        if own or (m.projection in ("k", "v") and m.kv_head is not None):
            parts.append(TensorPart(m.tensor, _place(bench, m), frozenset(owners)))
    # Biases and norms follow the rows that they belong to, so these must be known first. A norm that several heads
    # share is met once for each of them, and must be one part: hence the key.
    known = {(part.tensor, _key(part.place)): part.owners for part in parts}
    everyone: dict[str, frozenset[str]] = defaultdict(frozenset)
    for part in parts:
        everyone[part.tensor] |= part.owners
    attached: dict[tuple[object, ...], TensorPart] = {}
    for m in matrices:
        owners = known.get((m.tensor, _key(_place(bench, m))))
        if owners and m.projection != "o" and m.index is None:
            for part in _attached(bench, m, owners=owners, everyone=everyone[m.tensor]):
                attached[part.tensor, _key(part.place)] = part
    return Units(_ordered(parts), (*parts, *attached.values()), heads)


def _attached(
    bench: Bench, matrix: Matrix, *, owners: frozenset[str], everyone: frozenset[str]
) -> Iterator[TensorPart]:
    """Yield the parts of a head's bias and of its norm of queries or keys, cut as its rows are.

    What all heads of a layer have in common belongs to all of them.
    """
    shape = bench.layout.entries[matrix.tensor].info.shape
    start, stop = matrix.outputs
    extent, head_dim = shape[-1] if matrix.transposed else shape[0], matrix.shape[0]
    for name in _companions(bench, matrix):
        size = bench.checkpoint.info(name).shape
        if size == (extent,):
            yield TensorPart(name, (slice(start, stop),), owners, counts=False)
        elif size == (extent // head_dim, head_dim):
            yield TensorPart(
                name, (slice(start // head_dim, stop // head_dim), slice(0, head_dim)), owners, counts=False
            )
        elif size == (head_dim,):
            yield TensorPart(name, everything(size), everyone, counts=False)


def _companions(bench: Bench, matrix: Matrix) -> Iterator[str]:
    """Yield the names of the bias of a projection's tensor, and of the norms of what it gives, as far as there."""
    bias = bias_name(matrix.tensor)
    norms = (f"{n}.{kind}" for n in norm_names(matrix.tensor, matrix.projection) for kind in ("weight", "bias"))
    return (name for name in (bias, *norms) if name is not None and name in bench.checkpoint)


def _matrices(bench: Bench, select: str | None) -> Units:
    return _whole(bench, ((m, m.name) for m in bench.matrices(select, heads=False)))


def _experts(bench: Bench, select: str | None) -> Units:
    experts = (m for m in bench.matrices(select, heads=False) if m.expert is not None)
    return _whole(bench, ((m, f"L{m.layer}.e{m.expert}") for m in experts))


def _whole(bench: Bench, named: Iterable[tuple[Matrix, str]]) -> Units:
    parts = tuple(TensorPart(m.tensor, _place(bench, m), frozenset({name})) for m, name in named)
    return Units(_ordered(parts), parts)


def _tensors(bench: Bench, select: str | None) -> Units:
    kept = None if select is None else {m.tensor for m in bench.matrices(select, heads=False)}
    names = [name for name in bench.entries() if kept is None or name in kept]
    shapes = {name: bench.layout.entries[name].info.shape for name in names}
    parts = [TensorPart(name, everything(shapes[name]), frozenset({name})) for name in names]
    return Units(tuple(names), tuple(parts))


def _place(bench: Bench, matrix: Matrix) -> Place:
    return place_of(matrix, bench.layout.entries[matrix.tensor].info.shape)


def _ordered(parts: Iterable[TensorPart]) -> tuple[str, ...]:
    """Return names of units in the model's order: by layer, then by number."""
    names = dict.fromkeys(name for part in parts for name in sorted(part.owners))
    return tuple(sorted(names, key=natural_key))


def places_by_tensor(bench: Bench, parts: Iterable[TensorPart]) -> dict[str, list[Place]]:
    """Return the places of parts by tensor; where they fill it, it counts as one place."""
    found: dict[str, dict[object, TensorPart]] = defaultdict(dict)
    for part in parts:
        found[part.tensor][_key(part.place)] = part
    joined = {}
    for name, own in found.items():
        shape = bench.checkpoint.info(name).shape
        # One place takes one pass over whole rows; many places that fill a tensor would cut each block into pieces.
        joined[name] = [everything(shape)] if _fill(own.values(), shape) else [part.place for part in own.values()]
    return joined


Weighted = dict[str, list[tuple[Place, float]]]
"""For each tensor its parts, and a number for each."""


def weighted_places(bench: Bench, text: str | None, *, weight: float, groups: Mapping[str, float]) -> Weighted:
    """Return what an entrywise edit moves, and by how much; a tensor is one part where all of it moves alike.

    A group takes the matrices that it selects, and the biases and norms of which it selects all matrices that they
    belong to: those whose rows they go with, or else those of their module, or of the nearest one around it.

    Args:
        bench: The model.
        text: Matrices that move; every tensor, 1-D ones included, for ``None``.
        weight: Of all that no group names.
        groups: Weights by selection; of several that name a part the last counts.
    """
    chosen = [({m.name for m in bench.matrices(group, heads=True)}, at) for group, at in groups.items()]
    by_tensor: dict[str, list[TensorPart]] = defaultdict(list)
    # Cut into heads, so that a group may be a head; where all parts of a tensor move alike they become one again.
    for m in bench.matrices(text, heads=True):
        by_tensor[m.tensor].append(TensorPart(m.tensor, _place(bench, m), frozenset({m.name})))
    if text is None:
        by_tensor |= _vector_parts(bench)
    found: Weighted = {}
    for name, parts in by_tensor.items():
        weights = [next((at for group, at in reversed(chosen) if part.owners <= group), weight) for part in parts]
        shape = bench.checkpoint.info(name).shape
        if len(set(weights)) == 1 and _fill(parts, shape):
            found[name] = [(everything(shape), weights[0])]
        else:
            found[name] = [(part.place, at) for part, at in zip(parts, weights, strict=True)]
    return found


def _vector_parts(bench: Bench) -> dict[str, list[TensorPart]]:
    """Return the parts of every tensor that holds no matrix, with the names of the matrices that each belongs to."""
    matrices = bench.layout.matrices
    projected: dict[str, set[str]] = defaultdict(set)
    inside: dict[str, set[str]] = defaultdict(set)
    for m in matrices:
        projected[m.tensor].add(m.name)
        for module in _modules(m.tensor):
            inside[module].add(m.name)
    cut: dict[str, dict[object, TensorPart]] = defaultdict(dict)
    for m in matrices:
        if m.projection != "o" and m.index is None:  # heads have columns of the output in common, not its bias
            everyone = frozenset(projected[m.tensor])
            for part in _attached(bench, m, owners=frozenset({m.name}), everyone=everyone):
                cut[part.tensor][_key(part.place)] = part
    found = {}
    for name in bench.entries():
        if name in projected:
            continue
        shape, parts = bench.checkpoint.info(name).shape, list(cut[name].values())
        owners = next((inside[module] for module in _modules(name) if module in inside), set())
        found[name] = parts if _fill(parts, shape) else [TensorPart(name, everything(shape), frozenset(owners))]
    return found


def _modules(name: str) -> Iterator[str]:
    """Yield the modules that a tensor lies in, from the inmost one to the model itself."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _fill(parts: Iterable[TensorPart], shape: tuple[int, ...]) -> bool:
    """Whether parts that do not overlap are all of a tensor."""
    return sum(prod(span.stop - span.start for span in part.place) for part in parts) == prod(shape)


def _key(place: Place) -> tuple[tuple[int, int], ...]:
    """Return what a place can be looked up by: slices have no hash."""
    return tuple((span.start, span.stop) for span in place)


Blocks = Callable[[str], Iterable[tuple[Range | None, Tensor]]]
"""A tensor's blocks of rows by its name."""

HEADS = ("layer", "head")
"""Columns that a table of heads must have; ``block`` is ``attn`` where there is none."""


def change_norms(units: Units, blocks: Blocks, base: Other) -> dict[str, float]:
    """Return ||W1 - W0||_F of each unit; squares of a part with several owners are divided by their number.

    Args:
        units: What is measured.
        blocks: Yields W1 by tensor name.
        base: W0.
    """
    by_tensor: dict[str, list[TensorPart]] = defaultdict(list)
    for part in units.parts:
        if part.counts:
            by_tensor[part.tensor].append(part)
    squares = dict.fromkeys(units.names, 0.0)
    # Blocks of a megabyte: other threads would cost more than they give, and sums must not depend on their number.
    with one_torch_thread():
        for name, parts in by_tensor.items():
            for rows, tuned, origin in base.beside(name, blocks(name)):
                delta = tuned - origin
                for part in parts:
                    if inside := overlap(part.place, rows):
                        norm = float(torch.linalg.vector_norm(delta[inside[0]], dtype=torch.float64))
                        share = norm**2 / len(part.owners)
                        squares.update((owner, squares[owner] + share) for owner in part.owners)
    return {name: value**0.5 for name, value in squares.items()}


def least_first(scores: Mapping[str, float]) -> list[str]:
    """Return units by rising score, equals in the model's order.

    Raises:
        SelectionError: A unit has none.
    """
    if unknown := [name for name, score in scores.items() if not math.isfinite(score)]:
        raise SelectionError(
            f"{len(unknown)} of {len(scores)} units have no score, first {printable(unknown[0])}: either nothing or "
            "everything changed alike, or a table lacks them. Choose another order, or mend the table."
        )
    return sorted(scores, key=lambda name: scores[name])


def reference_scores(domain: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Return the reference-domain score of each unit from its changes: low where a reference changes it too."""
    columns = (np.array([norms[name] for name in domain]) for norms in (domain, reference))
    return dict(zip(domain, reference_score(*columns).tolist(), strict=True))


def shuffled(names: tuple[str, ...], seed: int) -> list[str]:
    """Return units in a seeded random order."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[i] for i in order]


def read_scores(path: str, units: Units, column: str, *, model: str | None = None) -> dict[str, float]:
    """Read one number for each head from a table.

    Args:
        path: Parquet (``heads.parquet`` of a run), CSV or JSON, with columns ``layer``, ``head`` and ``column``.
        units: The heads that must be in it; others are an error too.
        column: What to read.
        model: Which rows, where the table speaks of several models.

    Raises:
        SelectionError: The table cannot be read, lacks a column, or speaks of another model's heads.
    """
    table = read_table(path, (*HEADS, column))
    models = table["model"].unique().sort().to_list() if "model" in table.columns else []
    if model is not None and model not in models:
        raise SelectionError(f"{printable(path)} has no rows of {printable(model)!r}.{suggest(model, models)}")
    if model is None and len(models) > 1:
        raise SelectionError(
            f"{printable(path)} speaks of {len(models)} models ({printable(', '.join(models))}). Say which one."
        )
    rows = table.filter(pl.col("model") == model) if model is not None else table
    if not rows[column].dtype.is_numeric() and rows[column].count():
        raise SelectionError(f"{printable(path)}, column {column!r}: expected numbers, got {rows[column].dtype}.")
    named = (
        (Head(r["layer"], r.get("block") or "attn", r["head"]).name, r[column]) for r in rows.iter_rows(named=True)
    )
    found = dict(named)
    if len(found) < len(rows):
        raise SelectionError(f"{printable(path)} has several rows for one head. Keep one of each.")
    if strange := [name for name in found if name not in units.names]:
        raise SelectionError(
            f"{printable(path)} has {printable(strange[0])}, which this model has not (its heads go from "
            f"{units.names[0]} to {units.names[-1]}). It belongs to another model."
        )
    return {name: math.nan if found.get(name) is None else float(found[name]) for name in units.names}
