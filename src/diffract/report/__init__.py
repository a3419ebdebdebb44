"""One self-contained HTML file from the tables of a run."""

from diffract.report.page import render, write

__all__ = ["render", "write"]
