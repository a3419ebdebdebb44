"""Damaged files of every kind end commands as documented, and kills leave what an undisturbed run leaves."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("code", "said", "seconds", "grown", "wrong"),
    [
        (0, "done\n", 1.0, 0, ""),
        (1, "error: x\n", 1.0, 0, ""),
        (1, "", 1.0, 0, "without a word"),
        (3, "error in diffract: x", 1.0, 0, "exit code 3"),
        (-9, "", 21.0, 0, "took more than 20 s"),
        (-11, "", 1.0, 0, "exit code -11"),
        (1, "Traceback (most recent call last)", 1.0, 0, "a traceback"),
        (1, "a\x1b[2J", 1.0, 0, "control character"),
        (0, "done", 1.0, 2 << 30, "grew by 2048 MiB"),
    ],
)
def test_ends_are_judged(code: int, said: str, seconds: float, grown: int, wrong: str) -> None:
    found = fuzz.judge(code, said, seconds, grown)
    assert wrong in found
    assert bool(wrong) == bool(found)


def test_the_same_number_does_the_same_damage(tmp_path: Path) -> None:
    text = b'{"a": [1, 2, {"b": "c"}]}'
    changed = set()
    for number in range(40):
        twice = []
        for _ in range(2):
            path = tmp_path / "x.json"
            path.write_bytes(text)
            rng = random.Random(number)
            path.write_bytes(fuzz.wrong_text(rng, {"a": [1, 2, {"b": "c"}]}, str) + fuzz.wrong_bytes(rng, text))
            twice.append(path.read_bytes())
        assert twice[0] == twice[1]
        changed.add(twice[0])
    assert len(changed) > 30


@pytest.mark.slow
def test_two_trials_of_each_kind() -> None:
    trials = [sys.executable, HERE / "fuzz.py", "--trials", str(2 * len(fuzz.KINDS)), "--seed", "1000"]
    done = subprocess.run(trials, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_commands_end_in_the_same_bytes() -> None:
    kills = [sys.executable, HERE / "chaos.py", "--kills", "42"]
    done = subprocess.run(kills, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
