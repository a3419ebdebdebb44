"""The figure of lineage: a map of all pairs, and trees whose models do not lie on each other."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import dist

import plotly.graph_objects as go
import polars as pl

import synthetic
from diffract import plots
from diffract.plots.lineage import WORDS, _around

TREE = {"a": pl.String, "b": pl.String, "r": pl.Float64, "rooted": pl.Boolean}


def tree(*branches: tuple[str, str]) -> pl.DataFrame:
    return pl.DataFrame([(a, b, 0.95, False) for a, b in branches], schema=TREE, orient="row")


def pairs(names: list[str]) -> pl.DataFrame:
    rows = [{"a": a, "b": b, "lineage": "far", "r": 0.5, "matrices": 6} for a, b in combinations(names, 2)]
    return pl.DataFrame(rows)


def positions(figure: go.Figure) -> dict[str, tuple[float, float]]:
    (models,) = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers+text"]
    return dict(zip(models.text, zip(models.x, models.y, strict=True), strict=True))


def test_the_map_has_both_halves_and_the_colours_of_what_was_found() -> None:
    made = plots.kinship(*(synthetic.related()[name] for name in ("lineage", "tree")))
    cells, order = made.data[0], list(WORDS)
    near, stranger, unknown = (order.index(word) for word in ("descendant or sibling", "stranger", "cannot tell"))
    assert [list(row) for row in cells.z] == [
        [None, near, near, stranger],
        [near, None, near, stranger],
        [near, near, None, unknown],
        [stranger, stranger, unknown, None],
    ]
    assert list(cells.text[2]) == ["0.950", "0.910", "", "-"]
    named = [trace.name for trace in made.data if trace.showlegend is not False and trace.type == "scatter"]
    assert named == ["descendant or sibling", "stranger", "cannot tell"]


def test_branches_are_of_one_length_and_models_apart() -> None:
    names = [f"m{i}" for i in range(12)]
    star, path = [("m0", f"m{i}") for i in range(1, 6)], list(pairwise(names[6:10]))
    made = plots.kinship(pairs(names), tree(*star, *path))
    places = positions(made)
    assert set(places) == set(names)
    for a, b in (*star, *path):
        assert abs(dist(places[a], places[b]) - 1) < 1e-9
    assert min(dist(places[a], places[b]) for a, b in combinations(names, 2)) > 0.5


def test_arrows_lead_away_from_a_root_alone() -> None:
    frames = synthetic.related()
    rooted = plots.kinship(frames["lineage"], frames["tree"])
    plain = plots.kinship(frames["lineage"], frames["tree"].with_columns(rooted=False))
    heads = [[a for a in made.layout.annotations if a.arrowhead] for made in (rooted, plain)]
    assert [len(found) for found in heads] == [2, 0]
    places = positions(rooted)
    assert {(a.ax, a.ay) for a in heads[0]} == {places["base"]}


def test_a_long_chain_is_drawn() -> None:
    names = [str(i) for i in range(1200)]  # more than Python calls itself
    links = pl.concat([pairs(names[:2]), pairs(names[-2:])])
    made = plots.kinship(links, tree((names[0], names[1]), (names[-2], names[-1])))
    assert len(positions(made)) == 4
    assert (
        len(_around("0", {n: [names[k] for k in (i - 1, i + 1) if 0 <= k < 1200] for i, n in enumerate(names)})) == 1200
    )
