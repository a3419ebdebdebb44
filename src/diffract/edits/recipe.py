"""Recipes: a model, steps, and what to write, as YAML; validated as a whole before a byte of weights is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError, model_validator

from diffract.edits.output import Output
from diffract.edits.settings import (
    STRICT,
    Interpolate,
    Laser,
    Lora,
    Merge,
    Model,
    Pissa,
    Rewind,
    Settings,
    Svf,
    Truncate,
)
from diffract.errors import RecipeError, printable, suggest

B = TypeVar("B", bound=BaseModel)


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
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read recipe {printable(path)!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {printable(path)!r} is no YAML: {printable(error)}.") from error
    if not isinstance(found, dict):
        raise RecipeError(f"recipe {printable(path)!r}: expected model and steps, got {type(found).__name__}.")
    return validated(Recipe, found, printable(path))


def validated(kind: type[B], values: Mapping[str, Any], where: str) -> B:
    """Return a validated model, or raise one clear error.

    Raises:
        RecipeError: What is wrong, where, and what was expected.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}{_explained(kind, error)}") from error


def _explained(kind: type[BaseModel], error: ValidationError) -> str:
    """Say what the first error is, with the path to it."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    at = f", {printable(path)}" if path else ""
    if first["type"] == "extra_forbidden":
        known = _fields(kind, first["loc"][:-1])
        return f"{at}: unknown setting.{suggest(str(first['loc'][-1]), known)} Known: {', '.join(known)}."
    if first["type"] == "missing":
        return f"{at}: this setting is missing."
    message = first["msg"].removeprefix("Value error, ")
    got = first.get("input")
    shown = "" if first["type"] == "value_error" or isinstance(got, BaseModel | dict) else f", got {printable(got)!r}"
    return f"{at}: {message[0].lower()}{message[1:]}{shown}."


def _fields(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the settings that are known at a path."""
    schema = kind.model_json_schema()
    here = schema
    for key in path:
        here = _resolved(schema, here)
        here = here.get("items", {}) if isinstance(key, int) else here.get("properties", {}).get(key, {})
    return list(_resolved(schema, here).get("properties", {}))


def _resolved(schema: Mapping[str, Any], here: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference, or the one of several alternatives that is an object."""
    options = here.get("anyOf", [here])
    here = next((option for option in options if "$ref" in option), here)
    return schema["$defs"][here["$ref"].rpartition("/")[2]] if "$ref" in here else here


@cache
def recipe_schema() -> str:
    """Return the JSON schema of recipes, for editors."""
    return json.dumps(Recipe.model_json_schema(by_alias=True), indent=2) + "\n"
