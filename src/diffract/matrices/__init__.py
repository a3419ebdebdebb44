"""Labelled matrices: heads, fused parts and experts of tensors; which are wanted; stacks of them."""

from diffract.matrices.batches import batches, cut
from diffract.matrices.cost import scan_cost, workspace_bytes
from diffract.matrices.layout import Entry, Layout, lay_out, restrict
from diffract.matrices.matrix import Matrix
from diffract.matrices.selection import Selection, parse_selection, select
from diffract.matrices.slicing import slice_tensor

__all__ = [
    "Entry",
    "Layout",
    "Matrix",
    "Selection",
    "batches",
    "cut",
    "lay_out",
    "parse_selection",
    "restrict",
    "scan_cost",
    "select",
    "slice_tensor",
    "workspace_bytes",
]
