"""``diffract inspect`` and ``diffract metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from diffract.cli import options
from diffract.cli.console import explained, say, say_json, warn
from diffract.errors import printable
from diffract.settings import size_text

if TYPE_CHECKING:
    from diffract.api import Inspection


def inspect(
    model: options.Model,
    select: options.Select = None,
    heads: options.Heads = True,
    architecture: options.ArchitectureFile = None,
    adapter_base: options.AdapterBase = None,
    download: options.Download = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """What is in a checkpoint, how it will be sliced, and what a scan will cost. Reads headers only."""
    with explained(debug=debug):
        from diffract.api import inspect as look

        found = look(
            model,
            select=select,
            heads=heads,
            architecture=architecture,
            adapter_base=adapter_base,
            download=download,
        )
    if json:
        say_json(found.as_dict())
        return
    say(_describe(found), quiet=quiet)
    warn(list(found.warnings), quiet=quiet)


def _describe(found: Inspection) -> str:
    known = ", ".join(f"{k} {v}" for k, v in found.dimensions.items() if v is not None)
    lines = [
        printable(found.reference),
        f"  architecture  {found.family}" + (f" ({known})" if known else ""),
        f"  tensors       {found.tensors}, {size_text(found.parameters, '')} parameters, {size_text(found.size_bytes)}",
        f"  a scan takes  {found.matrices} matrices:",
    ]
    for kind in found.kinds:
        rows, cols = kind.shape
        lines.append(f"    {kind.count:6d} x {printable(kind.part):24s} {rows} x {cols}  {kind.dtype}")
    if found.left_out:
        left = ", ".join(f"{count} {outcome}" for outcome, count in found.left_out.items())
        lines.append(f"  left out      {left}")
    work, seconds = size_text(found.multiplications, ""), found.seconds_per_core
    lines.append(f"  cost          about {work} multiplications, {_duration(seconds)} on one core, ")
    lines[-1] += f"{size_text(found.peak_bytes)} of workspace for the largest tensor"
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 60
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )


def metrics(
    facts: Annotated[bool, typer.Option("--facts", help="List what a metric of one's own can be made of.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """The catalog: name, meaning, unit, range, source."""
    with explained(debug=debug):
        from diffract.metrics import FACTS, GROUPS, installed_metrics

        if facts:
            found = [{"name": name, "needs": fact.need, "summary": fact.summary} for name, fact in FACTS.items()]
            say_json({"facts": found}) if json else say(
                "\n".join(f"{f['name']}  (needs {f['needs']})\n    {f['summary']}" for f in found)
            )
            return
        rows = [
            {
                "name": m.name,
                "group": group,
                "of": "pair" if m.pair else "matrix",
                "needs": m.needs,
                "summary": m.summary,
                "unit": m.unit,
                "range": m.range,
                "source": m.source,
            }
            for group, members in GROUPS.items()
            for m in members
        ]
        extensions = sorted(installed_metrics())
    if json:
        say_json({"metrics": rows, "extensions": extensions})
        return
    for row in rows:
        say(f"{row['name']}  ({row['group']}, of a {row['of']}, needs {row['needs']})")
        source = f"  [{row['source']}]" if row["source"] else ""
        say(f"    {row['summary']}; unit {row['unit']}, range {row['range']}{source}")
    if extensions:
        say("installed extensions: " + ", ".join(extensions))
