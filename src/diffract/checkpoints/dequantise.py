"""From codes and scales to numbers, for the rows that are wanted; what lies where, ``quantised`` has found out.

Legend of shapes: a weight is (..., r, c), r rows and c columns; GPTQ and AWQ store it as (c, r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    from diffract.checkpoints.checkpoint import Range
    from diffract.checkpoints.quantised import Weight

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The numbers that four bits stand for, by code (OCP Microscaling formats, 2023)."""

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which four bits of a word AWQ keeps the first, second, ... of eight neighbours."""


class ReadPart(Protocol):
    """``read(role, rows)`` returns a stored part of a weight, or rows of it."""

    def __call__(self, role: str, rows: Range | None = None) -> Tensor:
        """Return a stored part."""
        ...


def dequantise(weight: Weight, read: ReadPart, rows: Range) -> Tensor:
    """Return rows of a quantised weight in float32, contiguous.

    Args:
        weight: What it is made of.
        read: Reads its parts.
        rows: Half-open range of the weight's leading axis.
    """
    ways: dict[str, Callable[[Weight, ReadPart, Range], Tensor]] = {
        "columns": _from_columns,
        "columns awq": _from_columns,
        "flat": _from_flat,
    }
    return ways.get(weight.form.packing, _from_rows)(weight, read, rows).contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return whole numbers that lie one after another in the bits of the last axis, lowest first, as int32.

    >>> unpack(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4).tolist()
    [[1, 2, 3, 4]]
    """
    held = words.contiguous().view(torch.uint8)  # little-endian, so that bytes too lie lowest first
    if bits == 8:
        return held.int()
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((held[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2).int()
    # 3, 5 and 6 bits: eight numbers begin where a byte does
    group = held.unflatten(-1, (-1, bits)).long()
    joined = (group << torch.arange(0, 8 * bits, 8)).sum(-1)
    return ((joined[..., None] >> torch.arange(0, 8 * bits, bits)) & ((1 << bits) - 1)).flatten(-2).int()


def _from_rows(weight: Weight, read: ReadPart, rows: Range) -> Tensor:
    """Codes lie row by row: values = (codes - zero) * scale + bias."""
    parts, packing, whole = weight.parts, weight.form.packing, (0, weight.shape[0])
    codes = read("codes", None if rows == whole else rows)
    if weight.form.kind == "MXFP4":
        codes = codes.flatten(-2)
    if packing == "E2M1":
        values = E2M1[unpack(codes, 4)]
    elif packing == "whole":
        values = unpack(codes, weight.bits).float()
        if "bias" not in parts:  # signed numbers, stored with an offset
            values -= 1 << (weight.bits - 1)
    else:
        values = codes.float()
    scale = _scale(weight, _spread(weight, read, "scale", rows))
    if "factor" in parts:
        scale = scale * read("factor").float()
    if "divisor" in parts:
        scale = scale / read("divisor").float()
    if "tiling" in parts:
        if int(read("tiling")):
            raise CheckpointError(
                f"tensor {printable(weight.name)!r}: its codes lie in tiles. Save the model with a newer library."
            )
        scale = scale / 127
    if "order" in parts:
        groups = read("order").long()
        group_size = weight.block[-1]
        scale = scale[..., ::group_size][..., groups]
    if "zero" in parts:
        values -= _zero(weight, read, rows)
    values *= scale
    if "bias" in parts:
        values += _spread(weight, read, "bias", rows).float()
    return values.mT if weight.transposed else values


def _spread(weight: Weight, read: ReadPart, role: str, rows: Range) -> Tensor:
    """Return rows of what is stored once a block, one number an entry (or an axis of length 1)."""
    stored = weight.parts[role]
    lead, size = (stored.shape[0] if stored.shape else 1), weight.block[0]
    blocks = (0, 1) if lead == 1 else (rows[0] // size, -(-rows[1] // size))
    found = read(role, blocks if stored.shape and blocks != (0, lead) else None)
    found = found.reshape(found.shape + (1,) * (len(weight.block) - found.ndim))
    if lead > 1 and size > 1:
        found = _repeat(found, 0, size)[rows[0] - blocks[0] * size : rows[1] - blocks[0] * size]
    stored_shape = weight.shape[:-2] + weight.shape[:-3:-1] if weight.transposed else weight.shape
    for axis in range(1, len(weight.block)):
        if found.shape[axis] > 1 and weight.block[axis] > 1:
            found = _repeat(found, axis, weight.block[axis]).narrow(axis, 0, stored_shape[axis])
    return found


def _repeat(found: Tensor, axis: int, times: int) -> Tensor:
    kept = found.view(torch.uint8) if found.element_size() == 1 else found  # float8 knows no repetition
    return kept.repeat_interleave(times, axis).view(found.dtype)


def _scale(weight: Weight, found: Tensor) -> Tensor:
    """Return scales in float32; a byte is an exponent (E8M0), or an E4M3 number where 16 codes share it."""
    if found.dtype != torch.uint8:
        return found.float()
    if weight.block[-1] == 16:
        return found.view(torch.float8_e4m3fn).float()
    exponents = torch.exp2(found.float() - 127)
    return exponents.masked_fill(found == 255, torch.nan)


def _zero(weight: Weight, read: ReadPart, rows: Range) -> Tensor:
    """Zero points, stored as the codes are: packed ones along the first axis."""
    if weight.form.packing != "whole":
        return _spread(weight, read, "zero", rows).float()
    packed = unpack(read("zero").mT.contiguous(), weight.bits).mT[rows[0] : rows[1]]
    zero = _repeat(packed.float(), 1, weight.block[-1]) - (1 << (weight.bits - 1))
    if "order" in weight.parts:
        return zero[:, :: weight.block[-1]][:, read("order").long()]
    return zero[:, : weight.shape[-1]]


def _from_columns(weight: Weight, read: ReadPart, rows: Range) -> Tensor:
    """GPTQ and AWQ: (codes - zero) * scale of a group of inputs; a row of the weight is a column there."""
    bits, awq = weight.bits, weight.form.packing == "columns awq"
    per_word = 32 // bits
    begin, end = rows[0] // per_word, -(-rows[1] // per_word)
    span = slice(rows[0] - begin * per_word, rows[1] - begin * per_word)

    def along_outputs(words: Tensor) -> Tensor:
        found = unpack(words[:, begin:end], bits)
        if awq:
            found = found.unflatten(-1, (-1, per_word))[..., list(AWQ_PLACES)].flatten(-2)
        return found[:, span]

    words = read("codes")
    codes = along_outputs(words).mT if awq else unpack(words[:, rows[0] : rows[1]].mT.contiguous(), bits)
    zero = (along_outputs(read("zero")) + weight.shift).float()
    scale = read("scale")[:, rows[0] : rows[1]].float()
    inner = weight.shape[1]
    groups = read("order").long() if "order" in weight.parts else torch.arange(inner) // (inner // len(scale))
    return ((codes.mT.float() - zero[groups]) * scale[groups]).mT


def _from_flat(weight: Weight, read: ReadPart, rows: Range) -> Tensor:
    """bitsandbytes: two codes in a byte, the first in the high bits; blocks of the flat tensor share a scale."""
    columns, (block, nested) = weight.shape[1], weight.block
    first, last = rows[0] * columns, rows[1] * columns
    span = first // 2, -(-last // 2)
    stored = weight.parts["codes"]
    held = read("codes", span) if stored.shape[0] == stored.entries else read("codes").reshape(-1)[slice(*span)]
    codes = torch.stack((held.reshape(-1) >> 4, held.reshape(-1) & 15), -1).flatten()[first % 2 :][: last - first]
    scale = read("scale")
    if "nested_scale" in weight.parts:
        coarse = read("nested_scale").float().repeat_interleave(nested)[: len(scale)]
        scale = read("nested_table").float()[scale.int()] * coarse + weight.shift
    blocks = torch.arange(first, last) // block
    return (read("table").float()[codes.int()] * scale.float()[blocks]).reshape(-1, columns)


def from_ggml(kind: str, blocks: Tensor) -> Tensor:
    """Return the numbers that blocks of a type of ggml stand for, in float32.

    Args:
        kind: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 entries with one scale each; Q2_K, Q3_K, Q4_K, Q5_K, Q6_K: 256 entries
            in groups of 32 or 16 whose scales are codes, too.
        blocks: (blocks, bytes of one), uint8.

    Returns:
        Shape (blocks, entries of one).
    """
    if kind in ("Q2_K", "Q3_K"):
        return _from_q23_k(blocks)
    if kind == "Q6_K":
        return _from_q6_k(blocks)
    if kind in ("Q4_K", "Q5_K"):
        return _from_q45_k(blocks)
    scale = _halves(blocks[:, :2])
    if kind == "Q8_0":
        return blocks[:, 2:].contiguous().view(torch.int8).float() * scale
    with_minimum, five = kind.endswith("_1"), kind.startswith("Q5")
    rest = blocks[:, 4 if with_minimum else 2 :]
    codes = _nibbles(rest[:, 4 * five :])  # the first half of a block in low bits, the second in high ones
    if five:
        codes |= unpack(rest[:, :4], 1) << 4
    if with_minimum:
        return codes * scale + _halves(blocks[:, 2:4])
    return (codes - (16 if five else 8)) * scale


def _halves(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.float16).float()


def _nibbles(stored: Tensor) -> Tensor:
    return torch.cat((stored & 15, stored >> 4), -1).int()


def _from_q23_k(blocks: Tensor) -> Tensor:
    """Two halves of four runs of 32, two bits each, in 16 groups with a scale and a minimum of four bits.

    Where a third bit of all codes lies before the others, groups have a scale of six bits instead, whose high two lie
    together behind the low four.
    """
    three = blocks.shape[1] == 110
    shifts = torch.tensor([0, 2, 4, 6])[:, None]
    packed = blocks[:, 32:96] if three else blocks[:, 16:80]
    codes = ((packed.unflatten(1, (2, 1, 32)).int() >> shifts) & 3).flatten(1)
    if not three:
        scales, scale, minimum = blocks[:, :16].int(), _halves(blocks[:, 80:82]), _halves(blocks[:, 82:])
        own, least = (scales & 15) * scale, (scales >> 4) * minimum
        return (codes.unflatten(1, (16, 16)) * own[..., None] - least[..., None]).flatten(1)
    third = ((blocks[:, None, :32].int() >> torch.arange(8)[:, None]) & 1).flatten(1)
    high = ((blocks[:, None, 104:108].int() >> shifts) & 3).flatten(1)
    own = (_nibbles(blocks[:, 96:104]) | (high << 4)) - 32
    groups = (codes + 4 * third - 4).unflatten(1, (16, 16))
    return (groups * (own * _halves(blocks[:, 108:]))[..., None]).flatten(1)


def _from_q45_k(blocks: Tensor) -> Tensor:
    """Eight groups of 32, each a scale and a minimum of six bits; a fifth bit of all codes lies before the others."""
    scale, minimum, packed = _halves(blocks[:, :2]), _halves(blocks[:, 2:4]), blocks[:, 4:16].int()
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), 1) * scale
    minima = torch.cat((mid & 63, (high >> 4) | (mid >> 6 << 4)), 1) * minimum
    codes = _nibbles(blocks[:, -128:].unflatten(1, (4, 32))).unflatten(2, (2, 32)).flatten(1, 2)
    if blocks.shape[1] > 144:
        bits = blocks[:, 16:48, None].int() >> torch.arange(8)
        codes |= (bits & 1).mT << 4
    return (codes * scales[..., None] - minima[..., None]).flatten(1)


def _from_q6_k(blocks: Tensor) -> Tensor:
    """Two halves of four runs of 32: low four bits, then the high two; a signed scale for 16 entries."""
    low = blocks[:, :128].unflatten(1, (2, 2, 32)).int()
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)).int() >> torch.tensor([0, 2, 4, 6])[:, None]
    codes = (torch.cat((low & 15, low >> 4), 2) | ((high & 3) << 4)) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _halves(blocks[:, 208:])
    return (codes.flatten(1).unflatten(1, (16, 16)) * scales[..., None]).flatten(1)
