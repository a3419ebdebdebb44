"""One of several processes, each with a device of its own, or the only one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffract.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        rank: From 0 on; the first one writes and prints.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1


def place() -> Place:
    """Return which process this is; those that ``accelerate launch`` or ``torchrun`` started find each other first."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Place()
    state = _state()
    return Place(state.process_index, state.num_processes)


def own_device() -> torch.device | None:
    """Return the device that a launcher gave this process, or ``None`` for the only process."""
    return None if int(os.environ.get("WORLD_SIZE", "1")) <= 1 else _state().device


def gather(values: Sequence[Any], where: Place) -> list[Any]:
    """Return the values of all processes, in the order of their ranks."""
    if where.count == 1:
        return list(values)
    from accelerate.utils import gather_object

    return gather_object(list(values))


def _state() -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise CheckpointError("several processes need the accelerate package: pip install accelerate.") from error
    return PartialState(cpu=not torch.cuda.is_available())
