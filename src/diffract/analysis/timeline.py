"""Where a checkpoint stands in its training run, as its names tell, and the order that follows from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffract.analysis.scan import split_name
from diffract.checkpoints import Checkpoint, Reference
from diffract.checkpoints.series import ALONE, STATE, USUAL, find_checkpoints, trainer_state
from diffract.errors import CheckpointError, SelectionError, choose, printable, some
from diffract.settings import natural_key

BY = ("step", "tokens", "name", "given")
"""What checkpoints are put in order by, besides a regular expression."""

LARGEST = 2**63 - 1
"""A table's integers end here."""

_SCALES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = r"(?P<number>[0-9]{1,18}(?:\.[0-9]{1,9})?)(?P<unit>[KMBT]?)(?![a-z0-9])"
_START = r"(?<![a-z])"


def _compile(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern, re.ASCII | re.IGNORECASE) for pattern in patterns)


_CONVENTIONS = {
    "stage": _compile(rf"{_START}stage[-_=]?{_NUMBER}"),
    "step": _compile(
        rf"{_START}steps?[-_=]?{_NUMBER}",
        rf"{_START}iter(?:ation)?s?[-_=]?{_NUMBER}",
        rf"{_START}(?:checkpoint|ckpt)[-_=]?{_NUMBER}",
        r"^(?P<number>[0-9]{1,18})(?P<unit>)$",
    ),
    "tokens": _compile(
        rf"{_START}tokens?[-_=]?{_NUMBER}",
        r"(?<![a-z0-9.])(?P<number>[0-9]{1,18}(?:\.[0-9]{1,9})?)(?P<unit>[KMBT])[-_]?tokens?(?![a-z])",
    ),
}
"""How the makers of models write it: step1000, step_02000, global_step1000, iter_0001000, checkpoint-500, 500."""

_INGREDIENT = re.compile(rf"{_START}ingredient[-_=]?([0-9]{{1,9}})(?![a-z0-9])", re.ASCII | re.IGNORECASE)
"""How OLMo-2 names branches of a stage, which begin at one checkpoint and are averaged in the end."""

EXAMPLES = "step1000, stage1-step10000-tokens21B, iter_0001000 or checkpoint-500"


@dataclass(frozen=True)
class Milestone:
    """Where a checkpoint stands; ``None`` for what is not told.

    Attributes:
        stage: Of a training run in several stages, each of which counts its steps anew.
        step: Optimizer steps.
        tokens: Tokens seen.
    """

    stage: int | None = None
    step: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Stop:
    """One checkpoint of a series.

    Attributes:
        name: What tables call it.
        reference: What to open.
        place: Where it stands.
        looked_at: The texts that were searched for it.
    """

    name: str
    reference: Any
    place: Milestone = Milestone()
    looked_at: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ordering:
    """How checkpoints are put in order.

    Attributes:
        key: One of ``BY``.
        pattern: A user's own, with groups ``step``, ``tokens`` or ``stage``.
    """

    key: str
    pattern: re.Pattern[str] | None = None


def parse_by(text: str) -> Ordering:
    """Return the ordering that a text means: one of ``BY``, or a regular expression with named groups.

    Raises:
        SelectionError: It is neither.

    >>> parse_by(r"epoch(?P<step>[0-9]+)").key
    'step'
    """
    if text in BY:
        return Ordering(text)
    if "(?P<" not in text:
        choose("order", text, BY, further="a regular expression with a group (?P<step>...) or (?P<tokens>...)")
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise SelectionError(f"{printable(text)!r} is no regular expression: {error}. Mend it.") from error
    groups = set(pattern.groupindex)
    if not groups & {"step", "tokens"} or not groups <= {"stage", "step", "tokens"}:
        raise SelectionError(
            f"the groups of {printable(text)!r} are called {', '.join(sorted(groups))}, expected step or tokens, and "
            "stage where there are several. Rename them."
        )
    return Ordering("step" if "step" in groups else "tokens", pattern)


def read_place(texts: Iterable[str], pattern: re.Pattern[str] | None = None) -> Milestone:
    """Return what names tell; each of stage, step and tokens from the first text that tells it.

    Args:
        texts: A revision, the name of a folder or a file, ...
        pattern: A user's own; it counts instead of the conventions.

    >>> read_place(["stage1-step10000-tokens21B"])
    Milestone(stage=1, step=10000, tokens=21000000000)
    """
    searched = list(texts)
    if pattern is not None:
        told = (_own_place(pattern, text) for text in searched)
        return next((place for place in told if place != Milestone()), Milestone())
    return Milestone(**{what: _told(patterns, searched) for what, patterns in _CONVENTIONS.items()})


