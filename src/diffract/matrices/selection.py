"""Choose matrices in words: ``layers 0-7, attn.q, attn.o``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffract.errors import SelectionError, printable, suggest
from diffract.matrices.matrix import Matrix

LABELS = {"layer": "layer", "head": "head", "kv_head": "kv_head", "expert": "expert"}

_RANGE = re.compile(r"(\d{1,6})(?:(-)(\d{1,6})?)?", re.ASCII)

GRAMMAR = (
    "Terms are separated by commas: 'layers 0-7', 'heads 3', 'kv_heads 0', 'experts 0-3 8' restrict numbers; "
    "'attn', 'attn.q', 'L3.attn.*' or a tensor name with * name parts of the model."
)


@dataclass(frozen=True)
class Selection:
    """Which matrices are wanted.

    Attributes:
        numbers: For each label, the ranges of numbers one of which must hold it.
        names: Blocks, ``block.projection``, or patterns of matrix or tensor names; one of them must fit.
    """

    numbers: dict[str, tuple[range, ...]]
    names: tuple[str, ...]

    def keeps(self, matrix: Matrix) -> bool:
        """Whether a matrix is selected."""
        numbered = all(any(getattr(matrix, label) in span for span in spans) for label, spans in self.numbers.items())
        return numbered and (not self.names or any(_fits(name, matrix) for name in self.names))


def parse_selection(text: str | None) -> Selection:
    """Read a selection; ``None`` or an empty text selects everything.

    Terms that restrict the same label, and names, are alternatives; different kinds must hold together.

    Raises:
        SelectionError: A number range cannot be read.

    >>> parse_selection("layers 0-1, attn.q").names
    ('attn.q',)
    """
    numbers: dict[str, tuple[range, ...]] = {}
    names: list[str] = []
    for term in filter(None, (part.strip() for part in (text or "").split(","))):
        word, _, rest = term.partition(" ")
        label = LABELS.get(word.removesuffix("s"))
        if label:
            numbers[label] = (*numbers.get(label, ()), *_ranges(rest, term))
        elif rest:
            raise SelectionError(f"selection term {printable(term)!r} is not understood. {GRAMMAR}")
        else:
            names.append(term)
    return Selection(numbers, tuple(names))


def select(matrices: Iterable[Matrix], selection: Selection) -> list[Matrix]:
    """Return the selected matrices.

    Raises:
        SelectionError: Nothing is selected, or a name fits no matrix at all.
    """
    matrices = list(matrices)
    for name in selection.names:
        if not any(_fits(name, m) for m in matrices):
            known = dict.fromkeys(word for m in matrices for word in (m.block, _part(m)) if word)
            raise SelectionError(
                f"selection: {printable(name)!r} fits no matrix of this model.{suggest(name, known)} "
                f"Known parts: {', '.join(list(known)[:20])}."
            )
    kept = [m for m in matrices if selection.keeps(m)]
    if matrices and not kept:
        raise SelectionError(f"the selection leaves none of {len(matrices)} matrices. {GRAMMAR}")
    return kept


def _ranges(text: str, term: str) -> list[range]:
    words = text.split()
    matches = [_RANGE.fullmatch(word) for word in words]
    if not words or not all(matches):
        raise SelectionError(f"selection term {printable(term)!r}: expected numbers such as 0-7 or 3. {GRAMMAR}")
    found = []
    for match in filter(None, matches):
        first, dash, last = match.groups()
        found.append(range(int(first), int(last) + 1 if last else 10**6 if dash else int(first) + 1))
    return found


def _fits(name: str, matrix: Matrix) -> bool:
    return name in (matrix.block, matrix.projection, _part(matrix), matrix.tensor, matrix.name) or (
        any(c in name for c in "*?[") and (fnmatchcase(matrix.name, name) or fnmatchcase(matrix.tensor, name))
    )


def _part(matrix: Matrix) -> str:
    return f"{matrix.block}.{matrix.projection}"
