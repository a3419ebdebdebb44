"""Edits of checkpoints: recipes of steps, the checkpoints they make, and live models that they change.

Names are imported when they are first used, so that settings can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffract.edits.adapter_audit import Audit, audit
    from diffract.edits.live import LiveModel
    from diffract.edits.recipe import (
        Delta,
        Interpolate,
        Laser,
        Lora,
        Merge,
        Output,
        Pissa,
        Recipe,
        Rewind,
        Scale,
        Svf,
        Truncate,
        load_recipe,
        recipe_schema,
    )
    from diffract.edits.to_files import Edited, EditPreview, apply, preview, verify

_PLACES = {
    "LiveModel": "live",
    **dict.fromkeys(("Audit", "audit"), "adapter_audit"),
    **dict.fromkeys(("EditPreview", "Edited", "apply", "preview", "verify"), "to_files"),
}
"""Names that need torch, and where they are; all others are settings."""

__all__ = [
    "Audit",
    "Delta",
    "EditPreview",
    "Edited",
    "Interpolate",
    "Laser",
    "LiveModel",
    "Lora",
    "Merge",
    "Output",
    "Pissa",
    "Recipe",
    "Rewind",
    "Scale",
    "Svf",
    "Truncate",
    "apply",
    "audit",
    "load_recipe",
    "preview",
    "recipe_schema",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in __all__:
        raise AttributeError(f"module 'diffract.edits' has no attribute {name!r}")
    return getattr(import_module(f"diffract.edits.{_PLACES.get(name, 'recipe')}"), name)
