"""Edits of checkpoints: recipes of steps, the checkpoints they make, and live models that they change.

Names are imported when they are first used, so that settings can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffract.edits.dry_run import Preview, preview
    from diffract.edits.live import LiveModel
    from diffract.edits.output import Output
    from diffract.edits.recipe import Recipe, load_recipe, recipe_schema
    from diffract.edits.replay import verify
    from diffract.edits.settings import Interpolate, Laser, Lora, Merge, Pissa, Rewind, Svf, Truncate
    from diffract.edits.to_files import Edited, apply

_PLACES = {
    **dict.fromkeys(("Edited", "apply"), "to_files"),
    "LiveModel": "live",
    "Output": "output",
    **dict.fromkeys(("Preview", "preview"), "dry_run"),
    **dict.fromkeys(("Recipe", "load_recipe", "recipe_schema"), "recipe"),
    "verify": "replay",
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
