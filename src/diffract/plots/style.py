"""What all figures share: fonts, colours, margins; and text made safe for plotly, which reads some HTML in labels."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go

from diffract.errors import printable

COLOURS = {"base": "#6b7280", "tuned": "#0f766e", "delta": "#c2410c", "left": "#1d4ed8", "right": "#7c3aed"}
CHANCE = {"color": "#9ca3af", "dash": "dash", "width": 1.5}
SCALE = "Viridis"
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def label(text: object) -> str:
    """Return untrusted text for a label or a hover box."""
    return html.escape(printable(text, 80))


def figure(traces: list[Any], *, x: str, y: str, title: str = "", height: int = 320, **layout: Any) -> go.Figure:
    """Return a figure in the common style."""
    axis = {"gridcolor": "#e5e7eb", "zeroline": False, "automargin": True, "title": {"standoff": 8}}
    made = go.Figure(traces)
    made.update_layout(
        template="none",
        font={"family": FONT, "size": 12, "color": "#374151"},
        title={"text": title, "font": {"size": 13}, "x": 0, "xref": "paper", "y": 0.98},
        margin={"l": 52, "r": 12, "t": 34, "b": 44},
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.12},
        hoverlabel={"font": {"family": FONT}},
        xaxis={**axis, "title": {"text": x, "standoff": 8}},
        yaxis={**axis, "title": {"text": y, "standoff": 8}},
    )
    return made.update_layout(**layout)
