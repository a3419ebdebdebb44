"""Edits of checkpoints: recipes of steps, the checkpoints they make, and live models that they change.

Names are imported when they are first used, so that settings can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffract.edits.live import LiveModel
    from diffract.edits.recipe import Output, Recipe, load_recipe, recipe_schema
    from diffract.edits.settings import Interpolate, Laser, Lora, Merge, Pissa, Rewind, Svf, Truncate
    from diffract.edits.to_files import Edited, Preview, apply, preview, verify

_PLACES = {
    **dict.fromkeys(("Edited", "Preview", "apply", "preview", "verify"), "to_files"),
    "LiveModel": "live",
    **dict.fromkeys(("Output", "Recipe", "load_recipe", "recipe_schema"), "recipe"),
    **dict.fromkeys(("Interpolate", "Laser", "Lora", "Merge", "Pissa", "Rewind", "Svf", "Truncate"), "settings"),
}

__all__ = [
    "Edited",
    "Interpolate",
    "Laser",
    "LiveModel",
    "Lora",
    "Merge",
    "Output",
    "Pissa",
    "Preview",
    "Recipe",
    "Rewind",
    "Svf",
    "Truncate",
    "apply",
    "load_recipe",
    "preview",
    "recipe_schema",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffract.edits' has no attribute {name!r}")
    return getattr(import_module(f"diffract.edits.{_PLACES[name]}"), name)
