"""One self-contained HTML file from the tables of a run."""

from diffract.report.page import PAGES, render, write
from diffract.report.words import headlines

__all__ = ["PAGES", "headlines", "render", "write"]
