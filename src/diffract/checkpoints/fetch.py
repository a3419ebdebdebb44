"""Bringing models of the hub into its client's cache, so that they can be read where there is no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from diffract.checkpoints.hub import HubFolder, download_hub, find_hub_folder, wanted_files
from diffract.checkpoints.open import base_within, parse_hub_name
from diffract.errors import CheckpointError, printable
from diffract.settings import size_text
from diffract.store import free_bytes


@dataclass(frozen=True)
class Fetched:
    """A model of the hub that was asked for, or the base of an adapter that was.

    Attributes:
        reference: The very version, ``org/name@commit``.
        files: Weights, configuration and tokenizer.
        absent: Those of them that the cache did not hold.
        fetch_bytes: Bytes of the absent files, as the hub lists them.
    """

    reference: str
    files: tuple[str, ...]
    absent: tuple[str, ...]
    fetch_bytes: int


def fetch(*refs: str, dry_run: bool = False, say: Callable[[str], None]) -> dict[str, Any]:
    """Bring models into the cache of the hub's client, so that all commands read them without a network.

    Weights, configuration and tokenizer are fetched, and the base of an adapter with it; how many bytes that is, is
    said before. What the cache holds is not fetched again.

    Args:
        refs: Models on the hub, org/name@revision each.
        dry_run: Say how many bytes there are to fetch, and fetch nothing.
        say: Called with what is being done.

    Raises:
        CheckpointError: There is no such model, it cannot be reached, or the disk has no room for it.
    """
    found: list[Fetched] = []
    named = dict(model for ref in refs for model in _with_bases(ref))
    for folder in named.values():
        files = wanted_files(folder.names)
        absent = [name for name in files if folder.cached is None or name not in folder.cached.names]
        size = sum(folder.files[name] or 0 for name in absent)
        found.append(Fetched(folder.where, tuple(files), tuple(absent), size))
        say(f"{folder.where}: {len(absent)} of {len(files)} files are to be fetched, {size_text(size)}")
    total = sum(one.fetch_bytes for one in found)
    if not dry_run:
        _refuse_full_disk(total)
        for (repo, revision), folder in named.items():
            say(f"{folder.where}: {download_hub(repo, revision)}")
    return {"models": [asdict(one) for one in found], "fetch_bytes": total, "fetched": not dry_run}


def _with_bases(ref: str) -> Iterator[tuple[tuple[str, str | None], HubFolder]]:
    """Yield a model, and the base of each adapter, by repository and revision."""
    seen: set[str] = set()
    while named := parse_hub_name(ref):
        folder = find_hub_folder(*named)
        if folder.where in seen:
            return
        seen.add(folder.where)
        yield named, folder
        base = base_within(folder)
        if base is None:
            return
        ref = str(base)
    if not seen or not Path(ref).exists():
        raise CheckpointError(f"{printable(ref)!r} is no model on the hub. Expected org/name@revision.")


def _refuse_full_disk(needed: int) -> None:
    place = Path(constants.HF_HUB_CACHE).absolute()
    room = free_bytes(place)
    if needed > room:
        raise CheckpointError(
            f"{size_text(needed)} are to be fetched, and {str(place)!r} has room for {size_text(room)}. Make room "
            "there, or set HF_HOME to a folder on another disk."
        )
