"""Tasks side by side: in order, bounded, and whatever ends them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
import torch

from diffract import engine
from diffract.engine import SIDE_BY_SIDE_BYTES, run_tasks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    number: int
    workspace_bytes: int = 1


def test_results_come_in_the_order_of_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cores", lambda: 3)
    tasks = [Task(i, workspace_bytes=SIDE_BY_SIDE_BYTES * 2 if i % 10 == 0 else 1) for i in range(60)]

    def work(task: Task) -> int:
        time.sleep(0.002 * (task.number % 3))  # later ones are done before earlier ones
        return task.number**2

    found = list(run_tasks(tasks, work, device=CPU))
    numbers = [task.number for task, _ in found]
    assert numbers == [i for i in range(60) if i % 10] + list(range(0, 60, 10))
    assert [result for _, result in found] == [number**2 for number in numbers]


def test_only_so_many_are_done_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cores", lambda: 2)
    begun, lock, most, taken = 0, threading.Lock(), 0, 0

    def work(task: Task) -> None:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)

    for _ in run_tasks([Task(i) for i in range(500)], work, device=CPU):
        taken += 1
    assert begun == 500
    assert most <= engine.AHEAD * 2 + 2


def test_an_error_ends_the_rest() -> None:
    done: list[int] = []

    def work(task: Task) -> None:
        if task.number == 3:
            raise KeyError(task.number)
        done.append(task.number)

    with pytest.raises(KeyError):
        list(run_tasks([Task(i) for i in range(500)], work, device=CPU))
    assert len(done) < 499
