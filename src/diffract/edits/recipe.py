"""Recipes: a model, steps, and what to write, as YAML; validated as a whole before a byte of weights is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, create_model, model_validator

from diffract.edits.delta import Delta
from diffract.edits.edit import Edit, Model
from diffract.edits.interpolate import Interpolate
from diffract.edits.lora import Lora, Pissa
from diffract.edits.merge import Merge
from diffract.edits.rewind import Names, Rewind
from diffract.edits.scale import Scale
from diffract.edits.svf import Svf
from diffract.edits.truncate import Laser, Truncate
from diffract.errors import printable
from diffract.settings import SHARD_BYTES, STRICT, parse_size, read_recipe, validated

EDITS: tuple[type[Edit], ...] = (Rewind, Truncate, Interpolate, Merge, Scale, Laser, Svf, Lora, Pissa, Delta)
"""Every edit there is; fields of recipes, the schema, and commands follow from their order here."""

Dtype = Literal["float64", "float32", "bfloat16", "float16"]

Size = Annotated[
    int, Field(ge=1), BeforeValidator(parse_size), WithJsonSchema({"type": ["string", "integer"], "examples": ["5GB"]})
]


class Output(BaseModel):
    """How an edited checkpoint is written."""

    model_config = STRICT

    dtype: Dtype | None = None
    """Convert floating-point tensors; their own dtype is kept by default."""
    shard_size: Size = SHARD_BYTES
    """Most bytes of tensors in a file, such as 5GB."""
    link: bool = False
    """Take files over in which nothing changes as hard links: a later change of the model's file is one of this too."""


def _named(edit: object) -> object:
    """Put what Python made under its name, as it stands in a file."""
    return {edit.name: edit} if isinstance(edit, Edit) else edit


class One(BaseModel):
    """A mapping that holds exactly one edit, under its name."""

    model_config = STRICT

    @model_validator(mode="after")
    def _one(self) -> One:
        if len(self.model_fields_set) != 1 or self._held is None:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}, with its settings")
        return self

    @property
    def _held(self) -> Edit | None:
        return getattr(self, next(iter(self.model_fields_set), ""), None)

    @property
    def chosen(self) -> Edit:
        """The edit that it holds."""
        assert self._held is not None
        return self._held


def _one_of(name: str, doc: str, kinds: Sequence[type[Edit]]) -> type[One]:
    """Make a class that holds one of some edits: a field for each, so that errors and the schema name them."""
    # Written out, every new edit would need a line here too; made, its row in ``EDITS`` is enough.
    fields: dict[str, Any] = {kind.name: (kind | None, None) for kind in kinds}
    return create_model(name, __base__=One, __doc__=doc, __module__=__name__, **fields)


StepItem = _one_of("StepItem", "One step of a recipe.", [e for e in EDITS if not e.writes_adapter])
ExportItem = _one_of("ExportItem", "What is written instead of a checkpoint.", [e for e in EDITS if e.writes_adapter])


class Recipe(BaseModel):
    """A checkpoint to make: a model, and what is done to it, step by step in one pass."""

    model_config = STRICT

    model: Model
    """The checkpoint that is edited; tokenizer, chat template and generation config are its."""
    steps: tuple[Annotated[StepItem, BeforeValidator(_named)], ...] = ()  # pyright: ignore[reportInvalidTypeForm]
    """What is done, in this order."""
    export: Annotated[ExportItem, BeforeValidator(_named)] | None = None  # pyright: ignore[reportInvalidTypeForm]
    """Write something else than a checkpoint: lora or pissa, an adapter; delta, what differs from a base."""
    architecture: str | None = None
    """A JSON file that describes the model."""
    adapter_base: Model | None = None
    """The base of a LoRA adapter whose config names none that can be opened."""
    download: bool = False
    """Whether models of the hub are fetched whole, not read by byte ranges."""
    allow: Names = ()
    """What is allowed though it speaks against taking weights from another model: strangers, tokenizers, unmatched, or
    keys of config.json such as rope_theta."""
    vocabulary: Literal["common", "refuse"] = "common"
    """Tables with another number of tokens: their common rows are paired, or the edit is refused."""
    output: Output = Output()
    """How it is written."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.export is not None and not self.export.chosen.takes_output and self.output != Output():
            raise ValueError(
                f"{self.export.chosen.name} writes factors, in one file and in its own dtype; "
                "it takes no output settings"
            )
        return self

    @property
    def edits(self) -> list[Edit]:
        """All that is done, in order: the steps, and the export."""
        return [item.chosen for item in (*self.steps, *([self.export] if self.export else []))]

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as it stands in a file, without what it leaves to its defaults."""
        found = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        found.setdefault("steps", [])
        return found


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: It cannot be read, is no YAML, or says what cannot be; the message holds the path in the file.
    """
    return validated(Recipe, read_recipe(path, "model and steps"), printable(path))


@cache
def recipe_schema() -> str:
    """Return the JSON schema of recipes, for editors."""
    return json.dumps(Recipe.model_json_schema(by_alias=True), indent=2) + "\n"
