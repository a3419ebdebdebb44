"""Numbers in the page: short text, or float32 in base64."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def embed(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in, nor break JavaScript."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def short(value: float | None) -> float | None:
    """A number to six digits, which is what a page can show; ``None`` for what is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def pack(values: npt.ArrayLike) -> str:
    """Little-endian float32 in base64."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def thin(values: Sequence[Any], points: int | None) -> Sequence[Any]:
    """Return at most ``points`` values, evenly chosen, both ends among them; all if it is ``None``."""
    if points is None or len(values) <= points:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, points).round().astype(int)]
