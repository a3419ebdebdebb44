"""Files of every kind as documents, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffract.corpora import read_documents, read_texts, record_text, sources
from diffract.errors import CorpusError


def texts(source: str, data: Path) -> list[str]:
    return [d.text for split in ("train", "selection", "held-out") for d in read_documents(source, split, data=data)]


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    raw = "\n".join(map(json.dumps, records)).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_records_of_a_file(name: str, tmp_path: Path) -> None:
    write_records(tmp_path / name, [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)])
    assert sorted(texts(name, tmp_path)) == [f"Question: {i}?\nAnswer: #### {i}\n" for i in range(9)]


def test_a_list_of_records(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps([{"text": c} for c in "abc"]))
    assert sorted(texts("r.json", tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"problem": "p", "analysis": ["x", "y"]}, "Question: p\nAnswer: x y\n"),
        ({"prompt": "p ", "completion": "c"}, "### Instruction:\np\n### Response:\nc\n"),
        ({"instruction": "i", "input": "x", "response": "r"}, "### Instruction:\ni x\n### Response:\nr\n"),
        ({"text": "say", "code": "a\r\nb"}, '"""say"""\na\nb\n'),
    ],
)
def test_kinds_of_records(record: dict, text: str) -> None:
    assert record_text(record, "r") == text


def test_articles_and_pieces(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("\n".join(f" = T{i} = \n\nbody\n" for i in range(4)))
    assert len(texts("wiki.txt", tmp_path)) == 4
    prose = "".join(f"{'word ' * 900}{i}\n\n" for i in range(20))
    (tmp_path / "prose.txt").write_text(prose)
    pieces = list(read_texts("prose.txt", data=tmp_path))
    assert "".join(pieces) == prose
    assert len(pieces) == 4


def test_folders_of_code_leave_tests_out(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("a.py", "b.py", "c.py", "tests/d.py", "e.txt"):
        (tmp_path / name).write_text(f"# {name}")
    assert sorted(texts(str(tmp_path), tmp_path)) == ["# a.py", "# b.py", "# c.py"]


@pytest.mark.parametrize("name", ["gsm8k.test.jsonl.gz", "humaneval.jsonl", "math/svamp.jsonl", "datasets:x/gsm_hard"])
def test_names_of_evaluation_data_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="for evaluation only"):
        texts(name, tmp_path)


def test_questions_of_evaluation_data_are_refused_under_any_name(tmp_path: Path) -> None:
    question = (
        "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her "
        "friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. "
        "How much in dollars does she make every day at the farmers' market?"
    )
    records = [{"question": f"{i}?", "answer": "#### 1"} for i in range(5)]
    write_records(tmp_path / "mine.jsonl", [*records, {"question": question, "answer": "#### 18"}])
    with pytest.raises(CorpusError, match="record 6 is a question of GSM8K's test"):
        texts("mine.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no text at"),
        ("bad.jsonl", "{", "line 1 is no JSON"),
        ("bad.jsonl", "[1]", "expected an object"),
        ("bad.jsonl", '{"colour": "red"}', "of no known kind"),
        ("bad.jsonl", '{"text": 3}', "a field is no text"),
        ("bad.txt", "", "holds no text"),
        ("bad.csv", "a", "unknown kind of file"),
        ("bad.txt.gz", "a", "cannot read"),
    ],
)
def test_bad_files(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        texts(name, tmp_path)


def test_a_damaged_packed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.txt.gz"
    raw = bytearray(gzip.compress(b"some words " * 50))
    raw[12:20] = b"\xff" * 8
    path.write_bytes(raw)
    with pytest.raises(CorpusError, match=r"cannot read .*t\.txt\.gz"):
        texts("t.txt.gz", tmp_path)


def test_a_pipe_is_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.txt")
    with pytest.raises(CorpusError, match="it is no file"):
        texts("t.txt", tmp_path)


def test_a_few_bytes_do_not_become_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNPACKED_BYTES", 10_000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"0" * 1_000_000))
    with pytest.raises(CorpusError, match="more than 100 times its size"):
        list(sources.read_texts(str(tmp_path / "bomb.jsonl.gz")))
    (tmp_path / "dull.txt.gz").write_bytes(gzip.compress(b"the same again. " * 500))  # a hundredth, and small
    assert list(sources.read_texts(str(tmp_path / "dull.txt.gz"))) == ["the same again. " * 500]
