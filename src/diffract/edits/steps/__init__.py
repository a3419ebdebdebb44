"""The steps of recipes, one file each."""

from diffract.edits.step import Step
from diffract.edits.steps.interpolate import Interpolate
from diffract.edits.steps.laser import Laser
from diffract.edits.steps.merge import Merge
from diffract.edits.steps.rewind import Rewind
from diffract.edits.steps.svf import Svf
from diffract.edits.steps.truncate import Truncate

STEPS: dict[str, type[Step]] = {s.name: s for s in (Rewind, Truncate, Interpolate, Merge, Laser, Svf)}
"""Every step by its name in a recipe."""

__all__ = ["STEPS", "Interpolate", "Laser", "Merge", "Rewind", "Svf", "Truncate"]
