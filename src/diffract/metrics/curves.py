"""What is kept along the spectrum, besides the numbers: quantities of the spectra table, from facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor

from diffract.metrics.facts import Facts


@dataclass(frozen=True)
class Curve:
    """A row of ``CURVES``.

    Attributes:
        fact: Read for it.
        summary: What its values are, and along what they run.
        when: Fact whose presence says that it is wanted; ``fact`` itself by default.
        function: From the fact to (b, k); the fact itself by default. NaN stands for no value.
        ragged: Whether rows have lengths of their own; NaN beyond the end.
    """

    fact: str
    summary: str
    when: str = ""
    function: Callable[[Any], Tensor] | None = None
    ragged: bool = False

    def wanted(self, facts: Facts) -> bool:
        """Whether what it comes from was found out."""
        return (self.when or self.fact) in facts

    def values(self, facts: Facts) -> Tensor:
        """Return (b, k)."""
        value = facts[self.fact]
        return self.function(value) if self.function else value


CURVES: dict[str, Curve] = {
    "sigma": Curve("sigmas", "singular values, descending; what follows runs along them unless it says otherwise"),
    "null_sigma": Curve("null_sigmas", "singular values of the same entries in a random order"),
    "pl_ks_scan": Curve("power_law_scan", "distance of the power law whose xmin is that sigma^2 / N", "power_law"),
    "peak": Curve("peaks", "number of the peak that a sigma belongs to, from 0; -1 for none",
                  function=lambda found: found.membership.double()),
    "peak_position": Curve("peaks", "one a peak: ln sigma of its top", function=attrgetter("positions"), ragged=True),
    "peak_width": Curve("peaks", "one a peak: its width in ln sigma", function=attrgetter("widths"), ragged=True),
    "delta_sigma": Curve("delta_sigmas", "singular values of D"),
    "delta_energy": Curve("delta_energy", "||u0_i^T D||^2"),
}  # fmt: skip
"""Quantities by name. Those of overlaps are kept whenever overlaps were computed, whatever asked for them."""

for _side, _u in (("left", "u"), ("right", "v")):
    CURVES |= {
        f"{_side}_agreement": Curve(f"{_side}_agreement", f"|{_u}0_i . {_u}1_i|", f"{_side}_cosines"),
        f"{_side}_best_match": Curve(f"{_side}_best_match", f"max_j |{_u}0_i . {_u}1_j|", f"{_side}_cosines"),
        f"{_side}_agreement_window": Curve(
            f"{_side}_agreement_window", f"norm of {_u}1_i in the span of its window", f"{_side}_cosines"
        ),
    }
