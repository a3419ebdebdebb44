import gc
import os
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffract.checkpoints import Checkpoint, open_checkpoint, row_blocks, tensor_digest
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.checkpoints.files import LocalFile, LocalFolder
from diffract.checkpoints.header import HEADER_LIMIT, TensorInfo
from diffract.errors import CheckpointError

Same = Callable[[torch.Tensor, torch.Tensor], bool]


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A file of one layer's stacked heads: 8 heads of 16 rows, 64 columns, bf16; and another tensor."""
    w = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    path = tmp_path / "wide.safetensors"
    save_file({"q": w, "other": torch.ones(1000, 10)}, path)
    return path, w


def test_every_dtype_reads_as_safetensors_reads_it(file: Path, same: Same) -> None:
    with open_checkpoint(file) as found, safe_open(file, "pt") as reference:
        assert set(found) == set(reference.keys())
        for name in found:
            assert same(found[name], reference.get_tensor(name)), name


def test_rows_and_columns_are_those_of_safetensors(file: Path, same: Same) -> None:
    with open_checkpoint(file) as found, safe_open(file, "pt") as reference:
        for name in ("f64", "bf16", "e4m3"):
            part = reference.get_slice(name)[2:5, 1:3]
            assert same(found.read(name, (2, 5), (1, 3)), part)
        assert same(found.read("stack", (1, 2)), reference.get_slice("stack")[1:2])
        assert same(found.read("stack", cols=(3, 4)), reference.get_tensor("stack")[..., 3:4])


def test_one_head_reads_the_bytes_of_one_head(
    wide: tuple[Path, torch.Tensor], reads: list[tuple[int, int]], same: Same
) -> None:
    path, w = wide
    with open_checkpoint(path) as found:
        header = sum(length for _, length in reads)
        assert header < path.stat().st_size / 10, "opening reads the header only"
        reads.clear()
        assert same(found.read("q", (48, 64)), w[48:64])
        offset = found.info("q").offset
    assert reads == [(offset + 48 * 128, 16 * 128)]


def test_a_digest_depends_on_bytes_shape_and_dtype_only(tmp_path: Path, wide: tuple[Path, torch.Tensor]) -> None:
    path, w = wide
    others = {"renamed": w, "flat": w.reshape(-1).clone(), "cast": w.view(torch.float16).clone()}
    save_file(others, tmp_path / "same.safetensors")
    with open_checkpoint(path) as a, open_checkpoint(tmp_path / "same.safetensors") as b:
        digest = a.digest("q")
        assert len(digest) == 64
        assert b.digest("renamed") == digest == tensor_digest(a.info("q"), w)
        assert len({digest, b.digest("flat"), b.digest("cast")}) == 3
        assert open_checkpoint({"x": w}).digest("x") == digest


def test_a_large_tensor_is_digested_in_blocks(
    wide: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, reads: list[tuple[int, int]]
) -> None:
    path, w = wide
    with open_checkpoint(path) as found:
        whole = found.digest("q")
        reads.clear()
        monkeypatch.setattr(row_blocks, "__defaults__", (1000,))
        assert found.digest("q") == whole == tensor_digest(found.info("q"), w)
    assert max(length for _, length in reads) <= 1000


def test_row_blocks_cover_a_tensor_once() -> None:
    info = TensorInfo("w", (10, 100), "F32")
    blocks = list(row_blocks(info, 1300))
    assert blocks == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(row_blocks(info, 10)) == [(i, i + 1) for i in range(10)], "one row at least"
    assert list(row_blocks(info, 4000)) == [None]
    assert list(row_blocks(TensorInfo("s", (), "F32"), 1)) == [None]


@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [
        ("f64", (0, 7), None),
        ("f64", (-1, 3), None),
        ("f64", (3, 3), None),
        ("f64", (4, 2), None),
        ("f64", None, (0, 5)),
        ("scalar", (0, 1), None),
        ("scalar", None, (0, 1)),
        ("empty", (0, 1), None),
    ],
)
def test_a_range_outside_a_tensor_is_refused(
    file: Path, name: str, rows: tuple[int, int] | None, cols: tuple[int, int] | None
) -> None:
    with open_checkpoint(file) as found, pytest.raises(CheckpointError, match=f"{name}.*empty or outside"):
        found.read(name, rows, cols)


