"""The commands that edit checkpoints: one for each edit, whose arguments and options its record says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, progress, say, say_json
from diffract.errors import RecipeError, printable
from diffract.settings import decimal_row, size_text

if TYPE_CHECKING:
    from diffract.edits.edit import Argument, Edit
    from diffract.edits.to_files import EditPreview

Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.")]
Dtype = Annotated[
    str | None, typer.Option(metavar="NAME", help="Convert weights: float32, bfloat16 or float16; kept by default.")
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of tensors in a file.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would change, how many bytes, how long; write nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that an edit has written.")]

COMMON: dict[str, tuple[Any, Any]] = {
    "output": (Output, None),
    "output_dtype": (Dtype, None),
    "shard_size": (ShardSize, "5GB"),
    "architecture": (options.ArchitectureFile, None),
    "adapter_base": (options.AdapterBase, None),
    "dry_run": (DryRun, False),
    "force": (Force, False),
    "quiet": (options.Quiet, False),
    "json": (options.Json, False),
    "debug": (options.Debug, False),
}
"""Options that all of them have, after those of their own."""

PAIRS = ("weights", "groups")
"""Settings that are given as NAME=NUMBER, as often as needed."""

NAME_WIDTH = 26

Given = dict[str, Any]


def command(edit: type[Edit]) -> Any:
    """Make the command of an edit: its name, first line of help, arguments and options are those of the record.

    Args:
        edit: Whose fields become options, but for those that arguments stand for.
    """
    own = {name: field for name, field in edit.model_fields.items() if name not in edit.not_options}

    def run(**given: Any) -> None:
        common = {name: given.pop(name) for name in COMMON}
        options = {name: given.pop(name) for name in own}
        with explained(debug=common["debug"]):
            options = {name: value for name, value in options.items() if value not in (None, False, [])}
            for name in set(PAIRS) & options.keys():
                options[name] = dict(_pair(text, f"--{name}") for text in options[name])
            recipe = edit.as_recipe(given, options)
            found = [_run(*made, common) for made in _outputs(recipe, common["output"])]
            if common["json"]:
                say_json(found if len(found) > 1 else found[0])

    arguments = [_argument(argument) for argument in edit.arguments]
    places = [*arguments, *(_option(name, field) for name, field in own.items()), *_common()]
    run.__signature__ = inspect.Signature(places)
    run.__annotations__ = {place.name: place.annotation for place in places}
    run.__name__, run.__doc__ = edit.name, edit.__doc__
    return run


def _argument(argument: Argument) -> inspect.Parameter:
    kind: Any = list[str] if argument.many else str
    shown = typer.Argument(metavar=argument.metavar, help=argument.help)
    return inspect.Parameter(argument.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, shown])


def _common() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in COMMON.items()
    ]


def _option(name: str, field: Any) -> inspect.Parameter:
    """Make an option of a setting; values are text that the recipe's own validation reads."""
    flag = f"--{name.replace('_', '-')}"
    metavar = {"bool": None, "float": "NUMBER", "int": "N"}.get(_word(field), "TEXT")
    kind: Any = bool if metavar is None else list[str] if name in PAIRS else str | None
    default: Any = [] if name in PAIRS else False if metavar is None else ... if field.is_required() else None
    shown = "NAME=NUMBER" if name in PAIRS else metavar
    option = typer.Option(flag, metavar=shown, help=field.description + _standard(name, field))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option], default=default)


def _standard(name: str, field: Any) -> str:
    """Say what a setting is by default; brackets would be read as markup."""
    plain = isinstance(field.default, str | int | float) and not isinstance(field.default, bool)
    return f" Default: {field.default}." if plain and name not in PAIRS else ""


def _word(field: Any) -> str:
    """Name the kind of a setting's value."""
    text = str(field.annotation)
    return next((word for word in ("bool", "float", "int") if word in text and "Literal" not in text), "text")


def _pair(text: str, where: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not equals or not name:
        raise RecipeError(f"{where}: expected NAME=VALUE, got {printable(text)!r}.")
    return name, value


def _outputs(recipe: Mapping[str, Any], output: Path | None) -> list[tuple[Mapping[str, Any], Path | None]]:
    """Return recipes and where they go: one, or a row of them for ``--at FROM:TO:STEP``.

    Raises:
        RecipeError: The row cannot be read.
    """
    steps = recipe.get("steps") or [{}]
    at = steps[0].get("interpolate", {}).get("at", "")
    if ":" not in at:
        return [(recipe, output)]
    try:
        row = [str(value) for value in decimal_row(at)]
    except ValueError as error:
        where = f"expected a number or FROM:TO:STEP such as 0:1:0.1, got {printable(at)!r}"
        raise RecipeError(f"--at: {where}.") from error
    steps = [{"interpolate": {**steps[0]["interpolate"], "at": value}} for value in row]
    outputs = [output and output / f"at-{value}" for value in row]
    return [({**recipe, "steps": [step]}, place) for step, place in zip(steps, outputs, strict=True)]


def _run(recipe: Mapping[str, Any], output: Path | None, common: Mapping[str, Any]) -> dict[str, Any]:
    written = {"shard_size": common["shard_size"], **({"dtype": d} if (d := common["output_dtype"]) else {})}
    extra = {k: str(v) for k in ("architecture", "adapter_base") if (v := common[k]) is not None}
    return run_recipe({**recipe, **extra, "output": written}, output, common)


def run_recipe(recipe: Any, output: Path | None, common: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a recipe, or find out what it would do; say so, unless it is wanted as JSON.

    Args:
        recipe: As ``diffract.apply`` takes it.
        output: Folder to write.
        common: dry_run, force, quiet, json.

    Returns:
        A summary, for JSON.
    """
    silent = common["quiet"] or common["json"]
    if common["dry_run"]:
        from dataclasses import asdict

        from diffract.edits.to_files import preview

        found = preview(recipe)
        _show_preview(found, quiet=silent)
        return asdict(found)
    if output is None:
        raise RecipeError("where to? Pass -o OUT, or --dry-run to see what would be done.")
    from diffract.edits.to_files import apply  # before progress begins to measure

    with progress("edit", quiet=silent) as update:
        edited = apply(recipe, output, force=common["force"], progress=update)
    _show_steps(edited.manifest["steps"], quiet=silent)
    say(f"written: {output} (details in manifest.json)", quiet=silent)
    return {"output": str(output), "steps": edited.manifest["steps"]}


def _show_preview(found: EditPreview, *, quiet: bool) -> None:
    _show_steps(found.steps, quiet=quiet)
    written = "the adapter" if found.written_bytes is None else size_text(found.written_bytes)
    say(f"would change {found.changed} of {found.tensors} tensors", quiet=quiet)
    say(f"would read {size_text(found.read_bytes)}, write {written}, in about {found.seconds:.3g} s", quiet=quiet)


def _show_steps(steps: Sequence[Mapping[str, Any]], *, quiet: bool) -> None:
    from diffract.edits.to_files import said

    for step in steps:
        say(f"{step['step']}:", quiet=quiet)
        for key, value in step["summary"].items():
            say(f"  {key:<{NAME_WIDTH}} {said(value)}", quiet=quiet)
