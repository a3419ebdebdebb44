"""Tiny seeded tensors, sharded folders, a count of the bytes read, and a hub on this machine."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

COMMIT = "c0ffee" + "0" * 34


def make_tensors() -> dict[str, torch.Tensor]:
    """Every dtype once: floating point, scalar, empty, integer and boolean."""
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    floats = {
        "f64": torch.float64,
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }
    tensors = {name: wide.to(dtype) for name, dtype in floats.items()}
    whole = {"i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8}
    tensors |= {name: torch.arange(5).to(dtype) for name, dtype in whole.items()}
    tensors |= {"bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5)}
    return tensors | {"empty": torch.zeros(0, 3), "stack": torch.randn(2, 3, 4, generator=generator)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, dtype and shape included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    raw_a, raw_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(raw_a, raw_b)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return make_tensors()


@pytest.fixture(name="same")
def _same() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    return same


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A safetensors file of every dtype, written by safetensors itself."""
    path = tmp_path / "every.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two files with an index and a configuration."""
    folder = tmp_path / "sharded"
    write_sharded(folder)
    return folder


def write_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Write two files with an index; return what is in them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    held = {name: torch.randn(8, 6, generator=generator) for name in ("a", "b", "c")}
    places = {"a": 1, "b": 1, "c": 2}
    files = {name: f"model-{place:05d}-of-00002.safetensors" for name, place in places.items()}
    for file in set(files.values()):
        save_file({name: held[name] for name in held if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 576}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return held


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of every read from a local file, from here on."""
    seen: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        got = preadv(descriptor, buffers, offset)
        seen.append((offset, got))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    return seen
