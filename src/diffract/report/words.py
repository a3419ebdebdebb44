"""The headline numbers in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from diffract.attention import is_circuit
from diffract.errors import printable
from diffract.tables import Tables

LONG_TAIL = 50
"""Eigenvalues from which on a fitted tail is called long; below it, exponents scatter widely."""

STANDS_OUT = 1.2
"""A number of the change is shown large from so many times what noise has on."""

BY_CHANCE = 0.01
"""A p-value beyond which a difference from noise is taken for chance: a page shows several."""

PEAKS_BY_CHANCE = 0.05
"""A p-value beyond which peaks are taken for what norms alone give."""

HEADS_BY_CHANCE = 0.05
"""The same for the share of the top heads, whose 39 draws give 1 / 40 at least."""

NAMED = 4
"""Checkpoints that a sentence names."""


SHOWN_PAIRS = 4
"""Pairs of related models that are named for each word."""

KINSHIP = {
    "same": "The same weights, equal to the bit",
    "same values": "The same values in other dtypes",
    "descendant or sibling": "Descendant or sibling",
    "far": "Far relatives",
    "rearranged": "Rearranged, layers, heads or neurons at other places",
    "stranger": "Strangers",
    "cannot tell": "Too little of one shape to tell",
}
"""What is said of pairs by their word, the nearest first."""

OF_HEADS = "head_top10_share"

BEYOND = {
    "value_share_free": "as much of the change lies in singular values",
    "spectral_shift_share_free": "as much of the change is what moving singular values alone would take (Mirsky)",
}
"""Numbers of a tuned model's change, scaling apart, that are said as multiples of those of noise."""


@dataclass(frozen=True)
class Headline:
    """One number and what it says.

    Attributes:
        model: Of which model it speaks.
        figure: The number, as it is shown large.
        text: The sentence that goes with it.
        minor: It stands in a line below the large ones.
    """

    model: str
    figure: str
    text: str
    minor: bool = False


def headlines(tables: Tables) -> list[Headline]:
    """Return the headlines of a run; of a scan, those of its only model; of a trajectory, those of the series."""
    models = tables.models
    if tables.kind == "lineage":
        return [
            Headline("", str(len(rows)), " ".join([f"pairs. {sentence}", *details]))
            for rows, sentence, details in kinship(tables)
        ]
    if models["role"][0] == "checkpoint":
        return _of_trajectory(models, tables.metrics)
    tuned = models.filter(pl.col("role") == "tuned")
    if tables.kind == "heads":
        return [headline for row in tuned.iter_rows(named=True) for headline in _of_domain(row)]
    if not len(tuned):
        return _of_scan(models, tables.metrics) + _of_spectra(models["model"][0], tables)
    return [
        headline
        for row in tuned.iter_rows(named=True)
        for headline in _of_tuned(row) + [replace(h, minor=True) for h in _of_spectra(row["model"], tables)]
    ]


def concentration(models: pl.DataFrame) -> str:
    """Return how much of the change the top tenth of heads carries in each domain; empty where it is not known."""
    rows = [row for row in models.to_dicts() if row.get("head_top10_share") is not None]
    if not rows:
        return ""
    shares = ", ".join(f"{percent(row['head_top10_share'])} in {printable(row['model'], 60)}" for row in rows)
    noises = [row["head_top10_share_noise"] for row in rows if row.get("head_top10_share_noise") is not None]
    noise = f"; noise of the same norms gives {' to '.join(sorted({percent(n) for n in noises}))}" if noises else ""
    even = " to ".join(sorted({percent(row["head_top10_share_chance"]) for row in rows}))
    bases = {percent(row[f"{OF_HEADS}_base"]) for row in rows if row.get(f"{OF_HEADS}_base") is not None}
    base = f"; of the weights themselves the top tenth has {' to '.join(sorted(bases))}" if bases else ""
    return f"The top tenth of heads carries {shares}; an even spread gives {even}{noise}{base}."


