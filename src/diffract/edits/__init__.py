"""Edits of checkpoints: operations on tensors, recipes of steps, checkpoints and live models that they change."""

from diffract.edits.apply import Edited, apply
from diffract.edits.exports import Lora, Pissa
from diffract.edits.live import LiveModel
from diffract.edits.output import Output
from diffract.edits.recipe import Recipe, load_recipe, recipe_schema
from diffract.edits.steps import Interpolate, Laser, Merge, Rewind, Svf, Truncate

__all__ = [
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
    "Svf",
    "Truncate",
    "apply",
    "load_recipe",
    "recipe_schema",
]
