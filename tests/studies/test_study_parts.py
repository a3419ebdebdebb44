"""Recipes, findings on disk, the noise control, the report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
import torch
import yaml

from diffract.checkpoints import TensorWriter, open_checkpoint
from diffract.errors import RecipeError, RunError
from diffract.studies.family import Family, TrainingJob, run_all
from diffract.studies.finding import Evidence, Number, load_evidence, save_evidence
from diffract.studies.findings import FINDINGS
from diffract.studies.recipe import StudyRecipe
from diffract.studies.runner import all_jobs, load_study, numbers_text, preview, study_report
from diffract.studies.study import write_noise

POPEN = subprocess.Popen
WORDS: dict[str, Any] = {"model": {"init": "x"}, "mix": {"a": {"sources": ["stdlib"]}}, "tokens": 256}
RECIPES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


def micro(**changes: Any) -> dict[str, Any]:
    """The least study."""
    return {
        "name": "micro",
        "about": "A test.",
        "target": "math",
        "reference": "code",
        "pretraining": {"given": {100: "a", 200: "b"}},
        "continual": {
            "train": {"tokens": 1000, "context": 32, "batch_tokens": 64},
            "domains": {"math": {"sources": ["word-problems"]}, "code": {"sources": ["stdlib"]}},
        },
        "quality": {"tasks": {"math": "math", "code": "code"}},
    } | changes


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "maths"}, "target 'maths' is none of the domains"),
        ({"tragets": 1}, "unknown setting"),
        ({"pretraining": {}}, "either train or given"),
        ({"pretraining": {"given": {100: "a"}, "budgets": [50]}}, "budget 50 is none"),
        ({"quality": {"tasks": {"math": "math"}}}, "domain 'code' has no task"),
        ({"findings": ["budget", "budgets"]}, r"findings\.1: 'budgets', .* Did you mean 'budget'"),
        ({"jobs": 0}, "jobs"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_study(written(tmp_path, micro(**change)))


def test_everything_in_the_catalog_is_tested_by_default(tmp_path: Path) -> None:
    names = [spec.name for spec in FINDINGS]
    assert load_study(written(tmp_path, micro())).findings == names
    assert len(set(names)) == len(names)
    assert load_study(written(tmp_path, micro(findings=["heads", "budget"]))).findings == ["heads", "budget"]


def test_every_domain_is_trained_from_every_budget(tmp_path: Path) -> None:
    recipe = StudyRecipe.model_validate(micro())
    jobs = all_jobs(recipe, tmp_path, None)
    assert [job.name for job in jobs] == ["math-from-100", "code-from-100", "math-from-200", "code-from-200"]
    assert [job.recipe["model"]["init"] for job in jobs] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_project_are_sound(path: Path) -> None:
    found = preview(path, "run")
    assert found.jobs
    assert found.tokens == sum(job.recipe["tokens"] for job in found.jobs)


def test_a_failed_training_run_is_said_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a name that is no folder is asked for on the hub, several times
    recipe = StudyRecipe.model_validate(micro())
    broken = {"model": {"init": "nowhere"}, "mix": {"a": {"sources": ["none.txt"]}}, "tokens": 256}
    with pytest.raises(RunError, match="training broken failed: error: "):
        run_all([TrainingJob("broken", broken, tmp_path / "broken")], recipe, lambda text: None)


def test_trainings_end_with_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two run side by side; the first to fail, as an interruption does, ends the other, which would take a minute."""
    begun = time.monotonic()

    def start(command: list[str], **how: Any) -> subprocess.Popen[str]:
        return POPEN(["sh", "-c", "sleep 0.5; exit 1"] if "fails" in str(command) else ["sleep", "60"], **how)

    monkeypatch.setattr("subprocess.Popen", start)
    jobs = [TrainingJob(name, WORDS, tmp_path / name) for name in ("fails", "goes on")]
    with pytest.raises(RunError, match="training fails failed"):
        run_all(jobs, StudyRecipe.model_validate(micro(jobs=2)), lambda text: None)
    assert time.monotonic() - begun < 30


