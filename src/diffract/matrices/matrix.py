"""A labelled matrix: what it is called, and which bytes of which tensor it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from diffract.errors import SelectionError, printable, suggest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """One matrix of a checkpoint, read on demand.

    Attributes:
        name: Unique label, the same in base and tuned model: ``L3.attn.q.h5``, ``L3.mlp.gate``, ``embed``.
        tensor: Name of the tensor it lies in.
        shape: (out, in), after slicing and un-transposing.
        dtype: The tensor's stored dtype.
        layer, block, projection, head, kv_head, expert: Labels; ``None`` where they do not apply.
        index: Position along the leading axis of a 3-D tensor.
        rows, cols: Half-open range within the stored 2-D tensor; ``None`` is all.
        transposed: The stored block is (in, out).
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None = None
    block: str | None = None
    projection: str | None = None
    head: int | None = None
    kv_head: int | None = None
    expert: int | None = None
    index: int | None = None
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        """The label columns of the metrics table."""
        names = ("name", "tensor", "layer", "block", "projection", "head", "kv_head", "expert", "dtype")
        return {**{n: getattr(self, n) for n in names}, "rows": self.shape[0], "cols": self.shape[1]}

    @property
    def slice_key(self) -> str:
        """Which part of the tensor this is, as text for a cache key."""
        return f"{self.index}|{self.rows}|{self.cols}|{self.transposed}"

    @property
    def is_whole(self) -> bool:
        """Whether it is a stored 2-D tensor as it lies."""
        return self.index is None and self.rows is None and self.cols is None and not self.transposed

    @property
    def outputs(self) -> tuple[int, int]:
        """Which entries of its layer's output it makes: its range along the stored axis of the output."""
        return (self.cols if self.transposed else self.rows) or (0, self.shape[0])

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    def as_dict(self) -> dict[str, Any]:
        """All fields, for ``inspect --json``."""
        return asdict(self)


BATCH_BYTES = 1 << 26
"""Float64 bytes of the matrices that are analysed together."""


def batches(matrices: Iterable[Matrix], budget_bytes: int = BATCH_BYTES) -> Iterator[tuple[Matrix, ...]]:
    """Yield runs of matrices that have one shape and part, within a byte budget, one matrix at least."""
    for _, run in groupby(matrices, key=lambda m: (m.shape, m.block, m.projection)):
        alike = list(run)
        step = max(1, budget_bytes // (8 * alike[0].entries))
        for start in range(0, len(alike), step):
            yield tuple(alike[start : start + step])


def cut(tensor: Tensor, matrices: Sequence[Matrix], first: int = 0) -> Tensor:
    """Return matrices of one tensor as a stack (b, m, n), a view where they are evenly spaced.

    Args:
        tensor: The stored tensor, or entries from ``first`` on of its leading axis.
        matrices: Same-shaped matrices of it.
        first: Where on the leading axis ``tensor`` begins.
    """
    import torch

    views = [_view(tensor, m, first) for m in matrices]
    like = views[0]
    offsets = [view.storage_offset() for view in views]
    # heads of one projection lie evenly spaced, so that most stacks are views and cost no copy
    steps = {b - a for a, b in pairwise(offsets)} or {0}
    if len(steps) == 1 and min(steps) >= 0:
        return like.as_strided((len(views), *like.shape), (steps.pop(), *like.stride()), offsets[0])
    return torch.stack(views)


def _view(tensor: Tensor, matrix: Matrix, first: int) -> Tensor:
    stored, rows = tensor, matrix.rows
    if matrix.index is not None:
        stored = tensor[matrix.index - first]
    elif rows:
        rows = rows[0] - first, rows[1] - first
    view = stored[slice(*rows) if rows else slice(None), slice(*matrix.cols) if matrix.cols else slice(None)]
    return view.mT if matrix.transposed else view


LABELS = {"layer": "layer", "head": "head", "kv_head": "kv_head", "expert": "expert"}

_RANGE = re.compile(r"(\d{1,6})(?:(-)(\d{1,6})?)?", re.ASCII)

GRAMMAR = (
    "Terms are separated by commas: 'layers 0-7', 'heads 3', 'kv_heads 0', 'experts 0-3 8' restrict numbers; "
    "'attn', 'attn.q', 'L3.attn.*' or a tensor name with * name parts of the model."
)


@dataclass(frozen=True)
class Selection:
    """Which matrices are wanted.

    Attributes:
        numbers: For each label, the ranges of numbers one of which must hold it.
        names: Blocks, ``block.projection``, or patterns of matrix or tensor names; one of them must fit.
    """

    numbers: dict[str, tuple[range, ...]]
    names: tuple[str, ...]

    def keeps(self, matrix: Matrix) -> bool:
        """Whether a matrix is selected."""
        numbered = all(any(getattr(matrix, label) in span for span in spans) for label, spans in self.numbers.items())
        return numbered and (not self.names or any(_fits(name, matrix) for name in self.names))


def parse_selection(text: str | None) -> Selection:
    """Read a selection; ``None`` or an empty text selects everything.

    Terms that restrict the same label, and names, are alternatives; different kinds must hold together.

    Raises:
        SelectionError: A number range cannot be read.

    >>> parse_selection("layers 0-1, attn.q").names
    ('attn.q',)
    """
    numbers: dict[str, tuple[range, ...]] = {}
    names: list[str] = []
    for term in filter(None, (part.strip() for part in (text or "").split(","))):
        word, _, rest = term.partition(" ")
        label = LABELS.get(word.removesuffix("s"))
        if label:
            numbers[label] = (*numbers.get(label, ()), *_ranges(rest, term))
        elif rest:
            raise SelectionError(f"selection term {printable(term)!r} is not understood. {GRAMMAR}")
        else:
            names.append(term)
    return Selection(numbers, tuple(names))


def select(matrices: Iterable[Matrix], selection: Selection) -> list[Matrix]:
    """Return the selected matrices.

    Raises:
        SelectionError: Nothing is selected, or a name fits no matrix at all.
    """
    matrices = list(matrices)
    for name in selection.names:
        if not any(_fits(name, m) for m in matrices):
            known = dict.fromkeys(word for m in matrices for word in (m.block, _part(m)) if word)
            raise SelectionError(
                f"selection: {printable(name)!r} fits no matrix of this model.{suggest(name, known)} "
                f"Known parts: {', '.join(list(known)[:20])}."
            )
    kept = [m for m in matrices if selection.keeps(m)]
    if matrices and not kept:
        raise SelectionError(f"the selection leaves none of {len(matrices)} matrices. {GRAMMAR}")
    return kept


def _ranges(text: str, term: str) -> list[range]:
    words = text.split()
    matches = [_RANGE.fullmatch(word) for word in words]
    if not words or not all(matches):
        raise SelectionError(f"selection term {printable(term)!r}: expected numbers such as 0-7 or 3. {GRAMMAR}")
    found = []
    for match in filter(None, matches):
        first, dash, last = match.groups()
        # An open end stands for more layers than any model has.
        found.append(range(int(first), int(last) + 1 if last else 10**6 if dash else int(first) + 1))
    return found


def _fits(name: str, matrix: Matrix) -> bool:
    return name in (matrix.block, matrix.projection, _part(matrix), matrix.tensor, matrix.name) or (
        any(c in name for c in "*?[") and (fnmatchcase(matrix.name, name) or fnmatchcase(matrix.tensor, name))
    )


def _part(matrix: Matrix) -> str:
    return f"{matrix.block}.{matrix.projection}"
