"""Quantised weights: codes and their scales, stored as several tensors, are one weight each.

Which tensors belong together is told by their names and dtypes, which differ from library to library (``FORMS``); the
configuration adds how many bits a code has. Nothing here needs torch: ``dequantise`` turns codes into numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from diffract.checkpoints.checkpoint import Checkpoint, Range, Source, as_bytes
from diffract.checkpoints.header import SetAside, TensorInfo
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch

DTYPE = "F32"
"""What weights are dequantised to: codes of up to 8 bits times float32 scales, rounded once or twice."""

FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
CODES = (*FLOAT8, "I8", "U8", "I32", "U32")
"""dtypes that codes are stored in."""

WORD_BITS = {"U8": 8, "I32": 32, "U32": 32}
"""Bits of a stored number that holds several codes."""

Packing = Literal["stored", "whole", "E2M1", "columns", "columns awq", "flat"]
"""How codes lie: as numbers of their own; several whole numbers, or E2M1 floats, in one along the last axis, lowest
bits first; several along the first axis of a transposed matrix (GPTQ), or along its last in AWQ's order; or the
entries of a whole tensor one after another, two in a byte (bitsandbytes)."""


@dataclass(frozen=True)
class Form:
    """How a library names and stores the parts of a quantised weight.

    Attributes:
        kind: What it is called.
        codes: What the name of the codes ends in.
        dtypes: What the codes are stored in.
        parts: The end of the name of each further part that must be there: scale, factor, zero, bias, table, ...
        optional: The same of those that may be there.
        packing: How codes lie.
        weight: What the name of the weight ends in instead.
    """

    kind: str
    codes: str
    dtypes: tuple[str, ...]
    parts: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    packing: Packing = "stored"
    weight: str = "weight"


FORMS = (
    Form(
        "GPTQ",
        "qweight",
        ("I32",),
        {"scale": "scales", "zero": "qzeros"},
        optional={"order": "g_idx"},
        packing="columns",
    ),
    *(
        Form(
            f"bitsandbytes {kind.upper()}",
            "weight",
            ("U8",),
            {
                "scale": "weight.absmax",
                "table": "weight.quant_map",
                "state": f"weight.quant_state.bitsandbytes__{kind}",
            },
            optional={"nested_scale": "weight.nested_absmax", "nested_table": "weight.nested_quant_map"},
            packing="flat",
        )
        for kind in ("nf4", "fp4")
    ),
    Form(
        "packed whole numbers",
        "weight_packed",
        ("I32",),
        {"scale": "weight_scale"},
        optional={"zero": "weight_zero_point", "order": "weight_g_idx", "shape": "weight_shape"},
        packing="whole",
    ),
    Form(
        "FP4",
        "weight_packed",
        ("U8",),
        {"scale": "weight_scale"},
        optional={"divisor": "weight_global_scale"},
        packing="E2M1",
    ),
    Form("NVFP4", "weight", ("U8",), {"scale": "weight_scale", "factor": "weight_scale_2"}, packing="E2M1"),
    Form("MXFP4", "_blocks", ("U8",), {"scale": "_scales"}, packing="E2M1", weight=""),
    Form("MLX", "weight", ("U32", "I32"), {"scale": "scales", "bias": "biases"}, packing="whole"),
    Form("MLX FP4", "weight", ("U32", "I32"), {"scale": "scales"}, packing="E2M1"),
    Form(
        "torchao", "_weight_qdata", ("I8", *FLOAT8), {"scale": "_weight_scale"}, optional={"zero": "_weight_zero_point"}
    ),
    Form("quanto", "weight._data", ("I8", *FLOAT8), {"scale": "weight._scale"}),
    Form("bitsandbytes 8-bit", "weight", ("I8",), {"scale": "SCB"}, optional={"tiling": "weight_format"}),
    Form("FP8", "weight", FLOAT8, {"scale": "scale_weight"}),
    Form("FP8", "weight", FLOAT8, {"scale": "scale"}),
    Form("FP8", "", FLOAT8, {"scale": "_scale_inv"}, weight=""),
    Form("FP8", "", FLOAT8, {"scale": "_scale"}, optional={"factor": "_scale_2"}, weight=""),
    Form("INT8", "", ("I8",), {"scale": "_scale"}, optional={"zero": "_zero_point"}, weight=""),
)

ACTIVATIONS = re.compile(
    r"((input|output|[kvq]|kv|prob|act|activation)_(scale|scaler|amax|zero_point|offset)(_inv|_ub)?"
    r"|input_global_scale|scaled_fp8)"
)
"""Last parts of names of what quantises activations."""

LAYER = re.compile(r"_?weight_\w+|pre_quant_scale|scales?|amax|zero_point|g_idx|SCB|CB")
"""Last parts of names of what belongs to the codes of the same layer."""

SCALES = re.compile(r"_?(weight_)?(scales?|zeros?|scale_inv|absmax|zero_point)|q?zeros|SCB|S[UV]|codebooks?|centroids")
"""Last parts of names beside which whole numbers are codes, whatever the configuration says."""

UNREAD = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask", "marlin", "gemv", "gemv_fast", "exllama", "ipex")
"""Values of ``format``, ``checkpoint_format`` and ``version`` under which codes lie in a library's own order."""

