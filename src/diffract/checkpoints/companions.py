"""What belongs to a model besides its weights: all that lies with them and that a loader, or a reader, may need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import PurePosixPath

from diffract.checkpoints.sources import CONFIG, TRAINER, Folder
from diffract.errors import CheckpointError

KNOWN = (
    *(CONFIG, "generation_config.json", "*processor_config.json", "*.py", "modules.json", "*Pooling/config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "tekken.json"),
    *("vocab.*", "vocab-*", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
"""Names of what changes how a model reads, computes or may be used."""

WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".keras", ".npz"),
    *(".npy", ".msgpack", ".ot", ".params", ".tflite", ".mlmodel", ".mlpackage", ".distcp", ".nemo", ".pdparams"),
)
"""How files of weights end, whoever reads them."""

LEFT = (
    *(
        "*.index.json",
        "*.pkl",
        "*.pickle",
        "*.joblib",
        "*.dill",
        "*.pyc",
        "events.out*",
        "*.lock",
        "*.partial",
    ),
    *("adapter_config.json", "adapter_model*", "README.md", "recipe.yaml", "manifest.json"),
)
"""What is left as well: indexes, pickles, logs, an adapter's files, and what an edited model has of its own."""

Read = Callable[[], bytes]


def find_companions(folder: Folder) -> dict[str, Read]:
    """Return a function that reads it for each file that belongs to a folder's model, subfolders included.

    A subfolder with weights is another model, or the same one in another form, and stays where it is; but where
    ``modules.json`` lists it, it is a part of this one (sentence-transformers' dense layers), weights and all.
    """
    modules = _modules(folder)
    nested = [name for name in folder.nested if not name.startswith(("checkpoint-", "global_step", "step", "wandb/"))]
    apart = {str(PurePosixPath(name).parent) for name in nested if name.endswith(WEIGHTS)} - modules
    wanted = [name for name in folder.names if _belongs(name)]
    for name in nested:
        parents = [str(parent) for parent in PurePosixPath(name).parents]
        weights = parents[0] in modules and name.endswith(".safetensors")
        if not any(parent in apart for parent in parents) and (weights or _belongs(name)):
            wanted.append(name)
    return _readers(folder, wanted)


def find_neighbours(folder: Folder) -> dict[str, Read]:
    """Return the same for a file of weights that was opened alone: files beside it that any loader knows."""
    return _readers(folder, (name for name in folder.names if is_known(name)))


def is_known(name: str) -> bool:
    """Whether a file changes how a model reads, computes or may be used; others are notes."""
    return any(fnmatchcase(name, pattern) for pattern in KNOWN)


def _readers(folder: Folder, names: Iterable[str]) -> dict[str, Read]:
    return {name: partial(folder.read_bytes, name) for name in names if folder.holds(name)}


def _belongs(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts) or not name.isprintable()
    left = name.endswith(WEIGHTS) or any(fnmatchcase(path.name, pattern) for pattern in LEFT)
    return not hidden and not left and not path.name.startswith(TRAINER)


def _modules(folder: Folder) -> set[str]:
    """Subfolders that sentence-transformers' list of modules names."""
    if "modules.json" not in folder.names or not folder.holds("modules.json"):
        return set()
    try:
        listed = json.loads(folder.read_bytes("modules.json"))
    except (ValueError, RecursionError, CheckpointError):  # what is no list of modules is copied as it is
        return set()
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    return {str(row["path"]) for row in rows if row.get("path")}
