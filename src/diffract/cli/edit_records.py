"""The records of edits, until edits bring them themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from diffract.edits.settings import Interpolate, Laser, Lora, Merge, Pissa, Rewind, Settings, Svf, Truncate
from diffract.errors import RecipeError, printable

Given = Mapping[str, Any]


def _record(kind: type[Settings], arguments: tuple[Any, ...], build: Any, not_options: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        name=kind.name,
        __doc__=kind.__doc__,
        model_fields=kind.model_fields,
        arguments=arguments,
        not_options=not_options,
        as_recipe=build,
    )


def _argument(name: str, metavar: str, text: str, *, many: bool = False) -> Any:
    return SimpleNamespace(name=name, metavar=metavar, help=text, many=many)


TUNED = _argument("model", "TUNED", "The checkpoint to edit; tokenizer and the like are its.")
MODEL = _argument("model", "MODEL", "The checkpoint to edit; tokenizer and the like are its.")
END = _argument("other", "OTHER", "The checkpoint at a = 1.")
MERGED = _argument("models", "[BASE] NAME=MODEL...", "Their common base, and the checkpoints to merge.", many=True)


def _step(name: str) -> Callable[[Given, Given], dict[str, Any]]:
    return lambda given, options: {"model": given["model"], "steps": [{name: dict(options)}]}


def _export(name: str) -> Callable[[Given, Given], dict[str, Any]]:
    return lambda given, options: {"model": given["model"], "export": {name: dict(options)}}


def _interpolation(given: Given, options: Given) -> dict[str, Any]:
    return {"model": given["model"], "steps": [{"interpolate": {"with": given["other"], **options}}]}


def _merging(given: Given, options: Given) -> dict[str, Any]:
    """Sort out a base without a name, the first checkpoint, which is edited, and the others."""
    base = [text for text in given["models"] if "=" not in text]
    named = [tuple(text.split("=", 1)) for text in given["models"] if "=" in text]
    if len(base) > 1 or len(named) < 2:
        raise RecipeError(
            f"merge: expected at most one base and two or more NAME=MODEL, got {printable(' '.join(given['models']))}."
        )
    if len(dict(named)) < len(named):
        raise RecipeError("merge: two checkpoints have one name. Name them apart.")
    (first, model), *others = named
    settings = {"called": first, "models": dict(others), **({"base": base[0]} if base else {}), **options}
    return {"model": model, "steps": [{"merge": settings}]}


EDITS = (
    _record(Rewind, (TUNED,), _step("rewind")),
    _record(Truncate, (TUNED,), _step("truncate")),
    _record(Interpolate, (MODEL, END), _interpolation, ("other",)),
    _record(Merge, (MERGED,), _merging, ("models", "base", "called")),
    _record(Laser, (MODEL,), _step("laser")),
    _record(Svf, (MODEL,), _step("svf")),
    _record(Lora, (TUNED,), _export("lora")),
    _record(Pissa, (MODEL,), _export("pissa")),
)
