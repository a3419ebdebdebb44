"""Figures from tables, one per file; no weights, no torch."""

from diffract.plots.agreement import agreement, agreement_lines
from diffract.plots.head_heatmap import head_heatmap, heatmap
from diffract.plots.layer_violins import layer_boxes, layer_violins
from diffract.plots.spectrum import spectrum, spectrum_lines

__all__ = [
    "agreement",
    "agreement_lines",
    "head_heatmap",
    "heatmap",
    "layer_boxes",
    "layer_violins",
    "spectrum",
    "spectrum_lines",
]
