"""How several checkpoints are related: each pair, and the tree that follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from itertools import combinations
from typing import Any, TypeAlias

import polars as pl

from diffract.analysis.scan import Options, open_all, split_name
from diffract.analysis.tables import Member, describe, model_digest, model_row
from diffract.analysis.timeline import local_path, locate
from diffract.checkpoints import Reference
from diffract.checkpoints.provenance import stated_date
from diffract.checkpoints.series import ALONE
from diffract.errors import SelectionError, choose, printable
from diffract.matrices.lineage import Lineage, tell_lineage
from diffract.schemas import LINEAGE, MODELS, TREE
from diffract.tables import Tables, frame

APART = ("stranger", "cannot tell")
"""Words of pairs that no branch of a tree joins."""

GLOSSARY = {
    "r": {
        "summary": "median over the blocks' matrices of the correlation of their centred entries",
        "unit": "1",
        "range": "[-1, 1]",
        "source": "",
        "version": 2,
    }
}

ROOTS = ("step", "tokens", "date")
"""What the earliest model of a tree is found by, where its root is asked for without a name."""

Found: TypeAlias = Mapping[tuple[str, str], Lineage]
"""How each pair of models is related."""


def relate_all(references: Sequence[Reference], options: Options, *, root: str | None = None) -> Tables:
    """Say how each pair of checkpoints is related, and draw the tree of those that are.

    Args:
        references: Two or more; text may begin with ``name=``.
        options: How they are opened and read.
        root: The name of the one that the others descend from, or one of ``ROOTS``: the earliest model of each tree.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    with ExitStack() as stack:
        names, layouts = open_all(references, options, stack)
        if len(names) < 2:
            raise SelectionError("lineage needs two checkpoints at least.")
        told_by, times = "", {}
        if root in names:
            times = {root: 0}
        elif root is not None:
            told_by, found_times = _times(references, choose("root", root, [*names, *ROOTS]))
            times = dict(zip(names, found_times, strict=True))
        pairs = list(combinations(range(len(names)), 2))
        digests = [{name: layout.checkpoint.digest(name) for name in layout.entries} for layout in layouts]
        found: dict[tuple[str, str], Lineage] = {}
        for done, (i, j) in enumerate(pairs, start=1):
            both = digests[i], digests[j]
            found[names[i], names[j]] = tell_lineage(layouts[i], layouts[j], whole=True, digests=both)
            if options.progress:
                options.progress(done, len(pairs), f"{names[i]} and {names[j]}")
        members = [Member(name, "model", layout) for name, layout in zip(names, layouts, strict=True)]
    branches = tree(names, found, times)
    rows = [
        model_row(member, len(member.layout.matrices), model_digest(own))
        for member, own in zip(members, digests, strict=True)
    ]
    models = frame(rows, MODELS)
    nearest = pl.Series("nearest", [_nearest(name, found) for name in names], dtype=pl.String)
    middle = pl.Series("middle", [sum(name in (b["a"], b["b"]) for b in branches) > 1 for name in names])
    settings = {
        "root": root,
        "root_told_by": told_by or None,
        "architecture": str(options.architecture) if options.architecture else None,
    }
    known = {"kind": "lineage", "settings": settings, "seconds": round(time.monotonic() - begun, 3)}
    manifest = describe(members, models, known, glossary=GLOSSARY, warnings=[])
    frames = {
        "lineage": frame([_row(pair, one) for pair, one in found.items()], LINEAGE),
        "tree": frame(branches, TREE),
        "models": models.with_columns(nearest, middle),
    }
    return Tables(manifest, frames)


def tree(names: Sequence[str], found: Found, times: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the branches of the tree, nearest pairs first; strangers lie in trees of their own.

    Every further branch joins two parts that nothing joined before, by their nearest pair: of A, B and C where B lies
    between the others that is A-B and B-C. Since r is the same both ways, a tree has no root unless times tell one:
    its earliest model, from which ``a`` to ``b`` leads away then. A tree with two earliest ones has none.

    Args:
        names: Of all models.
        found: How each pair is related.
        times: What is known of when models were made.
    """
    part = {name: {name} for name in names}
    branches: list[dict[str, Any]] = []
    near = [(one.correlation, pair) for pair, one in found.items() if one.word not in APART]
    for r, (a, b) in sorted(near, key=lambda item: -(item[0] or 0.0)):
        if part[a] is not part[b]:
            joined = part[a] | part[b]
            part |= dict.fromkeys(joined, joined)
            branches.append({"a": a, "b": b, "r": r, "rooted": False})
    for members in {id(one): one for one in part.values()}.values():
        known = sorted((times[name], name) for name in members if times and times.get(name) is not None)
        if known and (len(known) == 1 or known[0][0] < known[1][0]):
            _lead_away(branches, known[0][1])
    return branches


def _lead_away(branches: list[dict[str, Any]], root: str) -> None:
    """Turn the branches of one tree so that each leads away from its root."""
    waiting = [root]
    while waiting:
        here = waiting.pop(0)
        for branch in branches:
            if here in (branch["a"], branch["b"]) and not branch["rooted"]:
                other = branch["b"] if branch["a"] == here else branch["a"]
                branch |= {"a": here, "b": other, "rooted": True}
                waiting.append(other)


def _times(references: Sequence[Reference], by: str) -> tuple[str, list[Any]]:
    """Return what tells when models were made, and when each was.

    A date is one that is stated; where not all models state one, their steps tell, and last the times of files.
    """
    tellers: dict[str, Callable[[Reference], Any]] = {
        "dates in manifests, cards or the metadata of weights": _stated,
        "steps": partial(_place, what="step"),
        "modification times of weight files, which copying changes": _modified,
    }
    if by != "date":
        tellers = {by: partial(_place, what=by)}
    found: list[Any] = []
    for told_by, tell in tellers.items():
        found = [tell(reference) for reference in references]
        if None not in found:
            return told_by, found
    _, inner = split_name(references[found.index(None)])
    raise SelectionError(f"{printable(str(inner))!r} tells no {by}. Name the root: --root MODEL.")


def _stated(reference: Reference) -> datetime | None:
    path = local_path(split_name(reference)[1])
    return stated_date(path) if path else None


def _place(reference: Reference, *, what: str) -> tuple[int, int] | None:
    """Stage, and step or tokens, as names or the trainer's note tell."""
    place = locate(reference).place
    number = getattr(place, what)
    return None if number is None else (place.stage or 0, number)


def _modified(reference: Reference) -> float | None:
    path = local_path(split_name(reference)[1])
    files = [path] if path and path.is_file() else [p for p in path.iterdir() if p.is_file()] if path else []
    return max((p.stat().st_mtime for p in files if p.name.endswith(ALONE)), default=None)


def _row(pair: tuple[str, str], one: Lineage) -> dict[str, Any]:
    return {
        "a": pair[0],
        "b": pair[1],
        "lineage": one.word,
        "r": one.correlation,
        "matrices": one.matrices,
        "share": one.share,
        "shared": list(one.shared),
        "moved": [f"{part} from {origin}" for part, origin in one.moved.items()],
    }


def _nearest(name: str, found: Found) -> str | None:
    own = [
        (one.correlation or 0.0, a if b == name else b)
        for (a, b), one in found.items()
        if name in (a, b) and one.word not in APART
    ]
    return max(own)[1] if own else None
