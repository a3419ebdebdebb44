"""Files beside weights, digests on the way, and tensors written in parts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffract
from diffract.checkpoints import TensorInfo
from diffract.checkpoints.checkpoint import read_digests, recorded
from diffract.checkpoints.writer import ShardedWriter

KEPT = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")
LEFT = ("optimizer.pt", "README.md", "trainer_state.json", "events.out")


def write_folder(path: Path) -> Path:
    path.mkdir()
    for name in (*KEPT, *LEFT):
        (path / name).write_text("{}")
    save_file({"w": torch.arange(12.0).reshape(6, 2)}, path / "model.safetensors")
    return path


def test_what_belongs_to_a_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    for reference in (folder, folder / "model.safetensors"):
        with diffract.open(reference) as checkpoint:
            assert sorted(checkpoint.companions) == sorted(KEPT)
            assert checkpoint.companions["vocab.json"]() == b"{}"


def test_an_adapter_brings_its_tokenizer(tmp_path: Path) -> None:
    base, adapter = write_folder(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "tokenizer.json").write_text('{"mine": 1}')
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 1, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"w.lora_A.weight": torch.ones(1, 2), "w.lora_B.weight": torch.ones(6, 1)},
              adapter / "adapter_model.safetensors")  # fmt: skip
    save_file({"w.weight": torch.zeros(6, 2)}, base / "model.safetensors")
    with diffract.open(adapter) as checkpoint:
        assert checkpoint.companions["tokenizer.json"]() == b'{"mine": 1}'
        assert checkpoint.companions["vocab.json"]() == b"{}"


@pytest.mark.parametrize("rows", [[(0, 2), (2, 6)], [None], [(2, 6)], [(0, 2), (4, 6)], [(0, 6), (0, 3)]])
def test_digests_of_what_was_read(rows: list, tmp_path: Path) -> None:
    with diffract.open(write_folder(tmp_path / "model")) as checkpoint:
        watched, notes = recorded(checkpoint)
        assert read_digests(checkpoint, notes) == {}
        for span in rows:
            watched.read("w", span)
        assert read_digests(checkpoint, notes) == {"w": checkpoint.digest("w")}


def test_readers_beside_each_other_get_one_digest() -> None:
    checkpoint = diffract.open({"w": torch.randn(64, 4096)})
    watched, notes = recorded(checkpoint)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: [watched.read("w", (r, r + 1)) for r in range(64)], range(8)))
    assert read_digests(checkpoint, notes) == {"w": checkpoint.digest("w")}


def test_parts_in_any_order_from_threads(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(17, 5, i + 1).to(torch.bfloat16 if i % 2 else torch.float64) for i in range(6)}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }
    names = {torch.bfloat16: "BF16", torch.float64: "F64", torch.float32: "F32", torch.uint8: "U8"}
    infos = [TensorInfo(name, tuple(t.shape), names[t.dtype]) for name, t in tensors.items()]
    parts = [(n, t[r : r + 4], r) for n, t in tensors.items() if t.ndim == 3 for r in range(0, 17, 4)]
    parts += [(n, t, 0) for n, t in tensors.items() if t.ndim < 3]
    with ShardedWriter(tmp_path, infos, shard_bytes=3000) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: writer.write(*part), reversed(parts)))
        assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    found: dict[str, torch.Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    with diffract.open(tmp_path) as checkpoint:
        assert set(checkpoint.names) == set(tensors)
