"""Changes of what has no spectrum: norms, gains, biases and other tensors that are no matrix, and rows of token tables.

A vector is judged beside the others of its kind, the same one in other layers; a row of a table, which belongs to one
token, beside the table's other rows. Whatever changed out of line with these is marked, as nothing else shows it: one
norm multiplied by ten is less than a thousandth of a model's entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float64
from torch import Tensor

from diffract import schemas
from diffract.analysis.tables import Member
from diffract.checkpoints import Checkpoint, TensorInfo, row_blocks
from diffract.checkpoints.checkpoint import read_digests, recorded
from diffract.checkpoints.configurations import token_texts
from diffract.matrices import Entry, Layout
from diffract.matrices.tokens import MAY_DIFFER
from diffract.stats import out_of_line

BLOCK_BYTES = 1 << 20
"""Bytes of a tensor that are read at once: what fits a cache is compared twice as fast as what does not."""

FEWEST = 4
"""Vectors, or rows, among which one can be out of line."""

VECTOR_OUTCOMES = ("vector", "not_matrix")
"""What becomes, in a layout, of tensors that are weights and no matrices."""


@dataclass(frozen=True)
class Entries:
    """What comparing two tensors of one shape entry by entry gives; all float64 numbers.

    Attributes:
        norm: ||W0||_F.
        delta: ||W1 - W0||_F.
        place: Index of the entry that changed most, empty for a scalar.
        before: That entry in W0.
        after: That entry in W1.
    """

    norm: float
    delta: float
    place: tuple[int, ...]
    before: float
    after: float


def compare_entries(base: Checkpoint, tuned: Checkpoint, name: str) -> Entries:
    """Compare a tensor that two checkpoints store in one shape, block by block, so that memory is flat.

    Norms are of scaled entries, so that 1e200 is an ordinary number; NaN or Inf in either gives NaN.
    """
    norm = delta = 0.0
    largest, farthest, before, after = -1.0, 0, 0.0, 0.0
    for start, one, other in _blocks(base, tuned, name):
        change = other - one
        norm, delta = math.hypot(norm, _norm(one)), math.hypot(delta, _norm(change))
        at = int(change.abs().argmax())
        if change.numel() and float(change.flatten()[at].abs()) > largest:
            largest, farthest = float(change.flatten()[at].abs()), start + at
            before, after = float(one.flatten()[at]), float(other.flatten()[at])
    shape = base.info(name).shape
    place = tuple(int(i) for i in np.unravel_index(farthest, shape)) if shape else ()
    return Entries(norm, delta, place=place, before=before, after=after)


def _blocks(base: Checkpoint, tuned: Checkpoint, name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the place of the first entry, and both tensors' rows in float64; rows that both have."""
    infos = base.info(name), tuned.info(name)
    common = min(infos, key=lambda info: info.shape[0] if info.shape else 0)
    width = common.entries // common.shape[0] if common.shape else 1
    for rows in row_blocks(common, BLOCK_BYTES):
        # of a table that has grown what follows the common rows is not read
        span = rows or ((0, common.shape[0]) if infos[0].shape != infos[1].shape else None)
        yield (span[0] if span else 0) * width, base.read(name, span).double(), tuned.read(name, span).double()


def _norm(values: Float64[Tensor, "..."]) -> float:
    scale = float(values.abs().amax()) if values.numel() else 0.0
    return scale * float((values / scale).square().sum().sqrt()) if 0 < scale < math.inf else scale


def read_vectors(members: Sequence[Member]) -> tuple[list[dict[str, Any]], dict[tuple[int, str], str]]:
    """Return one row per tuned model and tensor that is a weight and no matrix, and the digests of what was read.

    Args:
        members: The base and its tuned models.

    Returns:
        Rows of ``vectors`` that nobody has judged yet, and digests by model and tensor.
    """
    base = members[0].layout
    noted = [recorded(member.layout.checkpoint) for member in members]
    rows: list[dict[str, Any]] = []
    for member, (checkpoint, _) in zip(members[1:], noted[1:], strict=True):
        for name in dict.fromkeys((*base.entries, *member.layout.entries)):
            entries = base.entries.get(name), member.layout.entries.get(name)
            if any(entry is not None and entry.outcome in VECTOR_OUTCOMES for entry in entries):
                rows.append({"model": member.name, **_vector_row(name, (noted[0][0], checkpoint))})
    return rows, {(i, n): digest for i, own in enumerate(noted) for n, digest in read_digests(*own).items()}


def _vector_row(name: str, pair: tuple[Checkpoint, Checkpoint]) -> dict[str, Any]:
    infos = [checkpoint.info(name) for checkpoint in pair if name in checkpoint]
    number = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", name)
    row: dict[str, Any] = {
        "tensor": name,
        "layer": int(number[1]) if number else None,
        "kind": re.sub(r"\d+", "*", name),
        "shape": list(infos[-1].shape),
        "dtype": infos[-1].dtype,
        "status": "unpaired",
        "out_of_line": False,
    }
    if len(infos) < 2 or infos[0].shape != infos[1].shape or not all(info.is_float for info in infos):
        return row
    found = compare_entries(*pair, name)
    if not (math.isfinite(found.norm) and math.isfinite(found.delta)):
        return row | {"status": "non_finite"}
    return row | {
        "status": "ok" if found.norm else "zero",
        "norm": found.norm,
        "delta": found.delta,
        "delta_relative": found.delta / found.norm if found.norm else None,
        "largest_change": found.after - found.before,
        "largest_at": list(found.place) if found.delta else None,
        "base_there": found.before,
        "tuned_there": found.after,
    }