BITS = (2, 4, 8)


@dataclass(frozen=True)
class Weight:
    """A quantised weight: which tensors it is made of, and how.

    Attributes:
        name: What the weight is called.
        shape: Its shape.
        form: How its parts lie.
        parts: The stored tensors by what they are: codes, scale, zero, ...
        bits: Bits of a code.
        block: How many entries of each axis a scale counts for; empty where that is the packing's affair.
        shift: What is added to stored zero points (GPTQ's first version stores them less one) or scales (those of
            bitsandbytes, where they are quantised too).
        transposed: The stored matrix is (in, out).
    """

    name: str
    shape: tuple[int, ...]
    form: Form
    parts: Mapping[str, TensorInfo]
    bits: int = 8
    block: tuple[int, ...] = ()
    shift: float = 0
    transposed: bool = False


class Dequantised:
    """The source of one quantised weight: reads the codes and scales of the rows that are wanted."""

    def __init__(self, weight: Weight, sources: Mapping[str, Source]) -> None:
        self.weight, self.sources = weight, {role: sources[info.name] for role, info in weight.parts.items()}

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis in float32."""
        from diffract.checkpoints.dequantise import dequantise

        return dequantise(self.weight, self.read_part, rows or (0, self.weight.shape[0]))

    def read_part(self, role: str, rows: Range | None = None) -> torch.Tensor:
        """Return a stored part of the weight."""
        return self.sources[role].read(self.weight.parts[role], rows)

    def close(self) -> None:
        """Close what the parts are read from."""
        for source in self.sources.values():
            source.close()


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose quantised weights are one tensor each, in float32; any other as it is.

    What they are made of is no tensor of the checkpoint any more. The configuration says that weights are plain.

    Raises:
        CheckpointError: Weights are quantised in a way that is not read; the message says in which.
    """
    config = checkpoint.config
    settings = next((config[key] for key in KEYS if isinstance(config.get(key), Mapping)), {})
    coded = [info for info in checkpoint.infos.values() if info.dtype in CODES and len(info.shape) > 1]
    found = {w.parts["codes"].name: w for info in coded if (w := _weight(info, checkpoint, settings)) is not None}
    parts = {part.name for weight in found.values() for part in weight.parts.values()}
    known = parts | _companions(checkpoint, found.keys())
    unread = [name for name in _unread(checkpoint, parts, stated=bool(settings)) if name not in known]
    if unread and not found:
        method = printable(settings.get("quant_method") or settings.get("quant_algo") or "a way that is not stated")
        raise CheckpointError(
            f"{checkpoint.reference}: the weights are quantised by {method}, and {printable(unread[0])!r} "
            f"({checkpoint.infos[unread[0]].dtype}) has no scales that diffract knows. Dequantise it with the library "
            "that wrote it (model.dequantize() of transformers, then save_pretrained)."
        )
    if not found:
        return checkpoint
    beside = (parts - found.keys()) | _companions(checkpoint, found.keys() | set(unread))
    reasons = dict.fromkeys(beside, "scales and the like of quantised weights")
    return _replaced(checkpoint, found, reasons | dict.fromkeys(unread, "codes without scales"))


KEYS = ("quantization_config", "compression_config", "quantization")
"""Where a configuration says how weights are quantised; the last is MLX's."""

