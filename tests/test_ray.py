"""Processes of Ray: the tables of one process, workers that die, tasks that kill every worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffract
from diffract.analysis import work
from diffract.engine import RETRIES, run_on_ray
from diffract.errors import SelectionError

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


def a_task(number: int, workspace_bytes: int = 0) -> Any:
    """Of a class that every process can import; the workspace decides whether it runs beside others."""
    return SimpleNamespace(number=number, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("verb", ["scan", "compare", "heads", "trajectory"])
def test_tables_are_those_of_one_process(family: tuple[Path, Path], verb: str) -> None:
    call = getattr(diffract, verb)
    how: dict[str, Any] = {"trajectory": {"by": "given"}, "compare": {"circuits": True, "vectors": True}}.get(verb, {})
    models = family[:1] if verb == "scan" else family
    one, two = (call(*models, cache=False, engine=engine, **how) for engine in ("local", "ray"))
    assert one.tables.frames.keys() == two.tables.frames.keys()
    for name, table in one.tables.frames.items():
        assert table.equals(two[name], null_equal=True), name
    assert one.vectors.keys() == two.vectors.keys()
    assert all(torch.equal(vector, two.vectors[name]) for name, vector in one.vectors.items())


def test_a_task_whose_worker_dies_is_done_by_another_and_one_that_kills_all_is_lost(tmp_path: Path) -> None:
    folder, dies = str(tmp_path), os._exit

    def make() -> Callable[[Any], int]:
        def do(task: Any) -> int:
            note = Path(folder, f"{task.number}-{os.getpid()}")
            note.touch()
            if task.number == 3 or (task.number == 1 and len(list(Path(folder).glob("1-*"))) == 1):
                dies(1)
            return task.number * 10

        return do

    tasks = [a_task(i, workspace_bytes=(1 << 30) * (i == 4)) for i in range(6)]
    found = list(run_on_ray(tasks, make, lost=lambda task: -task.number, device=CPU))
    assert [(task.number, result) for task, result in found] == [(0, 0), (1, 10), (2, 20), (3, -3), (5, 50), (4, 40)]
    assert len(list(tmp_path.glob("1-*"))) == 2
    assert len(list(tmp_path.glob("3-*"))) == RETRIES + 1


def test_an_error_of_a_task_is_the_users(tmp_path: Path) -> None:
    def make() -> Callable[[Any], int]:
        def do(task: Any) -> int:
            raise SelectionError(f"no {task.number}")

        return do

    with pytest.raises(SelectionError, match="no 7"):
        list(run_on_ray([a_task(7)], make, lost=lambda task: 0, device=CPU))


def test_a_matrix_that_kills_its_workers_has_a_row_that_says_so(
    family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be computed is lost, not the run; other rows keep their numbers."""
    poison = "model.layers.1.mlp.up_proj.weight"

    def outcomes(tasks: Any, worker: work.Worker, **_: Any) -> Iterator[tuple[Any, work.Outcome]]:
        for task, outcome in work.on_this_machine(tasks, worker):
            yield task, work.lost(task, worker) if task.tensor == poison else outcome

    whole = diffract.compare(*family, cache=False)
    monkeypatch.setattr("diffract.analysis.scan.on_ray", outcomes)
    run = diffract.compare(*family, cache=False, engine="ray")
    assert run.metrics.filter(tensor=poison)["status"].to_list() == ["failed", "failed"]
    assert run.metrics.filter(tensor=poison)["frobenius_norm"].null_count() == 2
    kept = [
        table.filter(table["tensor"] != poison).drop("peaks", strict=False) for table in (whole.metrics, run.metrics)
    ]
    assert kept[0].equals(kept[1].select(kept[0].columns), null_equal=True)
    assert any("2 matrices could not be computed" in text for text in run.manifest["warnings"])


def test_only_names_travel() -> None:
    with pytest.raises(SelectionError, match=r"models: several processes .* got dict"):
        diffract.scan({"w": torch.eye(3)}, engine="ray")