def judge_vectors(rows: Sequence[Mapping[str, Any]], matrices: Sequence[float]) -> list[dict[str, Any]]:
    """Return the rows of one model's vectors, each marked if it changed out of line.

    Args:
        rows: As they were read.
        matrices: Relative changes of the model's matrices, by which vectors are judged too where there are under four.
    """
    known = [row for row in rows if row.get("delta") is not None]
    changes = {row["tensor"]: _level(row, known) for row in known}
    kinds: dict[str, list[float]] = {}
    for row in known:
        kinds.setdefault(row["kind"], []).append(changes[row["tensor"]])
    everything = [*changes.values()] if len(changes) >= FEWEST else [*changes.values(), *matrices]
    judged = []
    for row in rows:
        alike = kinds.get(row["kind"], [])
        among = alike if len(alike) >= FEWEST else everything
        own = np.array([changes.get(row["tensor"], 0.0)])
        judged.append({**row, "out_of_line": len(among) >= FEWEST and bool(out_of_line(own, np.array(among))[0])})
    return judged


def _level(row: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> float:
    """A relative change; of a vector that was zero, in its kind's usual norm."""
    if row["norm"]:
        return row["delta_relative"]
    norms = [other["norm"] for other in known if other["kind"] == row["kind"] and other["norm"]]
    return row["delta"] / (float(np.median(norms)) if norms else 1.0)


def token_table(members: Sequence[Member]) -> pl.DataFrame:
    """Return the rows of token tables that changed out of line with the table's others, by the text of their token.

    A table is what embeds tokens or gives their scores; without a known architecture, a matrix with as many rows as
    the vocabulary. Of a table that has grown the rows that both have are compared.

    Args:
        members: The base and its tuned models.
    """
    base = members[0].layout
    rows: list[dict[str, Any]] = []
    for member in members[1:]:
        texts = token_texts(member.layout.checkpoint) or token_texts(base.checkpoint)
        for name, entry in member.layout.entries.items():
            other = base.entries.get(name)
            if other is None or not is_table(entry, member.layout, len(texts)) or not _fit(entry.info, other.info):
                continue
            rows += [
                {"model": member.name, "tensor": name, "token": texts.get(row["row"]), **row}
                for row in changed_rows(base.checkpoint, member.layout.checkpoint, name)
            ]
    return pl.DataFrame(rows, schema=schemas.TOKENS, orient="row")


def is_table(entry: Entry, layout: Layout, tokens: int) -> bool:
    """Whether a tensor is a table of tokens: by its role, else one with as many rows as there are ``tokens``."""
    if len(entry.matrices) != 1 or not entry.matrices[0].is_whole:
        return False
    if layout.architecture.spec is not None:
        return entry.matrices[0].block in MAY_DIFFER
    return entry.info.shape[0] in {tokens, layout.checkpoint.config.get("vocab_size")}


def _fit(one: TensorInfo, other: TensorInfo) -> bool:
    return other.is_float and len(other.shape) == 2 and one.shape[1] == other.shape[1] > 0


def changed_rows(base: Checkpoint, tuned: Checkpoint, name: str) -> list[dict[str, Any]]:
    """Return the rows of a table that changed out of line, most changed first, with where and how much.

    Rows are judged among those that changed, or among all where fewer than four did.
    """
    parts = []
    width = base.info(name).shape[1]
    for start, one, other in _blocks(base, tuned, name):
        change = other - one
        at = change.abs().argmax(1, keepdim=True)
        there = (side.gather(1, at)[:, 0] for side in (one, other))
        first = torch.arange(len(one), dtype=torch.float64) + start // width
        parts.append(torch.stack([first, one.norm(dim=1), change.norm(dim=1), at[:, 0].double(), *there], dim=1))
    found = torch.cat(parts).numpy()
    found = found[np.isfinite(found).all(1)]
    norms = np.where(found[:, 1] > 0, found[:, 1], np.median(found[:, 1]) or 1.0) if len(found) else found[:, 1]
    levels = found[:, 2] / norms
    among = levels[levels > 0] if (levels > 0).sum() >= FEWEST else levels
    if len(among) < FEWEST:
        return []
    marked = np.flatnonzero(out_of_line(levels, among))
    names = ("row", "norm", "delta", "largest_at", "base_there", "tuned_there")
    rows = []
    for i in marked[np.argsort(-levels[marked], kind="stable")]:
        own: dict[str, Any] = dict(zip(names, found[i].tolist(), strict=True))
        whole = {name: int(own[name]) for name in ("row", "largest_at")}
        relative = own["delta"] / own["norm"] if own["norm"] else None
        rows.append(own | whole | {"delta_relative": relative, "median_relative": float(np.median(among))})
    return rows
