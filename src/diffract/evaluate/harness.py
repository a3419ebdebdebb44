"""Tasks of lm-evaluation-harness, on the model in memory.

The harness's own cache of responses is never used: its keys are the requests alone, so that an edited model would be
given the answers of the one before it.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import blake3

from diffract.corpora import digest
from diffract.errors import CheckpointError, CorpusError, choose, printable
from diffract.evaluate.model import Subject
from diffract.evaluate.scoring import BatchLimit
from diffract.evaluate.tasks import FoundItems, Harness, Score, Wanted, half_of, spread, task_kind

PIP = "pip install 'diffract-llm[lm-eval]'"

FOLDER = "lm_eval"
"""The folder of ``--data`` where tasks of one's own are described."""

METRICS = ("acc_norm", "acc", "exact_match")
"""Which number counts where there are several; of other ones the first of which more is better."""


def score_harness(subject: Subject, tasks: Sequence[Harness], budget: BatchLimit) -> list[Score]:
    """Return the scores of tasks' items: of each its metric per item, with the first response.

    Items are ``subtask:number:metric``, half of the harness's own by their content, as the split says. A group's items
    count alike, whichever subtask they are of.

    Raises:
        SelectionError: There is no such task.
        CheckpointError: The harness cannot run the task, or it has no metric that could be used.
    """
    return [score for task in tasks for score in _scores(subject, task, budget)]


@task_kind("lm-eval", score_harness)
def lm_eval(wanted: Wanted) -> FoundItems:
    """Find a task of the harness: one item, with all that its scores depend on.

    Raises:
        CheckpointError: The harness is not installed.
        CorpusError: The train split is asked for.
    """
    name, data = wanted.source, wanted.data
    if wanted.split == "train":
        raise CorpusError(f"lm:{printable(name)} is for evaluation only, it has no train split.")
    try:
        release = version("lm_eval")
    except PackageNotFoundError as error:
        raise CheckpointError(f"lm:{printable(name)} needs lm-evaluation-harness: {PIP}.") from error
    folder = data / FOLDER if data is not None and (data / FOLDER).is_dir() else None
    item = Harness(
        id=name,
        split=wanted.split,
        shots=wanted.shots,
        limit=wanted.limit,
        folder=str(folder) if folder else None,
        content=f"{release} {_content(folder)}",
    )
    return FoundItems([item], [f"lm-evaluation-harness {name}"])


def _scores(subject: Subject, task: Harness, budget: BatchLimit) -> Iterator[Score]:
    with _quiet():
        leaves, chosen = _leaves(task)
        if not chosen:
            raise CheckpointError(f"lm:{printable(task.id)} has no items in the {task.split} split.")
        found = _simple_evaluate(subject, task, [leaves[name] for name in chosen], samples=chosen, budget=budget)
    # Subtasks of a group may have metrics of their own.
    for name, samples in found["samples"].items():
        yield from _samples(name, samples, found["higher_is_better"].get(name, {}))


def _leaves(task: Harness) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return the harness's tasks that a name stands for, and which of their items are in the split."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] (an extra)

    manager = TaskManager(include_path=task.folder)
    choose("task of lm-evaluation-harness", task.id, manager.all_tasks)
    with _explained(task.id):
        leaves = manager.load(task.id)["tasks"]
        chosen = {name: spread(_in_split(leaf.eval_docs, task.split), task.limit) for name, leaf in leaves.items()}
    return leaves, {name: indices for name, indices in chosen.items() if indices}


def _in_split(docs: Any, split: str) -> list[int]:
    keys = (digest(json.dumps(doc, sort_keys=True, default=str)) for doc in docs)
    return [i for i, key in enumerate(keys) if half_of(key) == split]


def _simple_evaluate(
    subject: Subject, task: Harness, leaves: list[Any], *, samples: dict[str, list[int]], budget: BatchLimit
) -> Any:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports] (an extra)
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports] (an extra)

    with _explained(task.id):
        wrapped = HFLM(
            pretrained=subject.model,
            tokenizer=deepcopy(subject.tokenizer),  # it is given a padding token there
            max_length=subject.context,
            batch_size=max(1, budget.tokens // subject.context),
        )
        return simple_evaluate(
            model=wrapped,
            tasks=leaves,
            num_fewshot=task.shots or None,  # a task has a number of its own
            samples=samples,
            use_cache=None,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=None,  # the state of generators is the caller's
            numpy_random_seed=None,
            torch_random_seed=None,
        )


def _samples(name: str, samples: Sequence[Mapping[str, Any]], better: Mapping[str, bool]) -> Iterator[Score]:
    """Yield a subtask's scores; where a response was filtered in several ways, by the first."""
    metric = _metric(name, samples[0], better)
    first = samples[0].get("filter")
    for sample in samples:
        if sample.get("filter") == first:
            response = json.dumps(sample.get("filtered_resps"), default=str)
            yield Score(f"{name}:{sample['doc_id']}:{metric}", float(sample[metric]), 1.0, response)


def _metric(name: str, sample: Mapping[str, Any], better: Mapping[str, bool]) -> str:
    usable = [m for m, higher in better.items() if higher and isinstance(sample.get(m), bool | int | float)]
    found = next((m for m in (*METRICS, *usable) if m in usable), None)
    if found is None:
        raise CheckpointError(
            f"lm:{printable(name)} has no metric of single items of which more is better. "
            "Of text, NAME=FILE measures bits per byte."
        )
    return found


def _content(folder: Path | None) -> str:
    """Return a digest of the files that describe tasks of one's own."""
    hasher = blake3.blake3()
    for path in sorted(folder.rglob("*")) if folder else ():
        if path.is_file():
            hasher.update(json.dumps([str(path.relative_to(folder or path)), path.stat().st_size]).encode())
            hasher.update(path.read_bytes())
    return hasher.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's bars and remarks off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever the harness raises into one message: its tasks are code of many people."""
    try:
        yield
    except Exception as error:
        first = printable(f"{type(error).__name__}: {error}".partition("\n")[0])
        raise CheckpointError(f"lm-evaluation-harness cannot run {printable(name)!r}: {first}.") from error
