"""A checkpoint as steps will have changed it: computed block by block when it is read, rounded by whoever keeps it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce

import torch
from torch import Tensor

from diffract.checkpoints import Checkpoint, TensorInfo, row_blocks
from diffract.checkpoints.checkpoint import Range
from diffract.edits.directions import work_dtype
from diffract.errors import CheckpointError, DiffractError, printable
from diffract.matrices import Matrix

BLOCK_BYTES = 1 << 20
"""Stored bytes that entrywise edits work on at once: what they make of them stays in the processor's cache."""

WORKING_COPIES = 4
"""Float64 copies of what is computed at once that exist at a time, about."""

Place = tuple[slice, ...]
"""A part of a tensor: a slice with start and stop for each axis."""

Apply = Callable[[Tensor, Place], Tensor]
"""``apply(values, place)`` returns the new values of a part; the old ones have any float dtype and stay as they are."""


@dataclass(frozen=True)
class Change:
    """What a step does to one tensor.

    Attributes:
        parts: The parts that change, none of which overlap, and what computes their new values.
        whole: Each part must come whole; otherwise it may come in blocks of rows, in their order.
    """

    parts: tuple[tuple[Place, Apply], ...]
    whole: bool = False


@dataclass(frozen=True)
class Draft:
    """A checkpoint and the changes of one step after another.

    Attributes:
        checkpoint: What is edited.
        ties: Tensors that share their values with another one, which is the one that changes.
        steps: For each step the changes by tensor name.
    """

    checkpoint: Checkpoint
    ties: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Mapping[str, Change], ...] = ()

    def then(self, changes: Mapping[str, Change]) -> Draft:
        """Return the draft with one more step."""
        return replace(self, steps=(*self.steps, changes))

    def changes(self, name: str) -> list[Change]:
        """Return what happens to a tensor, in order."""
        name = self.ties.get(name, name)
        return [step[name] for step in self.steps if name in step]

    def keeps(self, info: TensorInfo) -> bool:
        """Whether a tensor stays as it is, byte for byte, where it is stored in this dtype."""
        return not self.changes(info.name) and info.dtype == self.checkpoint.info(info.name).dtype

    def spans(self, name: str) -> Iterator[Range | None]:
        """Yield the blocks of rows in which a tensor is read; they depend on the tensor and its changes alone."""
        # What needs a whole matrix once gets it for all changes: blocks of one would be computed anew for each block.
        if any(change.whole for change in self.changes(name)):
            yield None
        else:
            yield from row_blocks(self.checkpoint.info(name), BLOCK_BYTES)

    def touched(self, name: str, rows: Range | None = None) -> list[Range]:
        """Return the rows among ``rows``, all by default, in which anything changes: spans apart, in their order."""
        shape = self.checkpoint.info(self.ties.get(name, name)).shape
        start, stop = rows or (0, shape[0] if shape else 1)
        places = [place for change in self.changes(name) for place, _ in change.parts]
        spans = sorted((max(p[0].start, start), min(p[0].stop, stop)) if p else (start, stop) for p in places)
        found: list[Range] = []
        for first, last in spans:
            # Sorted by their start, so that only the last one can touch the next.
            if found and first <= found[-1][1]:
                found[-1] = (found[-1][0], max(last, found[-1][1]))
            elif first < last:
                found.append((first, last))
        return found

    def touched_bytes(self, name: str) -> int:
        """Return the bytes of the rows of a tensor in which anything changes."""
        info = self.checkpoint.info(name)
        return (
            sum(last - first for first, last in self.touched(name)) * info.size_bytes // max(1, (info.shape or (1,))[0])
        )

    def workspace_bytes(self, name: str) -> int:
        """Return the memory that computing a tensor takes, about."""
        info = self.checkpoint.info(self.ties.get(name, name))
        whole = any(change.whole for change in self.changes(name))
        return WORKING_COPIES * 8 * info.entries if whole else WORKING_COPIES * 8 * BLOCK_BYTES

    def block(self, name: str, rows: Range | None) -> Tensor:
        """Return one of a tensor's blocks, not rounded to its dtype where something changed."""
        return self._computed(name, self._read(name, rows), rows)

    def stored_block(self, name: str, rows: Range | None, dtype: torch.dtype) -> Tensor:
        """Return one of a tensor's blocks in a dtype.

        What no change touches is converted from what is stored, not from what others are computed in: on the way
        there and back a NaN would lose its sign and its payload.
        """
        before = self._read(name, rows)
        after = self._computed(name, before, rows)
        # Three ways: nothing was widened, or all of the block was touched (round it); else only touched parts are.
        places = (overlap(place, rows) for change in self.changes(name) for place, _ in change.parts)
        touched = [found[0] for found in places if found]
        if after.dtype == before.dtype or any(before[here].shape == before.shape for here in touched):
            return self._rounded(name, after, dtype)
        found = self._rounded(name, before, dtype).clone()
        for here in touched:
            found[here] = self._rounded(name, after[here], dtype)
        return found

    def _rounded(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return values in a dtype.

        Raises:
            CheckpointError: A finite one would become infinite, or all of them zero.
        """
        found = values.to(dtype)
        if found.dtype == values.dtype or not found.dtype.is_floating_point or not found.numel():
            return found
        before, after = (t.float() if t.element_size() == 1 else t for t in (values, found))  # float8 knows no tests
        lost = before.isfinite().logical_and_(after.isfinite().logical_not_())
        # Single values that round to zero are what every conversion does; all of them is another matter.
        if lost.any() or (before.any() and not after.any()):
            large, known = float(before[before.isfinite()].abs().max()), torch.finfo(dtype)
            word = str(dtype).removeprefix("torch.")
            fault = (
                f"{int(lost.sum())} of {values.numel()} values become infinite: the largest is {large:.6g}, that of "
                f"{word} {known.max:.6g}"
                if lost.any()
                else f"all {values.numel()} values become zero: the largest is {large:.3g}"
            )
            raise CheckpointError(
                f"tensor {printable(name)!r}, written as {word}: {fault}. Choose another output dtype: float32 "
                "or bfloat16."
            )
        return found

    def _read(self, name: str, rows: Range | None) -> Tensor:
        return self.checkpoint.read_unrounded(self.ties.get(name, name), rows)

    def _computed(self, name: str, block: Tensor, rows: Range | None) -> Tensor:
        """Return what all changes make of a block."""
        with self.named(name):
            for change in self.changes(name):
                block = _changed(block, change, rows)
        return block

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Say of which tensor an operation speaks, which knows no names, when it refuses values."""
        try:
            yield
        except DiffractError:
            raise
        except ValueError as error:
            where = f"{printable(self.checkpoint.reference)}, tensor {printable(name)!r}"
            raise CheckpointError(f"{where}: {error}.") from error

    def blocks(self, name: str) -> Iterator[tuple[Range | None, Tensor]]:
        """Yield all blocks of a tensor in their order."""
        for rows in self.spans(name):
            yield rows, self.block(name, rows)


def everything(shape: Sequence[int]) -> Place:
    """Return the place of a whole tensor."""
    return tuple(slice(0, n) for n in shape)


def place_of(matrix: Matrix, shape: Sequence[int]) -> Place:
    """Return where a matrix lies in its tensor of this shape."""
    lead = () if matrix.index is None else (slice(matrix.index, matrix.index + 1),)
    rows, cols = matrix.rows or (0, shape[-2]), matrix.cols or (0, shape[-1])
    return (*lead, slice(*rows), slice(*cols))


def overlap(place: Place, rows: Range | None) -> tuple[Place, Place] | None:
    """Return where a place lies in a block of rows, counted within the block and within the tensor.

    The block is the whole tensor for ``None``; ``None`` is returned where the two have nothing in common.
    """
    if rows is None or not place:
        return place, place
    low, high = max(rows[0], place[0].start), min(rows[1], place[0].stop)
    if low >= high:
        return None
    return (slice(low - rows[0], high - rows[0]), *place[1:]), (slice(low, high), *place[1:])


def _changed(block: Tensor, change: Change, rows: Range | None) -> Tensor:
    """Return a block after a change; parts that nothing touches keep their bits."""
    met = ((overlap(place, rows), apply) for place, apply in change.parts)
    parts = [(found[0], apply(block[found[0]], found[1])) for found, apply in met if found]
    # The common case, a whole block, needs no copy of the old values.
    if len(parts) == 1 and parts[0][1].shape == block.shape:
        return parts[0][1]
    if not parts:
        return block
    dtype = reduce(torch.promote_types, (values.dtype for _, values in parts), block.dtype)
    found = block.to(dtype, copy=True)
    for here, values in parts:
        found[here] = values
    return found


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the one dtype that edits of all of them compute in."""
    dtype = reduce(torch.promote_types, (work_dtype(t.dtype) for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


MatrixEdit = Callable[[Tensor, Matrix, Place], Tensor]
"""``edit(values, matrix, place)`` returns the new values (m, n) of one matrix, in the orientation that is stored."""


def matrix_changes(draft: Draft, matrices: Iterable[Matrix], edit: MatrixEdit) -> dict[str, Change]:
    """Return changes that edit each of some matrices, which do not overlap, by itself and whole."""

    def edited(matrix: Matrix, values: Tensor, place: Place) -> Tensor:
        return edit(flat(values), matrix, place).reshape(values.shape)

    found: dict[str, list[tuple[Place, Apply]]] = defaultdict(list)
    for m in matrices:
        found[m.tensor].append((place_of(m, draft.checkpoint.info(m.tensor).shape), partial(edited, m)))
    return {tensor: Change(tuple(parts), whole=True) for tensor, parts in found.items()}


def flat(values: Tensor) -> Tensor:
    """Return a matrix without the leading axis of one that it has in a stack of experts."""
    return values[0] if values.ndim == 3 else values
