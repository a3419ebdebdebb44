"""What an analysis was asked for, as a record that can be written down: whoever joins its shares asks the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffract.analysis.head_changes import analyse_heads
from diffract.analysis.scan import Options, analyse
from diffract.analysis.trajectory import follow
from diffract.checkpoints import Reference, TensorWriter
from diffract.errors import RunError, SelectionError
from diffract.tables import VECTORS, Tables

ANALYSES = {"scan": analyse, "compare": analyse, "trajectory": follow, "heads": analyse_heads}
"""What does the work of each verb."""

OF_A_PROCESS = ("cache", "progress", "share", "parts")
"""Options that say nothing of what is found."""


@dataclass(frozen=True)
class Request:
    """An analysis that is asked for.

    Attributes:
        verb: A name of ``ANALYSES``.
        references: The checkpoints, in the order in which they were given.
        options: What all analyses have in common.
        how: What this one takes besides.
    """

    verb: str
    references: Sequence[Reference]
    options: Options
    how: Mapping[str, Any] = field(default_factory=dict)

    def answered(self, draft: Path | None = None) -> tuple[Tables, Mapping[str, Tensor]]:
        """Return the tables, and the singular vectors that are kept.

        Args:
            draft: The folder that is being made of the run. Vectors, which may exceed memory, go straight there; else
                they are returned.
        """
        if self.options.engine == "ray":  # whose processes open the models themselves
            self.written()
        analysis = partial(ANALYSES[self.verb], self.references, self.options, **self.how)
        if not self.options.vectors or self.options.share is not None:
            return analysis(), {}
        if draft is None:
            collected = _Collected()
            return analysis(vectors_to=collected), collected
        with TensorWriter(draft / VECTORS) as writer:
            return analysis(vectors_to=writer), {}

    def written(self) -> dict[str, Any]:
        """Return the request as JSON can hold it.

        Raises:
            SelectionError: A model or a metric is an object of this process, which no other one can be told of.
        """
        options = {f.name: getattr(self.options, f.name) for f in fields(Options) if f.name not in OF_A_PROCESS}
        return {
            "verb": self.verb,
            "models": _plain(list(self.references), "models"),
            "options": {name: _plain(value, name) for name, value in options.items()},
            "how": {name: _plain(value, name) for name, value in self.how.items()},
        }

    @staticmethod
    def read(written: Mapping[str, Any], **of_this_process: Any) -> Request:
        """Return the request that was written down, with options of this process.

        Raises:
            RunError: It is none.
        """
        try:
            options = replace(Options(**written["options"]), **of_this_process)
            return Request(written["verb"], written["models"], options, written["how"])
        except (KeyError, TypeError) as error:
            raise RunError(
                f"shares of a run say what was asked for, these do not: {error}. Make them again."
            ) from error


class _Collected(dict[str, Tensor]):
    """Vectors in memory, taken as a writer takes them."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor."""
        self[name] = tensor


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(inner, what) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, str | int | float):
        raise SelectionError(
            f"{what}: several processes need names that each can read, files, folders or org/name, and metrics by "
            f"name; got {type(value).__name__}. Leave shard and engine out, or save it to a file."
        )
    return value
