"""Figures as files: HTML by Plotly alone, images by kaleido, which runs a Chrome or Chromium without a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from diffract.errors import RunError, SelectionError, printable
from diffract.store import whole_file

FORMATS = (".html", ".png", ".svg", ".pdf")
WIDTH = 900
SCALE = 2.0
"""Pixels of a PNG per pixel of the layout: enough for print."""

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "responsive": True,
    # Plotly 7 shows a button that sends the data to its makers' server.
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "toImageButtonOptions": {"format": "svg"},
}


def save(
    made: go.Figure, path: str | Path, *, width: int | None = None, height: int | None = None, scale: float = SCALE
) -> Path:
    """Write a figure; the file appears whole or not at all, and replaces one of that name.

    Args:
        made: Of any function of ``diffract.plots``.
        path: Ends in ``.html`` (self-contained), ``.png``, ``.svg`` or ``.pdf``.
        width: The width in pixels of the layout; by default the figure's own, or 900.
        height: The height in pixels of the layout; by default the figure's own.
        scale: Pixels of a PNG per pixel of the layout.

    Raises:
        SelectionError: The ending is not known.
        RunError: The file cannot be written, or images need kaleido or Chrome and there is none.
    """
    path, ending = Path(path), check_ending(path)
    # On paper and in a viewer with dark ground alike.
    drawn = go.Figure(made).update_layout(paper_bgcolor="white", plot_bgcolor="white")
    if width is not None:
        drawn.update_layout(width=width)
    if height is not None:
        drawn.update_layout(height=height)
    content = html(drawn) if ending == ".html" else _image(drawn, ending[1:], scale)
    with whole_file(path) as draft:
        draft.write_bytes(content)
    return path


def check_ending(path: str | Path) -> str:
    """Return the ending of a file's name, in small letters.

    Raises:
        SelectionError: It is none of those that can be written.
    """
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise SelectionError(f"expected a file that ends in {', '.join(FORMATS)}, got {printable(Path(path).name)!r}.")
    return ending


def html(made: go.Figure) -> bytes:
    """Return a page that needs nothing else, no network either. The same figure gives the same bytes."""
    page = made.to_html(config=CONFIG, include_plotlyjs=True, include_mathjax=False, full_html=True, div_id="figure")
    return page.encode()


def _image(made: go.Figure, kind: str, scale: float) -> bytes:
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ImportError as error:
        raise RunError(
            f"a .{kind} needs kaleido, which is not installed: `pip install 'diffract-llm[images]'`. "
            "A .html works without it."
        ) from error
    layout: Any = made.layout
    size = {"width": layout.width or WIDTH, "height": layout.height}
    options = {"format": kind, "scale": scale if kind == "png" else 1, **size}
    try:
        # Without this, kaleido asks a server for MathJax; it finds Plotly's own script beside the package.
        return kaleido.calc_fig_sync(made, opts=options, kopts={"mathjax": False})
    except ChromeNotFoundError as error:
        raise RunError(
            f"a .{kind} needs Chrome or Chromium, and none was found. Install one, or say where it is with "
            "BROWSER_PATH. A .html works without it."
        ) from error
    except Exception as error:
        raise RunError(
            f"the browser did not draw the .{kind}: {type(error).__name__}: {printable(error)}. "
            "A .html works without it."
        ) from error
