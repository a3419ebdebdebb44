"""Small multiples: panels side by side in the common style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diffract.plots.style import AXIS, dress

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
