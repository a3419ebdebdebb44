"""Tasks by name: what is known, and how a specification is read.

``math,code,text``             bits per byte of a domain's documents
``wiki=FILE+FILE``             bits per byte of sources, under a name
``gsm``, ``gsm:1-2``           made-up word problems, exact match; of some levels
``gsm=FILE``, ``gsm8k``        questions of a file in GSM8K's format, exact match
``aqua``, ``aqua=FILE``        choice by likelihood
``lm:NAME``                    a task of lm-evaluation-harness
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffract.corpora import Problem, Split, digest, make_problems, question_text
from diffract.corpora.splits import check_split
from diffract.corpora.word_problems import COUNT, parse_levels
from diffract.errors import CorpusError, SelectionError, choose, printable
from diffract.evaluate.harness import harness_item
from diffract.evaluate.scoring import cut
from diffract.evaluate.sources import JSON, choices, documents, is_for_evaluation, questions
from diffract.evaluate.tasks import Item, Kind, Question, Task, make_task, spread


@dataclass(frozen=True)
class Entry:
    """What a name stands for.

    Attributes:
        kind: Of its tasks.
        files: Where its items are, within ``--data``; of a domain the folder.
        built_in: Its source where there is no file.
    """

    kind: Kind
    files: str
    built_in: str | None = None


CATALOG: dict[str, Entry] = {
    "text": Entry("bits", "natural/"),
    "natural": Entry("bits", "natural/"),
    "math": Entry("bits", "math/", "word-problems"),
    "code": Entry("bits", "code/", "stdlib"),
    "instructions": Entry("bits", "instructions/"),
    "mbpp": Entry("bits", "code/mbpp.jsonl.gz"),
    "humaneval": Entry("bits", "code/humaneval.jsonl.gz"),
    "gsm": Entry("exact", "", "word-problems"),
    "gsm8k": Entry("exact", "math/gsm8k.test.jsonl.gz"),
    "svamp": Entry("exact", "math/svamp.jsonl.gz"),
    "gsm-hard": Entry("exact", "math/gsm_hard.jsonl.gz"),
    "aqua": Entry("choice", "math/aqua.dev.jsonl.gz+math/aqua.test.jsonl.gz"),
    "tal": Entry("choice", "math/tal_scq5k_en.test.jsonl.gz"),
}

HARNESS = "lm:"

EXAMPLES = "math/gsm8k.train.jsonl.gz"
"""Where examples before real questions come from, within ``--data``."""

MADE_UP_TOKENS, REAL_TOKENS = 128, 400
"""Of an answer to a made-up and to a real question, at most."""


@dataclass(frozen=True)
class Wanted:
    """One entry of a specification, and how to read it.

    Attributes:
        name: What tables call the task.
        word: Its name in the catalog, or the same as ``name``.
        levels: Of made-up problems.
        source: Given explicitly, or nothing.
        split: Of the items.
        data: The folder of ``--data``.
        limit: Items at most.
        shots: Examples before a question.
    """

    name: str
    word: str
    levels: str
    source: str
    split: Split
    data: Path | None
    limit: int | None
    shots: int


def load_tasks(
    spec: str | Sequence[str],
    *,
    split: Split = "held-out",
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
) -> list[Task]:
    """Return tasks with their items.

    Args:
        spec: Names, separated by commas or as a list, each alone or as ``name=SOURCE+SOURCE``.
        split: ``held-out`` to report, ``selection`` to choose by; ``train`` where a source has it.
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most, evenly spread over all.
        shots: Solved examples of the train split before each question that is answered freely, and in tasks of
            lm-evaluation-harness.

    Raises:
        SelectionError: A task is unknown or named twice, or a number makes no sense.
        CorpusError: A source is not there, cannot be read, or has no answers.
    """
    check_split(split)
    if (limit is not None and limit < 1) or shots < 0:
        raise SelectionError(f"expected limit >= 1 and shots >= 0, got {limit} and {shots}.")
    entries = [e.strip() for e in (spec.split(",") if isinstance(spec, str) else spec) if e.strip()]
    where = Path(data).expanduser() if data is not None else None
    if where is not None and not where.is_dir():
        raise CorpusError(f"no folder at {printable(data)!r}, expected one with a folder of files for each domain.")
    wanted = [_read(entry, split, where, limit, shots) for entry in entries]
    names = [w.name for w in wanted]
    if not names or len(set(names)) < len(names):
        raise SelectionError(f"expected tasks that differ in name, got {printable(', '.join(names))!r}.")
    return [LOADERS[_kind(w)](w) for w in wanted]


def _read(entry: str, split: Split, data: Path | None, limit: int | None, shots: int) -> Wanted:
    name, _, source = entry.partition("=")
    if name.startswith(HARNESS) and not source and len(name) > len(HARNESS):
        return Wanted(name, HARNESS, "", name.removeprefix(HARNESS), split, data, limit, shots)
    word, colon, levels = name.partition(":")
    if (word not in CATALOG and not source) or (colon and (word != "gsm" or source)) or not word:
        choose("task", entry, CATALOG, further=f"{HARNESS}NAME or NAME=SOURCE")
    return Wanted(name, word, levels, source, split, data, limit, shots)


def _kind(wanted: Wanted) -> Kind:
    if wanted.word == HARNESS:
        return "lm-eval"
    return CATALOG[wanted.word].kind if wanted.word in CATALOG else "bits"


def _load_bits(wanted: Wanted) -> Task:
    sources, notes = _sources(wanted), []
    read, found = [], []
    for source in sources:
        try:
            found += documents(source, wanted.split, wanted.data)
            read.append(source)
        except CorpusError as error:
            if wanted.source or len(sources) == 1:
                raise
            notes.append(f"{wanted.name}: left out: {error}")
    if not found:
        raise CorpusError(f"task {wanted.name}: nothing could be read. " + " ".join(notes))
    pieces = list(cut({d.id: d for d in found}.values()))
    return make_task(wanted.name, "bits", wanted.split, spread(pieces, wanted.limit), sources=read, notes=notes)


def _load_exact(wanted: Wanted) -> Task:
    if wanted.word == "gsm" and not wanted.source:
        sources, items = [f"word-problems:{wanted.levels}".rstrip(":")], _made_up(wanted)
    else:
        sources = _sources(wanted)
        asked = [a for source in sources for a in questions(source, wanted.split, wanted.data)]
        begin = _examples(wanted, sources)
        found = {q: Question(digest(q), begin + question_text(q), a, REAL_TOKENS) for q, a in asked}
        items = list(found.values())
    return make_task(wanted.name, "exact", wanted.split, spread(items, wanted.limit), sources=sources)


def _load_choice(wanted: Wanted) -> Task:
    sources = _sources(wanted)
    found = {c.id: c for source in sources for c in choices(source, wanted.split, wanted.data)}
    items = spread(list(found.values()), wanted.limit)
    chance = sum(1 / len(c.options) for c in items) / len(items)
    return make_task(wanted.name, "choice", wanted.split, items, sources=sources, chance=chance)


def _load_harness(wanted: Wanted) -> Task:
    item = harness_item(wanted.source, wanted.split, shots=wanted.shots, limit=wanted.limit, data=wanted.data)
    return make_task(wanted.name, "lm-eval", wanted.split, [item], sources=[f"lm-evaluation-harness {wanted.source}"])


LOADERS: dict[Kind, Callable[[Wanted], Task]] = {
    "bits": _load_bits,
    "exact": _load_exact,
    "choice": _load_choice,
    "lm-eval": _load_harness,
}


def _sources(wanted: Wanted) -> list[str]:
    """Return where a task's items are."""
    if wanted.source:
        return wanted.source.split("+")
    entry = CATALOG[wanted.word]
    files: list[str] = []
    if wanted.data and entry.files.endswith("/"):
        files = _files_of_domain(wanted.data, entry.files)
    elif wanted.data and entry.files:
        files = entry.files.split("+")
    if not files and entry.built_in is None:
        raise CorpusError(
            f"task {wanted.name} needs text: pass --data FOLDER with {entry.files or 'files'}, or {wanted.name}=FILE."
        )
    return files or [str(entry.built_in)]


