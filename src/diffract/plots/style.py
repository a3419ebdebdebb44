"""What all figures share: fonts, colours, margins; and text made safe for plotly, which reads some HTML in labels.

Colours are told apart by people who do not see red and green as two, and dashes tell curves apart where a printer has
no colour.
"""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go

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
