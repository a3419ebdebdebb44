"""Recipes and checkpoints that do not fit: one clear message, before weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffract.edits import Recipe, apply, recipe_schema
from diffract.edits.recipe import load_recipe
from diffract.errors import CheckpointError, DiffractError, RecipeError

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH = str(SAMPLES / "base"), str(SAMPLES / "math")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"steps": []}, "r.yaml, model: this setting is missing"),
        ({"model": "m", "stepps": []}, "r.yaml, stepps: unknown setting. Did you mean 'steps'"),
        ({"model": "m", "steps": [{"rewnd": {}}]}, "steps.0.rewnd: unknown setting. Did you mean 'rewind'"),
        ({"model": "m", "steps": [{"truncate": {"base": "b", "dorp": 1}}]}, "steps.0.truncate.dorp: unknown setting"),
        ({"model": "m", "steps": [{"truncate": {"base": "b"}}]}, "expected exactly one of drop, rank"),
        ({"model": "m", "steps": [{"truncate": {"base": "b", "drop": 2.0}}]}, "from 0 to 1; got 2.0"),
        ({"model": "m", "steps": [{"rewind": {"to": "b", "fraction": -1}}]}, "steps.0.rewind.fraction"),
        ({"model": "m", "steps": [{"rewind": {"to": "b"}}]}, "either a fraction or a list of heads"),
        ({"model": "m", "steps": [{"rewind": {"to": "b", "fraction": 0.1, "order": "greedy"}}]}, "needs scores"),
        ({"model": "m", "steps": [{"interpolate": {"with": "b", "at": "half"}}]}, "steps.0.interpolate.at"),
        ({"model": "m", "steps": [{"merge": {"models": {"a": "x"}, "method": "ties"}}]}, "needs a base"),
        ({"model": "m", "steps": [{"merge": {"models": {}, "method": "linear"}}]}, "steps.0.merge.models"),
        ({"model": "m", "steps": [{"laser": {"keep": 0.1}}]}, "steps.0.laser.select: this setting is missing"),
        ({"model": "m", "steps": [{"svf": {"select": "mlp"}}]}, "either z or a file of factors"),
        ({"model": "m", "steps": [{"svf": {"z": 1, "select": "a"}, "laser": {}}]}, "steps.0"),
        ({"model": "m", "export": {"lora": {"base": "b", "rank": 2, "energy": 0.5}}}, "one of rank, energy and rule"),
        ({"model": "m", "output": {"shard_size": "lots"}}, "output.shard_size: expected a size such as 5GB"),
        ({"model": "m", "output": {"dtype": "int8"}}, "output.dtype"),
        ([1], "expected model and steps, got list"),
    ],
)
def test_a_wrong_recipe_says_where(recipe: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("diffract.edits.to_files.open_bench", lambda _: pytest.fail("a checkpoint was opened"))
    with pytest.raises(RecipeError) as caught:
        apply("r.yaml", "out")
    assert message in str(caught.value)
    assert str(caught.value).startswith(("r.yaml", "recipe 'r.yaml'"))


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is no YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_the_schema_knows_every_step() -> None:
    schema = json.loads(recipe_schema())
    steps = schema["$defs"]["StepItem"]["properties"]
    assert {"rewind", "truncate", "interpolate", "merge", "laser", "svf"} == set(steps)
    assert schema["$defs"]["Rewind"]["properties"]["to"]["description"] == "The base."
    assert "with" in schema["$defs"]["Interpolate"]["properties"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (60, 32)}, r"embed_tokens.weight: \[50, 32\] against \[60, 32\]"),
        ({"drop": "model.layers.1.mlp.up_proj.weight"}, "up_proj.weight: only in the model"),
        ({"add": "model.layers.9.mlp.up_proj.weight"}, "layers.9.mlp.up_proj.weight: only in the other"),
        ({"config": {"num_attention_heads": 8, "num_key_value_heads": 4}}, "4 heads against 8"),
        ({"config": {"model_type": "qwen2"}}, "architecture llama against qwen2"),
    ],
    ids=["vocabulary", "a tensor less", "a tensor more", "heads", "architecture"],
)
def test_models_that_differ_are_refused(
    change: dict, message: str, family: tuple[Path, Path], write_model: Callable[..., Path], tmp_path: Path
) -> None:
    from tiny_llama import llama_tensors

    tensors = llama_tensors(3)
    if "shape" in change:
        tensors["model.embed_tokens.weight"] = torch.zeros(change["shape"]).bfloat16()
    tensors.pop(change.get("drop", ""), None)
    if "add" in change:
        tensors[change["add"]] = torch.zeros(4, 4)
    other = write_model("other", tensors, **change.get("config", {}))
    recipe = Recipe(model=str(family[1]), steps=[{"interpolate": {"with": str(other), "at": 0.5}}])  # pyright: ignore
    with pytest.raises(CheckpointError, match=message):
        apply(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"rewind": {"to": BASE, "heads": "L9.h0"}}, "no 'L9.h0' in this model, expected names from L0.h0 to L3.h7"),
        ({"rewind": {"to": BASE, "heads": " , "}}, "names nothing"),
        ({"rewind": {"to": BASE, "fraction": 0.5, "unit": "expert"}}, "no expert among"),
        ({"rewind": {"to": MATH, "fraction": 0.5, "order": "reference", "reference": BASE}}, "have no score"),
        ({"truncate": {"base": BASE, "drop": 0.5, "select": "atn"}}, "Did you mean 'attn'"),
        ({"svf": {"factors": str(SAMPLES / "base" / "model.safetensors")}}, "expected"),
    ],
)
def test_steps_that_do_not_fit_the_model(step: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DiffractError) as caught:
        apply({"model": MATH, "steps": [step]}, tmp_path / "out")
    assert message in str(caught.value)


def test_what_is_not_finite_is_named(
    family: tuple[Path, Path], write_model: Callable[..., Path], tmp_path: Path
) -> None:
    from tiny_llama import llama_tensors

    tensors = llama_tensors(3)
    tensors["lm_head.weight"][0, 0] = torch.inf
    broken = write_model("broken", tensors)
    step = {"truncate": {"base": str(family[0]), "drop": 0.5}}
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head.weight': .*finite"):
        apply({"model": str(broken), "steps": [step]}, tmp_path / "out")
