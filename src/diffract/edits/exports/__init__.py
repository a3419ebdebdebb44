"""What a recipe can write instead of a checkpoint, one file each."""

from diffract.edits.exports.export import Export
from diffract.edits.exports.lora import Lora
from diffract.edits.exports.pissa import Pissa

__all__ = ["Export", "Lora", "Pissa"]
