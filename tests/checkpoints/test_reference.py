import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffract.checkpoints import FLOATS, TensorInfo, open_checkpoint
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.checkpoints.header import ITEMSIZES
from diffract.errors import CheckpointError


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


def test_paths_are_text_or_paths(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(weights))
    monkeypatch.chdir(weights.parent)
    file = weights / "model.safetensors"
    for reference in (weights, str(weights), weights.name, f"./{weights.name}", "~", file, str(file), f"{weights}/"):
        assert list(open_checkpoint(reference)) == ["w"]


def test_a_folder_here_comes_before_a_name_on_the_hub(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, tmp_path / "org" / "model" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/model").reference == "org/model"
    assert hub.requests == []


@pytest.mark.parametrize("reference", ["org/model", "org/model@main", "org/model@refs/pr/1", "0rg_x/a.b-c@v1.0"])
def test_what_looks_like_a_name_on_the_hub_is_asked_for_there(hub: Any, reference: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{reference}: no file or folder of that name here, and no model"):
        open_checkpoint(reference)
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    "reference",
    [
        "gone",
        "./org/model",
        "/org/model",
        "a/b/../c",
        "org/model@",
        "org/model@a@b",
        "org/model@\x1b[31m",
        "org/mo del",
        "örg/model",
        "",
        "x" * 9000,
    ],
)
def test_anything_else_is_refused_without_asking(hub: Any, reference: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(reference)
    assert hub.requests == []
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_no_name_is_not_this_folder(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ``Path`` it is; to a user it is a variable that is not set."""
    monkeypatch.chdir(weights)
    with pytest.raises(CheckpointError, match="no checkpoint at ''"):
        open_checkpoint("")


def test_a_path_is_never_a_name_on_the_hub(hub: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at 'org/model'.*Check the name"):
        open_checkpoint(Path("org/model"))
    assert hub.requests == []


@pytest.mark.parametrize("reference", [None, 3, ["a"], "a\0b", b"model"], ids=repr)
def test_what_is_no_reference_is_refused(reference: Any) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint|no checkpoint at"):
        open_checkpoint(reference)


def test_a_home_that_is_nobodys_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        open_checkpoint("~nobody-of-this-name/model")


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.weights").write_bytes(b"????")
    with pytest.raises(
        CheckpointError, match=r"weights'.*expected \.safetensors, \.bin, \.pt, \.pth, \.ckpt, \.gguf or \.npz"
    ):
        open_checkpoint(tmp_path / "model.weights")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz")
    for name in ("x.safetensors", "x.npz"):
        with pytest.raises(CheckpointError, match=rf"{name}: the checkpoint holds no tensors"):
            open_checkpoint(tmp_path / name)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights \(\.safetensors, \.bin, \.pt"):
        open_checkpoint(tmp_path)


def test_safetensors_come_before_pytorch_files(weights: Path) -> None:
    torch.save({"old": torch.ones(1)}, weights / "pytorch_model.bin")
    assert list(open_checkpoint(weights)) == ["w"]


def test_both_sides_know_the_same_dtypes() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == ITEMSIZES
    assert all(TensorInfo("w", (2,), name).is_float for name in FLOATS)


def test_headers_are_read_without_torch(sharded: Path) -> None:
    """Loading torch takes seconds; looking at a model must not."""
    code = f"""
import sys
from diffract.checkpoints import open_checkpoint
with open_checkpoint({str(sharded)!r}) as found:
    assert [found.info(name).shape for name in found] == [(8, 6)] * 3
assert not {"torch", "huggingface_hub", "pydantic"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
