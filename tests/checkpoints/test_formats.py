"""Other formats and lone parts are named, with what to do; none is opened as if it were a whole model."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.formats import FORMATS
from diffract.checkpoints.gguf import BLOCKS
from diffract.checkpoints.quantised import FORMS
from diffract.errors import CheckpointError

NAMED = {
    "Flax": {"flax_model.msgpack": b"\x81\xa6params\x80"},
    "TensorFlow or Keras": {"tf_model.h5": b"\x89HDF\r\n\x1a\n" + bytes(50)},
    "Keras": {"model.weights.h5": b"\x89HDF\r\n\x1a\n"},
    "TensorFlow checkpoint": {"model.ckpt.index": b"x", "model.ckpt.data-00000-of-00001": b"x"},
    "ONNX": {"model.onnx": b"\x08\x0a" + bytes(50)},
    "Orbax": {"_METADATA": b"{}", "manifest.ocdbt": bytes(10)},
    "Git LFS": {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64},
    "Git LFS,": {"pytorch_model.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64},
    "llm.c": {"model_00000500.bin": (20240326).to_bytes(4, "little") + bytes(2000)},
    "llama2.c": {"model.bin": b"24ka" + bytes(100)},
    "NeMo": {"model.nemo": b"x"},
    "Paddle": {"model_state.pdparams": b"x"},
}


@pytest.mark.parametrize("kind", NAMED)
def test_other_formats_are_named(kind: str, tmp_path: Path) -> None:
    for name, content in NAMED[kind].items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"is .*{kind}.* not read: "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5", "model.onnx"])
def test_files_of_other_formats_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(CheckpointError, match="which is not read"):
        open_checkpoint(tmp_path / name)


PARTS = [
    ["consolidated.00.pth", "consolidated.01.pth"],
    ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
    ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"],
]


@pytest.mark.parametrize("names", PARTS)
def test_parts_of_a_parallel_model_are_no_model(names: list[str], tmp_path: Path) -> None:
    for name in names:
        torch.save({"w": torch.ones(2, 2)}, tmp_path / name)
    for reference in (tmp_path, tmp_path / names[0]):
        with pytest.raises(CheckpointError, match=r"parts of a parallel model.*Join them"):
            open_checkpoint(reference)


def test_ranks_of_megatron_are_parts(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"mp_rank_{rank:02d}").mkdir()
        torch.save({"model": {"w": torch.ones(2, 2)}}, tmp_path / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    for reference in ("mp_rank_00/model_optim_rng.pt", "mp_rank_01"):
        with pytest.raises(CheckpointError, match="one of 2 parts of a parallel model"):
            open_checkpoint(tmp_path / reference)
    with pytest.raises(CheckpointError, match="Its subfolders do: mp_rank_00, mp_rank_01"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "converter"),
    [("layer_00-model_00-model_states.pt", "GPT-NeoX"), ("model_world_size_4_rank_0.pt", "verl")],
)
def test_a_part_is_known_by_its_name_where_it_is_alone(name: str, converter: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / name)
    for reference in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"parts of a parallel model.*{converter}"):
            open_checkpoint(reference)


def test_what_does_not_begin_as_a_pickle_is_no_pytorch_file(tmp_path: Path) -> None:
    (tmp_path / "stories.bin").write_bytes((288).to_bytes(4, "little") + bytes(600))
    with pytest.raises(CheckpointError, match="does not begin as one"):
        open_checkpoint(tmp_path / "stories.bin")


def test_the_only_part_is_the_whole(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "consolidated.00.pth")
    torch.save({"module": {"w": torch.ones(2, 2)}}, tmp_path / "mp_rank_00_model_states.pt")
    for name in ("consolidated.00.pth", "mp_rank_00_model_states.pt"):
        with open_checkpoint(tmp_path / name) as found:
            assert list(found) == ["w"]


def test_one_shard_is_refused_by_its_path(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="one part of 3 of a model"):
        open_checkpoint(tmp_path / "model-00002-of-00003.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    assert list(open_checkpoint(tmp_path / "model-00001-of-00001.safetensors")) == ["w"]


def test_an_adapter_is_refused_by_its_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="factors of an adapter"):
        open_checkpoint(tmp_path / "adapter_model.safetensors")


def test_a_whole_model_beside_an_adapter_is_the_model(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "org/elsewhere"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        "base_model.model.w.lora_A.weight": torch.ones(1, 2),
        "base_model.model.w.lora_B.weight": torch.ones(2, 1),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    with open_checkpoint(tmp_path) as found:
        assert list(found) == ["w"]
        assert "adapter lies beside" in found.notes[0]


@pytest.mark.parametrize(
    ("method", "keep", "words"),
    [
        (zipfile.ZIP_DEFLATED, None, "compressed"),
        (zipfile.ZIP_STORED, 16, "fit its record"),
        (zipfile.ZIP_STORED, 0, "fit"),
    ],
)
def test_records_that_are_not_what_tensors_need_are_refused(
    method: int, keep: int | None, words: str, tmp_path: Path
) -> None:
    torch.save({"w": torch.ones(8, 8)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "bad.pt", "w", method) as bad,
    ):
        for name in good.namelist():
            bad.writestr(name, good.read(name)[: keep if "/data/" in name else None])
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "bad.pt")


def test_the_docs_name_every_format_and_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    blocks = [block.name for block in BLOCKS.values() if block.read]
    missing = [kind for kind in (*(known.kind for known in (*FORMATS, *FORMS)), *blocks) if kind not in page]
    assert not missing


def test_the_docs_say_since_when_each_row_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    tables = [part.splitlines() for part in page.split("\n\n") if "| tested since |\n|---" in part]
    assert len(tables) == 3  # what is read, what is named, what is quantised
    assert all(re.search(r"\| 20\d\d-\d\d-\d\d \|$", row) for _, _, *rows in tables for row in rows)


@pytest.mark.parametrize("offset", [0xFFFFFFFE, 10_000_000])
def test_a_directory_that_points_outside_its_file_is_refused(offset: int, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    entry = raw.index(b"PK\1\2")
    raw[entry + 42 : entry + 46] = offset.to_bytes(4, "little")
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        open_checkpoint(tmp_path / "x.pt")
