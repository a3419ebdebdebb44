"""Folders that edits write: whole or not at all, and honest about what is in them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import diffract
from diffract.edits import Interpolate, Recipe, Rewind, apply, verify
from diffract.errors import CheckpointError, DiffractError, RunError

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH, CODE = (str(SAMPLES / name) for name in ("base", "math", "code"))
STEP = Rewind(to=BASE, heads="L0.h1,L2.h5")


def make(folder: Path, **recipe: object) -> Path:
    return apply(Recipe(**{"model": MATH, "steps": [STEP], **recipe}), folder).folder  # pyright: ignore


def test_shards_are_opened_by_everyone(tmp_path: Path) -> None:
    whole, sharded = make(tmp_path / "whole"), make(tmp_path / "sharded", output={"shard_size": "300KB"})
    files = sorted(sharded.glob("model-*.safetensors"))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 300_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
    with diffract.open(whole) as one, diffract.open(sharded) as other:
        assert {n: one.digest(n) for n in one.names} == {n: other.digest(n) for n in other.names}
    loaded = [tf.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, sharded)]
    assert all(torch.equal(value, loaded[1][name]) for name, value in loaded[0].items())


def test_another_dtype(tmp_path: Path) -> None:
    out = make(tmp_path / "out", output={"dtype": "float32"})
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    with diffract.open(out) as wide, diffract.open(make(tmp_path / "plain")) as plain:
        assert all(torch.equal(wide[n], plain[n].float()) for n in plain.names)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = os.pwrite, []

    def full(*arguments: object) -> int:
        calls.append(1)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)  # pyright: ignore

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"No space left.*Make room"):
        make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from diffract.edits import Recipe, Rewind, apply
step = Rewind(to=sys.argv[2], fraction=0.5)
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
apply(Recipe(model=sys.argv[1], steps=[step]), sys.argv[3], progress=kill)
"""


def test_a_killed_run_leaves_nothing_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, MATH, BASE, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    (draft,) = tmp_path.iterdir()
    assert draft.name.startswith("out.tmp-")
    with pytest.raises(CheckpointError):
        diffract.open(draft)
    with pytest.raises(ValueError, match="Unrecognized model"):
        tf.AutoModelForCausalLM.from_pretrained(draft)
    make(out)
    assert list(tmp_path.iterdir()) == [out]


def test_what_somebody_else_is_writing_is_left_alone(tmp_path: Path) -> None:
    from diffract.store import whole_folder

    with whole_folder(tmp_path / "out") as draft:
        with whole_folder(tmp_path / "out") as other:
            assert other != draft
            (other / "manifest.json").write_text("{}")
        assert draft.is_dir()
        (tmp_path / "out" / "manifest.json").unlink()


def test_existing_folders(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with pytest.raises(RunError, match="exists"):
        make(out)
    apply(Recipe(model=MATH), out, force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"no manifest\.json of diffract"):
        apply(Recipe(model=MATH), other, force=True)


def test_truth_is_confirmed(tmp_path: Path) -> None:
    found = verify(make(tmp_path / "out"), replay=True)
    assert (found.tensors, found.faults, found.unchecked) == (46, [], [])
    assert found.inputs == 46 + 2 * 3  # of the base q, o and the norm of queries in two layers


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def add(path: Path) -> None:
    save_file({**load_file(path), "extra": torch.zeros(1)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda out: flip(out / "model.safetensors"), "is not what it was"),
        (lambda out: add(out / "model.safetensors"), "'extra' is not in the manifest"),
        (lambda out: (out / "recipe.yaml").write_text("model: other\n"), "'recipe.yaml' is not what it was"),
        (lambda out: (out / "tokenizer.json").unlink(), "'tokenizer.json' is missing"),
    ],
    ids=["a byte", "a tensor more", "the recipe", "a file less"],
)
def test_lies_are_found(lie: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    lie(out)
    faults = verify(out).faults
    assert len(faults) == 1
    assert message in faults[0]


def test_inputs_that_changed_or_went(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, model=BASE, steps=[])
    out = make(tmp_path / "out", steps=[Interpolate(other=str(base), at=0.5)])
    flip(base / "model.safetensors")
    assert any("input" in fault and "is not what it was" in fault for fault in verify(out).faults)
    (base / "model.safetensors").unlink()
    found = verify(out)
    assert found.faults == []
    assert "input" in found.unchecked[0]


def test_a_recipe_that_was_not_followed_is_found(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["recipe"]["steps"][0]["rewind"]["heads"] = "L0.h2"
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert verify(out).faults == []
    assert any("the recipe gives another one" in fault for fault in verify(out, replay=True).faults)


@pytest.mark.parametrize("part", ["outputs", "files"])
def test_a_manifest_cannot_lead_outside(part: str, tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest[part]["../../secret"] = {} if part == "outputs" else "0"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside of it"):
        verify(out)


EMPTY = {"kind": "diffract edit", "format": 1, "outputs": {}, "inputs": {}, "files": {}}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"kind": "another"}', json.dumps({**EMPTY, "format": 99})),
        *(json.dumps({**EMPTY, key: value}) for key in ("outputs", "inputs", "files") for value in (3, {"a": 3})),
    ],
)
def test_other_manifests_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DiffractError):
        verify(tmp_path)


def test_a_written_recipe_gives_the_same_again(tmp_path: Path) -> None:
    first = make(tmp_path / "first", steps=[STEP, Interpolate(other=CODE, at=0.25)])
    again = apply(first / "recipe.yaml", tmp_path / "again")
    stated = [json.loads((folder / "manifest.json").read_text()) for folder in (first, again.folder)]
    assert stated[0] == stated[1]
