import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from diffract.checkpoints import TensorWriter, open_checkpoint
from diffract.errors import CheckpointError

Same = Callable[[torch.Tensor, torch.Tensor], bool]
INDEX = "model.safetensors.index.json"


def write_all(folder: Path, held: dict[str, torch.Tensor], shard_bytes: int = 1 << 30) -> None:
    with TensorWriter(folder, shard_bytes=shard_bytes) as writer:
        for name, tensor in held.items():
            writer.add(name, tensor)


def test_every_dtype_comes_back(tmp_path: Path, tensors: dict[str, torch.Tensor], same: Same) -> None:
    write_all(tmp_path / "out", tensors)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    reference = load_file(tmp_path / "out" / "model.safetensors")
    with open_checkpoint(tmp_path / "out") as found:
        assert set(found) == set(reference) == set(tensors)
        for name, tensor in tensors.items():
            assert same(found[name], tensor), name
            assert same(reference[name], tensor), name


def test_every_tensor_begins_at_a_multiple_of_its_itemsize(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Else a reader that maps the file cannot view it: safetensors itself, for one."""
    with TensorWriter(tmp_path) as writer:
        writer.add("odd", torch.ones(3, dtype=torch.uint8))
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    found = open_checkpoint(tmp_path)
    assert all(found.info(name).offset % found.info(name).itemsize == 0 for name in found)


def test_one_dtype_keeps_its_order(tmp_path: Path) -> None:
    with TensorWriter(tmp_path) as writer:
        for name in "cab":
            writer.add(name, torch.ones(2))
    assert list(open_checkpoint(tmp_path)) == ["c", "a", "b"]


def test_shards_have_an_index_that_transformers_would_write(tmp_path: Path, same: Same) -> None:
    held = {f"t{i}": torch.full((4, 8), float(i)) for i in range(7)}  # 128 bytes each
    write_all(tmp_path, held, shard_bytes=300)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 7 * 128}
    assert [index["weight_map"][f"t{i}"][6:11] for i in range(7)] == ["00001"] * 2 + ["00002"] * 2 + ["00003"] * 2 + [
        "00004"
    ]
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)] + [INDEX]
    with open_checkpoint(tmp_path) as found:
        assert all(same(found[name], held[name]) for name in held)
    for file in files[:-1]:
        with safetensors.safe_open(tmp_path / file, "pt") as reference:
            assert reference.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in reference.keys()} == {file}  # noqa: SIM118 (no mapping)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    with TensorWriter(tmp_path, shard_bytes=10) as writer:
        writer.add("small", torch.ones(2))
        writer.add("large", torch.ones(100))
        writer.add("small too", torch.ones(2))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert len(open_checkpoint(tmp_path)) == 3


def test_views_are_written_as_what_they_show(tmp_path: Path, same: Same) -> None:
    w = torch.arange(24.0).reshape(4, 6).requires_grad_()
    views = {"t": w.T, "part": w[1:3, ::2], "expanded": w[:1].expand(3, 6)}
    write_all(tmp_path, views)
    found = open_checkpoint(tmp_path)
    assert all(same(found[name], view.detach()) for name, view in views.items())


def test_odd_names_are_kept(tmp_path: Path) -> None:
    names = ["model/matrix.U", "größe", "", 'a"b\\', "\x1b"]
    with TensorWriter(tmp_path) as writer:
        for name in names:
            writer.add(name, torch.ones(1))
    assert list(open_checkpoint(tmp_path)) == names
    assert set(load_file(tmp_path / "model.safetensors")) == set(names)


def test_a_copy_of_a_checkpoint_is_equal_to_the_byte(sharded: Path, tmp_path: Path) -> None:
    with open_checkpoint(sharded) as source, TensorWriter(tmp_path / "copy") as writer:
        for name in source:
            writer.add(name, source[name])
    with open_checkpoint(sharded) as a, open_checkpoint(tmp_path / "copy") as b:
        assert {n: a.digest(n) for n in a} == {n: b.digest(n) for n in b}


def test_nothing_looks_whole_before_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with TensorWriter(folder, shard_bytes=8) as writer:
        for name in "abc":
            writer.add(name, torch.ones(2))
            assert not list(folder.glob("*.safetensors*"))
            with pytest.raises(CheckpointError, match="holds no"):
                open_checkpoint(folder)
    assert not list(folder.glob(".*")), "no draft is left"


def test_the_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: renamed.append(to.name) or rename(self, to))
    with TensorWriter(tmp_path, shard_bytes=8) as writer:
        for name in "ab":
            writer.add(name, torch.ones(2))
    assert renamed == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_aborted_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    folder = tmp_path / "out"

    def write() -> None:
        with TensorWriter(folder, shard_bytes=8) as writer:
            for name in "abc":
                writer.add(name, torch.ones(2))
            raise error

    with pytest.raises(error):
        write()
    assert not folder.exists()


def test_an_aborted_block_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def write() -> None:
        with TensorWriter(tmp_path) as writer:
            writer.add("a", torch.ones(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_without_a_tensor_nothing_is_written(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB: the system's own limit, whose error is of the kind of a full disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    message = r"cannot write to folder '.*out': File too large\. Make room"
    with pytest.raises(CheckpointError, match=message):
        write_all(folder, {f"t{i}": torch.ones(1000) for i in range(100)})
    assert not folder.exists()


@pytest.mark.parametrize("call", ["write_text", "rename"])
def test_a_disk_that_is_full_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    original, seen = getattr(Path, call), []

    def fails(self: Path, *args: str, **options: str) -> object:
        seen.append(self)
        if call == "write_text" or len(seen) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *args, **options)

    monkeypatch.setattr(Path, call, fails)
    folder = tmp_path / "out"
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_all(folder, {"a": torch.ones(2), "b": torch.ones(2)}, shard_bytes=8)
    assert seen
    assert not folder.exists()


def test_what_was_half_written_does_not_shift_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: Same
) -> None:
    """A caller may go on after a full disk; then what is there must still be right."""
    with TensorWriter(tmp_path) as writer:
        writer.add("a", torch.ones(5))
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limit[1]))
        with pytest.raises(CheckpointError, match="too large"):
            writer.add("b", torch.zeros(100_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        writer.add("c", torch.full((7,), 3.0))
    found = open_checkpoint(tmp_path)
    assert list(found) == ["a", "c"]
    assert same(found["c"], torch.full((7,), 3.0))


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_a_taken_name_is_refused(tmp_path: Path, name: str) -> None:
    with TensorWriter(tmp_path) as writer:
        writer.add("a", torch.ones(2))
        with pytest.raises(CheckpointError, match=f"the name '{name}' is taken"):
            writer.add(name, torch.ones(2))


def test_a_name_that_no_file_can_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError), TensorWriter(tmp_path / "out") as writer:
        writer.add("\ud800", torch.ones(2))
    assert not (tmp_path / "out").exists()


def test_a_dtype_without_counterpart_is_refused(tmp_path: Path) -> None:
    with (
        TensorWriter(tmp_path) as writer,
        pytest.raises(CheckpointError, match=r"safetensors has no torch\.complex128"),
    ):
        writer.add("z", torch.ones(2, dtype=torch.complex128))


@pytest.mark.parametrize("present", ["model.safetensors", "model-00001-of-00002.safetensors", INDEX])
def test_weights_are_never_overwritten_or_mixed(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("precious")
    with pytest.raises(CheckpointError, match=f"holds {present}. Choose another folder"):
        TensorWriter(tmp_path)
    assert (tmp_path / present).read_text() == "precious"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to folder '.*out': File exists"):
        TensorWriter(tmp_path / "out")
