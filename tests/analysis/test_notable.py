"""What a comparison says first, and the numbers of vectors and rows that it rests on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import diffract
from diffract.analysis.notable import related
from diffract.checkpoints import open_checkpoint
from diffract.cli.main import app
from diffract.matrices.lineage import Lineage
from diffract.report import render

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
NORM = "model.layers.2.post_attention_layernorm.weight"
TABLE = "model.embed_tokens.weight"
Weights = dict[str, torch.Tensor]


def planted(folder: Path, change: Callable[[Weights], Any] | None = None, source: str = "base", **config: Any) -> Path:
    """A copy of a sample with some of its weights or settings changed."""
    shutil.copytree(SAMPLES / source, folder)
    if change:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))
    return folder


def ten(weights: Weights) -> None:
    weights[NORM] *= 10


def turn(weights: Weights) -> None:
    weights[TABLE][700] *= -3


def said(tuned: Any, base: Any = SAMPLES / "base", **options: Any) -> list[str]:
    run = diffract.compare(base, tuned, metrics="norms,change", **options)
    (sentences,) = run.manifest["notable"].values()
    return sentences


def test_three_planted_changes_are_each_named_in_the_first_lines_and_in_the_report(tmp_path: Path) -> None:
    tuned = planted(tmp_path / "tuned", lambda w: (ten(w), turn(w)), source="math", rms_norm_eps=1e-3)
    result = CliRunner().invoke(app, ["compare", str(SAMPLES / "base"), str(tuned), "-o", str(tmp_path / "run")])
    assert result.exit_code == 0
    first = "\n".join(result.stdout.splitlines()[:10])
    page = render(diffract.load_run(tmp_path / "run").tables)
    start = page[page.index('<section id="headlines">') : page.index('<div class="cards">')]
    for text in (first, start.replace("&#39;", "'").replace("&gt;", ">")):
        assert "rms_norm_eps 1e-05 -> 0.001" in text
        assert f"{NORM} changed by 882%" in text
        assert f"{TABLE} changed out of line: row 700 (' balls') by 405%" in text


@pytest.mark.parametrize("source", ["base", "math"])
def test_each_planted_change_is_named_alone(source: str, tmp_path: Path) -> None:
    (norm,) = said(planted(tmp_path / "a", ten, source))
    assert norm.startswith(f"{NORM} changed by ")
    (row,) = said(planted(tmp_path / "b", turn, source))
    assert row.startswith(f"{TABLE} changed out of line: row 700 (' balls') by ")
    assert said(planted(tmp_path / "c", None, source, rms_norm_eps=1e-3))[-1].endswith("rms_norm_eps 1e-05 -> 0.001.")


def test_of_ordinary_stages_of_training_only_rows_that_moved_far_are_notable() -> None:
    assert said(SAMPLES / "math") == []
    # words of the base's text that code never has
    (rows,) = said(SAMPLES / "code")
    assert rows.startswith(f"{TABLE} changed out of line: row 708 (' pens') by 161%")


def test_equal_weights_are_said_first(tmp_path: Path) -> None:
    same = "THE SAME WEIGHTS as base"
    assert said(planted(tmp_path / "a")) == [f"{same}: every tensor is equal to the bit."]
    first, second = said(planted(tmp_path / "b", rms_norm_eps=1e-3))
    assert first.startswith(same)
    assert "rms_norm_eps" in second
    assert said(tmp_path / "a", select="layers 0")[0].startswith(f"{same} in everything that was selected")


def test_equal_values_in_another_dtype_and_zeros_of_another_sign() -> None:
    wide = {"a": torch.eye(4), "b": torch.tensor([0.0, 1.0])}
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    other = {"a": torch.eye(4), "b": torch.tensor([-0.0, 1.0])}
    for base, tuned in ((wide, narrow), (wide, other)):
        assert said(tuned, base)[0].startswith("THE SAME VALUES as base")


def test_what_differs_and_was_not_looked_at_is_named() -> None:
    base = {"a": torch.eye(4), "position_ids": torch.arange(4)}
    (sentence,) = said({"a": torch.eye(4), "position_ids": torch.arange(4) + 1}, base)
    assert sentence == (
        "Differs from base in bytes, but in nothing that was compared. Not looked at: position_ids (not_float)."
    )
    (lost,) = said({"a": torch.eye(4)}, base)
    assert "position_ids (only in the base)" in lost


def test_vectors_by_hand() -> None:
    base = {"w": torch.eye(3), "l.0.b": torch.tensor([3.0, 4.0]), "l.1.b": torch.zeros(2), "s": torch.tensor(2.0),
            "conv": torch.ones(2, 2, 2, 2)}  # fmt: skip
    tuned = {**base, "l.0.b": torch.tensor([3.0, 1.0]), "l.1.b": torch.tensor([0.0, 1.0]), "s": torch.tensor(1.0),
             "conv": torch.ones(2, 2, 2, 2).index_put_((torch.tensor(1),) * 4, torch.tensor(3.0))}  # fmt: skip
    rows = {row["tensor"]: row for row in diffract.compare(base, tuned)["vectors"].iter_rows(named=True)}
    first = rows["l.0.b"]
    assert (first["norm"], first["delta"], first["delta_relative"]) == (5.0, 3.0, 0.6)
    assert (first["largest_change"], first["largest_at"]) == (-3.0, [1])
    assert (first["base_there"], first["tuned_there"], first["layer"], first["kind"]) == (4.0, 1.0, 0, "l.*.b")
    assert (rows["l.1.b"]["status"], rows["l.1.b"]["delta_relative"], rows["l.1.b"]["delta"]) == ("zero", None, 1.0)
    assert (rows["s"]["delta_relative"], rows["s"]["largest_at"]) == (0.5, [])
    assert (rows["conv"]["delta_relative"], rows["conv"]["largest_at"]) == (0.5, [1, 1, 1, 1])
    assert "w" not in rows


def test_vectors_of_extreme_size_and_what_is_not_finite() -> None:
    w = np.eye(3)
    base = {"w": w, "huge": np.array([3e200, 4e200]), "tiny": np.array([3e-200, 4e-200]), "bad": np.ones(2)}
    tuned = {**base, "huge": np.array([3e200, 8e200]), "tiny": np.array([3e-200, 0.0]), "bad": np.array([1, np.inf])}
    run = diffract.compare(base, tuned)
    rows = {row["tensor"]: row for row in run["vectors"].iter_rows(named=True)}
    assert rows["huge"]["delta_relative"] == pytest.approx(0.8, rel=1e-15)
    assert rows["tiny"]["delta_relative"] == pytest.approx(0.8, rel=1e-15)
    assert (rows["bad"]["status"], rows["bad"]["delta"]) == ("non_finite", None)
    assert any("1 vectors hold NaN or Inf: bad" in text for text in run.manifest["notable"]["tuned"])


def test_vectors_without_a_partner_are_named() -> None:
    base = {"w": torch.eye(3), "a": torch.ones(2), "b": torch.ones(3)}
    assert said({"w": torch.eye(3), "b": torch.ones(4)}, base) == ["2 vectors have no partner of their shape: a, b."]


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffract.analysis import vectors

    generator = torch.Generator().manual_seed(0)
    one = {"x": torch.randn(40, 3, 5, 2, generator=generator, dtype=torch.float64), "w": torch.eye(2)}
    other = {"x": one["x"] + torch.randn(40, 3, 5, 2, generator=generator, dtype=torch.float64), "w": torch.eye(2)}
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 8 * 30 * 7)
    found = vectors.compare_entries(open_checkpoint(one), open_checkpoint(other), "x")
    change = (other["x"] - one["x"]).numpy()
    assert (found.norm, found.delta) == pytest.approx((np.linalg.norm(one["x"]), np.linalg.norm(change)), rel=1e-14)
    assert found.place == np.unravel_index(np.abs(change).argmax(), change.shape)
    assert found.after - found.before == change[found.place]


def test_a_table_that_has_grown_is_compared_as_far_as_both_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffract.analysis import vectors

    base = torch.ones(50, 4)
    tuned = torch.cat([base, torch.full((3, 4), 7.0)])
    tuned[20, 2] = -1.0
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 4 * 4 * 8)
    (row,) = vectors.changed_rows(open_checkpoint({"e": base}), open_checkpoint({"e": tuned}), "e")
    assert (row["row"], row["norm"], row["delta"], row["largest_at"]) == (20, 2.0, 2.0, 2)
    assert (row["base_there"], row["tuned_there"], row["delta_relative"]) == (1.0, -1.0, 1.0)


def test_rows_are_found_in_a_model_that_nobody_describes(tmp_path: Path) -> None:
    for name, factor in (("base", 1.0), ("tuned", 5.0)):
        (tmp_path / name).mkdir()
        table = torch.eye(30)[:, :8] + 1
        table[4] *= factor
        save_file({"x.table": table, "y": torch.eye(8)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "vocab.txt").write_text("\n".join(f"token{i}" for i in range(30)))
    assert said(tmp_path / "tuned", tmp_path / "base") == [
        "x.table changed out of line: row 4 ('token4') by 400%; other rows did not."
    ]


def test_a_lost_adapter_is_said(tmp_path: Path) -> None:
    save_file({"lin.weight": torch.full((4, 4), 100.0).bfloat16()}, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    factors = {"lora_A": torch.full((1, 4), 1e-3), "lora_B": torch.full((4, 1), 1e-3)}
    save_file(
        {f"base_model.model.lin.{name}.weight": tensor for name, tensor in factors.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    stated = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "base_model_name_or_path": str(tmp_path / "base.safetensors"),
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(stated))
    (sentence,) = said(tmp_path / "adapter", tmp_path / "base.safetensors")
    assert sentence.endswith("to the bit; the adapter's change is smaller than the rounding of the merged weights.")


def test_tables_of_earlier_runs_are_empty_and_new_ones_come_back(tmp_path: Path) -> None:
    earlier = diffract.load_run(Path(__file__).parents[1] / "earlier" / "compare")
    assert [earlier[name].height for name in ("vectors", "tokens", "configuration")] == [0, 0, 0]
    run = diffract.compare(SAMPLES / "base", planted(tmp_path / "x", ten), metrics="norms", output=tmp_path / "run")
    again = diffract.load_run(tmp_path / "run")
    for name in ("vectors", "tokens", "configuration"):
        assert run[name].equals(again[name])
    assert again["vectors"].filter("out_of_line")["tensor"].to_list() == [NORM]
    assert again["vectors"].filter(pl.col("delta") > 0).height == 1


def test_the_rule_of_what_is_out_of_line() -> None:
    from diffract.stats import out_of_line

    among = np.exp([0.0, 0.1, -0.1, 0.2, -0.2])  # ln: median 0, MAD 0.1
    edge = max(6 * 0.1, math.log(3))
    changes = np.exp([edge - 1e-9, edge + 1e-9])
    assert out_of_line(changes, among).tolist() == [False, True]
    spread = np.exp([0.0, 1.0, -1.0, 2.0, -2.0])
    assert out_of_line(np.exp([5.99, 6.01]), spread).tolist() == [False, True]
    assert out_of_line(np.array([0.0, 1e-9]), np.array([0.0, 0.0, 0.0, 1e-9])).tolist() == [False, True]


def test_moved_layers_are_named_and_those_that_stayed_are_not() -> None:
    found = Lineage("rearranged", 0.963, 21, moved={"layer 0": "layer 0", "layer 1": "layer 2", "layer 2": "layer 3"})
    assert related(found, "base") == (
        "REARRANGED: parts of base lie at other places (layer 1 from layer 2, layer 2 from layer 3). What is compared "
        "by name does not belong together there; numbers of a whole change are left out (correlation 0.963 over what "
        "belongs together)."
    )
    many = Lineage("rearranged", 1.0, 21, moved={f"layer {i}": f"layer {i + 1}" for i in range(12)})
    assert "layer 7 from layer 8 and 4 more" in related(many, "base")
    assert related(Lineage("descendant or sibling", 0.99, 21), "base") == ""
