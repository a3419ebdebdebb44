"""``diffract plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffract.cli import options
from diffract.cli.console import explained, say


def _list(wanted: bool) -> None:
    if wanted:
        from diffract.plots import KINDS

        for name, kind in KINDS.items():
            say(f"{name:14s}{kind.summary}")
            say(f"{'':14s}options: {', '.join(f'--{option}' for option in kind.options)}")
        raise typer.Exit


def plot(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="What to draw; --list shows what there is.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Ends in .html (self-contained), .png, .svg or .pdf."),
    ],
    matrix: Annotated[
        str | None, typer.Option(metavar="NAME", help="By default the largest; of several the one that changed most.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="By default the first tuned one.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="A column of the metrics.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model that scores holds the others against.")
    ] = None,
    projection: Annotated[str | None, typer.Option(metavar="NAME", help="Such as q, or mlp.down.")] = None,
    layer: Annotated[int | None, typer.Option(metavar="N", help="Whose matrices ridge pools.")] = None,
    over: Annotated[str | None, typer.Option(metavar="NAME", help="Time axis: tokens, step or order.")] = None,
    axes: Annotated[
        str | None, typer.Option(metavar="Y-X", help="log-log or lin-log; for evolution lin-lin and log-lin too.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a search; the first, which decided, by default.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=100, metavar="PIXELS", help="Of the layout; 900 by default.")] = None,
    height: Annotated[int | None, typer.Option(min=100, metavar="PIXELS", help="Of the layout.")] = None,
    scale: Annotated[float, typer.Option(min=0.1, metavar="FACTOR", help="Pixels of a .png per pixel of it.")] = 2.0,
    listing: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show the kinds with their options, and exit.")
    ] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw one figure of a run. Needs no weights and no torch."""
    with explained(debug=debug):
        from diffract import plots

        plots.check_ending(output)
        made = plots.plot(
            kind,
            run,
            matrix=matrix,
            model=model,
            metric=metric,
            reference=reference,
            projection=projection,
            layer=layer,
            over=over,
            axes=axes,
            task=task,
        )
        path = plots.save(made, output, width=width, height=height, scale=scale)
    say(f"plot: {path}", quiet=quiet)
