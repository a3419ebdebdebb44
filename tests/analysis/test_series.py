"""From what is named to checkpoints in order, each with a name and a place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffract.analysis.timeline import Milestone, find_series
from diffract.errors import CheckpointError, SelectionError


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A trainer's folder: steps in names, tokens in notes; files are empty, as none is opened here."""
    for step in (1000, 500, 1500):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        state = {"global_step": step, "num_input_tokens_seen": 10 * step if step > 500 else 0}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path / "run"


def names(*references: object, by: str = "step") -> list[str]:
    return [stop.name for stop in find_series(references, by)[0]]


def test_a_trainers_folder(trained: Path) -> None:
    stops, warnings = find_series([str(trained)], "step")
    assert [stop.name for stop in stops] == ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]
    assert [stop.place for stop in stops] == [
        Milestone(None, 500),
        Milestone(None, 1000, 10_000),
        Milestone(None, 1500, 15_000),
    ]
    assert warnings == []


def test_notes_place_what_has_no_number(trained: Path) -> None:
    (trained / "checkpoint-1500").rename(trained / "final")
    assert names(trained) == ["checkpoint-500", "checkpoint-1000", "final"]
    (trained / "final" / "trainer_state.json").write_text(json.dumps({"global_step": True}))
    with pytest.raises(SelectionError, match=r"first .*final.*\(looked at 'final', 'trainer_state.json'\)"):
        names(trained)


def test_weights_beside_the_checkpoints_are_left_out_aloud(trained: Path) -> None:
    (trained / "model.safetensors").touch()
    (trained / "runs").mkdir()
    stops, warnings = find_series([trained], "step")
    assert len(stops) == 3
    assert warnings == [f"{trained}: 3 checkpoints; left out are model.safetensors, runs/."]


def test_folders_around_a_model_tell_its_step(tmp_path: Path) -> None:
    for step in (20, 100):
        (tmp_path / "run" / f"global_step_{step}" / "actor" / "huggingface").mkdir(parents=True)
        (tmp_path / "run" / f"global_step_{step}" / "actor" / "huggingface" / "model.safetensors").touch()
    stops, _ = find_series([tmp_path / "run"], "step")
    assert [stop.place.step for stop in stops] == [20, 100]
    given, _ = find_series([tmp_path / "run" / f"global_step_{step}" / "actor" for step in (100, 20)], "step")
    assert [stop.name for stop in given] == ["global_step_20/actor", "global_step_100/actor"]


def test_refs_of_the_hubs_cache_are_names_and_places(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    for step in (1000, 20):
        (cache / "refs" / f"step{step}").write_text(f"{step:040}")
        (cache / "snapshots" / f"{step:040}").mkdir(parents=True)
        (cache / "snapshots" / f"{step:040}" / "model.safetensors").touch()
    assert names(cache) == ["step20", "step1000"]


def test_revisions_are_names_and_places() -> None:
    repo = "EleutherAI/pythia-70m"
    stops, _ = find_series([f"{repo}@step{n}" for n in (1000, 0, 512)], "step")
    assert [stop.name for stop in stops] == ["step0", "step512", "step1000"]
    assert [stop.reference for stop in stops] == [f"{repo}@step{n}" for n in (0, 512, 1000)]


def test_repositories_that_are_steps() -> None:
    repos = ["org/Tiny-1.1B-intermediate-step-100k-200B", "org/Tiny-1.1B-step-50K-105b"]
    stops, _ = find_series(repos, "step")
    assert [(stop.name, stop.place.step) for stop in stops] == [
        ("Tiny-1.1B-step-50K-105b", 50_000),
        ("Tiny-1.1B-intermediate-step-100k-200B", 100_000),
    ]


def test_one_name_in_several_places_becomes_longer(tmp_path: Path) -> None:
    assert names("a/m@main", "b/n@main", by="given") == ["m@main", "n@main"]
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.safetensors").touch()
    both = [tmp_path / folder / "w.safetensors" for folder in ("x", "y")]
    assert names(*both, by="given") == ["x/w.safetensors", "y/w.safetensors"]
    assert names("a/m@main", "a/m@main", by="given") == ["m@main", "m@main-2"]
    assert names("main=a/m@v2", "a/m@main", by="given") == ["main", "m@main"]


def test_a_given_name_tells_first() -> None:
    stops, _ = find_series(["step143000=org/m@main", "org/m@step1000", "step500=org/m@step9"], "step")
    assert [(stop.name, stop.place.step) for stop in stops] == [
        ("step500", 500),
        ("step1000", 1000),
        ("step143000", 143_000),
    ]
    with pytest.raises(SelectionError, match="two checkpoints are called 'a'"):
        find_series(["a=org/m@x", "a=org/m@y"], "given")


def test_the_usual_file_is_called_after_its_folder(trained: Path) -> None:
    files = [trained / f"checkpoint-{step}" / "model.safetensors" for step in (1000, 500)]
    stops, _ = find_series(files, "step")
    assert [(stop.name, stop.place) for stop in stops] == [
        ("checkpoint-500", Milestone(None, 500)),
        ("checkpoint-1000", Milestone(None, 1000, 10_000)),
    ]


def test_links_are_called_as_they_are_written(trained: Path, tmp_path: Path) -> None:
    for step in (7, 8):
        (tmp_path / f"step{step}").symlink_to(trained / f"checkpoint-{500 * (step - 6)}", target_is_directory=True)
    stops, _ = find_series([tmp_path / "step8", tmp_path / "step7"], "step")
    assert [(stop.name, stop.place.step) for stop in stops] == [("step7", 7), ("step8", 8)]
    assert names(trained / "checkpoint-500" / ".", trained / "checkpoint-500" / ".." / "checkpoint-1000") == [
        "checkpoint-500",
        "checkpoint-1000",
    ]


def test_a_pattern_searches_names_then_the_whole_reference() -> None:
    found = ["runs/e2/ba10/hf", "runs/e1/ba30/hf", "runs/e1/ba20/hf"]
    stops, _ = find_series(found, r"e(?P<stage>\d+)/ba(?P<step>\d+)")
    assert [stop.reference for stop in stops] == [found[2], found[1], found[0]]
    assert [stop.place for stop in stops] == [Milestone(1, 20), Milestone(1, 30), Milestone(2, 10)]


def test_arrays_have_no_place(tmp_path: Path) -> None:
    arrays = [{"w": np.eye(2)}, {"w": np.eye(2)}]
    assert names(*arrays, by="given") == ["checkpoint-0", "checkpoint-1"]
    with pytest.raises(SelectionError, match="looked at nothing: it has no name"):
        names(*arrays)


@pytest.mark.parametrize("references", [[], ["org/m@step1"], [{"w": np.eye(2)}]])
def test_one_checkpoint_is_no_trajectory(references: list) -> None:
    with pytest.raises(CheckpointError, match=rf"at least two checkpoints, got {len(references)}"):
        find_series(references, "step")


def test_a_folder_with_one_is_none_either(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"got 1, .*model\.safetensors"):
        find_series([tmp_path], "step")


@pytest.mark.parametrize("bad", ["", "\0", "x" * 5000, "~nobody-of-this-name/x"])
def test_odd_names_are_left_to_opening(bad: str) -> None:
    stops, _ = find_series([bad, "org/m@step1"], "given")
    assert stops[0].reference == bad
