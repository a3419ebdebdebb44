"""What a study would do: every training run, what would be scored, and what is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffract.corpora import HUB, STANDARD_LIBRARY, WORD_PROBLEMS
from diffract.errors import printable
from diffract.studies.family import Job
from diffract.studies.runner import check_jobs, load_study
from diffract.studies.settings import StudyRecipe


@dataclass(frozen=True)
class Preview:
    """A study that was not run.

    Attributes:
        recipe: What is asked.
        jobs: Its training runs.
        tokens: That they train on, together.
        models: Checkpoints that would be scored in every task.
        missing: Files and folders of text that are not there.
        remote: References that need a network.
    """

    recipe: StudyRecipe
    jobs: list[Job]
    tokens: int
    models: int
    missing: list[str]
    remote: list[str]


def preview(recipe: str | Path, output: str | Path, *, data: str | Path | None = None) -> Preview:
    """Validate a study and everything that it would train, and say what it would do.

    Raises:
        RecipeError: The recipe, or one of the training recipes in it, is wrong.
    """
    asked = load_study(recipe)
    where = asked.data_folder(Path(recipe), data)
    jobs = check_jobs(asked, Path(output), where)
    sources = sorted(set(_sources(asked, jobs)))
    return Preview(
        asked,
        jobs,
        sum(job.recipe["tokens"] for job in jobs),
        len(asked.pretraining.tokens) + len(asked.pretraining.chosen) * len(asked.continual.domains),
        [printable(s) for s in sources if not s.startswith(HUB) and not _is_there(s, where)],
        [printable(s) for s in [*sources, *(asked.pretraining.given or {}).values()] if _is_remote(s)],
    )


def _sources(recipe: StudyRecipe, jobs: list[Job]) -> Iterator[str]:
    for job in jobs:
        for part in job.recipe["mix"].values():
            yield from part["sources"]
    for spec in (*recipe.quality.tasks.values(), *recipe.quality.further):
        if "=" in spec:
            yield from spec.partition("=")[2].split("+")


def _is_there(source: str, data: Path | None) -> bool:
    if source.partition(":")[0] in (STANDARD_LIBRARY, WORD_PROBLEMS):
        return True
    return Path(source).exists() or (data is not None and (data / source).exists())


def _is_remote(ref: str) -> bool:
    return ref.startswith(HUB) or ("/" in ref and not Path(ref).exists() and "@" in ref)
