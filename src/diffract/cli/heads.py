"""``diffract heads``."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, number, progress, say, say_json, say_table, warn

if TYPE_CHECKING:
    import polars as pl

    from diffract.run import Run

SHOWN = 5
"""Heads of each domain that are shown."""


def heads(
    base: Annotated[str, typer.Argument(metavar="BASE", help="What the others descend from.")],
    tuned: Annotated[
        list[str], typer.Argument(metavar="TUNED...", help="One or more, one per domain; math=MODEL names one.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="RUN", help="Write a run folder.")] = None,
    projections: Annotated[
        str, typer.Option(metavar="NAMES", help="Which slices of a head count, separated by commas.")
    ] = "q,k,v,o",
    architecture: options.ArchitectureFile = None,
    adapter_base: options.AdapterBase = None,
    allow_unmatched: options.AllowUnmatched = False,
    download: options.Download = False,
    device: options.Device = "auto",
    engine: options.Engine = "local",
    cache: options.Cache = True,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Which attention heads change, in one domain or in all."""
    with explained(debug=debug):
        from diffract.api import heads as run_heads
        from diffract.metrics import split_names

        with progress("heads", quiet=quiet or json) as update:
            run = run_heads(
                base,
                *tuned,
                projections=split_names(projections),
                architecture=architecture,
                adapter_base=adapter_base,
                allow_unmatched=allow_unmatched,
                download=download,
                device=device,
                engine=engine,
                cache=cache,
                output=output,
                force=force,
                progress=update,
            )
    if json:
        say_json(_summary(run, output))
    elif not quiet:
        _show(run, output)


def _summary(run: Run, output: Path | None) -> dict[str, Any]:
    kept = ("kind", "seconds", "settings", "warnings")
    return {
        **{k: run.manifest[k] for k in kept},
        "models": run.models.to_dicts(),
        "domains": run.domains.to_dicts(),
        "most_changed": {name: top.to_dicts() for name, top in _most_changed(run).items()},
        "most_specific": {name: top.to_dicts() for name, top in _most_specific(run).items()},
        "run": str(output) if output else None,
    }


def _show(run: Run, output: Path | None) -> None:
    warn(run.manifest["warnings"], quiet=False)
    domains = run.models.filter(role="tuned")
    count = run.heads.height // domains.height
    for row in domains.iter_rows(named=True):
        say(_sentence(row, count))
    _say_heads("Most changed heads and the norm of their change:", _most_changed(run), "head_delta")
    if domains.height > 1:
        _say_heads("Most specific heads and their lowest score against another domain:", _most_specific(run), "score")
        chance = number(run.domains["cosine_chance"].max())  # pyright: ignore[reportArgumentType] (Float64)
        title = f"Rank correlation of head changes above, cosine of the changes below (chance 0 ± {chance}):"
        say_table(["", *_names(run)], _matrix(run), title=title)
        agnostic = domains["agnostic_share"][0]
        say(f"Domain-agnostic part of the attention's change, all domains together: {_percent(agnostic)} (chance 0%)")
    if output is not None:
        say(f"run: {output}")


def _sentence(row: dict[str, Any], count: int) -> str:
    share, chance = row["head_top10_share"], row["head_top10_share_chance"]
    parts = [f"relative change of attention {number(row['attention_delta_relative'])}"]
    if share is not None:
        parts.append(f"top tenth of {count} heads carries {_percent(share)} (even spread {_percent(chance)})")
        parts.append(f"Gini {number(row['head_gini'])}")
    if row["shared_cosine"] is not None:
        parts.append(f"cosine with the other domains' mean {number(row['shared_cosine'])}")
    return f"{row['model']}: " + "; ".join(parts)


def _most_changed(run: Run) -> dict[str, pl.DataFrame]:
    """The heads of each domain whose change is the largest."""
    known = run.heads.filter(run.heads["rank"].is_not_null())
    kept = ["layer", "block", "head", "head_delta", "head_delta_relative", "shared_share"]
    return {name: known.filter(model=name).sort("rank").select(kept).head(SHOWN) for name in _names(run)}


def _most_specific(run: Run) -> dict[str, pl.DataFrame]:
    """The heads of each domain whose lowest score against any other is the highest."""
    scores = run.scores.filter(run.scores["score"].is_not_null()).drop("reference")
    lowest = scores.group_by("domain", "layer", "block", "head", maintain_order=True).min()
    ordered = lowest.sort("score", descending=True, maintain_order=True)
    return {name: ordered.filter(domain=name).drop("domain").head(SHOWN) for name in _names(run)}


def _names(run: Run) -> list[str]:
    return run.models.filter(role="tuned")["model"].to_list()


def _say_heads(title: str, tops: dict[str, pl.DataFrame], column: str) -> None:
    """One column of heads for each domain."""
    cells = [[_named(row, row[column]) for row in top.iter_rows(named=True)] for top in tops.values()]
    ranks = [[str(rank), *row] for rank, row in enumerate(zip_longest(*cells, fillvalue=""), start=1)]
    say_table(["", *tops], ranks, title=title)


def _named(row: dict[str, Any], value: float) -> str:
    block = "" if row["block"] == "attn" else f"{row['block']} "
    return f"{block}L{row['layer']} h{row['head']}  {number(value)}"


def _matrix(run: Run) -> list[list[str]]:
    """Spearman's correlation above the diagonal, cosine below it."""
    names = _names(run)
    found = {(row["a"], row["b"]): row for row in run.domains.iter_rows(named=True)}

    def cell(a: str, b: str) -> str:
        if a == b:
            return ""
        return number(found[a, b]["spearman"] if (a, b) in found else found[b, a]["cosine"])

    return [[a, *(cell(a, b) for b in names)] for a in names]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
