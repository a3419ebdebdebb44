"""``diffract eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, number, progress, say, say_json, say_table, warn

if TYPE_CHECKING:
    import polars as pl

    from diffract.run import Run


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder with config.json, adapter folder, or org/name@revision.")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="Separated by commas, such as math,gsm:1-2,wiki=FILE,lm:NAME.")
    ] = "math,code,text",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="RUN", help="Write a run folder.")] = None,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="held-out to report; selection to choose by; train.")
    ] = "held-out",
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Holds a folder of files for each domain.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Items of each task at most.")] = None,
    shots: Annotated[int, typer.Option(metavar="N", help="Solved examples before each question.")] = 0,
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="A model, or a run of `eval`, to compare with item by item.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the tokenizer is, if not beside the model.")
    ] = None,
    device: options.Device = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, bfloat16, float16; auto: as stored, on a CPU float32.")
    ] = "auto",
    batch_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens computed at once, at most.")] = 16_384,
    cache: options.Cache = True,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """How good a model is at text, questions and choices, with intervals; and against another one."""
    with explained(debug=debug):
        from diffract.api import evaluate as run_evaluate
        from diffract.evaluate import compare_scores
        from diffract.evaluate.run import place

        first = place().rank == 0
        common: dict[str, Any] = {
            **{"tasks": tasks, "split": split, "data": data, "limit": limit, "shots": shots, "device": device},
            **{"dtype": dtype, "tokenizer": tokenizer, "batch_tokens": batch_tokens, "cache": cache},
        }
        with progress("eval", quiet=quiet or json or not first, unit="items") as update:
            found = run_evaluate(model, **common, output=output, force=force, progress=update)
        other = _other(against, common, quiet=quiet or json or not first) if against else None
        differences = compare_scores(other.tables, found.tables) if other else None
    if first and json:
        say_json(_summary(found, other, differences, output))
    elif first and not quiet:
        _show(found, other, differences, output)


def _other(against: str, common: dict[str, Any], *, quiet: bool) -> Run:
    """Read what is compared with from its run folder, or evaluate it in the same way."""
    from diffract.api import evaluate as run_evaluate
    from diffract.run import load_run

    if (Path(against) / "items.parquet").is_file():
        return load_run(against)
    with progress("eval, the other", quiet=quiet, unit="items") as update:
        return run_evaluate(against, **common, progress=update)


def _summary(found: Run, other: Run | None, differences: pl.DataFrame | None, output: Path | None) -> dict[str, Any]:
    kept = ("kind", "seconds", "settings", "models", "tasks", "warnings")
    against = {"models": other.manifest["models"], "summary": other.summary.to_dicts()} if other else None
    return {
        **{key: found.manifest[key] for key in kept},
        "summary": found.summary.to_dicts(),
        "against": against,
        "differences": differences.to_dicts() if differences is not None else None,
        "run": str(output) if output else None,
    }


def _show(found: Run, other: Run | None, differences: pl.DataFrame | None, output: Path | None) -> None:
    warn(found.manifest["warnings"], quiet=False)
    rows = [_row(row) for row in found.summary.iter_rows(named=True)]
    say_table(["task", "quality", "95% interval", "items", "unit", "better"], rows)
    if other is not None and differences is not None:
        before = dict(other.summary.select("task", "quality").iter_rows())
        lines = [_difference(row, before[row["task"]]) for row in differences.iter_rows(named=True)]
        headers = ["task", "other", "difference", "95% interval", "", "p", "p (Holm)"]
        say_table(headers, lines, title=f"Against {other.manifest['models'][0]['reference']}, item by item:")
    if output is not None:
        say(f"run: {output}")


def _row(row: dict[str, Any]) -> list[str]:
    chance = f" (chance {number(row['chance'])})" if row["chance"] is not None else ""
    interval = f"{number(row['low'], 4)} to {number(row['high'], 4)}"
    return [row["task"], number(row["quality"], 4), interval, str(row["items"]), row["unit"] + chance, row["better"]]


def _difference(row: dict[str, Any], before: float) -> list[str]:
    verdict = "better" if row["gain"] > 0 else "worse" if row["gain"] < 0 else "the same"
    interval = f"{row['low']:+.3g} to {row['high']:+.3g}"
    return [
        *(row["task"], number(before, 4), f"{row['difference']:+.3g}", interval, verdict),
        *(number(row["p"]), number(row["p_holm"])),
    ]