def _of_tuned(row: dict[str, Any]) -> list[Headline]:
    name = printable(row["model"], 60)
    found = []
    if row.get("delta_relative") == 0:
        return [Headline(name, percent(0.0), "is the size of the change: none of the matrices changed.")]
    if (relative := row.get("delta_relative")) is not None:
        text = "is the size of the change of all matrices relative to the base (Frobenius norm)"
        if (changed := row.get("changed_share")) is not None:
            text += f"; {percent(changed)} of their entries differ"
        found.append(Headline(name, percent(relative), text + rest_of_change(row) + "."))
    if is_rounding(row):  # whose size follows the entries', which noise of one variance does not
        return found
    return found + _beyond_noise(row, name) + _of_top_heads(row)


def _beyond_noise(row: dict[str, Any], name: str) -> list[Headline]:
    """What a change has beyond noise of equal norm; large only where it stands out and not by chance."""
    found = []
    for quantity, text in BEYOND.items():
        if (excess := row.get(f"{quantity}_excess")) is not None:
            clear = excess >= STANDS_OUT and row[f"{quantity}_pvalue"] <= BY_CHANCE
            found.append(Headline(name, times(excess), f"{text} {beside_noise(row, quantity)}.", minor=not clear))
    return found


def is_rounding(row: dict[str, Any]) -> bool:
    """Whether a model's change, scaling apart, is no larger than what rounding to its stored dtype would cause."""
    size, floor = row.get("delta_free_relative"), row.get("rounding_relative")
    return size is not None and floor is not None and size < STANDS_OUT * floor


def rest_of_change(row: dict[str, Any]) -> str:
    """Return what scaling and rounding explain of a model's change, as the end of a sentence; empty where little."""
    size, free, scale = (row.get(name) for name in ("delta_relative", "delta_free_relative", "scale_change"))
    scaled = bool(size and scale is not None and free is not None and free**2 < size**2 / 2)
    text = f"; most of it scales the matrices, by {1 + scale:.4g} in the mean" if scaled and scale is not None else ""
    if is_rounding(row):
        what = "the rest of it is" if scaled else "it is"
        text += f"; {what} no more than rounding to the stored dtype alone would cause"
    return text


def beside_noise(row: dict[str, Any], quantity: str) -> str:
    """Return what a number that has an excess over noise of equal norm stands beside, and of how many matrices."""
    noise, excess = row[f"{quantity}_noise"], row[f"{quantity}_excess"]
    count, of = row["noise_matrices"], row["noise_of"]
    part = f"{of:,.0f}" if count == of else f"{count:,.0f} of {of:,.0f}"
    return (
        f"as of noise of the same norm ({percent(noise * excess)} beside {percent(noise)}, medians of {part} matrices)"
    )


def times(excess: float) -> str:
    """A ratio for people.

    >>> times(8.16), times(0.0421), times(128.4)
    ('8.2 times', '0.042 times', '128 times')
    """
    return f"{excess:.0f} times" if excess >= 100 else f"{excess:.2g} times"


def _of_top_heads(row: dict[str, Any]) -> list[Headline]:
    """Concentration over heads beside that of noise of the same norms; nothing where that is not known.

    Some tenth of heads always carries most. A scaling or a turn of all matrices moves each head by its own norm, so the
    share is shown large only where it is larger than both what noise gives and what the weights themselves have.
    """
    share, noise = row.get(OF_HEADS), row.get(f"{OF_HEADS}_noise")
    if share is None or not noise:
        return []
    even = row.get(f"{OF_HEADS}_base")
    text = "of the change in attention is carried by the top tenth of heads: "
    text += f"{share / noise:.2f} times what noise of the same norms gives ({percent(noise)})"
    text += f"; of the weights themselves the top tenth has {percent(even)}." if even is not None else "."
    level = STANDS_OUT * max(noise, even or 0.0)
    alike = share < level or (row.get(f"{OF_HEADS}_pvalue") or 0.0) > HEADS_BY_CHANCE
    return [Headline(printable(row["model"], 60), percent(share), text, minor=alike)]


def _of_domain(row: dict[str, Any]) -> list[Headline]:
    """Of one tuned model in a run over heads."""
    name = printable(row["model"], 60)
    found = []
    if (relative := row.get("attention_delta_relative")) is not None:
        text = "is the size of the change in attention relative to the base (Frobenius norm)."
        found.append(Headline(name, percent(relative), text))
    found += _of_top_heads(row)
    if (shared := row.get("shared_share")) is not None:
        text = "of the change lies along the mean change of the other domains."
        found.append(Headline(name, percent(shared), text))
    return found


