"""What an edit works with: the model, and the other checkpoints that its steps name, each opened and checked once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from diffract.checkpoints import Checkpoint, Reference, open_checkpoint, row_blocks
from diffract.checkpoints.checkpoint import Range, Recorder, read_digests, recorded, unrecorded
from diffract.edits.directions import Decompositions
from diffract.edits.draft import BLOCK_BYTES, Apply, Draft, Place, together
from diffract.edits.edit import Edit, Planned
from diffract.edits.mixing import interpolate
from diffract.errors import CheckpointError, printable, suggest
from diffract.matrices import Entry, Layout, Matrix, lay_out, parse_selection, regrouped_like, select
from diffract.matrices.meeting import STRANGERS, Meeting, Objection, Permissions, Vocabulary, meet

T = TypeVar("T")

Between = Callable[[Tensor, Tensor, float], Tensor]
"""``between(a, b, at)`` lies at ``at`` of the way from a to b."""

Plans = list[tuple[Edit, Planned]]
"""Edits in their order, and what each of them comes to."""


@dataclass(frozen=True)
class Other:
    """Another checkpoint that weights are taken from.

    Attributes:
        checkpoint: What it is.
        names: What it calls those of the model's tensors that can be taken from it; ties may be stored once or twice.
        rows: Of tables with another number of tokens, how many of the first rows can be taken.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]
    rows: Mapping[str, int] = field(default_factory=dict)

    def shared(self, name: str, place: Place) -> Place | None:
        """Return the part of a place in a tensor of the model that can be taken from here; ``None`` if none can."""
        if name not in self.names:
            return None
        count = self.rows.get(name)
        if count is None or place[0].stop <= count:
            return place
        return (slice(place[0].start, count), *place[1:]) if place[0].start < count else None

    def shared_matrices(self, matrices: Iterable[Matrix]) -> list[Matrix]:
        """Return those of the model's matrices that can be taken from here, tables of tokens as far as they can."""
        found = []
        for m in matrices:
            count = self.rows.get(m.tensor)
            if m.tensor in self.names and count != 0:
                found.append(m if count is None else replace(m, rows=(0, count), shape=(count, m.shape[1])))
        return found

    def beside(
        self, name: str, blocks: Iterable[tuple[Range | None, Tensor]]
    ) -> Iterator[tuple[Range | None, Tensor, Tensor]]:
        """Yield blocks of a tensor of the model, as far as it can be taken from here, and this one's beside them.

        Both come in the one dtype that edits compute in.
        """
        count = self.rows.get(name)
        for rows, block in blocks:
            common, part = rows, block
            if count is not None:
                first, last = rows or (0, len(block))
                common, part = (first, min(last, count)), block[: max(0, count - first)]
            if count is None or len(part):
                one, two = together(part, self.checkpoint.read_unrounded(self.names[name], common))
                yield common, one, two

    def read(self, name: str, place: Place) -> Tensor:
        """Return a part of a tensor by the model's name for it, as stored or, of an adapter, unrounded."""
        own = self.names[name]
        if not place:
            return self.checkpoint.read_unrounded(own)
        rows = (place[0].start, place[0].stop)
        whole = rows == (0, self.checkpoint.info(own).shape[0])
        return self.checkpoint.read_unrounded(own, None if whole else rows)[(slice(None), *place[1:])]

    def towards(self, name: str, at: float, between: Between = interpolate) -> Apply:
        """Return what moves parts of a tensor of the model towards this checkpoint's; at 1 they are its very bits."""

        def moved(values: Tensor, place: Place) -> Tensor:
            end = self.read(name, place)
            if at == 1:  # no arithmetic, which would not keep the bits of NaN and -0.0
                return end
            start, end = together(values, end)
            return between(start, end, at)

        return moved

    def blocks(self, name: str) -> Iterator[tuple[Range | None, Tensor]]:
        """Yield all blocks of a tensor in their order."""
        for rows in row_blocks(self.checkpoint.info(self.names[name]), BLOCK_BYTES):
            yield rows, self.checkpoint.read_unrounded(self.names[name], rows)


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
        kept: For each other checkpoint what was not taken from it or not used of it, by name, with the reason.
        notes: What a reader of the outcome should know, in sentences.
        permissions: What is allowed though it speaks against taking weights from another model.
        decompositions: Those of matrices that edits asked for; ``None`` where none are kept, as of edits made once.
    """

    decompositions: Decompositions | None = None

    def __init__(
        self,
        model: Reference,
        *,
        architecture: str | Path | None = None,
        adapter_base: Reference | None = None,
        download: bool = False,
        allow: Collection[str] = (),
        vocabulary: Vocabulary = "common",
        record: bool = True,
    ) -> None:
        """Open the model; headers only.

        Args:
            model: What is edited.
            architecture: A JSON file that describes it; by default its config.json's ``model_type`` decides.
            adapter_base: The base of an adapter whose config names none that can be opened.
            download: Fetch models of the hub whole instead of reading byte ranges.
            allow: Names of what is allowed though it speaks against taking weights from another model: ``strangers``,
                ``tokenizers``, ``unmatched``, or keys of their configurations, such as ``rope_theta``.
            vocabulary: What becomes of tables with another number of tokens: the ``common`` rows count, or ``refuse``.
            record: Note the digests of what is read.
        """
        self._record = record
        self.permissions = Permissions(allow)
        self._vocabulary: Vocabulary = vocabulary
        self._opened = ExitStack()
        self._adapter_base, self._download = adapter_base, download
        self._architecture = architecture
        self._made: dict[Hashable, Any] = {}
        self._configs: list[Mapping[str, Any]] = []
        self.inputs: dict[str, Input] = {}
        self.kept: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []
        try:
            self.layout = lay_out(self._open(model), spec_file=architecture)
            self.checkpoint = self.layout.checkpoint
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

    def meet(self, references: Sequence[Reference], asked: Collection[str], *, chosen: bool) -> list[Other]:
        """Open checkpoints that an edit takes weights from, and find out what can be taken.

        What only one of the models has stays as it is in the model: buffers, task heads, layers that predict further
        tokens, rows of tokens that the other does not know. ``kept`` lists it.

        Args:
            references: The others; what is taken, is there in all of them.
            asked: The names of the tensors that the edit takes.
            chosen: Whether a user named these: then all of them must be there.

        Raises:
            CheckpointError: Something speaks against it and is not allowed; the message has all of it.
        """
        # Mappings and modules have no hash; the cache holds what was opened of them, so that no id is used twice.
        keys = [reference if isinstance(reference, str | Path) else id(reference) for reference in references]
        pairs = [
            self.remember(("other", key), lambda r=reference: self._met(r))
            for key, reference in zip(keys, references, strict=True)
        ]
        objections: list[tuple[Checkpoint, list[Objection]]] = []
        for checkpoint, met in pairs:
            own = met.against(asked, chosen=chosen, vocabulary=self._vocabulary)
            kept = [o for o in own if not self.permissions.allows((o.option or "").removeprefix("--allow "))]
            objections.append((checkpoint, kept))
        self._refuse(objections)
        names = set(asked).intersection(*(met.names for _, met in pairs))
        if asked and not names:
            where = ", ".join(printable(checkpoint.reference) for checkpoint, _ in pairs)
            raise CheckpointError(
                f"{where}: nothing of what is asked for is there. Take checkpoints of one architecture."
            )
        rows: dict[str, int] = {}
        for checkpoint, met in pairs:
            rows |= {name: min(count, rows.get(name, count)) for name, count in met.rows.items()}
            label = checkpoint.reference
            if label not in self.kept:  # what is not taken is said once, though several edits take from one model
                self.kept[label] = met.stays()
                self.notes += met.told(printable(label))
        return [
            Other(checkpoint, {n: met.names[n] for n in met.names if n in names}, rows) for checkpoint, met in pairs
        ]

    def counterparts(self, reference: Reference) -> tuple[Mapping[str, str], Checkpoint]:
        """Return what another checkpoint calls the model's tensors, and that checkpoint, whatever sets them apart.

        Raises:
            CheckpointError: They are strangers, and that is not allowed.
        """
        checkpoint, met = self._met(reference)
        apart = [
            o for o in met.objections if o.option == f"--allow {STRANGERS}" and not self.permissions.allows(STRANGERS)
        ]
        self._refuse([(checkpoint, apart)])
        return met.names, checkpoint

    def _met(self, reference: Reference) -> tuple[Checkpoint, Meeting]:
        checkpoint = self._open(reference)
        # without notes: what is looked at to find out whether two models belong together is no input of the outcome
        model = replace(self.layout, checkpoint=unrecorded(self.checkpoint))
        like = self.layout.architecture
        other, quiet = (
            regrouped_like(self.layout, lay_out(one, spec_file=self._architecture, like=like, check_ties=False))
            for one in (checkpoint, unrecorded(checkpoint))
        )
        return other.checkpoint, meet(model, quiet, self.ties)

    def _refuse(self, found: Sequence[tuple[Checkpoint, list[Objection]]]) -> None:
        """Raise one error with everything that speaks against others of an edit, if anything does."""
        told = [f"{printable(c.reference)}: {'; '.join(o.text for o in own)}" for c, own in found if own]
        if not told:
            return
        options = dict.fromkeys(objection.option for _, own in found for objection in own)
        where = printable(self.checkpoint.reference)
        text = f"weights of {where} and of other models do not belong together. {'. '.join(told)}."
        if None not in options:
            text += f" Take models of one origin; or, to do it all the same, pass {' '.join(map(str, options))}."
        needed = [str(option).removeprefix("--allow ") for option in options if option]
        near = {word: suggest(word, needed) for word in self.permissions.names}
        raise CheckpointError(text + next((hint for hint in near.values() if hint), ""))

    def entries(self) -> dict[str, Entry]:
        """Return the tensors that edits can change, by name: floating point, no buffer, and not tied to another."""
        found = self.layout.entries.items()
        return {n: e for n, e in found if e.info.is_float and e.outcome != "buffer" and n not in self.ties}

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
        if plans:  # only now are all models open whose keys may be allowed
            self.permissions.check(self._configs)
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
        checkpoint = open_checkpoint(reference, base=self._adapter_base, download=self._download)
        if checkpoint is not reference:
            self._opened.callback(checkpoint.close)
        self._configs.append(checkpoint.config)
        if not self._record:
            return checkpoint
        checkpoint, recorder = recorded(checkpoint)
        label = checkpoint.reference
        while label in self.inputs:
            label += "'"
        self.inputs[label] = Input(checkpoint, recorder)
        return checkpoint
