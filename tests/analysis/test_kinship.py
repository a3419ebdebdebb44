"""Lineage as a verb: pairs, the tree, what is written and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import diffract
from diffract.analysis.kinship import tree
from diffract.errors import SelectionError
from diffract.matrices.lineage import Lineage

KIN = "descendant or sibling"


def seeded(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.w": torch.randn(40, 40, generator=generator) for i in range(6)}


def moved(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    return {name: value + 0.2 * seeded(seed)[name] for name, value in base.items()}


def test_a_family_and_a_stranger_are_told_apart_in_tables_that_can_be_read_again(tmp_path: Path) -> None:
    base = seeded(0)
    models = {"base": base, "a": moved(base, 1), "b": moved(base, 2), "c": seeded(9)}
    opened = [diffract.open(values) for values in models.values()]
    run = diffract.lineage(*opened, output=tmp_path / "run")
    again = diffract.load_run(tmp_path / "run")
    assert again.kind == "lineage"
    names = run.models["model"].to_list()
    words = dict(zip(zip(again.lineage["a"], again.lineage["b"], strict=True), again.lineage["lineage"], strict=True))
    stranger = names[3]
    assert {word for pair, word in words.items() if stranger in pair} == {"stranger"}
    assert {word for pair, word in words.items() if stranger not in pair} == {KIN}
    assert {frozenset(row) for row in run.tree.select("a", "b").rows()} == {
        frozenset((names[0], n)) for n in names[1:3]
    }
    assert run.models["middle"].to_list() == [True, False, False, False]
    assert run.models["nearest"].to_list() == [run.models["nearest"][0], names[0], names[0], None]


def test_branches_lead_away_from_a_root_that_is_named() -> None:
    known = {("x", "y"): 0.96, ("x", "z"): 0.92, ("y", "z"): 0.95}
    found = {pair: Lineage(KIN, r, 10) for pair, r in known.items()}
    assert [(b["a"], b["b"]) for b in tree(["x", "y", "z"], found)] == [("x", "y"), ("y", "z")]
    assert {(b["a"], b["b"]) for b in tree(["x", "y", "z"], found, root="z")} == {("z", "y"), ("y", "x")}


def test_one_model_alone_and_an_unknown_root_are_refused() -> None:
    with pytest.raises(SelectionError, match="two checkpoints"):
        diffract.lineage(seeded(0))
    with pytest.raises(SelectionError, match="nobody"):
        diffract.lineage(seeded(0), seeded(1), root="nobody")
