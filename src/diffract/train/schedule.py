"""The learning rate of each step."""

from __future__ import annotations

import math

from diffract.train.settings import Schedule


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Return the share of the highest rate that a step has.

    With w = round(warmup * steps) and d = round(decay * steps), the steps 0, ..., w - 1 have (step + 1) / w. After
    them ``constant`` has 1; ``wsd`` has 1 and in the last d steps 1 - (1 - floor) t with t = 1/d, ..., 1; ``cosine``
    has floor + (1 - floor) (1 + cos(pi t)) / 2 with t = 1/(steps - w), ..., 1. So the last step has the floor.

    Args:
        schedule: Its kind and shares.
        step: Counted from 0.
        steps: Of the whole run.

    Source:
        Warm-up, stable, decay: Hu et al. 2024 (MiniCPM), with the linear decay of Hägele et al. 2024. Cosine:
        Loshchilov & Hutter 2017.

    >>> [rate_factor(Schedule(warmup=0.2, decay=0.4, floor=0.0), s, 5) for s in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "cosine":
        done = (step + 1 - warmup) / (steps - warmup)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * done)) / 2
    decay = min(round(schedule.decay * steps), steps - warmup) if schedule.kind == "wsd" else 0
    done = max(0.0, (step + 1 - steps + decay) / decay) if decay else 0.0
    return 1 - (1 - schedule.floor) * done
