"""The page on training says what recipes can say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from diffract.train import TrainRecipe, load_train_recipe
from diffract.train.recipe import MixPart, Optimizer, Schedule

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")


def test_the_recipe_on_the_page_is_one() -> None:
    text = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    made = load_train_recipe(yaml.safe_load(text))
    assert made.steps == 489
    assert made.stops == (123, 245, 489)


@pytest.mark.parametrize("name", list(TrainRecipe.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    assert f"\n| `{name}` |" in PAGE


@pytest.mark.parametrize("name", [*Schedule.model_fields, *Optimizer.model_fields, *MixPart.model_fields])
def test_every_setting_within_is_documented(name: str) -> None:
    assert f"`{name}`" in PAGE
