"""Labelled matrices: heads, fused parts and experts of tensors; which are wanted; stacks of them."""

from diffract.matrices.batches import batches, cut
from diffract.matrices.matrix import Matrix
from diffract.matrices.selection import Selection, parse_selection, select
from diffract.matrices.slicing import slice_tensor

__all__ = ["Matrix", "Selection", "batches", "cut", "parse_selection", "select", "slice_tensor"]
