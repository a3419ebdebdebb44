"""GGUF files, as llama.cpp writes them: read by position, dequantised block by block, under the names of Hugging Face.

The format (version 3): a head with typed settings and a list of tensors, padding, then the tensors. Dimensions are
listed from the last axis on. A tensor lies in blocks of 32 or 256 entries of a row, each with scales of its own.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from diffract.checkpoints.checkpoint import Checkpoint, Range, Source
from diffract.checkpoints.files import ByteFile
from diffract.checkpoints.formats import refuse_format
from diffract.checkpoints.header import HEADER_LIMIT, SIZE_LIMIT, SetAside, TensorInfo
from diffract.checkpoints.sources import Folder, join
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""Types that hold plain numbers, by the number that the format gives them."""


@dataclass(frozen=True)
class BlockType:
    """A type that holds codes.

    Attributes:
        name: What ggml calls it.
        entries: How many of a row are stored together.
        size_bytes: What these take.
        read: Whether it is dequantised here; others are set aside.
    """

    name: str
    entries: int
    size_bytes: int
    read: bool = False


BLOCKS = {
    **{2: BlockType("Q4_0", 32, 18, True), 3: BlockType("Q4_1", 32, 20, True), 6: BlockType("Q5_0", 32, 22, True)},
    **{7: BlockType("Q5_1", 32, 24, True), 8: BlockType("Q8_0", 32, 34, True), 12: BlockType("Q4_K", 256, 144, True)},
    **{
        13: BlockType("Q5_K", 256, 176, True),
        14: BlockType("Q6_K", 256, 210, True),
        10: BlockType("Q2_K", 256, 84, True),
    },
    **{11: BlockType("Q3_K", 256, 110, True), 15: BlockType("Q8_K", 256, 292), 16: BlockType("IQ2_XXS", 256, 66)},
    **{17: BlockType("IQ2_XS", 256, 74), 18: BlockType("IQ3_XXS", 256, 98), 19: BlockType("IQ1_S", 256, 50)},
    **{20: BlockType("IQ4_NL", 32, 18), 21: BlockType("IQ3_S", 256, 110), 22: BlockType("IQ2_S", 256, 82)},
    **{23: BlockType("IQ4_XS", 256, 136), 29: BlockType("IQ1_M", 256, 56), 34: BlockType("TQ1_0", 256, 54)},
    **{35: BlockType("TQ2_0", 256, 66), 39: BlockType("MXFP4", 32, 17)},
}
"""Types that hold codes, by their number."""

