"""Run tasks: many small ones side by side with one thread each, large ones alone with all of them."""

from __future__ import annotations

import ctypes
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from diffract.errors import SelectionError, choose

ENGINES = ("local", "ray")
"""What can run the tasks of a verb."""

RETRIES = 2
"""How often a task is given to another worker of Ray after one has died of it."""

AHEAD = 16
"""Tasks of each worker that may be done before an earlier one that takes longer."""

SIDE_BY_SIDE_BYTES = 1 << 27
"""Workspace up to which a task runs beside others."""

REQUESTS = 8
"""Tasks side by side where most of their time is waiting for a network: while some compute, others fetch."""


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


def run_tasks(
    tasks: Sequence[T], work: Callable[[T], R], *, device: torch.device, remote: bool = False
) -> Iterator[tuple[T, R]]:
    """Yield each task with its result, small tasks first, otherwise in their order.

    Which tasks run side by side depends on their size alone, so that the same machine gives the same bits again.

    Args:
        tasks: What is to be done; their order within each group is kept.
        work: Does one; thread-safe.
        device: On a CUDA device tasks run one after another, as each fills it.
        remote: Whether tasks read over a network: then more of them run side by side than there are cores.
    """
    small, large = in_turn(tasks, device)
    yield from _side_by_side(small, work, max(cores(), REQUESTS) if remote else cores())
    for task in large:
        yield task, work(task)


def in_turn(tasks: Sequence[T], device: torch.device) -> tuple[list[T], list[T]]:
    """Return the tasks that run side by side, which come first, and those that run alone."""
    alone = [device.type != "cpu" or task.workspace_bytes > SIDE_BY_SIDE_BYTES for task in tasks]
    small = [task for task, large in zip(tasks, alone, strict=True) if not large]
    return small, [task for task, large in zip(tasks, alone, strict=True) if large]


def _side_by_side(tasks: Sequence[T], work: Callable[[T], R], most: int) -> Iterator[tuple[T, R]]:
    if not tasks:
        return
    workers = min(len(tasks), most)
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


def run_on_ray(
    tasks: Sequence[T],
    make: Callable[[], Callable[[T], R]],
    *,
    lost: Callable[[T], R],
    device: torch.device,
) -> Iterator[tuple[T, R]]:
    """Yield each task with its result as ``run_tasks`` does, done by processes of Ray: local ones, or of a cluster.

    ``RAY_ADDRESS`` names a running cluster; without it, processes are started here and end with the work. Only tasks
    and results travel: every process opens for itself what it reads, and has one task at a time.

    Args:
        tasks: What is to be done; they can be pickled.
        make: Called in each process, for what does a task there.
        lost: What stands for the result of a task of which every worker died that tried it.
        device: On a CUDA device every process asks for a GPU.

    Raises:
        SelectionError: Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise SelectionError("engine ray needs Ray. Install it: pip install 'diffract-llm[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        own = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(configure_logging=False, log_to_driver=False, **own)
    try:
        for group, threads in zip(in_turn(tasks, device), (1, torch.get_num_threads()), strict=True):
            gpus = float(device.type == "cuda")
            actor = ray.remote(num_cpus=threads, num_gpus=gpus)(_RayWorker)
            hire = partial(actor.remote, make, threads, str(Path.cwd()))
            room = int(min(ray.cluster_resources().get("CPU", 1) // threads, len(group)))
            yield from _by_actors(group, hire, lost, most=max(1, room))
    finally:
        if started:
            ray.shutdown()


class _RayWorker:
    """A process of Ray's that does tasks, with as many threads as the process that asks for it would take."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], threads: int, folder: str) -> None:
        with suppress(OSError):  # relative paths mean the same as where the work was asked for
            os.chdir(folder)
        torch.set_num_threads(threads)
        threadpool_limits(threads)
        self._do = make()

    def do(self, task: Any) -> Any:
        return self._do(task)


def _by_actors(
    tasks: Sequence[T], hire: Callable[[], Any], lost: Callable[[T], R], *, most: int
) -> Iterator[tuple[T, R]]:
    """Yield tasks with their results, in order; each worker has one at a time, so that it is known what it died of."""
    import ray  # pyright: ignore[reportMissingImports] (an extra)
    from ray.exceptions import RayActorError, RayTaskError  # pyright: ignore[reportMissingImports]

    idle: list[Any] = []
    busy: dict[Any, tuple[int, Any]] = {}  # result to come -> place of the task, worker
    died: Counter[int] = Counter()
    done: dict[int, R] = {}
    waiting, first = deque(range(len(tasks))), 0
    try:
        while first < len(tasks):
            while waiting and len(busy) < most and waiting[0] < first + AHEAD * most:
                place, worker = waiting.popleft(), idle.pop() if idle else hire()
                busy[worker.do.remote(tasks[place])] = place, worker
            for result in ray.wait(list(busy))[0]:
                place, worker = busy.pop(result)
                try:
                    done[place] = ray.get(result)
                    idle.append(worker)
                except RayActorError:
                    died[place] += 1
                    if died[place] > RETRIES:
                        done[place] = lost(tasks[place])
                    else:
                        waiting.appendleft(place)
                except RayTaskError as error:
                    raise error.cause from None
            while first in done:
                yield tasks[first], done.pop(first)
                first += 1
    finally:
        for worker in [*idle, *(worker for _, worker in busy.values())]:
            ray.kill(worker)


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
