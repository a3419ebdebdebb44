"""Shares of a plan: which of its tasks each of several processes does, that know of each other only how many they are.

Every process makes the same plan from the same headers and cuts it in the same way, so that nobody has to hand out
work: the costliest task first, each to the share that has least so far.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from diffract.errors import SelectionError, printable

MOST_SHARES = 100_000
"""More shares than five digits tell apart are a slip of the pen."""

_ASKED = re.compile(r"(?P<place>auto|\d{1,6}(?=/))(?:/(?P<count>\d{1,6}))?", re.ASCII)


@dataclass(frozen=True)
class Share:
    """One of the shares of a plan.

    Attributes:
        index: Which one, from 0 to ``count - 1``.
        count: How many there are.
    """

    index: int
    count: int

    @property
    def name(self) -> str:
        """What its folder is called, such as ``00042-of-00256``."""
        return f"{self.index:05d}-of-{self.count:05d}"


def read_share(text: str, environ: Mapping[str, str] = os.environ) -> Share:
    """Read which share is asked for.

    Args:
        text: ``I/N``; ``auto`` for what the scheduler says in the environment; ``auto/N`` where that knows the place
            of a process but not how many there are.
        environ: The environment. A Slurm array counts before ``RANK`` and ``WORLD_SIZE``, these before the tasks of a
            Slurm step, these before an indexed job of Kubernetes.

    Raises:
        SelectionError: It cannot be read, there is no such share, or the environment does not say.

    >>> read_share("3/8").name
    '00003-of-00008'
    >>> read_share("auto", {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"})
    Share(index=2, count=4)
    """
    match = _ASKED.fullmatch(text.strip())
    if match is None:
        raise SelectionError(f"--shard: expected I/N such as 0/8, auto, or auto/N, got {printable(text)!r}.")
    count = int(match["count"]) if match["count"] else None
    if match["place"] == "auto":
        index, count = _of_environment(environ, count)
    else:
        index = int(match["place"])
    if count is None:
        raise SelectionError(
            f"--shard {text}: this process is told to be number {index}, but not of how many. Pass --shard auto/N."
        )
    if not 1 <= count <= MOST_SHARES or not 0 <= index < count:
        raise SelectionError(
            f"--shard: there is no share {index} of {count}. Shares are counted from 0 to N - 1, "
            f"and there are {MOST_SHARES:,} at most."
        )
    return Share(index, count)


SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("RANK", "WORLD_SIZE", None),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
    ("JOB_COMPLETION_INDEX", None, None),
)
"""Names of variables that say which process this is, how many there are, and where counting begins, if not at 0."""


def _of_environment(environ: Mapping[str, str], count: int | None) -> tuple[int, int | None]:
    """Return place and number as the first scheduler tells them that is there; a number that was given counts."""
    for place, number, first in SCHEDULERS:
        # Where only the place is told, another scheduler may know the number too.
        if place not in environ or (number is not None and number not in environ and count is None):
            continue
        try:
            index = int(environ[place]) - int(environ.get(first, "0") if first else 0)
            return index, count if count is not None or number is None else int(environ[number])
        except ValueError as error:
            raise SelectionError(f"--shard auto: {place} and its like must be whole numbers ({error}).") from error
    known = ", ".join(" and ".join(filter(None, names[:2])) for names in SCHEDULERS)
    raise SelectionError(f"--shard auto: the environment does not say which share this is. Known are {known}.")


def cut(costs: Sequence[float], count: int) -> list[int]:
    """Return to which of ``count`` shares each task belongs: the costliest first, each to the one that has least.

    Tasks of one cost are taken in their order, and of shares that have the same the first, so that every process finds
    the same.

    >>> cut([1.0, 5.0, 2.0, 2.0], 2)
    [1, 0, 1, 1]
    """
    loads = [(0.0, share) for share in range(count)]
    # A heap: each of many processes cuts the whole plan, however long it is.
    heapify(loads)
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        load, share = loads[0]
        owners[task] = share
        heapreplace(loads, (load + costs[task], share))
    return owners


def loads(costs: Sequence[float], owners: Sequence[int], count: int) -> list[float]:
    """Return what the tasks of each share cost together."""
    found = [0.0] * count
    for cost, owner in zip(costs, owners, strict=True):
        found[owner] += cost
    return found
