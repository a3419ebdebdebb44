"""Manifests: what is stated is compared, and what lies about itself is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.provenance import KIND, read_manifest, verify_folder, write_manifest
from diffract.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output of two tensors that was made of an input of one."""
    out = tmp_path / "out"
    out.mkdir()
    save_file({"x": torch.ones(2, 2)}, tmp_path / "in.safetensors")
    save_file({"a": torch.ones(2, 2), "b": torch.zeros(3)}, out / "model.safetensors")
    (out / "config.json").write_text("{}")
    state(out)
    return out


def state(out: Path) -> None:
    """Write the truth about a folder."""
    source = out.parent / "in.safetensors"
    with open_checkpoint(out) as made, open_checkpoint(source) as given:
        outputs = {".": {name: made.digest(name) for name in made}}
        write_manifest(out, {"outputs": outputs, "inputs": {str(source): {"x": given.digest("x")}}})


def change(out: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    edit(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_the_truth(folder: Path) -> None:
    found = verify_folder(folder)
    assert (found.tensors, found.inputs, found.faults, found.unchecked) == (2, 1, [], [])
    manifest = read_manifest(folder)
    assert manifest["kind"] == KIND
    assert list(manifest["files"]) == ["config.json"]


def rewrite(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda out: save_file(tensors, out / "model.safetensors")


A, B = torch.ones(2, 2), torch.zeros(3)
OTHER = torch.ones(2, 2) * 2

FAULTS: dict[str, tuple[Callable[[Path], Any], str, int, int]] = {
    "a changed tensor": (rewrite({"a": OTHER, "b": B}), "tensor 'a' is not what it was", 1, 1),
    "another dtype": (rewrite({"a": A.double(), "b": B}), "tensor 'a' is not what it was", 1, 1),
    "another shape": (rewrite({"a": A.reshape(4), "b": B}), "tensor 'a' is not what it was", 1, 1),
    "a missing tensor": (rewrite({"a": A}), "tensor 'b' is missing", 1, 1),
    "an extra tensor": (rewrite({"a": A, "b": B, "c": OTHER}), "tensor 'c' is not in the manifest", 2, 1),
    "a changed file": (lambda out: (out / "config.json").write_text("{} "), "file 'config.json' is not what", 2, 1),
    "a missing file": (lambda out: (out / "config.json").unlink(), "file 'config.json' is missing", 2, 1),
    "a changed input": (
        lambda out: save_file({"x": OTHER}, out.parent / "in.safetensors"),
        "in.safetensors, tensor 'x' is not what it was",
        2,
        0,
    ),
    "a tensor gone from an input": (
        lambda out: save_file({"y": A}, out.parent / "in.safetensors"),
        "in.safetensors, tensor 'x' is missing",
        2,
        0,
    ),
    "a hostile name": (rewrite({"a": A, "b": B, "\x1b[2J": OTHER}), "tensor '\\\\x1b[2J' is not in", 2, 1),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_found(kind: str, folder: Path) -> None:
    spoil, message, tensors, inputs = FAULTS[kind]
    spoil(folder)
    found = verify_folder(folder)
    assert len(found.faults) == 1
    assert message in found.faults[0]
    assert (found.tensors, found.inputs) == (tensors, inputs)
    assert found.unchecked == []


def test_one_flipped_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify_folder(folder).faults == ["tensor 'b' is not what it was"]


@pytest.mark.parametrize("outputs", [{}, {".": {}}, {"a": {}, "b": {}}])
def test_a_manifest_without_digests_says_nothing_is_right(outputs: dict[str, Any], folder: Path) -> None:
    change(folder, set_to("outputs", value=outputs))
    with pytest.raises(CheckpointError, match="with digests of outputs"):
        verify_folder(folder)


def test_files_that_the_manifest_does_not_know_are_told(folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    change(folder, set_to("files", value={}))
    found = verify_folder(folder)
    assert found.faults == []
    assert found.unchecked == [
        "file 'config.json': the manifest has no digest of it",
        "file 'notes.md': the manifest has no digest of it",
    ]


def test_weights_beside_those_of_the_manifest_are_told(folder: Path) -> None:
    with open_checkpoint(folder) as made:
        digests = {name: made.digest(name) for name in made}
    change(folder, set_to("outputs", value={"model.safetensors": digests}))
    save_file({"c": torch.ones(2)}, folder / "other.safetensors")
    assert verify_folder(folder).unchecked == ["file 'other.safetensors': the manifest has no digest of it"]


def test_an_input_that_is_gone_is_no_fault(folder: Path) -> None:
    (folder.parent / "in.safetensors").unlink()
    found = verify_folder(folder)
    assert found.faults == []
    assert len(found.unchecked) == 1
    assert "in.safetensors" in found.unchecked[0]


def test_weights_that_are_gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        verify_folder(folder)


def test_a_pipe_is_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"no readable manifest\.json"):
        verify_folder(folder)


def set_to(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        here = manifest
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value

    return edit


OUTSIDE = {
    "a file above": set_to("files", "../in.safetensors", value="0"),
    "a file elsewhere": set_to("files", "/etc/passwd", value="0"),
    "weights above": set_to("outputs", "../in.safetensors", value={}),
    "weights elsewhere": set_to("outputs", "/etc", value={}),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_names_outside_the_folder_are_refused(kind: str, folder: Path) -> None:
    change(folder, OUTSIDE[kind])
    with pytest.raises(CheckpointError, match="outside of it"):
        verify_folder(folder)


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent / "in.safetensors")
    with pytest.raises(CheckpointError, match="outside of it"):
        verify_folder(folder)


STRANGE: dict[str, tuple[str | bytes | None, str]] = {
    "none": (None, "no readable manifest.json"),
    "no JSON": ("{", "is no JSON"),
    "no text": (b"\xff\xfe\x00", "is no JSON"),
    "a list": ("[]", "belongs to no edited checkpoint"),
    "a run's": ('{"format": 1, "kind": "scan"}', "belongs to no edited checkpoint"),
    "a newer one": (f'{{"format": 2, "kind": "{KIND}", "outputs": {{}}, "inputs": {{}}, "files": {{}}}}', "format 2"),
    "without outputs": (
        f'{{"format": 1, "kind": "{KIND}", "inputs": {{}}, "files": {{}}}}',
        "of format 1, expected 1 with digests",
    ),
    "outputs of no digests": (
        f'{{"format": 1, "kind": "{KIND}", "outputs": {{".": 3}}, "inputs": {{}}, "files": {{}}}}',
        "expected",
    ),
    "inputs of no digests": (
        f'{{"format": 1, "kind": "{KIND}", "outputs": {{}}, "inputs": {{"in": ["x"]}}, "files": {{}}}}',
        "expected",
    ),
    "deep": ("[" * 100_000, "is no JSON"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_manifest(kind: str, folder: Path) -> None:
    content, message = STRANGE[kind]
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        verify_folder(folder)
