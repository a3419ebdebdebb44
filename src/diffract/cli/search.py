"""``diffract search rewind`` and ``truncate``, and ``diffract connect``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, number, progress, say, say_json, say_table, warn
from diffract.errors import RunError

if TYPE_CHECKING:
    import polars as pl

    from diffract.run import Run
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


CHOSEN = ("best at", "selection", "held-out", "95%", "no loss to", "held-out")
"""What is said of a curve: its best point, and the furthest without loss."""


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
    given = dict(locals())
    with explained(debug=debug):
        from diffract.run import Run
        from diffract.search import search_rewind

        found = _run(search_rewind, [given.pop("base"), given.pop("tuned")], given)
        if isinstance(found, Run):
            tables = {"choice": found.choice, "orders": found.orders, "effects": found.effects}
            _end(found.manifest, tables, given, lambda: _show_rewind(found))


@app.command(no_args_is_help=True)
def truncate(
    base: Base,
    tuned: Tuned,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="drop, energy, donoho-gavish, mp-edge, and controls: tail, random, random-energy, dare-energy, "
            "dare-bytes; separated by commas, all by default.",
        ),
    ] = None,
    eval_: Eval = "math",
    output: Output = None,
    fractions: Fractions = "0:1:0.125",
    seeds: Seeds = 3,
    tolerance: Tolerance = None,
    choose_by: ChooseBy = "best",
    write: Write = None,
    dry_run: DryRun = False,
    budget: Budget = None,
    limit: Limit = None,
    shots: Shots = 0,
    data: Data = None,
    device: options.Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    architecture: options.ArchitectureFile = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """How much of the change is needed: curves of several rules, against controls of equal energy and bytes."""
    given = dict(locals())
    with explained(debug=debug):
        from diffract.run import Run
        from diffract.search import search_truncate

        found = _run(search_truncate, [given.pop("base"), given.pop("tuned")], given)
        if isinstance(found, Run):
            _end(found.manifest, {"choice": found.choice}, given, lambda: _show_truncate(found))


def connect(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What all descend from; its tokenizer serves for all.")],
    models: Annotated[list[str], typer.Argument(metavar="NAME=MODEL...", help="Two or more, such as math=PATH.")],
    eval_: Annotated[
        str, typer.Option("--eval", metavar="TASKS", help="Those called like two models count between them.")
    ],
    output: Output = None,
    steps: Annotated[int, typer.Option(min=3, metavar="N", help="Places on each line, both ends included.")] = 11,
    grid: Annotated[int, typer.Option(min=1, metavar="N", help="Steps on an edge of the simplex of three.")] = 5,
    scale: Annotated[float, typer.Option(metavar="FACTOR", help="Of the mixed change on the simplex.")] = 1.0,
    tolerance: Annotated[
        float, typer.Option(metavar="LOSS", help="Connected: the barrier's interval ends below it.")
    ] = 0.01,
    dry_run: DryRun = False,
    budget: Budget = None,
    limit: Limit = None,
    shots: Shots = 0,
    data: Data = None,
    device: options.Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    architecture: options.ArchitectureFile = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Are models of several domains connected: quality on the lines between them, and barriers."""
    given = dict(locals())
    with explained(debug=debug):
        from diffract.run import Run
        from diffract.search import connect as run_connect

        found = _run(run_connect, [given.pop("base"), *given.pop("models")], given)
        if isinstance(found, Run):
            _end(found.manifest, {"pairs": found.pairs}, given, lambda: _show_connect(found))


def _run(search: Callable[..., Any], models: list[str], given: dict[str, Any]) -> Any:
    """Search; of a dry run show what it would cost."""
    if given["output"] is None and not given["dry_run"]:
        raise RunError("where to? Pass -o RUN, or --dry-run to see what it would cost.")
    from diffract.search.plan import Estimate

    silent = given["quiet"] or given["json"]
    options_ = {name.rstrip("_"): value for name, value in given.items() if name not in ("quiet", "json", "debug")}
    with progress("search", quiet=silent, unit=UNIT) as update:
        found = search(*models, **options_, progress=update)
    if isinstance(found, Estimate):
        _show_estimate(found, json=given["json"], quiet=given["quiet"])
    return found


