"""The errors a user can meet. Each message says what was expected, what came, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known names, or an empty string."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.55)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def printable(text: object, limit: int = 200) -> str:
    """Return untrusted text safe for a terminal: control characters escaped, length bounded."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"
