"""Inner products of the changes of several domains: of each slice, of each query head, of all together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from diffract.analysis.heads import head_sums


@dataclass(frozen=True)
class Slices:
    """What the pass over the checkpoints found; S slices, D domains.

    Attributes:
        heads: All query heads, as of ``query_heads``.
        labels: One row per slice, in file order: layer, block, projection, head, kv_head, entries.
        grams: (S, 1 + D, 1 + D), inner products of W0 and the changes; NaN where the domain lacks the slice.
        absent: (S, D), whether it does.
    """

    heads: pl.DataFrame
    labels: pl.DataFrame
    grams: np.ndarray
    absent: np.ndarray


@dataclass(frozen=True)
class Grams:
    """The same in groups of slices, n of them: query heads, or the slices themselves.

    Attributes:
        entries: (n,), of all slices of the group together.
        base: (n,), ||W0||^2.
        changes: (n, D, D), <D_a, D_b>; NaN where one of them is unknown or not finite.
        absent: (n, D), whether the domain lacks a slice of the group.
    """

    entries: np.ndarray
    base: np.ndarray
    changes: np.ndarray
    absent: np.ndarray

    @property
    def squares(self) -> np.ndarray:
        """(n, D), ||D_a||^2."""
        return np.diagonal(self.changes, axis1=1, axis2=2)


def slice_grams(slices: Slices) -> Grams:
    """Return the slices as they are, each once."""
    grams = np.where(np.isfinite(slices.grams), slices.grams, np.nan)
    return Grams(slices.labels["entries"].to_numpy(), grams[:, 0, 0], grams[:, 1:, 1:], slices.absent)


def head_grams(slices: Slices) -> Grams:
    """Return the sums over each query head's slices; those of a shared key-value head count for each of its heads."""
    single = slice_grams(slices)
    count = single.changes.shape[1]
    upper = np.triu_indices(count)
    columns = {"entries": single.entries, "base": single.base}
    columns |= {f"gram.{i}": values for i, values in enumerate(single.changes[:, *upper].T)}
    columns |= {f"absent.{i}": values.astype(np.int64) for i, values in enumerate(single.absent.T)}
    sums = head_sums(slices.heads, slices.labels.drop("entries").with_columns(**columns), list(columns))
    changes = np.full((sums.height, count, count), np.nan)
    changes[:, *upper] = sums.select(f"gram.{i}" for i in range(len(upper[0]))).to_numpy()
    changes = np.triu(changes) + np.triu(changes, 1).transpose(0, 2, 1)
    absent = sums.select(f"absent.{i}" for i in range(count)).to_numpy() > 0
    return Grams(sums["entries"].to_numpy(), sums["base"].to_numpy(), changes, absent)
