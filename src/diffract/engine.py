"""Run tasks: many small ones side by side with one thread each, large ones alone with all of them."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from diffract.errors import choose

ENGINES = ("local",)
"""What can run the tasks of a verb."""

AHEAD = 16
"""Tasks of each worker that may be done before an earlier one that takes longer."""

SIDE_BY_SIDE_BYTES = 1 << 27
"""Workspace up to which a task runs beside others."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""


class Workload(Protocol):
    """What the engine needs to know of a task."""

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        ...


T = TypeVar("T", bound=Workload)
R = TypeVar("R")


def run_tasks(tasks: Sequence[T], work: Callable[[T], R], *, device: torch.device) -> Iterator[tuple[T, R]]:
    """Yield each task with its result, small tasks first, otherwise in their order.

    Which tasks run side by side depends on their size alone, so that the same machine gives the same bits again.

    Args:
        tasks: What is to be done; their order within each group is kept.
        work: Does one; thread-safe.
        device: On a CUDA device tasks run one after another, as each fills it.
    """
    small, large = in_turn(tasks, device)
    yield from _side_by_side(small, work)
    for task in large:
        yield task, work(task)


def in_turn(tasks: Sequence[T], device: torch.device) -> tuple[list[T], list[T]]:
    """Return the tasks that run side by side, which come first, and those that run alone."""
    alone = [device.type != "cpu" or task.workspace_bytes > SIDE_BY_SIDE_BYTES for task in tasks]
    small = [task for task, large in zip(tasks, alone, strict=True) if not large]
    return small, [task for task, large in zip(tasks, alone, strict=True) if large]


def _side_by_side(tasks: Sequence[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    if not tasks:
        return
    workers = min(len(tasks), cores())
    with (
        single_threaded(),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        # Results come in the order of the tasks, so that whoever writes them writes the same bytes each time; and only
        # so many wait that neither they nor what stands for tasks to come take memory by the number of all tasks.
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for task in tasks:
                if len(waiting) == AHEAD * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
                waiting.append((task, pool.submit(work, task)))
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def choose_device(name: str) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is CUDA where there is one.

    Raises:
        SelectionError: There is no such device.
    """
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    kind = choose("device", name.partition(":")[0], ["auto", *available])
    return torch.device(available[-1] if kind == "auto" else name)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Keep every linear-algebra library to one thread for a while."""
    with one_torch_thread(), threadpool_limits(1):
        yield


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch's own operations to one thread for a while: quicker done than for all libraries."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed, up to 256 MB, for work in many blocks of a megabyte or two.

    Left to itself, glibc gives each block back to the system, and every block begins with page faults: a third of the
    time of streaming. Other C libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        allocator.mallopt(M_TRIM_THRESHOLD, 1 << 28)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
