"""The commands, a row each; and what a command does where that is more than one call of a function."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.cli import analyses, experiments
from diffract.cli.console import everything
from diffract.cli.edits import APPLY, edit_commands
from diffract.cli.generate import Command
from diffract.errors import CheckpointError, DiffractError, RunError, SelectionError, printable

if TYPE_CHECKING:
    from diffract.settings import Progress

DOMAINS = ("natural", "math", "code", "instructions")
"""Continuations of the base in the sample family."""

PACKAGE = Path(str(files("diffract")))

DAY_SECONDS = 86_400

SIZES = ("width", "height", "scale")
"""Options of a figure that concern its file and not what is drawn."""


def demo(
    output: str | Path = "demo-run",
    *,
    samples: str | Path | None = None,
    force: bool = True,
    progress: Progress | None = None,
) -> Any:
    """Compare a small trained model with its four continuations by all metrics, with a report at the end.

    Args:
        output: Where the run goes.
        samples: A folder with the models base, natural, math, code and instructions; the package's own by default.
        force: Replace an existing run folder.
        progress: Called with work done, all work, and what was just finished.
    """
    from diffract import api

    # A wheel has the samples inside the package; in a clone they lie beside src.
    places = [Path(samples)] if samples else [root / "samples/tiny-olmo2" for root in (PACKAGE, PACKAGE.parents[1])]
    family = next((place for place in places if (place / "base").is_dir()), None)
    if family is None:
        raise CheckpointError(
            f"no sample family at {str(places[-1])!r}: pass --samples FOLDER, one that has 'base' in it."
        )
    tuned = [f"{domain}={family / domain}" for domain in DOMAINS]
    return api.compare(f"base={family / 'base'}", *tuned, metrics="all", output=output, force=force, progress=progress)


def report(run: str | Path, output: str | Path | None = None) -> Path:
    """Redraw report.html from a saved run; needs no weights and no torch.

    Args:
        run: The folder of a run of scan, compare, trajectory or heads.
        output: Where to write; RUN/report.html by default.
    """
    from diffract import report as page
    from diffract.tables import load

    with _drawn(run):
        return page.write(load(run), output or Path(run) / "report.html")


def plot(kind: str, run: str | Path, output: str | Path, **options: Any) -> Path:
    """Draw one figure of a run; needs no weights and no torch.

    Args:
        kind: What to draw; --list shows what there is.
        run: The folder of a run.
        output: The file, which ends in .html (self-contained), .png, .svg or .pdf.
        options: What is drawn, and how large.
    """
    from diffract import plots

    plots.check_ending(output)  # before the figure is computed
    size = {name: options.pop(name) for name in SIZES}
    with _drawn(run):
        return plots.save(plots.plot(kind, run, **options), output, **size)


@contextmanager
def _drawn(run: str | Path) -> Iterator[None]:
    """Call what cannot be drawn of a saved run damaged: whatever is right was drawn when the run was made."""
    try:
        yield
    except DiffractError:
        raise
    except Exception as error:
        raise RunError(
            f"run folder {str(run)!r} is damaged, or of another version: {type(error).__name__}: {printable(error)}. "
            "Run the command that made it again."
        ) from error


def metrics(*, facts: bool = False) -> dict[str, Any]:
    """Show the catalog of metrics: name, meaning, unit, range, source.

    Args:
        facts: List what a metric of one's own can be made of.
    """
    from diffract.settings import METRIC_ENTRY_POINTS

    # Declarations stand beside what they compute, so that to ask them takes torch; this is what they say, as text.
    told = json.loads((files("diffract.cli") / "metrics.json").read_text(encoding="utf-8"))
    if facts:
        return {"facts": told["facts"]}
    return {"metrics": told["metrics"], "extensions": sorted(entry_points(group=METRIC_ENTRY_POINTS).names)}


def cache(*, prune: str | None = None) -> dict[str, Any]:
    """Show what is kept of earlier work, how large and how old it is, and remove what was not used for longest.

    Args:
        prune: What may stay: a size such as 20GB, or a time since the last use such as 30d or 12h.
    """
    import time

    from diffract import store

    folder, removed = store.cache_folder(), []
    if prune is not None:
        removed = store.prune(store.entries(folder), **_room(prune))
    now, found = time.time(), store.entries(folder)
    kinds = {kind: [entry for entry in found if entry.kind == kind] for kind in sorted({e.kind for e in found})}
    rows = [
        {
            "kind": kind,
            "files": len(own),
            "size_bytes": sum(entry.size_bytes for entry in own),
            "unused_days": round((now - min(entry.used for entry in own)) / DAY_SECONDS, 2),
        }
        for kind, own in kinds.items()
    ]
    freed = sum(entry.size_bytes for entry in removed)
    return {"folder": str(folder), "kinds": rows, "removed": len(removed), "removed_bytes": freed}


def _room(text: str) -> dict[str, Any]:
    """Read what may stay in the cache."""
    from diffract.settings import parse_size

    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([dh])", text.strip()):
        return {"most_seconds": float(match[1]) * (DAY_SECONDS if match[2] == "d" else 3600)}
    try:
        return {"most_bytes": parse_size(text)}
    except ValueError as error:
        raise SelectionError(
            f"--prune: expected a size such as 20GB, or 30d or 12h, got {printable(text)!r}."
        ) from error


def evaluate(
    ref: str,
    *,
    output: str | Path | None = None,
    against: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> experiments.Evaluated:
    """Say how good a model is at text, questions and choices, with intervals; and against another one.

    Args:
        ref: A folder with a model of transformers, an adapter folder, or org/name@revision on the hub.
        output: Write a run folder here.
        against: A model, or a run of eval, to compare with item by item.
        progress: Called with items done, all items, and the task.
        options: How both are evaluated.
    """
    from diffract import api
    from diffract.evaluate import compare_scores
    from diffract.run import load_run

    found = api.evaluate(ref, output=output, progress=progress, **options)
    if against is None:
        return found, None, None
    if (Path(against) / "items.parquet").is_file():
        other = load_run(against)
    else:
        other = api.evaluate(against, progress=progress, **options)
    return found, other, compare_scores(other.tables, found.tables)


def train(
    recipe: str, output: str | Path | None = None, *, dry_run: bool = False, progress: Progress | None = None
) -> Any:
    """Train a model, a new one or one that goes on, by a recipe.

    Args:
        recipe: A YAML file (docs/train.md).
        output: The folder of the run; a run that was stopped goes on there.
        dry_run: Say parameters, steps, tokens and epochs; train nothing.
        progress: Called with tokens done, all tokens, and the loss.
    """
    from diffract import train as training

    if output is None or dry_run:
        return training.preview_training(recipe)
    return training.train(recipe, output, progress=progress)


def study(
    recipe: str,
    output: str | Path,
    *,
    dry_run: bool = False,
    data: str | Path | None = None,
    allow: Sequence[str] = (),
    say: Any,
) -> Any:
    """Run a study from its recipe, or go on with one that was stopped.

    Args:
        recipe: A YAML file (docs/studies.md), such as studies/tiny.yaml.
        output: The folder of the study.
        dry_run: Say what would be done, and do nothing.
        data: The folder that names of files in the recipe are relative to.
        allow: launch: start whatever program the recipe names, which is code of its author.
        say: Called with what is being done.
    """
    from diffract.studies import runner

    if dry_run:
        return runner.preview(recipe, output, data=data)
    return runner.run_study(recipe, output, data=data, allow=allow, say=say)


HERE = "diffract.cli.commands"

SEARCH = Command(
    name="search",
    panel="Know",
    functions=(),
    show=experiments.show_search,
    summary=experiments.sum_up_search,
    metavars={"order": "NAMES", "models": "NAME=MODEL...", "beside": "TASKS", "keep": "TASKS"},
    least={"limit": 1, "shots": 0},
    label="search",
    unit="evaluations",
)
"""What the searches have in common."""

LEARNED: dict[str, Any] = {
    "metavars": {**SEARCH.metavars, "rates": "NUMBERS", "controls": "NAMES"},
    "least": {**SEARCH.least, "passes": 1, "batch_tokens": 1, "tokens": 1, "polish": 0},
}
"""What is different where a search learns numbers on text."""

ANALYSIS = Command("scan", "See", ("diffract.api:scan",), show=analyses.show_run, summary=analyses.sum_up_run)

COMMANDS = (
    ANALYSIS,
    replace(ANALYSIS, name="compare", functions=("diffract.api:compare",)),
    replace(ANALYSIS, name="trajectory", functions=("diffract.api:trajectory",)),
    replace(ANALYSIS, name="heads", functions=("diffract.api:heads",)),
    replace(ANALYSIS, name="collect", functions=("diffract.cluster:collect",)),
    Command(
        name="lineage",
        panel="See",
        functions=("diffract.api:lineage",),
        show=analyses.show_lineage,
        summary=analyses.sum_up_lineage,
        unit="pairs",
    ),
    Command(
        name="audit",
        panel="See",
        functions=("diffract.api:audit",),
        show=analyses.show_audit,
        summary=analyses.sum_up_audit,
        unit="tensors",
    ),
    Command("inspect", "See", ("diffract.inspection:inspect",), show=analyses.show_inspection, summary=everything),
    Command("fetch", "See", ("diffract.checkpoints.fetch:fetch",), show=analyses.show_fetched, summary=everything),
    Command("report", "See", (f"{HERE}:report",), show=analyses.show_path("report"), metavars={"output": "FILE"}),
    Command(
        name="plot",
        panel="See",
        functions=(f"{HERE}:plot", "diffract.plots:plot", "diffract.plots:save"),
        show=analyses.show_path("plot"),
        metavars={"output": "FILE"},
        helps={"list": "Show the kinds with their options, and exit."},
        least={"width": 100, "height": 100, "scale": 0.1},
        hidden=("made", "path"),
        listing=analyses.list_plots,
    ),
    Command(
        name="metrics",
        panel="See",
        functions=(f"{HERE}:metrics",),
        show=analyses.show_metrics,
        summary=everything,
        hidden=("quiet",),
    ),
    Command(
        "cache", "See", (f"{HERE}:cache",), show=analyses.show_cache, summary=everything, metavars={"prune": "LIMIT"}
    ),
    replace(ANALYSIS, name="demo", functions=(f"{HERE}:demo",), label="compare"),
    APPLY,
    Command(
        name="verify",
        panel="Act",
        functions=("diffract.search:verify",),
        show=experiments.show_verdict,
        summary=everything,
        metavars={"folder": "OUT"},
        fails=experiments.tell_faults,
    ),
    Command(
        name="eval",
        panel="Know",
        functions=(f"{HERE}:evaluate", "diffract.api:evaluate"),
        show=experiments.show_evaluation,
        summary=experiments.sum_up_evaluation,
        metavars={"against": "OTHER"},
        unit="items",
    ),
    replace(
        SEARCH, name="connect", functions=("diffract.search:connect",), least={**SEARCH.least, "steps": 3, "grid": 1}
    ),
    Command(
        name="train",
        panel="Know",
        functions=(f"{HERE}:train",),
        show=experiments.show_training,
        summary=experiments.sum_up_training,
        metavars={"output": "OUT"},
    ),
    replace(SEARCH, name="search rewind", functions=("diffract.search:search_rewind",)),
    replace(SEARCH, name="search truncate", functions=("diffract.search:search_truncate",)),
    replace(SEARCH, name="search directions", functions=("diffract.search:search_directions",), **LEARNED),
    replace(SEARCH, name="search svf", functions=("diffract.search:search_svf",), **LEARNED),
    Command("study run", "Know", (f"{HERE}:study",), show=experiments.show_study, summary=experiments.sum_up_study),
)
"""Every command but those of edits, in the order in which they are listed."""

GROUPS: Mapping[str, str] = {
    "search": "Search by measured quality: which heads, how many directions, and what factors of them.",
    "study": "Train a family of models and test every finding on it.",
}
"""Commands that hold others."""


def all_commands() -> Iterator[Command]:
    """Yield every command, edits before the others that act."""
    for command in COMMANDS:
        if command is APPLY:
            yield from edit_commands()
        yield command
