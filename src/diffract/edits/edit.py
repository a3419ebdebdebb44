"""What an edit is: settings that know their name and their arguments, and how to plan what they change.

Every edit is one file with one class (or two of a family). It loads without torch, so that recipes and help pages
do; its tensor functions stand in ``directions``, ``spectral_edits``, ``spectral_merges`` and ``mixing``, whose shapes
are checked at run time in the tests, and are imported where an edit plans.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from diffract.errors import printable
from diffract.settings import STRICT, natural_key

if TYPE_CHECKING:
    from diffract.edits.bench import Bench
    from diffract.edits.draft import Change, Draft
    from diffract.edits.write import Target, Written

Unit = Literal["head", "matrix", "expert", "tensor"]
"""What can be chosen to be edited together."""

Shared = Literal["all", "majority", "never"]
"""When a part that several heads share is edited: with all of them, with more than half, or never."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


def _reference(value: object) -> object:
    """A path becomes text; mappings, modules and open checkpoints stay what they are."""
    if isinstance(value, str) and not value:
        raise ValueError("expected a checkpoint, got an empty text")
    return str(value) if isinstance(value, Path) else value


def words_of(value: object) -> object:
    """Split text at its commas, as recipes and the command line have lists; all else stays what it is."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def describe(reference: object) -> str:
    """Name a checkpoint in a manifest."""
    return reference if isinstance(reference, str) else printable(type(reference).__name__)


Model = Annotated[
    Any,
    BeforeValidator(_reference),
    PlainSerializer(describe, when_used="json"),
    WithJsonSchema({"type": "string"}),
]
"""A checkpoint: what ``diffract.open`` takes; text in a recipe."""


FactorTable = Annotated[
    Any,
    # A table is known by what it can do: to ask for its type would load Polars for every help page.
    BeforeValidator(lambda value: value if hasattr(value, "write_parquet") else str(value)),
    PlainSerializer(describe, when_used="json"),
    WithJsonSchema({"type": "string"}),
]
"""Where a table of factors is; in Python the table itself too."""

FACTOR_TABLE = "factors.parquet"
"""What a table that was in memory is called beside the checkpoint."""


def saved_table(table: FactorTable, folder: Path, output: Path) -> dict[str, Any]:
    """Write a table of factors beside a checkpoint, where it is in memory, and return where a recipe finds it.

    Args:
        table: The table, or where it is.
        folder: Where the checkpoint is being written.
        output: What that folder will be called.
    """
    if isinstance(table, str):
        return {"factors": table}
    table.write_parquet(folder / FACTOR_TABLE)
    return {"factors": str(output / FACTOR_TABLE)}


Row = dict[str, Any]
"""What is known of one matrix or head, with its ``name``."""


@dataclass(frozen=True)
class Argument:
    """What stands before the options on the command line.

    Attributes:
        name: What `Edit.as_recipe` finds it under.
        metavar: What help pages call it.
        help: What it is.
        many: Whether it may be given several times.
    """

    name: str
    metavar: str
    help: str
    many: bool = False


EDITED = Argument("model", "MODEL", "The checkpoint to edit; tokenizer and the like are its.")
TUNED = Argument("model", "TUNED", "The checkpoint to edit; tokenizer and the like are its.")


class Edit(BaseModel):
    """A part of a recipe: its settings are the fields, each with its meaning below it.

    The options of its command are its fields, but for those that arguments stand for; the first line of help is its
    docstring.

    Attributes:
        name: What it is called in recipes and on the command line.
        usage: A typical command, for the documentation.
        arguments: What the command takes before its options.
        not_options: Fields that arguments stand for.
        writes_adapter: Whether it ends a recipe, as what is written instead of a checkpoint.
        takes_others: Whether weights are taken from other models.
        takes_output: Whether dtype and size of files, as recipes set them, concern what it writes.
    """

    model_config = STRICT

    name: ClassVar[str]
    usage: ClassVar[str]
    arguments: ClassVar[tuple[Argument, ...]] = (EDITED,)
    not_options: ClassVar[tuple[str, ...]] = ()
    writes_adapter: ClassVar[bool] = False
    takes_others: ClassVar[bool] = True
    takes_output: ClassVar[bool] = True

    @abstractmethod
    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what the edit changes; headers are read, and of tensors what the decision needs.

        Args:
            bench: The model and the checkpoints beside it.
            draft: The model after the edits before this one.

        Raises:
            DiffractError: The edit does not fit the model.
        """

    def saved(self, folder: Path, output: Path) -> Edit:
        """Return the edit as the recipe beside a checkpoint names it: tables in memory are written there.

        Args:
            folder: Where the checkpoint is being written.
            output: What that folder will be called.
        """
        return self

    @classmethod
    def as_recipe(cls, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recipe that a command stands for.

        Args:
            arguments: What was given for each of ``arguments``, by name.
            options: The fields that were given.
        """
        made = {cls.name: {**{n: v for n, v in arguments.items() if n != "model"}, **options}}
        return {"model": arguments["model"], **({"export": made} if cls.writes_adapter else {"steps": [made]})}


@dataclass
class Planned:
    """What an edit will do.

    Attributes:
        changes: By tensor name.
        summary: What was decided, for the manifest and the terminal.
        rows: One record per matrix or head, with its ``name``; edits that find out while they compute add them then.
        conclude: What the rows come to, where that is known only when they are all there.
        write: What writes the model after all changes, where that is not one checkpoint.
    """

    changes: Mapping[str, Change]
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    conclude: Callable[[list[Row]], dict[str, Any]] = lambda rows: {}
    write: Callable[[Draft, Target], Written] | None = None

    def described(self) -> dict[str, Any]:
        """Return what was decided and found, rows in the model's order though threads finish in another.

        What is no finite number, such as the norm of a change that holds NaN, is ``None``: JSON has no other word.
        """
        rows = sorted(self.rows, key=lambda row: natural_key(row["name"]))
        summary = {**self.summary, **(self.conclude(rows) if rows else {})}
        return {"summary": _finite(summary), "rows": [_finite(row) for row in rows]}


def _finite(record: Row) -> Row:
    # JSON has no NaN and no infinity.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
