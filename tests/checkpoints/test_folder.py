import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.sources import is_plain_name
from diffract.errors import CheckpointError

Same = Callable[[torch.Tensor, torch.Tensor], bool]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refused(folder: Path, message: str) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value), "an error says where"
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "an error closes what it opened"


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_checkpoint(sharded: Path, same: Same, index: bool) -> None:
    if not index:
        (sharded / INDEX).unlink()
    expected = load_file(sharded / FIRST) | load_file(sharded / SECOND)
    with open_checkpoint(sharded) as found:
        assert found.reference == str(sharded)
        assert found.config == {"model_type": "tiny"}
        assert sorted(found) == ["a", "b", "c"]
        assert all(same(found[name], expected[name]) for name in found)
        assert Path(found.info("c").file).name == SECOND


def test_a_lone_file_reads_the_configuration_beside_it(sharded: Path) -> None:
    (sharded / FIRST).rename(sharded / "first.safetensors")
    with open_checkpoint(sharded / "first.safetensors") as found:
        assert sorted(found) == ["a", "b"]
        assert found.config == {"model_type": "tiny"}


def test_a_lone_file_may_carry_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(2)}, path, {"config": '{"model_type": "inside"}'})
    assert open_checkpoint(path).config == {"model_type": "inside"}
    save_file({"w": torch.ones(2)}, path, {"config": "{broken"})
    with pytest.raises(CheckpointError, match="config in its metadata is no JSON"):
        open_checkpoint(path)
    save_file({"w": torch.ones(2)}, path, {"config": "large"})
    assert open_checkpoint(path).config == {}


def test_the_single_file_is_taken_before_others(sharded: Path) -> None:
    save_file({"only": torch.ones(2)}, sharded / "model.safetensors")
    assert list(open_checkpoint(sharded)) == ["only"]


def test_the_index_decides_what_belongs(sharded: Path) -> None:
    save_file({"a": torch.ones(2)}, sharded / "consolidated.safetensors")
    assert sorted(open_checkpoint(sharded)) == ["a", "b", "c"]


def test_an_adapter_beside_the_weights_is_no_shard(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    save_file({"lora": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["w"]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, f"1 of 2 files are missing: {SECOND}")


def test_a_missing_number_is_noticed_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / FIRST).unlink()
    refused(sharded, f"missing: {FIRST}")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-4])
    refused(sharded, f"{SECOND}, tensor 'c'.*truncated")


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    save_file({"c": torch.ones(2), "a": torch.ones(2)}, sharded / SECOND)
    refused(sharded, f"'a' is in two files, .*{FIRST} and .*{SECOND}")


def test_a_promise_that_is_not_kept_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "c": SECOND, "lost": FIRST})
    refused(sharded, "promises 1 tensors that no file holds, first 'lost'")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "C:x",
        "a\nb",
        7,
        None,
    ],
)
def test_an_index_cannot_name_a_file_elsewhere(sharded: Path, name: object) -> None:
    save_file({"s": torch.ones(1)}, sharded.parent / "secret.safetensors")
    write_index(sharded, {"a": FIRST, "s": name})
    refused(sharded, "expected the name of a file in the same folder. Do not use")


def test_plain_names_are_plain() -> None:
    assert is_plain_name(FIRST)
    assert is_plain_name("größe..x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": ["a"]}', "expected a weight_map"),
        ("[" * 200_000, "is no JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(sharded: Path, content: str, message: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, f"{INDEX}.*{message}")


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe"])
def test_a_broken_configuration_is_refused(sharded: Path, content: bytes) -> None:
    (sharded / "config.json").write_bytes(content)
    refused(sharded, r"config\.json")


def test_a_configuration_may_begin_with_a_byte_order_mark(sharded: Path) -> None:
    (sharded / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "tiny"}')
    assert open_checkpoint(sharded).config == {"model_type": "tiny"}


def test_what_a_trainer_leaves_is_no_model(tmp_path: Path) -> None:
    torch.save({"lr": torch.ones(1)}, tmp_path / "training_args.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    refused(tmp_path, "holds no weights")


def test_a_link_that_leads_nowhere_is_named(sharded: Path) -> None:
    """As the hub's cache leaves them when a blob is deleted."""
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(sharded / "blobs" / "gone")
    refused(sharded, f"cannot open .*{SECOND}.*No such file")


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
