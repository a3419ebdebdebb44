"""``diffract report`` and ``diffract demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffract.cli import analyse, options
from diffract.cli.console import explained, say

SAMPLES = Path("samples/tiny-olmo2")
DOMAINS = ("natural", "math", "code", "instructions")
DEMO_RUN = Path("demo-run")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of scan, compare, trajectory or heads.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write; RUN/report.html by default."),
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Redraw report.html from a saved run. Needs no weights and no torch."""
    with explained(debug=debug):
        from diffract import report as drawing
        from diffract.tables import load

        path = drawing.write(load(run), output or run / "report.html")
    say(f"report: {path}", quiet=quiet)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Where the run goes.")] = DEMO_RUN,
    samples: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The sample family; it comes with the source repository.")
    ] = SAMPLES,
    force: options.Force = True,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare a small trained model with its four continuations, with a report at the end."""
    with explained(debug=debug):
        if not (samples / "base").is_dir():
            from diffract.errors import CheckpointError

            raise CheckpointError(
                f"no sample family at {str(samples)!r}. Run this in a clone of the repository, or pass --samples."
            )
    analyse.compare(
        f"base={samples / 'base'}",
        [f"{domain}={samples / domain}" for domain in DOMAINS],
        metrics="all",
        output=output,
        force=force,
        quiet=quiet,
        json=json,
        debug=debug,
    )
