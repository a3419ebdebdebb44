"""Lineage of weights that nobody here trained; they are too large to lie beside the tests.

``DIFFRACT_DATA`` names a folder in which ``checkpoints/real/sceptr`` holds the models, each a folder of its own.
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import pytest

import diffract

PUBLISHED = Path(os.environ.get("DIFFRACT_DATA", "data")) / "checkpoints" / "real" / "sceptr"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PUBLISHED.is_dir(), reason="DIFFRACT_DATA names no folder with the sceptr models"),
]


def test_one_descendant_among_strangers_that_share_tables_to_the_bit() -> None:
    models = sorted(path for path in PUBLISHED.iterdir() if path.is_dir())
    run = diffract.lineage(*models)
    words = {frozenset(row[:2]): row[2] for row in run.lineage.select("a", "b", "lineage").iter_rows()}
    of_other_sizes = {f"SCEPTR_{size}" for size in ("large", "small", "tiny")}
    family = {"SCEPTR", "SCEPTR_finetuned"}
    for one in combinations([path.name for path in models], 2):
        pair = frozenset(one)
        if pair == family:
            assert words[pair] == "descendant or sibling"
        else:
            assert words[pair] == ("cannot tell" if pair & of_other_sizes else "stranger")
    strangers = run.lineage.filter(lineage="stranger")
    assert strangers["r"].abs().max() < 0.02  # pyright: ignore[reportOperatorIssue] (Float64)
    assert strangers["shared"].list.len().gt(0).sum() > len(strangers) / 2
    assert run.tree.select("a", "b").rows() == [("SCEPTR", "SCEPTR_finetuned")]


def test_a_comparison_says_which_is_the_descendant() -> None:
    run = diffract.compare(
        *(PUBLISHED / name for name in ("SCEPTR", "SCEPTR_finetuned", "SCEPTR_MLM_only")),
        metrics="norms,change",
        allow_unmatched=True,
    )
    assert run.models["lineage"].to_list() == [None, "descendant or sibling", "stranger"]
    assert run.models["delta_relative"].is_null().to_list() == [True, False, True]
    assert run.metrics.filter(model="SCEPTR_MLM_only")["lineage"].unique().to_list() == ["stranger"]
