"""The straight line between two tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def interpolate(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], at: float) -> Float[Tensor, "*shape"]:
    """Return (1 - at) a + at b.

    Rewinding a tuned tensor to its base is the same line, from tuned to base.

    Args:
        a: Where the line is at 0.
        b: Where it is at 1; shape and dtype of ``a``.
        at: Any number; outside [0, 1] the line goes on beyond its ends.

    Returns:
        At exactly 0 ``a`` itself and at exactly 1 ``b`` itself, not a copy: every bit is kept, of NaN and -0.0 too.
        Entries that are equal in both are kept to the last bit at every ``at`` (-0.0 in both may become 0.0).
    """
    if at == 0:
        return a
    if at == 1:
        return b
    return torch.lerp(a, b, at)
