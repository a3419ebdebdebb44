"""What all figures share: fonts, colours, margins; and text made safe for plotly, which reads some HTML in labels.

Colours are told apart by people who do not see red and green as two, and dashes tell curves apart where a printer has
no colour.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diffract.errors import printable

COLOURS = {
    "base": "#6b7280",
    "tuned": "#0f766e",
    "delta": "#c2410c",
    "left": "#1d4ed8",
    "right": "#d97706",
    "mark": "#111827",
    "bars": "#9ca3af",
}
CHANCE = {"color": "#9ca3af", "dash": "dash", "width": 1.5}
SERIES = (
    ("#0072b2", "solid"),
    ("#d55e00", "dash"),
    ("#009e73", "dot"),
    ("#cc79a7", "dashdot"),
    ("#e69f00", "longdash"),
    ("#56b4e9", "longdashdot"),
    ("#111827", "solid"),
)
"""Colour (Okabe & Ito 2008) and dash of curves that have no meaning of their own, in this order, then again."""

SCALE = "Viridis"
DIVERGING = "PuOr_r"
"""Purple below zero, white, orange above."""

FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
AXIS = {"gridcolor": "#e5e7eb", "zeroline": False, "automargin": True}
LOG = {"type": "log", "dtick": 1, "exponentformat": "power", "minor": {"showgrid": True, "gridcolor": "#f3f4f6"}}
LEGEND_RIGHT = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}


def label(text: object) -> str:
    """Return untrusted text for a label or a hover box."""
    return html.escape(printable(text, 80), quote=False)


def caption(model: str, name: str) -> str:
    """Return a title that names a matrix and whose it is, both untrusted."""
    return f"{label(name)}, {label(model)}"


def line(index: int, width: float = 2) -> dict[str, Any]:
    """Return colour and dash of the curve of this index."""
    colour, dash = SERIES[index % len(SERIES)]
    return {"color": colour, "dash": dash, "width": width}


def figure(traces: list[Any], *, x: str, y: str, title: str = "", height: int = 320, **layout: Any) -> go.Figure:
    """Return a figure in the common style."""
    made = go.Figure(traces)
    dress(made, title=title, height=height)
    made.update_layout(
        xaxis={**AXIS, "title": {"text": x, "standoff": 8}}, yaxis={**AXIS, "title": {"text": y, "standoff": 8}}
    )
    return made.update_layout(**layout)


def dress(made: go.Figure, *, title: str, height: int) -> go.Figure:
    """Give a figure the common fonts, margins and legend; its axes are left as they are."""
    return made.update_layout(
        template="none",
        font={"family": FONT, "size": 12, "color": "#374151"},
        title={"text": title, "font": {"size": 13}, "x": 0, "xref": "paper", "y": 0.98},
        margin={"l": 52, "r": 12, "t": 34, "b": 44},
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.12},
        hoverlabel={"font": {"family": FONT}},
    )


def colour_bar(text: str, **further: Any) -> dict[str, Any]:
    """Return the bar that says what colours mean; ``text`` is made safe already."""
    return {"title": {"text": text, "side": "right"}, "thickness": 10, "outlinewidth": 0, **further}


ROUNDED = {"tickformat": ".3~g"}


def between_pairs(
    names: Sequence[str], cells: Sequence[Sequence[Any]], texts: Sequence[Sequence[str]], **look: Any
) -> go.Heatmap:
    """Return a map of what each pair of names has, in words on colours.

    Args:
        names: Of rows and columns alike.
        cells: A number for each pair, or ``None``.
        texts: What is written on each.
        look: Further properties of the map.
    """
    # Numbers as labels: names may be equal once they are made safe.
    places = list(range(len(names)))
    texted = {"text": texts, "texttemplate": "%{text}"}
    return go.Heatmap(z=cells, x=places, y=places, **texted, xgap=2, ygap=2, **look)


def name_both_axes(made: go.Figure, names: Sequence[str], **further: Any) -> go.Figure:
    """Name rows and columns of the maps of ``between_pairs``, the first row above; names are untrusted."""
    shown = [label(name) for name in names]
    axis = {"tickvals": list(range(len(names))), "ticktext": shown, "showgrid": False, "ticks": "", **further}
    return made.update_xaxes(**axis).update_yaxes(**axis, autorange="reversed")


OPACITY = 0.15

LEGEND_PX, AXIS_PX = 170, 58
"""Widths of the legend beside a figure, and of the y axis with its title where numbers are long."""


def banded(
    x: Sequence[float],
    y: Sequence[float],
    ends: Sequence[Sequence[float]] | None,
    *,
    name: str,
    look: dict[str, Any],
    legend: bool,
    hover: str,
) -> list[go.Scatter]:
    """Return a curve, behind it its band: the way along the lower ends and back along the upper ones.

    Where an interval is not known there is no band.

    Args:
        x: Ascending.
        y: Of the curve.
        ends: Lower and upper ends; without them there is no band.
        name: Made safe already.
        look: Colour, dash and width of the line.
        legend: Whether it is in the legend.
        hover: What is said of a point, as Plotly has it.
    """
    line = curve(x, y, name=name, look=look, legend=legend, hover=hover)
    if ends is None or None in ends[0]:
        return [line]
    # There along one end and back along the other: one outline that can be filled.
    outline: dict[str, Any] = {"x": [*x, *x[::-1]], "y": [*ends[0], *ends[1][::-1]]}
    fill = {"fill": "toself", "fillcolor": look["color"], "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    common: dict[str, Any] = {"legendgroup": name, "name": name}
    return [go.Scatter(**outline, **fill, opacity=OPACITY, showlegend=False, **common), line]


def beside(made: go.Figure) -> go.Figure:
    """Put the legend of many curves on the right, and leave room for long numbers on the left."""
    made.update_annotations(xshift=-AXIS_PX, selector={"textangle": -90})
    return made.update_layout(legend=LEGEND_RIGHT, margin={"l": AXIS_PX + 16, "r": LEGEND_PX})


def curve(
    x: Sequence[float], y: Sequence[float], *, name: str, look: dict[str, Any], legend: bool, hover: str
) -> go.Scatter:
    """Return a curve with a mark at each point."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        legendgroup=name,
        showlegend=legend,
        mode="lines+markers",
        line=look,
        marker={"size": 4},
        hovertemplate=f"{hover}<extra>{name}</extra>",
    )


