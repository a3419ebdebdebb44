"""Data sets as they are published: Parquet files, and chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from diffract.corpora import read_texts
from diffract.errors import CorpusError
from diffract.evaluate import load_tasks
from diffract.evaluate.sources import questions

ASKED = [{"question": f"How many are {n} and {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(40)]


def chat(question: str, answer: str, *, system: str = "") -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame(records).write_parquet(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_questions_of_a_parquet_file_are_those_of_json_lines(tmp_path: Path) -> None:
    parquet, lines = write(tmp_path / "test.parquet", ASKED), write(tmp_path / "test.jsonl", ASKED)
    for split in ("train", "selection", "held-out"):
        assert questions(str(parquet), split, None) == questions(str(lines), split, None)
    assert list(read_texts(str(parquet))) == list(read_texts(str(lines)))
    assert load_tasks("gsm=test.parquet", data=tmp_path, limit=2)[0].items


def test_a_chat_of_one_turn_is_a_question(tmp_path: Path) -> None:
    chats = [chat(record["question"], record["answer"]) for record in ASKED]
    for path in (write(tmp_path / "chat.parquet", chats), write(tmp_path / "chat.jsonl", chats)):
        found = {asked for split in ("train", "held-out") for asked in questions(str(path), split, None)}
        assert found <= {(record["question"], record["answer"]) for record in ASKED}
        assert len(found) > 30


def test_texts_of_chats(tmp_path: Path) -> None:
    several = chat("One?", "1", system="Be brief.")
    several["messages"] += chat("Two?", "2")["messages"]
    shared = {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]}
    told = list(read_texts(str(write(tmp_path / "chats.jsonl", [several, shared]))))
    assert told == [
        "### Instruction:\nBe brief.\nOne?\n### Response:\n1\n### Instruction:\nTwo?\n### Response:\n2\n",
        "### Instruction:\nOne?\n### Response:\n1\n",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("a", "#### 1") | {"messages": [{"role": "tool", "content": "x"}]}, "a message of 'tool' is no text of"),
        ({"messages": "text"}, "a field is not what it should be"),
        ({"messages": [{"role": "user", "content": ["parts"]}]}, "a message of 'user' is no text of"),
        ({"messages": chat("a", "b")["messages"] * 2}, "a chat of 2 turns, expected one question and its answer"),
        ({"prompt": "a", "label": "b"}, "has no answer to grade by: expected the fields"),
    ],
)
def test_records_of_another_kind(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.jsonl", [record])
    with pytest.raises(CorpusError, match=message):
        questions(str(path), "train", None)


def test_a_file_that_is_there_is_never_called_absent(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("question,answer")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    for name, message in (
        ("data.csv", "data.csv' is of no kind that is read"),
        ("folder", "folder' is a folder"),
        ("gone.jsonl", "no file 'gone.jsonl'"),
        ("broken.parquet", "cannot read .*broken.parquet"),
    ):
        with pytest.raises(CorpusError, match=message):
            questions(name, "train", tmp_path)
