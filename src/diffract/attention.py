"""Attention heads in tables: which slices make up a head, and the one place where their numbers are summed.

A query head consists of its own slices of q and o and of the k and v slices of its key-value head. Several query heads
share one key-value head under grouped-query attention: each of them has an equal part of its squares, so that those of
all heads add up to the squares of all slices. A head of which one slice has no number, or is missing, has none itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from diffract.stats import Floats, gini, lorenz, spearman, top_count, top_share

PER_QUERY_HEAD = ("q", "o")
PER_KV_HEAD = ("k", "v")
PROJECTIONS = ("q", "k", "v", "o")
"""What a head consists of."""

CIRCUITS = {"qk": ("q", "k"), "ov": ("o", "v")}
"""Each circuit and the projections that are its factors."""

PLACE = ("layer", "block")

HEADS: dict[str, Any] = {
    "model": pl.String,
    "layer": pl.Int32,
    "block": pl.String,
    "head": pl.Int32,
    "kv_head": pl.Int32,
    "status": pl.String,
    "entries": pl.Int64,
    "head_delta": pl.Float64,
    "head_delta_relative": pl.Float64,
    "rank": pl.Int32,
    "change_share": pl.Float64,
    "shared_cosine": pl.Float64,
    "shared_share": pl.Float64,
    "specific_delta": pl.Float64,
    "agnostic_share": pl.Float64,
}
"""Columns of ``heads``; ``(model, layer, block, head)`` is unique, ``model`` is the tuned model (the domain).

``status`` is ok | non_finite | unpaired; numbers of other than ok rows are null. D is the change of the head's slices;
squares and products of a key-value slice that g query heads share are divided by g. ``entries`` is the number of
independent entries that D counts as: that of the slices where nothing is shared, else (sum w)^2 / sum w^2 over entries
with w = 1 / g for the shared ones, so that a cosine with noise has the mean square 1 / ``entries``.
``head_delta`` is ||D||_F, ``head_delta_relative`` ||D||_F / ||W0||_F, ``rank`` 1 for the domain's most changed head,
``change_share`` the head's part of the sum of ||D||_F^2 over heads. ``shared_cosine`` is that of D and the mean D of
the other domains, ``shared_share`` its square: the domain-agnostic part of ||D||_F^2, 1 / ``entries`` by chance;
``specific_delta`` is the norm of the rest. ``agnostic_share`` speaks of the head in all domains together, and is the
same on the row of each: the mean of <D_a, D_b> over a != b by the mean of ||D_a||_F^2; 0 by chance. A comparison knows
no products of domains, so that these four are null in its table.
"""


def is_circuit() -> pl.Expr:
    """Rows of circuits, which are products of matrices that have rows themselves: no sum over a model holds both."""
    return pl.col("projection").is_in(list(CIRCUITS)).fill_null(value=False)


def query_heads(slices: pl.DataFrame) -> pl.DataFrame:
    """Return the query heads that slices of q or o belong to: columns layer, block, head, kv_head."""
    own = slices.filter(pl.col("projection").is_in(PER_QUERY_HEAD), pl.col("head").is_not_null())
    return own.group_by(*PLACE, "head").agg(pl.col("kv_head").first()).sort(*PLACE, "head")


def head_sums(heads: pl.DataFrame, slices: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Sum columns of squares or products over the slices of every query head.

    What a key-value slice has is divided by the number of query heads that share it.

    Args:
        heads: From ``query_heads``: all of a model.
        slices: One row per slice: labels, and what is to be summed.
        columns: Which columns are summed; NaN makes the sum NaN.

    Returns:
        The heads, with the sums; NaN for a head that lacks a slice of a projection that others of its layer have.
    """
    own = slices.filter(pl.col("projection").is_in(PER_QUERY_HEAD), pl.col("head").is_not_null())
    shared = slices.filter(pl.col("projection").is_in(PER_KV_HEAD), pl.col("kv_head").is_not_null())
    counted = pl.col("projection").n_unique()
    expected = pl.concat([own, shared]).group_by(PLACE).agg(counted.alias(EXPECTED))
    joined = heads.join(expected, on=PLACE, how="left", nulls_equal=True)
    joined = joined.with_columns(pl.len().over(*PLACE, "kv_head").alias(GROUP))
    for rows, key, suffix in ((own, "head", ".own"), (shared, "kv_head", ".shared")):
        sums = rows.group_by(*PLACE, key).agg(pl.col(*columns).sum(), counted.alias(FOUND))
        named = sums.rename({name: name + suffix for name in (*columns, FOUND)})
        joined = joined.join(named, on=[*PLACE, key], how="left", nulls_equal=True)
    joined = joined.with_columns(pl.selectors.ends_with(".own", ".shared").fill_null(0))
    whole = pl.col(FOUND + ".own") + pl.col(FOUND + ".shared") == pl.col(EXPECTED)
    total = {c: pl.col(c + ".own") + pl.col(c + ".shared") / pl.col(GROUP) for c in columns}
    return joined.sort(*PLACE, "head").select(
        *heads.columns, **{name: pl.when(whole).then(value).otherwise(math.nan) for name, value in total.items()}
    )


