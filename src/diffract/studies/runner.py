"""Run a study: train the family, test every finding, write one report. What is done already is not done again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from diffract._version import __version__
from diffract.cache import cache_key
from diffract.errors import RecipeError, RunError, printable
from diffract.folders import write_text
from diffract.settings import read_recipe, validated
from diffract.studies.family import Family, Job, Say, continual_jobs, make_family, pretraining_jobs
from diffract.studies.finding import Finding, load_finding, save_finding
from diffract.studies.report import write_report
from diffract.studies.settings import StudyRecipe
from diffract.train.settings import TrainRecipe

FORMAT = 1
MANIFEST, NUMBERS, REPORT, FINDINGS_FOLDER = "manifest.json", "numbers.json", "report.html", "findings"


@dataclass(frozen=True)
class StudyRun:
    """A study that is done.

    Attributes:
        folder: Where it is.
        recipe: What was asked.
        findings: What came out, in the recipe's order.
    """

    folder: Path
    recipe: StudyRecipe
    findings: list[Finding]

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.folder / REPORT


def load_study(path: str | Path) -> StudyRecipe:
    """Read the recipe of a study.

    Raises:
        RecipeError: It cannot be read, or says what cannot be; the message holds the path in the file.
    """
    return validated(StudyRecipe, read_recipe(path, "the settings of a study"), printable(path))


def run_study(
    recipe: str | Path, output: str | Path, *, data: str | Path | None = None, say: Say = lambda text: None
) -> StudyRun:
    """Run a study, or go on with one that was stopped.

    Args:
        recipe: A file.
        output: The study's folder. It holds the family, every score, and a folder for each finding.
        data: The folder that names of files in the recipe are relative to.
        say: Told what is being done.

    Returns:
        Its findings. They depend on recipe, data, machine and library versions only: ``numbers.json`` of two runs are
        equal byte for byte.

    Raises:
        DiffractError: The recipe is wrong, a training run failed, or the folder belongs to another recipe.
    """
    asked, folder = load_study(recipe), Path(output).resolve()  # recipes of training hold paths in it
    where = asked.data_folder(Path(recipe), data)
    check_jobs(asked, folder, where)
    _claim(asked, folder)
    with _threads(asked.threads):
        family = make_family(asked, folder, where, say)
        findings = [_finding(name, asked, family, folder, where, say) for name in asked.findings]
    run = StudyRun(folder, asked, findings)
    write_text(folder / NUMBERS, numbers_text(findings))
    write_report(asked, family.within(folder), findings, run.report)
    return run


def all_jobs(recipe: StudyRecipe, folder: Path, data: Path | None) -> list[Job]:
    """Return every training run of a study; bases that are not trained yet by the names that they will have."""
    bases = recipe.pretraining.given or {tokens: f"the base of {tokens} tokens" for tokens in recipe.pretraining.tokens}
    return [*pretraining_jobs(recipe, folder, data), *continual_jobs(recipe, bases, folder, data)]


def check_jobs(recipe: StudyRecipe, folder: Path, data: Path | None) -> list[Job]:
    """Validate every training recipe of a study before anything is done.

    Raises:
        RecipeError: One is wrong; the message says which.
    """
    jobs = all_jobs(recipe, folder, data)
    for job in jobs:
        validated(TrainRecipe, job.recipe, f"training {job.name}")
    return jobs


def numbers_text(findings: list[Finding]) -> str:
    """Return all verdicts and numbers as JSON."""
    plain = {f.name: {"verdict": f.verdict, "numbers": [asdict(number) for number in f.numbers]} for f in findings}
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def _finding(name: Any, recipe: StudyRecipe, family: Family, folder: Path, data: Path | None, say: Say) -> Finding:
    from diffract.studies.findings import FINDINGS
    from diffract.studies.study import Study

    key = cache_key(FORMAT, __version__, recipe.model_dump(mode="json"))
    place = folder / FINDINGS_FOLDER / name
    known = load_finding(place, key=key)
    if known is not None:
        return known
    say(f"finding: {name}")
    found = FINDINGS[name](Study(recipe, family, folder, data, say))
    save_finding(found, place, key=key)
    return found


def _claim(recipe: StudyRecipe, folder: Path) -> None:
    """Make the folder this study's, or see that it is."""
    plain = recipe.model_dump(mode="json")
    path = folder / MANIFEST
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{str(folder)!r} exists and holds no study. Choose another name.")
        manifest = {"format": FORMAT, "kind": "study", "diffract": __version__, "recipe": plain}
        write_text(path, json.dumps(manifest, indent=1) + "\n")
        write_text(folder / "recipe.yaml", yaml.safe_dump(plain, sort_keys=False))
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{str(path)!r} is damaged ({printable(error)}). Choose another folder.") from error
    if changed := [name for name in plain if found.get(name) != plain[name]]:
        raise RecipeError(
            f"{str(folder)!r} holds a study whose {', '.join(changed)} differ from this recipe's. "
            "Choose another folder, or take its own recipe.yaml."
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute in so many torch threads: sums depend on it in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