BESIDE = ("config.json", "hf_quant_config.json")
"""Files that state the quantisation, which a dequantised model no longer has."""


INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")

NUMBERS_OF_OTHERS = re.compile(r".*(_ids|_index|indexes|mask|tracked|steps?|counts?)", re.ASCII)
"""Last parts of names of whole numbers that are no codes."""

FEW = 256
"""A vector of fewer whole numbers holds no codes of a matrix."""


def _unread(checkpoint: Checkpoint, known: Set[str], *, stated: bool) -> list[str]:
    """Return the names of tensors that hold codes which nothing here reads.

    Something like a scale lies beside them. Where the configuration states a quantisation, whole numbers in a layer are
    codes without that too, and so are float8 numbers.
    """
    layers = {name.rpartition(".")[0] for name in checkpoint.infos if SCALES.fullmatch(name.rpartition(".")[2])}

    def holds_codes(info: TensorInfo) -> bool:
        layer, _, last = info.name.rpartition(".")
        if info.dtype not in (*INTEGERS, *(FLOAT8 if stated else ())) or info.name in known:
            return False
        few = len(info.shape) < 2 and info.entries < FEW
        numbers = few or len(info.shape) > 3 or NUMBERS_OF_OTHERS.fullmatch(last)
        inside = len(info.shape) > 1 or any(word.isdigit() for word in layer.split("."))
        return not numbers and (layer in layers or (stated and inside))

    return [name for name, info in checkpoint.infos.items() if holds_codes(info)]


def _companions(checkpoint: Checkpoint, codes: Set[str]) -> set[str]:
    """Return the names of what layers with codes have beside these."""
    layers = {name.rpartition(".")[0] for name in codes}
    split = ((name, *name.rpartition(".")[::2]) for name in checkpoint.infos if name not in codes) if codes else ()

    def beside(layer: str, last: str) -> bool:
        return layer in layers and bool(LAYER.fullmatch(last) or SCALES.fullmatch(last))

    return {name for name, layer, last in split if ACTIVATIONS.fullmatch(last) or beside(layer, last)}


def _replaced(checkpoint: Checkpoint, found: Mapping[str, Weight], reasons: Mapping[str, str]) -> Checkpoint:
    """Put weights where their codes were, and take away what they are made of."""
    infos: dict[str, TensorInfo] = {}
    sources: dict[str, Source] = {}
    aside: dict[str, SetAside] = {}
    for name, info in checkpoint.infos.items():
        if name in found:
            weight = found[name]
            infos[weight.name] = TensorInfo(weight.name, weight.shape, DTYPE, info.file, offset=info.offset)
            sources[weight.name] = Dequantised(weight, checkpoint.sources)
        elif name in reasons:
            aside[name] = SetAside(info.shape, info.dtype, info.size_bytes, reasons[name])
        else:
            infos[name], sources[name] = info, checkpoint.sources[name]
    kinds = ", ".join(dict.fromkeys(weight.form.kind for weight in found.values()))
    note = (
        f"The weights are quantised ({kinds}): {len(found)} of them are read as codes times scales, in float32. "
        "Where the other side of a comparison is not, the difference is quantisation too."
    )
    config = {key: value for key, value in checkpoint.config.items() if key not in (*KEYS, "torch_dtype")}
    return replace(
        checkpoint,
        infos=infos,
        sources=sources,
        config=config | {"dtype": "float32"} if config else {},
        companions={name: read for name, read in checkpoint.companions.items() if name not in BESIDE},
        tied={a: b for a, b in checkpoint.tied.items() if a in infos and b in infos},
        set_aside={**checkpoint.set_aside, **aside},
        notes=(*checkpoint.notes, note),
    )


