"""Scans and comparisons: from checkpoints to tables."""

from diffract.analysis.layout import Entry, Layout, lay_out
from diffract.analysis.run import Options, Progress, analyse, split_name

__all__ = ["Entry", "Layout", "Options", "Progress", "analyse", "lay_out", "split_name"]
