"""The report of a run with every metric: what the page draws is what the figures of Python draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import diffract
from diffract import plots, report
from diffract.plots.choice import curve, facts
from diffract.report import payload as densities
from diffract.report.payload import POINTS, pack, payload, short, thin
from diffract.report.words import headlines
from tiny_llama import llama_tensors, save_llama

NAME = "L0.mlp.gate"
HOSTILE = "t<b onclick='alert(1)'>"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> diffract.Run:
    place, tensors = tmp_path_factory.mktemp("full"), llama_tensors(0)
    base, tuned = save_llama(place / "base", tensors), save_llama(place / HOSTILE, llama_tensors(1, tensors))
    return diffract.compare(base, tuned, metrics="all")


def eigenvalues(run: diffract.Run, quantity: str) -> list[float]:
    row = facts(run.metrics, HOSTILE, NAME)
    return [s**2 / max(row["rows"], row["cols"]) for s in curve(run.spectra, HOSTILE, NAME, quantity)]


def drawn(page: Any, id: str) -> dict[str, Any]:
    traces = page.evaluate(f"document.getElementById('{id}').data.map((t) => [t.meta ?? t.name, t.name, t.x, t.y])")
    return {key: (name, x, y) for key, name, x, y in traces}


def axis(page: Any, id: str, which: str) -> Any:
    return page.evaluate(f"document.getElementById('{id}').layout.{which}axis.range")


def opened(page: Any, run: diffract.Run, path: Path) -> Any:
    page.goto(f"file://{run.report(path)}")
    page.wait_for_selector("#panels .heatmaplayer")
    page.select_option("#matrix", NAME)
    return page


@pytest.mark.browser
def test_densities_are_those_of_python(full: diffract.Run, page: Any, tmp_path: Path) -> None:
    opened(page, full, tmp_path / "r.html")
    row = facts(full.metrics, HOSTILE, NAME)
    for axes in ("log-log", "lin-log"):
        page.select_option("#density-axes", axes)
        figure = plots.density_lines(
            eigenvalues(full, "sigma"),
            (row["rows"], row["cols"]),
            row,
            null=eigenvalues(full, "null_sigma"),
            norms=eigenvalues(full, "sep_sigma"),
            axes=axes,
            points=POINTS,
        )
        found = drawn(page, "density")
        assert list(found) == [trace.meta for trace in figure.data]
        assert {"bars", "null", "mp", "pl", "exp"} <= set(found)
        for trace in figure.data:
            name, x, y = found[trace.meta]
            assert name == trace.name
            # The page holds float32.
            assert x == pytest.approx(list(trace.x), rel=1e-6)
            assert y == pytest.approx(list(trace.y), rel=1e-6)
        assert axis(page, "density", "y") == pytest.approx(list(figure.layout.yaxis.range), rel=1e-6)
        titles = page.evaluate(
            "['x', 'y'].map((a) => document.getElementById('density').layout[`${a}axis`].title.text)"
        )
        assert titles == [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
        shapes = page.evaluate("document.getElementById('density').layout.shapes.map((s) => s.x0)")
        assert shapes == pytest.approx([s.x0 for s in figure.layout.shapes], rel=1e-5)  # six digits, as in the table
    assert page.problems == []


@pytest.mark.browser
def test_the_scan_of_xmin_is_that_of_python(full: diffract.Run, page: Any, tmp_path: Path) -> None:
    opened(page, full, tmp_path / "r.html")
    figure = plots.ks_scan(full.spectra, full.metrics, NAME, model=HOSTILE)
    found = page.evaluate("document.getElementById('ks').data.map((t) => [t.x, t.y])")
    assert len(found) == len(figure.data) == 2
    for (x, y), trace, digits in zip(found, figure.data, (1e-6, 1e-5), strict=True):
        assert x == pytest.approx(list(trace.x), rel=digits)
        assert y == pytest.approx(list(trace.y), rel=digits)
    text = page.evaluate("document.getElementById('ks').layout.annotations[0].text")
    assert text == figure.layout.annotations[0].text
    assert page.problems == []


@pytest.mark.browser
def test_agreement_has_windows_and_peaks(full: diffract.Run, page: Any, tmp_path: Path) -> None:
    opened(page, full, tmp_path / "r.html")
    peaks = curve(full.spectra, "base", NAME, "peak")
    assert max(peaks) >= 0
    for kind in ("agreement", "agreement_window"):
        page.select_option("#agreement-kind", kind)
        for side in ("left", "right"):
            expected = curve(full.spectra, HOSTILE, NAME, f"{side}_{kind}")
            assert drawn(page, "agreement")[side][2] == pytest.approx(expected, rel=1e-6)
        shapes = page.evaluate("document.getElementById('agreement').layout.shapes")
        expected = plots.agreement_lines({}, {}, peaks=peaks).layout.shapes
        assert [(s["x0"], s["x1"]) for s in shapes] == [(s.x0, s.x1) for s in expected]
        assert [s.get("label", {}).get("text") for s in shapes] == [s.label.text for s in expected]
    assert page.problems == []


@pytest.mark.browser
def test_a_usual_run_has_no_empty_places(family: tuple[Path, Path], page: Any, tmp_path: Path) -> None:
    run = diffract.compare(*family)
    opened(page, run, tmp_path / "r.html")
    for id in ("density-box", "ks-box", "matrix-warning"):
        assert page.is_hidden(f"#{id}")
    assert page.is_visible("#agreement-label")
    assert page.is_visible("#domains")
    scan = diffract.scan(family[0], select="mlp.gate", metrics=["frobenius_norm"])
    page.goto(f"file://{scan.report(tmp_path / 's.html')}")
    page.wait_for_selector("#panels .heatmaplayer")
    for id in ("density-box", "ks-box", "agreement-box"):
        assert page.is_hidden(f"#{id}")
    assert page.locator("#domains").count() == page.locator("#evolution").count() == 0
    assert page.problems == []


@pytest.mark.browser
def test_warnings_of_fits_are_shown(full: diffract.Run, page: Any, tmp_path: Path) -> None:
    row = facts(full.metrics, HOSTILE, NAME)
    assert row["warning"]  # 32 eigenvalues are few
    opened(page, full, tmp_path / "r.html")
    assert page.inner_text("#matrix-warning") == f"Power law: {row['warning']}."
    column = page.locator("#metrics-table th").all_inner_texts().index("warning")
    cells = page.locator(f"#metrics-table tbody tr td:nth-child({column + 1})").all_inner_texts()
    expected = full.metrics.filter(model=HOSTILE)["warning"].fill_null("")
    assert sorted(cells) == sorted(expected)


def test_headlines_of_fits_are_the_tables(full: diffract.Run) -> None:
    found = {h.text: h.figure for h in headlines(full.tables) if h.minor and "noise of the same norm" not in h.text}
    own = full.metrics.filter(model=HOSTILE)
    exponent, bulk = (next(t for t in found if word in t) for word in ("power-law exponent", "Marchenko-Pastur"))
    assert found[exponent] == f"{own['pl_alpha'].mean():.2f}"
    long = own.filter(pl.col("pl_tail_count") >= 50).height
    assert f"over the {own['pl_alpha'].count()} matrices that could be fitted; {long} have a tail" in exponent
    assert f"The base has {full.metrics.filter(model='base')['pl_alpha'].mean():.2f}." in exponent
    assert found[bulk] == f"{(own['mp_bulk_share'] >= 0.5).sum()} of {own['mp_bulk_share'].count()}"


def test_a_scan_has_its_fits_among_the_large_ones(family: tuple[Path, Path]) -> None:
    found = headlines(diffract.scan(family[0], metrics="heavy_tails").tables)
    assert [h.minor for h in found] == [False] * len(found)
    assert any("mean power-law exponent" in h.text and "base" not in h.text for h in found)


def test_densities_are_left_out_beyond_a_budget(full: diffract.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(payload(full.tables)["densities"]) == len(full.metrics)
    assert "are left out;" not in report.render(full.tables)
    monkeypatch.setattr(densities, "MOST", 3)
    data = payload(full.tables)
    assert (len(data["densities"]), data["left_out"]) == (3, len(full.metrics) - 3)
    longest = full.metrics.select(pl.min_horizontal("rows", "cols")).to_series().max()
    for model, name, _ in data["densities"]:
        assert model == HOSTILE  # rather than its base
        row = facts(full.metrics, model, name)
        assert min(row["rows"], row["cols"]) == longest
    assert "Densities of the 3 matrices with the longest spectra are in this page" in report.render(full.tables)


def test_zero_matrices_have_no_density() -> None:
    model = {"zero": torch.zeros(4, 4), "one": torch.eye(4)}
    run = diffract.scan(model, metrics=["heavy_tails", "random_matrix"])
    parts = {name: found for _, name, found in payload(run.tables)["densities"]}
    assert "bars" not in parts.get("zero", {})
    assert parts["one"]["total"] == 4


@pytest.mark.browser
def test_matrices_without_fits_are_drawn_too(page: Any, tmp_path: Path) -> None:
    matrices = {
        "zero": torch.zeros(4, 4),
        "one": torch.ones(1, 1),
        "eye": torch.eye(5),
        "low": torch.ones(6, 4),
        "nan": torch.full((3, 3), torch.nan),
        "usual": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
    }
    tuned = {name: 2 * matrix for name, matrix in matrices.items()}
    for run in (diffract.scan(matrices, metrics="all"), diffract.compare(matrices, tuned, metrics="all")):
        page.goto(f"file://{run.report(tmp_path / 'r.html')}")
        page.wait_for_selector("#metrics-table tbody tr")
        for name in matrices:
            page.select_option("#matrix", name)
            for axes in ("lin-log", "log-log"):
                page.evaluate(
                    "(axes) => { const s = document.getElementById('density-axes'); s.value = axes;"
                    " s.dispatchEvent(new Event('change')); }",
                    axes,
                )
        page.select_option("#matrix", "usual")
        assert page.is_visible("#density")
        assert page.is_visible("#ks")
    assert page.problems == []


def test_glossary_stands_in_groups(full: diffract.Run) -> None:
    page = report.render(full.tables)
    glossary = page[page.index('<section id="glossary"') :]
    assert "<h3>heavy tails</h3>" in glossary
    assert glossary.index("<h3>norms</h3>") < glossary.index("<code>pl_alpha</code>")
    plain = diffract.scan({"w": torch.eye(2)}, metrics=["frobenius_norm"])
    page = report.render(plain.tables)
    assert "<h3>" not in page[page.index('<section id="glossary"') :]


def test_packed_numbers_are_float32() -> None:
    assert pack([1.0, 0.5]) == "AACAPwAAAD8="
    assert [short(v) for v in (1 / 3, None, float("nan"))] == [0.333333, None, None]
    assert list(thin(range(9), 3)) == [0, 4, 8]
    assert list(thin(range(2), 3)) == [0, 1]


def test_hostile_names_stay_text(full: diffract.Run) -> None:
    page = report.render(full.tables)
    body = page[page.index("</head>") :]
    assert body.count("</script>") == 2
    assert HOSTILE not in body
