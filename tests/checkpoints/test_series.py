"""Which parts of a folder are checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffract.checkpoints.series import find_checkpoints, trainer_state
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


def test_folders_that_a_trainer_has_not_renamed_yet_are_left_out(tmp_path: Path) -> None:
    staged = ["tmp-checkpoint-500", "checkpoint-600.tmp", "step-7-staging", "checkpoint-8.incomplete"]
    make(tmp_path, *(f"{name}/model.safetensors" for name in [*staged, "checkpoint-100", "attempt-2"]))
    assert names(tmp_path) == (["attempt-2", "checkpoint-100"], sorted(f"{name}/" for name in staged))


def test_the_model_may_lie_further_down(tmp_path: Path) -> None:
    make(
        tmp_path,
        "global_step_10/actor/huggingface/model.safetensors",
        "global_step_10/actor/optim.pt",
        "global_step_10/critic/huggingface/model.safetensors",
        "global_step_20/weights/model.safetensors",
        "global_step_30/one/model.safetensors",
        "global_step_30/two/model.safetensors",
        "a/b/c/d/model.safetensors",
    )
    found = find_checkpoints(tmp_path)
    inside = [path.relative_to(tmp_path).as_posix() for path in found.paths]
    assert inside == ["global_step_10/actor/huggingface", "global_step_20/weights"]
    assert found.left_out == ["a/", "global_step_30/"]  # which of two is meant nobody can tell


def test_refs_of_the_hubs_cache_are_checkpoints(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    make(cache, *(f"snapshots/{digit * 40}/model.safetensors" for digit in "ab"), f"snapshots/{'c' * 40}/README.md")
    for name, digit in {"main": "b", "step1": "a", "step2": "b", "step3": "c", "step4": "d"}.items():
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(digit * 40)
    found = find_checkpoints(cache)
    assert {path.name[0]: name for path, name in found.called.items()} == {"a": "step1", "b": "step2"}
    assert found.paths == list(found.called)
    assert found.left_out == ["refs/step3", "refs/step4", "refs/main"]
    make(tmp_path, "empty/snapshots/x/README.md", "empty/refs/main")
    with pytest.raises(CheckpointError, match="no revision with weights"):
        find_checkpoints(tmp_path / "empty")


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
