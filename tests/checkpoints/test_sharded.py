"""Files whose tensors are written in parts, in any order, from several threads."""

import errno
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffract.checkpoints import TensorInfo, open_checkpoint
from diffract.checkpoints.dtypes import DTYPE_NAMES
from diffract.checkpoints.writer import ShardedWriter

Same = Callable[[torch.Tensor, torch.Tensor], bool]
INDEX = "model.safetensors.index.json"


def infos_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in tensors.items()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_dtype_comes_back(tmp_path: Path, tensors: dict[str, torch.Tensor], same: Same) -> None:
    with ShardedWriter(tmp_path, infos_of(tensors)) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert names(tmp_path) == ["model.safetensors"]
    reference = load_file(tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as found:
        assert set(found) == set(reference) == set(tensors)
        for name, tensor in tensors.items():
            assert same(found[name], tensor), name
            assert same(reference[name], tensor), name
            assert found.info(name).offset % found.info(name).itemsize == 0


def test_parts_in_any_order_from_many_threads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((31, 5), (17,), (9, 2, 3), (40, 8))
    held = {f"t{i}": torch.randn(shape, generator=generator).bfloat16() for i, shape in enumerate(shapes)}
    parts = [(name, first) for name, tensor in held.items() for first in range(0, len(tensor), 4)]
    random.Random(1).shuffle(parts)
    with ShardedWriter(tmp_path, infos_of(held), shard_bytes=700) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: writer.write(part[0], held[part[0]][part[1] : part[1] + 4], part[1]), parts))
    with open_checkpoint(tmp_path) as found:
        assert {name: found[name].tolist() for name in found} == {name: held[name].tolist() for name in held}


@pytest.mark.parametrize(
    ("limit", "shards"),
    [(1, [1, 1, 1, 1]), (128, [1, 1, 1, 1]), (256, [2, 2]), (383, [2, 2]), (384, [3, 1]), (512, [4])],
)
def test_a_file_holds_at_most_so_many_bytes(limit: int, shards: list[int], tmp_path: Path) -> None:
    """Or one tensor: each here has 128 bytes."""
    held = {f"t{i}": torch.full((4, 8), float(i)) for i in range(4)}
    with ShardedWriter(tmp_path, infos_of(held), shard_bytes=limit) as writer:
        for name, tensor in held.items():
            writer.write(name, tensor)
        files = [writer.file_of(name) for name in held]
    assert [files.count(file) for file in dict.fromkeys(files)] == shards
    with open_checkpoint(tmp_path) as found:
        assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    if len(shards) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index == {"metadata": {"total_size": 512}, "weight_map": dict(zip(held, files, strict=True))}
        count = len(shards)
        numbered = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        assert names(tmp_path) == [*numbered, INDEX]


def test_nothing_has_a_loadable_name_before_the_end(tmp_path: Path) -> None:
    held = {"a": torch.ones(3), "b": torch.ones(2)}
    with ShardedWriter(tmp_path, infos_of(held), shard_bytes=1) as writer:
        writer.write("a", held["a"])
        assert not [name for name in names(tmp_path) if name.endswith((".safetensors", ".json", ".bin", ".pt"))]


def test_after_an_error_nothing_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a descriptor stay open."""
    held = {"a": torch.ones(3), "b": torch.ones(2)}
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def write() -> None:
        with ShardedWriter(tmp_path, infos_of(held), shard_bytes=1) as writer:
            writer.write("a", held["a"])
            monkeypatch.setattr(os, "pwrite", full)
            writer.write("b", held["b"])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write()
    assert not [name for name in names(tmp_path) if not name.endswith(".partial")]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write less than it was given, of headers too."""
    held, real = {"a": torch.arange(100.0)}, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, memoryview(data)[:7], offset))
    with ShardedWriter(tmp_path, infos_of(held)) as writer:
        writer.write("a", held["a"])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], held["a"])
