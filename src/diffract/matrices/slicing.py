"""Cut tensors into labelled matrices: attention heads, fused parts, experts.

Legend of ranges: a range is a half-open pair of rows along the output axis, or of columns along the input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from diffract.architectures import Architecture, Dimensions, TensorPlace, require_heads
from diffract.checkpoints import TensorInfo
from diffract.errors import ArchitectureError, printable
from diffract.matrices.matrix import Matrix

HEAD_PART = re.compile(r"(.+\.)?(cross_)?attn\.[qkvo]")
"""What heads are cut out of; an encoder's and a decoder's attention are blocks of their own, ``encoder.attn.q``."""

EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
"""What in a name says that the first of three axes counts experts."""

Range = tuple[int, int]


@dataclass(frozen=True)
class _Cut:
    """One piece of a tensor along one axis, before it becomes a matrix."""

    part: str
    span: Range | None = None
    axis: str = "out"
    head: int | None = None
    kv_head: int | None = None


def matrix_shapes(infos: Mapping[str, TensorInfo], architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape that tensors of more axes are read with, where these are one matrix, or one bias.

    A convolution (out, in, widths) is the matrix (out, in * widths) that its patches are multiplied with; Flax stores
    it turned, (widths, in, out), and projections of attention with an axis of heads, (in, heads, size) and
    (heads, size, out), and their biases as (heads, size).

    Args:
        infos: The tensors, as stored.
        architecture: Says what they are.
    """
    found = {}
    for name, info in infos.items():
        shape, place = info.stored_shape, architecture.place(name)
        if name.endswith(".bias") and len(shape) == 2:
            kernel = infos.get(name.removesuffix("bias") + "kernel")
            if kernel is not None and kernel.stored_shape[1:] == shape:
                found[name] = (prod(shape),)
        elif len(shape) > 2 and sum(n > 1 for n in shape) > 1 and not (place and place.role.stacked):
            if place is not None:
                leading = -1 if place.role.transposed and place.role.part[0].endswith(".o") else 1
                found[name] = (prod(shape[:leading]), prod(shape[leading:]))
            elif len(shape) == 3 and shape[0] == 1 and "embed" in name.lower():  # positions, for every batch alike
                found[name] = shape[1:]
            elif _is_convolution(name, shape):
                turned = name.endswith(".kernel")
                found[name] = (prod(shape[:-1]), shape[-1]) if turned else (shape[0], prod(shape[1:]))
    return found


