"""``diffract search rewind`` and ``truncate``, and ``diffract connect``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, number, progress, say, say_json, say_table, warn
from diffract.errors import RunError

if TYPE_CHECKING:
    import polars as pl

    from diffract.search.plan import Estimate

app = typer.Typer(help="Search by measured quality: which heads, how many directions.", no_args_is_help=True)

Base = Annotated[str, typer.Argument(metavar="BASE", help="What the tuned model descends from.")]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The model that is searched.")]
Eval = Annotated[
    str,
    typer.Option("--eval", metavar="TASKS", help="Tasks, separated by commas; the first decides (docs/evaluate.md)."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="RUN", help="Write a run folder.")]
Write = Annotated[Path | None, typer.Option(metavar="OUT", help="Write the chosen checkpoint here, and score it.")]
Fractions = Annotated[str, typer.Option(metavar="FROM:TO:STEP", help="Or a list, such as 0,0.1,0.5.")]
Seeds = Annotated[int, typer.Option(metavar="N", help="How many random ones.")]
Tolerance = Annotated[
    float | None,
    typer.Option(metavar="LOSS", help="Largest loss that must be excluded; without it, no loss is none that is shown."),
]
ChooseBy = Annotated[str, typer.Option(metavar="NAME", help="What is written: best or without-loss.")]
Budget = Annotated[
    str | None, typer.Option(metavar="LIMIT", help="Most evaluations, such as 200, or most time, such as 30m.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; one evaluation is timed.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Items of each task at most, in each split.")]
Shots = Annotated[int, typer.Option(min=0, metavar="N", help="Solved examples before each question.")]
Data = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the files of tasks are.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")]
Tokenizer = Annotated[str | None, typer.Option(metavar="MODEL", help="Where it is not beside the model.")]

UNIT = "evaluations"


def _asked(output: Path | None, dry_run: bool) -> None:
    if output is None and not dry_run:
        raise RunError("where to? Pass -o RUN, or --dry-run to see what it would cost.")


@app.command(no_args_is_help=True)
def rewind(
    base: Base,
    tuned: Tuned,
    order: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="greedy, reference, magnitude, random, first-order, activation, separated by commas; "
            "all that can be had by default.",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base tuned on reference text, for order reference.")
    ] = None,
    eval_: Eval = "math",
    output: Output = None,
    fractions: Fractions = "0:1:0.125",
    seeds: Seeds = 3,
    kv: Annotated[str, typer.Option(metavar="NAME", help="When shared heads go: all, majority or never.")] = "all",
    tolerance: Tolerance = None,
    choose_by: ChooseBy = "best",
    write: Write = None,
    dry_run: DryRun = False,
    budget: Budget = None,
    limit: Limit = None,
    shots: Shots = 0,
    data: Data = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Sample text for first-order and activation; the first task's by default."),
    ] = None,
    device: options.Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    architecture: options.ArchitectureFile = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Which heads can go back to the base: curves of several orders, and the best point."""
    with explained(debug=debug):
        _asked(output, dry_run)
        from diffract.search.plan import Estimate
        from diffract.search.rewind import search_rewind

        with progress("search", quiet=quiet or json, unit=UNIT) as update:
            found = search_rewind(
                base,
                tuned,
                order=order,
                reference=reference,
                eval=eval_,
                output=output,
                fractions=fractions,
                seeds=seeds,
                kv=kv,  # pyright: ignore[reportArgumentType] (checked there)
                tolerance=tolerance,
                choose_by=choose_by,  # pyright: ignore[reportArgumentType] (checked there)
                write=write,
                dry_run=dry_run,
                budget=budget,
                limit=limit,
                shots=shots,
                data=data,
                text=text,
                device=device,
                dtype=dtype,
                tokenizer=tokenizer,
                architecture=architecture,
                force=force,
                progress=update,
            )
        if isinstance(found, Estimate):
            _show_estimate(found, json=json, quiet=quiet)
        elif json:
            tables = {"choice": found.choice, "orders": found.orders, "effects": found.effects}
            say_json(_summary(found.manifest, tables, output))
        elif not quiet:
            _show_rewind(found, output)


def _show_estimate(found: Estimate, *, json: bool, quiet: bool) -> None:
    if json:
        say_json(vars(found))
        return
    for split, count in found.evaluations.items():
        say(f"{split:<10} {count} evaluations of {number(found.seconds_each[split])} s", quiet=quiet)
    say(f"together   {number(found.seconds)} s, at most: equal models are evaluated once", quiet=quiet)
    for text in found.left_out:
        say(f"left out   {text}", quiet=quiet)


def _summary(manifest: Mapping[str, Any], tables: Mapping[str, pl.DataFrame], output: Path | None) -> dict[str, Any]:
    kept = ("kind", "seconds", "settings", "evaluations", "left_out", "chosen", "written", "warnings")
    found = {key: manifest.get(key) for key in kept}
    return {**found, **{name: table.to_dicts() for name, table in tables.items()}, "run": str(output)}


def _show_rewind(found: Any, output: Path | None) -> None:
    manifest = found.manifest
    warn([*manifest["warnings"], *(f"left out: {text}" for text in manifest["left_out"])], quiet=False)
    task = manifest["tasks"]["held-out"][0]
    say(f"{task['name']}: gain in {task['unit']}, positive is better; chosen on selection, reported on held-out")
    rows = [
        [
            _named(row),
            row["which"],
            f"{row['fraction']:.4g}",
            number(row["selection_gain"]),
            number(row["held_out_gain"]),
            f"{number(row['held_out_gain_low'])} to {number(row['held_out_gain_high'])}",
        ]
        for row in found.choice.iter_rows(named=True)
    ]
    say_table(["order", "point", "fraction", "selection", "held-out", "95%"], rows)
    if found.orders.height:
        ranks = [[row["order"], number(row["spearman"])] for row in found.orders.iter_rows(named=True)]
        say_table(["order", "rank correlation"], ranks, title="How orders rank heads, against measured effects:")
    _show_written(manifest)
    if output is not None:
        say(f"run: {output}")


def _named(row: Mapping[str, Any]) -> str:
    seed = f" {row['seed']}" if row["order"] == "random" else ""
    return f"{row['order']}{seed}{' reversed' if row['reverse'] else ''}"


def _show_written(manifest: Mapping[str, Any]) -> None:
    written = manifest.get("written")
    if written:
        same = "scores as the live model did" if written["same_scores"] else "DIFFERS from the live model's scores"
        say(f"written: {written['folder']} ({same})")
