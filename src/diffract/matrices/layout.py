"""What a checkpoint consists of: every tensor, what became of it, and the matrices that are taken of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffract.architectures import Architecture, resolve
from diffract.checkpoints import Checkpoint, TensorInfo, reshaped
from diffract.errors import printable
from diffract.matrices.matrix import Matrix, batches, parse_selection, select
from diffract.matrices.slicing import matrix_shapes, slice_tensor

SHOWN = 3
"""Names that a warning lists."""


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        info: Shape and dtype.
        matrices: What is taken of it, empty unless it is analysed.
        outcome: ``tables.TENSORS`` lists them.
        note: Why, where that is not plain.
    """

    info: TensorInfo
    matrices: tuple[Matrix, ...]
    outcome: str
    note: str = ""


@dataclass(frozen=True)
class Layout:
    """A checkpoint as it is understood.

    Attributes:
        checkpoint: What was laid out.
        architecture: How its names are read.
        entries: Its tensors, in file order.
        warnings: What a reader should know.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    entries: dict[str, Entry]
    warnings: tuple[str, ...] = ()

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices, in file order."""
        return [m for entry in self.entries.values() for m in entry.matrices]


def lay_out(
    checkpoint: Checkpoint,
    *,
    select_text: str | None = None,
    heads: bool = True,
    spec_file: str | Path | None = None,
    check_ties: bool = True,
    like: Architecture | None = None,
) -> Layout:
    """Understand a checkpoint; of tensors only headers are read.

    Args:
        checkpoint: What to look at.
        select_text: See ``matrices.parse_selection``.
        heads: Whether attention projections are cut into heads.
        spec_file: A user's architecture.
        check_ties: Whether tensors that the configuration declares tied, but that are both stored, are read and
            compared; otherwise the declaration is believed.
        like: How a checkpoint without a configuration of its own is read.

    Raises:
        ArchitectureError: The configuration contradicts itself or the tensors.
        SelectionError: The selection names something that is not there.
    """
    silent = like is not None and like.family != "generic" and not checkpoint.config
    config = like.config if like is not None and silent else checkpoint.config
    shapes = {name: info.stored_shape for name, info in checkpoint.infos.items()}
    architecture = resolve(config, shapes, spec_file=spec_file)
    if silent:
        architecture = replace(architecture, note="It has no config.json and is read as the base is.")
    checkpoint = reshaped(checkpoint, matrix_shapes(checkpoint.infos, architecture))
    ties, warnings = _ties(checkpoint, architecture, check=check_ties)
    entries = {name: _entry(checkpoint.info(name), architecture, ties, heads=heads) for name in checkpoint.names}
    selection = parse_selection(select_text)
    if selection.numbers or selection.names:
        kept = set(select((m for e in entries.values() for m in e.matrices), selection))
        entries = {name: _restrict(entry, kept.__contains__) for name, entry in entries.items()}
    notes = (architecture.note,) if architecture.note else ()
    aside = Counter(found.reason for found in checkpoint.set_aside.values())
    told = [f"Set aside, not analysed: {count} tensors ({reason})." for reason, count in aside.items()]
    told += _not_described(architecture, entries)
    return Layout(checkpoint, architecture, entries, (*notes, *checkpoint.notes, *told, *warnings))


def _not_described(architecture: Architecture, entries: Mapping[str, Entry]) -> list[str]:
    """Say how many matrices of a known family nothing describes: they are whole, without layer, part or head."""
    if architecture.family == "generic":
        return []
    count = sum(len(entry.matrices) for entry in entries.values())
    unknown = [m.tensor for entry in entries.values() for m in entry.matrices if m.block == "other"]
    first = ", ".join(printable(name, 80) for name in unknown[:SHOWN]) + (" and others" if len(unknown) > SHOWN else "")
    words = f"{len(unknown)} of {count} matrices are not described by the family {architecture.family}: {first}."
    return [words] if unknown else []


BUFFERS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|masked_bias|position_ids|relative_position_index)$"
)
"""Ends of names of what a model keeps beside its weights, as old checkpoints hold it."""


def restrict(layout: Layout, keep: Callable[[Matrix], bool]) -> Layout:
    """Return a layout with some of its matrices; tensors that hold none of them are ``not_selected``."""
    return replace(layout, entries={name: _restrict(entry, keep) for name, entry in layout.entries.items()})


def _entry(info: TensorInfo, architecture: Architecture, ties: Mapping[str, str], *, heads: bool) -> Entry:
    # of the name of a bias is a buffer too that is a mask of four axes
    mask = info.name.endswith("attn.bias") and len(info.stored_shape) == 4
    reasons = {
        "not_float": (not info.is_float, f"{info.dtype} is listed, not analysed"),
        "tied": (info.name in ties, f"shares its values with {ties.get(info.name)}"),
        "empty": (info.entries == 0, "no entries"),
        "buffer": (mask or bool(BUFFERS.search(info.name)), "made anew by the model, no weight"),
        "vector": (len(info.shape) < 2, ""),
    }
    for outcome, (met, note) in reasons.items():
        # The first reason counts: an integer buffer that is tied is told once.
        if met:
            return Entry(info, (), outcome, note)
    matrices = tuple(slice_tensor(info, architecture, heads=heads))
    if not matrices:
        return Entry(info, (), "not_matrix", f"{len(info.shape)} axes, and nothing says what they count")
    note = "" if info.axes is None else f"{list(info.axes)} read as {list(info.shape)}"
    return Entry(info, matrices, "analysed", note)


