"""Where the parts of one model lie in another: layers moved, dropped or doubled, heads or neurons permuted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from diffract.checkpoints import TensorInfo
from diffract.errors import ArchitectureError
from diffract.matrices.layout import Layout
from diffract.matrices.matrix import Matrix, cut
from diffract.matrices.slicing import slice_tensor

BEGINNING, MATCHED = 1 << 15, 0.5
"""Entries of each matrix by which layers are held against each other, and the correlation that is a match."""

FEATURES, MOST_UNITS, FIRST_UNITS = 512, 1 << 15, 4
"""Entries by which heads or neurons are told apart; how many there may be; matrices after which, where none of them was
permuted, no further ones are tried."""

SHOWN_UNITS = 256
"""Heads or neurons whose places are listed one by one."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_TABLE = re.compile(r"embed|wte|wpe|lm_head|vocab|position", re.IGNORECASE)

Role: TypeAlias = tuple[object, ...]
Blocks: TypeAlias = dict[int | None, dict[Role, str]]
"""By layer and role within it the name of a tensor."""

Side: TypeAlias = tuple[Layout, Blocks]
"""A model and the matrices of its blocks."""

Found: TypeAlias = tuple[dict[str, str], float | None]
"""Where parts lie, and the median correlation of what belongs together; nothing where none has moved."""


def find_blocks(layout: Layout) -> Blocks:
    """Return the matrices of attention and feed-forward; of a model that no family describes all but tables."""
    found: Blocks = {}
    others: dict[str, str] = {}
    described = layout.architecture.family not in ("generic", "structure")
    for name, entry in layout.entries.items():
        info, place = entry.info, layout.architecture.place(name)
        if not info.is_float or entry.outcome in ("tied", "buffer") or len(info.shape) < 2 or min(info.shape) < 2:
            continue
        bare = layout.architecture.bare.get(name, name)
        if place is not None and place.layer is not None:
            role: Role = (*place.role.part, place.role.stacked, place.expert, place.head)
            found.setdefault(place.layer, {})[role] = name
        elif place is None and not _TABLE.search(bare) and (_NUMBER.search(bare) or not described):
            others[name] = bare
    # wrappers call a stack by other words; only where two stacks have layers alike do these words tell them apart
    tails = {name: bare[_start_of_layer(bare) :] for name, bare in others.items()}
    for name, own in (tails if len(set(tails.values())) == len(tails) else others).items():
        number = _NUMBER.search(own)
        layer = int(number[0]) if number else None
        found.setdefault(layer, {})[(_NUMBER.sub("*", own, count=1),)] = name
    return found


def _start_of_layer(bare: str) -> int:
    """Where the last word before the number of a layer begins; 0 without a number."""
    number = _NUMBER.search(bare)
    return bare.rfind(".", 0, max(0, number.start() - 1)) + 1 if number else 0


