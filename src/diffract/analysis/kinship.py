"""How several checkpoints are related: each pair, and the tree that follows from it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import polars as pl

from diffract.analysis.scan import Options, open_all
from diffract.analysis.tables import Member, describe, model_row
from diffract.checkpoints import Reference
from diffract.errors import SelectionError, choose
from diffract.matrices.lineage import Lineage, shared_matrices, tell_lineage
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
        "version": 1,
    }
}


def relate_all(references: Sequence[Reference], options: Options, *, root: str | None = None) -> Tables:
    """Say how each pair of checkpoints is related, and draw the tree of those that are.

    Args:
        references: Two or more; text may begin with ``name=``.
        options: How they are opened and read.
        root: The name of the one that the others descend from, where that is known.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    with ExitStack() as stack:
        names, layouts = open_all(references, options, stack)
        if len(names) < 2:
            raise SelectionError("lineage needs two checkpoints at least.")
        if root is not None:
            choose("model", root, names)
        pairs = list(combinations(range(len(names)), 2))
        found: dict[tuple[str, str], Lineage] = {}
        shared: dict[tuple[str, str], list[str]] = {}
        for done, (i, j) in enumerate(pairs, start=1):
            found[names[i], names[j]] = tell_lineage(layouts[i], layouts[j])
            shared[names[i], names[j]] = shared_matrices(layouts[i], layouts[j])
            if options.progress:
                options.progress(done, len(pairs), f"{names[i]} and {names[j]}")
        members = [Member(name, "model", layout) for name, layout in zip(names, layouts, strict=True)]
    branches = tree(names, found, root=root)
    models = frame([model_row(member, len(member.layout.matrices)) for member in members], MODELS)
    nearest = pl.Series("nearest", [_nearest(name, found) for name in names], dtype=pl.String)
    middle = pl.Series("middle", [sum(name in (b["a"], b["b"]) for b in branches) > 1 for name in names])
    settings = {"root": root, "architecture": str(options.architecture) if options.architecture else None}
    known = {"kind": "lineage", "settings": settings, "seconds": round(time.monotonic() - begun, 3)}
    manifest = describe(members, models, known, glossary=GLOSSARY, warnings=[])
    frames = {
        "lineage": frame([_row(pair, one) | {"shared": shared[pair]} for pair, one in found.items()], LINEAGE),
        "tree": frame(branches, TREE),
        "models": models.with_columns(nearest, middle),
    }
    return Tables(manifest, frames)


def tree(
    names: Sequence[str], found: Mapping[tuple[str, str], Lineage], *, root: str | None = None
) -> list[dict[str, Any]]:
    """Return the branches of the tree, nearest pairs first; strangers lie in trees of their own.

    Every further branch joins two parts that nothing joined before, by their nearest pair: of A, B and C where B lies
    between the others that is A-B and B-C. The tree has no root unless one is named, since r is the same both ways.

    Args:
        names: Of all models.
        found: How each pair is related.
        root: A model that branches lead away from.
    """
    part = {name: name for name in names}
    branches: list[dict[str, Any]] = []
    near = [(pair, one) for pair, one in found.items() if one.word not in APART and one.correlation is not None]
    for (a, b), one in sorted(near, key=lambda item: -(item[1].correlation or 0.0)):
        if part[a] != part[b]:
            old = part[b]
            part |= {name: part[a] for name in names if part[name] == old}
            branches.append({"a": a, "b": b, "r": one.correlation})
    reached, waiting = {root}, [root]
    while waiting and root is not None:
        here = waiting.pop(0)
        for branch in branches:
            if branch["b"] == here and branch["a"] not in reached:
                branch["a"], branch["b"] = branch["b"], branch["a"]
            if branch["a"] == here and branch["b"] not in reached:
                reached.add(branch["b"])
                waiting.append(branch["b"])
    return branches


def _row(pair: tuple[str, str], one: Lineage) -> dict[str, Any]:
    return {
        "a": pair[0],
        "b": pair[1],
        "lineage": one.word,
        "r": one.correlation,
        "matrices": one.matrices,
    }


def _nearest(name: str, found: Mapping[tuple[str, str], Lineage]) -> str | None:
    own = [
        (one.correlation, a if b == name else b)
        for (a, b), one in found.items()
        if name in (a, b) and one.word not in APART
    ]
    known = [(r, other) for r, other in own if r is not None]
    return max(known)[1] if known else None
