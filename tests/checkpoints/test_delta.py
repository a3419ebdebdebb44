"""Deltas: what comes back is what was stored, to the bit; another base, or damage, is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import diffract
from diffract.checkpoints import delta
from diffract.edits import Delta
from diffract.errors import CheckpointError
from tiny_llama import llama_tensors, save_llama


@given(
    seed=st.integers(0, 10**6), entries=st.integers(0, 70), size=st.sampled_from([1, 2, 4, 8]), share=st.floats(0, 1)
)
def test_a_block_comes_back(seed: int, entries: int, size: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 256, (entries, size), dtype=np.uint8)
    own = np.where(draw.random((entries, 1)) < share, draw.integers(0, 256, (entries, size), dtype=np.uint8), base)
    for beside in (base.reshape(-1).data, None):
        how, stored = delta.encode(own.reshape(-1).data, beside, size)
        made = delta.decode(how, stored, beside, size=own.size, itemsize=size)
        assert made.tobytes() == own.tobytes()


def test_few_entries_cost_few_bytes() -> None:
    base = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)
    own = base.copy()
    assert delta.encode(own.data, base.data, 2) == ("same", b"")
    own[::2000] ^= 1
    how, stored = delta.encode(own.data, base.data, 2)
    assert how in {"xor", "entries"}
    assert len(stored) < 1000
    own = base ^ np.random.default_rng(1).integers(1, 256, len(base), dtype=np.uint8)  # every byte is another
    assert delta.encode(own.data, base.data, 2)[0] == "xor"


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a model with two tokens more, a tensor of its own, one that is gone, and whole numbers."""
    base = llama_tensors(0)
    tuned = llama_tensors(1, base)
    tuned["model.layers.0.input_layernorm.weight"] = base["model.layers.0.input_layernorm.weight"]
    tuned["model.embed_tokens.weight"] = torch.cat(
        [tuned["model.embed_tokens.weight"], torch.full((2, 32), torch.nan).bfloat16()]
    )
    tuned["score.weight"] = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    tuned["steps"] = torch.tensor(7)
    del tuned["model.layers.1.input_layernorm.weight"]
    return save_llama(tmp_path / "base", base), save_llama(tmp_path / "tuned", tuned, vocab_size=52)


@pytest.fixture
def made(family: tuple[Path, Path], tmp_path: Path) -> Path:
    base, tuned = family
    (tuned / "notes.txt").write_text("mine")
    diffract.apply(diffract.Recipe(model=tuned, export=Delta(base=base)), tmp_path / "delta")
    return tmp_path / "delta"


