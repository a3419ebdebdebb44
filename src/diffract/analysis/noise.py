"""Noise of equal norm: the pair (W0, W0 + E), whose numbers those of a base W0 and its tuned W1 = W0 + D stand beside.

E is Gaussian with ||E||_F = ||D||_F. Its entries are independent and of one variance, or of variance R_i C_j / T with
R, C and T the squared norms of D's rows, its columns and the whole. The seed is the matrix's name, so that any share of
the work draws the same, and matrices draw independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import blake3
import numpy as np
import polars as pl
import torch
from torch import Tensor

from diffract.analysis.facts import MetricPlan, StackFacts, StackPair, unit_of
from diffract.analysis.held import Stack
from diffract.linalg import LowRank
from diffract.metrics import Metric, sources
from diffract.stats import sign_flip

NOISES = {
    "noise": "Gaussian noise with the norm of the change",
    "noise_rowcol": "Gaussian noise with the norms of the change's rows and columns",
}
"""Ends of the names of columns, and what is drawn."""

RATIOS = (
    *("delta_spectral", "delta_stable_rank", "delta_effective_rank"),
    *("value_share", "value_share_turned", "spectral_shift_share", "sigma_change_relative"),
    *("delta_free_relative", "value_share_free", "spectral_shift_share_free"),
)
"""Norms and shares of the change: their excess over noise is own / noise."""

DIFFERENCES = (
    "intruders",
    *(f"{side}_{what}_mean" for side in ("left", "right") for what in ("agreement", "best_match")),
)
"""Counts and agreements: their excess over noise is own - noise."""

FindPair: TypeAlias = Callable[[StackPair], tuple[StackFacts, StackFacts]]

SHARED = frozenset({"shape", "epsilon", "base_epsilon", "base_squares", "delta_squares", "changed", "rounding_squares"})
"""Facts that noise of equal norm has in common with the change, or, as it is not rounded, cannot have."""

SQUARED_ENTRIES = 1 << 22
"""Entries of each matrix whose change is squared at once."""

CPU = torch.device("cpu")


def tells(metric: Metric) -> bool:
    """Whether a metric of a pair says something of its own of noise.

    Norm, shape and rounding alone do not decide it, and it is no level itself.
    """
    return (
        metric.pair
        and not sources(metric.facts) <= SHARED
        and not metric.name.endswith(("_chance", "_rowcol", "_pvalue"))
    )


def glossary(plan: MetricPlan) -> dict[str, dict[str, Any]]:
    """Return what the manifest says of the columns of noise."""
    return {
        f"{m.name}_{kind}": {
            "summary": f"{m.name} of {drawn} in its place; null where none was drawn",
            **{name: getattr(m, name) for name in ("unit", "range", "source", "version")},
            "group": "noise",
        }
        for m in filter(tells, plan.metrics)
        for kind, drawn in NOISES.items()
        if kind in plan.noises
    }


def over_noise(pairs: pl.DataFrame) -> dict[str, float | None]:
    """Return the numbers of one tuned model that say what its change has beyond noise of equal norm.

    Args:
        pairs: The metric rows of its matrices.

    Returns:
        ``noise_matrices``: for how many noise was drawn, ``noise_of`` how many. Of each number over these matrices
        ``_noise``: the median of noise; ``_excess``: the median of the change over it (``RATIOS``) or less it
        (``DIFFERENCES``); ``_pvalue``: two-sided, of the sign-flip test, as a change that is noise lies above the noise
        drawn for its matrix as often as below. Nothing where no noise was drawn.
    """
    columns = [name for name in pairs.columns if name.endswith("_noise")]
    if not columns:
        return {}
    # Medians of both sides are over the same matrices: those that noise was drawn for.
    drawn = pairs.filter(pl.any_horizontal(pl.col(columns).is_not_null()))
    found: dict[str, float | None] = {"noise_matrices": float(drawn.height), "noise_of": float(pairs.height)}
    for name in (name for name in (*RATIOS, *DIFFERENCES) if f"{name}_noise" in columns):
        own, noise = (c.to_numpy() for c in drawn.select(name, f"{name}_noise").drop_nulls())
        if len(own):
            middle, beside = float(np.median(own)), float(np.median(noise))
            ratio = middle / beside if beside else None
            found |= {f"{name}_noise": beside, f"{name}_excess": ratio if name in RATIOS else middle - beside}
            found[f"{name}_pvalue"] = sign_flip(own - noise)
    return found


def noise_facts(pair: StackPair, labels: Sequence[str], kind: str, *, find: FindPair) -> StackFacts:
    """Find out of noise what the metrics of a pair need.

    W0 + E is not rounded: that would add to E, or swallow one that is smaller than the last bits of W0. It goes by the
    dtype of W1 all the same, so that the same method finds the same directions resolved.

    Args:
        pair: b bases and their tuned matrices.
        labels: What the b matrices are called.
        kind: One of ``NOISES``.
        find: Finds out what is needed of a base, and of its tuned matrix and the pair.

    Returns:
        What is known of W0 + E and the pair; not finite where D is not.
    """
    unit = unit_of(pair.base, pair.tuned)
    scaled = pair if unit is None else pair.over(unit)
    rows, cols = _squares(scaled)
    total = rows.sum(1)
    profile = (rows.sqrt(), cols.sqrt()) if kind == "noise_rowcol" else None
    # From the numbers that were drawn, so that the norm is equal and not only expected to be.
    size = (total / sum(e.square().sum((1, 2)) for _, e in _drawn(scaled.base, labels, profile))).sqrt()
    size = size.where(total > 0, total)  # nothing changed, or not finite

    def noisy() -> Iterator[Tensor]:  # drawn again each time, so that only one piece is in memory
        for one, e in _drawn(scaled.base, labels, profile):
            yield e.mul_(size[:, None, None]).add_(one)

    tuned = replace(scaled.tuned, pieces=noisy, streamed=scaled.base.streamed)
    found = find(StackPair(scaled.base, tuned))[1]
    return found if unit is None else replace(found, unit=unit.to(found.finite.device))


def _squares(pair: StackPair) -> tuple[Tensor, Tensor]:
    """Return the squared norms of the rows of D, (b, m), and of its columns, (b, n)."""
    rows, cols = [], torch.zeros(pair.base.count, pair.base.shape[1], dtype=torch.float64)
    for one, other in pair.pieces(CPU):
        step = max(1, SQUARED_ENTRIES // (one.shape[0] * one.shape[2]))
        for start in range(0, one.shape[1], step):
            block = slice(None), slice(start, start + step), slice(None)
            change = other[block].double() if isinstance(other, LowRank) else other[block].double() - one[block]
            squares = change.square_()
            rows.append(squares.sum(2))
            cols += squares.sum(1)
    return torch.cat(rows, 1), cols


def _drawn(
    base: Stack, labels: Sequence[str], profile: tuple[Tensor, Tensor] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pieces of W0, each with the Gaussian numbers of that piece, in float64.

    Args:
        base: W0.
        labels: What the matrices are called.
        profile: Norms of the rows and the columns that they are multiplied with.
    """
    seeds = [int.from_bytes(blake3.blake3(label.encode()).digest(7)) for label in labels]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    start = 0
    for piece in base.pieces():
        one = piece.to(CPU)
        # A matrix has its own numbers wherever and with whichever others it is analysed.
        e = torch.empty(one.shape, dtype=torch.float64)
        for place, generator in enumerate(generators):
            e[place] = torch.randn(one.shape[1:], generator=generator)
        if profile is not None:
            e *= profile[0][:, start : start + one.shape[1], None]
            e *= profile[1][:, None, :]
        start += one.shape[1]
        yield one, e