def _of_spectra(model: str, tables: Tables) -> list[Headline]:
    """What the fits to one model's spectra say together, where they were made."""
    found = [_exponent(model, tables), _bulk(model, tables.metrics), _peaks(model, tables.metrics)]
    return [headline for headline in found if headline is not None]


def _exponent(model: str, tables: Tables) -> Headline | None:
    row = tables.models.row(by_predicate=pl.col("model") == model, named=True)
    if row.get("pl_alpha_mean") is None:
        return None
    text = f"is the mean power-law exponent over the {row['pl_alpha_count']:,.0f} matrices that could be fitted"
    if "pl_tail_count" in tables.metrics.columns:
        own = tables.metrics.filter(pl.col("model") == model, ~is_circuit(), pl.col("pl_alpha").is_not_null())
        text += f"; {(own['pl_tail_count'] >= LONG_TAIL).sum():,} have a tail of {LONG_TAIL} eigenvalues or more"
    base = tables.models.row(0, named=True)
    if base["model"] != model and base["pl_alpha_mean"] is not None:
        text += f". The base has {base['pl_alpha_mean']:.2f}"
    if "pl_alpha_rowcol_pvalue" in tables.metrics.columns:
        drawn = tables.metrics.filter(pl.col("model") == model, pl.col("pl_alpha_rowcol_pvalue").is_not_null())
        if len(drawn):
            heavier = (drawn["pl_alpha_rowcol_pvalue"] <= PEAKS_BY_CHANCE).sum()
            text += f". Noise with the same row and column norms has {drawn['pl_alpha_rowcol'].mean():.2f}: of the"
            text += f" {len(drawn):,} matrices for which it was drawn {heavier:,} have a heavier tail (p at most 0.05)"
    return Headline(printable(model, 60), f"{row['pl_alpha_mean']:.2f}", text + ".")


def _bulk(model: str, metrics: pl.DataFrame) -> Headline | None:
    if "mp_bulk_share" not in metrics.columns:
        return None
    own = metrics.filter(pl.col("model") == model, ~is_circuit())
    shares = own["mp_bulk_share"].drop_nulls()
    if not len(shares):
        return None
    text = "matrices have a Marchenko-Pastur bulk, as noise has, that holds half of the squared norm or more"
    text += f"; {len(own) - len(shares):,} have no such bulk." if len(shares) < len(own) else "."
    return Headline(printable(model, 60), f"{(shares >= 0.5).sum():,} of {len(shares):,}", text)


def _peaks(model: str, metrics: pl.DataFrame) -> Headline | None:
    """How many spectra have more peaks than the norms of their rows and columns alone give."""
    if "peak_count_rowcol_pvalue" not in metrics.columns:
        return None
    own = metrics.filter(pl.col("model") == model, ~is_circuit())
    drawn = own.filter(pl.col("peak_count_rowcol_pvalue").is_not_null())
    if not len(drawn):
        return None
    beyond = (drawn["peak_count_rowcol_pvalue"] <= PEAKS_BY_CHANCE).sum()
    text = "matrices have more spectral peaks than the norms of their rows and columns alone give (p at most 0.05, of"
    part = f"; nulls were drawn for {len(drawn):,} of {len(own):,} matrices" if len(drawn) < len(own) else ""
    return Headline(
        printable(model, 60), f"{beyond:,} of {len(drawn):,}", f"{text} which chance alone gives one in twenty){part}."
    )


def _of_scan(models: pl.DataFrame, metrics: pl.DataFrame) -> list[Headline]:
    name, metrics = printable(models["model"][0], 60), metrics.filter(~is_circuit())
    heads = metrics.filter(pl.col("head").is_not_null() | pl.col("kv_head").is_not_null())
    what = "matrices and attention heads" if len(heads) else "matrices"
    found = [Headline(name, f"{len(metrics):,}", f"{what} were analysed.")]
    if "stable_rank" in metrics.columns:
        rows = heads if len(heads) else metrics
        kind = "attention heads" if len(heads) else "matrices"
        middle = rows["stable_rank"].median()
        if isinstance(middle, float):
            found.append(Headline(name, f"{middle:.3g}", f"is the median stable rank of the {kind}."))
    return found


