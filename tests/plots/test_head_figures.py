"""Figures of heads and domains, and the coloured violins."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import synthetic
from diffract import plots
from diffract.attention import by_model, concentration, head_squares, lorenz_of

HEADS = synthetic.compared()["heads"]
METRICS = synthetic.compared()["metrics"]


def cells(trace) -> dict[tuple[str, str], float]:
    return {(y, x): v for y, row in zip(trace.y, trace.z, strict=True) for x, v in zip(trace.x, row, strict=True)}


@pytest.mark.parametrize("metric", ["head_delta", "head_delta_relative"])
def test_head_maps_are_the_table(metric: str) -> None:
    figure = plots.head_maps(HEADS, metric=metric)
    assert [a.text for a in figure.layout.annotations[:3]] == list(synthetic.DOMAINS)
    for trace, domain in zip(figure.data, synthetic.DOMAINS, strict=True):
        rows = HEADS.filter(model=domain).iter_rows(named=True)
        assert cells(trace) == {(str(r["layer"]), str(r["head"])): r[metric] for r in rows}
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}  # one colour range


def test_heads_that_are_missing_leave_holes_and_order_is_numeric() -> None:
    heads = pl.DataFrame(
        {"model": ["a"] * 2, "layer": [10, 2], "block": ["attn"] * 2, "head": [11, 2], "head_delta": [1.0, None]}
    )
    trace = plots.head_maps(heads).data[0]
    assert (list(trace.y), list(trace.x)) == (["2", "10"], ["2", "11"])
    assert [list(row) for row in trace.z] == [[None, None], [None, 1.0]]


def test_layers_of_several_blocks_are_told_apart() -> None:
    heads = pl.DataFrame(
        {"model": ["a"] * 2, "layer": [0, 0], "block": ["attn", "cross_attn"], "head": [0, 0], "head_delta": [1.0, 2.0]}
    )
    assert cells(plots.head_maps(heads).data[0]) == {("0 attn", "0"): 1.0, ("0 cross_attn", "0"): 2.0}


def test_scores_are_the_difference_of_scaled_changes() -> None:
    figure = plots.reference_scores(HEADS, "natural")
    assert len(figure.data) == 2
    grids = {}
    for domain in synthetic.DOMAINS:
        values = HEADS.filter(model=domain).sort("layer", "head")["head_delta"].to_numpy()
        grids[domain] = (values - values.min()) / (values.max() - values.min())
    for trace, domain in zip(figure.data, ("math", "code"), strict=True):
        np.testing.assert_allclose(np.ravel(trace.z), grids[domain] - grids["natural"], atol=1e-15)  # a rounding
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax


def test_unknown_heads_have_no_score() -> None:
    rows = [("a", None), ("a", 0.0), ("a", 2.0), ("b", 1.0), ("b", 3.0), ("b", None)]
    heads = pl.DataFrame(rows, schema=["model", "head_delta"], orient="row")
    heads = heads.with_columns(layer=0, block=pl.lit("attn"), head=pl.int_range(6) % 3)
    assert [list(row) for row in plots.reference_scores(heads, "b").data[0].z] == [[None, -1.0, None]]


def test_lorenz_draws_squares_and_their_gini() -> None:
    heads = pl.DataFrame({"model": ["a", "a", "<b>"], "head_delta": [1.0, 2.0, 0.0]})
    ginis = {name: concentration(head_squares(rows))["head_gini"] for name, rows in by_model(heads).items()}
    models = pl.DataFrame({"model": list(ginis), "head_gini": list(ginis.values())}).fill_nan(None)
    figure = plots.lorenz(lorenz_of(heads), models)
    assert list(figure.data[1].y) == [0, 0.2, 1]
    assert figure.data[1].name == "a (Gini 0.30)"  # 2 (1 * 1 + 2 * 4) / (2 * 5) - 3 / 2
    assert list(figure.data[2].x) == []
    assert figure.data[2].name == "&lt;b&gt;"
    assert figure.data[1].line.dash != figure.data[2].line.dash


def test_violin_points_carry_their_colour() -> None:
    rows = METRICS.filter(model="math").with_columns(
        left_agreement_mean=pl.when(pl.col("name") == "L0.mlp.gate").then(None).otherwise("left_agreement_mean")
    )
    figure = plots.layer_violins(rows, "delta_relative", colour="left_agreement_mean")
    violin, known, unknown = figure.data
    table = {r["name"]: (r["delta_relative"], r["left_agreement_mean"]) for r in rows.iter_rows(named=True)}
    assert dict(zip(known.text, zip(known.y, known.marker.color, strict=True), strict=True)) == {
        name: found for name, found in table.items() if name != "L0.mlp.gate"
    }
    assert (list(unknown.text), list(unknown.y)) == (["L0.mlp.gate"], [table["L0.mlp.gate"][0]])
    assert sorted(violin.y) == sorted(delta for delta, _ in table.values())
    layers = dict(zip(rows["name"], rows["layer"], strict=True))
    # A point stays nearer to its own layer than to the next.
    assert all(abs(x - layers[name]) < 0.5 for x, name in zip(known.x, known.text, strict=True))
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3"]
