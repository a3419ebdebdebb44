"""Scans, comparisons, trajectories and changes of heads: from checkpoints to tables."""

from diffract.analysis.head_changes import analyse_heads
from diffract.analysis.kinship import relate_all
from diffract.analysis.scan import Options, analyse
from diffract.analysis.trajectory import follow

__all__ = ["Options", "analyse", "analyse_heads", "follow", "relate_all"]
