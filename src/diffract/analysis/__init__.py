"""Scans, comparisons and trajectories: from checkpoints to tables."""

from diffract.analysis.scan import Options, Progress, analyse
from diffract.analysis.trajectory import follow

__all__ = ["Options", "Progress", "analyse", "follow"]
