"""Digests that are taken while tensors are read, in blocks, in part, in any order, by several threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffract.checkpoints import open_checkpoint, row_blocks
from diffract.checkpoints.checkpoint import read_digests, recorded


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    held = {name: torch.randn(64, 32, generator=generator) for name in "abcdef"}
    save_file({**held, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "reads",
    [
        [None],
        [(0, 10), (10, 64)],
        [(0, 10)],
        [(10, 64), (0, 10)],
        [(0, 10), (5, 64)],
        [(0, 10), (0, 10), (10, 20), None],
        [None, None],
        [(i, i + 1) for i in range(64)],
        [(0, 64)],
    ],
    ids=str,
)
def test_digest_of_what_was_read(reads: list, model: Path) -> None:
    """Whatever was read of a tensor, its digest is that of the whole tensor; of others there is none."""
    with open_checkpoint(model) as checkpoint:
        watched, recorder = recorded(checkpoint)
        for rows in reads:
            assert torch.equal(watched.read("c", rows), checkpoint.read("c", rows))
        assert read_digests(watched, recorder) == {"c": checkpoint.digest("c")}


def test_nothing_is_read_twice_where_blocks_come_in_order(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        watched, recorder = recorded(checkpoint)
        for rows in row_blocks(watched.info("a"), 1000):
            watched.read("a", rows)
        assert recorder.seen["a"].digest == checkpoint.digest("a")
        watched.read("b", (0, 3))
        assert recorder.seen["b"].digest == ""


def test_scalars_and_empty_tensors(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        watched, recorder = recorded(checkpoint)
        watched.read("scalar")
        watched.read("empty")
        assert read_digests(watched, recorder) == {name: checkpoint.digest(name) for name in ("scalar", "empty")}


def test_many_threads(model: Path) -> None:
    """Blocks of one tensor in order from one thread, other tensors beside it, and the same one out of order."""
    with open_checkpoint(model) as checkpoint:
        watched, recorder = recorded(checkpoint)

        def read(number: int) -> None:
            name = "abcdef"[number % 6]
            for rows in row_blocks(watched.info(name), 500):
                watched.read(name, rows)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(48)))
        assert read_digests(watched, recorder) == {name: checkpoint.digest(name) for name in "abcdef"}
