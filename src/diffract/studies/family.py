"""The family of a study: bases at several token budgets, and what is trained from each in every domain."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import yaml

from diffract.errors import RunError, printable
from diffract.store import write_text
from diffract.studies.recipe import StudyRecipe
from diffract.train import train
from diffract.train.recipe import load_train_recipe
from diffract.train.records import read_run

Say = Callable[[str], None]

PRETRAINING = "pretraining"
FAMILY = "family"
"""Where models are, within a study's folder."""


@dataclass(frozen=True)
class TrainingJob:
    """One training run.

    Attributes:
        name: What the run and its folder are called.
        recipe: A training recipe.
        folder: Where the run goes.
    """

    name: str
    recipe: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Family:
    """Checkpoints of a study.

    Attributes:
        bases: By tokens seen, rising.
        tuned: By tokens that the base had seen, and domain.
    """

    bases: Mapping[int, str]
    tuned: Mapping[int, Mapping[str, str]]

    def within(self, folder: Path) -> Family:
        """Return the same with paths relative to a folder, for people."""

        def short(ref: str) -> str:
            return str(Path(ref).relative_to(folder)) if Path(ref).is_relative_to(folder) else ref

        bases = {tokens: short(ref) for tokens, ref in self.bases.items()}
        return Family(bases, {t: {d: short(ref) for d, ref in models.items()} for t, models in self.tuned.items()})

    @property
    def last(self) -> int:
        """The largest budget that was trained on from."""
        return max(self.tuned)


def pretraining_jobs(recipe: StudyRecipe, folder: Path, data: Path | None) -> list[TrainingJob]:
    """Return the training run that makes the bases; none where they are given."""
    if recipe.pretraining.train is None:
        return []
    settings = _common(recipe, data) | recipe.pretraining.train
    return [TrainingJob(PRETRAINING, settings, folder / FAMILY / PRETRAINING)]


def continual_jobs(
    recipe: StudyRecipe, bases: Mapping[int, str], folder: Path, *, data: Path | None
) -> list[TrainingJob]:
    """Return one training run for each budget and domain."""
    common = _common(recipe, data) | recipe.continual.train
    replay = {f"replay of {name}": part.model_dump(mode="json") for name, part in recipe.continual.replay.items()}
    jobs = []
    for tokens in recipe.pretraining.chosen:
        for domain, part in recipe.continual.domains.items():
            made = {"model": {"init": bases[tokens]}, "mix": replay | {domain: part.model_dump(mode="json")}}
            name = tuned_name(domain, tokens)
            jobs.append(TrainingJob(name, common | made, folder / FAMILY / name))
    return jobs


def tuned_name(domain: str, tokens: int) -> str:
    """Return what a tuned model's folder is called."""
    return f"{domain}-from-{tokens}"


def _common(recipe: StudyRecipe, data: Path | None) -> dict[str, Any]:
    """Settings of every training run of a study, which its own may replace."""
    known = {"data": str(data.resolve()) if data else None, "threads": recipe.threads}
    return {name: value for name, value in known.items() if value is not None}


def make_family(recipe: StudyRecipe, folder: Path, data: Path | None, *, say: Say) -> Family:
    """Train what is not trained yet; a run that was killed goes on where it was.

    Args:
        recipe: What is asked.
        folder: The folder of the study.
        data: The folder that names of files are relative to.
        say: Is told what is being done.

    Raises:
        RunError: A training run failed; the message holds what it said last.
        DiffractError: A training recipe is wrong.
    """
    bases = recipe.pretraining.given
    if bases is None:
        (job,) = run_all(pretraining_jobs(recipe, folder, data), recipe, say)
        # A training run rounds token counts up to whole steps; the study keeps those of its recipe.
        bases = dict(zip(recipe.pretraining.tokens, checkpoints_of(job).values(), strict=True))
    jobs = run_all(continual_jobs(recipe, bases, folder, data=data), recipe, say)
    finals = {job.name: list(checkpoints_of(job).values())[-1] for job in jobs}
    tuned = {
        tokens: {domain: finals[tuned_name(domain, tokens)] for domain in recipe.continual.domains}
        for tokens in recipe.pretraining.chosen
    }
    return Family(dict(sorted(bases.items())), tuned)


def checkpoints_of(job: TrainingJob) -> dict[int, str]:
    """Return the checkpoints of a finished run by tokens."""
    return {tokens: str(path) for tokens, path in train(job.recipe, job.folder).checkpoints.items()}


def run_all(jobs: Sequence[TrainingJob], recipe: StudyRecipe, say: Say) -> Sequence[TrainingJob]:
    """Run training in processes of its own, several side by side; return the same jobs.

    Raises:
        RunError: A training run failed; the message holds what it said last.
    """
    waiting = [job for job in jobs if not read_run(job.folder, load_train_recipe(job.recipe)).get("finished")]
    begun = time.monotonic()
    children: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(recipe.jobs) as pool:
        try:
            for done, job in enumerate(pool.map(lambda j: _run_apart(j, recipe.launch, children), waiting), start=1):
                say(f"trained {job.name} ({done} of {len(waiting)}, {time.monotonic() - begun:.0f} s)")
        except BaseException:
            # One has failed, or the study is asked to end: nobody would wait for the others.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
    return jobs


ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; it stays over exec
if os.getppid() != int(sys.argv[1]):  # which has ended in between
    sys.exit(128 + signal.SIGTERM)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Has the system end a command with the process that starts it: a study that is killed outright ends no training."""


def _run_apart(job: TrainingJob, launch: Sequence[str], children: list[subprocess.Popen[str]]) -> TrainingJob:
    # Trainings side by side need processes of their own: torch's threads and accelerate's state are one for each.
    path = write_text(job.folder.with_suffix(".yaml"), yaml.safe_dump(job.recipe, sort_keys=False))
    start = list(launch) or [sys.executable]
    command = [*start, "-m", "diffract", "train", str(path), "-o", str(job.folder), "--quiet"]
    # A program of its own, not a function between fork and exec, which is not safe beside other threads.
    first = [sys.executable, "-c", ENDS_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
    if which(start[0]) is None:
        raise RunError(f"cannot start {printable(start[0])!r}: there is no such program. Mend launch in the recipe.")
    try:
        child = subprocess.Popen(
            [*first, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise RunError(f"cannot start {printable(start[0])!r}: {error.strerror}. Mend launch in the recipe.") from error
    children.append(child)
    _, said = child.communicate()
    if child.returncode:
        last = (said.strip().splitlines() or ["nothing was said"])[-1]
        raise RunError(f"training {job.name} failed: {printable(last, 500)} Run the study again to go on.")
    return job
