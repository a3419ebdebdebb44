"""How models are related: what was found of each pair, and the trees that join those that are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from diffract.plots.choice import Frames, kind
from diffract.plots.style import COLOURS, between_pairs, dress, label, name_both_axes

WORDS = {
    "same": "#0f766e",
    "same values": "#2dd4bf",
    "descendant or sibling": "#99f6e4",
    "far": "#fde68a",
    "rearranged": "#c7d2fe",
    "stranger": "#e5e7eb",
    "cannot tell": "#f9fafb",
}
"""What may be found of a pair, the nearest first, and its colour."""

CELL, EDGES = 30, 150
"""Pixels of a row of the map, and of what stands around it."""

MOST_TEXTS = 20
"""Models up to which the map has numbers in its cells; of more they stand in the boxes under the pointer alone."""

LETTER = 0.12
"""Room of a letter of a name, in branches."""

Position = tuple[float, float]


def kinship(lineage: pl.DataFrame, tree: pl.DataFrame) -> go.Figure:
    """Draw a map of all pairs, coloured by what was found and with their correlation, and beside it the trees.

    Args:
        lineage: The table of pairs: a, b, ``lineage``, r.
        tree: The branches: a, b, r, ``rooted``. Their lengths in the figure mean nothing; an arrow leads away from a
            root.
    """
    names = list(dict.fromkeys([*lineage["a"], *lineage["b"]]))
    titles = ("each pair, with r", "trees, with r of each branch; lengths mean nothing")
    made = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.06)
    made.add_trace(_pairs(lineage, names), row=1, col=1)
    dress(made, title="", height=max(340, EDGES + CELL * len(names)))
    name_both_axes(made, names, automargin=True, zeroline=False)
    for word in (word for word in WORDS if word in set(lineage["lineage"])):
        square = {"color": WORDS[word], "symbol": "square", "size": 12, "line": {"width": 1, "color": "#9ca3af"}}
        made.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=square, name=word), row=1, col=1)
    places = _places(names, tree)
    ends = [(places[a], places[b], r, rooted) for a, b, r, rooted in tree.select("a", "b", "r", "rooted").iter_rows()]
    lines = {axis: [v for a, b, *_ in ends for v in (a[k], b[k], None)] for k, axis in enumerate("xy")}
    grey = {"color": COLOURS["bars"], "width": 1.5}
    made.add_trace(go.Scatter(**lines, mode="lines", line=grey, showlegend=False, hoverinfo="skip"), row=1, col=2)
    refs = {"xref": "x2", "yref": "y2"}
    head = {"axref": "x2", "ayref": "y2", "text": "", "arrowhead": 2, "standoff": 8, "arrowcolor": COLOURS["bars"]}
    arrows = [{"ax": a[0], "ay": a[1], "x": b[0], "y": b[1], **head, **refs} for a, b, _, rooted in ends if rooted]
    plain = {"showarrow": False, "bgcolor": "white", **refs}
    numbers = [{"x": (a[0] + b[0]) / 2, "y": (a[1] + b[1]) / 2, "text": near(r), **plain} for a, b, r, _ in ends]
    shown: Any = made.layout  # whose attributes plotly makes at run time
    made.update_layout(annotations=[*shown.annotations, *arrows, *numbers])
    at = [places[name] for name in names]
    dots = {"color": COLOURS["tuned"], "size": 11, "line": {"width": 1, "color": "white"}}
    text = {"text": [label(name) for name in names], "textposition": "top center", "hoverinfo": "skip"}
    x, y = zip(*at, strict=True) if at else ((0.0,), (0.0,))
    made.add_trace(go.Scatter(x=x, y=y, mode="markers+text", marker=dots, showlegend=False, **text), row=1, col=2)
    made.update_xaxes(visible=False, range=[min(x) - 1.2, max(x) + 1.2], row=1, col=2)
    made.update_yaxes(visible=False, autorange=None, range=[min(y) - 0.5, max(y) + 0.8], row=1, col=2)
    legend = {"x": 1, "xanchor": "right", "y": -0.02, "yanchor": "top"}  # below the trees: the map has names there
    return made.update_layout(margin={"t": 48, "b": 40}, legend=legend)


def _pairs(lineage: pl.DataFrame, names: Sequence[str]) -> go.Heatmap:
    known = {(row["a"], row["b"]): row for row in lineage.iter_rows(named=True)}
    grid = [[known.get((a, b), known.get((b, a))) for b in names] for a in names]
    order = list(WORDS)
    steps = [((i + end) / len(WORDS), colour) for i, colour in enumerate(WORDS.values()) for end in (0, 1)]
    shown = len(names) <= MOST_TEXTS
    return between_pairs(
        names,
        [[None if cell is None else order.index(cell["lineage"]) for cell in row] for row in grid],
        [[near(cell["r"]) if cell is not None and shown else "" for cell in row] for row in grid],
        customdata=[["" if cell is None else _told(cell) for cell in row] for row in grid],
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=steps,
        zmin=-0.5,
        zmax=len(WORDS) - 0.5,
        showscale=False,
    )


def _told(cell: Mapping[str, Any]) -> str:
    return f"{label(cell['a'])} and {label(cell['b'])}: {cell['lineage']}, r {near(cell['r'])} over {cell['matrices']}"


def near(r: float | None) -> str:
    """Return a correlation for people, 1 of equal weights alone.

    >>> near(0.99999), near(1.0), near(0.5), near(None)
    ('0.999990', '1.000', '0.500', '-')
    """
    return "-" if r is None else f"{r:.3f}" if r == 1 or abs(r) < 0.9995 else f"{r:.6f}"


def _places(names: Sequence[str], tree: pl.DataFrame) -> dict[str, Position]:
    """Return where each model stands: trees side by side in rows, the largest first, models alone at the end."""
    neighbours: dict[str, list[str]] = {name: [] for name in names}
    for a, b in tree.select("a", "b").iter_rows():
        neighbours[a].append(b)
        neighbours[b].append(a)
    drawn: list[dict[str, Position]] = []
    for name in sorted(names, key=lambda name: -len(neighbours[name])):
        if not any(name in one for one in drawn):
            drawn.append(_around(name, neighbours))
    drawn.sort(key=len, reverse=True)
    sizes = [_size(one) for one in drawn]
    widest = max([width for width, _ in sizes] + [math.sqrt(1.5 * sum(width * height for width, height in sizes))])
    found: dict[str, Position] = {}
    left = top = height = 0.0
    for one, (width, own_height) in zip(drawn, sizes, strict=True):
        if left and left + width > widest + 1e-9:
            left, top, height = 0.0, top - height, 0.0
        xs, ys = zip(*one.values(), strict=True)
        room = (width - max(xs) + min(xs)) / 2
        found |= {name: (x - min(xs) + left + room, y - max(ys) + top) for name, (x, y) in one.items()}
        left, height = left + width, max(height, own_height)
    return found


def _size(tree: Mapping[str, Position]) -> Position:
    """Return the room of a tree with its names, each of which takes as much as its letters."""
    xs, ys = zip(*tree.values(), strict=True)
    return max(xs) - min(xs) + 0.5 + LETTER * max(map(len, tree)), max(ys) - min(ys) + 0.7


def _around(centre: str, neighbours: Mapping[str, Sequence[str]]) -> dict[str, Position]:
    """Place a tree around one of its models: what lies behind each branch has as much of the circle as it has ends."""
    order, above = [centre], {centre: ""}
    for name in order:
        for other in neighbours[name]:
            if other not in above:
                above[other] = name
                order.append(other)
    ends = dict.fromkeys(order, 0)
    for name in reversed(order):
        ends[name] = ends[name] or 1
        if above[name]:
            ends[above[name]] += ends[name]
    places, begins = {centre: (0.0, 0.0)}, {centre: 0.0}
    for name in order[1:]:
        parent = above[name]
        begin, wide = begins[parent], 2 * math.pi * ends[name] / ends[centre]
        begins[parent], begins[name] = begin + wide, begin
        x, y = places[parent]
        places[name] = (x + math.cos(begin + wide / 2), y + math.sin(begin + wide / 2))
    return places


@kind(make="diffract lineage MODEL MODEL... -o RUN", tables=("lineage", "tree"), further=())
def lineage_of_run(frames: Frames) -> go.Figure:
    """How near each pair of models is, and the trees that follow from it."""
    return kinship(frames["lineage"], frames["tree"])
