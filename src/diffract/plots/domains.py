"""Heads and domains out of the metrics table of a comparison, and how alike domains are."""

from __future__ import annotations

from itertools import combinations

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import DIVERGING, figure, label

PER_QUERY_HEAD, PER_KV_HEAD = ("q", "o"), ("k", "v")
PLACE = ("model", "layer", "block")
HEADS_SCHEMA = {
    "model": pl.String,
    "layer": pl.Int32,
    "block": pl.String,
    "head": pl.Int32,
    "head_delta": pl.Float64,
}
MEANINGS = {"spearman": "Spearman's ρ of the heads' changes", "cosine": "Cosine of the changes"}


def heads_of(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return how much each query head changed over its q, k, v and o slices, in every model that was compared.

    Several query heads share one key-value head under grouped-query attention: its slices count for each of them.

    Args:
        metrics: The metrics table of a comparison.

    Returns:
        Columns model, layer, block, head, ``head_delta``; null where a slice has no number. Empty if nothing was
        compared, or nothing is cut into heads.
    """
    if "delta_frobenius" not in metrics.columns:
        return pl.DataFrame(schema=HEADS_SCHEMA)
    compared = metrics.filter(pl.col("delta_frobenius").is_not_null())["model"].unique(maintain_order=True)
    squares = (pl.col("delta_frobenius") ** 2).fill_null(float("nan"))
    slices = metrics.filter(pl.col("model").is_in(compared.implode())).with_columns(squares=squares)
    own = slices.filter(pl.col("projection").is_in(PER_QUERY_HEAD), pl.col("head").is_not_null())
    shared = slices.filter(pl.col("projection").is_in(PER_KV_HEAD), pl.col("kv_head").is_not_null())
    heads = own.group_by(*PLACE, "head", maintain_order=True).agg(pl.col("kv_head").first(), pl.col("squares").sum())
    groups = shared.group_by(*PLACE, "kv_head").agg(of_group=pl.col("squares").sum())
    joined = heads.join(groups, on=[*PLACE, "kv_head"], how="left", nulls_equal=True, maintain_order="left")
    delta = (pl.col("squares") + pl.col("of_group").fill_null(0)).sqrt().fill_nan(None)
    return joined.select(*PLACE, "head", head_delta=delta)


def domains_of(heads: pl.DataFrame) -> pl.DataFrame:
    """Return Spearman's correlation of ``head_delta`` between models, over the heads that are known in both.

    Args:
        heads: model, layer, block, head, ``head_delta``.

    Returns:
        Columns a, b, spearman, one row per pair; null where one of both does not vary.
    """
    by_model = {name: heads.filter(pl.col("model") == name) for name in heads["model"].unique(maintain_order=True)}
    rows = []
    for a, b in combinations(by_model, 2):
        both = by_model[a].join(by_model[b], on=["layer", "block", "head"], nulls_equal=True)
        known = both.drop_nulls(["head_delta", "head_delta_right"])
        rho = known.select(pl.corr("head_delta", "head_delta_right", method="spearman").fill_nan(None))
        rows.append({"a": a, "b": b, "spearman": rho.item() if len(known) > 1 else None})
    return pl.DataFrame(rows, schema={"a": pl.String, "b": pl.String, "spearman": pl.Float64})


def domain_matrix(domains: pl.DataFrame, column: str = "spearman") -> go.Figure:
    """Draw how alike each pair of domains is, in numbers on colours from -1 to 1; the diagonal is left empty.

    Args:
        domains: a, b, and the column; one row per pair.
        column: ``spearman`` or ``cosine``.
    """
    names = list(dict.fromkeys([*domains["a"], *domains["b"]]))
    known = {(a, b): value for a, b, value in domains.select("a", "b", column).iter_rows()}
    grid = [[None if a == b else known.get((a, b), known.get((b, a))) for b in names] for a in names]
    shown = [label(name) for name in names]
    # Numbers as labels: names may be equal once they are made safe.
    places = list(range(len(names)))
    trace = go.Heatmap(
        z=grid,
        x=places,
        y=places,
        zmin=-1,
        zmax=1,
        colorscale=DIVERGING,
        showscale=False,
        text=[["" if v is None else f"{v:.2f}" for v in row] for row in grid],
        texttemplate="%{text}",
        customdata=[[f"{a}, {b}" for b in shown] for a in shown],
        hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
        xgap=2,
        ygap=2,
    )
    made = figure([trace], x="", y="", title=MEANINGS.get(column, label(column)), height=340)
    axis = {"tickvals": places, "ticktext": shown, "showgrid": False, "ticks": "", "constrain": "domain"}
    return made.update_xaxes(**axis).update_yaxes(**axis, autorange="reversed", scaleanchor="x")
