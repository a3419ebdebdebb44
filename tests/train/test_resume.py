"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffract.errors import RecipeError, RunError
from diffract.store import held
from diffract.train import train
from diffract.train.records import read_log

Make = Callable[..., dict[str, Any]]

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
"""With dropout: random numbers belong to the state."""

KILLED = """
import json, os, signal, sys
from diffract.train import train

def progress(done, total, what):
    if done == {done}:
        os.kill(os.getpid(), signal.SIGKILL)

train(json.loads(sys.argv[1]), sys.argv[2], progress=progress)
"""


LISTED = b'{"step": 1, "tokens": [], "loss": 1, "rate": 1, "grad_norm": 1, "seconds": 1}\n'


def losses(log: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(log)]


def test_a_killed_run_goes_on_to_the_same_bits(recipe: Make, tmp_path: Path) -> None:
    made = recipe(model={"config": GPT2}, checkpoints=[0, 6 * 64, 8 * 64])
    code = KILLED.format(done=8 * 64)  # after the states of steps 5 and the checkpoint of step 6, before that of 8
    killed = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(made), str(killed)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in (killed / "state").iterdir()] == ["step000000005"]
    assert len(read_log(killed / "log.jsonl")) == 8
    continued, whole = train(made, killed), train(made, tmp_path / "whole")
    assert losses(continued.log) == losses(whole.log)
    assert [step for step, *_ in losses(whole.log)] == list(range(1, 13))
    assert list(continued.checkpoints) == list(whole.checkpoints) == [0, 384, 512, 768]
    for tokens, path in whole.checkpoints.items():
        expected = load_file(path / "model.safetensors")
        found = load_file(continued.checkpoints[tokens] / "model.safetensors")
        assert all((found[name] == value).all() for name, value in expected.items())
    assert not (killed / "state").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_interrupts_has_the_present_step_saved(number: int, recipe: Make, tmp_path: Path) -> None:
    def ask(done: float, total: float, what: str) -> None:
        if done == 7 * 64:
            signal.raise_signal(number)

    before = signal.signal(number, signal.default_int_handler)  # as the command line has it for all three
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), tmp_path / "out", progress=ask)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == ["step000000007"]
    continued, whole = train(recipe(), tmp_path / "out"), train(recipe(), tmp_path / "whole")
    assert losses(continued.log) == losses(whole.log)
    expected, found = (load_file(run.final / "model.safetensors") for run in (whole, continued))
    assert all((found[name] == value).all() for name, value in expected.items())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoints", "log.jsonl", "manifest.json"]


def test_a_state_is_on_the_disk_before_the_one_before_is_gone(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(path.name)
        if path.name == "step000000010.tmp":
            assert (path.parent / "step000000005").is_dir()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    train(recipe(), tmp_path / "out")
    draft = synced.index("step000000010.tmp")
    assert synced[draft + 1] == "state"
    last = synced[synced.index("step000000005.tmp") + 2 : draft]
    assert last[0] == "log.jsonl"
    assert {"optimizer.bin", "progress.json", "pytorch_model.bin", "random_states_0.pkl"} <= set(last)


def test_who_interrupts_twice_does_not_wait(recipe: Make, tmp_path: Path) -> None:
    def ask(done: float, total: float, what: str) -> None:
        if done == 7 * 64:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "out", progress=ask)
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == ["step000000005"]


def test_a_handler_of_ones_own_is_left_alone(recipe: Make, tmp_path: Path) -> None:
    asked = []

    def ask(done: float, total: float, what: str) -> None:
        if done == 7 * 64:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        assert train(recipe(), tmp_path / "out", progress=ask).final.is_dir()
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [signal.SIGINT]


def test_a_line_that_was_cut_off_is_dropped(recipe: Make, tmp_path: Path) -> None:
    def stop(done: float, total: float, what: str) -> None:
        if done == 7 * 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "out", progress=stop)
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "tok')
    assert [line["step"] for line in read_log(train(recipe(), tmp_path / "out").log)] == list(range(1, 13))


