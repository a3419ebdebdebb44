"""The cheapest work that serves all requested metrics."""

from __future__ import annotations

from dataclasses import dataclass

from diffract.linalg import Method
from diffract.metrics import Metric, sources

OVERLAPS = ("left_cosines", "right_cosines", "diagonal", "delta_energy")
SPECTRA = ("sigma_max", "sigmas", "resolved", "base_sigmas")


@dataclass(frozen=True)
class Plan:
    """What is computed of every matrix and every pair.

    Attributes:
        metrics: The requested metrics.
        method: How spectra are computed.
        vectors: Whether singular vectors are saved.
    """

    metrics: tuple[Metric, ...]
    method: Method = "auto"
    vectors: bool = False

    @property
    def single(self) -> tuple[Metric, ...]:
        """Metrics of one matrix."""
        return tuple(m for m in self.metrics if not m.pair)

    @property
    def facts(self) -> frozenset[str]:
        """Facts that must be found out for the metrics, and for what is saved."""
        saved = {"sigmas", "U", "Vh"} if self.vectors else set()
        return sources(fact for m in self.metrics for fact in m.facts) | saved

    def needs(self, *facts: str) -> bool:
        """Whether any of these facts is wanted."""
        return not self.facts.isdisjoint(facts)

    @property
    def powers(self) -> int:
        """Highest power of the entries to sum."""
        return 4 if self.needs("moments") else 2

    @property
    def key(self) -> list[object]:
        """What of the plan the numbers depend on."""
        return [[m.key for m in self.metrics], self.method]
