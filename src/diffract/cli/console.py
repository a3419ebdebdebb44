"""What goes to the terminal: results to standard output; progress, warnings and errors to standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from diffract.errors import DiffractError, escape, printable

if TYPE_CHECKING:
    from diffract.settings import Progress

QUIET_SECONDS = 2.0
"""Nothing is said of what takes less."""

LINE_SECONDS = 10.0
"""Where there is no terminal, one plain line in this time."""

PIPE_WIDTH = 160
"""Columns of a table where there is no terminal to ask."""

Given = Mapping[str, Any]
"""What was given for a command's arguments and options, by name."""

EXIT_INPUT, EXIT_BUG, EXIT_INTERRUPTED = 1, 3, 130


@contextmanager
def explained(*, debug: bool) -> Iterator[None]:
    """Show errors as messages and exit with their code; with ``debug`` let them pass."""
    try:
        yield
    except DiffractError as error:
        if debug:
            raise
        note(f"error: {error}")
        raise typer.Exit(EXIT_INPUT) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; run the same command again to continue", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):  # of a pipe whose reader has seen enough nothing is said
        raise
    except Exception as error:
        if debug:
            raise
        if _interrupted(error):
            typer.echo("interrupted; run the same command again to continue", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        typer.echo(f"error in diffract: {type(error).__name__}: {printable(error)}. --debug shows where.", err=True)
        raise typer.Exit(EXIT_BUG) from error


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error came while an interruption was on its way up: libraries that are half imported raise such."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextmanager
def progress(label: str, *, quiet: bool, unit: str = "") -> Iterator[Progress | None]:
    """Yield a function that shows how far work has come, with its rate and the time left.

    Args:
        label: What to call the work.
        quiet: Show nothing.
        unit: What is counted, in the plural; by default bytes or operations are counted, and their name is not said.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(label, Pace(unit)) as update:
            yield update
    else:
        yield _lines(label, Pace(unit))


class Pace:
    """How fast work goes on.

    Attributes:
        unit: What is counted.
        begun: When the work began.
        done: How much of it was done when it was last told.
    """

    def __init__(self, unit: str) -> None:
        self.unit, self.begun, self.done = unit, time.monotonic(), 0.0

    def seconds(self, done: float, now: float) -> float:
        """Return how long the work has taken."""
        # One command may do several works, such as a row of checkpoints: each is timed from its own beginning, or the
        # time left would be guessed from the rate of the one before.
        if done < self.done:
            self.begun = now
        self.done = done
        return now - self.begun

    def rate(self, seconds: float) -> str:
        """Return how much is done in a second."""
        from diffract.settings import size_text

        if seconds <= 0:
            return ""
        return f"{self.done / seconds:.2g} {self.unit}/s" if self.unit else size_text(self.done / seconds, "/s")


@contextmanager
def _bar(label: str, pace: Pace) -> Iterator[Progress]:
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
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None, rate="", what="", visible=False)

        def update(done: float, total: float, what: str) -> None:
            seconds = pace.seconds(done, time.monotonic())
            fields: dict[str, Any] = {"rate": pace.rate(seconds), "what": escape(printable(what, 40))}
            bars.update(task, completed=done, total=total, visible=seconds > QUIET_SECONDS, **fields)

        yield update


def _lines(label: str, pace: Pace) -> Callable[[float, float, str], None]:
    begun = last = pace.begun

    def update(done: float, total: float, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        seconds = pace.seconds(done, now)
        if now - last < (QUIET_SECONDS if last == begun else LINE_SECONDS):
            return
        last = now
        left = seconds * (total - done) / done if done else 0.0
        typer.echo(
            f"{label}: {done / total:.0%}, {pace.rate(seconds)}, {left:.0f} s left ({printable(what, 80)})", err=True
        )

    return update


def say(text: str) -> None:
    """Print a line of results."""
    typer.echo(escape(text, keep="\n"))


def note(text: str) -> None:
    """Print a line that is no result to standard error: what is being done, or what is wrong."""
    # Every line passes here: a name that steers the terminal may come from any file, and reach any message.
    typer.echo(escape(text, keep="\n"), err=True)


def warn(texts: Sequence[str]) -> None:
    """Print warnings."""
    for text in texts:
        note(f"warning: {printable(text, 500)}")


def say_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table; the first column is text, the others are numbers."""
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


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people."""
    return "-" if value is None else f"{value:.{digits}g}"


def interval(low: float | None, high: float | None, form: str = ".3g") -> str:
    """Return an interval for people."""
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def percent(share: float | None) -> str:
    """Return a share for people, as whole percent."""
    return "-" if share is None else f"{share:.0%}"


def everything(found: Any, given: Given) -> Any:
    """Return all that was found."""
    return found if isinstance(found, dict) else asdict(found)


def kept(manifest: Mapping[str, Any], further: Sequence[str] = ()) -> dict[str, Any]:
    """Return what every summary takes from a manifest, and what else there is of it."""
    names = ("kind", "seconds", "timing", "settings", *further, "warnings")
    return {name: manifest[name] for name in names if name in manifest}


def place(given: Given, name: str = "") -> str | None:
    """Return where a run was written, or a file in it; ``None`` if nowhere."""
    return str(given["output"] / name) if given["output"] else None


def say_place(given: Given, what: str, name: str = "") -> None:
    """Print where a run, or a file in it, was written, if anywhere."""
    if (written := place(given, name)) is not None:
        say(f"{what}: {written}")
