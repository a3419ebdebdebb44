"""What settings of every kind share: recipes that know their fields, progress, and numbers and names for people."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from diffract.errors import RecipeError, printable, suggest

if TYPE_CHECKING:
    from pydantic import BaseModel, ConfigDict, ValidationError

B = TypeVar("B", bound="BaseModel")
R = TypeVar("R")

Progress = Callable[[float, float, str], None]
"""What long work reports to: it is called with the work done, all work, and what was just finished."""

# A plain dictionary, since what opens checkpoints reads files by this module and must not load pydantic.
STRICT: ConfigDict = {
    "extra": "forbid",
    "frozen": True,
    "use_attribute_docstrings": True,
    "populate_by_name": True,
}

METRIC_ENTRY_POINTS = "diffract.metrics"
"""Entry point group in which packages name metrics of their own."""

PERMISSIONS = ("strangers", "tokenizers", "unmatched")
"""What ``--allow`` may name where models meet; where weights are taken from another model also a key of config.json."""

# Here, as the help of edits states it and must not load what opens checkpoints.
SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in a file, where nothing else is asked for."""

MOST_IN_ROW = 1000
"""Numbers that ``FROM:TO:STEP`` may come to: more are a slip of the pen."""


MOST_RECIPE_BYTES, MOST_ALIASES, MOST_NESTED = 10_000_000, 20, 100
"""Larger recipes are refused; a row of aliases of aliases grows to twice its length with each, and the time that YAML
takes grows with the square of how deep values lie."""

OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def filled(record: type[R], given: Mapping[str, Any], **own: Any) -> R:
    """Return a record of settings, filled with those of a verb's arguments that are called like its fields.

    Verbs write their settings out, so that editors and the command line know them; to hand each one on by name would
    be the same list once more.

    Args:
        record: The dataclass.
        given: Arguments by name, ``locals()`` at the verb's beginning; what the record does not know is left out.
        own: Fields that are not what the verb's argument of that name says.
    """
    names = [field.name for field in fields(record) if field.name in given]  # pyright: ignore[reportArgumentType]
    return record(**{**{name: given[name] for name in names}, **own})


def decimal_row(text: str) -> list[Decimal]:
    """Read ``FROM:TO:STEP``, both ends included, as decimal numbers: 0.3 is met exactly.

    Raises:
        ValueError: The text cannot be read, its steps lead away from its end, or it has too many numbers.

    >>> [str(number) for number in decimal_row("0:1:0.25")]
    ['0.00', '0.25', '0.50', '0.75', '1.00']
    """
    try:
        first, last, step = map(Decimal, text.split(":"))
        steps = (last - first) / step
        if 0 <= steps < MOST_IN_ROW:
            return [first + i * step for i in range(int(steps) + 1)]
    except (ArithmeticError, ValueError):
        pass  # the message below says what was expected
    raise ValueError(f"expected FROM:TO:STEP of at most {MOST_IN_ROW} numbers, got {printable(text)!r}")


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: It cannot be read, or is no file: a pipe would be waited for, a device may have no end.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is no file, but a pipe or a device", str(path))
    return path.read_bytes()


def _is_overgrown(text: str) -> bool:
    aliases = depth = 0
    for token in yaml.scan(text):
        aliases += isinstance(token, yaml.AliasToken)
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if aliases > MOST_ALIASES or depth > MOST_NESTED:
            return True
    return False


def read_recipe(path: str | Path, expected: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: The file.
        expected: What should stand in it, for the message.

    Raises:
        RecipeError: It cannot be read, is no YAML, or holds something else.
    """
    path = Path(path)
    try:
        text = read_file(path).decode() if path.stat().st_size <= MOST_RECIPE_BYTES else None
        if text is None or _is_overgrown(text):
            raise RecipeError(
                f"recipe {printable(path)!r}: expected {expected} in at most {size_text(MOST_RECIPE_BYTES)}, with at "
                f"most {MOST_ALIASES} aliases (*name) and {MOST_NESTED} values within each other."
            )
        found = yaml.safe_load(text)
    except RecipeError:
        raise
    except OSError as error:
        raise RecipeError(f"cannot read recipe {printable(path)!r}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe {printable(path)!r} is no YAML: {printable(error)}.") from error
    if not isinstance(found, dict):
        raise RecipeError(f"recipe {printable(path)!r}: expected {expected}, got {type(found).__name__}.")
    return found


def validated(kind: type[B], values: Mapping[str, Any], where: str) -> B:
    """Return a validated model, or raise one clear error.

    Raises:
        RecipeError: What is wrong, where, and what was expected.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}{_explained(kind, error)}") from error


def _explained(kind: type[BaseModel], error: ValidationError) -> str:
    """Say what the first error is, with the path to it."""
    from pydantic import BaseModel

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
        named = here.get("properties", {}).get(key) or here.get("additionalProperties") or {}
        here = here.get("items", {}) if isinstance(key, int) else named
    return list(_resolved(schema, here).get("properties", {}))


def _resolved(schema: Mapping[str, Any], here: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference, or the one of several alternatives that is an object."""
    options = here.get("anyOf", [here])
    here = next((option for option in options if "$ref" in option), here)
    return schema["$defs"][here["$ref"].rpartition("/")[2]] if "$ref" in here else here


def size_text(count: float, unit: str = "B") -> str:
    """Return a count with a decimal prefix and its unit.

    >>> size_text(2_970_000_000), size_text(371_000_000, "")
    ('2.97 GB', '371 M')
    """
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".rstrip()


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


def natural_key(text: str) -> list[str | int]:
    """Return a key that sorts names as people do: numbers in them count as numbers.

    >>> sorted(["run-10", "run-9"], key=natural_key)
    ['run-9', 'run-10']
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", text))]
