"""Figures of one matrix: its density, its search for a tail, its agreement."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest

import synthetic
from diffract import plots

RUN = synthetic.compared()
METRICS, SPECTRA = RUN["metrics"], RUN["spectra"]
ROW = METRICS.filter(model="math", block="mlp").sort("mp_spikes").row(-1, named=True)
NAME = ROW["name"]
SHAPE = (ROW["rows"], ROW["cols"])


def eigenvalues(quantity: str = "sigma") -> np.ndarray:
    values = SPECTRA.filter(model="math", name=NAME, quantity=quantity)["values"][0]
    return np.square(values.to_numpy()) / max(SHAPE)


def traces(figure: go.Figure) -> dict[str, Any]:
    return {t.name.split(" (")[0]: t for t in figure.data}


def area(trace: Any) -> float:
    """Under steps, or under a curve."""
    x, y = np.asarray(trace.x), np.asarray(trace.y)
    return float(np.trapezoid(y, x))


def test_density_has_every_law() -> None:
    figure = plots.density(SPECTRA, METRICS, NAME, model="math")
    assert list(traces(figure)) == [
        "spectrum",
        "permuted entries",
        "Marchenko-Pastur",
        "power law",
        "truncated power law",
        "exponential",
        "log-normal",
        "spikes above the edge",
    ]
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert figure.layout.title.text == f"{NAME}, math"


@pytest.mark.parametrize("axes", ["log-log", "lin-log"])
def test_histograms_hold_all_eigenvalues(axes: str) -> None:
    found = traces(plots.density(SPECTRA, METRICS, NAME, model="math", axes=axes))
    for name in ("spectrum", "permuted entries"):
        x = np.asarray(found[name].x)
        # Empty bins stand on the floor of a logarithmic axis, which is below half of the lowest bar.
        total = np.trapezoid(found[name].y, x if axes == "log-log" else np.log(x))
        assert total == pytest.approx(1, abs=0.02 if axes == "log-log" else 1e-9)


def test_linear_height_is_the_density_of_ln_lambda() -> None:
    log, lin = (traces(plots.density(SPECTRA, METRICS, NAME, model="math", axes=a)) for a in ("log-log", "lin-log"))
    for name in ("Marchenko-Pastur", "power law", "log-normal"):
        np.testing.assert_allclose(np.multiply(log[name].x, log[name].y), lin[name].y, rtol=1e-12)  # a rounding
    assert plots.density(SPECTRA, METRICS, NAME, model="math", axes="lin-log").layout.yaxis.type is None


def test_the_bulk_has_the_share_that_is_no_spike() -> None:
    found = traces(plots.density(SPECTRA, METRICS, NAME, model="math"))["Marchenko-Pastur"]
    share = 1 - ROW["mp_spikes"] / min(SHAPE)
    assert area(found) == pytest.approx(share, abs=0.01)  # the trapezoid's, over 398 points
    assert max(found.x) <= ROW["mp_edge"]


@pytest.mark.parametrize(("name", "prefix"), [("power law", "pl"), ("exponential", "exp"), ("log-normal", "ln")])
def test_tails_begin_at_xmin_with_their_share(name: str, prefix: str) -> None:
    found = traces(plots.density(SPECTRA, METRICS, NAME, model="math"))[name]
    values, xmin = eigenvalues(), ROW[f"{prefix}_xmin"]
    share = (values >= xmin).mean()
    at_xmin = {
        "pl": (ROW["pl_alpha"] - 1) / xmin,
        "exp": ROW["exp_rate"],
        "ln": found.y[0] / share,
    }[prefix]
    assert found.x[0] == pytest.approx(xmin, rel=1e-12)  # of exp(ln x)
    assert found.y[0] == pytest.approx(share * at_xmin, rel=1e-9)
    assert found.x[-1] == pytest.approx(values.max(), rel=1e-12)
    assert 0.5 * share < area(found) <= share * 1.001  # what lies beyond the largest eigenvalue is not drawn


def test_spikes_and_xmin_are_marked() -> None:
    figure = plots.density(SPECTRA, METRICS, NAME, model="math")
    values = eigenvalues()
    assert sorted(traces(figure)["spikes above the edge"].x) == sorted(values[values > ROW["mp_edge"]])
    assert [shape.x0 for shape in figure.layout.shapes] == [ROW["pl_xmin"]]
    assert figure.layout.annotations[0].x == pytest.approx(math.log10(ROW["pl_xmin"]))


def test_the_law_of_norms_is_drawn_by_its_quantiles() -> None:
    """Quantiles of the exponential law of mean 1: between two of them lies a share of 1 / n."""
    n = 400
    quantiles = -np.log((np.arange(n) + 0.5) / n)
    found = traces(plots.density_lines([3.0, 1.0], (2, 2), {}, norms=quantiles.tolist()))["row and column norms"]
    assert bool((np.diff(found.x) > 0).all())
    np.testing.assert_allclose(found.y, np.exp(-np.asarray(found.x)), rtol=0.03)  # of the widest steps
    assert area(found) == pytest.approx(1, abs=0.02)
    gap = traces(plots.density_lines([3.0, 1.0], (2, 2), {}, norms=[4.0, 3.9, 1.1, 1.0]))["row and column norms"]
    np.testing.assert_allclose(gap.y, [2.5, 1 / 11.2, 2.5])
    for nothing in ([], [1.0], [1.0, 1.0], [0.0, 0.0], [math.nan, math.nan]):
        assert "row and column norms" not in traces(plots.density_lines([3.0, 1.0], (2, 2), {}, norms=nothing))


def test_density_draws_what_there_is() -> None:
    bare = METRICS.select("model", "name", "rows", "cols")
    kept = SPECTRA.filter(pl.col("quantity") == "sigma")
    assert list(traces(plots.density(kept, bare, NAME, model="math"))) == ["spectrum"]


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [2.0], [1.0, 1.0, 1.0], [3.0, 1.0, 0.0]])
@pytest.mark.parametrize("axes", ["log-log", "lin-log"])
def test_degenerate_spectra_are_drawn(values: list[float], axes: str) -> None:
    row = {"mp_variance": 1.0, "mp_edge": 2.0, "mp_spikes": 0.0, "pl_alpha": math.nan, "pl_xmin": 1.0, "exp_rate": None}
    figure = plots.density_lines(values, (4, 3), row, axes=axes)
    assert isinstance(figure, go.Figure)
    zeros = values.count(0.0)
    assert figure.data[0].name == ("spectrum" if not zeros else f"spectrum (without {zeros} zeros)")
    assert all(math.isfinite(v) for t in figure.data for v in t.y)


def test_ks_scan_is_the_table_and_marks_the_choice() -> None:
    figure = plots.ks_scan(SPECTRA, METRICS, NAME, model="math")
    distances = SPECTRA.filter(model="math", name=NAME, quantity="pl_ks_scan")["values"][0].to_numpy()
    known = np.isfinite(distances)
    order = np.argsort(eigenvalues()[known])
    assert list(figure.data[0].x) == list(eigenvalues()[known][order])
    assert list(figure.data[0].y) == list(distances[known][order])
    assert (list(figure.data[1].x), list(figure.data[1].y)) == ([ROW["pl_xmin"]], [ROW["pl_ks"]])
    assert min(figure.data[0].y) == ROW["pl_ks"]
    assert f"{ROW['pl_tail_count']:.0f} eigenvalues" in figure.layout.annotations[0].text
    assert figure.layout.xaxis.type == "log"


def test_ks_scan_takes_nulls_and_nothing() -> None:
    spectra = pl.DataFrame(
        {
            "model": ["m"] * 2,
            "name": ["w"] * 2,
            "quantity": ["sigma", "pl_ks_scan"],
            "values": [[2.0, 1.0], [None, 0.5]],
        }
    )
    metrics = pl.DataFrame(
        {"model": ["m"], "name": ["w"], "rows": [2], "cols": [2], "pl_xmin": [None], "pl_ks": [None]}
    )
    assert list(plots.ks_scan(spectra, metrics, "w", model="m").data[0].x) == [0.5]
    assert len(plots.ks_lines([], [], {}).data[0].x) == 0


def test_agreement_shows_the_window_beside_it() -> None:
    figure = plots.agreement(SPECTRA, METRICS, NAME, model="math")
    kinds = ["agreement", "agreement_window"]
    for panel, kind in enumerate(kinds):
        for place, side in enumerate(("left", "right")):
            curve = SPECTRA.filter(model="math", name=NAME, quantity=f"{side}_{kind}")["values"][0]
            trace, level = figure.data[4 * panel + place], figure.data[4 * panel + 2 + place]
            assert list(trace.y) == curve.to_list()
            assert list(level.y) == [ROW[f"{side}_{kind}_chance"]] * 2
            assert trace.xaxis == ("x", "x2")[panel]
    assert sum(bool(t.showlegend) for t in figure.data) == 4


def test_peaks_of_the_base_are_shaded() -> None:
    peak = SPECTRA.filter(model="base", name=NAME, quantity="peak")["values"][0].to_numpy()
    figure = plots.agreement(SPECTRA, METRICS, NAME, model="math", base="base")
    covered = np.full(len(peak), False)
    for shape in figure.layout.shapes:
        if shape.xref == "x":
            covered[int(shape.x0 + 0.5) - 1 : int(shape.x1 + 0.5) - 1] = True
    assert covered.tolist() == (peak >= 0).tolist()
    assert any(covered)
    assert not all(covered)


def test_shades_follow_runs_of_one_peak() -> None:
    made = plots.agreement_lines({"left": [1.0] * 6}, {}, peaks=[1, 1, -1, 0, 0, math.nan])
    assert [(s.x0, s.x1, s.label.text) for s in made.layout.shapes] == [(0.5, 2.5, "peak 2"), (3.5, 5.5, "peak 1")]