def _weight(info: TensorInfo, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Weight | None:
    """Return the weight whose codes a tensor holds, or ``None``."""
    for form in FORMS:
        stem = info.name.removesuffix(form.codes)
        if info.dtype not in form.dtypes or not info.name.endswith(form.codes):
            continue
        if not all(stem + end in checkpoint.infos for end in form.parts.values()):
            continue
        ends = {**form.parts, **form.optional}
        parts = {role: checkpoint.infos[stem + end] for role, end in ends.items() if stem + end in checkpoint.infos}
        name = stem + form.weight
        if name != info.name and name in checkpoint.infos:
            raise CheckpointError(f"{checkpoint.reference}: {printable(name)!r} is stored twice, plain and quantised.")
        own = settings.get(stem.removesuffix("."), {})
        described = {**settings, **(own if isinstance(own, Mapping) else {})}
        weight = Weight(name, (), form, {"codes": info, **parts})
        try:
            return _described(weight, described, checkpoint)
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint.reference}, tensor {printable(info.name)!r}: {error}. It is quantised ({form.kind}) in a "
                "way that is not read: dequantise it with the library that wrote it, and open that."
            ) from error
    return None


def _described(weight: Weight, settings: Mapping[str, Any], checkpoint: Checkpoint) -> Weight:
    """Find out shape, bits and blocks of a weight, or raise ``ValueError``."""
    stated = [str(settings.get(key, "")).lower() for key in ("format", "checkpoint_format", "version")]
    if unread := next((word for word in stated if word in UNREAD), None):
        raise ValueError(f"codes lie in the order of {unread}")
    codes, scale, packing = weight.parts["codes"].shape, weight.parts["scale"].shape, weight.form.packing
    if packing == "columns":
        return _columns(weight, settings)
    if packing == "flat":
        return _flat(weight, checkpoint)
    if packing == "stored":
        shape, bits = codes, 8
    else:
        if packing == "E2M1" and settings.get("mode", "mxfp4") not in ("mxfp4", "nvfp4"):
            raise ValueError(f"its mode is {printable(settings['mode'])}")
        bits = 4 if packing == "E2M1" else _bits(weight, settings, checkpoint)
        lead = codes if weight.form.kind != "MXFP4" else (*codes[:-2], codes[-2] * codes[-1])
        shape = (*lead[:-1], lead[-1] * WORD_BITS[weight.parts["codes"].dtype] // bits)
    block = _blocks(shape, scale, _stated_block(settings) if packing == "stored" else ())
    transposed = weight.form.kind == "MXFP4" and len(shape) == 3
    shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    return replace(weight, shape=shape, bits=bits, block=block, transposed=transposed)


def _bits(weight: Weight, settings: Mapping[str, Any], checkpoint: Checkpoint) -> int:
    """Bits of packed whole numbers: stated, or told by the stored shape, or by the size of a group."""
    stated = [settings.get("bits"), *(scheme.get("num_bits") for scheme in _schemes(settings))]
    found = {bits for bits in stated if isinstance(bits, int)}
    codes, scale = weight.parts["codes"], weight.parts["scale"].shape
    if len(found) != 1 and "shape" in weight.parts:  # several groups of layers, or none stated
        stored = _raw(checkpoint, weight.parts["shape"])
        columns = int.from_bytes(stored[len(stored) // 2 :], "little")
        found = {bits for bits in BITS if columns and -(-columns * bits // 32) == codes.shape[-1]}
    elif len(found) != 1:
        per_scale = codes.shape[-1] * WORD_BITS[codes.dtype] / scale[-1]
        size = settings.get("group_size", 64 if "bias" in weight.parts else 128)
        found = {bits for bits in range(1, 9) if isinstance(size, int) and bits * size == per_scale}
    bits = found.pop() if len(found) == 1 else 0
    # 3, 5 and 6 bits are a stream of bits in MLX, while others have packed them with gaps
    if bits not in BITS and not ("bias" in weight.parts and bits in (3, 5, 6)):
        raise ValueError(f"{bits or 'an unknown number of'} bits a code, expected one of {BITS}")
    return bits


def _schemes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what compressed-tensors states of the weights of each group of layers."""
    groups = settings.get("config_groups")
    held = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    return [scheme for scheme in held if isinstance(scheme, Mapping)]


def _stated_block(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the size of blocks that a configuration states for all layers alike, empty if it does not."""
    told = [settings.get("weight_block_size"), *(scheme.get("block_structure") for scheme in _schemes(settings))]
    blocks = {tuple(block) for block in told if isinstance(block, list) and all(type(n) is int for n in block)}
    return blocks.pop() if len(blocks) == 1 else ()


def _blocks(shape: tuple[int, ...], scale: tuple[int, ...], stated: tuple[int, ...]) -> tuple[int, ...]:
    """Return for how many entries of each axis a scale counts.

    Where nothing is stated, square blocks of a power of two come before equal parts, since the last may be cut off.

    >>> _blocks((256, 300), (2, 3), (128, 128)), _blocks((6, 4), (6,), ()), _blocks((6, 4), (), ())
    ((128, 128), (1, 4), (6, 4))
    >>> _blocks((300, 200), (3, 2), ()), _blocks((300, 200), (3,), ())
    ((128, 128), (100, 200))
    """
    padded = scale + (1,) * (len(shape) - len(scale))
    if not stated and len(scale) == len(shape) > 1:
        squares = ((size, size) for size in (2**i for i in range(3, 11)))
        fits = (b for b in squares if all(-(-n // s) == k for n, s, k in zip(shape[-2:], b, scale[-2:], strict=True)))
        stated = next(fits, ())
    wanted = (0,) * (len(shape) - len(stated)) + stated
    block = tuple(
        n if s == 1 else size if size and -(-n // size) == s else n // s if s and n % s == 0 else 0
        for n, s, size in zip(shape, padded, wanted, strict=False)
    )
    if len(padded) != len(shape) or 0 in block:
        raise ValueError(f"scales of shape {list(scale)} do not fit weights of shape {list(shape)}")
    return block


def _columns(weight: Weight, settings: Mapping[str, Any]) -> Weight:
    """GPTQ packs along the inputs, AWQ along the outputs; both store (in, out)."""
    codes, (groups, out) = weight.parts["codes"].shape, weight.parts["scale"].shape
    zero = weight.parts["zero"].shape
    told = 32 * zero[1] / out if len(zero) == 2 and out else 4  # their width tells it where no configuration does
    bits = settings.get("bits", settings.get("w_bit", told))
    if bits not in BITS:
        raise ValueError(f"{printable(bits)} bits a code, expected one of {BITS}")
    bits = int(bits)
    per_word = 32 // bits
    if zero != (groups, out // per_word) or out % per_word:
        raise ValueError(f"zero points of shape {list(zero)} do not fit scales of shape {[groups, out]}")
    awq = codes[1] == out // per_word
    if not awq and codes[1] != out:
        raise ValueError(f"codes of shape {list(codes)} do not fit scales of shape {[groups, out]}")
    inner = codes[0] if awq else codes[0] * per_word
    if inner % groups and "order" not in weight.parts:
        raise ValueError(f"{groups} groups do not fit {inner} inputs")
    if awq and bits != 4:
        raise ValueError(f"{bits} bits a code, expected 4")
    form = replace(weight.form, kind="AWQ", packing="columns awq") if awq else weight.form
    shift = 0 if awq or settings.get("checkpoint_format") == "gptq_v2" else 1
    return replace(weight, form=form, shape=(out, inner), bits=bits, shift=shift, transposed=True)


def _flat(weight: Weight, checkpoint: Checkpoint) -> Weight:
    """Bitsandbytes writes shape and sizes of blocks as JSON into a tensor of bytes."""
    from diffract.checkpoints.sources import parse_object

    part = weight.parts["state"]
    state = parse_object(_raw(checkpoint, part), printable(part.name))
    sizes = state.get("shape"), state.get("blocksize"), state.get("nested_blocksize", 1)
    numbers = [*sizes[0], *sizes[1:]] if isinstance(sizes[0], list) else []
    whole = len(numbers) == 4 and all(type(n) is int and n > 0 for n in numbers)
    if not whole or numbers[0] * numbers[1] > 2 * weight.parts["codes"].entries:
        raise ValueError(f"its quant_state states shape and blocks {printable(sizes)}")
    rows, columns, block, nested = numbers
    offset = state.get("nested_offset", 0)
    return replace(weight, shape=(rows, columns), bits=4, block=(block, nested), shift=float(offset or 0))


def _raw(checkpoint: Checkpoint, info: TensorInfo) -> bytes:
    """Return the bytes of a small tensor, of a file without torch."""
    from diffract.checkpoints.files import ByteFile

    source = checkpoint.sources[info.name]
    if isinstance(source, ByteFile):
        return source.fetch(info.offset, info.size_bytes)
    return bytes(as_bytes(source.read(info, None)))