def test_is_a_mapping(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(file) as found:
        assert len(found) == len(tensors)
        assert sorted(found) == sorted(found.names) == sorted(found.keys()) == sorted(tensors)
        assert "f64" in found
        assert "f65" not in found
        assert found.get("f65") is None
        assert found == found  # noqa: PLR0124 (equality with itself is what is tested)
        assert found != open_checkpoint(file), "comparing must not read every tensor"
        assert len({found, found}) == 1
        assert dict(found.items()).keys() == tensors.keys()
        assert repr(found) == f"Checkpoint({str(file)!r}, {len(tensors)} tensors)"


def test_an_unknown_name_suggests_a_near_one(file: Path) -> None:
    with open_checkpoint(file) as found, pytest.raises(CheckpointError, match=r"'bf17'.*'bf16'") as caught:
        found.read("bf17")
    assert isinstance(caught.value, KeyError)


def test_floats_are_analysed_and_the_others_listed(file: Path) -> None:
    with open_checkpoint(file) as found:
        listed = {name for name in found if not found.info(name).is_float}
    assert listed == {"i64", "i32", "i16", "i8", "u8", "bool"}


def test_a_dtype_that_this_torch_does_not_have_is_listed_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch before 2.7 has no float8_e8m0fnu."""
    save_file({"scale": torch.ones(4, dtype=torch.float8_e8m0fnu)}, tmp_path / "x.safetensors")
    monkeypatch.delitem(TORCH_DTYPES, "F8_E8M0")
    found = open_checkpoint(tmp_path / "x.safetensors")
    assert found.info("scale").size_bytes == 4
    with pytest.raises(CheckpointError, match=r"'scale': this torch has no F8_E8M0\. Update torch"):
        found.read("scale")


def test_threads_read_one_checkpoint(wide: tuple[Path, torch.Tensor], same: Same) -> None:
    path, w = wide
    with open_checkpoint(path) as found, ThreadPoolExecutor(8) as pool:
        starts = [i % 8 * 16 for i in range(400)]
        parts = list(pool.map(lambda start: found.read("q", (start, start + 16)), starts))
    assert all(same(part, w[start : start + 16]) for part, start in zip(parts, starts, strict=True))


def test_nothing_is_read_after_closing(file: Path) -> None:
    with open_checkpoint(file) as found:
        kept = found.read("f64")
    found.close()
    with pytest.raises(CheckpointError, match=r"is closed\. Keep the checkpoint open"):
        found.read("f64")
    assert kept.isfinite().all(), "what was read stays"


def test_a_forgotten_checkpoint_closes_its_file(file: Path) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (an iterator would hold a descriptor itself)

    before = open_files()
    found: Checkpoint | None = open_checkpoint(file)
    assert found is not None
    assert open_files() == before + 1
    found = None
    assert open_files() == before


def test_a_damaged_file_stays_not_open(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError, match=r"every\.safetensors.*truncated") as caught:
        open_checkpoint(file)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, f"closed while {caught.type} is looked at"


def test_a_file_that_shrinks_says_so(wide: tuple[Path, torch.Tensor]) -> None:
    path, _ = wide
    with open_checkpoint(path) as found:
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match=r"wide\.safetensors.*shrank"):
            found.read("q")


def test_a_file_stays_the_same_when_another_takes_its_name(wide: tuple[Path, torch.Tensor], same: Same) -> None:
    path, w = wide
    with open_checkpoint(path) as found:
        save_file({"q": torch.zeros(128, 64)}, path.with_name("new"))
        path.with_name("new").rename(path)
        assert same(found["q"], w)


def test_short_reads_are_taken_up_again(
    wide: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, same: Same
) -> None:
    """The system may return less than was asked for; Linux never returns more than 2 GiB at once."""
    path, w = wide
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:777]], offset))
    with open_checkpoint(path) as found:
        assert same(found["q"], w)


def test_a_read_error_names_the_file(wide: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with open_checkpoint(wide[0]) as found:
        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(CheckpointError, match=r"wide\.safetensors.*Input/output error"):
            found.read("q")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open .*gone.*No such file"):
        LocalFile(tmp_path / "gone")


def test_a_folder_lists_its_files_and_broken_links(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_text("")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder_link").symlink_to(tmp_path / "sub")
    assert LocalFolder(tmp_path).names == ["a", "b", "broken"]
    with pytest.raises(CheckpointError, match="cannot list"):
        LocalFolder(tmp_path / "gone")


def test_a_configuration_is_never_huge(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(HEADER_LIMIT + 1)
    with pytest.raises(CheckpointError, match="too many"):
        LocalFolder(tmp_path).read_bytes("config.json")


def test_a_configuration_that_would_fill_memory_is_refused(file: Path) -> None:
    with (file.parent / "config.json").open("wb") as config:
        config.write(b'{"model_type": "' + b"a" * (1 << 24) + b'"}')
    with pytest.raises(CheckpointError, match="too many for a configuration"):
        open_checkpoint(file.parent)


def test_a_file_that_is_written_to_while_it_is_read_is_refused(file: Path) -> None:
    with open_checkpoint(file) as found:
        found.read("f64")
        os.utime(file, ns=(0, 0))
        with pytest.raises(CheckpointError, match="was written to while it was read"):
            found.read("f64")


def test_another_file_of_the_same_name_does_not_matter(file: Path) -> None:
    with open_checkpoint(file) as found:
        first = found.read("f64")
        shutil.copy(file, file.with_name("copy"))
        file.with_name("copy").rename(file)
        assert torch.equal(found.read("f64"), first)


def test_more_files_than_descriptors_are_read(tmp_path: Path) -> None:
    for number in range(80):
        save_file({f"w{number}": torch.ones(2)}, tmp_path / f"part-{number}.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, hard))
    try:
        with open_checkpoint(tmp_path) as found:
            assert len(found) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
