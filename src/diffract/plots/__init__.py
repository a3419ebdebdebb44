"""Figures from tables, one per file; no weights, no torch."""

from diffract.plots.agreement import agreement, agreement_lines, profile
from diffract.plots.catalog import KINDS, FigureKind, plot
from diffract.plots.heads import (
    coloured_boxes,
    domain_matrix,
    head_effects,
    head_grids,
    head_heatmap,
    head_maps,
    heat_panels,
    heatmap,
    layer_boxes,
    layer_violins,
    lorenz,
    reference_scores,
)
from diffract.plots.images import check_ending, save
from diffract.plots.lineage import kinship
from diffract.plots.searches import connectivity_matrix, model_paths, model_simplex, rewind_curves, truncation_curves
from diffract.plots.spectra import density, density_lines, ks_lines, ks_scan, spectrum, spectrum_lines
from diffract.plots.training import band_lines, evolution, evolution_line, ridge, ridge_lines

__all__ = [
    "KINDS",
    "FigureKind",
    "agreement",
    "agreement_lines",
    "band_lines",
    "check_ending",
    "coloured_boxes",
    "connectivity_matrix",
    "density",
    "density_lines",
    "domain_matrix",
    "evolution",
    "evolution_line",
    "head_effects",
    "head_grids",
    "head_heatmap",
    "head_maps",
    "heat_panels",
    "heatmap",
    "kinship",
    "ks_lines",
    "ks_scan",
    "layer_boxes",
    "layer_violins",
    "lorenz",
    "model_paths",
    "model_simplex",
    "plot",
    "profile",
    "reference_scores",
    "rewind_curves",
    "ridge",
    "ridge_lines",
    "save",
    "spectrum",
    "spectrum_lines",
    "truncation_curves",
]
