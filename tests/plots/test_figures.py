"""Figures show what stands in the tables, and nothing else."""

from __future__ import annotations

import math
import subprocess
import sys

import plotly.graph_objects as go
import polars as pl
import pytest

from diffract import plots

HEADS = pl.DataFrame(
    {
        "name": [f"L{layer}.attn.{p}.h{h}" for p in "qk" for layer in (10, 2) for h in (11, 2, 0)],
        "layer": [10] * 3 + [2] * 3 + [10] * 3 + [2] * 3,
        "block": ["attn"] * 12,
        "projection": ["q"] * 6 + ["k"] * 6,
        "head": [11, 2, 0] * 2 + [None] * 6,
        "kv_head": [0] * 6 + [11, 2, 0] * 2,
        "stable_rank": [1.0, 2.0, 3.0, 4.0, None, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0],
    },
    schema_overrides={"head": pl.Int32, "kv_head": pl.Int32, "layer": pl.Int32},
)
NAME = "<b>w</b>"
SPECTRA = pl.DataFrame(
    [
        ("base", NAME, "sigma", [3.0, 2.0]),
        ("math", NAME, "sigma", [4.0, 1.0]),
        ("math", NAME, "delta_sigma", [0.5, 0.25]),
        ("math", NAME, "left_agreement", [0.9, 0.8]),
        ("math", NAME, "right_agreement", [0.7, 0.6]),
        ("math", "other", "sigma", [9.0, 9.0]),
        ("code", NAME, "sigma", [8.0, 8.0]),
    ],
    schema=["model", "name", "quantity", "values"],
    orient="row",
)


def test_heatmap_cells_stand_at_their_layer_and_head() -> None:
    figure = plots.head_heatmap(HEADS, "stable_rank", "q")
    assert isinstance(figure, go.Figure)
    trace = figure.data[0]
    assert list(trace.y) == ["2", "10"]
    grid = {(y, x): v for y, row in zip(trace.y, trace.z, strict=True) for x, v in zip(trace.x, row, strict=True)}
    rows = HEADS.filter(projection="q").iter_rows(named=True)
    assert grid == {(str(r["layer"]), str(r["head"])): r["stable_rank"] for r in rows}


def test_heatmap_columns_ascend() -> None:
    assert list(plots.head_heatmap(HEADS, "stable_rank", "q").data[0].x) == ["0", "2", "11"]


def test_heatmap_of_keys_has_kv_heads() -> None:
    trace = plots.head_heatmap(HEADS, "stable_rank", "k").data[0]
    assert [list(row) for row in trace.z] == [[12.0, 11.0, 10.0], [9.0, 8.0, 7.0]]


def test_spectrum_lines_are_the_curves() -> None:
    figure = plots.spectrum(SPECTRA, NAME, base="base", tuned="math")
    assert {t.name: list(t.y) for t in figure.data} == {"base": [3, 2], "tuned": [4, 1], "delta": [0.5, 0.25]}
    assert all(list(t.x) == [1, 2] for t in figure.data)
    assert figure.layout.yaxis.type == "log"
    assert "<b>" not in figure.layout.title.text
    assert [list(t.y) for t in plots.spectrum(SPECTRA, NAME, base="base").data] == [[3, 2]]


def test_agreement_has_both_sides_and_their_chance() -> None:
    metrics = pl.DataFrame(
        {"model": ["math"], "name": [NAME], "left_agreement_chance": [0.1], "right_agreement_chance": [0.2]}
    )
    figure = plots.agreement(SPECTRA, metrics, NAME, model="math")
    assert [list(t.y) for t in figure.data] == [[0.9, 0.8], [0.7, 0.6], [0.1, 0.1], [0.2, 0.2]]
    assert [list(t.x) for t in figure.data] == [[1, 2]] * 4
    bare = plots.agreement(SPECTRA, metrics.select("model", "name"), NAME, model="math")
    assert [list(t.y) for t in bare.data[2:]] == [[], []]
    absent = plots.agreement(SPECTRA, metrics, "absent", model="math")
    assert all(list(t.y) == [] for t in absent.data)


def test_violins_hold_every_known_value() -> None:
    trace = plots.layer_violins(HEADS, "stable_rank").data[0]
    known = HEADS.filter(pl.col("stable_rank").is_not_null())
    assert sorted(trace.y) == sorted(known["stable_rank"])
    shown = dict(zip(trace.text, zip(trace.x, trace.y, strict=True), strict=True))
    assert shown == {r["name"]: (str(r["layer"]), r["stable_rank"]) for r in known.iter_rows(named=True)}
    assert list(trace.x) == sorted(trace.x, key=int)


def test_figures_are_plain_json() -> None:
    text = plots.heatmap(z=[[math.pi]], x=["0"], y=["1"], title="t", metric="<i>m").to_json()
    assert text is not None
    assert "<i>m" not in text


@pytest.mark.parametrize("module", ["diffract.plots", "diffract.report", "diffract.tables"])
def test_drawing_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_profile_has_tenths_by_projection_and_peaks_of_those_that_have_two() -> None:
    names = ["L0.attn.q", "L1.attn.q", "L0.mlp.up"]
    tenths = {f"energy_tenth_{k}": [k / 10, k / 5, 1.0] for k in range(1, 11)}
    labels = {"model": ["math"] * 3, "name": names, "block": ["attn", "attn", "mlp"], "projection": ["q", "q", "up"]}
    metrics = pl.DataFrame(labels | tenths)
    spectra = pl.DataFrame(
        {"model": ["math"] * 3, "name": names, "quantity": ["energy_by_peak"] * 3, "values": [[0.5, 1.5], [3.0], [1.0]]}
    )
    figure = plots.profile(metrics, spectra, model="math")
    lines = {t.name: t for t in figure.data if t.type == "scatter" and t.mode == "lines+markers"}
    assert list(lines) == ["attn.q", "mlp.up"]
    assert list(lines["attn.q"].y) == pytest.approx([0.15 * k for k in range(1, 11)])
    (box,) = [t for t in figure.data if t.type == "box"]
    assert (box.name, list(box.x), list(box.y)) == ("attn.q", [1, 2], [0.5, 1.5])
    noisy = metrics.with_columns(pl.col(f"energy_tenth_{k}").alias(f"energy_tenth_{k}_noise") for k in range(1, 11))
    assert "noise of equal norm" in {t.name for t in plots.profile(noisy, spectra, model="math").data}
    empty = spectra.clear()
    assert all(t.type != "box" for t in plots.profile(metrics, empty, model="math").data)
