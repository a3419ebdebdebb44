"""``diffract scan`` and ``diffract compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, number, progress, say, say_json, warn
from diffract.settings import size_text

if TYPE_CHECKING:
    from diffract.run import Run


def scan(
    model: options.Model,
    output: options.Output = None,
    metrics: options.Metrics = None,
    select: options.Select = None,
    heads: options.Heads = True,
    circuits: options.Circuits = False,
    vectors: options.Vectors = False,
    architecture: options.ArchitectureFile = None,
    adapter_base: options.AdapterBase = None,
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
    """Spectra and metrics of every matrix and every attention head of a checkpoint."""
    with explained(debug=debug), progress("scan", quiet=quiet or json) as update:
        check_output(output, force=force, vectors=vectors)
        from diffract.api import scan as run_scan

        run = run_scan(
            model,
            metrics=metrics,
            select=select,
            heads=heads,
            circuits=circuits,
            vectors=vectors,
            architecture=architecture,
            adapter_base=adapter_base,
            download=download,
            method=method,  # pyright: ignore[reportArgumentType] (checked within)
            device=device,
            engine=engine,
            cache=cache,
            output=output,
            force=force,
            progress=update,
        )
    _show(run, output, quiet=quiet, as_json=json)


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the others descend from.")],
    tuned: Annotated[list[str], typer.Argument(metavar="TUNED...", help="One or more; math=MODEL names one.")],
    output: options.Output = None,
    metrics: options.Metrics = None,
    select: options.Select = None,
    heads: options.Heads = True,
    circuits: options.Circuits = False,
    vectors: options.Vectors = False,
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
    """The same for a base and its tuned checkpoints, their alignment, and the change."""
    with explained(debug=debug), progress("compare", quiet=quiet or json) as update:
        check_output(output, force=force, vectors=vectors)
        from diffract.api import compare as run_compare

        run = run_compare(
            base,
            *tuned,
            metrics=metrics,
            select=select,
            heads=heads,
            circuits=circuits,
            vectors=vectors,
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
    _show(run, output, quiet=quiet, as_json=json)


def check_output(output: Path | None, *, force: bool, vectors: bool) -> None:
    """Say what is wrong with the output before hours of work, not after."""
    from diffract.errors import RunError
    from diffract.store import refuse_existing

    if output is not None:
        refuse_existing(output, force=force)
    elif vectors:
        raise RunError("--vectors needs a place for them. Pass -o RUN.")


def _show(run: Run, output: Path | None, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        say_json(summary(run, output))
        return
    warn(run.manifest["warnings"], quiet=quiet)
    for row in run.models.iter_rows(named=True):
        say(_sentence(row), quiet=quiet)
    if output is not None:
        say(f"report: {output / 'report.html'}", quiet=quiet)


def summary(run: Run, output: Path | None) -> dict[str, Any]:
    """Return what ``--json`` prints of a run."""
    kept = ("kind", "seconds", "settings", "warnings")
    return {
        **{k: run.manifest[k] for k in kept},
        "models": run.models.to_dicts(),
        "run": str(output) if output else None,
        "report": str(output / "report.html") if output else None,
    }


def _sentence(row: dict[str, Any]) -> str:
    head = f"{row['model']} ({row['role']}, {row['family']}): "
    what = f"{size_text(row['parameters'], '')} parameters, {row['matrices']} matrices"
    if row["role"] != "tuned":
        return head + what
    parts = [f"relative change {number(row.get('delta_relative'))}"]
    if row.get("value_share") is not None:
        parts.append(f"{row['value_share']:.1%} of it in singular values (chance {row['value_share_chance']:.2%})")
    if row.get("head_top10_share") is not None:
        chance = row["head_top10_share_chance"]
        parts.append(f"top tenth of heads carries {row['head_top10_share']:.0%} (even spread {chance:.0%})")
    return head + "; ".join(parts)
