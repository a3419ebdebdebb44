"""Figures of searches show what stands in their tables."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl
import pytest

import synthetic
from diffract import plots
from diffract.plots.factors import factors_by_sigma, recipe_front

POINTS, EFFECTS = synthetic.searched()["points"], synthetic.searched()["effects"]
TRUNCATED = synthetic.truncated()["points"]
CONNECTED = synthetic.connected()


def curves(made: go.Figure, axis: str = "x") -> dict[str, list[Any]]:
    """Curves of one panel by name, bands left out."""
    found: dict[str, list[Any]] = {}
    for trace in made.data:
        if trace.fill is None and trace.name and (trace.xaxis or "x") == axis:
            found.setdefault(trace.name, []).append(trace)
    return found


@pytest.mark.parametrize(("measure", "low"), [("gain", "gain_low"), ("quality", "low")])
def test_a_curve_for_each_order_in_each_split(measure: str, low: str) -> None:
    made = plots.rewind_curves(POINTS, "code", measure=measure)
    assert [a.text for a in made.layout.annotations[:2]] == ["selection", "held-out"]
    for axis, split in (("x", "selection"), ("x2", "held-out")):
        found = curves(made, axis)
        assert len(found["random"]) == 2
        rows = POINTS.filter(order="greedy", reverse=False, split=split, task="code")
        (greedy,) = found["greedy"]
        assert list(greedy.y) == rows[measure].to_list()
        assert list(greedy.x) == rows["fraction"].to_list()
        rows = POINTS.filter(order="greedy", reverse=True, split=split, task="code")
        assert list(found["greedy, reversed"][0].y) == rows[measure].to_list()
        base = POINTS.filter(order="base", split=split, task="code")[measure][0]
        assert list(found["base"][0].y) == [base, base]
    bands = [t for t in made.data if t.fill == "toself"]
    assert {t.name for t in bands} == {"greedy", "reference", "magnitude", "first-order", "activation"}
    ends = POINTS.filter(order="greedy", reverse=False, split="selection", task="code")[low].to_list()
    assert list(next(t for t in bands if t.name == "greedy").y)[: len(ends)] == ends


def test_names_are_in_the_legend_once() -> None:
    for made in (plots.rewind_curves(POINTS, "math"), plots.truncation_curves(TRUNCATED, "math")):
        shown = [t.name for t in made.data if t.showlegend]
        assert len(shown) == len(set(shown))
        assert {t.name for t in made.data} == set(shown)


@pytest.mark.parametrize("metric", ["effect", "first_order", "magnitude"])
def test_effects_stand_at_their_layer_and_head(metric: str) -> None:
    (trace,) = plots.head_effects(EFFECTS, metric=metric).data
    cells = {(y, x): v for y, row in zip(trace.y, trace.z, strict=True) for x, v in zip(trace.x, row, strict=True)}
    assert cells == {(str(r["layer"]), str(r["head"])): r[metric] for r in EFFECTS.iter_rows(named=True)}


def test_gains_are_centred_and_sizes_are_not() -> None:
    axis = plots.head_effects(EFFECTS).layout.coloraxis
    assert axis.cmin == -axis.cmax == -EFFECTS["effect"].abs().max()  # type: ignore[operator]
    assert plots.head_effects(EFFECTS, metric="magnitude").layout.coloraxis.cmin is None


def test_truncation_against_energy_and_bytes() -> None:
    made = plots.truncation_curves(TRUNCATED, "math")
    for axis, column in (("x", "energy"), ("x2", "bytes")):
        found = curves(made, axis)
        rows = TRUNCATED.filter(rule="drop", split="held-out", task="math").sort(column)
        (drop,) = found["drop"]
        assert (list(drop.x), list(drop.y)) == (rows[column].to_list(), rows["gain"].to_list())
        (single,) = found["mp-edge"]
        assert single.mode == "markers"
        assert (
            list(single.y)
            == TRUNCATED.filter(rule="mp-edge", fraction=1.0, split="held-out", task="math")["gain"].to_list()
        )
    assert made.layout.annotations[-2].text == "held-out split"


def test_what_is_far_worse_does_not_squash_the_rest() -> None:
    far = TRUNCATED.with_columns(gain=pl.when(rule="dare-bytes", fraction=0.5).then(-50.0).otherwise("gain"))
    low, high = plots.truncation_curves(far, "math").layout.yaxis.range
    # rules go from 0 to -0.2, the base is at -0.9; a quarter of that on each side
    assert (low, high) == pytest.approx((-0.9 - 0.225, 0.225))


def test_the_fuller_split_is_drawn() -> None:
    few = TRUNCATED.filter((pl.col("split") == "selection") | (pl.col("fraction") == 0))
    assert plots.truncation_curves(few, "math").layout.annotations[-2].text == "selection split"


def test_paths_and_their_barriers() -> None:
    made = plots.model_paths(CONNECTED["paths"])
    assert [a.text for a in made.layout.annotations[:2]] == ["math → code", "math → natural"]
    rows = CONNECTED["paths"].filter(a="math", b="code", task="code")
    assert list(curves(made)["code"][0].y) == rows["quality"].to_list()
    bars = [t for t in made.data if t.mode == "lines" and t.fill is None and len(set(t.x)) == 1]
    worse = CONNECTED["paths"].filter(pl.col("gap") > 0)
    assert sorted(tuple(t.y) for t in bars) == sorted(worse.select("linear", "quality").rows())
    alone = plots.model_paths(CONNECTED["paths"], task="code")
    assert {t.name for t in alone.data if t.name} == {"code"}


def test_the_matrix_of_barriers_is_symmetric_with_the_base_first() -> None:
    made = plots.connectivity_matrix(CONNECTED["pairs"])
    trace = made.data[0]
    names = list(made.layout.xaxis.ticktext)
    assert names == ["base", "math", "code", "natural"]
    for row in CONNECTED["pairs"].filter(task="math").iter_rows(named=True):
        i, j = names.index(row["a"]), names.index(row["b"])
        assert trace.z[i][j] == trace.z[j][i] == row["barrier"]
        assert trace.text[i][j].endswith("✓") == row["connected"]
    assert [trace.z[i][i] for i in range(4)] == [None] * 4
    assert made.layout.coloraxis.cmax == CONNECTED["pairs"]["barrier"].max()


def test_no_barrier_at_all_is_drawn_as_none() -> None:
    flat = CONNECTED["pairs"].with_columns(barrier=0.0)
    axis = plots.connectivity_matrix(flat).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1)


def test_the_simplex_has_its_models_as_corners() -> None:
    made = plots.model_simplex(CONNECTED["simplex"], "code")
    (trace,) = made.data
    rows = CONNECTED["simplex"].filter(task="code")
    assert [list(w) for w in zip(trace.a, trace.b, trace.c, strict=True)] == rows["weights"].to_list()
    assert list(trace.marker.color) == rows["quality"].to_list()
    axes = made.layout.ternary
    assert [axes.aaxis.title.text, axes.baxis.title.text, axes.caxis.title.text] == ["math", "code", "natural"]


def test_each_direction_is_a_mark_and_vectors_are_none() -> None:
    factors = synthetic.factored()["factors"]
    made = factors_by_sigma(factors)
    assert [a.text for a in made.layout.annotations[:1]] == ["mlp.up"]
    assert [trace.name for trace in made.data] == ["layer 0", "layer 1"]
    for layer, trace in enumerate(made.data):
        own = factors.filter(layer=layer)
        assert (list(trace.x), list(trace.y)) == (own["sigma"].to_list(), own["factor"].to_list())


def test_the_front_has_intervals_and_tells_what_is_dominated() -> None:
    frames = synthetic.factored()
    made = recipe_front(frames["choice"], frames["points"], target="target", kept="kept")
    curve, *marks = made.data
    assert list(curve.x) == pytest.approx([0.0, 0.05, 0.1])
    assert [mark.marker.symbol for mark in marks] == ["circle", "circle", "circle-open"]
    assert marks[0].y[0] == pytest.approx(0.3)
    assert (marks[0].error_y.array[0], marks[0].error_y.arrayminus[0]) == pytest.approx((0.02, 0.01))
