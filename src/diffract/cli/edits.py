"""The commands that edit checkpoints, and ``diffract apply`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import EXIT_INPUT, explained, say, say_json
from diffract.cli.edit import DryRun, Force, Given, Output, command, run_recipe
from diffract.edits.settings import Interpolate, Laser, Lora, Merge, Pissa, Rewind, Svf, Truncate
from diffract.errors import RecipeError, printable

Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The checkpoint to edit; tokenizer and the like are its.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="The checkpoint to edit; tokenizer and the like are its.")]
End = Annotated[str, typer.Argument(metavar="OTHER", help="The checkpoint at a = 1.")]
Merged = Annotated[
    list[str], typer.Argument(metavar="[BASE] NAME=MODEL...", help="Their common base, and the checkpoints to merge.")
]


def _step(name: str) -> Any:
    return lambda given: {"model": given["model"], "steps": [{name: given["settings"]}]}


def _export(name: str) -> Any:
    return lambda given: {"model": given["model"], "export": {name: given["settings"]}}


def _interpolation(given: Given) -> dict[str, Any]:
    return {"model": given["model"], "steps": [{"interpolate": {"with": given["other"], **given["settings"]}}]}


def _merging(given: Given) -> dict[str, Any]:
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
    settings = {"called": first, "models": dict(others), **({"base": base[0]} if base else {}), **given["settings"]}
    return {"model": model, "steps": [{"merge": settings}]}


rewind = command(Rewind, {"model": Tuned}, _step("rewind"))
truncate = command(Truncate, {"model": Tuned}, _step("truncate"))
interpolate = command(Interpolate, {"model": Model, "other": End}, _interpolation, hidden=("other",))
merge = command(Merge, {"models": Merged}, _merging, hidden=("models", "base", "called"))
laser = command(Laser, {"model": Model}, _step("laser"))
svf = command(Svf, {"model": Model}, _step("svf"))
lora = command(Lora, {"model": Tuned}, _export("lora"))
pissa = command(Pissa, {"model": Model}, _export("pissa"))


def apply(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file (docs/recipes.md).")],
    output: Output = None,
    dry_run: DryRun = False,
    force: Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Apply a recipe: any sequence of edits in one pass over the weights."""
    with explained(debug=debug):
        found = run_recipe(recipe, output, {"dry_run": dry_run, "force": force, "quiet": quiet, "json": json})
        if json:
            say_json(found)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that an edit wrote.")],
    replay: Annotated[bool, typer.Option("--replay", help="Compute the recipe anew, too, and compare.")] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare an edited checkpoint and its inputs with its manifest; exit code 1 where they differ."""
    with explained(debug=debug):
        from diffract.edits.to_files import verify as verify_folder

        found = verify_folder(folder, replay=replay)
    if json:
        say_json(vars(found))
    else:
        say(
            f"{found.tensors} tensors as they were written, {found.inputs} of the inputs as they were read", quiet=quiet
        )
        for text in found.unchecked:
            typer.echo(f"not checked: {text}", err=True)
        for text in found.faults:
            typer.echo(f"differs: {text}", err=True)
    if found.faults:
        raise typer.Exit(EXIT_INPUT)