@pytest.mark.parametrize("lost", ["gone", "first line", "torn line", "deep line"])
def test_half_a_log_is_not_gone_on_with(lost: str, recipe: Make, tmp_path: Path) -> None:
    """The losses of a whole run would be those of its second part."""

    def stop(done: float, total: float, what: str) -> None:
        if done == 7 * 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "out", progress=stop)
    log = tmp_path / "out" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    if lost == "gone":
        log.unlink()
    else:
        first = {"first line": "", "torn line": lines[0][:5] + "\n", "deep line": "[" * 100_000 + "\n"}[lost]
        log.write_text("".join([first, *lines[1:]]))
    with pytest.raises(RunError, match=r"log.jsonl' does not hold the \d+ steps that the run has made"):
        train(recipe(), tmp_path / "out")
    log.write_text("".join(lines))
    assert len(read_log(train(recipe(), tmp_path / "out").log)) == 12


def test_a_finished_run_is_returned_at_once(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(recipe(tokens=64), tmp_path / "out")
    monkeypatch.setattr("diffract.train.loop.accelerated", None)
    assert train(recipe(tokens=64), tmp_path / "out") == first


def test_another_recipe_is_refused_with_what_differs(recipe: Make, tmp_path: Path) -> None:
    train(recipe(tokens=64), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"optimizer\.rate is null there, 0\.1 here; seed is 0 there, 1 here"):
        train(recipe(tokens=64, seed=1, optimizer={"rate": 0.1}), tmp_path / "out")
    assert train(recipe(tokens=64), tmp_path / "out").final.is_dir()


def test_other_text_is_refused(recipe: Make, texts: Path, tmp_path: Path) -> None:
    def stop(done: float, total: float, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "out", progress=stop)
    with (texts / "stories.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(RecipeError, match=r"mix\.stories: its text, or its tokenizer, is not what"):
        train(recipe(), tmp_path / "out")


def test_other_folders_are_left_alone(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no training run of this version"):
        train(recipe(), tmp_path)


def test_a_folder_takes_one_run_at_a_time(recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".lock").touch()
    with held(folder / ".lock"), pytest.raises(RunError, match="another process trains into"):
        train(recipe(), folder)


def test_a_checkpoint_that_is_gone_is_named(recipe: Make, tmp_path: Path) -> None:
    run = train(recipe(tokens=64), tmp_path / "out")
    run.final.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"step1-tokens64' is gone"):
        train(recipe(tokens=64), tmp_path / "out")


def test_a_damaged_state_is_named(recipe: Make, tmp_path: Path) -> None:
    def stop(done: float, total: float, what: str) -> None:
        if done == 7 * 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "out", progress=stop)
    state = tmp_path / "out" / "state" / "step000000005"
    names = sorted(path.name for path in state.iterdir())
    assert {"optimizer.bin", "progress.json", "pytorch_model.bin", "random_states_0.pkl"} <= set(names)
    for path in [state / name for name in names]:
        content = path.read_bytes()
        damaged = [content[: len(content) // 2]]
        if path.suffix != ".json":
            middle = len(content) // 2
            damaged.append(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])
        for other in damaged:
            path.write_bytes(other)
            with pytest.raises(RunError, match=r"step000000005' cannot be taken up"):
                train(recipe(), tmp_path / "out")
        path.write_bytes(content)
    (state / "progress.json").write_text(
        (state / "progress.json").read_text().replace('"micro_batch": ', '"micro_batch": 1')
    )
    with pytest.raises(RunError, match=r"progress\.json is not as it was written"):
        train(recipe(), tmp_path / "out")
    for other in ("1.5", '"text"', "{}", '{"digests": 2.5}'):
        (state / "progress.json").write_text(other)
        with pytest.raises(RunError, match="step000000005' cannot be taken up"):
            train(recipe(), tmp_path / "out")


def test_a_full_disk_at_a_state_is_told_and_keeps_the_one_before(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def full(path: Path, *given: Any, **options: Any) -> int:
        if path.parent.name == "step000000010.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *given, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"cannot write .*step000000010.*No space left on device.*Make room"):
        train(recipe(), tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / "out" / "state" / "step000000005").is_dir()
    continued, whole = train(recipe(), tmp_path / "out"), train(recipe(), tmp_path / "whole")
    assert losses(continued.log) == losses(whole.log)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"{\n", b"3\n", b'{"step": 1}\n', b"[" * 100_000, LISTED])
def test_a_log_that_is_gone_or_damaged_is_named(content: bytes | None, recipe: Make, tmp_path: Path) -> None:
    train(recipe(), tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    if content is None:
        log.unlink()
    else:
        log.write_bytes(content)
    with pytest.raises(RunError, match=r"log\.jsonl"):
        read_log(log)