def _is_convolution(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor's name says so; torch's weights of more than three axes are nothing else."""
    words = name.lower()
    if words.endswith(".kernel"):
        return "conv" in words or "embed" in words
    return words.endswith("weight") if len(shape) > 3 else "conv" in words and not EXPERTS.search(words)


def slice_tensor(info: TensorInfo, architecture: Architecture, *, heads: bool = True) -> list[Matrix]:
    """Return the matrices of one tensor.

    Args:
        info: Name, stored shape and dtype.
        architecture: Says what the tensor is.
        heads: Cut attention projections into heads.

    Returns:
        Matrices in storage order; none for a tensor with fewer than two axes (1-D, scalars).

    Raises:
        ArchitectureError: The tensor's shape contradicts the configuration.
    """
    place, shape = architecture.place(info.name), info.shape
    if place is None or len(shape) != (3 if place.role.stacked else 2):
        return _generic(info, architecture.bare.get(info.name, info.name))
    # The last two axes, the other way round where the layer stores (in, out).
    out, inner = shape[-2:] if not place.role.transposed else shape[:-3:-1]
    cuts = list(_cuts(info.name, (out, inner), architecture, place=place, heads=heads))
    experts = range(shape[0]) if place.role.stacked else [None]
    whole = Matrix("", info.name, (out, inner), info.dtype, layer=place.layer, transposed=place.role.transposed)
    return [_matrix(whole, cut, index, place.expert) for index in experts for cut in cuts]


def _generic(info: TensorInfo, label: str) -> list[Matrix]:
    """A tensor that nothing describes: 2-D is one matrix, 3-D one per expert if its name says so; others are left."""
    shape = info.shape
    if len(shape) == 2:
        turned = info.name.endswith(".kernel")  # as Flax and Keras call what they store (in, out)
        out, inner = shape[::-1] if turned else shape
        return [Matrix(label, info.name, (out, inner), info.dtype, block="other", transposed=turned)]
    if len(shape) == 3 and min(shape[1:]) > 1 and EXPERTS.search(info.name):
        whole = Matrix(label, info.name, (shape[1], shape[2]), info.dtype, block="other")
        return [replace(whole, name=f"{label}[{i}]", index=i) for i in range(shape[0])]
    return []


def _cuts(name: str, shape: Range, architecture: Architecture, *, place: TensorPlace, heads: bool) -> Iterator[_Cut]:
    role = place.role
    attention = [HEAD_PART.fullmatch(part) for part in role.part]
    if role.packing == "interleaved":  # rows of one part are no range, so the fused tensor stays whole
        yield _Cut(_fused_part(role.part))
    elif role.whole or not any(attention):
        yield from _even_blocks(name, role.part, shape[0])
    elif place.head is not None:
        yield _Cut(role.part[0], head=place.head, kv_head=place.head)
    elif len(role.part) == 1 and not heads:
        yield _Cut(role.part[0])
    else:
        # A layer may have head counts of its own, as models with sliding windows do.
        dims = place.dimensions if place.dimensions.heads else require_heads(architecture)
        cut = {"groups": _groups, "heads": _by_heads}.get(role.packing, _blocks)
        pieces = list(cut(role.part, place.sizes, dims))
        _check_extent(name, shape, pieces, dims)
        if heads:
            yield from pieces
        elif role.packing == "blocks":
            # whole projections: the span from the first head of each part to its last
            for part in dict.fromkeys(piece.part for piece in pieces):
                spans = [p.span for p in pieces if p.part == part and p.span]
                yield _Cut(part, (spans[0][0], spans[-1][1]), pieces[0].axis)
        else:  # parts of one projection do not lie together, so the fused tensor stays whole
            yield _Cut(_fused_part(role.part))


def _fused_part(parts: tuple[str, ...]) -> str:
    block = parts[0].rpartition(".")[0]
    return f"{block}.{''.join(p.rpartition('.')[2] for p in parts)}"


def _even_blocks(name: str, parts: tuple[str, ...], out: int) -> Iterator[_Cut]:
    """Fused parts of equal size, one after another (gate and up)."""
    if len(parts) == 1:
        yield _Cut(parts[0])
        return
    if out % len(parts):
        raise ArchitectureError(f"tensor {printable(name)!r}: {out} rows do not hold {len(parts)} equal parts {parts}.")
    size = out // len(parts)
    for i, part in enumerate(parts):
        yield _Cut(part, (i * size, (i + 1) * size))


def _blocks(parts: tuple[str, ...], sizes: tuple[int, ...], dims: Dimensions) -> Iterator[_Cut]:
    """All heads of q, then all of k, then all of v; a lone part is the simplest case of it."""
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        for i in range(_head_count(part, dims)):
            yield _head_cut(part, (start, start + size), i, dims)
            start += size


def _groups(parts: tuple[str, ...], sizes: tuple[int, ...], dims: Dimensions) -> Iterator[_Cut]:
    """Per key-value head: q of every query head that shares it, then its k, then its v."""
    start = 0
    for kv in range(dims.kv_heads or 0):
        for part, size in zip(parts, sizes, strict=True):
            own = range(kv * dims.group, (kv + 1) * dims.group) if part.endswith(".q") else [kv]
            for i in own:
                yield _head_cut(part, (start, start + size), i, dims)
                start += size


def _by_heads(parts: tuple[str, ...], sizes: tuple[int, ...], dims: Dimensions) -> Iterator[_Cut]:
    """Per query head: its own of every part (query and gate, or latent keys and values)."""
    start = 0
    for i in range(dims.heads or 0):
        for part, size in zip(parts, sizes, strict=True):
            yield _Cut(part, (start, start + size), head=i, kv_head=i // dims.group)
            start += size


def _head_count(part: str, dims: Dimensions) -> int:
    return (dims.heads if part.endswith((".q", ".o")) else dims.kv_heads) or 0


def _head_cut(part: str, span: Range, i: int, dims: Dimensions) -> _Cut:
    axis = "in" if part.endswith(".o") else "out"
    if part.endswith((".q", ".o")):
        return _Cut(part, span, axis, head=i, kv_head=i // dims.group)
    return _Cut(part, span, axis, kv_head=i, head=i if dims.group == 1 else None)


def _check_extent(name: str, shape: Range, pieces: list[_Cut], dims: Dimensions) -> None:
    axis = pieces[0].axis
    got = shape[0] if axis == "out" else shape[1]
    expected = max(piece.span[1] for piece in pieces if piece.span)
    if got != expected:
        raise ArchitectureError(
            f"tensor {printable(name)!r} has {got} {'rows' if axis == 'out' else 'columns'}, but the config's "
            f"{dims.heads} heads, {dims.kv_heads} key-value heads and head_dim {dims.head_dim} make {expected}. "
            "Correct config.json, pass --architecture FILE, or --no-heads to take whole matrices."
        )


def _matrix(whole: Matrix, cut: _Cut, index: int | None, expert: int | None) -> Matrix:
    """Return a piece of a tensor as a matrix, with its labels."""
    span = cut.span or (0, whole.shape[cut.axis == "in"])
    size, by_rows = span[1] - span[0], cut.axis == "out"
    block, _, projection = cut.part.rpartition(".")
    matrix = replace(
        whole,
        shape=(size, whole.shape[1]) if by_rows else (whole.shape[0], size),
        block=block,
        projection=projection,
        head=cut.head,
        kv_head=cut.kv_head,
        expert=index if index is not None else expert,
        index=index,
        # a stored (in, out) block has its output along the columns
        rows=cut.span if by_rows != whole.transposed else None,
        cols=cut.span if by_rows == whole.transposed else None,
    )
    return replace(matrix, name=_label(matrix))


def _label(matrix: Matrix) -> str:
    """``L3.attn.q.h5``, ``L3.attn.k.kv1``, ``L3.mlp.gate.e7``, ``embed``: readable, and unique within a model."""
    own = [matrix.projection] if matrix.block == matrix.projection else [matrix.block, matrix.projection]
    layer = [] if matrix.layer is None else [f"L{matrix.layer}"]
    expert = [] if matrix.expert is None else [f"e{matrix.expert}"]
    head = (
        [f"h{matrix.head}"]
        if matrix.head is not None
        else [f"kv{matrix.kv_head}"]
        if matrix.kv_head is not None
        else []
    )
    return ".".join([*layer, *(o for o in own if o), *expert, *head])
