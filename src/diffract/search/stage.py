"""What a search works with: what was asked, the live model and others in memory, tasks of both splits, its folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from diffract.corpora import Split
from diffract.edits.directions import Decompositions
from diffract.edits.live import LiveModel
from diffract.errors import CheckpointError, RunError, SelectionError, choose, printable
from diffract.evaluate import Evaluator, Subject, Task, load_subject, load_tasks
from diffract.matrices.meeting import TOKENIZERS
from diffract.search.plan import SPLITS, Which, parse_budget
from diffract.search.scorer import Scorer
from diffract.settings import Progress
from diffract.store import LOCK, Cache, claimed, refuse_existing, whole_folder
from diffract.tables import Tables, write

Model = str | Path | torch.nn.Module
"""A folder with a model of transformers, ``org/name@revision`` on the hub, or a loaded model."""


Role = Literal["beside", "target", "kept"]
"""What a task is for: text beside the target that nobody optimised, the target itself, or what is to be kept."""


def task_entries(given: str | Sequence[str] | None) -> list[str]:
    """Return the entries of a specification of tasks; none for ``None``."""
    words = given.split(",") if isinstance(given, str) else given or ()
    return [word.strip() for word in words if word.strip()]


@dataclass(frozen=True)
class SearchRequest:
    """What is asked of every search: models, how they are evaluated, what it may cost and where it goes.

    Attributes:
        models: The models by name, in the order of the manifest.
        live: The name of the model that is changed in place.
        eval: Tasks of the target, as ``diffract.evaluate.load_tasks`` reads them.
        beside: Tasks beside the target; the first of all tasks decides, and these come first.
        keep: Tasks of what must be kept.
        splits: What models are scored on; the held-out split alone where nothing is chosen.
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most, in each split.
        shots: Solved examples before each question.
        device: Where the live model is evaluated.
        dtype: What it is computed in.
        tokenizer: The tokenizer, where it is not beside the live model.
        architecture: A JSON file that describes the model.
        allow: What is allowed though it speaks against taking weights from another model, as in recipes.
        seeds: How many random curves of each kind.
        tolerance: The largest loss that counts as none, see ``run.furthest_without_loss``.
        choose_by: Which point is written.
        budget: The most that the search may cost.
        output: The run folder.
        write: The checkpoint to write.
        dry_run: Whether only the cost is wanted.
        force: Whether what is there is replaced.
        progress: Takes evaluations done, all of them, and what is done now.

    Raises:
        SelectionError: A value makes no sense.
    """

    models: Mapping[str, Model]
    live: str
    eval: str | Sequence[str]
    beside: str | Sequence[str] | None = None
    keep: str | Sequence[str] | None = None
    splits: Sequence[Split] = SPLITS
    data: str | Path | None = None
    limit: int | None = None
    shots: int = 0
    device: str = "auto"
    dtype: str = "auto"
    tokenizer: Any = None
    architecture: str | Path | None = None
    allow: Sequence[str] = ()
    seeds: int = 1
    tolerance: float | None = None
    choose_by: Which = "best"
    budget: str | int | None = None
    output: str | Path | None = None
    write: str | Path | None = None
    dry_run: bool = False
    force: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        choose("choice", self.choose_by, get_args(Which))
        parse_budget(self.budget)
        if self.seeds < 1:
            raise SelectionError(f"seeds: expected 1 or more, got {self.seeds}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise SelectionError(f"tolerance: expected a loss from 0, got {self.tolerance}.")

    def told(self) -> dict[str, Any]:
        """Return how models were evaluated, and what was chosen by, as a manifest keeps it."""
        tasks = {name: ",".join(task_entries(getattr(self, name))) for name in ("eval", "beside", "keep")}
        chosen_by = ("seeds", "tolerance", "choose_by") if "selection" in self.splits else ()
        names = ("limit", "shots", "device", "dtype", *chosen_by, "budget")
        data = str(self.data) if self.data else None
        told = {name: getattr(self, name) for name in names}
        return {**{name: text or None for name, text in tasks.items()}, "data": data, **told, "allow": list(self.allow)}


@dataclass
class Stage:
    """The loaded model that is searched, and its tasks.

    Attributes:
        asked: What was asked of the search.
        subject: The model with its tokenizer.
        live: Changes it.
        tasks: The tasks of each split.
        roles: What each task is for.
        notes: What the user should know.
    """

    asked: SearchRequest
    subject: Subject
    live: LiveModel
    tasks: Mapping[Split, Sequence[Task]]
    roles: Mapping[str, Role]
    notes: list[str]

    def evaluators(self, cache: Cache | None, progress: Progress | None = None) -> dict[Split, Evaluator]:
        """Return what scores the model on each split."""
        return {
            split: Evaluator(self.subject, tasks, cache=cache, notes=self.notes.append, progress=progress)
            for split, tasks in self.tasks.items()
        }

    def scorer(self, cache: Cache | None) -> Scorer:
        """Return what scores the model as edits make it."""

        # The scorer counts evaluations, and an evaluator tells how far the present one is: each needs the other.
        def tell(done: float, total: float, _task: str) -> None:
            scorer.tell(done / max(total, 1))

        scorer = Scorer(self.live, self.evaluators(cache, tell), self.tasks, progress=self.asked.progress)
        return scorer

    def in_memory(self, model: Model) -> torch.nn.Module:
        """Return another model on the CPU, whose weights edits of the live one read.

        Raises:
            DiffractError: The model cannot be loaded.
        """
        if isinstance(model, torch.nn.Module):
            return model
        return load_subject(model, device="cpu", dtype=self.asked.dtype, tokenizer=self.subject.tokenizer).model

    def of_same_vocabulary(self, model: Model) -> torch.nn.Module:
        """Return another model on the CPU that can be mixed with the live one.

        A loaded model has no tokenizer, and is taken to have the same.

        Raises:
            CheckpointError: It cannot be loaded, or has another tokenizer: a mixture of both would make no sense.
        """
        if isinstance(model, torch.nn.Module):
            return model
        found = load_subject(model, device="cpu", dtype=self.asked.dtype, tokenizer=self.asked.tokenizer)
        same = found.tokenizer.get_vocab() == self.subject.tokenizer.get_vocab()
        if not same and not self.live.bench.permissions.allows(TOKENIZERS):
            raise CheckpointError(
                f"{printable(model)} and {printable(self.subject.name)} have different tokenizers: their tokens do not "
                "mean the same. Take models of one vocabulary, say with --tokenizer which one is right for all, or "
                f"pass --allow {TOKENIZERS}."
            )
        return found.model


def set_up(asked: SearchRequest, decompositions: Decompositions) -> Stage:
    """Load the model that is searched, and the tasks of all splits.

    Args:
        asked: What is asked of every search.
        decompositions: Where those of matrices are kept from one evaluation to the next.

    Raises:
        DiffractError: A task or the model cannot be loaded.
    """
    given: dict[Role, list[str]] = {"beside": task_entries(asked.beside), "target": task_entries(asked.eval)}
    given["kept"] = task_entries(asked.keep)
    entries = [entry for own in given.values() for entry in own]
    tasks: dict[Split, Sequence[Task]] = {
        split: load_tasks(entries, split=split, data=asked.data, limit=asked.limit, shots=asked.shots)
        for split in asked.splits
    }
    model = asked.models[asked.live]
    subject = load_subject(model, device=asked.device, dtype=asked.dtype, tokenizer=asked.tokenizer)
    notes = list(dict.fromkeys(note for own in tasks.values() for task in own for note in task.notes))
    return Stage(
        asked=asked,
        subject=subject,
        live=LiveModel(
            subject.model, architecture=asked.architecture, allow=asked.allow, decompositions=decompositions
        ),
        tasks=tasks,
        roles=dict(zip((t.name for t in tasks[asked.splits[0]]), (r for r in given for _ in given[r]), strict=True)),
        notes=notes,
    )


KEPT = "cache"
"""Subfolder of a finished run with the scores, for another search into the same folder."""

SCRATCH = "scratch"
"""Subfolder of an unfinished search with what it need not compute twice and memory has no room for."""


@contextmanager
def working(asked: SearchRequest) -> Iterator[Cache | None]:
    """Yield a cache beside the run folder that will be written; nothing where none will be.

    A search that was killed leaves it, and goes on from it when it is started again. One that replaces a finished run
    begins with that run's scores: they count only where weights, task and settings are the same.

    Raises:
        RunError: The folder exists or cannot be made, or another process is searching for it.
    """
    if asked.output is None or asked.dry_run:
        yield None
        return
    refuse_existing(asked.output, force=asked.force)
    folder, before = work_folder(asked.output), Path(asked.output) / KEPT
    # A run folder that is written anew keeps its scores: only what changed is evaluated.
    try:
        if before.is_dir() and not folder.exists():
            shutil.copytree(before, folder)
    except OSError as error:
        raise RunError(f"cannot write to {str(folder)!r}: {error.strerror or error}. Write elsewhere.") from error
    with claimed(folder, "is searching into"), Cache(folder) as cache:
        yield cache


@contextmanager
def scratch(cache: Cache | None) -> Iterator[Path]:
    """Yield an empty folder for as long as a search goes: on the disk of its run folder, where it writes one.

    Raises:
        RunError: It cannot be made.
    """
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="diffract-") as folder:
            yield Path(folder)
        return
    folder = cache.folder / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)  # a search that was killed left it
    try:
        folder.mkdir()
    except OSError as error:
        raise RunError(f"cannot write to {str(folder)!r}: {error.strerror or error}. Write elsewhere.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work_folder(output: str | Path) -> Path:
    """Return where an unfinished search is."""
    return Path(output).with_name(Path(output).name + ".work")


def finish(tables: Tables, asked: SearchRequest, cache: Cache | None) -> None:
    """Write the run folder, where one is asked for, with the scores in it, and remove the one for work."""
    if asked.output is None:
        return
    with whole_folder(asked.output, force=asked.force) as draft:
        write(tables, draft)
        if cache is not None:
            shutil.copytree(cache.folder, draft / KEPT, ignore=shutil.ignore_patterns(LOCK, SCRATCH))
    # Last, when the run folder is whole: whoever is killed before goes on from here.
    shutil.rmtree(work_folder(asked.output), ignore_errors=True)