EXPECTED, FOUND, GROUP = ".expected", ".found", ".group"
"""Columns of ``head_sums``: projections of the layer, of them those that the head has, heads that share its slices."""


def independent_entries(heads: pl.DataFrame, slices: pl.DataFrame) -> pl.Series:
    """Return the column ``entries`` of ``heads``.

    Args:
        heads: From ``query_heads``.
        slices: One row per slice: labels and ``entries``.
    """
    group = heads.group_by(*PLACE, "kv_head").agg(pl.len().alias(GROUP))
    joined = slices.join(group, on=[*PLACE, "kv_head"], how="left", nulls_equal=True, maintain_order="left")
    shared = pl.when(pl.col("projection").is_in(PER_KV_HEAD)).then(GROUP).otherwise(1)
    sums = head_sums(heads, joined.with_columns(weighed=pl.col("entries") / shared), ["entries", "weighed"])
    return (sums["entries"] ** 2 / sums["weighed"]).round().fill_nan(None).cast(pl.Int64)


def compared_heads(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return the ``heads`` table of a comparison, from the rows of its slices.

    Args:
        metrics: The metrics table; its first model is the base, whose slices say what each head consists of.

    Returns:
        Columns ``HEADS``, one row per tuned model and head; empty without ``delta_frobenius``, which nothing but a
        comparison has, and where nothing is cut into heads.
    """
    names = metrics["model"].unique(maintain_order=True).to_list()
    rows = metrics.partition_by("model", as_dict=True, maintain_order=True)
    found = [changed_heads(rows[names[0],], rows[name,]) for name in names[1:]]
    return pl.concat([pl.DataFrame(schema=HEADS), *found])


def changed_heads(base: pl.DataFrame, tuned: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of one tuned model in ``heads``, from metric rows of its base and its own."""
    heads = query_heads(base)
    if "delta_frobenius" not in tuned.columns or heads.is_empty():
        return pl.DataFrame(schema=HEADS)
    before = pl.col("frobenius_norm") ** 2 if "frobenius_norm" in base.columns else pl.lit(None, pl.Float64)
    ours = base.select(
        *("name", "projection", *PLACE, "head", "kv_head"),
        entries=pl.col("rows") * pl.col("cols"),
        before=before.fill_null(math.nan),
    )
    theirs = tuned.select("name", "status", change=pl.col("delta_frobenius") ** 2)
    slices = ours.join(theirs, on="name", how="left", maintain_order="left").with_columns(
        pl.col("change").fill_null(math.nan),
        absent=(pl.col("status").is_null() | (pl.col("status") == "unpaired")).cast(pl.Int64),
    )
    sums = head_sums(heads, slices, ["before", "change", "absent"])
    numbers = head_numbers(sums["change"].to_numpy(), sums["before"].to_numpy(), absent=sums["absent"].to_numpy() != 0)
    entries = independent_entries(heads, slices)
    told = sums.select(*heads.columns, pl.lit(tuned["model"][0]).alias("model"), entries=entries, **numbers)
    return as_heads([told])


def head_numbers(squares: Floats, before: Floats, *, absent: np.ndarray) -> dict[str, pl.Series]:
    """Return what ``heads`` says of the change of one domain's heads.

    Args:
        squares: ||D||^2 of each head; NaN where it is not known.
        before: ||W0||^2 likewise.
        absent: Whether the domain lacks a slice of the head.
    """
    known = np.isfinite(squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.sqrt(squares / before)
    total = squares[known].sum()
    status = ["unpaired" if a else "ok" if k else "non_finite" for k, a in zip(known, absent, strict=True)]
    numbers = {
        "head_delta": np.sqrt(squares),
        "head_delta_relative": np.where(np.isfinite(relative), relative, np.nan),
        "change_share": squares / total if total else np.full_like(squares, np.nan),
    }
    # 1 for the largest; equal values share the better rank.
    rank = pl.Series(squares).fill_nan(None).rank("min", descending=True)
    return {"status": pl.Series(status), "rank": rank} | {name: pl.Series(v) for name, v in numbers.items()}


def as_heads(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Return frames as one ``heads`` table: what they lack is null, and so is what is no number."""
    lacks = [pl.lit(None, dtype).alias(c) for c, dtype in HEADS.items() if frames and c not in frames[0].columns]
    return pl.concat(
        [pl.DataFrame(schema=HEADS)]
        + [frame.with_columns(lacks).select(pl.col(c).cast(dtype) for c, dtype in HEADS.items()) for frame in frames]
    ).with_columns(pl.selectors.float().fill_nan(None))


def head_squares(heads: pl.DataFrame) -> Floats:
    """Return ||D||^2 of those heads of one model that have a number."""
    return heads["head_delta"].drop_nulls().to_numpy() ** 2


def concentration_of_base(heads: pl.DataFrame) -> dict[str, float]:
    """Return ``head_top10_share_base``: what the top tenth of heads has of ||W0||^2, as of any change in proportion.

    A scaling or a turn of all matrices moves each head by its own norm. NaN where no head's norm is known.

    Args:
        heads: Rows of one model in ``heads``.
    """
    before = (heads["head_delta"] / heads["head_delta_relative"]).drop_nulls().to_numpy() ** 2
    before = before[np.isfinite(before)]
    return {"head_top10_share_base": float(top_share(before)) if len(before) else math.nan}


def concentration(squares: Floats) -> dict[str, float]:
    """Return the numbers of ``models`` that say how a change is spread over heads; NaN where nothing changed.

    Args:
        squares: ||D||^2 of the heads that have a number.
    """
    share, count = float(top_share(squares)) if len(squares) else math.nan, len(squares)
    chance = math.nan if math.isnan(share) else top_count(count) / count
    return {"head_top10_share": share, "head_top10_share_chance": chance, "head_gini": gini(squares)}


NOISE_DRAWS = 39
"""Draws of noise that a concentration stands beside, so that p is at least 1 / 40."""


def concentration_noise(heads: pl.DataFrame, slices: pl.DataFrame, *, seed: int = 0) -> dict[str, float]:
    """Return how concentrated noise would be that has the norm of each stored matrix's change; NaN where none changed.

    Within a matrix, Gaussian noise spreads ||D||^2 over slices as chi-square variables with their numbers of entries;
    between matrices and layers it has the norms of the change itself, which are no matter of heads. No matrix is drawn.

    Args:
        heads: From ``query_heads``.
        slices: One row per slice: labels, ``tensor``, ``entries``, and ``change``, ||D||^2, NaN where it is not known.
        seed: Of the draws.

    Returns:
        ``head_top10_share_noise`` and ``head_gini_noise``, means over the draws, and ``head_top10_share_pvalue``: the
        share of draws, itself counted, whose top tenth has at least as much.
    """
    names = [f"draw.{i}" for i in range(NOISE_DRAWS)]
    generator = np.random.default_rng(seed)
    drawn = generator.chisquare(slices["entries"].to_numpy()[:, None], (slices.height, NOISE_DRAWS))
    spread = slices.with_columns(pl.Series(name, drawn[:, i]) for i, name in enumerate(names)).with_columns(
        pl.col(name) / pl.col(name).sum().over("tensor") * pl.col("change").sum().over("tensor") for name in names
    )
    sums = head_sums(heads, spread, ["change", *names])
    known = sums.filter(pl.col("change").is_finite())
    own = float(top_share(known["change"].to_numpy())) if known.height else math.nan
    if math.isnan(own):
        return dict.fromkeys(("head_top10_share_noise", "head_gini_noise", "head_top10_share_pvalue"), math.nan)
    tops = np.array([float(top_share(known[name].to_numpy())) for name in names])
    return {
        "head_top10_share_noise": float(tops.mean()),
        "head_gini_noise": float(np.mean([gini(known[name].to_numpy()) for name in names])),
        "head_top10_share_pvalue": float((1 + (tops >= own).sum()) / (1 + NOISE_DRAWS)),
    }


def lorenz_rows(name: str, squares: Floats) -> pl.DataFrame:
    """Return the points of one model's Lorenz curve, as rows of the ``lorenz`` table; null where nothing changed.

    Args:
        name: Of the model.
        squares: ||D||^2 of the heads that have a number.
    """
    x, y = lorenz(squares)
    return pl.DataFrame({"heads_share": x, "change_share": y}).select(
        pl.lit(name).alias("model"), "heads_share", pl.col("change_share").fill_nan(None)
    )


def lorenz_of(heads: pl.DataFrame) -> pl.DataFrame:
    """Return the ``lorenz`` table of a ``heads`` table."""
    return pl.concat(lorenz_rows(name, head_squares(rows)) for name, rows in by_model(heads).items())


def by_model(table: pl.DataFrame) -> Mapping[str, pl.DataFrame]:
    """Return the rows of each model, in order."""
    return {name: rows for (name,), rows in table.partition_by("model", as_dict=True, maintain_order=True).items()}


def pairs_of(heads: pl.DataFrame) -> pl.DataFrame:
    """Return Spearman's correlation of ``head_delta`` between models, over the heads that are known in both.

    Args:
        heads: model, layer, block, head, ``head_delta``.

    Returns:
        Columns a, b, spearman, one row per pair; null where one of both does not vary, or there are fewer than three.
    """
    rows = []
    for (a, ours), (b, theirs) in combinations(by_model(heads).items(), 2):
        both = ours.join(theirs, on=[*PLACE, "head"], nulls_equal=True).drop_nulls(["head_delta", "head_delta_right"])
        rho = spearman(both["head_delta"].to_numpy(), both["head_delta_right"].to_numpy())
        rows.append({"a": a, "b": b, "spearman": float(rho)})
    found = pl.DataFrame(rows, schema={"a": pl.String, "b": pl.String, "spearman": pl.Float64})
    return found.with_columns(pl.col("spearman").fill_nan(None))