def amount(number: str, unit: str = "") -> int | None:
    """Return a count with an optional suffix K, M, B or T as a number; ``None`` if it is no whole one.

    >>> amount("1.5", "T"), amount("02000"), amount("1.5")
    (1500000000000, 2000, None)
    """
    value = Decimal(number) * _SCALES[unit.upper()]
    return int(value) if value == int(value) and value <= LARGEST else None


def arrange(stops: Sequence[Stop], ordering: Ordering) -> list[Stop]:
    """Return checkpoints in order: by (stage, step), by (stage, tokens), by name with its numbers as numbers, as given.

    Raises:
        SelectionError: A checkpoint does not tell what they are ordered by, two of them are at one place, or they are
            of several branches.
    """
    if ordering.key == "given":
        return list(stops)
    _refuse_branches(stops)
    if ordering.key == "name":
        keys = [natural_key(stop.name) for stop in stops]
    else:
        _refuse_untold(stops, ordering)
        _refuse_mixed_stages(stops)
        keys = [(stop.place.stage or 0, getattr(stop.place, ordering.key)) for stop in stops]
    ordered = sorted(zip(keys, stops, strict=True), key=lambda pair: pair[0])
    for (key, one), (other_key, other) in pairwise(ordered):
        if key == other_key:
            raise SelectionError(
                f"{_named(one)} and {_named(other)} are at one place ({_describe(one.place, ordering.key)}). "
                "Leave one out, or pass --by given to take them as they are given."
            )
    return [stop for _, stop in ordered]


def _told(patterns: Sequence[re.Pattern[str]], texts: Sequence[str]) -> int | None:
    found = (pattern.search(text) for text in texts for pattern in patterns)
    values = (amount(match["number"], match["unit"]) for match in found if match)
    return next((value for value in values if value is not None), None)


def _own_place(pattern: re.Pattern[str], text: str) -> Milestone:
    told, found = pattern.search(text), {}
    for name, value in told.groupdict().items() if told else ():
        if value is None:
            continue
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([KMBTkmbt]?)", value, re.ASCII)
        found[name] = amount(match[1], match[2]) if match else None
        if found[name] is None:
            raise SelectionError(
                f"--by finds {printable(value)!r} in {printable(text)!r}, expected a number such as 1000 or 21B. "
                "Narrow the group to the digits."
            )
    return Milestone(**found)


def _refuse_untold(stops: Sequence[Stop], ordering: Ordering) -> None:
    untold = [stop for stop in stops if getattr(stop.place, ordering.key) is None]
    if not untold:
        return
    looked = ", ".join(repr(printable(text)) for text in untold[0].looked_at) or "nothing: it has no name"
    wanted = f"what {printable(ordering.pattern.pattern)!r} finds" if ordering.pattern else f"a name like {EXAMPLES}"
    other = "tokens" if ordering.key == "step" else "step"
    told = all(getattr(stop.place, other) is not None for stop in stops)
    hint = f" Every one tells {other}: pass --by {other}." if told else ""
    raise SelectionError(
        f"{len(untold)} of {len(stops)} checkpoints tell no {ordering.key}, first {_named(untold[0])} (looked at "
        f"{looked}). Expected {wanted}.{hint} Rename it, call it {ordering.key}1000=MODEL, leave it out, or pass "
        "--by name, --by given or a regular expression."
    )


def _refuse_branches(stops: Sequence[Stop]) -> None:
    """Refuse ingredients of several numbers: none of them goes on where another ends, whatever their steps are."""
    first: dict[int, Stop] = {}
    for stop in stops:
        told = next((match for text in stop.looked_at if (match := _INGREDIENT.search(text))), None)
        if told:
            first.setdefault(int(told[1]), stop)
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise SelectionError(
            f"{_named(one)} and {_named(other)} are of {len(first)} branches of one stage, not of one series. Leave "
            "all ingredients but one out, or pass --by given to take them as they are given."
        )


def _refuse_mixed_stages(stops: Sequence[Stop]) -> None:
    without = [stop for stop in stops if stop.place.stage is None]
    if without and len(without) < len(stops):
        inside = next(stop for stop in stops if stop.place.stage is not None)
        raise SelectionError(
            f"{_named(inside)} tells a stage and {_named(without[0])} none, so that their steps cannot be compared. "
            "Call it stage1-step1000=MODEL, leave it out, or pass --by given."
        )


