"""What a recipe may write instead of a checkpoint."""

from diffract.edits.step import Step

EXPORTS: dict[str, type[Step]] = {}
