"""Figures over training."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from scipy.stats import gaussian_kde

import synthetic
from diffract import plots
from diffract.plots.training import MOST, OVERLAP, time_column
from diffract.tables import Tables

RUN = synthetic.trajectory()
METRICS, SPECTRA = RUN["metrics"], RUN["spectra"]
STEPS = METRICS["step"].unique().sort().to_list()


def test_evolution_is_median_and_quartiles_of_each_projection() -> None:
    figure = plots.evolution(METRICS, "pl_alpha")
    titles = [a.text for a in figure.layout.annotations[:6]]
    assert titles == ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.down"]
    for place, title in enumerate(titles):
        middle, band = figure.data[2 * place : 2 * place + 2]
        rows = METRICS.filter(projection=title.split(".")[1])
        values = [rows.filter(step=step)["pl_alpha"].to_numpy() for step in STEPS]
        assert list(middle.x) == [step * 4096 for step in STEPS]
        rounding = 1e-12
        np.testing.assert_allclose(middle.y, [np.median(v) for v in values], rtol=rounding)
        low, high = np.transpose([np.percentile(v, [25, 75]) for v in values])
        np.testing.assert_allclose(band.y, [*low, *high[::-1]], rtol=rounding)
    assert figure.layout.yaxis2.matches == "y"
    assert figure.layout.yaxis5.matches is None  # another block
    assert figure.layout.yaxis6.matches == "y5"


def test_a_line_stands_where_the_series_breaks() -> None:
    broken = METRICS.filter(step=STEPS[2])["model"].unique().to_list()
    one = plots.evolution(METRICS, "pl_alpha", matrix="L1.mlp.gate", over="step", broken=broken)
    assert [(shape.x0, shape.x1) for shape in one.layout.shapes] == [(STEPS[2], STEPS[2])]
    assert one.layout.title.text == "L1.mlp.gate, dashed: the series breaks"
    assert len(plots.evolution(METRICS, "pl_alpha", broken=broken).layout.shapes) == 6
    models = METRICS.select("model").unique(maintain_order=True).with_columns(breaks=pl.col("model").is_in(broken))
    run = Tables({"kind": "trajectory"}, {"metrics": METRICS, "models": models})
    assert len(plots.plot("evolution", run, metric="pl_alpha").layout.shapes) == 6
    assert not plots.plot("evolution", Tables(run.manifest, {"metrics": METRICS}), metric="pl_alpha").layout.shapes


def test_evolution_of_one_matrix() -> None:
    figure = plots.evolution(METRICS, "pl_alpha", matrix="L1.mlp.gate", over="step")
    rows = METRICS.filter(name="L1.mlp.gate").sort("step")
    assert (list(figure.data[0].x), list(figure.data[0].y)) == (STEPS, rows["pl_alpha"].to_list())
    assert figure.layout.title.text == "L1.mlp.gate"


def test_what_a_logarithmic_axis_cannot_show_is_told() -> None:
    figure = plots.evolution(METRICS, "pl_alpha", matrix="L1.mlp.gate", over="step", axes="log-log")
    assert list(figure.data[0].x) == STEPS[1:]
    assert figure.layout.title.text == "L1.mlp.gate, without the checkpoint at 0"
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert plots.evolution(METRICS, "pl_alpha", axes="log-lin").layout.xaxis.type is None


def test_a_metric_that_the_first_checkpoint_lacks() -> None:
    figure = plots.evolution(METRICS, "delta_relative", over="order")
    assert list(figure.data[0].x) == list(range(1, len(STEPS)))
    nothing = plots.evolution(METRICS.with_columns(none=pl.lit(None, pl.Float64)), "none")
    assert len(nothing.data) == 0


def test_time_is_what_grows() -> None:
    frame = pl.DataFrame({"order": [0, 1, 2], "step": [10, 20, 10], "tokens": [1, None, 3]})
    assert time_column(frame) == "order"  # steps begin anew, tokens are not known throughout
    assert time_column(frame.with_columns(step=pl.col("order") + 1)) == "step"
    assert time_column(frame.with_columns(tokens=pl.col("order") + 1)) == "tokens"
    assert time_column(frame.select("order")) == "order"


def test_ridges_stand_in_order_and_keep_their_proportions() -> None:
    samples = [[1.0, 2.0, 4.0, 8.0], [1.0, 1.5, 2.0, 3.0]]
    figure = plots.ridge_lines(samples, ["0", "5"], what="step")
    late, early = figure.data[1], figure.data[3]
    assert (late.name, early.name) == ("step 5", "step 0")
    grid = np.log(early.x)
    heights = [np.subtract(early.y, 0), np.subtract(late.y, 1)]
    expected = [gaussian_kde(np.log(s), "scott")(grid) for s in samples]
    highest = max(d.max() for d in expected)
    for found, density in zip(heights, expected, strict=True):
        np.testing.assert_allclose(found, density * OVERLAP / highest, atol=1e-9)  # of grid points through exp and ln
    assert list(figure.layout.yaxis.ticktext) == ["0", "5"]


def test_ridge_pools_matrices_and_names_times() -> None:
    names = METRICS.filter(layer=1, projection="q")["name"].unique().to_list()
    figure = plots.ridge(SPECTRA, METRICS, names, title="<b>q", over="step")
    curves = figure.data[1::2]
    assert [t.name for t in curves][::-1][:3] == ["step 0", "step 24", "step 56"]
    pooled = SPECTRA.filter(pl.col("name").is_in(names), model="step0", quantity="sigma")["values"].explode().to_numpy()
    grid = np.log(curves[-1].x)
    shape = gaussian_kde(np.log(pooled), "scott")(grid)
    heights = np.asarray(curves[-1].y)
    np.testing.assert_allclose(heights / heights.max(), shape / shape.max(), atol=1e-9)  # as above
    assert figure.layout.title.text == "&lt;b&gt;q"


def test_many_checkpoints_are_thinned_and_told() -> None:
    samples = [[1.0, 2.0 + i] for i in range(100)]
    figure = plots.ridge_lines(samples, [str(i) for i in range(100)], what="step", title="w")
    shown = [t.name for t in figure.data[1::2]]
    assert len(shown) == MOST
    assert (shown[0], shown[-1]) == ("step 99", "step 0")
    assert figure.layout.title.text == f"w ({MOST} of 100 checkpoints)"


@pytest.mark.parametrize("samples", [[], [[]], [[0.0, 0.0]], [[1.0]], [[2.0, 2.0], [2.0]], [[math.nan, 1.0]]])
def test_degenerate_ridges(samples: list[list[float]]) -> None:
    figure = plots.ridge_lines(samples, [str(i) for i in range(len(samples))], what="step")
    drawn = sum(any(v > 0 for v in sample) for sample in samples)
    assert len(figure.data) == 2 * drawn
    assert all(math.isfinite(v) for t in figure.data for v in t.y)