def _end(
    manifest: Mapping[str, Any], tables: Mapping[str, pl.DataFrame], given: Mapping[str, Any], show: Callable[[], None]
) -> None:
    """Say what was found."""
    if given["json"]:
        say_json(_summary(manifest, tables, given["output"]))
    elif not given["quiet"]:
        warn([*manifest["warnings"], *(f"left out: {text}" for text in manifest["left_out"])], quiet=False)
        show()
        say(f"run: {given['output']}")


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
    found = {key: manifest[key] for key in kept if key in manifest}
    return {**found, **{name: table.to_dicts() for name, table in tables.items()}, "run": str(output)}


def _show_rewind(found: Run) -> None:
    _say_task(found.manifest)
    pairs = _pairs(found.choice)
    say_table(["order", *CHOSEN], [[_order(best), *_chosen(best, far, "fraction")] for best, far in pairs])
    if found.orders.height:
        ranks = [[row["order"], number(row["spearman"])] for row in found.orders.rows(named=True)]
        say_table(["order", "rank correlation"], ranks, title="How orders rank heads, against measured effects:")
    _say_written(found.manifest)


def _show_truncate(found: Run) -> None:
    _say_task(found.manifest)
    pairs = _pairs(found.choice)
    rows = [[_numbered(best["rule"], best["seed"]), *_chosen(best, far, "bytes")] for best, far in pairs]
    say_table(["rule", *CHOSEN], rows)
    say("points are the share of the change's bytes that is kept")
    _say_written(found.manifest)


def _show_connect(found: Run) -> None:
    tolerance = found.manifest["settings"]["tolerance"]
    say(f"barriers on the held-out split, in the tasks' units; connected below {tolerance:g}")
    rows = [
        [
            f"{row['a']} - {row['b']}",
            row["task"] if row["counts"] else f"({row['task']})",
            number(row["quality_a"]),
            number(row["quality_b"]),
            number(row["barrier"]),
            f"{number(row['low'])} to {number(row['high'])}",
            f"{row['at']:.3g}",
            "yes" if row["pair_connected"] else "no",
        ]
        for row in found.pairs.rows(named=True)
    ]
    say_table(["models", "task", "quality a", "quality b", "barrier", "95%", "at", "connected"], rows)


def _say_task(manifest: Mapping[str, Any]) -> None:
    task = manifest["tasks"]["held-out"][0]
    say(f"{task['name']}: gain in {task['unit']}, positive is better; chosen on selection, reported on held-out")


def _pairs(choice: pl.DataFrame) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the best point of each curve, and the furthest without loss."""
    rows = choice.rows(named=True)
    return [(row, other) for row, other in zip(rows[::2], rows[1::2], strict=True)]


def _chosen(best: Mapping[str, Any], far: Mapping[str, Any], at: str) -> list[str]:
    interval = f"{number(best['held_out_gain_low'])} to {number(best['held_out_gain_high'])}"
    gains = [number(best["selection_gain"]), number(best["held_out_gain"]), interval]
    return [f"{best[at]:.3g}", *gains, f"{far[at]:.3g}", number(far["held_out_gain"])]


def _order(row: Mapping[str, Any]) -> str:
    return f"{_numbered(row['order'], row['seed'])}{' reversed' if row['reverse'] else ''}"


def _numbered(name: str, seed: int) -> str:
    return f"{name} {seed}" if name.partition("-")[0] in ("random", "dare") else name


def _say_written(manifest: Mapping[str, Any]) -> None:
    written = manifest["written"]
    if written:
        scores = ", ".join(f"{row['task']} {row['written']:.4g}" for row in written["held_out"])
        same = "as the live model" if written["same_scores"] else "not quite as the live model"
        say(f"written: {written['folder']} ({scores}, {same})")
