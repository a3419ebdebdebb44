"""Where the time goes: what is within another piece counts once, and nothing is counted where nobody asks."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import diffract
from diffract.errors import SelectionError
from diffract.timing import stopwatch, timed

WAIT = 0.02
"""Seconds; a sleep is never shorter, and waking up late is what the upper bounds leave room for."""


@timed("product")
def multiply() -> None:
    time.sleep(WAIT)


def test_a_piece_within_another_counts_once() -> None:
    with stopwatch() as watch:
        with timed("other"):
            time.sleep(WAIT)
            multiply()
            with timed("product"):
                multiply()
        multiply()
    multiply()
    assert watch.seconds["other"] >= WAIT
    assert watch.seconds["product"] >= 3 * WAIT
    assert sum(watch.seconds.values()) < 8 * WAIT
    assert watch.seconds["read"] == 0


def test_threads_are_added_up_and_errors_counted() -> None:
    def fail() -> None:
        with timed("eigensolver"):
            multiply()
            raise ValueError("no")

    with stopwatch() as watch, ThreadPoolExecutor(2) as pool:
        assert all(isinstance(one.exception(), ValueError) for one in [pool.submit(fail) for _ in range(4)])
    assert watch.seconds["product"] >= 4 * WAIT
    assert watch.seconds["eigensolver"] < WAIT


def test_analyses_say_where_their_time_went(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((40, 30)).astype(np.float32)}
    tuned = {"w": base["w"] + 0.1 * rng.standard_normal((40, 30)).astype(np.float32)}
    run = diffract.compare(base, tuned, cache=False, timing=True, output=tmp_path / "run")
    pieces = run.manifest["timing"]
    assert list(pieces) == ["read", "cast", "product", "eigensolver", "tables", "other"]
    assert all(seconds >= 0 for seconds in pieces.values())
    assert pieces["tables"] > 0
    assert diffract.load_run(tmp_path / "run").manifest["timing"] == pieces
    assert "timing" not in diffract.scan(base, cache=False).manifest
    with pytest.raises(SelectionError, match="timing is of one process"):
        diffract.scan(base, timing=True, shard="0/2", output=tmp_path / "shares")
