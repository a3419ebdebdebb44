"""The families of tail laws, by name."""

from __future__ import annotations

from typing import Literal

from diffract.errors import SelectionError, suggest
from diffract.metrics.heavy_tails.exponential import EXPONENTIAL
from diffract.metrics.heavy_tails.law import Law
from diffract.metrics.heavy_tails.log_normal import LOG_NORMAL
from diffract.metrics.heavy_tails.power_law import POWER_LAW
from diffract.metrics.heavy_tails.truncated_power_law import TRUNCATED_POWER_LAW

Family = Literal["power_law", "exponential", "log_normal", "truncated_power_law"]

LAWS: dict[str, Law] = {
    "power_law": POWER_LAW,
    "exponential": EXPONENTIAL,
    "log_normal": LOG_NORMAL,
    "truncated_power_law": TRUNCATED_POWER_LAW,
}


def law_of(family: str) -> Law:
    """Return the law of that name.

    Raises:
        SelectionError: There is none.
    """
    if family not in LAWS:
        raise SelectionError(f"no tail law {family!r}.{suggest(family, LAWS)} Known: {', '.join(LAWS)}.")
    return LAWS[family]
