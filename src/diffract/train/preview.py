"""What a training run would do, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffract.train.extra import require_extra
from diffract.train.settings import TrainRecipe, load_train_recipe


@dataclass(frozen=True)
class TrainPreview:
    """What a training run would do.

    Attributes:
        parameters: Of the model; tied ones count once.
        vocabulary: Tokens that the tokenizer has.
        steps: Updates of the weights.
        batch_tokens: Tokens of a step.
        tokens: Of all steps.
        parts: For each part of the mix its share, the tokens that are there and that are taken, and how many epochs
            that makes.
        checkpoints: Tokens after which one is written.
    """

    parameters: int
    vocabulary: int
    steps: int
    batch_tokens: int
    tokens: int
    parts: dict[str, dict[str, float]]
    checkpoints: list[int]


def preview_training(recipe: TrainRecipe | Mapping[str, Any] | str | Path) -> TrainPreview:
    """Say what a training run would do; text is tokenised for it, and kept in the cache.

    Args:
        recipe: One, its settings, or the YAML file that it stands in.

    Raises:
        RecipeError: The recipe is wrong, or does not fit the model.
        CorpusError: Text cannot be read, is for evaluation only, or is too short.
    """
    recipe = load_train_recipe(recipe)
    require_extra()
    from diffract.train.mixture import make_mixture
    from diffract.train.model import count_parameters
    from diffract.train.streams import token_streams
    from diffract.train.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(recipe)
    parameters = count_parameters(recipe, tokenizer)
    mixture = make_mixture(recipe, token_streams(recipe, tokenizer))
    taken, epochs = mixture.tokens(), mixture.epochs()
    parts = {
        name: {"share": share, "available": mixture.available[name], "tokens": taken[name], "epochs": epochs[name]}
        for name, share in recipe.shares.items()
    }
    counts = [step * recipe.batch_tokens for step in recipe.stops]
    return TrainPreview(
        parameters, len(tokenizer), recipe.steps, recipe.batch_tokens, counts[-1], parts, checkpoints=counts
    )
