"""The files beside a model's weights that belong to it: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial

from diffract.checkpoints.folder import Folder

CONFIG = "config.json"

PATTERNS = (
    *(CONFIG, "generation_config.json", "*processor_config.json", "configuration_*.py", "modeling_*.py"),
    *("tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "vocab-*", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
"""Names of what a loader may need besides weights, and of what says how the weights may be used."""


def find_companions(folder: Folder) -> dict[str, Callable[[], bytes]]:
    """Return a function that reads it for each file of a folder that belongs to its model."""
    wanted = (name for name in folder.names if any(fnmatchcase(name, pattern) for pattern in PATTERNS))
    return {name: partial(folder.read_bytes, name) for name in wanted}
