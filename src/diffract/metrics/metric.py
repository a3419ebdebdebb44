"""What a metric is: a function of facts about a matrix, and the row that describes it."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from diffract.errors import SelectionError, suggest
from diffract.metrics.facts import FACTS, NEEDS

INVARIANCES = frozenset({"rotation", "transpose", "permutation"})


@dataclass(frozen=True)
class Metric:
    """A number per matrix, or per pair of matrices.

    Attributes:
        name: Column in the metrics table.
        function: Takes the facts, in that order; returns (b,), NaN where the metric has no value.
        facts: Keys of ``FACTS``.
        summary: One line; the formula.
        unit: Of the value.
        range: In which values lie.
        source: Where the definition stands.
        degree: Power of a that scaling all matrices by a > 0 multiplies it with; ``None`` if there is none.
        invariant: Which of ``INVARIANCES`` leave it unchanged.
        version: Raised when its numbers change.
        code: Digest of a user's function, so that results of an older text of it are never taken for it.
    """

    name: str
    function: Callable[..., Tensor]
    facts: tuple[str, ...]
    summary: str
    unit: str = "1"
    range: str = ""
    source: str = ""
    degree: int | None = None
    invariant: frozenset[str] = frozenset()
    version: int = 1
    code: str = ""

    @property
    def pair(self) -> bool:
        """Whether it speaks of two matrices."""
        return any(FACTS[fact].pair for fact in self.facts)

    @property
    def needs(self) -> str:
        """The dearest thing that it is computed from, of ``NEEDS``."""
        return max((FACTS[fact].need for fact in self.facts), key=NEEDS.index)

    @property
    def key(self) -> str:
        """What identifies its numbers in a cache."""
        return f"{self.name}/{self.version}{self.code}"

    def __call__(self, *facts: Any) -> Tensor:
        """Compute it, from the facts in order."""
        return self.function(*facts)


@overload
def metric(function: Callable[..., Tensor], /) -> Metric: ...
@overload
def metric(
    *, name: str = ..., summary: str = ..., unit: str = ..., range: str = ..., version: int = ...
) -> Callable[[Callable[..., Tensor]], Metric]: ...
def metric(
    function: Callable[..., Tensor] | None = None,
    /,
    *,
    name: str = "",
    summary: str = "",
    unit: str = "1",
    range: str = "",
    version: int = 1,
) -> Metric | Callable[[Callable[..., Tensor]], Metric]:
    """Make a metric of one's own of a function; a decorator.

    The function's parameters name the facts it is computed from (``FACTS``); it works on b matrices at once and
    returns (b,). Pass the metric to ``scan`` or ``compare`` in ``metrics``, or name it in the entry point group
    ``diffract.metrics`` to have it on the command line.

    Args:
        function: What computes it.
        name: Column name; the function's name by default.
        summary: One line; the docstring's first line by default.
        unit: Of the value.
        range: In which values lie.
        version: Raise it when what the function calls, or a global that it reads, changes; a change of its own text,
            its defaults or its closure is noticed.

    Raises:
        SelectionError: A parameter is no fact.

    >>> @metric
    ... def sigma_gap(sigmas):
    ...     "Ratio of the two largest singular values."
    ...     return sigmas[:, 0] / sigmas[:, 1]
    >>> sigma_gap.needs
    'sigmas'
    """
    if function is None:
        return lambda f: _user_metric(f, name, summary, unit, range, version)
    return _user_metric(function, name, summary, unit, range, version)


def _user_metric(
    function: Callable[..., Tensor], name: str, summary: str, unit: str, value_range: str, version: int
) -> Metric:
    facts = tuple(inspect.signature(function).parameters)
    for fact in facts:
        if fact not in FACTS:
            raise SelectionError(
                f"metric {name or function.__name__!r}: parameter {fact!r} is no fact."
                f"{suggest(fact, FACTS)} Known: {', '.join(FACTS)}."
            )
    doc = (inspect.getdoc(function) or "").strip().partition("\n")[0]
    return Metric(
        name or function.__name__, function, facts, summary or doc, unit, value_range, "user", version=version,
        code=f"/{_digest(function)}",
    )  # fmt: skip


def _digest(function: Callable[..., Tensor]) -> str:
    """Digest of a function's text, default values and closure; what it reads from elsewhere is not in it."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    bound = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None), cells]
    return hashlib.sha256(_text(function).encode() + b"".join(map(_bytes, bound))).hexdigest()[:16]


def _bytes(value: Any) -> bytes:
    """What tells a value apart; one that cannot be pickled has its address in its text and is taken for no other."""
    try:
        return pickle.dumps(value)
    except Exception:
        return repr(value).encode()


def _text(function: Callable[..., Tensor]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt: the compiled code tells it apart
        code = getattr(function, "__code__", None)
        return repr((code.co_code, code.co_consts, code.co_names)) if code else repr(function)
