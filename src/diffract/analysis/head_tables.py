"""The tables of a run over heads and domains, from inner products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
import polars as pl

from diffract import tables
from diffract.analysis.head_grams import Grams
from diffract.metrics.agreement import cosine_chance
from diffract.metrics.concentration import (
    delta_cosine,
    delta_cosine_chance,
    gini,
    lorenz,
    reference_score,
    spearman,
    split_domains,
    top_share,
)


def head_table(names: Sequence[str], places: pl.DataFrame, heads: Grams) -> pl.DataFrame:
    """Return one row per domain and head; ``tables.HEADS`` says what the columns mean."""
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.sqrt(heads.squares / heads.base[:, None])
    split = split_domains(heads.changes)
    agnostic = _agnostic_share(heads.changes)
    frames = []
    for i, name in enumerate(names):
        squares = heads.squares[:, i]
        numbers = {
            "status": _status(squares, heads.absent[:, i]),
            "entries": heads.entries,
            "head_delta": np.sqrt(squares),
            "head_delta_relative": np.where(np.isfinite(relative[:, i]), relative[:, i], np.nan),
            "rank": _ranks(squares),
            "change_share": _shares(squares),
            "shared_cosine": split.cosine[:, i],
            "shared_share": split.share[:, i],
            "specific_delta": np.sqrt(np.maximum(split.specific_squares[:, i], 0.0)),
            "agnostic_share": agnostic,
        }
        frames.append(places.with_columns(model=pl.lit(name), **{k: pl.Series(v) for k, v in numbers.items()}))
    return _shaped(frames, tables.HEADS)


def domain_table(names: Sequence[str], heads: Grams, slices: Grams) -> pl.DataFrame:
    """Return one row per pair of domains: over what is known of both."""
    rows = []
    for a, b in combinations(range(len(names)), 2):
        known = np.isfinite(slices.changes[:, a, b])
        total = slices.changes[known][:, [[a, a], [b, b]], [[a, b], [a, b]]].sum(0)
        both = np.isfinite(heads.changes[:, a, b])
        entries = int(slices.entries[known].sum())
        rows.append({
            "a": names[a],
            "b": names[b],
            "heads": int(both.sum()),
            "entries": entries,
            "spearman": spearman(heads.squares[both, a], heads.squares[both, b]),
            "cosine": float(delta_cosine(total)[0, 1]),
            "cosine_chance": delta_cosine_chance(entries) if entries else math.nan,
            "cosine_chance_abs": cosine_chance(entries) if entries else math.nan,
        })  # fmt: skip
    return _without_nan(pl.DataFrame(rows, schema=tables.DOMAINS, orient="row"))


def cosine_table(names: Sequence[str], places: pl.DataFrame, heads: Grams) -> pl.DataFrame:
    """Return one row per pair of domains and head."""
    cosines = delta_cosine(heads.changes)
    chance = [delta_cosine_chance(int(n)) if n else math.nan for n in heads.entries]
    frames = [
        places.with_columns(
            a=pl.lit(names[a]),
            b=pl.lit(names[b]),
            cosine=pl.Series(cosines[:, a, b]),
            cosine_chance=pl.Series(chance, dtype=pl.Float64),
        )
        for a, b in combinations(range(len(names)), 2)
    ]
    return _shaped(frames, tables.HEAD_COSINES)


def score_table(names: Sequence[str], places: pl.DataFrame, heads: Grams) -> pl.DataFrame:
    """Return the reference-domain score of every head, for every ordered pair of domains."""
    deltas = np.sqrt(heads.squares)
    frames = [
        places.with_columns(
            domain=pl.lit(names[a]),
            reference=pl.lit(names[b]),
            score=pl.Series(reference_score(deltas[:, a], deltas[:, b])),
        )
        for a, b in permutations(range(len(names)), 2)
    ]
    return _shaped(frames, tables.SCORES)


def lorenz_table(names: Sequence[str], heads: Grams) -> pl.DataFrame:
    """Return the points of each domain's Lorenz curve of ||D||_F^2 over heads."""
    frames = []
    for i, name in enumerate(names):
        x, y = lorenz(_known(heads.squares[:, i]))
        frames.append(pl.DataFrame({"heads_share": x, "change_share": y}).with_columns(model=pl.lit(name)))
    return _shaped(frames, tables.LORENZ)


def domain_numbers(heads: Grams, slices: Grams) -> list[dict[str, float | None]]:
    """Return the numbers of each domain as a whole; of slices, each once, where a head's are not meant."""
    all_known = np.isfinite(slices.changes).all((1, 2))
    whole = slices.changes[all_known].sum(0)
    split = split_domains(whole)
    rows = []
    for i in range(len(whole)):
        known = np.isfinite(slices.squares[:, i])
        moved, before = slices.squares[known, i].sum(), slices.base[known].sum()
        squares = _known(heads.squares[:, i])
        share, chance = top_share(squares)
        numbers = {
            "attention_delta": math.sqrt(moved) if known.any() else math.nan,
            "attention_delta_relative": math.sqrt(moved / before) if before else math.nan,
            "head_top10_share": share,
            "head_top10_share_chance": chance,
            "head_gini": gini(squares),
            "shared_cosine": float(split.cosine[i]),
            "shared_share": float(split.share[i]),
            "agnostic_share": float(_agnostic_share(whole)),
        }
        rows.append({name: None if math.isnan(value) else float(value) for name, value in numbers.items()})
    return rows


def _agnostic_share(changes: np.ndarray) -> np.ndarray:
    """Mean of <D_a, D_b> over a != b by the mean of ||D_a||^2."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return split_domains(changes).shared_squares / np.diagonal(changes, axis1=-2, axis2=-1).mean(-1)


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _status(squares: np.ndarray, absent: np.ndarray) -> list[str]:
    return [
        "unpaired" if a else "ok" if math.isfinite(s) else "non_finite" for s, a in zip(squares, absent, strict=True)
    ]


def _ranks(squares: np.ndarray) -> pl.Series:
    """1 for the largest; equal values share the better rank."""
    return pl.Series(squares).fill_nan(None).rank("min", descending=True)


def _shares(squares: np.ndarray) -> np.ndarray:
    total = _known(squares).sum()
    return squares / total if total else np.full_like(squares, np.nan)


def _shaped(frames: Sequence[pl.DataFrame], schema: dict[str, Any]) -> pl.DataFrame:
    """One table with the columns of a schema; what is no number becomes null."""
    if not frames:
        return pl.DataFrame(schema=schema)
    return _without_nan(pl.concat(frames).select(pl.col(name).cast(dtype) for name, dtype in schema.items()))


def _without_nan(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(pl.selectors.float().fill_nan(None))