def _named(stop: Stop) -> str:
    text = stop.reference if isinstance(stop.reference, str) else stop.name
    return repr(printable(text))


def _describe(place: Milestone, key: str) -> str:
    told = {"stage": place.stage, key: getattr(place, key, None)}
    return ", ".join(f"{name} {value:,}" for name, value in told.items() if value is not None) or "one name"


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
    chosen, warnings = list(references), []
    folder = local_path(chosen[0]) if len(chosen) == 1 else None
    if folder is not None and folder.is_dir():
        found = find_checkpoints(folder)
        # A name that is given counts first: the path of a snapshot of a repository tells a digest.
        called = {path: name.replace("/", "-") for path, name in found.called.items()}
        chosen = [f"{called[path]}={path}" if path in called else path for path in found.paths]
        if found.left_out:
            warnings = [f"{printable(folder)}: {len(chosen)} checkpoints; left out are {some(found.left_out)}."]
    if len(chosen) < 2:
        only = f", {printable(chosen[0])!r}" if chosen and isinstance(chosen[0], str | Path) else ""
        raise CheckpointError(
            f"a trajectory needs at least two checkpoints, got {len(chosen)}{only}. Name several, or a folder that "
            "holds several. Use scan for one alone."
        )
    stops = _with_unique_names([locate(reference, ordering.pattern) for reference in chosen])
    return arrange(stops, ordering), warnings


def local_path(reference: Reference) -> Path | None:
    """Return the path that a reference is, if there is something."""
    if not isinstance(reference, str | Path):
        return None
    try:
        path = Path(reference).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def locate(reference: Reference, pattern: re.Pattern[str] | None = None) -> Stop:
    """Return where a checkpoint stands, as its names or the trainer's note beside it tell.

    Args:
        reference: The checkpoint; text may begin with ``name=``.
        pattern: A user's own, by which names alone are read.
    """
    given, inner = split_name(reference)
    labels = _labels(inner)
    texts = [*([given] if given else []), *labels]
    if pattern is not None:
        whole = [str(inner)] if isinstance(inner, str | Path) else []
        return Stop(given or "", inner, read_place([*texts, *whole], pattern), (*texts, *whole))
    stop = _with_state(Stop(given or "", inner, read_place(texts), tuple(texts)))
    path = local_path(inner)
    if path is None or stop.place != Milestone():
        return stop
    # In global_step_100/actor/huggingface the folder of the model tells nothing, those around it do.
    above = [parent.name for parent in path.absolute().parents[:ABOVE]]
    return replace(stop, place=told) if (told := read_place(above)) != Milestone() else stop


ABOVE = 2
"""Folders around a checkpoint that are asked for its step where it tells none itself."""


def _labels(reference: Reference) -> list[str]:
    """What tells a checkpoint apart: a revision and its repository, or the last part of a path."""
    if path := local_path(reference):
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
    path = local_path(stop.reference)
    state = trainer_state(path) if path else {}
    if not state:
        return stop
    told = (state.get(key) for key in ("global_step", "num_input_tokens_seen"))
    step, tokens = (n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None for n in told)
    place = stop.place
    filled = replace(
        place,
        step=step if place.step is None else place.step,
        tokens=(tokens or None) if place.tokens is None else place.tokens,
    )
    return replace(stop, place=filled, looked_at=(*stop.looked_at, STATE))


def _with_unique_names(stops: Sequence[Stop]) -> list[Stop]:
    """Call each by its given name, or its label, or where several have that, by more of its reference."""
    given = Counter(stop.name for stop in stops if stop.name)
    if twice := next((name for name, count in given.items() if count > 1), None):
        raise SelectionError(f"two checkpoints are called {twice!r}. Give each a name of its own.")
    labels = [_labels(stop.reference) or [f"checkpoint-{i}"] for i, stop in enumerate(stops)]
    often = given + Counter(found[0] for stop, found in zip(stops, labels, strict=True) if not stop.name)
    taken, named = set(given), []
    for stop, found in zip(stops, labels, strict=True):
        path = local_path(stop.reference)
        longer = "/".join(path.absolute().parts[-2:]) if path else "@".join(reversed(found))
        wanted = found[0] if often[found[0]] == 1 else longer
        name, number = stop.name or wanted, 2
        while not stop.name and name in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name)
        named.append(replace(stop, name=name))
    return named