def _of_trajectory(models: pl.DataFrame, metrics: pl.DataFrame) -> list[Headline]:
    first, last = models.row(0, named=True), models.row(-1, named=True)
    found = [Headline("", str(len(models)), f"checkpoints, from {_at(first)} to {_at(last)}.")]
    if "breaks" in models.columns and (broken := models.filter("breaks")["model"].to_list()):
        names = ", ".join(printable(name, 60) for name in broken[:NAMED]) + (", ..." if len(broken) > NAMED else "")
        text = f"of them break the series, by a restart or as another run under an old name: {names}."
        found.append(Headline("", str(len(broken)), text))
    if "delta_relative" in models.columns:
        changes = models.filter(pl.col("delta_relative").is_not_null()).to_dicts()
        for row in (changes[:1] + changes[-1:]) if len(changes) > 1 else changes:
            start, end = printable(row["against"], 60), printable(row["model"], 60)
            text = f"is the size of the change from {start} to {end} relative to {start} (Frobenius norm)."
            found.append(Headline("", percent(row["delta_relative"]), text))
        found += _beyond_noise(last, "")
    if "peaked_matrices" in models.columns:
        nulls = "peak_count_rowcol_pvalue" in metrics.columns
        more = ", more than the norms of their rows and columns alone give," if nulls else ""
        of = (
            f"those {last['peaked_of']:.0f} for which nulls were drawn"
            if nulls
            else f"{last['peaked_of']:.0f} matrices"
        )
        text = f"of {of} have at least two spectral peaks{more} in the last checkpoint, "
        text += f"{first['peaked_matrices']:.0f} in the first."
        found.append(Headline("", f"{last['peaked_matrices']:.0f}", text))
    return found


def _at(row: dict[str, Any]) -> str:
    told = [f"{what} {row[what]:,}" for what in ("stage", "step") if row[what] is not None]
    return " ".join(told) or printable(row["model"], 60)


def percent(value: float) -> str:
    """A share for people, with as many digits as it takes to be no zero.

    >>> percent(0.923), percent(0.0002), percent(0.999999)
    ('92%', '0.02%', '99.9999%')
    """
    distance = min(abs(value), abs(1 - value)) if 0 <= value <= 1 else abs(value)
    digits = 0
    while digits < 4 and 0 < distance * 100 * 10**digits < 1:
        digits += 1
    return f"{value:.{digits}%}"


def kinship(tables: Tables) -> Iterator[tuple[pl.DataFrame, str, list[str]]]:
    """Yield for each word of a run of lineage its pairs, a sentence that names them, and further sentences."""
    for word, title in KINSHIP.items():
        rows = tables.lineage.filter(lineage=word)
        if rows.is_empty():
            continue
        pairs = [f"{row['a']} and {row['b']}" for row in rows.head(SHOWN_PAIRS).iter_rows(named=True)]
        more = f" and {len(rows) - SHOWN_PAIRS} pairs more" if len(rows) > SHOWN_PAIRS else ""
        details = []
        if word == "stranger":
            farthest = max(abs(r) for r in rows["r"].drop_nulls())
            details.append(f"Neither descends from the other; r is that of chance, at most {farthest:.3g} in size.")
            if shared := rows["shared"].explode().drop_nulls().unique().sort().to_list():
                count = rows["shared"].list.len().gt(0).sum()
                names = ", ".join(map(printable, shared[:SHOWN_PAIRS]))
                details.append(f"To the bit {count} of these pairs share {names}.")
        for row in (row for row in rows.iter_rows(named=True) if row["moved"]):
            some = [f"{part} of {row['a']}" for part in row["moved"][:SHOWN_PAIRS]]
            details.append(f"In {row['b']} {'; '.join(some)}{', ...' if len(row['moved']) > SHOWN_PAIRS else ''}.")
        yield rows, f"{title}: {'; '.join(pairs)}{more}.", details
