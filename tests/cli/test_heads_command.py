"""``diffract heads`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import diffract
from diffract.cli.main import app
from tiny_llama import llama_tensors

run = CliRunner()


@pytest.fixture
def references(family: tuple[Path, Path], write_model) -> list[str]:
    base, tuned = family
    return [str(base), f"math={tuned}", f"code={write_model('code', llama_tensors(2, llama_tensors(0)))}"]


def test_heads_writes_a_run_and_says_what_it_found(references: list[str], tmp_path: Path) -> None:
    done = run.invoke(app, ["heads", *references, "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    found = diffract.load_run(tmp_path / "run")
    model = found.models.row(1, named=True)
    assert f"math: relative change of attention {model['attention_delta_relative']:.3g}; top tenth of 8" in done.stdout
    top = found.heads.filter(model="math", rank=1).row(0, named=True)
    assert f"L{top['layer']} h{top['head']}  {top['head_delta']:.3g}" in done.stdout
    pair = found.domains.row(0, named=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["math", f"{pair['spearman']:.3g}"] in lines
    assert ["code", f"{pair['cosine']:.3g}"] in lines
    assert f"0 ± {pair['cosine_chance']:.3g}" in done.stdout
    assert f"run: {tmp_path / 'run'}" in done.stdout


def test_one_domain_is_shown_alone(references: list[str]) -> None:
    done = run.invoke(app, ["heads", *references[:2], "--projections", "q, o", "--no-cache"])
    assert done.exit_code == 0, done.output
    assert "Most changed heads" in done.stdout
    assert "specific" not in done.stdout
    assert "chance 0" not in done.stdout


def test_summary_is_json_and_equals_the_api(references: list[str]) -> None:
    done = run.invoke(app, ["heads", *references, "--json", "--projections", "q,k"])
    assert (done.exit_code, done.stderr) == (0, "")
    summary, found = json.loads(done.stdout), diffract.heads(*references, projections=["q", "k"])
    assert summary["models"] == found.models.to_dicts()
    assert summary["domains"] == found.domains.to_dicts()
    assert summary["settings"]["projections"] == ["q", "k"]
    assert summary["run"] is None
    for name in ("math", "code"):
        ranked = found.heads.filter(model=name).sort("rank")
        assert [(h["layer"], h["head"]) for h in summary["most_changed"][name]] == ranked.select(
            "layer", "head"
        ).rows()[:5]
        scores = found.scores.filter(domain=name).sort("score", descending=True)
        assert [h["score"] for h in summary["most_specific"][name]] == scores["score"].to_list()[:5]


def test_the_lowest_score_counts(references: list[str], write_model) -> None:
    third = f"text={write_model('text', llama_tensors(3, llama_tensors(0)))}"
    done = run.invoke(app, ["heads", *references, third, "--json"])
    scores = diffract.heads(*references, third).scores.filter(domain="math")
    lowest = sorted((min(rows["score"]) for _, rows in scores.group_by("layer", "head")), reverse=True)
    assert [h["score"] for h in json.loads(done.stdout)["most_specific"]["math"]] == lowest[:5]


def test_quiet_prints_nothing(references: list[str]) -> None:
    done = run.invoke(app, ["heads", *references, "--quiet"])
    assert (done.exit_code, done.output) == (0, "")


def test_a_run_of_heads_has_a_page(references: list[str], tmp_path: Path) -> None:
    diffract.heads(*references, output=tmp_path / "run")
    done = run.invoke(app, ["report", str(tmp_path / "run")])
    assert done.exit_code == 0
    assert "Which heads change" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{0}", "{1}", "{1}"], 1, "two checkpoints are called 'math'"),
        (["{0}", "{1}", "--projections", "queries"], 1, "Did you mean 'q'"),
        (["{0}", "{1}", "--projections", ""], 1, "no projection is named"),
        (["{0}", "/nowhere/at-all"], 1, "no checkpoint at"),
        (["{0}"], 2, "Missing argument"),
        (["{0}", "{1}", "--select", "attn"], 2, "No such option"),
    ],
)
def test_wrong_input_gets_one_clear_error(references: list[str], arguments: list[str], code: int, text: str) -> None:
    done = run.invoke(app, ["heads", *(a.format(*references) for a in arguments)])
    assert done.exit_code == code
    assert text in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert "Traceback" not in done.output


def test_warnings_and_names_are_safe_to_print(references: list[str], write_model) -> None:
    tensors = llama_tensors(1)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    done = run.invoke(app, ["heads", references[0], f"bad={write_model('bad', tensors)}"])
    assert done.exit_code == 0
    assert "warning: 1 heads hold NaN or Inf" in done.stderr
    assert "\x1b" not in done.output
