"""Scans and comparisons: from checkpoints to tables."""

from diffract.analysis.run import Options, Progress, analyse

__all__ = ["Options", "Progress", "analyse"]
