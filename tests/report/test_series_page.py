"""The report of a trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import diffract
from diffract import report
from diffract.report.payload import on_page, payload
from tiny_llama import llama_tensors, save_llama


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> diffract.Run:
    place, tensors, paths = tmp_path_factory.mktemp("series"), llama_tensors(0), []
    for k in range(4):
        paths.append(save_llama(place / f"step{100 * k}", tensors))
        tensors = llama_tensors(k + 1, tensors)
    return diffract.trajectory(*paths)


@pytest.fixture
def peaked() -> diffract.Run:
    @diffract.metric
    def peak_count(sigmas: torch.Tensor) -> torch.Tensor:
        return 1.0 + (sigmas > 2).any(1)

    series = [{"w": scale * torch.eye(3)} for scale in (1, 3)]
    return diffract.trajectory(*series, by="given", metrics=[peak_count, "stable_rank"])


def test_headlines_are_the_series(followed: diffract.Run) -> None:
    page = report.render(followed.tables)
    body = page[page.index("</head>") :]
    assert "checkpoints, from step 0 to step 300." in body
    assert "is the size of the change from step0 to step100 relative to step0" in body
    assert "is the size of the change from step200 to step300 relative to step200" in body
    assert "<h1>step0 … step300</h1>" in body
    assert "checkpoint at step 300" in body
    assert "evenly spaced, are in this page" not in body


def test_a_checkpoint_of_another_run_is_named_first_and_drawn() -> None:
    series = [llama_tensors(0)]
    series += [llama_tensors(1, series[0]), llama_tensors(9)]
    series.append(llama_tensors(2, series[2]))
    run = diffract.trajectory(*series, by="given", metrics="norms,change")
    page = report.render(run.tables)
    body = page[page.index("</head>") :]
    assert "of them break the series, by a restart or as another run under an old name: checkpoint-2." in body
    assert "BREAKS THE SERIES: stranger" in body
    evolution: Any = payload(run.tables)["evolution"]
    assert [mark["x"] for mark in evolution["breaks"]] == [2]


def test_peaks_have_a_headline(peaked: diffract.Run) -> None:
    page = report.render(peaked.tables)
    assert "matrices have at least two spectral peaks in the last checkpoint, 0 in the first." in page
    assert "checkpoints, from checkpoint-0 to checkpoint-1." in page
    assert payload(peaked.tables)["metrics"] == ["peak_count", "stable_rank", "pooled_peak_count", "peaks_appear"]


def test_places_are_no_metrics_and_bases_are_named(followed: diffract.Run) -> None:
    data = payload(followed.tables)
    assert data["kind"] == "trajectory"
    assert not {"order", "stage", "step", "tokens"} & set(data["metrics"])
    assert [m["base"] for m in data["models"]] == ["step0", "step0", "step100", "step200"]


def test_a_comparison_is_drawn_beside_its_base(family: tuple[Path, Path]) -> None:
    data = payload(diffract.compare(*family, metrics=["frobenius_norm"]).tables)
    assert (data["kind"], [m["base"] for m in data["models"]]) == ("compare", ["base", "base"])


def test_a_long_series_is_shown_in_part(followed: diffract.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffract.report.payload.ROW_BUDGET", 70)
    kept = on_page(followed.tables)
    assert kept.models["model"].to_list() == ["step0", "step300"]
    for table in (kept.metrics, kept.spectra, kept.tensors):
        assert set(table["model"]) == {"step0", "step300"}
    page = report.render(followed.tables)
    assert "2 of 4 checkpoints, evenly spaced, are in this page" in page
    assert "checkpoint at step 100" in page  # the list of checkpoints is whole
    monkeypatch.setattr("diffract.report.payload.ROW_BUDGET", 1)
    assert len(on_page(followed.tables).models) == 2


@pytest.mark.browser
def test_the_page_draws_each_beside_its_base(followed: diffract.Run, page: Any, tmp_path: Path) -> None:
    page.goto(f"file://{followed.report(tmp_path / 'r.html')}")
    page.wait_for_selector("#panels .heatmaplayer")
    assert page.input_value("#model") == "step300"

    def traces() -> list:
        return page.evaluate("document.getElementById('spectrum').data.map((t) => [t.name, t.y])")

    name = page.input_value("#matrix")
    for model, base in (("step300", "step200"), ("step100", "step0")):
        page.select_option("#model", model)
        for (label, values), (source, quantity) in zip(
            traces(), [(base, "sigma"), (model, "sigma"), (model, "delta_sigma")], strict=True
        ):
            assert label in (source, "delta")
            curve = followed.spectra.filter(model=source, name=name, quantity=quantity)["values"][0]
            assert values == pytest.approx(curve.to_list(), rel=1e-6)
        assert page.is_visible("#agreement")
    page.select_option("#model", "step0")
    assert [label for label, _ in traces()] == ["sigma"]
    assert page.is_hidden("#agreement")
    assert page.problems == []


@pytest.mark.browser
def test_the_page_shows_how_the_chosen_metric_evolves(followed: diffract.Run, page: Any, tmp_path: Path) -> None:
    page.goto(f"file://{followed.report(tmp_path / 'r.html')}")
    page.wait_for_selector("#bands .scatterlayer")
    for metric in ("delta_relative", "stable_rank"):
        page.select_option("#metric", metric)
        assert page.inner_text("#evolution-metric") == metric
        parts = page.evaluate("[...document.querySelectorAll('#bands > div')].map((d) => d.dataset.part)")
        assert {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate"} <= set(parts)
        own = followed.metrics.filter(block="mlp", projection="gate").drop_nulls(metric)
        middle, band = page.evaluate(
            "document.querySelector('#bands [data-part=\"mlp.gate\"]').data.map((t) => [t.x, t.y])"
        )
        expected = own.group_by("step").agg(pl.col(metric).median()).sort("step")
        assert middle[0] == expected["step"].to_list()
        assert middle[1] == pytest.approx(expected[metric].to_list(), rel=1e-5)  # six digits
        low = own.group_by("step").agg(pl.col(metric).quantile(0.25, "linear")).sort("step")[metric].to_list()
        assert band[1][: len(low)] == pytest.approx(low, rel=1e-5)
    assert page.problems == []


def test_checkpoints_that_are_left_out_still_count_in_bands(
    followed: diffract.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffract.report.payload.ROW_BUDGET", 70)
    data = payload(followed.tables)
    assert data["evolution"]["over"] == "step"
    assert data["evolution"]["bands"]["stable_rank"]["mlp.up"]["times"] == [0, 100, 200, 300]
    assert len(data["models"]) == 2