def test_put_back_to_the_byte(
    family: tuple[Path, Path], made: Path, tmp_path: Path, same: Callable[[torch.Tensor, torch.Tensor], bool]
) -> None:
    tuned = family[1]
    verdict = diffract.verify(made)
    assert (verdict.tensors, verdict.faults) == (len(load_file(tuned / "model.safetensors")), [])
    diffract.apply(made, tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)
    for name in ("config.json", "notes.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tuned / name).read_bytes()
    how = {n: {b[1] for b in e["blocks"]} for n, e in json.loads((made / delta.DELTA).read_text())["tensors"].items()}
    assert how["model.layers.0.input_layernorm.weight"] == {"same"}
    assert how["score.weight"] == how["steps"] == {"whole"}


def test_read_by_rows_like_the_model(family: tuple[Path, Path], made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with diffract.open(family[1]) as model, diffract.open(made) as stored:
        name = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(model.read(name, (8, 16)), stored.read(name, (8, 16)))
        assert {n: model.digest(n) for n in model} == {n: stored.digest(n) for n in stored}
    assert diffract.compare(family[1], made).models["lineage"][1] == "same"


def test_blocks_of_rows(family: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table that has grown, only the block with new rows is stored whole."""
    monkeypatch.setattr(delta, "BLOCK_BYTES", 640)  # ten rows of 32 numbers
    base, tuned = family
    diffract.apply(diffract.Recipe(model=tuned, export=Delta(base=base)), tmp_path / "delta")
    blocks = json.loads((tmp_path / "delta" / delta.DELTA).read_text())["tensors"]["model.embed_tokens.weight"][
        "blocks"
    ]
    assert [how == "whole" for _, how, *_ in blocks] == [False] * 5 + [True]
    with diffract.open(tuned) as model, diffract.open(tmp_path / "delta") as stored:
        assert {n: model.digest(n) for n in model} == {n: stored.digest(n) for n in stored}
        part = stored.read("model.embed_tokens.weight", (7, 23))
        assert torch.equal(part, model.read("model.embed_tokens.weight", (7, 23)))


def test_a_whole_model_is_read_in_the_memory_of_a_few_blocks(made: Path) -> None:
    with diffract.open(made) as stored:
        assert len([stored.read(name) for name in stored]) > delta.KEPT_BLOCKS
        (kept,) = {id(source.recent): source.recent for source in stored.sources.values()}.values()
        assert len(kept.blocks) == delta.KEPT_BLOCKS


def test_other_bases_are_refused(family: tuple[Path, Path], made: Path, tmp_path: Path) -> None:
    base, _ = family
    with pytest.raises(CheckpointError, match="strangers"):
        diffract.apply(
            {"model": save_llama(tmp_path / "x", llama_tensors(9)), "export": {"delta": {"base": base}}}, "out"
        )
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight'.*not come to what was stored.*--adapter-base"):
        diffract.apply(made, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*has no such tensor"):
        diffract.open(made)
    save_file({n: t.float() for n, t in tensors.items()}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"BF16.*has it as F32"):
        diffract.open(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(format=2), "format 2"),
        (lambda found: found.pop("base"), "names no base"),
        (lambda found: found.update(tensors=[]), "lists no tensors"),
        (lambda found: found["tensors"]["lm_head.weight"].update(shape=[10**30]), "whole numbers"),
        (lambda found: found["tensors"]["lm_head.weight"].update(dtype="F7"), "damaged"),
        (lambda found: found["tensors"]["lm_head.weight"].update(blocks=[]), "damaged"),
        (lambda found: found["tensors"]["lm_head.weight"]["blocks"][0].__setitem__(2, -1), "outside of the file"),
        (lambda found: found["tensors"]["lm_head.weight"]["blocks"][0].__setitem__(3, 10**9), "outside of the file"),
        (lambda found: found["tensors"]["lm_head.weight"]["blocks"][0].__setitem__(1, "magic"), "'magic'"),
        (lambda found: found["tensors"]["lm_head.weight"]["blocks"][0].__setitem__(4, ""), "not come to"),
    ],
)
def test_damaged_descriptions(made: Path, change: Callable[[dict], object], message: str) -> None:
    found = json.loads((made / delta.DELTA).read_text())
    change(found)
    (made / delta.DELTA).write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=message), diffract.open(made) as opened:
        opened.read("lm_head.weight")


def test_damaged_bytes(made: Path) -> None:
    raw = bytearray((made / delta.BLOCKS).read_bytes())
    raw[len(raw) // 2] ^= 8
    (made / delta.BLOCKS).write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"), diffract.open(made) as opened:
        [opened.read(name) for name in opened]


def test_a_bomb_is_not_unpacked(made: Path) -> None:
    """A few bytes that claim to become a gigabyte become no more than the tensor may have."""
    found = json.loads((made / delta.DELTA).read_text())
    bomb = delta._compressed(np.zeros(1 << 27, np.uint8))
    found["tensors"]["score.weight"]["blocks"][0][2:4] = 0, len(bomb)
    (made / delta.BLOCKS).write_bytes(bomb + (made / delta.BLOCKS).read_bytes())
    (made / delta.DELTA).write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="come to 384 bytes"), diffract.open(made) as opened:
        opened.read("score.weight")


def test_codes_are_refused(tmp_path: Path, family: tuple[Path, Path]) -> None:
    tensors = load_file(family[0] / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace("weight", "weight_scale")] = torch.ones(1)
    config = {"quant_method": "fp8"}
    folder = save_llama(tmp_path / "fp8", tensors, quantization_config=config)
    with pytest.raises(CheckpointError, match="plain weights"):
        diffract.apply({"model": folder, "export": {"delta": {"base": family[0]}}}, tmp_path / "out")
