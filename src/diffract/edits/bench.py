"""What an edit works with: the model, and the other checkpoints that its steps name, each opened and checked once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from diffract.checkpoints import Checkpoint, Reference, open_checkpoint, row_blocks
from diffract.checkpoints.checkpoint import Range, Recorder, read_digests, recorded
from diffract.edits.draft import BLOCK_BYTES, Apply, Draft, Place, together
from diffract.edits.edit import Edit, Planned
from diffract.edits.mixing import interpolate
from diffract.errors import CheckpointError, printable
from diffract.matrices import Entry, Layout, Matrix, counterparts, lay_out, parse_selection, select

T = TypeVar("T")

Between = Callable[[Tensor, Tensor, float], Tensor]
"""``between(a, b, at)`` lies at ``at`` of the way from a to b."""

Plans = list[tuple[Edit, Planned]]
"""Edits in their order, and what each of them comes to."""

SHOWN = 8
"""Differences between two models that a message lists."""


@dataclass(frozen=True)
class Other:
    """Another checkpoint of the same shape as the model.

    Attributes:
        checkpoint: It.
        names: What it calls each of the model's tensors: ties may be stored once or twice.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]

    def read(self, name: str, place: Place) -> Tensor:
        """Return a part of a tensor by the model's name for it, in its stored dtype."""
        own = self.names[name]
        if not place:
            return self.checkpoint.read(own)
        rows = (place[0].start, place[0].stop)
        whole = rows == (0, self.checkpoint.info(own).shape[0])
        return self.checkpoint.read(own, None if whole else rows)[(slice(None), *place[1:])]

    def towards(self, name: str, at: float, between: Between = interpolate) -> Apply:
        """Return what moves parts of a tensor of the model towards this checkpoint's; at 1 they are its very bits."""

        def moved(values: Tensor, place: Place) -> Tensor:
            end = self.read(name, place)
            if at == 1:  # no arithmetic, which would not keep the bits of NaN and -0.0
                return end
            start, end = together(values, end)
            return between(start, end, at)

        return moved

    def block(self, name: str, rows: Range | None) -> Tensor:
        """Return a block of rows of a tensor."""
        return self.checkpoint.read(self.names[name], rows)

    def blocks(self, name: str) -> Iterator[tuple[Range | None, Tensor]]:
        """Yield all blocks of a tensor in their order."""
        for rows in row_blocks(self.checkpoint.info(self.names[name]), BLOCK_BYTES):
            yield rows, self.block(name, rows)


@dataclass(frozen=True)
class Input:
    """A checkpoint that went into an edit, and what was read of it."""

    checkpoint: Checkpoint
    recorder: Recorder

    def digests(self) -> dict[str, str]:
        """Return the digests of the tensors that were read."""
        return read_digests(self.checkpoint, self.recorder)


