"""What a step of a recipe comes to: changes of tensors, and an account of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from diffract.edits.bench import Bench
from diffract.edits.draft import Apply, Change, Place, place_of
from diffract.edits.operations.precision import work_dtype
from diffract.matrices import Matrix
from diffract.settings import natural_key

Row = dict[str, Any]
"""What is known of one matrix or head, with its ``name``."""


@dataclass
class Planned:
    """What a step will do.

    Attributes:
        changes: By tensor name.
        summary: What was decided, for the manifest and the terminal.
        rows: One record per matrix or head, with its ``name``; steps that find out while they compute add them then.
        conclude: What the rows come to, where that is known only when they are all there.
    """

    changes: Mapping[str, Change]
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    conclude: Callable[[list[Row]], dict[str, Any]] = lambda rows: {}

    def described(self) -> dict[str, Any]:
        """Return what was decided and found, rows in the model's order though threads finish in another.

        What is no finite number, such as the norm of a change that holds NaN, is ``None``.
        """
        rows = sorted(self.rows, key=lambda row: natural_key(row["name"]))
        summary = {**self.summary, **(self.conclude(rows) if rows else {})}
        return {"summary": _finite(summary), "rows": [_finite(row) for row in rows]}


def _finite(record: Row) -> Row:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the one dtype that edits of all of them compute in."""
    dtype = reduce(torch.promote_types, (work_dtype(t.dtype) for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def both(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors in the one dtype that edits of both compute in."""
    one, other = together(one, other)
    return one, other


Edit = Callable[[Tensor, Matrix, Place], Tensor]
"""``edit(values, matrix, place)`` returns the new values (m, n) of one matrix, in the orientation that is stored."""


def matrix_changes(bench: Bench, matrices: Iterable[Matrix], edit: Edit) -> dict[str, Change]:
    """Return changes that edit each of some matrices, which do not overlap, by itself and whole."""
    found: dict[str, list[tuple[Place, Apply]]] = defaultdict(list)
    for m in matrices:
        found[m.tensor].append((place_of(m, bench.checkpoint.info(m.tensor).shape), partial(_edited, edit, m)))
    return {tensor: Change(tuple(parts), whole=True) for tensor, parts in found.items()}


def _edited(edit: Edit, matrix: Matrix, values: Tensor, place: Place) -> Tensor:
    """Edit a matrix, which in a stack of experts has a leading axis of one."""
    new = edit(flat(values), matrix, place)
    return new.reshape(values.shape)


def flat(values: Tensor) -> Tensor:
    """Return a matrix without the leading axis of one that it has in a stack."""
    return values[0] if values.ndim == 3 else values
