"""PyTorch files (``.bin``, ``.pt``, ``.pth``): weights only, memory-mapped where the format allows it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from diffract.checkpoints.arrays import flatten, open_pairs
from diffract.checkpoints.files import LocalFolder
from diffract.checkpoints.folder import Shards, check_promised, join
from diffract.checkpoints.reader import Checkpoint
from diffract.errors import CheckpointError, printable

WRAPPERS = ("state_dict", "model")
"""Keys under which training code puts the weights."""


def open_pickles(folder: LocalFolder, shards: Shards) -> Checkpoint:
    """Open PyTorch files as one checkpoint.

    Raises:
        CheckpointError: A file is damaged or refused, or a tensor is in two of them or in none.
    """
    joined = join((open_pickle(folder.path / name) for name in shards.files), folder.where)
    check_promised(joined.infos, shards, folder.where)
    return joined


def open_pickle(path: Path) -> Checkpoint:
    """Open one PyTorch file; tensors that share their memory are recognised as tied.

    Only weights are loaded: a pickle that holds anything else is refused, and none of its code runs.
    ``{"state_dict": ...}`` and ``{"model": ...}`` wrappers are taken off. The file must stay as it is.

    Raises:
        CheckpointError: The file is damaged, holds more than weights, or holds no named tensors.
    """
    where = printable(path, 1000)
    try:
        loaded = _unwrap(_load(path))
        leaves = list(flatten(loaded)) if isinstance(loaded, Mapping) else []
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where!r} is refused: it is damaged, or its pickle holds more than weights and would run code "
            f"({printable(_first_line(error))}). Save it as safetensors where you trust it."
        ) from error
    except Exception as error:  # a damaged pickle or zip can make torch raise almost anything
        reason = printable(_first_line(error))
        raise CheckpointError(f"cannot read {where!r} as a PyTorch file: {reason}. Fetch it again.") from error
    tensors = [(name, value) for name, value in leaves if isinstance(value, torch.Tensor)]
    if not tensors:
        raise CheckpointError(f"{where!r} holds no named tensors, expected a state dict. Is this the right file?")
    return open_pairs(tensors, reference=where)


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _unwrap(loaded: Any) -> Any:
    """Take off wrappers, at most as many as there are kinds; tensors beside one show that it is none."""
    for _ in WRAPPERS:
        if not isinstance(loaded, Mapping) or any(isinstance(v, torch.Tensor) for v in loaded.values()):
            break
        inner = next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        loaded = loaded if inner is None else cast("Mapping[str, Any]", inner)
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
