"""How several checkpoints are related: each pair, and the tree that follows from it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any, TypeAlias

import polars as pl

from diffract.analysis.scan import Options, open_all, split_name
from diffract.analysis.tables import Member, describe, model_row
from diffract.analysis.timeline import local_path, locate
from diffract.checkpoints import Reference
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
        if root in names or root is None:
            times: dict[str, Any] = {root: 0} if root else {}
        else:
            by = choose("root", root, [*names, *ROOTS])
            times = {name: _time(reference, by) for name, reference in zip(names, references, strict=True)}
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
    models = frame([model_row(member, len(member.layout.matrices)) for member in members], MODELS)
    nearest = pl.Series("nearest", [_nearest(name, found) for name in names], dtype=pl.String)
    middle = pl.Series("middle", [sum(name in (b["a"], b["b"]) for b in branches) > 1 for name in names])
    settings = {"root": root, "architecture": str(options.architecture) if options.architecture else None}
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


def _time(reference: Reference, by: str) -> Any:
    """When a model was made: stage and step or tokens, as its names or its trainer tell, or the date of its files."""
    _, inner = split_name(reference)
    if by == "date":
        path = local_path(inner)
        files = [path] if path and path.is_file() else [p for p in path.iterdir() if p.is_file()] if path else []
        weights = [p.stat().st_mtime for p in files if p.name.endswith(ALONE)]
        found = max(weights) if weights else None
    else:
        place = locate(reference).place
        number = getattr(place, by)
        found = None if number is None else (place.stage or 0, number)
    if found is None:
        raise SelectionError(f"{printable(str(inner))!r} tells no {by}. Name the root: --root MODEL.")
    return found


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
