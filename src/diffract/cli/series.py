"""``diffract trajectory``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.analyse import check_output, summary
from diffract.cli.console import explained, progress, say, say_json, say_table, warn

if TYPE_CHECKING:
    from diffract.run import Run

NUMBERS = {
    "delta_relative": "change",
    "value_share": "in values",
    "head_top10_share": "top heads",
    "stable_rank_median": "stable rank",
    "peaked_matrices": "peaked",
}
"""What the table shows of ``models``, as far as it was computed, and what it calls it."""

LEGEND = {
    "change": "of the weights relative to {against} (Frobenius norm)",
    "in values": "share of it in singular values",
    "top heads": "share of it in the top tenth of heads",
    "stable rank": "median over matrices",
    "peaked": "matrices with at least two spectral peaks",
}


def trajectory(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Checkpoints in any order, or one folder of them; step500=MODEL names one."
        ),
    ],
    output: options.Output = None,
    by: Annotated[
        str,
        typer.Option(metavar="ORDER", help="step, tokens, name, given, or a regular expression with (?P<step>...)."),
    ] = "step",
    against: Annotated[
        str, typer.Option(metavar="NAME", help="Compare each with the previous checkpoint, or with the first.")
    ] = "previous",
    metrics: options.Metrics = None,
    select: options.Select = None,
    heads: options.Heads = True,
    architecture: options.ArchitectureFile = None,
    adapter_base: options.AdapterBase = None,
    allow_unmatched: options.AllowUnmatched = False,
    download: options.Download = False,
    method: options.Method = "auto",
    device: options.Device = "auto",
    engine: options.Engine = "local",
    cache: options.Cache = True,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """A training run over time: every checkpoint, and its change since the one before."""
    with explained(debug=debug), progress("trajectory", quiet=quiet or json) as update:
        check_output(output, force=force, vectors=False)
        from diffract.api import trajectory as run_trajectory

        run = run_trajectory(
            *models,
            by=by,
            against=against,
            metrics=metrics,
            select=select,
            heads=heads,
            architecture=architecture,
            adapter_base=adapter_base,
            allow_unmatched=allow_unmatched,
            download=download,
            method=method,  # pyright: ignore[reportArgumentType] (checked within)
            device=device,
            engine=engine,
            cache=cache,
            output=output,
            force=force,
            progress=update,
        )
    if json:
        say_json(summary(run, output))
    else:
        _show(run, output, against, quiet=quiet)


def _show(run: Run, output: Path | None, against: str, *, quiet: bool) -> None:
    warn(run.manifest["warnings"], quiet=quiet)
    rows = run.models.to_dicts()
    shown = [name for name in ("stage", "step", "tokens", *NUMBERS) if any(row.get(name) is not None for row in rows)]
    headers = ["checkpoint", *(NUMBERS.get(name, name) for name in shown)]
    say_table(headers, [[row["model"], *(_cell(name, row[name]) for name in shown)] for row in rows], quiet=quiet)
    known = [f"{header} {LEGEND[header]}" for header in headers if header in LEGEND]
    say("; ".join(known).format(against=f"the {against} checkpoint"), quiet=quiet or not known)
    if output is not None:
        say(f"report: {output / 'report.html'}", quiet=quiet)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("value_share", "head_top10_share"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if name in ("stage", "step", "tokens", "peaked_matrices") else f"{value:#.3g}".rstrip(".")