BUDGET = next(finding for finding in FINDINGS if finding.name == "budget")


def evidence() -> Evidence:
    return Evidence(
        "holds",
        "x <script>alert(1)</script>",
        numbers=[Number("n", 1.5, low=1.0, high=2.0, unit="nats", chance=0.5), Number("none", None)],
        figures=[("caption </script>", go.Figure(go.Scatter(x=[1], y=[2], name="</script>")))],
        tables={"t": pl.DataFrame({"a": [1]})},
    )


def test_what_a_finding_rests_on_comes_back_as_it_was(tmp_path: Path) -> None:
    made = evidence()
    save_evidence(made, tmp_path / "f", key="k")
    back = load_evidence(tmp_path / "f", key="k")
    assert back is not None
    assert (back.numbers, back.verdict, back.because) == (made.numbers, made.verdict, made.because)
    assert back.tables["t"].equals(made.tables["t"])
    assert back.figures[0][1].data[0].y == (2,)
    assert load_evidence(tmp_path / "f", key="another") is None
    assert load_evidence(tmp_path / "g", key="k") is None
    (tmp_path / "f" / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        load_evidence(tmp_path / "f", key="k")


def test_numbers_are_plain_json() -> None:
    found = json.loads(numbers_text({BUDGET: evidence()}))
    assert found["budget"]["verdict"] == "holds"
    assert found["budget"]["numbers"][0]["low"] == 1.0


def test_noise_has_the_norm_of_the_change_and_no_direction_of_it(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    base = {"a": torch.randn(64, 96, generator=draw), "same": torch.randn(8, 8, generator=draw)}
    tuned = {"a": base["a"] + 0.1 * torch.randn(64, 96, generator=draw), "same": base["same"]}
    for name, tensors in (("base", base), ("tuned", tuned)):
        with TensorWriter(tmp_path / name) as writer:
            for key, value in tensors.items():
                writer.add(key, value)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "strange"}))
    write_noise(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "noise")
    with open_checkpoint(tmp_path / "noise") as found:
        change = found.read("a") - base["a"]
        assert torch.equal(found.read("same"), base["same"])
    wanted = tuned["a"] - base["a"]
    # float32 rounds entries of size 1 by 6e-8, against changes of 0.1
    assert float(change.norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)
    cosine = float((change * wanted).sum() / change.norm() / wanted.norm())
    assert abs(cosine) < 5 / np.sqrt(64 * 96)  # five standard deviations of random directions


def test_the_report_escapes_what_it_shows() -> None:
    recipe = StudyRecipe.model_validate(micro(name="<b>bold</b>"))
    family = Family({100: "a<i>"}, {100: {"math": "m"}})
    text = study_report(recipe, family, {BUDGET: evidence()})
    assert "<script>alert(1)" not in text
    assert "<b>bold" not in text
    assert "a<i>" not in text
    page = text[text.index("<body>") :]  # what stands before is style and plotly itself
    assert page.count("</script>") == 1


KILLED = """
import sys
from pathlib import Path
from diffract.studies.family import TrainingJob, _run_apart
Path(sys.argv[1], "python").write_text("#!/bin/sh\\necho $$ > " + sys.argv[1] + "/pid\\nexec sleep 60\\n")
Path(sys.argv[1], "python").chmod(0o755)
_run_apart(TrainingJob("a", {}, Path(sys.argv[1], "a")), [sys.argv[1] + "/python"], [])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_study_that_is_killed_leaves_no_training_behind(tmp_path: Path) -> None:
    study = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    pid = tmp_path / "pid"
    assert _soon(lambda: pid.exists() and pid.read_text().strip() != "")
    training = Path("/proc", pid.read_text().strip())
    assert training.exists()
    study.kill()
    study.wait()
    assert _soon(lambda: not training.exists())


def _soon(told: Callable[[], bool]) -> bool:
    begun = time.monotonic()
    while not told() and time.monotonic() - begun < 60:
        time.sleep(0.05)
    return told()
