"""The commands that edit checkpoints, and ``diffract apply`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffract.cli import options
from diffract.cli.console import EXIT_INPUT, explained, say, say_json
from diffract.cli.edit import DryRun, Force, Output, command, run_recipe
from diffract.edits.recipe import EDITS

COMMANDS = tuple(command(edit) for edit in EDITS)
"""A command for each edit."""


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
