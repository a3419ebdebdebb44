"""From a reference to a loaded model with its tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffract.edits import apply
from diffract.errors import CheckpointError, SelectionError
from diffract.evaluate import load_subject
from diffract.evaluate.model import model_digest
from tiny_language_model import CONTEXT, byte_tokenizer, tiny_model, write_language_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_language_model(tmp_path / "model")


def test_a_folder(folder: Path) -> None:
    subject = load_subject(folder)
    assert (subject.context, subject.start, subject.vocabulary) == (CONTEXT, [256], 257)
    assert not subject.model.training
    assert model_digest(subject.model) == model_digest(load_subject(tiny_model(), tokenizer=byte_tokenizer()).model)


def test_dtypes(folder: Path) -> None:
    """On a CPU bf16 weights are held as float32, which is the same weights."""
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    auto, half = load_subject(folder, device="cpu"), load_subject(folder, device="cpu", dtype="bfloat16")
    found = dict(auto.model.named_parameters())
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert all(torch.equal(found[n].bfloat16(), t) for n, t in tensors.items())
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_an_adapter_is_merged_into_its_base(folder: Path, tmp_path: Path) -> None:
    tuned = write_language_model(tmp_path / "tuned", seed=1)
    export = {"lora": {"base": str(folder), "rank": "full", "select": "attn"}}
    apply({"model": str(tuned), "export": export, "allow": "strangers"}, tmp_path / "adapter")
    places = (tmp_path / "adapter", folder, tuned)
    merged, base, other = (dict(load_subject(place).model.named_parameters()) for place in places)
    name = "model.layers.0.self_attn.q_proj.weight"
    # of full rank, so that the change is there whole but for the rounding of its float32 factors
    assert torch.allclose(merged[name], other[name], atol=1e-5)
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_a_loaded_model_stays_where_it_is() -> None:
    model = tiny_model().train()
    subject = load_subject(model, tokenizer=byte_tokenizer())
    assert subject.model is model
    assert not model.training
    with pytest.raises(CheckpointError, match="needs its tokenizer"):
        load_subject(model)


@pytest.mark.parametrize(
    ("reference", "options", "error", "text"),
    [
        ("/nowhere/at/all", {}, CheckpointError, "no checkpoint at '/nowhere/at/all'"),
        ("{tmp}/bare", {}, CheckpointError, "has no config.json"),
        ("{tmp}/lost", {}, CheckpointError, "1 tensors of the model are missing.*model.norm.weight"),
        ("{tmp}/broken", {}, CheckpointError, "cannot load the model of"),
        ("{tmp}/mute", {}, CheckpointError, "cannot load the tokenizer of .* Pass --tokenizer"),
        ("{tmp}/model", {"device": "tpu"}, SelectionError, "unknown device 'tpu', expected one of: auto, cpu"),
        ("{tmp}/model", {"dtype": "float23"}, SelectionError, "Did you mean 'float32'"),
    ],
)
def test_wrong_references(
    folder: Path, tmp_path: Path, reference: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, files in {"bare": (), "mute": ("config.json",), "lost": ("config.json", "tokenizer.json")}.items():
        (tmp_path / name).mkdir()
        kept = tensors if name != "lost" else {k: v for k, v in tensors.items() if k != "model.norm.weight"}
        save_file(kept, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        for file in files:
            (tmp_path / name / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(error, match=text):
        load_subject(reference.format(tmp=tmp_path), **options)


def test_without_transformers_one_error_names_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(CheckpointError, match=r"pip install 'diffract-llm\[train\]'"):
        load_subject(folder)
