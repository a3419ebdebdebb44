"""``diffract train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, number, progress, say, say_json, say_table, warn
from diffract.errors import RecipeError
from diffract.settings import size_text

if TYPE_CHECKING:
    from diffract.train import TrainPreview, TrainRun


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file (docs/train.md).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder of the run; it goes on there.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say parameters, steps, tokens and epochs; train nothing.")
    ] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train a model, a new one or one that goes on, by a recipe."""
    silent = quiet or json
    with explained(debug=debug):
        if dry_run:
            from diffract.train import preview_training

            found = preview_training(recipe)
            if json:
                say_json(vars(found))
            else:
                _show_preview(found, quiet=quiet)
            return
        if output is None:
            raise RecipeError("where to? Pass -o OUT, or --dry-run to see what would be done.")
        from diffract.train import train as run_training

        first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
        with progress("train", quiet=silent or not first) as update:
            run = run_training(recipe, output, progress=update)
    if json and first:
        say_json(_summary(run))
    elif first:
        _show(run, quiet=quiet)


def _summary(run: TrainRun) -> dict[str, Any]:
    return {
        "output": str(run.folder),
        "final": str(run.final),
        "checkpoints": {str(tokens): str(path) for tokens, path in run.checkpoints.items()},
        "last": _last(run),
        "seconds": run.seconds,
        "warnings": list(run.warnings),
    }


def _show(run: TrainRun, *, quiet: bool) -> None:
    warn(list(run.warnings), quiet=quiet)
    last = _last(run)
    rate = size_text(last["tokens"] / run.seconds, " tokens/s")
    say(f"loss {last['loss']:.4f} after {last['tokens']:,} tokens in {run.seconds:.0f} s ({rate})", quiet=quiet)
    say(f"written: {run.final}", quiet=quiet)


def _last(run: TrainRun) -> dict[str, Any]:
    from diffract.train.records import read_log

    return read_log(run.log)[-1]


def _show_preview(found: TrainPreview, *, quiet: bool) -> None:
    say(f"{found.parameters:,} parameters, vocabulary of {found.vocabulary:,}", quiet=quiet)
    say(f"{found.steps:,} steps of {found.batch_tokens:,} tokens: {found.tokens:,} tokens", quiet=quiet)
    rows = [
        [name, f"{part['share']:.1%}", f"{part['available']:,}", f"{part['tokens']:,}", number(part["epochs"])]
        for name, part in found.parts.items()
    ]
    say_table(["part", "share", "tokens there", "tokens taken", "epochs"], rows, quiet=quiet)
    say(f"checkpoints after {', '.join(f'{tokens:,}' for tokens in found.checkpoints)} tokens", quiet=quiet)