def _files_of_domain(data: Path, folder: str) -> list[str]:
    """Return a domain's files, but those that are for evaluation only, by name."""
    suffixes = (*JSON, ".txt", ".txt.gz")
    found = sorted(p for p in (data / folder).glob("*") if p.name.endswith(suffixes) and not is_for_evaluation(p.name))
    return [str(p.relative_to(data)) for p in found]


def _made_up(wanted: Wanted) -> list[Item]:
    levels = parse_levels(wanted.levels)
    shots = make_problems("train", wanted.shots, levels=levels)
    begin = _before([(p.question, p.answer) for p in shots])
    problems = _problems(wanted.split, levels)
    return [Question(p.id, begin + question_text(p.question), p.answer, MADE_UP_TOKENS) for p in problems]


@cache
def _problems(split: Split, levels: tuple[int, ...]) -> tuple[Problem, ...]:
    """Return all problems of a split; drawing them takes longer than reading a file."""
    return tuple({p.id: p for p in make_problems(split, COUNT[split], levels=levels)}.values())


def _examples(wanted: Wanted, sources: Sequence[str]) -> str:
    """Return solved examples of the train split: of the first source that has one, else of GSM8K's training file."""
    if not wanted.shots:
        return ""
    for source in (*sources, EXAMPLES):
        try:
            return _before(spread(questions(source, "train", wanted.data), wanted.shots))
        except CorpusError:
            continue
    raise CorpusError(f"task {wanted.name}: no train split to take examples from: pass --data FOLDER with {EXAMPLES}.")


def _before(examples: Sequence[tuple[Any, Any]]) -> str:
    return "".join(f"{question_text(question, answer)}\n" for question, answer in examples)
