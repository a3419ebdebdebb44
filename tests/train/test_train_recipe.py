"""What a recipe may say, and one clear message where it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from diffract.errors import DiffractError, RecipeError
from diffract.train import TrainRecipe, load_train_recipe, train
from diffract.train.records import read_log

Make = Callable[..., dict[str, Any]]


def test_a_file_and_its_settings_are_one_recipe(recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    assert load_train_recipe(path) == load_train_recipe(recipe())
    assert TrainRecipe.model_validate(load_train_recipe(path).as_dict()) == load_train_recipe(path)


def test_steps_are_whole(recipe: Make) -> None:
    made = load_train_recipe(recipe(tokens=700, checkpoints=[0, 1, 64, 65, 700]))
    assert made.steps == 11  # of 64 tokens
    assert made.stops == (0, 1, 2, 11)
    assert made.shares == {"stories": 0.75, "sums": 0.25}


def test_rates_differ_for_new_models_and_those_that_go_on(recipe: Make) -> None:
    assert load_train_recipe(recipe()).rate == 4.0e-3
    assert load_train_recipe(recipe(model={"init": "base"})).rate == 4.0e-4
    assert load_train_recipe(recipe(optimizer={"rate": "1e-5"})).rate == 1e-5  # YAML takes 1e-5 for text


def test_settings_need_no_torch(recipe: Make) -> None:
    code = "import json, sys; from diffract.train import load_train_recipe; load_train_recipe(json.loads(sys.argv[1]))"
    code += "; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, json.dumps(recipe())]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokns": 5}, r"tokns: unknown setting. Did you mean 'tokens'"),
        ({"mix": {"a": {"sources": ["x"], "shares": 1}}}, r"mix\.a\.shares: unknown setting. Did you mean 'share'"),
        ({"mix": {"a": {"sources": []}}}, r"mix\.a\.sources: .* at least 1 item"),
        ({"mix": {"a": {"sources": ["x"], "share": 0}}}, r"mix\.a\.share: .*greater than 0, got '0'"),
        ({"mix": {}}, r"mix: .* at least 1 item"),
        ({"model": {}}, "either a config or an init"),
        ({"model": {"config": {"hidden_size": 8}}}, "needs a model_type"),
        ({"tokenizer": None}, "a new model needs a tokenizer"),
        (
            {"tokenizer": {"train": {"vocabulary": 256}}},
            r"tokenizer\.train\.vocabulary: .*than or equal to 257",
        ),
        ({"tokenizer": {}}, "either train or a path"),
        ({"batch_tokens": 100}, "batch_tokens 100 is no multiple of the context, 16"),
        ({"checkpoints": [1000]}, "a checkpoint at 1,000 tokens comes after the end, 768"),
        ({"schedule": {"warmup": 0.9}}, "warmup and decay are 1.1 of the steps"),
        ({"schedule": {"kind": "linear"}}, r"schedule\.kind: .*'wsd', 'cosine' or 'constant'"),
        ({"optimizer": {"rate": float("nan")}}, r"optimizer\.rate"),
        ({"precision": "fp16"}, r"precision: .*'bf16'"),
        ({"log": ["mlflow"]}, r"log\.0: .*'trackio'"),
        ({"tokens": "many"}, "tokens: .*valid integer.*got 'many'"),
    ],
)
def test_wrong_settings_get_one_clear_error(recipe: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_train_recipe(recipe(**changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "olmo22"}, "transformers knows no 'olmo22'. Did you mean 'olmo2'"),
        ({"model_type": "olmo2", "hiden_size": 8}, "olmo2 has no 'hiden_size'. Did you mean 'hidden_size'"),
        ({"model_type": "olmo2", "hidden_size": "wide"}, "transformers refuses it: .*hidden_size"),
        ({"model_type": "olmo2", "vocab_size": 100}, r"the tokenizer has 280 tokens, the model 100: .* own tokenizer"),
        ({"model_type": "olmo2", "max_position_embeddings": 8}, "context 16: the model takes 8 tokens at most"),
    ],
)
def test_models_that_cannot_be_leave_no_run(recipe: Make, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(recipe(model={"config": config}), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_recipe_must_be_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- model\n")
    with pytest.raises(RecipeError, match="expected model, mix and tokens, got list"):
        load_train_recipe(path)
    with pytest.raises(RecipeError, match="expected a recipe, its settings or a file, got int"):
        load_train_recipe(3)  # pyright: ignore[reportArgumentType]


def test_without_the_extra_the_message_says_what_to_install(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffract.train.recipe.find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(DiffractError, match=r"training needs accelerate: pip install 'diffract-llm\[train\]'"):
        train(recipe(), tmp_path / "out")


def test_a_tracker_that_is_not_there_is_named(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(DiffractError, match="wandb is not installed: pip install wandb"):
        train(recipe(log=["wandb"]), tmp_path / "out")


def test_losses_are_sent_to_trackers(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int | None, float]] = []

    class Kept(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False

        def __init__(self, run_name: str) -> None:
            super().__init__()
            self.run_name = run_name

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert values["context"] == 16

        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            sent.append((step, values["loss"]))

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    run = train(recipe(log=["tensorboard"]), tmp_path / "out")
    assert sent == [(line["step"], line["loss"]) for line in read_log(run.log)]
