"""The rows of batches, against a straightforward walk through the parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.train.data import DRAWS, ORDERS, Mixture

CONTEXT = 4


def streams(*lengths: int) -> dict[str, np.ndarray]:
    """Parts whose tokens tell the part and the place."""
    return {f"part{i}": (1000 * i + np.arange(n)).astype(np.uint16) for i, n in enumerate(lengths)}


def mixture(lengths: tuple[int, ...], shares: list[float], *, rows: int = 6, steps: int = 9, seed: int = 3) -> Mixture:
    parts = streams(*lengths)
    named = dict(zip(parts, shares, strict=True))
    return Mixture(parts, named, context=CONTEXT, rows=rows, steps=steps, seed=seed)


def walked(lengths: tuple[int, ...], shares: list[float], rows: int, steps: int, seed: int) -> np.ndarray:
    """Take every row of the run in turn, with a queue of windows for each part."""
    parts = list(streams(*lengths).values())
    drawn = np.random.default_rng([seed, DRAWS]).choice(len(parts), size=(steps, rows), p=shares)
    queues: list[list[int]] = [[] for _ in parts]
    epochs = [0] * len(parts)
    found = []
    for part in drawn.ravel():
        if not queues[part]:
            order = np.random.default_rng([seed, ORDERS, part, epochs[part]])
            queues[part] = order.permutation(len(parts[part]) // CONTEXT).tolist()
            epochs[part] += 1
        start = queues[part].pop(0) * CONTEXT
        found.append(parts[part][start : start + CONTEXT])
    return np.array(found).reshape(steps, rows, CONTEXT)


@given(
    lengths=st.lists(st.integers(CONTEXT, 40), min_size=1, max_size=3).map(tuple),
    rows=st.integers(1, 5),
    steps=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_batches_are_those_of_a_walk(lengths: tuple[int, ...], rows: int, steps: int, seed: int) -> None:
    shares = [1 / len(lengths)] * len(lengths)
    made = mixture(lengths, shares, rows=rows, steps=steps, seed=seed)
    expected = walked(lengths, shares, rows, steps, seed)
    for step in reversed(range(steps)):  # whatever was asked for before
        assert (made.batch(step) == expected[step]).all()


def test_processes_share_a_batch_between_them() -> None:
    made = mixture((40, 24), [0.5, 0.5])
    shared = np.concatenate([made.batch(4, slice(rank * 2, rank * 2 + 2)) for rank in range(3)])
    assert (shared == made.batch(4)).all()


def test_an_epoch_takes_every_window_once() -> None:
    made = mixture((41,), [1.0], rows=5, steps=4)  # ten windows, a token is left over
    first = {tuple(row) for step in (0, 1) for row in made.batch(step)}
    second = [tuple(row) for step in (2, 3) for row in made.batch(step)]
    assert first == {tuple(range(i, i + CONTEXT)) for i in range(0, 40, CONTEXT)}
    assert set(second) == first
    assert second != [tuple(row) for step in (0, 1) for row in made.batch(step)]  # in another order


def test_shares_hold_in_the_mean() -> None:
    made = mixture((40, 40), [0.85, 0.15], rows=100, steps=100)
    taken = made.tokens()
    assert sum(taken.values()) == 10_000 * CONTEXT
    spread = (0.85 * 0.15 / 10_000) ** 0.5
    assert abs(taken["part0"] / (10_000 * CONTEXT) - 0.85) < 4 * spread  # a binomial share, four standard deviations
    assert made.epochs()["part1"] == pytest.approx(taken["part1"] / 40)
    assert made.available == {"part0": 40, "part1": 40}
