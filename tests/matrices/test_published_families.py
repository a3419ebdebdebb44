"""Lineage of weights that nobody here trained; they are too large to lie beside the tests.

``DIFFRACT_DATA`` names a folder in which ``checkpoints/real/sceptr`` holds the models, each a folder of its own.
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffract

PUBLISHED = Path(os.environ.get("DIFFRACT_DATA", "data")) / "checkpoints" / "real" / "sceptr"

KIN = "descendant or sibling"
FAMILY = {"SCEPTR", "SCEPTR_finetuned"}
OF_OTHER_SIZES = {f"SCEPTR_{size}" for size in ("large", "small", "tiny")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PUBLISHED.is_dir(), reason="DIFFRACT_DATA names no folder with the sceptr models"),
]


def test_one_descendant_among_strangers_that_share_tables_to_the_bit() -> None:
    models = sorted(path for path in PUBLISHED.iterdir() if path.is_dir())
    run = diffract.lineage(*models)
    words = {frozenset(row[:2]): row[2] for row in run.lineage.select("a", "b", "lineage").iter_rows()}
    for one in combinations([path.name for path in models], 2):
        pair = frozenset(one)
        if pair == FAMILY:
            assert words[pair] == KIN
        else:
            assert words[pair] == ("cannot tell" if pair & OF_OTHER_SIZES else "stranger")
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
    assert run.models["lineage"].to_list() == [None, KIN, "stranger"]
    assert run.models["delta_relative"].is_null().to_list() == [True, False, True]
    assert run.metrics.filter(model="SCEPTR_MLM_only")["lineage"].unique().to_list() == ["stranger"]


def test_a_revision_of_another_run_breaks_a_series_and_no_other_step_does(tmp_path: Path) -> None:
    first, last = (load_file(PUBLISHED / name / "model.safetensors") for name in ("SCEPTR", "SCEPTR_finetuned"))
    run = {step: {name: torch.lerp(first[name], last[name], step / 3) for name in first} for step in range(4)}
    (tmp_path / "run").mkdir()
    for step, tensors in run.items():
        save_file(tensors, tmp_path / "run" / f"step{1000 * step}.safetensors")
    how = {"metrics": "delta_relative", "allow_unmatched": True, "cache": False}
    assert diffract.trajectory(tmp_path / "run", **how).models["breaks"].to_list() == [False] * 4
    others = {path.name for path in PUBLISHED.iterdir() if path.is_dir()} - FAMILY - OF_OTHER_SIZES
    assert len(others) >= 10
    for name in sorted(others):
        save_file(load_file(PUBLISHED / name / "model.safetensors"), tmp_path / "run" / "step1500.safetensors")
        found = diffract.trajectory(tmp_path / "run", **how)
        assert found.models["model"].to_list() == ["step0", "step1000", "step1500", "step2000", "step3000"]
        assert found.models["lineage"].to_list()[1:] == [KIN, "stranger", "stranger", KIN], name
        assert found.models["breaks"].to_list() == [False, False, True, True, False], name
        assert found.manifest["warnings"][0].startswith("step1500 BREAKS THE SERIES: stranger"), name
