import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffract.checkpoints import open_checkpoint
from diffract.errors import CheckpointError

Same = Callable[[torch.Tensor, torch.Tensor], bool]


class Bomb:
    """A pickle of it leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_every_dtype_comes_back(
    tmp_path: Path, tensors: dict[str, torch.Tensor], same: Same, suffix: str, zipped: bool
) -> None:
    if not zipped:  # torch writes no float8 in its old format
        tensors = {name: tensor for name, tensor in tensors.items() if "float8" not in str(tensor.dtype)}
    path = tmp_path / f"weights.{suffix}"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as found:
        assert list(found) == list(tensors)
        assert all(same(found[name], tensors[name]) for name in tensors)
        assert same(found.read("f64", (1, 3), (0, 2)), tensors["f64"][1:3, :2])


def test_weights_are_read_by_position(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(1000, 1000)}, path)
    found = open_checkpoint(path)
    reads.clear()
    assert found.read("w", (0, 2)).sum() == 2000
    assert sum(count for _, count in reads) == 8000


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {0: torch.ones(9)}}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": {"model": state}, "args": [1, 2]},
    ],
)
def test_wrappers_are_taken_off(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap({"layer.weight": torch.ones(2, 2)}), tmp_path / "x.pt")
    assert list(open_checkpoint(tmp_path / "x.pt")) == ["layer.weight"]


def test_a_part_called_model_is_no_wrapper(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "head": torch.ones(3)}, tmp_path / "x.pt")
    assert list(open_checkpoint(tmp_path / "x.pt")) == ["model.w", "head"]


def test_tied_tensors_are_recognised(tmp_path: Path) -> None:
    w = torch.ones(4, 2)
    torch.save({"embed": w, "head": w, "other": torch.ones(4, 2)}, tmp_path / "x.bin")
    assert open_checkpoint(tmp_path / "x.bin").tied == {"head": "embed"}


def test_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "step": 7, "note": "x"}, tmp_path / "x.pt")
    assert list(open_checkpoint(tmp_path / "x.pt")) == ["w"]


def write_shards(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"lr": torch.ones(1)}, folder / "training_args.bin")


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    with open_checkpoint(tmp_path) as found:
        assert sorted(found) == ["a", "b"]
        assert found["b"].tolist() == [0, 0]
        assert found.config == {"model_type": "tiny"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"missing: pytorch_model-00002-of-00002\.bin"):
        open_checkpoint(tmp_path)


def test_a_promise_that_is_not_kept_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = {"weight_map": dict.fromkeys("az", "pytorch_model-00001-of-00002.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="promises 1 tensors that no file holds, first 'z'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Bomb(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x\.pt' is refused.*would run code.*Save it as safetensors"):
        open_checkpoint(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the bomb would have gone off"


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="more than weights"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "cannot read"),
        (lambda raw: raw[:1], r"x\.pt"),
        (lambda raw: b"", r"x\.pt"),
        (lambda raw: b"PK" + raw[40:], "cannot read"),
        (lambda raw: b"hello, I am no pickle", r"x\.pt"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(200)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def rewritten(path: Path, change: Callable[[str, bytes], list[bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive of a file again, each record as what it is changed to."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings(action="ignore"):
        for name, raw in records:
            for content in change(name, raw):
                archive.writestr(name, content)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """Mapped as they lie there they would be other numbers."""
    torch.save({"w": torch.ones(200)}, tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", lambda name, raw: [raw], zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed, which"):
        open_checkpoint(tmp_path / "x.pt")


def test_short_records_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(200), "v": torch.ones(100)}, tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", lambda name, raw: [raw[:100] if name.endswith("data/0") else raw])
    with pytest.raises(CheckpointError, match="does not fit its record 0 of 100 bytes"):
        open_checkpoint(tmp_path / "x.pt")


def test_records_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """The directory of the archive is changed so that the second tensor lies where the first does."""
    torch.save({"w": torch.ones(64), "v": torch.zeros(64)}, tmp_path / "x.pt")
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        places = {info.filename: info.header_offset for info in archive.infolist()}
    first, second = (next(at for name, at in places.items() if name.endswith(f"data/{i}")) for i in (0, 1))
    at = raw.index(second.to_bytes(4, "little"), raw.index(b"PK\x01\x02"))
    raw[at : at + 4] = first.to_bytes(4, "little")
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_tensor_that_repeats_its_entries_to_any_size_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(200_000, 200_000)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"repeats its record of 4 bytes to 160 GB"):
        open_checkpoint(tmp_path / "x.pt")
    torch.save({"w": torch.arange(3.0).expand(4, 3)}, tmp_path / "y.pt")
    with open_checkpoint(tmp_path / "y.pt") as found:
        assert torch.equal(found["w"], torch.arange(3.0).expand(4, 3))


@pytest.mark.parametrize("held", [torch.ones(3), [torch.ones(3)], {"step": 1}, {}], ids=repr)
def test_what_holds_no_named_tensors_is_refused(tmp_path: Path, held: Any) -> None:
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors, expected a state dict"):
        open_checkpoint(tmp_path / "x.pt")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(2)}, "a.b": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"two values are called 'a\.b'"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt.*'w'.*Pass dense arrays"):
        open_checkpoint(tmp_path / "x.pt")
