"""What to know before a fitted exponent is believed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffract.metrics.heavy_tails.power_law import PowerLaw

PerMatrix = Bool[Tensor, "b"]

FEWEST = 50
"""Values in a tail below which an exponent is known badly (Clauset et al. 2009, section 3.3)."""

OVER_TRAINED = 2.0
UNDER_TRAINED = 6.0
"""Exponents between these are those of well-trained layers (Martin & Mahoney 2021)."""


@dataclass(frozen=True)
class TailWarning:
    """Doubts about b fitted tails; all false where there is no tail.

    Attributes:
        short: Fewer than 50 values in the tail.
        over_trained: alpha below 2.
        under_trained: alpha above 6.
        whole: xmin is the smallest value: the tail is the whole spectrum.
        extreme: xmin is the last candidate, the second largest value seen.
    """

    short: PerMatrix
    over_trained: PerMatrix
    under_trained: PerMatrix
    whole: PerMatrix
    extreme: PerMatrix


def tail_warning(tail: PowerLaw, values: Float64[Tensor, "b n"]) -> TailWarning:
    """Return what speaks against a fit; ``values`` are those that it was made of."""
    x = values.where((values > 0) & values.isfinite(), torch.nan)
    above = x > tail.xmin[:, None]
    largest = x.nan_to_num(0.0).amax(1, keepdim=True)
    return TailWarning(
        short=tail.tail_count < FEWEST,
        over_trained=tail.alpha < OVER_TRAINED,
        under_trained=tail.alpha > UNDER_TRAINED,
        whole=~tail.xmin.isnan() & ~(x < tail.xmin[:, None]).any(1),
        extreme=~tail.xmin.isnan() & (~above | (x == largest)).all(1),
    )


def describe_warning(warning: TailWarning, tail: PowerLaw) -> tuple[str, ...]:
    """Word the warnings of each row, most telling first; an empty string where there are none."""
    texts = {
        "short": "",
        "over_trained": "alpha below 2 (over-trained)",
        "under_trained": "alpha above 6 (under-trained)",
        "whole": "xmin is the smallest value",
        "extreme": "xmin is the last candidate",
    }
    flags = torch.stack([getattr(warning, field.name) for field in fields(warning)], 1).tolist()
    return tuple(
        "; ".join(text or _short(count) for text, on in zip(texts.values(), row, strict=True) if on)
        for row, count in zip(flags, tail.tail_count.tolist(), strict=True)
    )


def _short(count: float) -> str:
    return f"tail of {count:.0f} points"
