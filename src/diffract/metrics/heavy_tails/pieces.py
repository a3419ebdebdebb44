"""How much is computed at once."""

from __future__ import annotations

import torch

ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Entries of a temporary: on the CPU a few of them stay in a core's cache."""


def piece_entries(device: torch.device) -> int:
    """Return how many float64 entries a temporary may have."""
    return ENTRIES["cpu" if device.type == "cpu" else "cuda"]
