"""Names of models and tokenizers, as transformers takes them."""

from __future__ import annotations

from pathlib import Path


def hub_parts(named: str) -> tuple[str, str | None]:
    """Return a folder, or a name on the hub, and the revision.

    >>> hub_parts("org/name@step1000")
    ('org/name', 'step1000')
    """
    if Path(named).exists():
        return named, None
    name, _, revision = named.partition("@")
    return name, revision or None
