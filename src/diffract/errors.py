"""The errors a user can meet. Each message says what was expected, what came, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeVar

K = TypeVar("K", bound=str)

SHOWN = 20
"""Names that a message lists; a model has thousands of matrices."""


class DiffractError(ValueError):
    """Base of every error that the input, not the program, is the reason for."""


class CheckpointError(DiffractError):
    """A checkpoint cannot be opened, is damaged, or holds something that is refused."""


class ArchitectureError(DiffractError):
    """An architecture file is wrong, or does not describe the checkpoint it is applied to."""


class SelectionError(DiffractError):
    """A selection, a metric or an option names something that is not there."""


class RunError(DiffractError):
    """A run folder cannot be read or written."""


class RecipeError(DiffractError):
    """A recipe, or a setting of an edit, is wrong."""


class CorpusError(DiffractError):
    """Text for training or evaluation cannot be read, or must not be used so."""


class DiffractWarning(UserWarning):
    """Something that is not as it should be, without which work goes on."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known names, or an empty string."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.55)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def choose(
    what: str, value: object, known: Iterable[K], *, further: str = "", error: type[DiffractError] = SelectionError
) -> K:
    """Return a value that is one of the known ones.

    Args:
        what: What the value is to name, for the message.
        value: What the user has written.
        known: The names that there are.
        further: What else would have been accepted, in words.
        error: What is raised.

    Raises:
        DiffractError: The value is unknown; the message lists the known ones and suggests the nearest.

    >>> choose("rule", "mpp", ["mp", "pr"])
    Traceback (most recent call last):
    diffract.errors.SelectionError: unknown rule 'mpp', expected one of: mp, pr. Did you mean 'mp'?
    """
    names = list(known)
    for name in names:
        if name == value:
            return name
    listed = [printable(name, 60) for name in names[:SHOWN]] + ([further] if further else [])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise error(
        f"unknown {what} {printable(value)!r}, expected one of: {', '.join(listed)}{more}.{suggest(str(value), names)}"
    )


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names in words.

    >>> some(["a", "b", "c"], 2), some([])
    ('a, b and 1 more', 'nothing')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, 60) for name in names[:most]) + more or "nothing"


def printable(text: object, limit: int = 200) -> str:
    """Return untrusted text safe for a terminal: control characters escaped, length bounded."""
    escaped = escape(str(text))
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def escape(text: str, *, keep: str = "") -> str:
    r"""Return text in which everything that a terminal acts on, or cannot show, is written as its escape.

    Args:
        text: Text of any length.
        keep: Such characters that stay.

    >>> escape("a\x1b[2J\nb", keep="\n")
    'a\\x1b[2J\nb'
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
