"""Tasks of lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch

from diffract.corpora import question_text
from diffract.errors import CheckpointError, CorpusError, SelectionError
from diffract.evaluate import Evaluator, Subject, load_tasks
from diffract.evaluate.harness import _metric
from diffract.evaluate.model import tokenizer_digest
from diffract.evaluate.scoring import BatchLimit, score_choices
from diffract.evaluate.tasks import MultipleChoice
from diffract.store import Cache

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")

TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "data" / "lm_eval"
    folder.mkdir(parents=True)
    rows = [{"question": f"{i}+1?", "options": [str(i + 1), "none"], "right": 0} for i in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(file=folder / "sums.jsonl"))
    return folder.parent


def test_without_the_harness_one_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("diffract.evaluate.harness.version", missing)
    with pytest.raises(CheckpointError, match=r"needs lm-evaluation-harness: pip install 'diffract-llm\[lm-eval\]'"):
        load_tasks("lm:arc_easy")
    with pytest.raises(CorpusError, match="no train split"):
        load_tasks("lm:arc_easy", split="train")
    with pytest.raises(SelectionError, match="unknown task 'lm:'"):
        load_tasks("lm:")


def test_which_metric_counts() -> None:
    sample = {"acc": 1.0, "acc_norm": 0.0, "ppl": 2.0, "f1": 0.5, "word_perplexity": (1.0, 2)}
    assert _metric("x", sample, {"acc": True, "acc_norm": True}) == "acc_norm"
    assert _metric("x", sample, {"ppl": False, "f1": True}) == "f1"
    with pytest.raises(CheckpointError, match="NAME=FILE measures bits per byte"):
        _metric("x", sample, {"ppl": False, "word_perplexity": True})


def test_the_items_of_a_split_are_asked(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the harness that gets everything right."""
    asked: list[int] = []

    def simple_evaluate(*, samples: dict[str, list[int]], tasks: list[Any], **_: Any) -> dict[str, Any]:
        assert len(tasks) == len(samples) == 1
        asked.extend(samples["sums"])
        right = [{"doc_id": i, "acc": 1.0, "filtered_resps": ["yes"]} for i in samples["sums"]]
        return {"samples": {"sums": right}, "higher_is_better": {"sums": {"acc": True}}}

    loaded = {"tasks": {"sums": SimpleNamespace(eval_docs=[{"question": i} for i in range(12)])}}
    manager = SimpleNamespace(all_tasks=["sums"], load=lambda _name: loaded)
    for name, module in {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.tasks": SimpleNamespace(TaskManager=lambda include_path: manager),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **_: None),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("diffract.evaluate.harness.version", lambda _name: "0")
    found = [Evaluator(subject, load_tasks("lm:sums", split=split)).scores() for split in ("held-out", "selection")]
    assert sorted(asked) == list(range(12))
    assert [name for table in found for name in table["item"]] == [f"sums:{i}:acc" for i in asked]
    with pytest.raises(SelectionError, match=r"unknown task of lm-evaluation-harness 'sum', .* Did you mean 'sums'"):
        Evaluator(subject, load_tasks("lm:sum")).scores()


@needs_harness
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_task_of_ones_own(subject: Subject, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, state = tokenizer_digest(subject.tokenizer), torch.get_rng_state()
    tasks = [load_tasks("lm:tiny_sums", split=s, data=data)[0] for s in ("held-out", "selection")]
    with Cache(tmp_path / "cache") as cache:
        found = Evaluator(subject, tasks[:1], cache=cache).scores()
        other = Evaluator(subject, tasks[1:], cache=cache).scores()
        monkeypatch.setattr("diffract.evaluate.run.SCORERS", {})
        assert Evaluator(subject, tasks[:1], cache=cache).scores().equals(found)
    scores = dict(pl.concat([found, other]).select("item", "value").iter_rows())
    assert set(scores) == {f"tiny_sums:{i}:acc_norm" for i in range(12)}
    # our own choices without a token for a beginning, which the harness does not put before a prompt
    monkeypatch.setattr(Subject, "start", [])
    choices = [
        MultipleChoice(f"tiny_sums:{i}:acc_norm", question_text(f"{i}+1?"), (str(i + 1), "none"), 0) for i in range(12)
    ]
    assert {s.item: s.value for s in score_choices(subject, choices, BatchLimit(1000))} == scores
    assert set(found["task"]) == {"lm:tiny_sums"}
    assert tokenizer_digest(subject.tokenizer) == before
    assert torch.equal(torch.get_rng_state(), state)


@needs_harness
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_an_unknown_task_gets_a_suggestion(subject: Subject, data: Path) -> None:
    with pytest.raises(
        SelectionError, match=r"unknown task of lm-evaluation-harness 'tiny_sum', .* Did you mean 'tiny_sums'"
    ):
        Evaluator(subject, load_tasks("lm:tiny_sum", data=data)).scores()


@needs_harness
def test_a_changed_task_of_ones_own_is_another_task(data: Path) -> None:
    before = load_tasks("lm:tiny_sums", data=data)[0].key
    with (data / "lm_eval" / "sums.jsonl").open("a") as file:
        file.write("\n")
    assert load_tasks("lm:tiny_sums", data=data)[0].key != before
    assert load_tasks("lm:tiny_sums")[0].key != before
