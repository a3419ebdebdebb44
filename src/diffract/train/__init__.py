"""Pre-training and continual pre-training of causal language models, by recipes.

Names are imported when they are first used, so that settings can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffract.train.loop import TrainPreview, preview_training, train
    from diffract.train.recipe import TrainRecipe, load_train_recipe
    from diffract.train.records import TrainRun

_PLACES = {
    "TrainPreview": "loop",
    "TrainRecipe": "recipe",
    "TrainRun": "records",
    "load_train_recipe": "recipe",
    "preview_training": "loop",
    "train": "loop",
}

__all__ = ["TrainPreview", "TrainRecipe", "TrainRun", "load_train_recipe", "preview_training", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffract.train' has no attribute {name!r}")
    return getattr(import_module(f"diffract.train.{_PLACES[name]}"), name)
