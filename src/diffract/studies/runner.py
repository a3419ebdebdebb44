"""Run a study: train the family, test every finding, write one report. What is done already is not done again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import torch
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from diffract._version import __version__
from diffract.corpora import HUB, STANDARD_LIBRARY, WORD_PROBLEMS
from diffract.errors import RecipeError, RunError, choose, printable
from diffract.run import Run, load_run
from diffract.settings import read_file, read_recipe, validated
from diffract.store import cache_key, write_text
from diffract.studies.family import Family, Say, TrainingJob, continual_jobs, make_family, pretraining_jobs
from diffract.studies.finding import Evidence, Finding, Number, load_evidence, plain_figure, save_evidence
from diffract.studies.findings import FINDINGS
from diffract.studies.recipe import StudyRecipe
from diffract.studies.study import Study
from diffract.tables import EVIDENCE, STUDY_NUMBERS
from diffract.train.recipe import TrainRecipe

FORMAT = 1
MANIFEST, REPORT = "manifest.json", "report.html"


def load_study(path: str | Path) -> StudyRecipe:
    """Read the recipe of a study.

    Raises:
        RecipeError: The recipe cannot be read, or says what cannot be; the message holds the path in the file.
    """
    recipe = validated(StudyRecipe, read_recipe(path, "the settings of a study"), printable(path))
    known = [finding.name for finding in FINDINGS]
    if recipe.findings is None:
        return recipe.model_copy(update={"findings": known})
    for place, name in enumerate(recipe.findings):
        choose(f"finding in {printable(path)}, findings.{place}:", name, known, error=RecipeError)
    return recipe


def run_study(
    recipe: str | Path,
    output: str | Path,
    *,
    data: str | Path | None = None,
    allow: Sequence[str] = (),
    say: Say = lambda text: None,
) -> Run:
    """Run a study, or go on with one that was stopped.

    Args:
        recipe: The file of a recipe.
        output: The study's folder. It holds the family, every score, and a folder for each finding.
        data: The folder that names of files in the recipe are relative to.
        allow: ``launch``: start whatever program the recipe names, which is code of its author.
        say: Is told what is being done.

    Returns:
        The run: tables ``findings`` and ``numbers``. They depend on recipe, data, machine and library versions only:
        ``numbers.json`` of two runs are equal byte for byte.

    Raises:
        DiffractError: The recipe is wrong, a training run failed, or the folder belongs to another recipe.
    """
    # Recipes of training hold paths in the study's folder, and a run goes on only with the very same recipe.
    asked, folder = load_study(recipe), Path(output).resolve()
    for name in allow:
        choose("permission", name, ("launch",))
    asked.check_launch(allow)
    where = asked.data_folder(Path(recipe), data)
    all_jobs(asked, folder, where)
    _claim(asked, folder)
    with _threads(asked.threads):
        family = make_family(asked, folder, where, say=say)
        study = Study(recipe=asked, family=family, folder=folder, data=where, say=say)
        by_name = {finding.name: finding for finding in FINDINGS}
        found = {by_name[name]: _tested(by_name[name], study) for name in asked.findings or ()}
    write_text(folder / STUDY_NUMBERS, numbers_text(found))
    write_text(folder / REPORT, study_report(asked, family.within(folder), found))
    return load_run(folder)


def all_jobs(recipe: StudyRecipe, folder: Path, data: Path | None) -> list[TrainingJob]:
    """Return every training run of a study; bases that are not trained yet by the names that they will have.

    Raises:
        RecipeError: A training recipe is wrong; the message says which, before anything is done.
    """
    bases = recipe.pretraining.given or {tokens: f"the base of {tokens} tokens" for tokens in recipe.pretraining.tokens}
    jobs = [*pretraining_jobs(recipe, folder, data), *continual_jobs(recipe, bases, folder, data=data)]
    for job in jobs:
        validated(TrainRecipe, job.recipe, f"training {job.name}")
    return jobs


def numbers_text(found: Mapping[Finding, Evidence]) -> str:
    """Return all verdicts and numbers as JSON."""
    plain = {
        finding.name: {"verdict": evidence.verdict, "numbers": [asdict(number) for number in evidence.numbers]}
        for finding, evidence in found.items()
    }
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def _tested(finding: Finding, study: Study) -> Evidence:
    """Return what a test gives, from the finding's folder where it was made from the same recipe before."""
    key = cache_key(FORMAT, __version__, study.recipe.model_dump(mode="json"))
    place = study.folder / EVIDENCE / finding.name
    found = load_evidence(place, key=key)
    if found is None:
        study.say(f"finding: {finding.name}")
        found = finding.test(study)
        save_evidence(found, place, key=key)
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
        found = json.loads(read_file(path).decode())["recipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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


@dataclass(frozen=True)
class StudyPreview:
    """A study that was not run.

    Attributes:
        recipe: What is asked.
        findings: The names of the findings that would be tested.
        jobs: The training runs of the study.
        tokens: How many tokens they train on, together.
        models: Checkpoints that would be scored in every task.
        missing: Files and folders of text that are not there.
        remote: References that need a network.
    """

    recipe: StudyRecipe
    findings: list[str]
    jobs: list[TrainingJob]
    tokens: int
    models: int
    missing: list[str]
    remote: list[str]


def preview(recipe: str | Path, output: str | Path, *, data: str | Path | None = None) -> StudyPreview:
    """Validate a study and everything that it would train, and say what it would do.

    Raises:
        RecipeError: The recipe, or one of the training recipes in it, is wrong.
    """
    asked = load_study(recipe)
    where = asked.data_folder(Path(recipe), data)
    jobs = all_jobs(asked, Path(output), where)
    named = {source for job in jobs for part in job.recipe["mix"].values() for source in part["sources"]}
    for spec in (*asked.quality.tasks.values(), *asked.quality.further):
        if "=" in spec:
            named.update(spec.partition("=")[2].split("+"))
    places = [Path(), *([where] if where else [])]
    refs = [*sorted(named), *(asked.pretraining.given or {}).values()]
    own = [s for s in sorted(named) if s.partition(":")[0] not in (STANDARD_LIBRARY, WORD_PROBLEMS)]
    return StudyPreview(
        recipe=asked,
        findings=asked.findings or [],
        jobs=jobs,
        tokens=sum(job.recipe["tokens"] for job in jobs),
        models=len(asked.pretraining.tokens) + len(asked.pretraining.chosen) * len(asked.continual.domains),
        missing=[printable(s) for s in own if not s.startswith(HUB) and not any((p / s).exists() for p in places)],
        remote=[printable(s) for s in refs if s.startswith(HUB) or ("@" in s and "/" in s and not Path(s).exists())],
    )


BADGES = {"holds": "yes", "does not hold": "no", "cannot tell": "open"}
"""Verdicts by the class that colours them."""


def study_report(recipe: StudyRecipe, family: Family, found: Mapping[Finding, Evidence]) -> str:
    """Return the report of a study, a page that needs no network.

    Args:
        recipe: What was asked.
        family: The checkpoints of the study, by the names that the report shows.
        found: The evidence of each finding, in the order of the page.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"printable": printable, "value": value, "interval": interval}
    figures = {
        f"{finding.name}-{index}": plain_figure(made)
        for finding, evidence in found.items()
        for index, (_, made) in enumerate(evidence.figures)
    }
    # The figures stand in a script element, which "</script>" in a title would end; and two line ends of Unicode are
    # line ends in JavaScript but not in JSON.
    safe = json.dumps(figures).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return environment.from_string(_resource("diffract.studies", "study.html.j2")).render(
        recipe=recipe,
        family=family,
        found=found,
        badges=BADGES,
        version=__version__,
        css=Markup(_resource("diffract.report", "report.css") + _resource("diffract.studies", "study.css")),
        plotly=Markup(get_plotlyjs()),
        figures=Markup(safe),
    )


def value(number: float | None) -> str:
    """Return a number for people.

    >>> value(0.123456), value(None), value(12345.6)
    ('0.1235', '-', '1.235e+04')
    """
    return "-" if number is None else f"{number:.4g}"


def interval(number: Number) -> str:
    """Return the interval of a number, or nothing."""
    return "" if number.low is None or number.high is None else f"{number.low:.3g} to {number.high:.3g}"


def _resource(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")
