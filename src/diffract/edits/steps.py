"""What each step of a recipe does, one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffract.edits import settings
from diffract.edits.bench import Bench, Planned
from diffract.edits.draft import Draft
from diffract.edits.interpolate import plan_interpolate
from diffract.edits.merge import plan_merge
from diffract.edits.rewind import plan_rewind
from diffract.edits.svf import plan_svf
from diffract.edits.truncate import plan_laser, plan_truncate

PLANS: dict[type[settings.Settings], Callable[[Any, Bench, Draft], Planned]] = {
    settings.Interpolate: plan_interpolate,
    settings.Laser: plan_laser,
    settings.Merge: plan_merge,
    settings.Rewind: plan_rewind,
    settings.Svf: plan_svf,
    settings.Truncate: plan_truncate,
}


def plan_step(step: settings.Settings, bench: Bench, draft: Draft) -> Planned:
    """Return what a step changes.

    Args:
        step: Its settings.
        bench: The model and the checkpoints beside it.
        draft: The model after the steps before this one.

    Raises:
        DiffractError: The step does not fit the model.
    """
    return PLANS[type(step)](step, bench, draft)


__all__ = ["PLANS", "plan_step"]
