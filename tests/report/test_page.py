"""The report: safe with hostile names, and alive in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffract
from diffract import plots, report
from diffract.report.payload import embed, payload, points_per_curve
from diffract.report.words import percent
from tiny_llama import llama_tensors

HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "=cmd()|'/c calc'!A1", "\u2028\u202e")


@pytest.fixture
def hostile_run(write_model) -> diffract.Run:
    tensors = llama_tensors(0)
    extra = {name: torch.eye(3) for name in HOSTILE}
    base = write_model("base", tensors | extra)
    tuned = write_model("tuned", llama_tensors(1, tensors) | {n: 2 * w for n, w in extra.items()})
    return diffract.compare(base, f"math={tuned}", str(tuned))


def test_hostile_names_stay_text(hostile_run: diffract.Run) -> None:
    page = report.render(hostile_run.tables)
    start = page.index("</head>")  # before it stands plotly's own code
    body = page[start:]
    assert body.count("</script>") == 2  # the data and the page's own script
    for name in HOSTILE:
        assert name not in body or name.startswith("=")  # which is for spreadsheets to fear: the download quotes it
    assert "onerror" in body  # it is there, as text


def test_embedded_json_cannot_end_its_element() -> None:
    text = embed({"a": "</script>&\u2028"})
    assert not set("<>&\u2028") & set(text)


def test_curves_are_thinned_evenly(hostile_run: diffract.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert points_per_curve(hostile_run.spectra) is None
    monkeypatch.setattr("diffract.report.payload.CURVE_BUDGET", 10)
    assert points_per_curve(hostile_run.spectra) == 32
    assert "thinned to 32" in report.render(hostile_run.tables)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "50%"), (0.0002, "0.02%"), (0.0, "0%"), (1.0, "100%"), (0.998, "99.8%")]
)
def test_percentages_never_round_to_nothing(value: float, text: str) -> None:
    assert percent(value) == text


def test_headlines_are_the_models_numbers(hostile_run: diffract.Run) -> None:
    page = report.render(hostile_run.tables)
    row = hostile_run.models.row(1, named=True)
    assert f"({percent(row['head_top10_share_noise'])})" in page
    assert percent(row["delta_relative"]) in page


def test_figures_show_the_tables(family: tuple[Path, Path]) -> None:
    run = diffract.compare(*family)
    tuned = run.metrics.filter(model="tuned")
    figure = plots.head_heatmap(tuned, "delta_relative", "q")
    expected = tuned.filter(projection="q").sort("layer", "head")["delta_relative"].to_list()
    assert [v for row in figure.data[0].z for v in row] == expected
    lines = plots.spectrum(run.spectra, "L0.attn.q.h0", base="base", tuned="tuned")
    curve = run.spectra.filter(model="tuned", name="L0.attn.q.h0", quantity="delta_sigma")["values"][0]
    assert list(lines.data[2].y) == curve.to_list()
    agree = plots.agreement(run.spectra, run.metrics, "L0.attn.q.h0", model="tuned")
    level = tuned.filter(name="L0.attn.q.h0")["left_agreement_chance"][0]
    assert list(agree.data[2].y) == [level, level]
    violins = plots.layer_violins(tuned, "delta_relative")
    assert len(violins.data[0].y) == tuned.filter(tuned["layer"].is_not_null()).height


@pytest.mark.browser
def test_the_page_is_alive(hostile_run: diffract.Run, page: Any, tmp_path: Path) -> None:
    page.goto(f"file://{hostile_run.report(tmp_path / 'r.html')}")
    page.wait_for_selector("#panels .heatmaplayer")
    titles = page.locator("#panels .gtitle").all_text_contents()
    assert {"attn.q", "attn.k", "attn.v", "attn.o", "whole matrices"} <= set(titles)

    def shown() -> list:
        return page.evaluate("document.querySelector('[data-part=\"attn.q\"]').data[0].z")

    table = hostile_run.metrics.filter(model="math", projection="q").sort("layer", "head")
    assert [v for r in shown() for v in r] == pytest.approx(table["delta_relative"].to_list(), rel=1e-5)
    page.select_option("#metric", "stable_rank")
    assert [v for r in shown() for v in r] == pytest.approx(table["stable_rank"].to_list(), rel=1e-5)
    page.select_option("#model", "base")
    base = hostile_run.metrics.filter(model="base", projection="q").sort("layer", "head")
    assert [v for r in shown() for v in r] == pytest.approx(base["stable_rank"].to_list(), rel=1e-5)
    page.select_option("#model", "math")

    page.locator('[data-part="attn.o"]').scroll_into_view_if_needed()
    box = page.locator('[data-part="attn.o"] .nsewdrag').bounding_box()
    page.mouse.click(box["x"] + box["width"] * 7 / 8, box["y"] + box["height"] / 4)
    page.wait_for_function("document.getElementById('matrix').value === 'L0.attn.o.h3'")
    curve = hostile_run.spectra.filter(model="math", name="L0.attn.o.h3", quantity="delta_sigma")["values"][0]
    assert page.evaluate("document.getElementById('spectrum').data[2].y") == pytest.approx(curve.to_list(), rel=1e-6)
    names = page.evaluate("document.getElementById('agreement').data.map(t => t.name)")
    assert names == ["left", "right", "left by chance", "right by chance"]
    assert page.problems == []


@pytest.mark.browser
def test_tables_sort_filter_and_download(hostile_run: diffract.Run, page: Any, tmp_path: Path) -> None:
    page.goto(f"file://{hostile_run.report(tmp_path / 'r.html')}")
    page.wait_for_selector("#metrics-table tbody tr")
    page.click("#metrics-table th button:text-is('delta_relative')")
    column = page.locator("#metrics-table th").all_inner_texts().index("delta_relative")
    cells = page.locator(f"#metrics-table tbody tr td:nth-child({column + 1})").all_inner_texts()
    values = [float(c) for c in cells if c]
    assert values == sorted(values, reverse=True)
    page.fill("#filter", "attn.v")
    assert set(page.locator("#metrics-table tbody tr td:nth-child(3)").all_inner_texts()) == {"attn.v"}
    page.fill("#filter", "cmd")
    with page.expect_download() as download:
        page.click("#csv")
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.splitlines()[0].startswith("model,name,layer")
    assert "\nmath,'=cmd()" in text.replace("\r", "")  # a spreadsheet shows it, and does not run it
    with page.expect_download() as download:
        page.click("#tensors-csv")
    assert "input_layernorm" in Path(download.value.path()).read_text(encoding="utf-8")
    assert page.problems == []


@pytest.mark.browser
def test_a_scan_has_no_agreement(family: tuple[Path, Path], page: Any, tmp_path: Path) -> None:
    run = diffract.scan(family[0], metrics=["frobenius_norm", "stable_rank"])
    page.goto(f"file://{run.report(tmp_path / 'r.html')}")
    page.wait_for_selector("#panels .heatmaplayer")
    assert page.is_hidden("#agreement")
    assert page.locator("#metric option").all_inner_texts() == ["frobenius_norm", "stable_rank"]
    assert page.problems == []


def test_payload_of_a_run_without_metrics_of_pairs(family: tuple[Path, Path]) -> None:
    data = payload(diffract.compare(*family, metrics=["frobenius_norm"]).tables)
    assert data["first"] == "frobenius_norm"
    assert data["curves"] == []
