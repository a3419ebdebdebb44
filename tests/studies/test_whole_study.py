"""The least study from end to end: a family is trained, findings are tested, a killed one goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffract.run import load_run
from diffract.studies import family, run_study
from diffract.studies.family import Family, TrainingJob
from diffract.studies.findings import FINDINGS
from diffract.studies.study import Study
from diffract.train import train

WORDS = {
    "tale": "the a king fox river went saw old house and sang",
    "sums": "one two three four plus minus is times six ten",
}
QUICK = ["budget", "evolution", "vectors", "heads", "tracking"]


def micro(folder: Path, findings: list[str]) -> Path:
    """A study of models of two layers and a width of 16, on made-up text."""
    draw = random.Random(0)
    for domain, words in WORDS.items():
        records = [{"text": " ".join(draw.choices(words.split(), k=60)) + "."} for _ in range(80)]
        (folder / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, records)))
    mix = {domain: {"sources": [f"{domain}.jsonl"]} for domain in WORDS}
    config = {
        "model_type": "olmo2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    common = {"context": 32, "batch_tokens": 256}
    recipe: dict[str, Any] = {
        "name": "micro",
        "about": "A test.",
        "target": "sums",
        "reference": "tale",
        "pretraining": {
            "train": {"model": {"config": config}, "tokenizer": {"train": {"vocabulary": 300}}, "mix": mix,
                      "tokens": 8192, "checkpoints": [0, 2048, 4096], **common},
            "budgets": [4096, 8192],
        },
        "continual": {"train": {"tokens": 2048, **common}, "domains": mix},
        "quality": {"tasks": {domain: f"{domain}={domain}.jsonl" for domain in WORDS}},
        "search": {"fractions": [0, 0.5, 1], "seeds": 1, "paths": {"steps": 3}},
        "findings": findings,
        "data": ".",
        "threads": 1,
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_study_goes_on_where_it_was_stopped_and_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bases are trained in a process of their own, as all are; the others here, to save what starting one takes."""
    apart = family._run_apart

    def near(job: TrainingJob, launch: Sequence[str], children: list[Any]) -> TrainingJob:
        if job.name == family.PRETRAINING:
            return apart(job, launch, children)
        train(job.recipe, job.folder)
        return job

    monkeypatch.setattr(family, "_run_apart", near)
    recipe = micro(tmp_path, QUICK)
    said: list[str] = []
    with monkeypatch.context() as broken:
        broken.setattr(Study, "noise", lambda *_: pytest.fail("killed"))  # after the family and two findings
        with pytest.raises(pytest.fail.Exception):
            run_study(recipe, tmp_path / "run", say=said.append)
    assert [text for text in said if "trained" in text]
    assert not (tmp_path / "run" / "numbers.json").exists()
    again: list[str] = []
    run = run_study(recipe, tmp_path / "run", say=again.append)
    assert not [text for text in again if "trained" in text]
    assert "finding: budget" not in again
    assert run.kind == "study"
    assert run.findings["finding"].to_list() == QUICK
    assert all(run.findings["because"])
    assert set(run.numbers["finding"]) == set(QUICK)
    text = (tmp_path / "run" / "report.html").read_text()
    assert all(finding.title in text for finding in FINDINGS if finding.name in QUICK)
    saved = load_run(run.save(tmp_path / "copy"))
    assert saved.findings.equals(run.findings)
    assert saved.numbers.equals(run.numbers)


@pytest.mark.slow
def test_all_findings_twice(tmp_path: Path) -> None:
    recipe = micro(tmp_path, [spec.name for spec in FINDINGS])
    run, again = (run_study(recipe, tmp_path / name) for name in ("run", "again"))
    assert len({(tmp_path / name / "numbers.json").read_text() for name in ("run", "again")}) == 1
    assert run.findings.equals(again.findings)
    assert set(run.findings["verdict"]) <= {"holds", "does not hold", "cannot tell"}
    assert set(run.numbers["finding"]) == {finding.name for finding in FINDINGS}


def test_a_family_knows_its_largest_budget() -> None:
    assert Family({1: "a", 2: "b", 3: "c"}, {1: {}, 2: {}}).last == 2
