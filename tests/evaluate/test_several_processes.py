"""Items shared out among processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from diffract.evaluate import Evaluator, Subject, load_tasks
from diffract.evaluate.run import ProcessRank, gather, own_device, place

WORKER = """
import sys
from diffract.store import Cache
from diffract.evaluate import Evaluator, load_subject, load_tasks
from diffract.evaluate.run import own_device, place
from tiny_language_model import byte_tokenizer, tiny_model

subject = load_subject(tiny_model(), tokenizer=byte_tokenizer(), device=str(own_device() or "cpu"))
with Cache(__import__("pathlib").Path(sys.argv[1]) / "cache") as cache:
    found = Evaluator(subject, load_tasks("math,gsm:1", limit=150), cache=cache).scores()
found.write_parquet(f"{sys.argv[1]}/scores{place().rank}of{place().count}.parquet")
"""


def test_the_only_process_gathers_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert place() == ProcessRank(0, 1)
    assert own_device() is None
    assert gather([1, 2], place()) == [1, 2]


def test_each_process_scores_its_parts(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = load_tasks("math", limit=150)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("diffract.evaluate.run.place", lambda rank=rank: ProcessRank(rank, 2))
        monkeypatch.setattr("diffract.evaluate.run.gather", lambda values, where: values)
        parts.append(Evaluator(subject, tasks).scores())
    assert [p.height for p in parts] == [64 + 22, 64]
    assert set(parts[0]["item"]) | set(parts[1]["item"]) == {item.id for item in tasks[0].items}


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{here.parent / 'src'}:{here}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    worker = str(tmp_path / "worker.py")
    subprocess.run([sys.executable, worker, str(tmp_path / "one")], check=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *launch, worker, str(tmp_path / "two")], check=True)
    one = pl.read_parquet(tmp_path / "one" / "scores0of1.parquet")
    assert one.height == 300
    for rank in range(2):
        assert pl.read_parquet(tmp_path / "two" / f"scores{rank}of2.parquet").equals(one)
