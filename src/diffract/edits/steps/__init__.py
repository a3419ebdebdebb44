"""The steps of recipes, one file each."""

from diffract.edits.steps.interpolate import Interpolate
from diffract.edits.steps.laser import Laser
from diffract.edits.steps.merge import Merge
from diffract.edits.steps.rewind import Rewind
from diffract.edits.steps.svf import Svf
from diffract.edits.steps.truncate import Truncate

__all__ = ["Interpolate", "Laser", "Merge", "Rewind", "Svf", "Truncate"]