SETTINGS = {
    **{"context_length": "max_position_embeddings", "block_count": "num_hidden_layers"},
    **{"feed_forward_length": "intermediate_size", "embedding_length": "hidden_size"},
    **{"attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads"},
    **{"attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps"},
    **{"rope.freq_base": "rope_theta", "attention.sliding_window": "sliding_window"},
    **{"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
}
"""What a setting of an architecture is called in config.json."""

ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCKS = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate"},
    **{f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")},
}
"""What tensors are called by transformers, outside of layers and inside."""


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp's converter has stored an architecture.

    Attributes:
        model_type: What transformers calls it.
        permuted: Rows of each head of q and k lie in the order of rotary pairs, not of halves.
        raised: 1 was added to the weights of norms.
        names: Names in layers that differ from those of most.
    """

    model_type: str
    permuted: bool = False
    raised: bool = False
    names: Mapping[str, str] | None = None


GEMMA = {
    **{"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"},
    "post_ffw_norm": "post_feedforward_layernorm",
}
FAMILIES = {
    "llama": GgufFamily("llama", permuted=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "qwen3moe": GgufFamily("qwen3_moe"),
    "gemma2": GgufFamily("gemma2", raised=True, names=GEMMA),
    "gemma3": GgufFamily("gemma3_text", raised=True, names=GEMMA),
    "phi3": GgufFamily("phi3", names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
}
"""Architectures whose names and settings are those of transformers when they are read; of others they stay."""

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", re.ASCII)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
KEPT = 1024
"""Numbers of an array that are kept, such as one a layer; longer ones are the tokenizer's."""

ALIGNMENT, MOST_AXES = 32, 8


class _Cursor:
    """Reads a file's head from its start; an untrusted length never makes it read more than there is."""

    def __init__(self, file: ByteFile) -> None:
        self.file, self.at, self._start, self._held = file, 0, 0, b""

    def take(self, length: int) -> bytes:
        """Return the next bytes."""
        end = self.at + length
        if end > min(self.file.size, HEADER_LIMIT):
            raise CheckpointError(
                f"{self.file.name}: its head does not end within {min(self.file.size, HEADER_LIMIT)} bytes. It is "
                "truncated or damaged; fetch it again."
            )
        if end > self._start + len(self._held):
            self._start = self.at
            # A megabyte at a time: a head has thousands of entries of a few bytes each, and may lie on a server.
            self._held = self.file.fetch(self.at, min(max(length, 1 << 20), self.file.size - self.at))
        found = self._held[self.at - self._start : end - self._start]
        self.at = end
        return found

    def number(self, kind: str) -> Any:
        """Return the next number, of a kind as ``struct`` names it."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        """Return the next text; what is no UTF-8 in it is replaced."""
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return the next setting; ``None`` stands for an array of text, or one that is long."""
        if kind == TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != ARRAY:
            raise CheckpointError(f"{self.file.name}: a setting is of the unknown type {kind}. Fetch it again.")
        inner, count = self.number("I"), self.number("Q")
        if inner == TEXT:
            for _ in range(count):
                self.take(self.number("Q"))
            return None
        if inner not in _SCALARS:
            raise CheckpointError(f"{self.file.name}: an array is of the unknown type {inner}. Fetch it again.")
        raw = self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        # Scores and kinds of all tokens are passed over, and need no room.
        return list(struct.unpack(f"<{count}{_SCALARS[inner]}", raw)) if count <= KEPT else None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the head of a file lists it: name, shape (rows first), type, and first byte within the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        if self.kind in BLOCKS:
            return prod(self.shape) // BLOCKS[self.kind].entries * BLOCKS[self.kind].size_bytes
        return TensorInfo(self.name, self.shape, PLAIN[self.kind]).size_bytes


def open_gguf(folder: Folder, names: Sequence[str], where: str) -> Checkpoint:
    """Open the GGUF files that a model is split into, the first of which states its settings; only heads are read.

    Args:
        folder: Where they lie.
        names: Of the files, in order.
        where: What to call the model.

    Raises:
        CheckpointError: A file is damaged, or a tensor is in two of them.
    """
    files: list[ByteFile] = []
    try:
        for name in names:
            files.append(folder.open(name))
        heads = [_read_head(file) for file in files]
        settings = heads[0][0]
        family = FAMILIES.get(str(settings.get("general.architecture")))
        config = _config(settings, family, [one for _, stored in heads for one in stored])
        parts = [_as_checkpoint(file, stored, family, config) for file, (_, stored) in zip(files, heads, strict=True)]
        kinds = Counter(BLOCKS[one.kind].name for _, stored in heads for one in stored if one.kind in BLOCKS)
        notes = _notes(kinds, settings, family)
        return replace(join(parts, where), config=config, notes=notes)
    except BaseException:
        for file in files:
            file.close()
        raise


def _notes(kinds: Mapping[str, int], settings: Mapping[str, Any], family: GgufFamily | None) -> tuple[str, ...]:
    counts = ", ".join(f"{count} tensors {kind}" for kind, count in sorted(kinds.items()))
    quantised = (
        f"The weights are quantised (GGUF: {counts}): they are read as codes times scales, in float32. Where the other "
        "side of a comparison is not, the difference is quantisation too."
    )
    strange = (
        f"The GGUF architecture {printable(settings.get('general.architecture'), 40)!r} keeps its own names and order "
        "of rows; they may differ from those of other formats."
    )
    return (*([quantised] if kinds else []), *([] if family else [strange]))


def _read_head(file: ByteFile) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Return the settings and tensors of a file."""
    cursor = _Cursor(file)
    magic, version = cursor.take(4), cursor.number("I")
    if magic != MAGIC or version not in VERSIONS:
        refuse_format(file.name, start=file.fetch(0, min(64, file.size)))
        raise CheckpointError(
            f"{file.name}: it is no GGUF file of version {' or '.join(map(str, VERSIONS))}, low bytes first. "
            "Convert the model anew with llama.cpp."
        )
    tensors, count = cursor.number("Q"), cursor.number("Q")
    if (tensors + count) * 12 > file.size:  # the least that each takes
        raise CheckpointError(
            f"{file.name}: it has no room for {tensors} tensors and {count} settings. Fetch it again."
        )
    settings = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(count)}
    alignment = settings.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{file.name}: its alignment is {printable(alignment, 40)}. Fetch it again.")
    listed = [_read_listed(cursor) for _ in range(tensors)]
    start = -(-cursor.at // alignment) * alignment
    # By place, so that tensors that overlap are found.
    stored = sorted((replace(one, offset=start + one.offset) for one in listed), key=lambda one: one.offset)
    end = start
    for one in stored:
        if one.offset < end or one.offset + one.size_bytes > file.size:
            raise CheckpointError(
                f"{file.name}, tensor {printable(one.name)!r}: it overlaps another, or the file ends within it. It is "
                "truncated or damaged; fetch it again."
            )
        end = one.offset + one.size_bytes
    if len({one.name for one in stored}) < len(stored):
        raise CheckpointError(f"{file.name}: two tensors have one name. Fetch it again.")
    return settings, stored


def _read_listed(cursor: _Cursor) -> StoredTensor:
    """Return a tensor as it is listed, its offset counted from the end of the head."""
    name, axes = cursor.text(), cursor.number("I")
    where = f"{cursor.file.name}, tensor {printable(name)!r}"
    if axes > MOST_AXES:
        raise CheckpointError(f"{where}: {axes} axes, expected at most {MOST_AXES}. Fetch it again.")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in PLAIN and kind not in BLOCKS:
        raise CheckpointError(f"{where}: its type {kind} is not known. Convert the model to Q8_0 or F16.")
    entries = BLOCKS[kind].entries if kind in BLOCKS else 1
    if prod(n or 1 for n in shape) * 16 >= SIZE_LIMIT or (shape[-1] if shape else 1) % entries:
        raise CheckpointError(f"{where}: no tensor of its type has shape {list(shape)}. Fetch it again.")
    return StoredTensor(name, shape, kind, offset)


def _config(settings: Mapping[str, Any], family: GgufFamily | None, stored: Iterable[StoredTensor]) -> dict[str, Any]:
    """Return the config.json that transformers would have; without a known family none."""
    if family is None:
        return {}
    prefix = f"{settings['general.architecture']}."
    found: dict[str, Any] = {"model_type": family.model_type}
    for key, name in SETTINGS.items():
        value = settings.get(prefix + key)
        if isinstance(value, list) and len(set(value)) == 1:  # one a layer, all alike
            value = value[0]
        if isinstance(value, int | float):
            found[name] = value
    shapes = {one.name: one.shape for one in stored}
    if len(shapes.get("token_embd.weight", ())) == 2:
        found["vocab_size"] = shapes["token_embd.weight"][0]
    # The format has no word for it: a model without an output of its own takes its embedding.
    found["tie_word_embeddings"] = "output.weight" not in shapes
    return found


def _as_checkpoint(
    file: ByteFile, stored: Iterable[StoredTensor], family: GgufFamily | None, config: Mapping[str, Any]
) -> Checkpoint:
    infos: dict[str, TensorInfo] = {}
    sources: dict[str, Source] = {}
    aside: dict[str, SetAside] = {}
    for one in stored:
        name, role = _named(one.name, family)
        block = BLOCKS.get(one.kind)
        if (block and not block.read) or one.name.startswith("rope_"):
            reason = f"type {block.name} of GGUF" if block and not block.read else "made anew by the model, no weight"
            kind = block.name if block else PLAIN[one.kind]
            aside[name] = SetAside(one.shape, kind, one.size_bytes, reason)
            continue
        dtype = "F32" if block else PLAIN[one.kind]
        infos[name] = TensorInfo(name, one.shape, dtype, file.name, offset=one.offset)
        heads = config.get({"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(role, ""))
        permuted = heads if family and family.permuted and isinstance(heads, int) else 0
        raised = bool(family and family.raised and role.endswith("norm"))
        sources[name] = GgufTensor(file, one, permuted, raised) if block or permuted or raised else file
    return Checkpoint(file.name, infos, sources, set_aside=aside)


def _named(name: str, family: GgufFamily | None) -> tuple[str, str]:
    """Return what transformers calls a tensor, and its role as GGUF names it."""
    role, _, last = name.rpartition(".")
    inside = _BLOCK.fullmatch(name)
    if inside:
        role = inside[2]
    if family is None:
        return name, role
    known = {**IN_BLOCKS, **(family.names or {})}
    if inside and role in known:
        return f"model.layers.{inside[1]}.{known[role]}.{last}", role
    return (f"{ENDS[role]}.{last}" if role in ENDS else name), role


@dataclass(frozen=True)
class GgufTensor:
    """The source of a tensor that is not stored as it is handed out.

    Attributes:
        file: Where it lies.
        stored: How.
        heads: Heads whose rows lie in the order of rotary pairs; 0 where rows lie as they should.
        raised: Whether 1 was added to it.
    """

    file: ByteFile
    stored: StoredTensor
    heads: int = 0
    raised: bool = False

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis; where rows are in another order whole heads are read."""
        first, last = rows or (0, info.shape[0])
        # The converter interleaves the halves of each head's rows; where they make no even heads it cannot have.
        size = info.shape[0] // self.heads if self.heads and info.shape[0] % (2 * self.heads) == 0 else 1
        # Whole heads, as their rows are in another order within.
        begin, end = first // size * size, -(-last // size) * size
        found = self._stored_rows(info, begin, end)
        if size > 1:  # pairs (0, 1), (2, 3), ... become entries of the first and of the second half
            found = found.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
        return (found[first - begin : last - begin] - int(self.raised)).contiguous()

    def _stored_rows(self, info: TensorInfo, first: int, last: int) -> torch.Tensor:
        if self.stored.kind not in BLOCKS:
            return self.file.read(info, (first, last))
        import torch

        from diffract.checkpoints.dequantise import from_ggml

        block, count = BLOCKS[self.stored.kind], info.shape[0]
        # a vector of codes has no rows that could be read apart
        begin, end = (0, count) if len(info.shape) == 1 else (first, last)
        step = self.stored.size_bytes / count if count else 0
        buffer = torch.empty(int((end - begin) * step), dtype=torch.uint8)
        self.file.fill(buffer.numpy().data, self.stored.offset + int(begin * step))
        values = from_ggml(block.name, buffer.view(-1, block.size_bytes)).view(end - begin, *info.shape[1:])
        return values[first - begin : last - begin]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
