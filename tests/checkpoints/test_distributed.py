"""Distributed checkpoints: written by torch itself, and in pieces that lie in two files."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import _StorageInfo

from diffract.api import trajectory
from diffract.checkpoints import open_checkpoint
from diffract.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODEL = {"layer.weight": torch.arange(24.0).reshape(4, 6), "layer.bias": torch.ones(6).bfloat16()}
ADAM = {"state": {"layer.weight": {"exp_avg": torch.ones(4, 6)}}, "param_groups": [{"lr": 1.0}]}


@pytest.mark.parametrize(
    ("state", "aside"),
    [
        ({"model": MODEL}, set()),
        (MODEL, set()),
        ({"model": MODEL, "optim": ADAM, "step": 3}, {"optim.state.layer.weight.exp_avg"}),
        ({"app": {"model": MODEL, "optim": ADAM}}, {"app.optim.state.layer.weight.exp_avg"}),
    ],
)
def test_what_torch_writes_is_read(state: dict[str, Any], aside: set[str], tmp_path: Path) -> None:
    dcp.save(state, checkpoint_id=tmp_path)
    with open_checkpoint(tmp_path) as found:
        assert sorted(found) == sorted(MODEL)
        for name, value in MODEL.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
        assert torch.equal(found.read("layer.weight", (1, 3)), MODEL["layer.weight"][1:3])
        assert set(found.set_aside) == aside


def test_steps_of_other_layouts_are_found(tmp_path: Path) -> None:
    for step in (1, 2):
        dcp.save({"model": MODEL}, checkpoint_id=tmp_path / f"run/step{step}/model_and_optim")
        (tmp_path / f"run/step{step}/config.json").write_text('{"model": {}}')
    assert len(trajectory(tmp_path / "run", cache=False).models) == 2
    dcp.save({"model": MODEL}, checkpoint_id=tmp_path / "checkpoint-5/pytorch_model_fsdp_0")
    (tmp_path / "checkpoint-5/config.json").write_text('{"model_type": "tiny"}')
    with open_checkpoint(tmp_path / "checkpoint-5") as found:
        assert sorted(found) == sorted(MODEL)
        assert found.config == {"model_type": "tiny"}


WHOLE = torch.arange(60.0).reshape(6, 10)
CUTS = [((0, 0), (4, 7)), ((0, 7), (4, 3)), ((4, 0), (2, 10))]


def write_pieces(folder: Path) -> None:
    """Write a tensor in three pieces, two files: what several ranks leave, without several processes."""
    data, places, chunks = {"__0_0.distcp": b"", "__1_0.distcp": b""}, {}, []
    for number, (offsets, sizes) in enumerate(CUTS):
        rows, columns = (slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
        written, name = io.BytesIO(), f"__{number % 2}_0.distcp"
        torch.save(WHOLE[rows, columns].clone(), written)
        place = _StorageInfo(name, len(data[name]), len(written.getvalue()))
        places[parts.MetadataIndex("w", torch.Size(offsets), number)] = place
        data[name] += written.getvalue()
        chunks.append(parts.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    tensor = parts.TensorStorageMetadata(parts.TensorProperties(torch.float32), WHOLE.shape, chunks)
    held = parts.Metadata({"w": tensor}, planner_data={"w": ("model", "w")}, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(held))
    for name, content in data.items():
        (folder / name).write_bytes(content)


def test_pieces_are_one_tensor(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    with open_checkpoint(tmp_path) as found:
        assert torch.equal(found["w"], WHOLE)
        for rows in ((0, 1), (3, 5), (4, 6), (5, 6)):
            assert torch.equal(found.read("w", rows), WHOLE[slice(*rows)])


def test_of_each_piece_only_wanted_rows_are_read(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    dcp.save({"model": {"w": torch.ones(1000, 100)}}, checkpoint_id=tmp_path)
    with open_checkpoint(tmp_path) as found:
        found.read("w", (0, 1))
        reads.clear()
        assert found.read("w", (10, 20)).shape == (10, 100)
        assert sum(count for _, count in reads) == 4000


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"a piece of 'w' is missing: the file __1_0\.distcp"):
        open_checkpoint(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    os.truncate(tmp_path / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)


def test_missing_pieces_are_noticed(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    held = pickle.loads((tmp_path / ".metadata").read_bytes())
    held.state_dict_metadata["w"].chunks.pop()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(held))
    with pytest.raises(CheckpointError, match="some are missing"):
        open_checkpoint(tmp_path)


class Bomb:
    """A pickle of it leaves a folder behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_the_metadata_does_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="would run code"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("raw", [b"", b"nothing", pickle.dumps({"a": 1}), pickle.dumps([])])
def test_damaged_metadata_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        open_checkpoint(tmp_path)


def write_slices(folder: Path, count: int = 2) -> None:
    for number, rows in enumerate(WHOLE.chunk(count)):
        places = {"w": {"saved_offsets": [number * len(rows), 0]}}
        name = f"shard-{number + 1:05d}-model-00001-of-00001.safetensors"
        save_file({"w": rows.clone()}, folder / name, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)})


def test_slices_in_safetensors_are_joined(tmp_path: Path) -> None:
    write_slices(tmp_path, 3)
    with open_checkpoint(tmp_path) as found:
        assert torch.equal(found["w"], WHOLE)
        assert torch.equal(found.read("w", (1, 5)), WHOLE[1:5])


def test_one_slice_is_refused(tmp_path: Path) -> None:
    write_slices(tmp_path)
    with pytest.raises(CheckpointError, match="one part of a distributed model"):
        open_checkpoint(tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="some are missing"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="some are missing"):
        open_checkpoint(tmp_path / "shard-00002-model-00001-of-00001.safetensors")
