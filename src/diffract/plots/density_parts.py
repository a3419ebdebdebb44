"""What a spectral density is drawn from: histograms and points of the laws, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffract.plots import laws
from diffract.plots.laws import Array, Row

FEWEST_BINS, MOST_BINS = 8, 60
POINTS = 400
Curve = tuple[Array, Array]


@dataclass(frozen=True)
class Bars:
    """A histogram whose bins are equally wide in ln lambda.

    Attributes:
        edges: Ascending, one more than shares.
        shares: Of all eigenvalues, zeros too, that lie in each bin.
    """

    edges: Array
    shares: Array

    def heights(self, *, log_y: bool) -> Array:
        """Density in each bin, per unit of lambda or of ln lambda."""
        return self.shares / np.diff(self.edges if log_y else np.log(self.edges))


@dataclass(frozen=True)
class Parts:
    """One spectrum beside what may describe it.

    Attributes:
        total: Number of eigenvalues.
        zeros: How many of them are zero, and in no bin.
        spectrum: ``None`` if all are zero.
        null: Of the permuted matrix, if it is known.
        laws: Points (lambda, rho) of ``mp``, ``pl``, ``tpl``, ``exp`` and ``ln``, where they were fitted. The
            Marchenko-Pastur law is scaled by the share of eigenvalues that are no spikes, each tail by the share of
            eigenvalues from its xmin on.
    """

    total: int
    zeros: int
    spectrum: Bars | None
    null: Bars | None
    laws: dict[str, Curve]

    def floor(self, *, log_y: bool) -> float:
        """Where bars stand: below the lowest bar that a single eigenvalue can make."""
        if not log_y:
            return 0.0
        return 1e-3 if self.spectrum is None else 0.5 / (self.total * float(np.diff(self.spectrum.edges).max()))


def density_parts(
    eigenvalues: Sequence[float], shape: tuple[int, int], row: Row, *, null: Sequence[float] = (), points: int = POINTS
) -> Parts:
    """Return histograms of eigenvalues and the laws whose parameters are in ``row``.

    Args:
        eigenvalues: Not negative.
        shape: Of the matrix.
        row: What there is of ``mp_*``, ``pl_*``, ``tpl_*``, ``exp_*``, ``ln_*``.
        null: Eigenvalues of the permuted matrix.
        points: On each curve.
    """
    values = np.asarray(eigenvalues, float)
    curves = {"mp": _bulk(values, shape, row, points)} | {p: _tail(values, row, p, points) for p in laws.TAILS}
    return Parts(
        total=len(values),
        zeros=int(np.count_nonzero(~(values > 0))),
        spectrum=_bars(values),
        null=_bars(np.asarray(null, float)),
        laws={name: curve for name, curve in curves.items() if curve is not None},
    )


def _bars(values: Array) -> Bars | None:
    """2 sqrt(n) bins, within limits."""
    shown = values[values > 0]
    if not len(shown):
        return None
    logs = np.log(shown)
    count = int(np.clip(2 * math.sqrt(len(logs)), FEWEST_BINS, MOST_BINS))
    edges = np.exp(np.linspace(logs.min(), max(logs.max(), logs.min() + 1e-3), count + 1))
    # The first and the last value may lie beyond the edges by a rounding.
    counts, _ = np.histogram(np.clip(shown, edges[0], edges[-1]), edges)
    return Bars(edges, counts / len(values))


def _bulk(values: Array, shape: tuple[int, int], row: Row, points: int) -> Curve | None:
    variance = row.get("mp_variance")
    if variance is None or not variance > 0 or not len(values):
        return None
    low, high = laws.marchenko_pastur_edges(variance, *shape)
    low = max(low, float(min(values[values > 0], default=high)) / 2)
    # An angle makes points dense at both edges, where the curve is steep.
    x = low + (high - low) * (1 - np.cos(np.linspace(0, math.pi, points)[1:-1])) / 2
    share = 1 - (row.get("mp_spikes") or 0) / len(values)
    return x, share * laws.marchenko_pastur(x, variance, *shape)


def _tail(values: Array, row: Row, prefix: str, points: int) -> Curve | None:
    found = laws.tail_parameters(row, prefix)
    if found is None or not len(values) or not 0 < found[-1] < values.max():
        return None
    x = np.geomspace(found[-1], values.max(), points)
    share = np.count_nonzero(values >= found[-1]) / len(values)
    return x, share * laws.TAILS[prefix][1](x, *found)
