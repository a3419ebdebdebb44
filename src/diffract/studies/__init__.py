"""Studies: a family of checkpoints, all findings tested on it, one report."""

from diffract.studies.recipe import StudyRecipe
from diffract.studies.runner import load_study, run_study

__all__ = ["StudyRecipe", "load_study", "run_study"]
