"""Heads and domains in the report, of a comparison and of a run over heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

import diffract
from diffract import plots, report
from diffract.attention import lorenz_of, pairs_of
from diffract.cli.main import app
from diffract.report.payload import domain_part
from tiny_llama import llama_tensors

SAMPLES = Path("samples/tiny-olmo2")
HOSTILE = "t<b onclick='alert(1)'>"
PLACE = ["model", "layer", "block", "head"]


@pytest.fixture
def domains(write_model: Callable[..., Path]) -> list[str]:
    """A grouped-query base and three descendants."""
    base = llama_tensors(0)
    tuned = [(HOSTILE, 1), ("math", 2), ("code", 3)]
    models = [("base", base), *((name, llama_tensors(seed, base)) for name, seed in tuned)]
    return [str(write_model(name, tensors)) for name, tensors in models]


def test_heads_of_the_metrics_are_those_of_the_command() -> None:
    refs = [f"{name}={SAMPLES / name}" for name in ("base", "math", "code")]
    heads = diffract.compare(*refs, metrics=["delta_frobenius"]).heads
    expected = diffract.heads(*refs)
    same_as(heads, expected.heads)
    rho = pairs_of(heads)
    assert rho["spearman"].to_list() == pytest.approx(expected.domains["spearman"].to_list(), rel=1e-9)


def test_shared_slices_count_for_each_head_of_a_group(domains: list[str]) -> None:
    same_as(diffract.compare(*domains).heads, diffract.heads(*domains).heads)


def same_as(heads: pl.DataFrame, expected: pl.DataFrame) -> None:
    joined = heads.join(expected, on=PLACE, nulls_equal=True)
    assert len(joined) == len(heads) == len(expected) > 0
    assert joined["head_delta"].to_list() == pytest.approx(joined["head_delta_right"].to_list(), rel=1e-9)


def test_a_head_with_a_bad_slice_is_not_known(write_model: Callable[..., Path]) -> None:
    base = llama_tensors(0)
    tuned = llama_tensors(1, base)
    tuned["model.layers.0.self_attn.v_proj.weight"][0, 0] = torch.nan  # kv head 0, of query heads 0 and 1
    run = diffract.compare(write_model("base", base), write_model("tuned", tuned))
    heads = run.heads
    assert heads.filter(pl.col("head_delta").is_null()).select("layer", "head").rows() == [(0, 0), (0, 1)]
    assert "<h2>Which heads change</h2>" in report.render(run.tables)


def test_domains_need_a_comparison_of_heads(family: tuple[Path, Path]) -> None:
    assert domain_part(diffract.scan(family[0]).tables) is None
    assert domain_part(diffract.compare(*family, metrics=["stable_rank"]).tables) is None
    assert domain_part(diffract.compare(*family, heads=False).tables) is None
    alone = domain_part(diffract.compare(*family).tables)
    assert alone is not None
    assert set(alone["figures"]) == {"maps", "lorenz"}


def test_rank_correlation_of_domains_that_do_not_vary_is_null() -> None:
    rows = [(m, 0, "attn", h, 1.0 if m == "a" else float(h)) for m in "ab" for h in range(3)]
    heads = pl.DataFrame(rows, schema=[*PLACE, "head_delta"], orient="row")
    found = pairs_of(heads)
    assert found["spearman"].to_list() == [None]
    assert plots.domain_matrix(found).data[0].text[0][1] == ""


@pytest.mark.browser
def test_the_page_shows_domains(domains: list[str], page: Any, tmp_path: Path) -> None:
    run = diffract.compare(*domains)
    page.goto(f"file://{run.report(tmp_path / 'r.html')}")
    shows_domains(page, run.heads, lorenz_of(run.heads), run.models)
    assert page.locator("#cosine").count() == 0


@pytest.mark.browser
def test_a_run_over_heads_has_a_page(domains: list[str], page: Any, tmp_path: Path) -> None:
    run = diffract.heads(*domains, output=tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    page.goto(f"file://{tmp_path / 'run' / 'report.html'}")
    shows_domains(page, run.heads, run.lorenz, run.models)
    cosines = page.evaluate("document.getElementById('cosine').data[0].z")
    assert cosines[0][1] == pytest.approx(run.domains["cosine"][0], rel=1e-9)
    chance = run.domains["cosine_chance"][0]
    assert f"0 ± {chance:.2g}." in page.inner_text("#domains")
    for id in ("heads", "detail", "layers", "table"):
        assert page.is_hidden(f"#{id}")
    assert page.locator("#tensors-table thead th").count() > 0


def shows_domains(page: Any, heads: pl.DataFrame, points: pl.DataFrame, models: pl.DataFrame) -> None:
    page.wait_for_selector("#head-maps .heatmaplayer")
    found = plots.head_grids(heads, "head_delta")
    for k, grid in enumerate(found.grids.values()):
        drawn = page.evaluate(f"document.getElementById('head-maps').data[{k}].z")
        assert [v for row in drawn for v in row] == pytest.approx([v for row in grid for v in row], rel=1e-9)
    page.select_option("#domain", label="code")
    page.select_option("#reference", label=HOSTILE)
    expected = plots.reference_scores(heads.filter(pl.col("model").is_in(["code", HOSTILE])), HOSTILE).data[0].z
    drawn = page.evaluate("document.getElementById('score').data[0].z")
    # Scaled values have six digits in the page.
    assert [v for row in drawn for v in row] == pytest.approx([v for row in expected for v in row], abs=2e-6)
    lorenz = page.evaluate("document.getElementById('lorenz').data.map((t) => [t.x, t.y])")
    for (x, y), trace in zip(lorenz, plots.lorenz(points, models).data, strict=True):
        assert x == pytest.approx(list(trace.x))
        assert y == pytest.approx(list(trace.y))
    spearman = page.evaluate("document.getElementById('spearman').data[0].z")
    assert [spearman[0][1], spearman[0][2], spearman[1][2]] == pytest.approx(pairs_of(heads)["spearman"].to_list())
    assert page.problems == []


def test_a_run_over_heads_of_one_domain(domains: list[str]) -> None:
    run = diffract.heads(*domains[:2])
    page = report.render(run.tables)
    body = page[page.index("</head>") :]
    assert 'id="head-maps"' in body
    assert 'id="score"' not in body
    assert HOSTILE not in body
    assert run.kind == "heads"
