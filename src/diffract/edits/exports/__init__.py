"""What a recipe can write instead of a checkpoint, one file each."""

from diffract.edits.exports.export import Exported, Exporter, Split, Target
from diffract.edits.exports.lora import plan_lora, write_lora
from diffract.edits.exports.pissa import plan_pissa, write_pissa
from diffract.edits.settings import Lora, Pissa, Settings

EXPORTERS: dict[type[Settings], Exporter] = {
    Lora: Exporter(plan_lora, write_lora),
    Pissa: Exporter(plan_pissa, write_pissa),
}

__all__ = ["EXPORTERS", "Exported", "Exporter", "Split", "Target"]
