"""Scans, comparisons, trajectories and changes of heads: from checkpoints to tables."""

from diffract.analysis.kinship import relate_all
from diffract.analysis.request import Request
from diffract.analysis.scan import Options

__all__ = ["Options", "Request", "relate_all"]
