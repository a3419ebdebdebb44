"""Which documents are for training, for choosing, and for reporting: by content, so that order does not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any, Literal, get_args

from diffract.errors import CorpusError, choose, printable

Split = Literal["train", "selection", "held-out"]

SHARE = 0.05
"""Such a share of the documents is held out, another is for selection, the rest is for training."""


@dataclass(frozen=True)
class Document:
    """A text that is in one split as a whole.

    Attributes:
        id: 32 hex digits, of the text alone.
        text: The text.
    """

    id: str
    text: str


def document(text: str) -> Document:
    """Return a text as a document."""
    return Document(digest(text), text)


def digest(text: str) -> str:
    """Return 32 hex digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_of(key: str) -> Split:
    """Return the split of one document, or of one instance, from a digest of it alone.

    >>> split_of("00" * 16), split_of("ff" * 16)
    ('held-out', 'train')
    """
    # A threshold on the digest: a stream without end can be split so, and new documents move no old one.
    place = int(key[:16], 16) / 2**64
    return "held-out" if place < SHARE else "selection" if place < 2 * SHARE else "train"


def split_documents(documents: Iterable[Document], split: Split) -> list[Document]:
    """Return those of a finished collection that are in a split; each split gets one at least if there are three.

    Equal documents are one. They keep their order.

    Raises:
        CorpusError: There are too few documents, or there is no such split.
    """
    check_split(split)
    unique = list({d.id: d for d in documents}.values())
    if len(unique) < len(get_args(Split)):
        raise CorpusError(f"{len(unique)} documents cannot be split into {', '.join(get_args(Split))}. Give more text.")
    # By rank and not by threshold: a small collection would else often have nothing held out.
    ranked = sorted(d.id for d in unique)
    few = max(1, round(SHARE * len(ranked)))
    parts: dict[str, Sequence[str]] = {
        "held-out": ranked[:few],
        "selection": ranked[few : 2 * few],
        "train": ranked[2 * few :],
    }
    wanted = set(parts[split])
    return [d for d in unique if d.id in wanted]


def check_split(split: str) -> None:
    """Raise unless a split is one.

    Raises:
        CorpusError: There is no such split.
    """
    choose("split", split, get_args(Split), error=CorpusError)


Record = Mapping[str, Any]


def question_text(question: str, answer: str = "") -> str:
    r"""Return a question and its answer, as training texts have them and as prompts begin.

    >>> question_text("How many?", "#### 2")
    'Question: How many?\nAnswer: #### 2\n'
    """
    return f"Question: {question.strip()}\nAnswer:" + (f" {answer.strip()}\n" if answer else "")


def instruction_text(instruction: str, response: str = "") -> str:
    """Return an instruction and its response, as training texts have them and as prompts begin."""
    return f"### Instruction:\n{instruction.strip()}\n### Response:\n" + (f"{response.strip()}\n" if response else "")


def chat_turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return what is asked and answered in a chat, turn by turn; what the system says goes before the first question.

    Args:
        messages: ``role`` and ``content`` of each, or ``from`` and ``value``.

    Raises:
        TypeError: They are no messages.
    """
    turns: list[tuple[str, str]] = []
    asked: list[str] = []
    for message in messages:
        role = message.get("role") or message.get("from")
        content = message.get("content", message.get("value"))
        if not isinstance(content, str) or role not in SPEAKERS:
            raise TypeError(f"a message of {role!r} is no text of {', '.join(SPEAKERS)}")
        if SPEAKERS[role] == "assistant":
            turns.append(("\n".join(asked), content))
            asked = []
        else:
            asked.append(content)
    return turns


SPEAKERS = {"system": "user", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""What chat records call those who speak."""


def _chat_text(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(instruction_text(asked, said) for asked, said in chat_turns(messages))


KINDS: dict[tuple[str, ...], Callable[[Record], str]] = {
    ("question", "answer"): lambda r: question_text(r["question"], r["answer"]),
    ("problem", "analysis"): lambda r: question_text(r["problem"], " ".join(r["analysis"])),
    ("prompt", "completion"): lambda r: instruction_text(r["prompt"], r["completion"]),
    ("instruction", "response"): lambda r: instruction_text(f"{r['instruction']} {r.get('input', '')}", r["response"]),
    ("instruction", "output"): lambda r: instruction_text(f"{r['instruction']} {r.get('input', '')}", r["output"]),
    ("text", "code"): lambda r: f'"""{r["text"].strip()}"""\n{r["code"].strip()}\n',
    ("prompt", "canonical_solution"): lambda r: r["prompt"] + r["canonical_solution"],
    ("messages",): lambda r: _chat_text(r["messages"]),
    ("conversations",): lambda r: _chat_text(r["conversations"]),
    ("text",): lambda r: r["text"],
    ("content",): lambda r: r["content"],
}
"""Fields that a record must have, to the text that it makes; the first kind that fits counts."""


def record_text(record: Record, where: str) -> str:
    """Return a record's text.

    Args:
        record: Fields by name.
        where: What to call the record in a message.

    Raises:
        CorpusError: The record is of no known kind, or a field is no text.
    """
    # A record may have fields of several kinds: the kinds that say most of a text come first.
    make = next((make for fields, make in KINDS.items() if all(field in record for field in fields)), None)
    if make is None:
        known = "; ".join(" + ".join(fields) for fields in KINDS)
        raise CorpusError(
            f"{where}: fields {printable(', '.join(record))} are of no known kind ({known}). Rename them."
        )
    try:
        return make(record).replace("\r\n", "\n")
    except (TypeError, AttributeError) as error:
        raise CorpusError(f"{where}: a field is no text ({printable(error)}). Mend the file.") from error


NAMES = (
    *("gsm8k.test*", "gsm8k_test*", "gsm8k.example_model_solutions*", "gsm_hard*", "gsmhard*", "gsm8k_main_test*"),
    *("humaneval*", "human-eval*", "HumanEval*", "user_oriented_instructions*", "svamp*", "SVAMP*"),
    *("aqua.dev*", "aqua.test*", "tal_scq5k_en.test*", "mbpp*"),
)
"""Names of files and data sets that nothing is trained on."""

DIGITS = 12
"""Digits that are kept of the digests of questions."""


def refuse_evaluation_only(name: str, questions: Iterable[str] = ()) -> None:
    """Raise if something is for evaluation only.

    Args:
        name: The name of a file or data set.
        questions: What is asked in it, as far as that is known: GSM8K's test questions are told under any name.

    Raises:
        CorpusError: It is for evaluation only.
    """
    bare = PurePath(name).name
    if any(fnmatchcase(bare, pattern) for pattern in NAMES):
        raise CorpusError(f"{printable(name)} is for evaluation only: do not train on it. Choose other text.")
    for number, question in enumerate(questions, start=1):
        # Copies are wrapped in other ways and called by other names; only the words tell.
        if question and digest(" ".join(question.split()))[:DIGITS] in _gsm8k_test():
            raise CorpusError(f"{printable(name)}, record {number} is a question of GSM8K's test: do not train on it.")


@cache
def _gsm8k_test() -> frozenset[str]:
    """Return the beginnings of the digests of GSM8K's test questions, blanks made one."""
    return frozenset((files("diffract.corpora") / "gsm8k_test.txt").read_text().split())
