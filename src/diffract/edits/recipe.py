"""Recipes: a model, steps, and what to write, as YAML; validated as a whole before a byte of weights is read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from diffract.checkpoints.writer import SHARD_BYTES
from diffract.edits.settings import Interpolate, Laser, Lora, Merge, Model, Pissa, Rewind, Settings, Svf, Truncate
from diffract.errors import printable
from diffract.settings import STRICT, read_recipe, validated

Dtype = Literal["float64", "float32", "bfloat16", "float16"]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(value: object) -> object:
    """Read a size in bytes: ``5GB``, ``200 MB``, or a number.

    >>> parse_size("5GB")
    5000000000
    """
    if not isinstance(value, str):
        return value
    text = value.strip().upper().removesuffix("B").strip()
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        return int(float(text.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        raise ValueError(f"expected a size such as 5GB or 200MB, got {value!r}") from None


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


def _named(step: object) -> object:
    """Put what Python made under its name, as it stands in a file."""
    return {step.name: step} if isinstance(step, Settings) else step


class One(BaseModel):
    """A mapping that holds exactly one thing, under its name."""

    model_config = STRICT

    @model_validator(mode="after")
    def _one(self) -> One:
        if len(self.model_fields_set) != 1 or self.chosen is None:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}, with its settings")
        return self

    @property
    def chosen(self) -> Any:
        """What it holds."""
        return getattr(self, next(iter(self.model_fields_set), ""), None)


class StepItem(One):
    """One step of a recipe."""

    rewind: Rewind | None = None
    truncate: Truncate | None = None
    interpolate: Interpolate | None = None
    merge: Merge | None = None
    laser: Laser | None = None
    svf: Svf | None = None


class ExportItem(One):
    """What is written instead of a checkpoint."""

    lora: Lora | None = None
    pissa: Pissa | None = None


class Recipe(BaseModel):
    """A checkpoint to make: a model, and what is done to it, step by step in one pass."""

    model_config = STRICT

    model: Model
    """The checkpoint that is edited; tokenizer, chat template and generation config are its."""
    steps: tuple[Annotated[StepItem, BeforeValidator(_named)], ...] = ()
    """What is done, in this order."""
    export: Annotated[ExportItem, BeforeValidator(_named)] | None = None
    """Write an adapter instead of a checkpoint: lora or pissa."""
    architecture: str | None = None
    """A JSON file that describes the model."""
    adapter_base: Model | None = None
    """The base of a LoRA adapter whose config names none that can be opened."""
    output: Output = Output()
    """How it is written."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.export is not None and self.export.lora is not None and self.output != Output():
            raise ValueError("lora writes factors, in one file and in its own dtype; it takes no output settings")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as it stands in a file, without what it leaves to its defaults."""
        found = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        found["steps"] = [_plain(item.chosen) for item in self.steps]
        if self.export is not None:
            found["export"] = _plain(self.export.chosen)
        return found


def _plain(step: Settings) -> dict[str, Any]:
    return {step.name: step.model_dump(mode="json", by_alias=True, exclude_defaults=True)}


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
