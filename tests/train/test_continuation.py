"""Continual pre-training, what checkpoints are stored in, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diffract.analysis.timeline import read_place
from diffract.checkpoints.series import find_checkpoints
from diffract.errors import CorpusError, RecipeError
from diffract.train import preview_training, train
from diffract.train.records import read_log

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def base(recipe: Make, tmp_path: Path) -> Path:
    return train(recipe(save_dtype="bfloat16", optimizer={"rate": 0.02}), tmp_path / "base").final


def test_a_model_goes_on_in_its_own_dtype(recipe: Make, base: Path, tmp_path: Path) -> None:
    made = recipe(model={"init": str(base)}, tokenizer=None, checkpoints=[0])
    run = train(made, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(run.checkpoints[0] / "model.safetensors")
    assert all((after[name] == value).all() and value.dtype == torch.bfloat16 for name, value in before.items())
    assert before.keys() == after.keys()
    final = load_file(run.final / "model.safetensors")
    assert any((final[name] != value).any() for name, value in before.items())
    assert json.loads((run.final / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(run.final).dtype == torch.bfloat16
    assert read_log(run.log)[0]["loss"] < 5.2  # a new model has ln(280) = 5.6


def test_weights_are_trained_in_float32(recipe: Make, base: Path, tmp_path: Path) -> None:
    """A rate so small that a step is lost in bfloat16 changes what is stored in float32."""
    small = {"optimizer": {"rate": 1e-7}, "tokens": 64, "model": {"init": str(base)}, "tokenizer": None}
    stored = train(recipe(**small, save_dtype="float32"), tmp_path / "out").final
    before, after = load_file(base / "model.safetensors"), load_file(stored / "model.safetensors")
    changed = {name for name, value in before.items() if (after[name] != value.float()).any()}
    assert changed == before.keys()
    assert all((after[name].bfloat16() == value).float().mean() > 0.9 for name, value in before.items())


def test_a_tokenizer_of_another_model_is_refused(recipe: Make, base: Path, tmp_path: Path) -> None:
    made = recipe(model={"init": str(base)}, tokenizer={"train": {"vocabulary": 290}})
    with pytest.raises(RecipeError, match="the tokenizer has 290 tokens, the model 280"):
        train(made, tmp_path / "out")


def test_an_init_that_is_not_there_is_named(recipe: Make, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no tokenizer can be loaded from"):
        train(recipe(model={"init": str(tmp_path)}, tokenizer=None), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"model\.init: transformers refuses it"):
        train(recipe(model={"init": str(tmp_path)}, tokenizer=str(base)), tmp_path / "out")


def test_evaluation_data_is_refused_end_to_end(recipe: Make, texts: Path, tmp_path: Path) -> None:
    (texts / "gsm8k.test.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n' * 9)
    mix = {"math": {"sources": ["sums.jsonl", "gsm8k.test.jsonl"]}}
    with pytest.raises(CorpusError, match=r"gsm8k\.test\.jsonl is for evaluation only"):
        train(recipe(mix=mix), tmp_path / "out")
    with pytest.raises(CorpusError, match="evaluation only"):
        preview_training(recipe(mix=mix))


def test_checkpoints_tell_where_they_stand(recipe: Make, tmp_path: Path) -> None:
    run = train(recipe(checkpoints=[64, 300]), tmp_path / "out")
    places = [read_place([path.name]) for path in find_checkpoints(tmp_path / "out" / "checkpoints").paths]
    assert [(place.step, place.tokens) for place in places] == [(1, 64), (5, 320), (12, 768)]
    assert [place.tokens for place in places] == list(run.checkpoints)


def test_the_manifest_has_what_made_the_checkpoints(recipe: Make, tmp_path: Path) -> None:
    run = train(recipe(tokens=64), tmp_path / "out")
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert {"format", "kind", "diffract", "recipe", "versions", "text", "seconds", "device"} <= manifest.keys()
    assert manifest["recipe"]["context"] == 16
    for name, entry in manifest["checkpoints"].items():
        for file, digest in entry["files"].items():
            assert blake3.blake3((run.folder / "checkpoints" / name / file).read_bytes()).hexdigest() == digest
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= entry["files"].keys()


def test_the_log_has_every_step(recipe: Make, tmp_path: Path) -> None:
    seen = []
    run = train(recipe(), tmp_path / "out", progress=lambda *told: seen.append(told))
    lines = read_log(run.log)
    assert [line["tokens"] for line in lines] == list(range(64, 769, 64))
    assert lines[0]["rate"] == 4.0e-3  # one step of warm-up: 5% of twelve
    assert lines[-1]["rate"] == pytest.approx(4.0e-4)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert seen[-1] == (768, 768, f"loss {lines[-1]['loss']:.3f}")


def test_a_preview_says_what_would_be_done(recipe: Make, tmp_path: Path) -> None:
    made = recipe(checkpoints=[100])
    found = preview_training(made)
    model = AutoModelForCausalLM.from_pretrained(train(made, tmp_path / "out").final)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.steps, found.tokens, found.checkpoints) == (12, 768, [128, 768])
    assert sum(part["tokens"] for part in found.parts.values()) == 768
    stories = found.parts["stories"]
    assert stories["epochs"] == pytest.approx(stories["tokens"] / (stories["available"] // 16 * 16))
