"""Records of data sets as texts to train on: one row for each kind of record, recognised by its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffract.errors import CorpusError, printable

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


KINDS: dict[tuple[str, ...], Callable[[Record], str]] = {
    ("question", "answer"): lambda r: question_text(r["question"], r["answer"]),
    ("problem", "analysis"): lambda r: question_text(r["problem"], " ".join(r["analysis"])),
    ("prompt", "completion"): lambda r: instruction_text(r["prompt"], r["completion"]),
    ("instruction", "response"): lambda r: instruction_text(f"{r['instruction']} {r.get('input', '')}", r["response"]),
    ("instruction", "output"): lambda r: instruction_text(f"{r['instruction']} {r.get('input', '')}", r["output"]),
    ("text", "code"): lambda r: f'"""{r["text"].strip()}"""\n{r["code"].strip()}\n',
    ("prompt", "canonical_solution"): lambda r: r["prompt"] + r["canonical_solution"],
    ("text",): lambda r: r["text"],
    ("content",): lambda r: r["content"],
}
"""Fields that a record must have, to the text that it makes; the first kind that fits counts."""


def record_text(record: Record, where: str) -> str:
    """Return a record's text.

    Args:
        record: Fields by name.
        where: What to call it in a message.

    Raises:
        CorpusError: It is of no known kind, or a field is no text.
    """
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
