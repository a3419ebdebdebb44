"""Seeded samples with tails of every kind, and references written from the definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from diffract.metrics.heavy_tails import Comparisons, compare_laws
from diffract.metrics.heavy_tails.fit import fit_tails
from diffract.metrics.heavy_tails.significance import LAWS


def batch(*rows: np.ndarray) -> torch.Tensor:
    """Rows of different lengths as one batch; what is missing is NaN."""
    width = max(len(row) for row in rows)
    return torch.from_numpy(np.stack([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows]))


def wishart(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.linalg.svd(rng.normal(size=(n, 3 * n)), compute_uv=False) ** 2 / (3 * n)


def compare_tails(values: torch.Tensor, *, at: torch.Tensor | None = None) -> Comparisons:
    """The laws against each other, each fitted anew to the power law's tail."""
    xmin = fit_tails(values, LAWS["power_law"], at=at).xmin
    return compare_laws(values, xmin, {name: fit_tails(values, law, at=xmin).parameters for name, law in LAWS.items()})


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "pareto": lambda rng, n: 1 + rng.pareto(1.5, n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "log-normal": lambda rng, n: np.exp(1.5 * rng.normal(size=n)),
    "body and tail": lambda rng, n: np.append(0.01 + rng.random(n // 2), 1 + rng.pareto(1.5, n - n // 2)),
    "tied": lambda rng, n: np.round(1 + rng.pareto(1.5, n), 1),
    "whole numbers": lambda rng, n: np.ceil(rng.exponential(3, n)),
    "random matrix": wishart,
    "many decades": lambda rng, n: np.exp(8 * rng.normal(size=n)),
    "nearly equal": lambda rng, n: 1 + 1e-6 * rng.random(n),
    "rank-deficient": lambda rng, n: np.append(np.exp(-70 - rng.random(n // 4)), rng.chisquare(3, n - n // 4)),
}


def sample(kind: str, n: int, seed: int) -> np.ndarray:
    return KINDS[kind](np.random.default_rng([seed, n]), n)


def brute_power_law(x: np.ndarray, *, two_sided: bool = False, min_tail: int = 2) -> tuple[float, float, float, int]:
    """alpha, xmin, ks and tail count by trying every xmin, from the definition."""
    best = (np.nan, np.nan, np.inf, 0)
    for xmin in np.unique(x)[:-1]:
        tail = np.sort(x[x >= xmin])
        k = len(tail)
        if k < min_tail:
            continue
        t = np.log1p((tail - xmin) / xmin)
        alpha = 1 + k / t.sum()
        ks = distance(tail, -np.expm1((1 - alpha) * t), two_sided=two_sided)
        if ks < best[2]:
            best = (alpha, xmin, ks, k)
    return best


def distance(tail: np.ndarray, cdf: np.ndarray, *, two_sided: bool = False) -> float:
    """Largest distance of F from the share of a sorted tail below each value, or also from the share up to it."""
    below, up_to = (np.searchsorted(tail, tail, side) / len(tail) for side in ("left", "right"))
    ks = np.abs(cdf - below).max()
    return max(ks, np.abs(cdf - up_to).max()) if two_sided else ks
