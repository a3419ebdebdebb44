"""How much is computed at once."""

from __future__ import annotations

import torch

ENTRIES = {"cpu": 1 << 15, "cuda": 1 << 22}
"""On the CPU a few temporaries stay in a core's cache. They are too small to share among threads: workers of one thread
each, on rows of their own, use several cores."""


def piece_entries(device: torch.device) -> int:
    """Return how many float64 entries a temporary may have: values, points of tails, or nodes of an integral."""
    return ENTRIES["cpu" if device.type == "cpu" else "cuda"]
