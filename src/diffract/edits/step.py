"""What every step of a recipe is: validated settings, and a plan of changes made of them."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema
from torch import Tensor

from diffract.edits.bench import Bench
from diffract.edits.draft import Apply, Change, Draft, Place, place_of
from diffract.edits.operations.precision import work_dtype
from diffract.errors import printable
from diffract.matrices import Matrix


def _reference(value: object) -> object:
    """A path becomes text; mappings, modules and open checkpoints stay what they are."""
    if isinstance(value, str) and not value:
        raise ValueError("expected a checkpoint, got an empty text")
    return str(value) if isinstance(value, Path) else value


Model = Annotated[Any, BeforeValidator(_reference), WithJsonSchema({"type": "string"})]
"""A checkpoint: what ``diffract.open`` takes; text in a recipe."""


@dataclass
class Planned:
    """What a step will do.

    Attributes:
        changes: By tensor name.
        summary: What was decided, for the manifest and the terminal.
        rows: One record per matrix or head; steps that find out while they compute add them then.
    """

    changes: Mapping[str, Change]
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Settings(BaseModel):
    """A part of a recipe: its settings are the fields, each with its meaning below it.

    Attributes:
        name: What it is called in recipes and on the command line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    name: ClassVar[str] = ""


class Step(Settings):
    """One edit; ``plan`` says what it changes."""

    @abstractmethod
    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what the step changes.

        Args:
            bench: The model and the checkpoints beside it.
            draft: The model after the steps before this one.
        """


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the one dtype that edits of all of them compute in."""
    dtype = reduce(torch.promote_types, (work_dtype(t.dtype) for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def both(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors in the one dtype that edits of both compute in."""
    one, other = together(one, other)
    return one, other


def describe(reference: object) -> str:
    """Name a checkpoint in a manifest."""
    return reference if isinstance(reference, str) else printable(type(reference).__name__)


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