def first_rows(info: TensorInfo, entries: int) -> tuple[int, int]:
    """Return as many of the first rows as hold at most so many entries; one at least."""
    return 0, min(info.shape[0], max(1, entries * info.shape[0] // info.entries))


def moved_layers(one: Side, other: Side) -> Found:
    """Return which layers of the base those of the other are, and their correlation; nothing if none has moved."""
    (base, ours), (tuned, theirs) = one, other
    first, second = (sorted(layer for layer in blocks if layer is not None) for blocks in (ours, theirs))
    if not first or not second:
        return {}, None
    grid = _layer_grid((base, [ours[n] for n in first]), (tuned, [theirs[n] for n in second]))
    best, where = grid.max(0), grid.argmax(0)
    origin = {layer: first[i] for layer, i, r in zip(second, where, best, strict=True) if r >= MATCHED}
    smaller = min(len(first), len(second))
    # Fewer than half, or a single layer of several, resemble each other by chance or by a shared part.
    if len(origin) < max(smaller / 2, min(2, smaller)) or all(a == b for a, b in origin.items()):
        return {}, None
    return {f"layer {a}": f"layer {b}" for a, b in origin.items()}, float(np.median(best[best >= MATCHED]))


def _layer_grid(
    one: tuple[Layout, Sequence[dict[Role, str]]], other: tuple[Layout, Sequence[dict[Role, str]]]
) -> NDArray[np.float64]:
    """Median over roles of the correlation of each layer of the one with each of the other, by their first entries."""
    grids = []
    for role in dict.fromkeys(role for roles in one[1] for role in roles):
        sides = [[_beginning(layout, roles.get(role)) for roles in layers] for layout, layers in (one, other)]
        sizes = {len(values) for side in sides for values in side if values is not None}
        if len(sizes) == 1 and all(any(values is not None for values in side) for side in sides):
            absent = np.full(sizes.pop(), np.nan)  # a layer of another kind, as hybrids have, says nothing of this role
            a, b = (np.stack([absent if v is None else v for v in side]) for side in sides)
            grids.append(a @ b.T)
    if not grids:
        return np.zeros((len(one[1]), len(other[1])))
    stacked = np.stack(grids)
    stacked[:, np.isnan(stacked).all(0)] = 0.0
    return np.nanmedian(stacked, axis=0)


def _beginning(layout: Layout, name: str | None) -> NDArray[np.float64] | None:
    """First entries of a tensor, centred and of norm one; of what does not vary or is not finite zeros."""
    if name is None:
        return None
    rows = first_rows(layout.entries[name].info, BEGINNING)
    values = layout.checkpoint.read(name, rows).double().flatten().numpy()
    centred = values - values.mean()
    norm = np.linalg.norm(centred)
    return centred / norm if np.isfinite(norm) and norm > 0 else np.zeros_like(values)


def moved_units(one: Side, other: Side) -> Found:
    """Return where the heads, neurons or rows of the smaller model lie in the larger, matrix by matrix.

    A matrix counts if nine in ten of its units have a partner, each another one, and one at least lies elsewhere.

    Args:
        one: The base.
        other: The other; it may have fewer or more units, as pruned and grown models have.
    """
    (base, ours), (tuned, theirs) = one, other
    moved: dict[str, str] = {}
    matched: list[float] = []
    left: dict[str, int] = {}
    for layer, role, name in ((layer, role, name) for layer, roles in ours.items() for role, name in roles.items()):
        partner = theirs.get(layer, {}).get(role)
        what, own = _units(base, name)
        if partner is None or not own or not left.setdefault(what, FIRST_UNITS):
            continue
        sides = [_features(layout, units) for layout, units in ((tuned, _units(tuned, partner)[1]), (base, own))]
        smaller, larger = sorted(sides, key=len)
        if len(smaller) < 2 or len(larger) > MOST_UNITS or smaller.shape[1] != larger.shape[1]:
            continue
        best, where = _nearest(smaller, larger)
        # short rows resemble others by chance, so that a match of them has to be a better one
        least = max(MATCHED, 1.5 * (2 * np.log(len(larger) + 1) / smaller.shape[1]) ** 0.5)
        alike = np.mean(best >= least) >= 0.9 and len(set(where.tolist())) >= 0.9 * len(where)
        if alike and (where != np.arange(len(where))).any():
            left[what] = -1  # this kind was permuted, so all of it is looked at
            moved[f"{name}, {what}"] = _places(where, len(larger))
            matched.append(float(np.median(best)))
        else:
            left[what] -= 1
    return moved, float(np.median(matched)) if matched else None


def _units(layout: Layout, name: str) -> tuple[str, list[Matrix]]:
    """What along the output of a tensor can be permuted, and where it lies: a matrix per head, or one with a row each.

    Of a block whose parts are known that is told from the queries and from what leads into the neurons alone.
    """
    try:
        found = [m for m in slice_tensor(layout.entries[name].info, layout.architecture) if m.index is None]
    except ArchitectureError:  # the layout was made without heads, as the configuration contradicts the tensors
        return "", []
    heads = [m for m in found if m.projection == "q" and m.head is not None]
    if len(heads) > 1:
        return "heads", heads
    # k and v go by their query heads; what o and down put out is the residual stream, which has an order of its own.
    if not found or found[0].projection in ("k", "v", "o", "down"):
        return "", []
    return "neurons" if str(found[0].block).split(".")[-1] == "mlp" else "rows", found[:1]


def _features(layout: Layout, units: Sequence[Matrix]) -> Float64[Tensor, "units features"]:
    """Some entries of each unit, evenly spaced, less what all units have in common; of norm one."""
    if not units:
        return torch.zeros(0, 0, dtype=torch.float64)
    stack = cut(layout.checkpoint.read(units[0].tensor), units)
    rows = stack.flatten(1) if len(units) > 1 else stack[0]
    # Evenly spaced, as neighbours in a row are often alike.
    rows = rows[:, :: -(-rows.shape[1] // FEATURES)].double()
    return torch.nn.functional.normalize(rows - rows.mean(0), dim=1).nan_to_num_()


def _nearest(
    smaller: Float64[Tensor, "a features"], larger: Float64[Tensor, "b features"]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each unit of the smaller model the cosine of the most similar one of the larger, and its place."""
    found = [(part @ larger.T).max(1) for part in smaller.split(1024)]
    return torch.cat([f.values for f in found]).numpy(), torch.cat([f.indices for f in found]).numpy()


def _places(where: NDArray[np.int64], count: int) -> str:
    if len(where) <= SHOWN_UNITS:
        return " ".join(map(str, where))
    return f"{(where != np.arange(len(where))).sum()} of {len(where)} at other places among {count}"
