"""An audit: every fact on a model that was made so, and none on a plain one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import diffract
from tiny_llama import llama_tensors, save_llama

Q = "model.layers.0.self_attn.q_proj.weight"


def facts(ref: object, **options: object) -> set[tuple[str, str, int | None]]:
    rows = diffract.audit(ref, **options).facts.iter_rows(named=True)
    return {(row["fact"], row["where"], row["count"]) for row in rows if row["fact"] != "no licence stated"}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_of_a_plain_model_nothing_is_told(tmp_path: Path) -> None:
    assert facts(save_llama(tmp_path / "plain", llama_tensors(0))) == set()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_wide_numbers_that_hold_narrow_ones(narrow: torch.dtype) -> None:
    word = {torch.bfloat16: "BF16", torch.float16: "F16"}[narrow]
    assert facts({"a": drawn(9, 9).to(narrow).float(), "b": drawn(9, 9, seed=1)}) == {
        (f"F32 that holds {word}", "a", 1)
    }
    assert facts({"a": torch.full((3, 3), torch.nan)}) == {("not finite", "a", 9)}


def in_groups(values: torch.Tensor, width: int, levels: int) -> torch.Tensor:
    """Round each group of a row to so many levels either side, as weights are quantised."""
    groups = values.reshape(-1, width)
    step = groups.abs().amax(1, keepdim=True) / levels
    return ((groups / step).round() * step).reshape(values.shape).bfloat16()


def test_grids() -> None:
    values = drawn(256, 2048)
    told = "at most 16 values in every {} entries of a row"
    for width in (32, 64, 128):
        assert facts({"w": in_groups(values, width, 7)}) == {(told.format(width), "w", 1)}
    assert facts({"w": in_groups(values, 2048, 127)}) == {("at most 256 values in every 1024 entries of a row", "w", 1)}
    corners = values.reshape(2, 128, 16, 128).transpose(1, 2)
    scale = corners.abs().amax((2, 3), keepdim=True) / 448
    codes = (corners / scale).to(torch.float8_e4m3fn).float() * scale
    block = codes.transpose(1, 2).reshape(256, 2048)
    assert facts({"w": block}) == {("at most 256 values in every 128 x 128 block", "w", 1)}
    assert facts({"w": values.bfloat16()}) == set()


def test_dead_and_copied_parts() -> None:
    dead = drawn(8, 6)
    dead[2:4], dead[:, 5] = 0, 0
    tensors = {"a": drawn(4, 5, seed=1), "b": drawn(4, 5, seed=1), "dead": dead, "zero": torch.zeros(3, 3)}
    tensors["same"] = torch.full((2, 2), 0.3)
    assert facts(tensors) == {
        ("rows of zeros", "dead", 2),
        ("columns of zeros", "dead", 1),
        ("all zero", "zero", 9),
        ("all equal", "same", 4),
        ("equal to the bit", "a, b", 2),
    }


def test_copied_experts() -> None:
    experts = drawn(4, 6, 5)
    experts[3] = experts[1]
    assert facts({"experts": experts}) == {("equal to the bit", "experts[1], experts[3]", 2)}


def test_tokens_that_training_never_met(tmp_path: Path) -> None:
    tensors = llama_tensors(0)
    table = drawn(50, 32, seed=3)
    table[40:44] = drawn(4, 32, seed=4) * 0.02  # as they were drawn
    table[45:48] = table[44]
    tensors["model.embed_tokens.weight"] = table
    name = "model.embed_tokens.weight"
    found = facts(save_llama(tmp_path / "m", tensors, initializer_range=0.02))
    assert found == {("equal rows", name, 4), ("rows of the initial norm", name, 4)}


def test_initial_norms_are_found_as_often_as_stated() -> None:
    """Within five standard deviations lies every row that was drawn so, and none of a table of ten times the norm."""
    width, scale = 64, 0.02
    table = torch.cat([drawn(2000, width) * scale, drawn(500, width, seed=1) * 10 * scale])
    model = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(width)}
    named = replace(diffract.open(model), config={"initializer_range": scale, "vocab_size": 2500})
    assert ("rows of the initial norm", "model.embed_tokens.weight", 2000) in facts(named)


def test_files_and_card(tmp_path: Path) -> None:
    base = llama_tensors(0)
    save_llama(tmp_path / "base", base)
    folder = save_llama(tmp_path / "m", llama_tensors(1, base), auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "old.bin").write_bytes(b"")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: base\n---\n# m\n")
    rows = {row["fact"]: row for row in diffract.audit(folder).facts.iter_rows(named=True)}
    assert rows["code"]["where"] == "evil.py"
    assert rows["pickle"]["where"] == "old.bin"
    assert rows["code named by the configuration"]["note"] == "AutoModel: evil.Model"
    assert rows["licence"]["note"] == "mit"
    assert "lineage: descendant or sibling" in rows
    stranger = save_llama(tmp_path / "other", llama_tensors(7))
    assert "lineage: stranger" in {fact for fact, *_ in facts(folder, base=stranger)}
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "no licence stated" in diffract.audit(folder).facts["fact"].to_list()


def test_a_base_that_is_damaged_is_a_fact_of_the_card(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "m", llama_tensors(0))
    (tmp_path / "base").mkdir()
    (folder / "README.md").write_text("---\nbase_model: base\n---\n")
    assert "base_model cannot be read" in {fact for fact, *_ in facts(folder)}
    with pytest.raises(diffract.CheckpointError):
        diffract.audit(folder, base=tmp_path / "base")


def test_blocks_of_a_large_tensor_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffract.analysis import audit

    monkeypatch.setattr(audit, "BLOCK_BYTES", 512)
    dead = drawn(64, 33).bfloat16()
    dead[:, 3] = 0
    dead[50] = 0
    save_file({"w": dead, "v": dead.clone()}, tmp_path / "m.safetensors")
    found = facts(tmp_path / "m.safetensors")
    assert {("rows of zeros", "w", 1), ("columns of zeros", "v", 1), ("equal to the bit", "v, w", 2)} <= found
