"""``diffract study``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffract.cli import options
from diffract.cli.console import explained, say, say_json, say_table

if TYPE_CHECKING:
    from diffract.studies.runner import StudyPreview, StudyRun

app = typer.Typer(help="Train a family of models and test every finding on it.", no_args_is_help=True)


@app.command(no_args_is_help=True)
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Such as studies/tiny.yaml.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="The study's folder.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What names of files in the recipe are relative to.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run a study from its recipe, or go on with one that was stopped."""
    with explained(debug=debug):
        if dry_run:
            from diffract.studies.runner import preview

            _show_preview(preview(recipe, output, data=data), json=json)
            return
        from diffract.studies.runner import run_study

        silent = quiet or json
        done = run_study(recipe, output, data=data, say=lambda text: None if silent else typer.echo(text, err=True))
    if json:
        say_json({"run": str(done.folder), "report": str(done.report), "verdicts": _verdicts(done)})
    elif not quiet:
        say_table(["finding", "verdict"], [[name, verdict] for name, verdict in _verdicts(done).items()])
        for finding in done.findings:
            say(f"{finding.name}: {finding.because}")
        say(f"report: {done.report}")


def _verdicts(done: StudyRun) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in done.findings}


def _show_preview(found: StudyPreview, *, json: bool) -> None:
    summary: dict[str, Any] = {
        "study": found.recipe.name,
        "training_runs": {job.name: job.recipe["tokens"] for job in found.jobs},
        "training_tokens": found.tokens,
        "models": found.models,
        "tasks": [*found.recipe.quality.tasks.values(), *found.recipe.quality.further],
        "findings": found.findings,
        "missing": found.missing,
        "from_the_network": found.remote,
    }
    if json:
        say_json(summary)
        return
    say_table(["training run", "tokens"], [[job.name, f"{job.recipe['tokens']:,}"] for job in found.jobs])
    side = f", {found.recipe.jobs} side by side" if found.recipe.jobs > 1 else ""
    say(f"{len(found.jobs)} training runs{side}, {found.tokens:,} tokens together")
    say(f"{found.models} checkpoints scored in {', '.join(summary['tasks'])}")
    say(f"findings: {', '.join(found.findings)}")
    for text in found.missing:
        say(f"missing: {text} (--data says where files are)")
    for text in found.remote:
        say(f"from the network: {text}")
