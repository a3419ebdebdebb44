"""Lineage as a verb: pairs, the tree, what is written and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import diffract
from diffract import report
from diffract.analysis.kinship import tree
from diffract.checkpoints.provenance import stated_date
from diffract.cli.main import app
from diffract.errors import SelectionError
from diffract.matrices.lineage import Lineage
from diffract.tables import Tables

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


def test_branches_lead_away_from_the_earliest_model_of_each_tree() -> None:
    known = {("x", "y"): 0.96, ("x", "z"): 0.92, ("y", "z"): 0.95, ("v", "w"): 0.97}
    found = {pair: Lineage(KIN, r, 10) for pair, r in known.items()}
    names = ["v", "w", "x", "y", "z"]
    plain = tree(names, found)
    assert [(b["a"], b["b"], b["rooted"]) for b in plain] == [("v", "w", False), ("x", "y", False), ("y", "z", False)]
    rooted = tree(names, found, {"z": 0})
    assert {(b["a"], b["b"], b["rooted"]) for b in rooted} == {("v", "w", False), ("z", "y", True), ("y", "x", True)}
    timed = tree(names, found, {"v": (0, 2), "w": (0, 1), "x": (0, 5), "y": (0, 5), "z": (0, 5)})
    assert {(b["a"], b["b"], b["rooted"]) for b in timed} == {("w", "v", True), ("x", "y", False), ("y", "z", False)}


def test_the_earliest_model_is_told_by_step_or_by_a_date(tmp_path: Path) -> None:
    paths = {step: tmp_path / f"step{step}.safetensors" for step in (10, 200, 3000)}
    for step, path in paths.items():
        save_file(moved(seeded(0), step), path)
    by_step = diffract.lineage(*paths.values(), root="step")
    assert by_step.tree["rooted"].to_list() == [True, True]
    assert by_step.tree["a"][0] == "step10"
    assert by_step.manifest["settings"]["root_told_by"] == "step"
    with pytest.raises(SelectionError, match=r"tells no step\. Name the root"):
        diffract.lineage(seeded(0), seeded(1), root="step")


@pytest.mark.parametrize(
    ("names", "stated", "told_by", "earliest"),
    [
        (("a", "b"), ("2026-02-01", "2025-12-31T23:00:00Z"), "dates in manifests", "b"),
        (("step20", "step10"), ("2026-02-01", None), "steps", "step10"),  # one states no date
        (("step20", "b"), (None, None), "modification times", "b"),  # one tells no step either
        (("step10", "step20"), ("2026-02-01", "2026-01-01"), "dates in manifests", "step20"),
    ],
)
@pytest.mark.parametrize("place", ["card", "manifest", "metadata"])
def test_a_date_that_is_stated_comes_before_steps_and_these_before_times_of_files(
    tmp_path: Path, place: str, names: tuple[str, ...], stated: tuple[str | None, ...], told_by: str, earliest: str
) -> None:
    base = seeded(0)
    for age, (name, date) in enumerate(zip(names, stated, strict=True)):
        (tmp_path / name).mkdir()
        weights = tmp_path / name / "model.safetensors"
        save_file(moved(base, age), weights, {"created": date} if date and place == "metadata" else None)
        if date and place == "card":
            (tmp_path / name / "README.md").write_text(f"---\nlicense: mit\ndate: {date}  # of release\n---\n# Model\n")
        if date and place == "manifest":
            (tmp_path / name / "manifest.json").write_text(json.dumps({"created_at": date}))
        os.utime(weights, (1e9 - age, 1e9 - age))
    done = CliRunner().invoke(app, ["lineage", *(str(tmp_path / name) for name in names), "--root", "date"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert f"The earliest is told by {told_by}" in said
    assert f"Tree, from its root: {earliest} ->" in said


@pytest.mark.parametrize("text", ["[", "[]", '{"date": ["x"]}', '{"date": "yesterday"}', "[" * 100_000])
def test_notes_that_state_no_date_are_passed_over(tmp_path: Path, text: str) -> None:
    for name in ("manifest.json", "README.md"):
        (tmp_path / name).write_text(text)
    assert stated_date(tmp_path) is None


def test_equal_weights_and_moved_layers_are_told_of_each_pair() -> None:
    base = seeded(0)
    turned = {f"layers.{5 - i}.w": base[f"layers.{i}.w"] for i in range(6)}
    run = diffract.lineage(base, dict(base), turned)
    assert run.lineage["lineage"].to_list() == ["same", "rearranged", "rearranged"]
    assert run.lineage["moved"].to_list()[1] == [f"layer {i} from layer {5 - i}" for i in range(6)]
    assert run.lineage["shared"].list.len().to_list() == [6, 0, 0]


def test_what_is_printed_names_strangers_moved_layers_and_the_tree(tmp_path: Path) -> None:
    base = seeded(0)
    models = {"base": base, "tuned": moved(base, 1), "other": seeded(9)}
    models["turned"] = {f"layers.{5 - i}.w": base[f"layers.{i}.w"] for i in range(6)}
    paths = [tmp_path / f"{name}.safetensors" for name in models]
    for path, values in zip(paths, models.values(), strict=True):
        save_file(values | {"embed": torch.eye(40)}, path)
    done = CliRunner().invoke(app, ["lineage", *map(str, paths), "--root", "base"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "Descendant or sibling: base and tuned." in said
    assert "Strangers: base and other; tuned and other; other and turned." in said
    assert "To the bit 3 of these pairs share embed." in said
    assert "In turned layer 0 from layer 5 of base; layer 1 from layer 4 of base" in said
    assert "Tree, from its root: base -> turned (1.000), base -> tuned (0.98" in said
    assert "In the middle of a path, as base of its ends or as a stage between them: base" in said
    told = json.loads(CliRunner().invoke(app, ["lineage", *map(str, paths[:2]), "--json"]).stdout)
    assert told["lineage"][0]["lineage"] == KIN
    followed = CliRunner().invoke(
        app, ["trajectory", *map(str, paths[:3]), "--by", "given", "--metrics", "norms,change"]
    )
    assert "other BREAKS" in followed.stdout
    assert "other BREAKS THE SERIES: stranger" in " ".join(followed.output.split())


def test_one_model_alone_and_an_unknown_root_are_refused() -> None:
    with pytest.raises(SelectionError, match="two checkpoints"):
        diffract.lineage(seeded(0))
    with pytest.raises(SelectionError, match="nobody"):
        diffract.lineage(seeded(0), seeded(1), root="nobody")


def test_a_page_shows_pairs_and_trees(tmp_path: Path) -> None:
    hostile, base = "<img src=x onerror=alert(1)>", seeded(0)
    paths = [str(tmp_path / f"{place}.safetensors") for place in range(3)]
    for path, values in zip(paths, (base, moved(base, 1), seeded(9)), strict=True):
        save_file(values, path)
    run = diffract.lineage(*paths, root="0", output=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Who descends from whom: 3 models" in page
    assert "Descendant or sibling: 0 and 1." in page
    assert "Neither descends from the other" in page
    assert page.count("<td>stranger</td>") == 2
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["kinship"]["data"][0]["type"] == "heatmap"
    assert run.figure("lineage").data
    assert all(row["digest"] for row in run.manifest["models"])
    named = {n: run[n].with_columns(pl.col("a").replace("0", hostile)) for n in ("lineage", "tree")}
    drawn = report.page.render(Tables(run.manifest, run.tables.frames | named))
    assert hostile not in drawn.split("<body>")[1]
