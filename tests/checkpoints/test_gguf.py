"""GGUF files that are written here, entry by entry as ggml defines its types, against what is read of them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffract.api import compare, scan
from diffract.checkpoints import open_checkpoint
from diffract.errors import CheckpointError
from tiny_llama import llama_tensors, save_llama

Stored = tuple[list[int], int, bytes]
"""Shape with rows first, type, and bytes."""

Read = Callable[[bytes], list[float]]


def half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def q4_0(b: bytes) -> list[float]:
    return [half(b, 0) * ((b[2 + i % 16] >> 4 * (i // 16) & 15) - 8) for i in range(32)]


def q4_1(b: bytes) -> list[float]:
    return [half(b, 0) * (b[4 + i % 16] >> 4 * (i // 16) & 15) + half(b, 2) for i in range(32)]


def fifth(b: bytes, at: int, i: int) -> int:
    return struct.unpack_from("<I", b, at)[0] >> i & 1


def q5_0(b: bytes) -> list[float]:
    return [half(b, 0) * ((b[6 + i % 16] >> 4 * (i // 16) & 15 | fifth(b, 2, i) << 4) - 16) for i in range(32)]


def q5_1(b: bytes) -> list[float]:
    return [half(b, 0) * (b[8 + i % 16] >> 4 * (i // 16) & 15 | fifth(b, 4, i) << 4) + half(b, 2) for i in range(32)]


def q8_0(b: bytes) -> list[float]:
    return [half(b, 0) * struct.unpack_from("<b", b, 2 + i)[0] for i in range(32)]


def six_bits(b: bytes, j: int) -> tuple[int, int]:
    """The scale and the minimum of group j: of the last four the high bits lie above those of the first four."""
    s = b[4:16]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4


def q4_k(b: bytes) -> list[float]:
    found = []
    for i in range(256):
        scale, minimum = six_bits(b, i // 32)
        code = b[16 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        found.append(half(b, 0) * scale * code - half(b, 2) * minimum)
    return found


def q5_k(b: bytes) -> list[float]:
    found = []
    for i in range(256):
        scale, minimum = six_bits(b, i // 32)
        code = b[48 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15 | (b[16 + i % 32] >> i // 32 & 1) << 4
        found.append(half(b, 0) * scale * code - half(b, 2) * minimum)
    return found


def q2_k(b: bytes) -> list[float]:
    scale, minimum, out = half(b, 80), half(b, 82), []
    for i in range(256):
        run, at = i // 32, i % 32
        code = b[16 + 32 * (run // 4) + at] >> (2 * (run % 4)) & 3
        out.append((b[i // 16] & 15) * scale * code - (b[i // 16] >> 4) * minimum)
    return out


def q3_k(b: bytes) -> list[float]:
    scale, out = half(b, 108), []
    for i in range(256):
        run, at, group = i // 32, i % 32, i // 16
        code = b[32 + 32 * (run // 4) + at] >> (2 * (run % 4)) & 3
        low = b[96 + group % 8] >> (4 * (group // 8)) & 15
        high = b[104 + group % 4] >> (2 * (group // 4)) & 3
        out.append((low + 16 * high - 32) * scale * (code if b[at] >> run & 1 else code - 4))
    return out


def q6_k(b: bytes) -> list[float]:
    found = []
    for i in range(256):
        side, run, place = i // 128, i % 128 // 32, i % 32
        low = b[64 * side + 32 * (run % 2) + place] >> 4 * (run // 2) & 15
        high = b[128 + 32 * side + place] >> 2 * run & 3
        found.append(half(b, 208) * struct.unpack_from("<b", b, 192 + i // 16)[0] * ((low | high << 4) - 32))
    return found


TYPES: dict[str, tuple[int, int, int, tuple[int, ...], Read]] = {
    "Q4_0": (2, 32, 18, (0,), q4_0),
    "Q4_1": (3, 32, 20, (0, 2), q4_1),
    "Q5_0": (6, 32, 22, (0,), q5_0),
    "Q5_1": (7, 32, 24, (0, 2), q5_1),
    "Q8_0": (8, 32, 34, (0,), q8_0),
    "Q2_K": (10, 256, 84, (80, 82), q2_k),
    "Q3_K": (11, 256, 110, (108,), q3_k),
    "Q4_K": (12, 256, 144, (0, 2), q4_k),
    "Q5_K": (13, 256, 176, (0, 2), q5_k),
    "Q6_K": (14, 256, 210, (208,), q6_k),
}
"""Number, entries and bytes of a block, where its scales lie, and what it stands for."""


def write(path: Path, tensors: dict[str, Stored], settings: dict[str, Any], version: int = 3) -> Path:
    """Write a GGUF file."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def setting(value: Any) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            kind, packed = (
                (8, b"".join(map(text, value)))
                if isinstance(value[0], str)
                else (5, struct.pack(f"<{len(value)}i", *value))
            )
            return struct.pack("<IIQ", 9, kind, len(value)) + packed
        return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings))
    head += b"".join(text(key) + setting(value) for key, value in settings.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def blocks(rng: np.random.Generator, kind: str, count: int) -> tuple[bytes, torch.Tensor]:
    _, _, size, scales, read = TYPES[kind]
    raw = b""
    for _ in range(count):
        block = bytearray(rng.integers(0, 256, size, dtype=np.uint8).tobytes())
        for at in scales:
            block[at : at + 2] = struct.pack("<e", rng.uniform(0.01, 0.1))
        raw += bytes(block)
    return raw, torch.tensor([v for i in range(count) for v in read(raw[i * size : (i + 1) * size])])


@pytest.mark.parametrize("kind", TYPES)
def test_codes_are_the_numbers_that_they_stand_for(kind: str, tmp_path: Path) -> None:
    number, entries, _, _, _ = TYPES[kind]
    raw, true = blocks(np.random.default_rng(0), kind, 6)
    write(tmp_path / "m.gguf", {"w": ([3, 2 * entries], number, raw)}, {"general.architecture": "other"})
    with open_checkpoint(tmp_path / "m.gguf") as found:
        # products of two or three numbers in float32 against float64
        torch.testing.assert_close(found["w"], true.view(3, -1).float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(found.read("w", (1, 2)), found["w"][1:2])
        assert found.notes[0].startswith(f"The weights are quantised (GGUF: 1 tensors {kind})")
        assert "'other' keeps its own names" in found.notes[1]


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def as_gguf(folder: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Convert a Llama as llama.cpp does: rows of q and k in pairs, other names, no word of tokens."""
    tensors: dict[str, Stored] = {"rope_freqs.weight": ([4], 0, bytes(16))}
    with open_checkpoint(folder) as model:
        heads = {"q_proj": model.config["num_attention_heads"], "k_proj": model.config["num_key_value_heads"]}
        for name in model:
            value = model[name].float()
            part, last = name.removeprefix("model.").rsplit(".", 1)
            _, number, *rest = part.split(".") if part.startswith("layers.") else ("", "")
            own = (
                f"blk.{number}.{NAMES['.'.join(rest)]}"
                if rest
                else {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[part]
            )
            if count := heads.get(part.split(".")[-1]):
                value = value.view(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
            tensors[f"{own}.{last}"] = (list(value.shape), 0, value.numpy().tobytes())
        config = dict(model.config)
    settings = {
        "general.architecture": "llama", "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"], "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": [config["num_key_value_heads"]] * config["num_hidden_layers"],
        "llama.rope.freq_base": 10000.0, "tokenizer.ggml.tokens": ["a", "bc"], "general.alignment": 32,
    }  # fmt: skip
    return tensors, settings


@pytest.mark.parametrize("files", [1, 2])
def test_a_converted_llama_is_the_same_model(files: int, tmp_path: Path) -> None:
    save_llama(tmp_path / "plain", llama_tensors(0))
    tensors, settings = as_gguf(tmp_path / "plain")
    folder = tmp_path / "gguf"
    folder.mkdir()
    names = list(tensors)
    for i in range(files):
        name = "model-f32.gguf" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.gguf"
        own = {n: tensors[n] for n in names[i::files]}
        write(folder / name, own, settings if i == 0 else {"split.no": i})
    with open_checkpoint(tmp_path / "plain") as one, open_checkpoint(folder) as other:
        assert sorted(one) == sorted(other)
        assert all(torch.equal(one[name].float(), other[name]) for name in one)
        q = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(other.read(q, (3, 5)), one[q][3:5].float())
        assert {name: found.reason for name, found in other.set_aside.items()} == {
            "rope_freqs.weight": "made anew by the model, no weight"
        }
    run = compare(tmp_path / "plain", folder, cache=False)
    tuned = run.metrics.filter(model="gguf")
    assert tuned["delta_relative"].max() == 0
    assert tuned["head"].max() == 3


def test_norms_of_gemma_are_taken_down_again(tmp_path: Path) -> None:
    norm = torch.tensor([1.5, 0.25])
    tensors: dict[str, Stored] = {
        "blk.0.attn_norm.weight": ([2], 0, norm.numpy().tobytes()),
        "blk.0.ffn_norm.weight": ([2], 0, norm.numpy().tobytes()),
        "blk.0.attn_q.weight": ([2, 2], 0, bytes(16)),
    }
    write(tmp_path / "m.gguf", tensors, {"general.architecture": "gemma2", "gemma2.block_count": 1})
    with open_checkpoint(tmp_path / "m.gguf") as found:
        assert found["model.layers.0.input_layernorm.weight"].tolist() == [0.5, -0.75]
        assert found["model.layers.0.pre_feedforward_layernorm.weight"].tolist() == [0.5, -0.75]


def test_types_that_are_not_read_are_listed(tmp_path: Path) -> None:
    tensors: dict[str, Stored] = {"a": ([1, 256], 15, bytes(292)), "b": ([1, 2], 1, bytes(4))}
    run = scan(write(tmp_path / "m.gguf", tensors, {"general.architecture": "x"}), cache=False)
    listed = run["tensors"].filter(outcome="set_aside").row(0, named=True)
    assert (listed["tensor"], listed["dtype"], listed["note"]) == ("a", "Q8_K", "type Q8_K of GGUF")


W = b"w" + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
"""A tensor as the head lists it: name, axes, shape from the last axis on, type, offset."""


def damaged(name: str, good: bytes) -> bytes:
    listed = {
        "type": struct.pack("<IQQIQ", 2, 32, 2, 99, 0),
        "axes": struct.pack("<IQQIQ", 1 << 30, 32, 2, 8, 0),
        "shape": struct.pack("<IQQIQ", 2, 1 << 62, 2, 8, 0),
        "offset": struct.pack("<IQQIQ", 2, 32, 2, 8, 1 << 40),
    }
    other = {
        "cut": good[:-29],  # into the tensor, behind which there is padding
        "version": b"GGUF" + struct.pack("<I", 1) + good[8:],
        "many": good[:8] + struct.pack("<Q", 1 << 60) + good[16:],
    }
    assert good.count(W) == 1
    return other.get(name) or good.replace(W, b"w" + listed[name])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut", "file ends within it"),
        ("version", "no GGUF file of version 2 or 3"),
        ("many", "no room"),
        ("type", "type 99 is not known"),
        ("axes", "axes, expected at most 8"),
        ("shape", "no tensor of its type has shape"),
        ("offset", "overlaps another, or the file ends"),
    ],
)
def test_damage_is_one_clear_error(name: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"w": ([2, 32], 8, bytes(68))}, {})
    path.write_bytes(damaged(name, path.read_bytes()))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_a_text_of_more_bytes_than_there_are_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {}, {"general.architecture": "x"})
    raw = path.read_bytes()
    path.write_bytes(raw[:24] + struct.pack("<Q", 1 << 50) + raw[32:])
    with pytest.raises(CheckpointError, match="head does not end"):
        open_checkpoint(path)


def test_edits_write_the_model_with_a_configuration(tmp_path: Path) -> None:
    from diffract.edits.to_files import apply

    save_llama(tmp_path / "plain", llama_tensors(0))
    tensors, settings = as_gguf(tmp_path / "plain")
    write(tmp_path / "m.gguf", tensors, settings)
    apply({"model": str(tmp_path / "m.gguf"), "steps": []}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 2)
