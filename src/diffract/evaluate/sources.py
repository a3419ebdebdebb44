"""Where the items of tasks come from: documents, questions and choices of one split.

Files that may be trained on are split as training splits them. What is for evaluation only has no part for training: it
is split in two halves by content, so that what is chosen on the one can be reported on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from diffract.corpora import (
    RECORDS,
    Document,
    Split,
    chat_turns,
    digest,
    question_text,
    read_documents,
    read_records,
    record_text,
    refuse_evaluation_only,
    split_documents,
)
from diffract.corpora.splits import document
from diffract.errors import CorpusError, printable
from diffract.evaluate.grading import final_number
from diffract.evaluate.tasks import MultipleChoice, half_of

Record = Mapping[str, Any]

Asked = tuple[str, str]
"""A question and its answer."""

QUESTIONS: dict[tuple[str, ...], Callable[[Record], Asked]] = {
    ("question", "answer"): lambda r: (r["question"], r["answer"]),
    ("Body", "Question", "Answer"): lambda r: (f"{r['Body'].strip()} {r['Question'].strip()}", _plain(r["Answer"])),
    ("input", "target"): lambda r: (r["input"], _plain(r["target"])),
    ("messages",): lambda r: _last_turn(r["messages"]),
    ("conversations",): lambda r: _last_turn(r["conversations"]),
}
"""Fields of a record (GSM8K, SVAMP, GSM-hard, chats of one turn) to what is asked and what is right."""

Offered = tuple[str, Mapping[str, str], str]
"""A question, its options by letter, and the right letter."""

CHOICES: dict[tuple[str, ...], Callable[[Record], Offered]] = {
    ("question", "options", "correct"): lambda r: (
        r["question"],
        {letter.strip(): text.strip() for letter, _, text in (o.partition(")") for o in r["options"])},
        r["correct"],
    ),
    ("problem", "options", "answer"): lambda r: (r["problem"], r["options"], r["answer"]),
}
"""Fields of a record (AQuA, whose options are such as ``A)12``; TAL-SCQ5K) to what they offer."""


def documents(source: str, split: Split, data: Path | None) -> list[Document]:
    """Return the documents of a source that are in a split; equal ones once.

    Raises:
        CorpusError: The source cannot be read, holds no text, or the split has none of it.
    """
    path = find_file(source, data)
    if path is None:
        found = list(read_documents(source, split, data=data))
    else:
        records = _records(source, data)
        texts = [document(record_text(r, f"{printable(source)}, record {i}")) for i, r in enumerate(records, start=1)]
        found = _in_split(source, records, texts, split)
    found = list({d.id: d for d in found if d.text.strip()}.values())
    if not found:
        raise CorpusError(f"{printable(source)} holds no text in the {split} split. Is this the right source?")
    return found


def questions(source: str, split: Split, data: Path | None) -> list[Asked]:
    """Return questions with their answers of a file's split; equal questions once, and none that another split has too.

    Raises:
        CorpusError: The file is not there, or a record has no question, or no number as its answer.
    """
    records = _records(source, data)
    asked = [_parsed(QUESTIONS, r, source, i) for i, r in enumerate(records, start=1)]
    for number, (_, answer) in enumerate(asked, start=1):
        if final_number(answer) is None:
            raise CorpusError(
                f"{printable(source)}, record {number}: {printable(answer, 60)!r} is no number to grade by. "
                "Mend the file."
            )
    made = [Document(digest(question), question) for question, _ in asked]
    # A question that stands in two splits may have been trained on, and counts in neither.
    every, own = (Counter(d.id for d in found) for found in (made, _in_split(source, records, made, split)))
    kept = {d.id: a for d, a in zip(made, asked, strict=True) if own[d.id] == every[d.id]}
    return _some(list(kept.values()), source, split)


def choices(source: str, split: Split, data: Path | None) -> list[MultipleChoice]:
    """Return the choices of a file's split; equal ones once.

    Raises:
        CorpusError: The file is not there, or a record is no choice, or its right option is not among the options.
    """
    records = _records(source, data)
    parsed = [_parsed(CHOICES, r, source, i) for i, r in enumerate(records, start=1)]
    made = [_choice(p, f"{printable(source)}, record {i}") for i, p in enumerate(parsed, start=1)]
    wanted = {d.id for d in _in_split(source, records, [Document(c.id, c.prompt) for c in made], split)}
    return _some([c for c in {c.id: c for c in made}.values() if c.id in wanted], source, split)


def find_file(source: str, data: Path | None) -> Path | None:
    """Return the file of records that a source names, or ``None`` where it is something else."""
    return next((p for p in _places(source, data) if p.name.endswith(RECORDS) and p.is_file()), None)


def is_for_evaluation(name: str, records: Iterable[Record] = ()) -> bool:
    """Return whether something must not be trained on."""
    try:
        refuse_evaluation_only(name, (str(r.get("question", "")) for r in records))
    except CorpusError:
        return True
    return False


def _places(source: str, data: Path | None) -> list[Path]:
    return [Path(source), *([data / source] if data else [])]


def _last_turn(messages: Sequence[Mapping[str, str]]) -> Asked:
    """Return what is asked and answered in a chat; one of several turns has no question of its own."""
    turns = chat_turns(messages)
    if len(turns) != 1:
        raise ValueError(f"a chat of {len(turns)} turns, expected one question and its answer")
    return turns[0]


def _in_split(source: str, records: Sequence[Record], made: Sequence[Document], split: Split) -> list[Document]:
    """Return those in a split, as training would split the records' texts, or of the halves.

    Args:
        source: The name of what holds the records.
        records: What training would make texts of.
        made: What evaluation has made of the records, one for each.
        split: Which split is wanted.
    """
    texts = None
    if not is_for_evaluation(source, records):
        # What training can make no texts of it never sees, so that halves are safe there too.
        with suppress(CorpusError):
            texts = [document(record_text(record, "")) for record in records]
    if texts is None:
        if split == "train":
            raise CorpusError(f"{printable(source)} is for evaluation only, it has no train split.")
        return [d for d in made if half_of(d.id) == split]
    wanted = {d.id for d in split_documents(texts, split)}
    return [d for d, text in zip(made, texts, strict=True) if text.id in wanted]


def _records(source: str, data: Path | None) -> list[Record]:
    path = find_file(source, data)
    if path is None:
        if there := next((p for p in _places(source, data) if p.exists()), None):
            kind = "a folder" if there.is_dir() else "of no kind that is read"
            raise CorpusError(f"{printable(there)!r} is {kind}: expected a file of records, {', '.join(RECORDS)}.")
        where = f" there or in {printable(data)!r}" if data else "; --data says where files are"
        raise CorpusError(f"no file {printable(source)!r}{where}: expected {', '.join(RECORDS)}.")
    records = list(read_records(path))
    if not records:
        raise CorpusError(f"{printable(source)} holds no records. Is this the right file?")
    return records


def _parsed(kinds: Mapping[tuple[str, ...], Callable[[Record], Any]], record: Record, source: str, number: int) -> Any:
    where = f"{printable(source)}, record {number}"
    parse = next((parse for fields, parse in kinds.items() if all(field in record for field in fields)), None)
    if parse is None:
        known = "; ".join(" + ".join(fields) for fields in kinds)
        raise CorpusError(
            f"{where} has no answer to grade by: expected the fields {known}, got {printable(', '.join(record))}."
        )
    try:
        return parse(record)
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CorpusError(f"{where}: a field is not what it should be ({printable(error)}). Mend the file.") from error


def _choice(offered: Offered, where: str) -> MultipleChoice:
    question, options, right = offered
    letters = list(options)
    if right not in letters or len(letters) < 2:
        raise CorpusError(
            f"{where}: the right option {printable(right)!r} is not among {printable(', '.join(letters))!r}. "
            "Mend the file."
        )
    texts = tuple(str(option).strip() for option in options.values())
    return MultipleChoice(
        digest(f"{question} {texts}"), question_text(question), options=texts, right=letters.index(right)
    )


def _plain(value: Any) -> str:
    """Return a number as text without an exponent."""
    return value if isinstance(value, str) else f"{Decimal(str(value)):f}"


def _some(found: list[Any], source: str, split: Split) -> list[Any]:
    if not found:
        raise CorpusError(f"{printable(source)} has no items in the {split} split. Give a larger file.")
    return found
