"""Studies: a family of checkpoints, all findings tested on it, one report."""

from diffract.studies.runner import StudyRun, load_study, run_study
from diffract.studies.settings import StudyRecipe

__all__ = ["StudyRecipe", "StudyRun", "load_study", "run_study"]
