"""Labelled matrices: heads, fused parts and experts of tensors; which are wanted; stacks of them."""

from diffract.matrices.alike import counterparts, regrouped_like
from diffract.matrices.layout import (
    Entry,
    Layout,
    lay_out,
    pair_seconds,
    restrict,
    scan_cost,
    scan_seconds,
    workspace_bytes,
)
from diffract.matrices.matrix import Matrix, Selection, batches, cut, parse_selection, select
from diffract.matrices.pairing import is_paired, merge_strange_adapters, pair
from diffract.matrices.slicing import slice_tensor

__all__ = [
    "Entry",
    "Layout",
    "Matrix",
    "Selection",
    "batches",
    "counterparts",
    "cut",
    "is_paired",
    "lay_out",
    "merge_strange_adapters",
    "pair",
    "pair_seconds",
    "parse_selection",
    "regrouped_like",
    "restrict",
    "scan_cost",
    "scan_seconds",
    "select",
    "slice_tensor",
    "workspace_bytes",
]