class Bench:
    """A model under edit. A context manager: what it opened is closed with it.

    Attributes:
        checkpoint: The model.
        layout: Its matrices, attention cut into heads.
        inputs: Every checkpoint that was opened, by what it was called; the model first.
    """

    def __init__(
        self,
        model: Reference,
        *,
        architecture: str | Path | None = None,
        adapter_base: Reference | None = None,
        record: bool = True,
    ) -> None:
        """Open the model; headers only.

        Args:
            model: What is edited.
            architecture: A JSON file that describes it; by default its config.json's ``model_type`` decides.
            adapter_base: The base of an adapter whose config names none that can be opened.
            record: Note the digests of what is read.
        """
        self._record = record
        self._opened = ExitStack()
        self._adapter_base = adapter_base
        self._architecture = architecture
        self._made: dict[Hashable, Any] = {}
        self.inputs: dict[str, Input] = {}
        try:
            self.checkpoint = self._open(model)
            self.layout = lay_out(self.checkpoint, spec_file=architecture)
        except BaseException:
            self._opened.close()
            raise

    @cached_property
    def whole_layout(self) -> Layout:
        """The model's matrices, none of them cut into heads."""
        return lay_out(self.checkpoint, heads=False, spec_file=self._architecture, check_ties=False)

    @cached_property
    def ties(self) -> dict[str, str]:
        """Tensors that share another's values, to that other."""
        tied = [name for name, entry in self.layout.entries.items() if entry.outcome == "tied"]
        names = self.checkpoint.names
        return {n: self.checkpoint.tied.get(n) or self.layout.architecture.tied_to(n, names) or n for n in tied}

    def draft(self) -> Draft:
        """Return the model as it is, to be changed."""
        return Draft(self.checkpoint, self.ties)

    def other(self, reference: Reference) -> Other:
        """Open a checkpoint of the same architecture, tensors and shapes.

        Raises:
            CheckpointError: It differs; the message lists how.
        """
        # Mappings and modules have no hash; the cache holds what was opened of them, so that no id is used twice.
        key = reference if isinstance(reference, str | Path) else id(reference)
        return self.remember(("other", key), lambda: match(self.layout, self._open(reference), self.ties))

    def entries(self) -> dict[str, Entry]:
        """Return the tensors that edits can change, by name: floating point, and not tied to another."""
        return {n: e for n, e in self.layout.entries.items() if e.info.is_float and n not in self.ties}

    def matrices(self, text: str | None, *, heads: bool) -> list[Matrix]:
        """Return selected matrices, attention cut into heads or not; all for ``None``."""
        layout = self.layout if heads else self.whole_layout
        return select(layout.matrices, parse_selection(text))

    def plan(self, edits: Iterable[Edit]) -> tuple[Draft, Plans]:
        """Return the model as edits will have changed it, one after the other, and what each comes to.

        Raises:
            DiffractError: An edit does not fit the model.
        """
        draft, plans = self.draft(), []
        for edit in edits:
            planned = edit.plan(self, draft)
            plans.append((edit, planned))
            draft = draft.then(planned.changes)
        return draft, plans

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made for this key, now or before."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def close(self) -> None:
        """Close what was opened; a checkpoint that was given open stays so."""
        self._opened.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, reference: Reference) -> Checkpoint:
        checkpoint = open_checkpoint(reference, base=self._adapter_base)
        if checkpoint is not reference:
            self._opened.callback(checkpoint.close)
        if not self._record:
            return checkpoint
        checkpoint, recorder = recorded(checkpoint)
        label = checkpoint.reference
        while label in self.inputs:
            label += "'"
        self.inputs[label] = Input(checkpoint, recorder)
        return checkpoint


def match(layout: Layout, checkpoint: Checkpoint, ties: Mapping[str, str]) -> Other:
    """Find each of a model's tensors in another checkpoint.

    Raises:
        CheckpointError: Tensors, shapes, or the architectures differ.
    """
    other = lay_out(checkpoint, like=layout.architecture, check_ties=False)
    # Ties may be stored once or twice: a tensor that is not there by its own name may be there by its twin's.
    called = {own: name for name, own in counterparts(layout, other).items()}
    names = {name: called.get(name) or _own_name(name, other, ties) for name in layout.entries}
    missing = [name for name, own in names.items() if own is None]
    used = set(names.values())
    extra = [n for n in checkpoint.names if n not in used and other.entries[n].outcome != "tied"]
    shaped = {n: own for n, own in names.items() if own is not None}
    resized = [n for n, own in shaped.items() if checkpoint.info(own).shape != layout.entries[n].info.shape]
    lines = [
        *_architectures(layout, other),
        *(f"{printable(n)}: {_shape(layout.checkpoint, n)} against {_shape(checkpoint, shaped[n])}" for n in resized),
        *(f"{printable(n)}: only in the model" for n in missing),
        *(f"{printable(n)}: only in the other" for n in extra),
    ]
    if lines:
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise CheckpointError(
            f"{printable(layout.checkpoint.reference)} and {printable(checkpoint.reference)} are not of one shape: "
            f"{'; '.join(lines[:SHOWN])}{more}. Take checkpoints of one architecture and vocabulary."
        )
    return Other(checkpoint, shaped)


def _own_name(name: str, other: Layout, ties: Mapping[str, str]) -> str | None:
    """What another checkpoint calls a tensor; where it ties what the model does not, there is a twin."""
    names = other.checkpoint.names
    if name in other.checkpoint:
        return name
    twins = (ties.get(name), other.architecture.tied_to(name, names))
    return next((twin for twin in twins if twin in other.checkpoint), None)


def _shape(checkpoint: Checkpoint, name: str) -> list[int]:
    return list(checkpoint.info(name).shape)


def _architectures(one: Layout, two: Layout) -> list[str]:
    """Say how two models differ beyond their tensors: the same tensors may be cut into other heads."""
    a, b = one.architecture, two.architecture
    found = [f"architecture {a.family} against {b.family}"] if a.family != b.family else []
    words = {"heads": "heads", "kv_heads": "key-value heads", "head_dim": "head size"}
    differ = ((word, getattr(a.dimensions, key), getattr(b.dimensions, key)) for key, word in words.items())
    return found + [f"{x} {word} against {y}" for word, x, y in differ if x != y]