def _restrict(entry: Entry, keep: Callable[[Matrix], bool]) -> Entry:
    if entry.outcome != "analysed":
        return entry
    matrices = tuple(m for m in entry.matrices if keep(m))
    return replace(entry, matrices=matrices, outcome="analysed" if matrices else "not_selected")


def _ties(checkpoint: Checkpoint, architecture: Architecture, *, check: bool) -> tuple[dict[str, str], list[str]]:
    """Tensors that share another's values: by memory, or as the configuration declares and the bytes confirm."""
    ties, warnings = dict(checkpoint.tied), []
    if not architecture.ties:
        return ties, warnings
    for name in checkpoint.infos:
        target = architecture.tied_to(name, checkpoint.infos)
        if not target or target == name or name in ties:
            continue
        if not check or checkpoint.digest(name) == checkpoint.digest(target):
            ties[name] = target
        else:
            warnings.append(f"The config ties {name} to {target}, but the stored values differ: both are analysed.")
    return ties, warnings


KEEP_BYTES = 1 << 27
"""A stored tensor up to this size is read once and kept while its matrices are analysed."""

PIECE_BYTES = 1 << 25
"""Float64 bytes that are cast at once."""

PASSES = 60
"""What reading, hashing, casting and summing an entry costs, in multiplications."""

EIGENSOLVER = 12
"""What the eigensolver costs per entry of a Gram matrix and row, in multiplications: it runs far from the peak rate."""


def scan_cost(matrices: Sequence[Matrix]) -> float:
    """Return the work of finding all singular values of matrices, in multiplications, about."""
    shorts = ((m.entries, min(m.shape)) for m in matrices)
    return float(sum(entries * (short + PASSES) + EIGENSOLVER * short**3 for entries, short in shorts))


READ_SECONDS, PRODUCT_SECONDS, VALUES_SECONDS, MATRIX_SECONDS = 4e-9, 2.4e-11, 1.05e-10, 2.6e-3
"""What analysing a matrix takes of one core: per entry that is read, hashed, cast and summed; per multiplication of W
with its own short side; per short side cubed in the eigensolver; and for itself, whatever its size. Measured with one
thread at 100,352 x 2048 (11.1 s), 8192 x 2048 (1.80 s) and 16 times 128 x 2048 (0.075 s)."""

PAIR_PRODUCTS, PAIR_VECTORS_SECONDS, PAIR_SECONDS = 4, 7.9e-10, 1.2e-2
"""The same of two matrices and their alignment: such products (one of them of two different factors, which is twice as
much), eigenvectors of both and overlaps, and the rest. Measured at 8192 x 2048 (10.3 s), 16 times 128 x 2048
(0.31 s) and 100,352 x 2048 (46.6 s)."""


def scan_seconds(matrices: Sequence[Matrix], *, spectra: bool = True) -> float:
    """Return how long one core takes to read matrices and, for ``spectra``, find all singular values, about."""
    entries = sum(m.entries for m in matrices)
    if not spectra:
        return READ_SECONDS * entries
    products = sum(m.entries * min(m.shape) for m in matrices)
    cubes = sum(min(m.shape) ** 3 for m in matrices)
    work = PRODUCT_SECONDS * products + VALUES_SECONDS * cubes
    return READ_SECONDS * entries + work + MATRIX_SECONDS * len(matrices)


def pair_seconds(matrices: Sequence[Matrix], *, spectra: bool = True) -> float:
    """Return how long one core takes to compare matrices with those of another model, about; that scans both."""
    entries = sum(m.entries for m in matrices)
    if not spectra:
        return 2 * READ_SECONDS * entries
    products = sum(m.entries * min(m.shape) for m in matrices)
    cubes = sum(min(m.shape) ** 3 for m in matrices)
    work = PAIR_PRODUCTS * PRODUCT_SECONDS * products + PAIR_VECTORS_SECONDS * cubes
    return 2 * READ_SECONDS * entries + work + PAIR_SECONDS * len(matrices)


def workspace_bytes(matrices: Sequence[Matrix], size_bytes: int, *, pair: bool = False) -> int:
    """Return the memory that analysing one tensor takes, about.

    Args:
        matrices: What is taken of the tensor.
        size_bytes: Of the stored tensor.
        pair: Whether it is compared with another.
    """
    batch = max(batches(matrices), key=lambda b: len(b) * b[0].entries)
    buffers = min(PIECE_BYTES, 8 * batch[0].entries) * (3 if pair else 2)
    # Square matrices of the short side, as many as are held at the highest point, of a pair and of one matrix.
    products = 8 * len(batch) * min(batch[0].shape) ** 2 * (8 if pair else 3)
    return (1 + pair) * min(size_bytes, KEEP_BYTES) + buffers + products
