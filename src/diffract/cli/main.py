"""The ``diffract`` command."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffract._version import __version__
from diffract.cli.commands import COMMANDS, GROUPS, all_commands
from diffract.cli.console import note
from diffract.cli.generate import Command, function_of, parameters, signatures
from diffract.errors import DiffractWarning

HELP = """See what a training stage did to a language model's weights.

A MODEL is a safetensors, .bin, .pt or .npz file, a folder of them, a PEFT LoRA folder, or org/name@revision on the hub.
"""

EPILOG = """Exit codes: 0 done; 1 the input is wrong, the message says what to do; 2 wrong usage;
3 an error in diffract; 130 interrupted (run the same command again: it continues)."""

PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}


def _add(app: typer.Typer, command: Command, panel: str | None = None) -> None:
    """Add a command to an application; without a word it shows its help, if it needs any argument."""
    needs = any(parameter.argument for parameter in parameters(command))
    name = command.name.rpartition(" ")[2]
    app.command(name, no_args_is_help=needs, rich_help_panel=panel)(function_of(command))


@cache
def made(name: str) -> Any:
    """Make the command, or the group of commands, of a name."""
    app = typer.Typer(name=name, help=GROUPS.get(name), no_args_is_help=True, **PLAIN)
    if name in GROUPS:
        for command in COMMANDS:
            if command.name.startswith(f"{name} "):
                _add(app, command)
        return typer.main.get_group(app)
    # Records of edits are imported for the names of edits only.
    found = next((c for commands in (COMMANDS, all_commands()) for c in commands if c.name == name), None)
    if found is None:
        raise KeyError(name)
    _add(app, found, found.panel)
    return typer.main.get_command(app)


@cache
def listed(name: str) -> Any:
    """Make what a list shows of a command or a group: its name, its first line and its panel."""
    command = next(command for command in all_commands() if command.name.partition(" ")[0] == name)
    app = typer.Typer(**PLAIN)
    text = GROUPS.get(name) or next(signatures(command)).text
    app.command(name, help=text, rich_help_panel=command.panel)(lambda: None)
    return typer.main.get_command(app)


@dataclass(frozen=True)
class LazyCommands(Mapping[str, Any]):
    """Commands by name, each made when it is asked for; a command would have to wait for all the others.

    Attributes:
        make: Makes one.
    """

    make: Callable[[str], Any]

    def __getitem__(self, name: str) -> Any:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys(command.name.partition(" ")[0] for command in all_commands())

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Diffract(TyperGroup):
    """The group of all commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands(made)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page. Its list needs no options, and to make those of all commands takes longest."""
        self.commands = LazyCommands(listed)
        super().format_help(ctx, formatter)
        self.commands = LazyCommands(made)


app = typer.Typer(cls=Diffract, help=HELP, epilog=EPILOG, no_args_is_help=True, **PLAIN)


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
    """Run the command line. Being asked to end, as schedulers and containers do, counts as Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has the second one ignored
            signal.signal(number, signal.default_int_handler)
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, DiffractWarning):
            note(f"warning: {message}")
        else:
            show(message, category, *place)

    warnings.showwarning = tell
    app()


if __name__ == "__main__":  # as torchrun -m and accelerate launch -m start it
    main()
