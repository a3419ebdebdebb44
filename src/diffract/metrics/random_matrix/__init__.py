"""What pure noise would show: laws of its spectrum, the permutation null, and thresholds that follow from them."""

from diffract.metrics.random_matrix.bulk import Bulk, fit_bulk
from diffract.metrics.random_matrix.donoho_gavish import (
    hard_threshold,
    hard_threshold_known_noise,
    known_noise_factor,
    rank_above_threshold,
    unknown_noise_factor,
)
from diffract.metrics.random_matrix.marchenko_pastur import mp_cdf, mp_density, mp_edges, mp_quantile
from diffract.metrics.random_matrix.null import entry_order, null_w1, permuted, wasserstein
from diffract.metrics.random_matrix.tracy_widom import QUANTILE_99, fluctuation_edge, tracy_widom_cdf

__all__ = [
    "QUANTILE_99",
    "Bulk",
    "entry_order",
    "fit_bulk",
    "fluctuation_edge",
    "hard_threshold",
    "hard_threshold_known_noise",
    "known_noise_factor",
    "mp_cdf",
    "mp_density",
    "mp_edges",
    "mp_quantile",
    "null_w1",
    "permuted",
    "rank_above_threshold",
    "tracy_widom_cdf",
    "unknown_noise_factor",
    "wasserstein",
]
