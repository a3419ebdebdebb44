"""From names to items: built in, from files, by split."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from diffract.corpora import read_documents
from diffract.errors import CorpusError, SelectionError
from diffract.evaluate import Task, load_tasks
from diffract.evaluate.tasks import MultipleChoice, Piece, Question


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def asked(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + 1?", "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
            for i in range(count)]  # fmt: skip


def ids(task: Task) -> set[str]:
    return {item.id for item in task.items}


def test_built_in_domains() -> None:
    math, code, gsm = load_tasks("math, code,gsm", limit=30)
    assert [(t.name, t.kind, t.unit, t.better) for t in (math, code, gsm)] == [
        ("math", "bits", "bits per byte", "lower"),
        ("code", "bits", "bits per byte", "lower"),
        ("gsm", "exact", "accuracy", "higher"),
    ]
    assert math.sources == ("word-problems",)
    assert code.sources == ("stdlib",)
    assert all(len(t.items) == 30 for t in (math, code, gsm))
    held_out = {d.text for d in read_documents("word-problems", "held-out")}
    assert {item.text for item in math.items if isinstance(item, Piece)} <= held_out


def test_splits_share_nothing_and_keys_tell_them_apart() -> None:
    (chosen,), (reported,) = load_tasks("gsm:1-2", split="selection"), load_tasks("gsm:1-2")
    assert not ids(chosen) & ids(reported)
    assert chosen.key != reported.key
    assert load_tasks("gsm:1-2")[0].key == reported.key
    assert load_tasks("gsm:1-2", limit=5)[0].key != reported.key
    assert load_tasks("gsm:1-2", shots=1)[0].key != reported.key
    assert ids(load_tasks("gsm:1-2", limit=5)[0]) < ids(reported)


def test_a_domains_files(tmp_path: Path) -> None:
    texts = [{"text": f"Some text, number {i}. " * 20} for i in range(40)]
    write(tmp_path / "natural" / "a.jsonl.gz", texts)
    write(tmp_path / "natural" / "b.jsonl", [{"name": "what", "instances": []}])
    write(tmp_path / "natural" / "svamp.jsonl", [{"text": "for evaluation only, by its name"}])
    (text,) = load_tasks("text", data=tmp_path)
    assert text.sources == ("natural/a.jsonl.gz",)
    assert [note.partition(" of no known kind")[0] for note in text.notes] == [
        "text: left out: natural/b.jsonl, record 1: fields name, instances are"
    ]
    assert {i.text for i in text.items if isinstance(i, Piece)} == {
        d.text for d in read_documents("natural/a.jsonl.gz", "held-out", data=tmp_path)
    }
    (code,) = load_tasks("code", data=tmp_path, limit=1)  # no folder for it: what is built in
    assert code.sources == ("stdlib",)


def test_sources_of_ones_own(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{"text": f"first {i}"} for i in range(20)])
    b = write(tmp_path / "b.jsonl", [{"text": f"second {i}"} for i in range(20)])
    (wiki,) = load_tasks([f"wiki={a}+{b}"])
    assert wiki.name == "wiki"
    assert sorted(i.text.split()[0] for i in wiki.items if isinstance(i, Piece)) == ["first", "second"]


def test_questions_of_a_training_file_are_held_out_of_training(tmp_path: Path) -> None:
    source = write(tmp_path / "own.jsonl", asked(60))
    (gsm,) = load_tasks(f"gsm={source}", shots=2)
    trained = [d.text for d in read_documents(source, "train")]
    held_out = [d.text for d in read_documents(source, "held-out")]
    questions = [i for i in gsm.items if isinstance(i, Question)]
    assert len(questions) == len(held_out) == 3
    for question in questions:
        one, two, last = question.prompt.split("\n\n")
        assert f"{one}\n" in trained
        assert f"{two}\n" in trained
        assert any(text.startswith(last) for text in held_out)
        assert question.answer.startswith(last.removeprefix("Question: What is ").partition(" ")[0])


def test_what_is_for_evaluation_only_is_split_in_halves(tmp_path: Path) -> None:
    write(tmp_path / "math" / "gsm8k.test.jsonl.gz", asked(200))
    (reported,), (chosen,) = load_tasks("gsm8k", data=tmp_path), load_tasks("gsm8k", split="selection", data=tmp_path)
    assert not ids(reported) & ids(chosen)
    assert len(reported.items) + len(chosen.items) == 200
    assert 70 <= len(reported.items) <= 130  # a fair half of 200, 4 standard deviations of 7
    with pytest.raises(CorpusError, match="for evaluation only, it has no train split"):
        load_tasks("gsm8k", split="train", data=tmp_path)
    bits = [load_tasks(f"test={tmp_path}/math/gsm8k.test.jsonl.gz", split=s)[0] for s in ("held-out", "selection")]
    assert len(ids(bits[0]) | ids(bits[1])) == len(bits[0].items) + len(bits[1].items) == 200


def test_a_question_that_is_trained_on_with_another_answer_is_not_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "own.jsonl", asked(60))
    before = [i for i in load_tasks(f"gsm={source}")[0].items if isinstance(i, Question)]
    asked_too = before[0].prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    write(tmp_path / "own.jsonl", [*asked(60), {"question": asked_too, "answer": "so\n#### 7"}])
    assert f"Question: {asked_too}\nAnswer: so\n#### 7\n" in [d.text for d in read_documents(source, "train")]
    assert any(asked_too in d.text for d in read_documents(source, "held-out"))
    assert ids(load_tasks(f"gsm={source}")[0]) == {i.id for i in before[1:]}


def test_other_formats_of_questions(tmp_path: Path) -> None:
    svamp = [
        {"Body": f"Tom has {i} pens. ", "Question": "How many?", "Answer": float(i), "Type": "-"} for i in range(9)
    ]
    hard = [{"input": f"What is {i}?", "target": 1.5e17 + i} for i in range(9)]
    write(tmp_path / "math" / "svamp.jsonl.gz", svamp)
    write(tmp_path / "math" / "gsm_hard.jsonl.gz", hard)
    both = [load_tasks("svamp,gsm-hard", split=s, data=tmp_path) for s in ("held-out", "selection")]
    found = {i.prompt: i.answer for tasks in both for t in tasks for i in t.items if isinstance(i, Question)}
    assert found["Question: Tom has 7 pens. How many?\nAnswer:"] == "7.0"
    assert found["Question: What is 0?\nAnswer:"] == "150000000000000000"
    assert len(found) == 18


def test_choices(tmp_path: Path) -> None:
    aqua = [{"question": f"{i}?", "options": ["A)1", "B) 2", "C)3"], "rationale": "", "correct": "B"} for i in range(9)]
    tal = [{"problem": f"{i}?", "options": {"A": "x", "B": "y"}, "answer": "A", "analysis": ["so"]} for i in range(60)]
    write(tmp_path / "math" / "aqua.dev.jsonl.gz", aqua[:4])
    write(tmp_path / "math" / "aqua.test.jsonl.gz", aqua[4:])
    own = write(tmp_path / "own.jsonl", tal)
    both = [load_tasks(["aqua", f"tal={own}"], split=s, data=tmp_path) for s in ("held-out", "selection")]
    items = [i for tasks in both for i in tasks[0].items if isinstance(i, MultipleChoice)]
    assert {(i.options, i.right) for i in items} == {(("1", "2", "3"), 1)}
    assert sorted(i.prompt for i in items) == [f"Question: {i}?\nAnswer:" for i in range(9)]
    assert both[0][0].chance == pytest.approx(1 / 3, abs=1e-15)
    assert both[0][1].chance == 0.5
    assert len(both[0][1].items) == 3  # a file that may be trained on: one in twenty


def test_limits_are_spread_over_all_documents(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": f"{i:03d} " * 6000} for i in range(100)])
    (few,) = load_tasks(f"x={source}", limit=5)  # five documents of four pieces each
    assert len({item.id.partition(":")[0] for item in few.items}) == 5


@pytest.mark.parametrize(
    ("spec", "options", "error", "text"),
    [
        ("gms", {}, SelectionError, "unknown task 'gms'.*Did you mean 'gsm'"),
        ("", {}, SelectionError, "expected tasks that differ in name, got ''"),
        ("math,math", {}, SelectionError, "differ in name"),
        ("math:1", {}, SelectionError, "unknown task 'math:1'"),
        ("gsm:7", {}, CorpusError, "expected levels"),
        ("gsm", {"limit": 0}, SelectionError, "limit >= 1"),
        ("gsm", {"split": "test"}, CorpusError, "unknown split"),
        ("text", {}, CorpusError, "task text needs text: pass --data FOLDER with natural/, or text=FILE"),
        ("gsm8k", {}, CorpusError, "pass --data FOLDER with math/gsm8k.test.jsonl.gz"),
        ("gsm8k", {"data": "{tmp}"}, CorpusError, "no file 'math/gsm8k.test.jsonl.gz' there or in"),
        ("gsm8k", {"data": "/nowhere"}, CorpusError, "no folder at '/nowhere'"),
        ("x=/nowhere.jsonl", {}, CorpusError, "no text at '/nowhere.jsonl'"),
        ("gsm={tmp}/unanswered.jsonl", {}, CorpusError, "unanswered.jsonl, record 1 has no answer to grade by"),
        ("gsm={tmp}/words.jsonl", {}, CorpusError, "words.jsonl, record 2: 'many' is no number to grade by"),
        ("gsm={tmp}/empty.jsonl", {}, CorpusError, "empty.jsonl holds no records"),
        ("x={tmp}/empty.jsonl", {}, CorpusError, "empty.jsonl holds no records"),
        ("aqua={tmp}/lost.jsonl", {}, CorpusError, "record 1: the right option 'D' is not among 'A, B'"),
        ("aqua={tmp}/words.jsonl", {}, CorpusError, "words.jsonl, record 1 has no answer to grade by"),
        ("gsm:1", {"shots": -1}, SelectionError, "shots >= 0"),
    ],
)
def test_wrong_input(tmp_path: Path, spec: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    write(tmp_path / "unanswered.jsonl", [{"question": "1+1?\u001b[31m"}] * 3)
    write(tmp_path / "words.jsonl", [*asked(1), {"question": "How?", "answer": "many"}])
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "lost.jsonl", [{"question": "?", "options": ["A)1", "B)2"], "correct": "D"}])
    given = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(error, match=text) as caught:
        load_tasks(spec.format(tmp=tmp_path), **given)
    assert "\x1b" not in str(caught.value)


def test_examples_need_a_train_split(tmp_path: Path) -> None:
    write(tmp_path / "math" / "gsm8k.test.jsonl.gz", asked(20))
    with pytest.raises(CorpusError, match=r"no train split to take examples from.*gsm8k.train.jsonl.gz"):
        load_tasks("gsm8k", data=tmp_path, shots=2)
    write(tmp_path / "math" / "gsm8k.train.jsonl.gz", asked(40)[20:])
    (task,) = load_tasks("gsm8k", data=tmp_path, shots=2)
    assert all(i.prompt.count("Question:") == 3 for i in task.items if isinstance(i, Question))
