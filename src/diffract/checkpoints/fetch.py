"""Bringing models of the hub into its client's cache, so that they can be read where there is no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from diffract.checkpoints.hub import HubFolder, download, find_hub_folder, wanted_files
from diffract.checkpoints.open import base_within, parse_hub_name
from diffract.errors import CheckpointError, choose, printable
from diffract.settings import size_text
from diffract.store import free_bytes

WEIGHTS_ONLY = ("inspect", "scan", "compare", "heads", "trajectory")
WITH_MODELS = (*WEIGHTS_ONLY, "eval", "lora", "edit", "search", "train")
"""What models are fetched for, and of these what reads weights and configuration only."""


@dataclass(frozen=True)
class Fetched:
    """A model of the hub that was asked for, or the base of an adapter that was.

    Attributes:
        reference: The very version, ``org/name@commit``.
        files: Those that are wanted of it.
        absent: Those of them that the cache did not hold.
        fetch_bytes: Bytes of the absent files, as the hub lists them.
    """

    reference: str
    files: tuple[str, ...]
    absent: tuple[str, ...]
    fetch_bytes: int


def fetch(*refs: str, for_: str | None = None, dry_run: bool = False, say: Callable[[str], None]) -> dict[str, Any]:
    """Bring models into the cache of the hub's client, so that all commands read them without a network.

    Weights, configuration, tokenizer and what else an edited model keeps are fetched, and the base of an adapter with
    it; how many bytes that is, is said before. What the cache holds is not fetched again.

    Args:
        refs: Models on the hub, org/name@revision or org/name/folder@revision each.
        for_: What they are fetched for, such as compare,heads. These need no tokenizer, and no other file beside
            weights and configuration: inspect, scan, compare, heads, trajectory.
        dry_run: Say how many bytes there are to fetch, and fetch nothing.
        say: Called with what is being done.

    Raises:
        CheckpointError: There is no such model, it cannot be reached, or the disk has no room for it.
        SelectionError: There is no such command.
    """
    asked = [choose("command", name.strip(), WITH_MODELS) for name in for_.split(",")] if for_ else WITH_MODELS
    companions = not set(asked) <= set(WEIGHTS_ONLY)
    found: list[Fetched] = []
    folders = {folder.where: folder for ref in refs for folder in _with_bases(ref)}
    for folder in folders.values():
        files = wanted_files(folder, companions=companions)
        absent = [name for name in files if not folder.is_cached(name)]
        size = sum(folder.files[name] or 0 for name in absent)
        found.append(Fetched(folder.where, tuple(files), tuple(absent), size))
        say(f"{folder.where}: {len(absent)} of {len(files)} files are to be fetched, {size_text(size)}")
    total = sum(one.fetch_bytes for one in found)
    if not dry_run:
        _refuse_full_disk(total)
        for folder, one in zip(folders.values(), found, strict=True):
            say(f"{folder.where}: {download(folder, one.files)}")
    return {"models": [asdict(one) for one in found], "fetch_bytes": total, "fetched": not dry_run}


def _with_bases(ref: str) -> Iterator[HubFolder]:
    """Yield a model, and the base of each adapter."""
    seen: set[str] = set()
    while name := parse_hub_name(ref):
        folder = find_hub_folder(*name)
        if folder.where in seen:
            return
        seen.add(folder.where)
        yield folder
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
