"""Scans, comparisons and trajectories: from checkpoints to tables."""

from diffract.analysis.scan import Options, analyse
from diffract.analysis.trajectory import follow

__all__ = ["Options", "analyse", "follow"]
