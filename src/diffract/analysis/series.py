"""From what a user names to a series of checkpoints in order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffract.analysis.run import split_name
from diffract.analysis.timeline import Place, Stop, arrange, parse_by, read_place
from diffract.checkpoints import Checkpoint, Reference
from diffract.checkpoints.series import ALONE, STATE, USUAL, find_checkpoints, some, trainer_state
from diffract.errors import CheckpointError, SelectionError, printable


def find_series(references: Sequence[Reference], by: str) -> tuple[list[Stop], list[str]]:
    """Return the checkpoints of a training run in order, and warnings.

    Args:
        references: The checkpoints, or one folder that holds them. Text may begin with ``name=``; what that name tells
            counts first.
        by: See ``timeline.parse_by``.

    Raises:
        DiffractError: There are fewer than two, or their order does not follow from ``by``.
    """
    ordering = parse_by(by)
    chosen, warnings = _expand(references)
    if len(chosen) < 2:
        only = f", {printable(chosen[0])!r}" if chosen and isinstance(chosen[0], str | Path) else ""
        raise CheckpointError(
            f"a trajectory needs at least two checkpoints, got {len(chosen)}{only}. Name several, or a folder that "
            "holds several. Use scan for one alone."
        )
    stops = _with_unique_names([_stop(reference, ordering.pattern) for reference in chosen])
    return arrange(stops, ordering), warnings


def _expand(references: Sequence[Reference]) -> tuple[list[Reference], list[str]]:
    """The checkpoints of the folder, if only one is named; anything else as it is."""
    folder = _local(references[0]) if len(references) == 1 else None
    if folder is None or not folder.is_dir():
        return list(references), []
    found = find_checkpoints(folder)
    warning = f"{printable(folder)}: {len(found.paths)} checkpoints; left out are {some(found.left_out)}."
    return list(found.paths), [warning] if found.left_out else []


def _local(reference: Reference) -> Path | None:
    """The path that a reference is, if there is something."""
    if not isinstance(reference, str | Path):
        return None
    try:
        path = Path(reference).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _stop(reference: Reference, pattern: re.Pattern[str] | None) -> Stop:
    given, inner = split_name(reference)
    labels = _labels(inner)
    texts = [*([given] if given else []), *labels]
    if pattern is not None:
        whole = [str(inner)] if isinstance(inner, str | Path) else []
        return Stop(given or "", inner, read_place([*texts, *whole], pattern), (*texts, *whole))
    return _with_state(Stop(given or "", inner, read_place(texts), tuple(texts)))


def _labels(reference: Reference) -> list[str]:
    """What tells a checkpoint apart: a revision and its repository, or the last part of a path."""
    path = _local(reference)
    if path is not None:
        stem = path.stem if path.name.endswith(ALONE) and path.is_file() else _folder_name(path)
        return [_folder_name(path.parent), stem] if path.is_file() and stem in USUAL else [stem]
    text = reference.reference if isinstance(reference, Checkpoint) else reference
    if not isinstance(text, str | Path) or str(text).startswith("<"):
        return []
    repository, _, revision = str(text).partition("@")
    return [part for part in (revision, re.split(r"[/\\]", repository.rstrip("/\\"))[-1]) if part]


def _folder_name(path: Path) -> str:
    """The name as it is written, of a link too; only ``.`` and ``..`` must be looked up."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _with_state(stop: Stop) -> Stop:
    """Fill in what the names leave open from the trainer's note; tokens are 0 there unless it was asked to count."""
    path = _local(stop.reference)
    state = trainer_state(path) if path else {}
    if not state:
        return stop
    step, tokens = (_count(state.get(key)) for key in ("global_step", "num_input_tokens_seen"))
    place = stop.place
    filled = Place(
        place.stage,
        step if place.step is None else place.step,
        (tokens or None) if place.tokens is None else place.tokens,
    )
    return replace(stop, place=filled, looked_at=(*stop.looked_at, STATE))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _with_unique_names(stops: Sequence[Stop]) -> list[Stop]:
    """Call each by its given name, or its label, or where several have that, by more of its reference."""
    given = Counter(stop.name for stop in stops if stop.name)
    if twice := next((name for name, count in given.items() if count > 1), None):
        raise SelectionError(f"two checkpoints are called {twice!r}. Give each a name of its own.")
    labels = [_labels(stop.reference) or [f"checkpoint-{i}"] for i, stop in enumerate(stops)]
    often = given + Counter(found[0] for stop, found in zip(stops, labels, strict=True) if not stop.name)
    taken, named = set(given), []
    for stop, found in zip(stops, labels, strict=True):
        wanted = found[0] if often[found[0]] == 1 else _long_name(stop.reference, found)
        name, number = stop.name or wanted, 2
        while not stop.name and name in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name)
        named.append(replace(stop, name=name))
    return named


def _long_name(reference: Reference, labels: Sequence[str]) -> str:
    path = _local(reference)
    return "/".join(path.absolute().parts[-2:]) if path else "@".join(reversed(labels))
