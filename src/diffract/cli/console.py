"""What goes to the terminal: results to standard output; progress, warnings and errors to standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from diffract.errors import DiffractError, printable
from diffract.settings import Progress, size_text

QUIET_SECONDS = 2.0
"""Nothing is said of what takes less."""

LINE_SECONDS = 10.0
"""Where there is no terminal, one plain line in this time."""

PIPE_WIDTH = 160
"""Columns of a table where there is no terminal to ask."""

EXIT_INPUT, EXIT_BUG, EXIT_INTERRUPTED = 1, 3, 130


@contextmanager
def explained(*, debug: bool) -> Iterator[None]:
    """Show errors as messages and exit with their code; with ``debug`` let them pass."""
    try:
        yield
    except DiffractError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_INPUT) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command again to continue", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        typer.echo(f"error in diffract: {type(error).__name__}: {printable(error)}. --debug shows where.", err=True)
        raise typer.Exit(EXIT_BUG) from error


@contextmanager
def progress(label: str, *, quiet: bool, unit: str = "") -> Iterator[Progress | None]:
    """Yield a function that shows how far work has come, with its rate and the time left.

    Args:
        label: What to call the work.
        quiet: Show nothing.
        unit: What is counted, in the plural; by default it is not said.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(label, unit) as update:
            yield update
    else:
        yield _lines(label, unit)


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    begun = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None, rate="", what="", visible=False)

        def update(done: float, total: float, what: str) -> None:
            seconds = time.monotonic() - begun
            name = escape(printable(what, 40))
            bars.update(
                task,
                completed=done,
                total=total,
                rate=_rate(done, seconds, unit),
                what=name,
                visible=seconds > QUIET_SECONDS,
            )

        yield update


def _lines(label: str, unit: str) -> Progress:
    begun = last = time.monotonic()

    def update(done: float, total: float, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (QUIET_SECONDS if last == begun else LINE_SECONDS):
            return
        last = now
        left = (now - begun) * (total - done) / done if done else 0.0
        rate = _rate(done, now - begun, unit)
        typer.echo(f"{label}: {done / total:.0%}, {rate}, {left:.0f} s left ({printable(what, 80)})", err=True)

    return update


def _rate(done: float, seconds: float, unit: str) -> str:
    if seconds <= 0:
        return ""
    return f"{done / seconds:.2g} {unit}/s" if unit else size_text(done / seconds, "/s")


def say(text: str, *, quiet: bool = False) -> None:
    """Print a line of results."""
    if not quiet:
        typer.echo(text)


def say_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", quiet: bool = False) -> None:
    """Print a table; the first column is text, the others are numbers."""
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(Text(printable(header, 40)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell, 60)) for cell in row))
    if title:
        say(f"\n{title}")
    Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def say_json(value: Any) -> None:
    """Print JSON; what is no number there is null."""
    typer.echo(json.dumps(value, indent=2, default=str, allow_nan=False))


def warn(texts: list[str], *, quiet: bool) -> None:
    """Print warnings."""
    for text in [] if quiet else texts:
        typer.echo(f"warning: {printable(text, 500)}", err=True)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people."""
    return "-" if value is None else f"{value:.{digits}g}"
