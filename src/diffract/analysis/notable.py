"""What has to be said of a comparison before any number: equal weights, and changes that no spectrum shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from diffract import schemas, tables
from diffract.analysis.tables import Member, with_lineage
from diffract.analysis.vectors import judge_vectors, token_table
from diffract.attention import is_circuit
from diffract.checkpoints.configurations import compare_settings
from diffract.errors import printable
from diffract.matrices.lineage import Lineage, tell_lineage
from diffract.timing import timed

NAMED = 3
"""Vectors, rows or keys that a sentence names."""

NAME_CHARACTERS = 120


@dataclass(frozen=True)
class Pass:
    """What is known of the models once their matrices were looked at.

    Attributes:
        members: The base and its tuned models.
        digests: Of every tensor that was read, by the place of its model and its name.
        correlations: Of the entries of tuned tensors with the base's, by the same.
    """

    members: Sequence[Member]
    digests: Mapping[tuple[int, str], str]
    correlations: Mapping[tuple[int, str], float]

    def digests_of(self, place: int) -> dict[str, str]:
        """Return the digests of one model, by name."""
        return {name: digest for (i, name), digest in self.digests.items() if i == place}

    def kinship(self, *, whole: bool) -> list[Lineage]:
        """Return how each tuned model is related to the base; ``whole`` where no part was selected."""
        found = []
        for place, member in enumerate(self.members[1:], start=1):
            known = {name: r for (i, name), r in self.correlations.items() if i == place}
            both = self.digests_of(0), self.digests_of(place)
            found.append(tell_lineage(self.members[0].layout, member.layout, whole=whole, known=known, digests=both))
        return found


@timed("tables")
def add_notable(run: tables.Tables, done: Pass, vectors: Sequence[Mapping[str, Any]] | None) -> tables.Tables:
    """Return a comparison with the tables ``vectors``, ``tokens`` and ``configuration``, and what has to be said first.

    Args:
        run: The tables of the matrices.
        done: The models and what is known of them.
        vectors: The rows of their vectors; ``None`` where a part of the models was selected: neither these nor tokens
            are asked for then.

    Returns:
        The tables; ``notable`` of their manifest has the sentences of each tuned model, the most important first.
    """
    members = done.members
    known = run.metrics.filter(pl.col("delta_relative") >= 0) if "delta_relative" in run.metrics.columns else None
    judged, settings = [], []
    for member in members[1:]:
        changes = known.filter(model=member.name)["delta_relative"].to_list() if known is not None else []
        judged += judge_vectors([row for row in vectors or () if row["model"] == member.name], changes)
        differences = compare_settings(members[0].layout.checkpoint, member.layout.checkpoint)
        settings += [{"model": member.name, **asdict(difference)} for difference in differences]
    beside = {
        "vectors": pl.DataFrame(judged, schema=schemas.VECTORS, orient="row"),
        "tokens": token_table(members if vectors is not None else members[:1]),
        "configuration": pl.DataFrame(settings, schema=schemas.CONFIGURATION, orient="row"),
    }
    kinship = done.kinship(whole=vectors is not None)
    found = with_lineage(tables.Tables(run.manifest, run.frames | beside), [None, *kinship])
    said: dict[str, list[str]] = {}
    for i, member in enumerate(members[1:], start=1):
        sentences = [
            _same(found, done, i),
            related(kinship[i - 1], printable(members[0].name, NAME_CHARACTERS)),
            _settings(found, member.name, "computation"),
            *_vectors(found.vectors.filter(model=member.name)),
            *_tokens(found.tokens.filter(model=member.name)),
            _settings(found, member.name, "text"),
        ]
        said[member.name] = [sentence for sentence in sentences if sentence]
    return tables.Tables({**found.manifest, "notable": said}, found.frames)


def related(found: Lineage, base: str) -> str:
    """Return what is said of a model that is no near relative of what it is compared with; nothing of one that is."""
    if found.word not in WORDS:
        return ""
    pairs = [(part, origin) for part, origin in found.moved.items() if part != origin]
    parts = [printable(f"{part} from {origin}", NAME_CHARACTERS) for part, origin in pairs]
    moved = ", ".join(parts[:MOVED]) + (f" and {len(parts) - MOVED} more" if len(parts) > MOVED else "")
    asked = "what belongs together" if found.moved else f"{found.matrices} matrices"
    return f"{WORDS[found.word].format(base=base, moved=moved)} (correlation {found.correlation:.3f} over {asked})."


MOVED = 8
"""Moved layers that a sentence names."""

WORDS = {
    "stranger": "A STRANGER to {base}: its weights do not descend from it; numbers of a whole change are left out, "
    "those of single matrices are chance",
    "rearranged": "REARRANGED: parts of {base} lie at other places ({moved}). What is compared by name does not belong "
    "together there; numbers of a whole change are left out",
    "far": "FAR from {base}: numbers are given, but hardly speak of one stage of training",
}
"""What is said of a model that is no near relative."""


def _same(run: tables.Tables, done: Pass, place: int) -> str:
    """Whether a tuned model is the base again; else, where it differs in bytes alone, what was not looked at."""
    name = done.members[place].name
    base = printable(run.models["model"][0], NAME_CHARACTERS)
    ours, theirs = done.digests_of(0), done.digests_of(place)
    other = [n for n in dict.fromkeys((*ours, *theirs)) if ours.get(n) != theirs.get(n)]
    own = run.metrics.filter(pl.col("model") == name, ~is_circuit())
    moved = set(own.filter(_changed(own))["tensor"])
    whole = run.models.filter(model=name)["digest"][0] is not None
    if not other:
        lost = "; the adapter's change is smaller than the rounding of the merged weights" if moved else ""
        part = "" if whole else " in everything that was selected"
        return f"THE SAME WEIGHTS as {base}{part}: every tensor is equal to the bit{lost}."
    told = moved | set(run.vectors.filter((pl.col("delta") > 0) | (pl.col("status") != "ok"))["tensor"])
    alone = set(own.filter(status="unpaired")["tensor"])
    if told & set(other) or alone or not whole:
        return ""
    return _unlooked(run, name, other)


def _changed(own: pl.DataFrame) -> pl.Expr:
    """Rows of matrices that changed, as far as the computed metrics tell; all where they do not."""
    for column in ("delta_frobenius", "delta_changed_share", "delta_relative"):
        if column in own.columns:
            return pl.col(column).fill_null(1.0) > 0
    return pl.lit(value=True)


def _unlooked(run: tables.Tables, name: str, other: Sequence[str]) -> str:
    """Tensors differ in bytes, but no number differs: another dtype, or tensors that are not analysed."""
    base = printable(run.models["model"][0], NAME_CHARACTERS)
    outcomes = dict(run.tensors.filter(model=name).select("tensor", "outcome").iter_rows())
    looked = [n for n in other if outcomes.get(n) in ("analysed", "retyped", "vector", "not_matrix", "tied")]
    if len(looked) == len(other):
        return f"THE SAME VALUES as {base}, stored in other bytes (dtype, or the sign of zeros)."
    left = [n for n in other if n not in looked]
    first = ", ".join(f"{printable(n, NAME_CHARACTERS)} ({outcomes.get(n, 'only in the base')})" for n in left[:NAMED])
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return f"Differs from {base} in bytes, but in nothing that was compared. Not looked at: {first}{more}."


def _settings(run: tables.Tables, name: str, effect: str) -> str:
    """What differs in configuration, or in tokenizer and template."""
    rows = run.configuration.filter(model=name, effect=effect).rows(named=True)
    if not rows:
        return ""
    told = [
        f"{printable(row['file'], NAME_CHARACTERS)} {row['key']} {row['base']} -> {row['tuned']}".replace("  ", " ")
        for row in rows[:NAMED]
    ]
    more = f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    start = {
        "computation": "Settings change the computation",
        "text": "Reads or draws text in another way",
    }
    return f"{start[effect]}: {'; '.join(told)}{more}."


def _vectors(own: pl.DataFrame) -> list[str]:
    said = []
    marked = own.filter("out_of_line").sort(pl.col("delta_relative").fill_null(float("inf")), descending=True)
    for row in marked.head(NAMED).iter_rows(named=True):
        change = f"changed by {size(row['delta_relative'])}" if row["norm"] else "was zero and is not"
        at = ", ".join(map(str, row["largest_at"]))
        said.append(
            f"{printable(row['tensor'], NAME_CHARACTERS)} {change}, out of line with other vectors; entry [{at}] most, "
            f"{row['base_there']:.4g} -> {row['tuned_there']:.4g}."
        )
    if marked.height > NAMED:
        said[-1] += f" Out of line, too: {marked.height - NAMED} more."
    for status, text in {"non_finite": "hold NaN or Inf", "unpaired": "have no partner of their shape"}.items():
        some = own.filter(status=status)["tensor"].to_list()
        if some:
            shown = ", ".join(printable(name, NAME_CHARACTERS) for name in some[:NAMED])
            said.append(f"{len(some)} vectors {text}: {shown}{', ...' if len(some) > NAMED else ''}.")
    return said


def _tokens(own: pl.DataFrame) -> list[str]:
    said = []
    for (tensor,), rows in own.group_by("tensor", maintain_order=True):
        told = []
        for row in rows.head(NAMED).iter_rows(named=True):
            text = "" if row["token"] is None else f" ({printable(repr(row['token']), NAME_CHARACTERS)})"
            told.append(f"row {row['row']}{text} by {size(row['delta_relative'])}")
        more = f" and {rows.height - NAMED} more" if rows.height > NAMED else ""
        middle = rows["median_relative"][0]
        usual = f"; the other rows by {size(middle)} in the median" if middle else "; other rows did not"
        said.append(f"{printable(tensor, NAME_CHARACTERS)} changed out of line: {', '.join(told)}{more}{usual}.")
    return said


def size(value: float | None) -> str:
    """Return a relative change for people; ``None`` where the base is zero.

    >>> size(9.0), size(0.00042), size(2500.0), size(None)
    ('900%', '0.042%', '2500 times', 'an unknown share (it was zero)')
    """
    if value is None:
        return "an unknown share (it was zero)"
    return f"{value:.0f} times" if value >= 100 else f"{value:.0%}" if value >= 0.1 else f"{value * 100:.2g}%"