def level(y: float, *, name: str, look: dict[str, Any], legend: bool, ends: tuple[float, float] = (0, 1)) -> go.Scatter:
    """Return a horizontal line."""
    words: dict[str, Any] = {"name": name, "legendgroup": name, "showlegend": legend}
    return go.Scatter(x=list(ends), y=[y, y], mode="lines", line=look, hoverinfo="skip", **words)


WIDEST = 4
NAME_PX, TITLE_PX, FOOT_PX, GAP_PX = 34, 30, 52, 56
"""Heights of a panel's name, the figure's title or legend, the x axis, and what lies between two rows."""


def panels(
    titles: Sequence[str],
    contents: Sequence[Iterable[Any]],
    *,
    x: str,
    y: str,
    title: str = "",
    height: int = 240,
    columns: int = WIDEST,
    share_y: bool = True,
    legend: bool = False,
) -> go.Figure:
    """Return a figure with a panel for each title, filled by rows.

    Args:
        titles: One a panel, made safe already.
        contents: Traces of each panel.
        x: Title that all x axes share.
        y: Title that all y axes share.
        title: Of the figure.
        height: Of one panel, in pixels.
        columns: At most.
        share_y: Give all panels the same y axis.
        legend: Leave room for one above, as there is for a title.
    """
    count = max(1, len(titles))
    columns = min(columns, count)
    rows = -(-count // columns)
    inner = rows * height + (rows - 1) * GAP_PX
    shared: Any = "all" if share_y else False
    made = make_subplots(
        rows,
        columns,
        subplot_titles=list(titles),
        shared_yaxes=shared,
        x_title=x,
        y_title=y,
        horizontal_spacing=0.03 if share_y else 0.07,
        vertical_spacing=GAP_PX / inner if rows > 1 else 0,
    )
    for index, traces in enumerate(contents):
        made.add_traces(list(traces), rows=index // columns + 1, cols=index % columns + 1)
    made.update_annotations(font={"size": 12})
    top = NAME_PX + (TITLE_PX if title or legend else 0)
    dress(made, title=title, height=inner + top + FOOT_PX)
    # Just below the upper edge, whatever the number of rows.
    made.update_layout(legend={"y": 1 + (top - 4) / inner, "yanchor": "top"})
    return made.update_layout(margin={"t": top, "b": FOOT_PX, "l": 66}).update_xaxes(**AXIS).update_yaxes(**AXIS)
