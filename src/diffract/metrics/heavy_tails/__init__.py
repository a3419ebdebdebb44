"""Heavy tails of spectra: four laws, their goodness and comparison (Clauset et al. 2009; Martin & Mahoney 2021).

Everything takes values (b, n), float64, one spectrum per row in any order, and returns records of (b,) tensors. Entries
that are not finite or not above zero do not count; a row with nothing to fit gives NaN.
"""

from diffract.metrics.heavy_tails.exponential import METRICS as EXPONENTIAL
from diffract.metrics.heavy_tails.exponential import Exponential, exponential
from diffract.metrics.heavy_tails.log_normal import METRICS as LOG_NORMAL
from diffract.metrics.heavy_tails.log_normal import LogNormal, log_normal
from diffract.metrics.heavy_tails.power_law import METRICS as POWER_LAW
from diffract.metrics.heavy_tails.power_law import PowerLaw, power_law
from diffract.metrics.heavy_tails.significance import (
    COMPARED,
    NORMS,
    P_VALUES,
    Comparison,
    Comparisons,
    Family,
    PValue,
    TailWarning,
    alpha_hat,
    compare_laws,
    describe_warning,
    log10_alpha_norm,
    p_value,
    pl_alpha_farms,
    pl_alpha_stderr,
    tail_warning,
)
from diffract.metrics.heavy_tails.truncated_power_law import METRICS as TRUNCATED_POWER_LAW
from diffract.metrics.heavy_tails.truncated_power_law import TruncatedPowerLaw, truncated_power_law

__all__ = [
    "METRICS",
    "P_VALUES",
    "Comparison",
    "Comparisons",
    "Exponential",
    "Family",
    "LogNormal",
    "PValue",
    "PowerLaw",
    "TailWarning",
    "TruncatedPowerLaw",
    "alpha_hat",
    "compare_laws",
    "describe_warning",
    "exponential",
    "log10_alpha_norm",
    "log_normal",
    "p_value",
    "pl_alpha_farms",
    "pl_alpha_stderr",
    "power_law",
    "tail_warning",
    "truncated_power_law",
]

METRICS = (
    *POWER_LAW,
    pl_alpha_stderr,
    pl_alpha_farms,
    *TRUNCATED_POWER_LAW,
    *EXPONENTIAL,
    *LOG_NORMAL,
    *COMPARED,
    *NORMS,
)
"""All but p-values, in the order of the table's columns."""
