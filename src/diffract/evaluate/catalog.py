"""Tasks by name: what is known, and how a specification is read.

``math,code,text``             bits per byte of a domain's documents
``wiki=FILE+FILE``             bits per byte of sources, under a name
``gsm``, ``gsm:1-2``           made-up word problems, exact match; of some levels
``gsm=FILE``, ``gsm8k``        questions of a file in GSM8K's format, exact match
``aqua``, ``aqua=FILE``        choice by likelihood
``lm:NAME``                    a task of lm-evaluation-harness
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffract.corpora import RECORDS, Split, digest, make_problems, question_text
from diffract.corpora.splits import check_split
from diffract.corpora.word_problems import parse_levels, problems_to_evaluate
from diffract.errors import CorpusError, SelectionError, choose, printable
from diffract.evaluate.harness import lm_eval
from diffract.evaluate.scoring import cut, score_choices, score_questions, score_texts
from diffract.evaluate.sources import choices, documents, is_for_evaluation, questions
from diffract.evaluate.tasks import FoundItems, Question, Task, TaskKind, Wanted, spread, task_kind

HARNESS = "lm:"
"""What the name of a task of lm-evaluation-harness begins with."""

EXAMPLES = "math/gsm8k.train.jsonl.gz"
"""Where examples before real questions come from, within ``--data``."""

MADE_UP_TOKENS, REAL_TOKENS = 128, 400
"""The longest answers to made-up and to real questions."""


@task_kind("bits", score_texts, better="lower", unit="bits per byte")
def bits(wanted: Wanted) -> FoundItems:
    """Find the pieces of documents; a source of a domain that cannot be read is left out, with a note."""
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
    # Sources may share documents; one that counts twice would narrow the interval.
    pieces = list(cut({d.id: d for d in found}.values()))
    return FoundItems(spread(pieces, wanted.limit), read, notes)


@task_kind("exact", score_questions)
def exact(wanted: Wanted) -> FoundItems:
    """Find questions with a number as their answer, made-up ones or those of files, each after solved examples."""
    if wanted.word == "gsm" and not wanted.source:
        levels = parse_levels(wanted.levels)
        shots = make_problems("train", wanted.shots, levels=levels)
        begin = _before([(p.question, p.answer) for p in shots])
        problems = problems_to_evaluate(wanted.split, levels)
        items = [Question(p.id, begin + question_text(p.question), p.answer, tokens=MADE_UP_TOKENS) for p in problems]
        return FoundItems(spread(items, wanted.limit), [f"word-problems:{wanted.levels}".rstrip(":")])
    sources = _sources(wanted)
    asked = [a for source in sources for a in questions(source, wanted.split, wanted.data)]
    begin = _examples(wanted, sources)
    found = {q: Question(digest(q), begin + question_text(q), a, tokens=REAL_TOKENS) for q, a in asked}
    return FoundItems(spread(list(found.values()), wanted.limit), sources)


@task_kind("choice", score_choices)
def choice(wanted: Wanted) -> FoundItems:
    """Find questions with options; whoever guesses is right as often as there are options."""
    sources = _sources(wanted)
    found = {c.id: c for source in sources for c in choices(source, wanted.split, wanted.data)}
    items = spread(list(found.values()), wanted.limit)
    return FoundItems(items, sources, chance=sum(1 / len(c.options) for c in items) / len(items))


KINDS: tuple[TaskKind, ...] = (bits, exact, choice, lm_eval)
"""All ways of measuring quality."""


@dataclass(frozen=True)
class NamedTask:
    """What a name stands for.

    Attributes:
        name: As specifications have it.
        kind: How quality is measured.
        files: Where the items are, within ``--data``; of a domain the folder.
        built_in: The source where there is no file.
    """

    name: str
    kind: TaskKind
    files: str
    built_in: str | None = None


TASKS: tuple[NamedTask, ...] = (
    NamedTask("text", bits, "natural/"),
    NamedTask("natural", bits, "natural/"),
    NamedTask("math", bits, "math/", built_in="word-problems"),
    NamedTask("code", bits, "code/", built_in="stdlib"),
    NamedTask("instructions", bits, "instructions/"),
    NamedTask("mbpp", bits, "code/mbpp.jsonl.gz"),
    NamedTask("humaneval", bits, "code/humaneval.jsonl.gz"),
    NamedTask("gsm", exact, "", built_in="word-problems"),
    NamedTask("gsm8k", exact, "math/gsm8k.test.jsonl.gz"),
    NamedTask("svamp", exact, "math/svamp.jsonl.gz"),
    NamedTask("gsm-hard", exact, "math/gsm_hard.jsonl.gz"),
    NamedTask("aqua", choice, "math/aqua.dev.jsonl.gz+math/aqua.test.jsonl.gz"),
    NamedTask("tal", choice, "math/tal_scq5k_en.test.jsonl.gz"),
)
"""Everything that a specification can name."""

CATALOG = {task.name: task for task in TASKS}


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
    wanted = [Wanted(**_read(entry), split=split, data=where, limit=limit, shots=shots) for entry in entries]
    names = [w.name for w in wanted]
    if not names or len(set(names)) < len(names):
        raise SelectionError(f"expected tasks that differ in name, got {printable(', '.join(names))!r}.")
    kinds = {named.name: named.kind for named in TASKS} | {HARNESS: lm_eval}
    # A name of one's own, with sources of one's own, measures text.
    return [kinds.get(w.word, bits).task(w) for w in wanted]


def _read(entry: str) -> dict[str, str]:
    """Return name, word, levels and source of an entry of a specification."""
    name, _, source = entry.partition("=")
    if name.startswith(HARNESS) and not source and len(name) > len(HARNESS):
        return {"name": name, "word": HARNESS, "levels": "", "source": name.removeprefix(HARNESS)}
    word, colon, levels = name.partition(":")
    if (word not in CATALOG and not source) or (colon and (word != "gsm" or source)) or not word:
        choose("task", entry, CATALOG, further=f"{HARNESS}NAME, NAME=SOURCE")
    return {"name": name, "word": word, "levels": levels, "source": source}


def _sources(wanted: Wanted) -> list[str]:
    """Return where a task's items are."""
    if wanted.source:
        return wanted.source.split("+")
    named, data = CATALOG[wanted.word], wanted.data
    files: list[str] = []
    if data and named.files.endswith("/"):
        # A folder may also hold what is for evaluation only; that is a task of its own.
        suffixes = (*RECORDS, ".txt", ".txt.gz")
        there = sorted(path for path in (data / named.files).glob("*") if path.name.endswith(suffixes))
        files = [str(path.relative_to(data)) for path in there if not is_for_evaluation(path.name)]
    elif data and named.files:
        files = named.files.split("+")
    if not files and named.built_in is None:
        raise CorpusError(
            f"task {wanted.name} needs text: pass --data FOLDER with {named.files or 'files'}, or {wanted.name}=FILE."
        )
    return files or [str(named.built_in)]


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
