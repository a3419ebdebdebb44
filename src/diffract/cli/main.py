"""The ``diffract`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from diffract._version import __version__
from diffract.cli import analyse, draw, edits, evaluate, heads, look, search, series, show, study, train

HELP = """See what a training stage did to a language model's weights.

A MODEL is a safetensors, .bin, .pt or .npz file, a folder of them, a PEFT LoRA folder, or org/name@revision on the hub.
"""

EPILOG = """Exit codes: 0 done; 1 the input is wrong, the message says what to do; 2 wrong usage;
3 an error in diffract; 130 interrupted (run the same command again: it continues)."""

app = typer.Typer(help=HELP, epilog=EPILOG, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
NEED_ARGUMENTS = (analyse.scan, analyse.compare, series.trajectory, heads.heads, look.inspect, show.report, draw.plot)
for command in (*NEED_ARGUMENTS, look.metrics, show.demo):
    app.command(no_args_is_help=command in NEED_ARGUMENTS, rich_help_panel="See")(command)
for command in (*edits.COMMANDS, edits.apply, edits.verify):
    app.command(no_args_is_help=True, rich_help_panel="Act")(command)
app.command("eval", no_args_is_help=True, rich_help_panel="Know")(evaluate.evaluate)
app.add_typer(search.app, name="search", rich_help_panel="Know")
app.command(no_args_is_help=True, rich_help_panel="Know")(search.connect)
app.command(no_args_is_help=True, rich_help_panel="Know")(train.train)
app.add_typer(study.app, name="study", rich_help_panel="Know")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffract {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":  # as torchrun -m and accelerate launch -m start it
    main()
