"""Which parts of a folder are checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffract.checkpoints.open import find_checkpoints, trainer_state
from diffract.errors import CheckpointError


def make(folder: Path, *names: str) -> Path:
    """Empty files: only names count."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names(folder: Path) -> tuple[list[str], list[str]]:
    found = find_checkpoints(folder)
    return [p.name for p in found.paths], found.left_out


def test_files_of_one_folder_are_several_checkpoints(tmp_path: Path) -> None:
    make(
        tmp_path,
        "step_2.safetensors",
        "step_1.safetensors",
        "step_3.npz",
        "global_step4.pt",
        "optimizer.pt",
        "README.md",
        ".x.pt",
    )
    expected = ["global_step4.pt", "step_1.safetensors", "step_2.safetensors", "step_3.npz"]
    assert names(tmp_path) == (expected, [])


def test_subfolders_with_weights_come_first(tmp_path: Path) -> None:
    make(
        tmp_path,
        "checkpoint-5/model.safetensors",
        "checkpoint-10/pytorch_model-00001-of-00002.bin",
        "checkpoint-15/adapter_config.json",
        "checkpoint-20/optimizer.pt",
        "logs/events",
        ".cache/model.safetensors",
        "model.safetensors",
        "training_args.bin",
    )
    left_out = [
        "model.safetensors",
        "checkpoint-20/",
        "logs/",
    ]  # a checkpoint without weights is not passed over in silence
    assert names(tmp_path) == (["checkpoint-10", "checkpoint-15", "checkpoint-5"], left_out)


def test_a_link_to_another_checkpoint_is_none(tmp_path: Path) -> None:
    make(tmp_path, "run/checkpoint-5/model.safetensors", "run/checkpoint-9/model.safetensors", "far/model.safetensors")
    (tmp_path / "run" / "latest").symlink_to("checkpoint-9", target_is_directory=True)
    (tmp_path / "run" / "zero").symlink_to(tmp_path / "far", target_is_directory=True)
    assert names(tmp_path / "run")[0] == ["checkpoint-5", "checkpoint-9", "zero"]


def test_shards_are_no_checkpoints(tmp_path: Path) -> None:
    make(tmp_path / "plain", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    make(tmp_path / "index", "a.safetensors", "b.safetensors", "model.safetensors.index.json")
    for folder in ("plain", "index"):
        with pytest.raises(CheckpointError, match=r"no checkpoints in folder .*expected subfolders with weights"):
            find_checkpoints(tmp_path / folder)


def test_what_was_found_instead_is_listed(tmp_path: Path) -> None:
    make(tmp_path, *(f"{c}.txt" for c in "abcdef"))
    (tmp_path / "logs" / "empty").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"Found a\.txt, b\.txt, c\.txt, d\.txt, e\.txt and 2 more\."):
        find_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="Found nothing"):
        find_checkpoints(tmp_path / "logs" / "empty")


def test_the_trainers_note(tmp_path: Path) -> None:
    make(tmp_path, "a/model.safetensors", "b/model.safetensors", "b/other.safetensors")
    state = {"global_step": 7, "num_input_tokens_seen": 0}
    (tmp_path / "b" / "trainer_state.json").write_text(json.dumps(state))
    assert trainer_state(tmp_path / "a") == {}
    assert trainer_state(tmp_path / "b") == trainer_state(tmp_path / "b" / "model.safetensors") == state
    assert trainer_state(tmp_path / "b" / "other.safetensors") == {}
    (tmp_path / "b" / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        trainer_state(tmp_path / "b")
