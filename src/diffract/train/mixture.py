"""Which window of which part stands in each row of each batch: a function of the recipe and the step alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from diffract.train.settings import TrainRecipe
from diffract.train.streams import read_stream

DRAWS, ORDERS = 0, 1
"""What a random stream is for; it stands in its seed."""


class Mixture:
    """The rows of all batches.

    Each row of the run draws its part by the shares, from one seeded generator. It takes the part's next window, in an
    order that is drawn anew for each epoch of the part. Neither how many processes share a batch nor where a run was
    taken up again changes what is in it.

    Args:
        streams: The tokens of each part, by name.
        shares: The share of each part, by name; they sum to 1.
        context: Tokens of a window.
        rows: Windows of a batch.
        steps: Batches of the run.
        seed: Of draws and orders.

    Attributes:
        available: Tokens that each part has.
    """

    def __init__(
        self,
        streams: Mapping[str, np.ndarray],
        shares: Mapping[str, float],
        *,
        context: int,
        rows: int,
        steps: int,
        seed: int,
    ) -> None:
        self.names = list(streams)
        self.available = {name: len(stream) for name, stream in streams.items()}
        self.windows = [len(stream) // context for stream in streams.values()]
        self._streams, self._context, self._rows, self._seed = list(streams.values()), context, rows, seed
        draw = np.random.default_rng([seed, DRAWS])
        drawn = draw.choice(len(self.names), size=(steps, rows), p=[shares[name] for name in self.names])
        self._parts = drawn.astype(np.uint16)
        counts = np.stack([(self._parts == part).sum(axis=1) for part in range(len(self.names))], axis=1)
        self._before = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(axis=0)])
        self._order = lru_cache(maxsize=2 * len(self.names))(self._drawn_order)

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Return some rows of a step's batch.

        Returns:
            Token numbers, shape (rows, context), int64.
        """
        places = self.places(step)[rows]
        return np.stack([self._window(part, window) for part, window in places])

    def places(self, step: int) -> list[tuple[int, int]]:
        """Return the part and the window of each row of a step's batch."""
        taken = self._before[step].copy()
        found = []
        for part in self._parts[step].tolist():
            epoch, place = divmod(int(taken[part]), self.windows[part])
            found.append((part, int(self._order(part, epoch)[place])))
            taken[part] += 1
        return found

    def tokens(self) -> dict[str, int]:
        """Return how many tokens of each part the run takes."""
        return {name: int(n) * self._context for name, n in zip(self.names, self._before[-1], strict=True)}

    def epochs(self) -> dict[str, float]:
        """Return how often the run takes each part's text, counted in whole windows."""
        rows: Sequence[int] = self._before[-1].tolist()
        return {name: n / w for name, n, w in zip(self.names, rows, self.windows, strict=True)}

    def _window(self, part: int, window: int) -> np.ndarray:
        start = window * self._context
        return self._streams[part][start : start + self._context].astype(np.int64)

    def _drawn_order(self, part: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, ORDERS, part, epoch]).permutation(self.windows[part])


def make_mixture(recipe: TrainRecipe, streams: Mapping[str, Path]) -> Mixture:
    """Return the mixture of a recipe.

    Args:
        recipe: Its shares, sizes and seed.
        streams: The file of each part's tokens.
    """
    return Mixture(
        {name: read_stream(path) for name, path in streams.items()},
        recipe.shares,
        context=recipe.context,
        rows=recipe.rows,
        steps=recipe.steps,
        seed=recipe.seed,
    )
