"""Figures from tables, one per file; no weights, no torch."""

from diffract.plots.agreement import agreement, agreement_lines
from diffract.plots.catalog import KINDS, Kind
from diffract.plots.connectivity_matrix import connectivity_matrix
from diffract.plots.density import density, density_lines
from diffract.plots.domains import domain_matrix, domains_of, heads_of
from diffract.plots.draw import plot
from diffract.plots.evolution import band_lines, evolution, evolution_line
from diffract.plots.head_effects import head_effects
from diffract.plots.head_heatmap import head_heatmap, heatmap
from diffract.plots.head_maps import head_grids, head_maps, heat_panels
from diffract.plots.images import check_ending, save
from diffract.plots.ks_scan import ks_lines, ks_scan
from diffract.plots.layer_violins import coloured_boxes, layer_boxes, layer_violins
from diffract.plots.lorenz import lorenz, lorenz_lines
from diffract.plots.model_paths import model_paths
from diffract.plots.model_simplex import model_simplex
from diffract.plots.rewind_curves import rewind_curves
from diffract.plots.ridge import ridge, ridge_lines
from diffract.plots.scores import reference_scores
from diffract.plots.spectrum import spectrum, spectrum_lines
from diffract.plots.truncation_curves import truncation_curves

__all__ = [
    "KINDS",
    "Kind",
    "agreement",
    "agreement_lines",
    "band_lines",
    "check_ending",
    "coloured_boxes",
    "connectivity_matrix",
    "density",
    "density_lines",
    "domain_matrix",
    "domains_of",
    "evolution",
    "evolution_line",
    "head_effects",
    "head_grids",
    "head_heatmap",
    "head_maps",
    "heads_of",
    "heat_panels",
    "heatmap",
    "ks_lines",
    "ks_scan",
    "layer_boxes",
    "layer_violins",
    "lorenz",
    "lorenz_lines",
    "model_paths",
    "model_simplex",
    "plot",
    "reference_scores",
    "rewind_curves",
    "ridge",
    "ridge_lines",
    "save",
    "spectrum",
    "spectrum_lines",
    "truncation_curves",
]
