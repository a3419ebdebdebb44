"""What the search, the bootstrap and the comparison need to know of a family of tail laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.order import Tails

Parameters = Float64[Tensor, "t p"]
OfPoints = Float64[Tensor, "t m"]


@dataclass(frozen=True)
class Law:
    """A family of laws of t = ln(x / xmin) >= 0, its p parameters free of scale.

    Attributes:
        fit: Maximum-likelihood parameters of tails, NaN where there are none.
        survival: P(T >= t) at points of each tail.
        log_density: ln of the density of T at points of each tail.
        quantile: The t with survival u, for u in (0, 1].
        lower: Lower bound of the survival at every value of a tail, from its points and chords (``Ordered.chords``
            over xmin); what it lacks never shrinks from the largest value to xmin, where the survival is 1. For laws
            whose survival is dear; ``None`` for the others.
    """

    fit: Callable[[Tails], Parameters]
    survival: Callable[[Parameters, OfPoints], OfPoints]
    log_density: Callable[[Parameters, OfPoints], OfPoints]
    quantile: Callable[[Parameters, OfPoints], OfPoints]
    lower: Callable[[Parameters, OfPoints, OfPoints], OfPoints] | None = None
