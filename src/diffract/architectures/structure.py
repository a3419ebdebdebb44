"""Attention that no family describes, read by its structure: usual names, the number of heads, and shapes that agree.

A module is cut into heads only where every equation holds, H heads with sizes d of q and k and e of v and o::

    rows of q = H d,  rows of k = K d,  rows of v = K e,  columns of o = H e,  K divides H

and where d and K are what the configuration says, if it says something. Whatever else a module holds (differences of
heads, convolutions, gates of unknown kinds) may give its rows another meaning: it stays whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from diffract.architectures.dimensions import TEXT_SECTIONS, Dimensions, TensorPlace
from diffract.architectures.names import unwrapped
from diffract.architectures.spec import Role
from diffract.errors import ArchitectureError, printable

Shapes = Mapping[str, tuple[int, ...]]

USUAL_NAMES = {
    "q": "q q_proj q_lin query query_proj query_layer q_head project_q to_q wq Wq q_proj_weight linear_q",
    "k": "k k_proj k_lin key key_proj key_layer k_head project_k to_k wk Wk k_proj_weight linear_k",
    "v": "v v_proj v_lin value value_proj value_layer v_head project_v to_v wv Wv v_proj_weight linear_v",
    "o": "o o_proj out_proj out_lin out dense attention_out post_proj output to_out wo Wo linear_out",
    "qkv": "in_proj_weight",
}
"""What q, k, v and o are called in one module; ``in_proj_weight`` is the three of torch's own attention, stacked."""

_role = cache(Role)  # which is checked when it is made: once for all layers that are alike

_SLOTS = {name: slot for slot, names in USUAL_NAMES.items() for name in names.split()}

HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "nhead", "num_query_heads")
NO_COUNT = "the configuration states no number of heads"

SIDED_KEYS = ("{}_attention_heads", "num_{}_attention_heads", "num_{}_heads")
"""Where configurations of encoder-decoders keep the heads of one side."""

KV_KEY = re.compile(r"((num|n|kv_n)_)?(\w+_)?(key_value|kv|query|n)_(heads|groups|group_num)")
SIZE_KEY = re.compile(r"(\w+_)?head_dim|d_kv|kv_channels")

PLAIN = re.compile(r"(\w*norm|\w*bias|sinks?|\w*gate\w*|g_proj|rotary_emb|rel|\w*scale)", re.IGNORECASE)
"""What else a module may hold: it changes sizes or adds to scores, but not which rows are whose."""

SIDES = {
    "vision": re.compile(r"vision|visual|image|img|vit"),
    "audio": re.compile(r"audio|speech"),
    "encoder": re.compile(r"(\w*_)?encoder"),
    "decoder": re.compile(r"(\w*_)?decoder"),
    "text": re.compile(r"text|language|llm"),
}
"""Parts of larger models, and how their modules and the sections of their configurations begin."""

CROSS = re.compile(r"cross|enc(oder)?_?(dec)?_?att", re.IGNORECASE)
NUMBER = re.compile(r"(?:^|(?<=\.))(?:(?:layers?|h|\w*blocks?)_)?([0-9]{1,6})(?:\.|$)")
"""The number of a layer: ``layers.3``, or ``layers_3`` as Flax writes it."""

KERNEL = ".kernel"
"""How weights are called in Flax, which stores (in, out); or (in, heads, size), and o as (heads, size, out)."""


@dataclass(frozen=True)
class Attention:
    """One attention module.

    Attributes:
        path: Its name, without prefix and wrappers.
        tensors: Its q, k, v and o (or ``qkv``), by slot.
        others: What else it holds.
    """

    path: str
    tensors: dict[str, str]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What structure says of a checkpoint.

    Attributes:
        places: Of the tensors that it describes, by name.
        dimensions: Of most modules that are cut into heads.
        whole: Modules that are not cut into heads, and why.
    """

    places: dict[str, TensorPlace]
    dimensions: Dimensions
    whole: dict[str, str]


def read_structure(
    shapes: Shapes, bare: Mapping[str, str], config: Mapping[str, Any], *, alone: bool = True
) -> Reading:
    """Describe attention modules by their structure.

    Args:
        shapes: Of the tensors to describe, by name.
        bare: Their names without prefix and words of wrappers.
        config: The model's config.json.
        alone: Whether no family describes attention of the same checkpoint, from which theirs must be told apart.

    Raises:
        ArchitectureError: The configuration claims more heads than a projection has rows.
    """
    places: dict[str, TensorPlace] = {}
    whole: dict[str, str] = {}
    modules = _modules({bare[name]: name for name in shapes}, shapes)
    blocks = _blocks([module.path for module in modules], alone=alone)
    counted: Counter[Dimensions] = Counter()
    for module in modules:
        layer, block = blocks[module.path]
        found = _equations(module, shapes, _claims(unwrapped(next(iter(module.tensors.values()))), layer, config))
        dimensions, value_size = found if not isinstance(found, str) else (Dimensions(), 0)
        if isinstance(found, str):
            whole[module.path] = found
        else:
            counted[dimensions] += 1
        for slot, name in module.tensors.items():
            sizes = tuple(value_size if part in "vo" else dimensions.head_dim or 0 for part in slot)
            parts, turned = tuple(f"{block}.{part}" for part in slot), name.endswith(KERNEL)
            role = _role(part=parts, whole=isinstance(found, str), transposed=turned)
            places[name] = TensorPlace(role, layer, dimensions=dimensions, sizes=sizes)
    return Reading(places, max(counted, key=counted.__getitem__, default=Dimensions()), whole)


def _modules(names: Mapping[str, str], shapes: Shapes) -> list[Attention]:
    """Find the modules that have all of q, k, v and o."""
    homes: dict[str, dict[str, str]] = {}
    for own, name in names.items():
        home, _, leaf = own.removesuffix(".weight").removesuffix(KERNEL).removesuffix(".linear").rpartition(".")
        if (len(shapes[name]) == 2 or (len(shapes[name]) == 3 and own.endswith(KERNEL))) and (slot := _SLOTS.get(leaf)):
            homes.setdefault(home, {}).setdefault(slot, name)
    found: dict[str, dict[str, str]] = {}
    for home, own in homes.items():
        parent = home.rpartition(".")[0]
        outside = (homes.get(place, {}).get("o") for place in (f"{parent}.output", parent))
        out = own.get("o") or next(filter(None, outside), None)
        slots = ("qkv",) if "qkv" in own else ("q", "k", "v")
        # linear attention has states instead of scores, and head counts of its own
        if out and all(slot in own for slot in slots) and not home.endswith("linear_attn"):
            found[home] = {slot: own[slot] for slot in slots} | {"o": out}
    others: dict[str, list[str]] = {home: [] for home in found}
    used = {name for own in found.values() for name in own.values()}
    for own, name in names.items():
        for dot in re.finditer(r"\.", own):
            if own[: dot.start()] in found and name not in used:
                others[own[: dot.start()]].append(own[dot.end() :])
    return [Attention(home, own, tuple(others[home])) for home, own in found.items()]


def _blocks(paths: Iterable[str], *, alone: bool) -> dict[str, tuple[int | None, str]]:
    """Name the layer and the block of every module: ``attn``, ``decoder.cross_attn``, ``vision.attn``."""
    parts = {path: NUMBER.split(path, maxsplit=1) for path in paths}
    sides = {own[0]: _side(own[0]) for own in parts.values() if len(own) > 1}
    if alone and len(sides) == 1:
        sides = dict.fromkeys(sides)
    found = {}
    for path, (tower, *rest) in parts.items():
        side = sides.get(tower)
        # torch calls the attention of a decoder to an encoder plainly multihead_attn, beside self_attn
        cross = CROSS.search(rest[-1] if rest else tower) or rest[1:] == ["multihead_attn"]
        words = (side if side != "text" else None, "cross_attn" if cross else "attn")
        found[path] = (int(rest[0]) if rest else None, ".".join(filter(None, words)))
    counts = Counter(found.values())
    return {
        path: place
        if counts[place] == 1 and (alone or place[1] not in ("attn", "cross_attn"))
        else (place[0], f"{NUMBER.sub('', path, count=1)}.attn")
        for path, place in found.items()
    }


def _side(path: str) -> str | None:
    """Return which part of a larger model a module belongs to, by the first word that says so."""
    words = (side for word in path.split(".") for side, begins in SIDES.items() if begins.match(word))
    return next(words, None)


@dataclass(frozen=True)
class Claims:
    """What the nearest section of a configuration says of a module; empty where it is silent."""

    heads: int | None
    kv_heads: frozenset[int]
    sizes: frozenset[int]


def _claims(path: str, layer: int | None, config: Mapping[str, Any]) -> Claims:
    section, side = dict(_nearest(path, config)), _side(NUMBER.split(path)[0])
    section |= (section.get("per_layer_config") or {}).get(str(layer), {})

    def stated(key: str) -> int | None:
        value = section.get(key)
        if isinstance(value, Sequence) and layer is not None and layer < len(value):  # one for each layer
            value = value[layer]
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def all_of(key: re.Pattern[str]) -> frozenset[int]:
        return frozenset(filter(None, (stated(name) for name in section if key.fullmatch(name))))

    keys = (*(key.format(side) for key in SIDED_KEYS), *HEAD_KEYS)
    return Claims(next(filter(None, map(stated, keys)), None), kv_heads=all_of(KV_KEY), sizes=all_of(SIZE_KEY))


def _nearest(path: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section that a module's path names; else the configuration itself, or its language model's."""
    sections = {name: value for name, value in _sections(config) if any(key in value for key in HEAD_KEYS)}
    for word in path.split("."):
        for name, section in sections.items():
            stem = name.removesuffix("_config")
            if word.startswith(stem) or any(b.match(word) and b.match(stem) for b in SIDES.values()):
                return section
    if any(key in config for key in HEAD_KEYS) or not sections:
        return config
    return next((sections[name] for name in TEXT_SECTIONS if name in sections), {})


def _sections(config: Mapping[str, Any], depth: int = 2) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield name, value
            if depth > 1:
                yield from _sections(value, depth - 1)


def _out_and_in(slot: str, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a projection, however it is stored."""
    if not name.endswith(KERNEL):
        return shape[0], shape[1]
    inner = prod(shape[:-1]) if slot == "o" else shape[0]
    return prod(shape) // inner, inner


def _equations(module: Attention, shapes: Shapes, claims: Claims) -> tuple[Dimensions, int] | str:
    """Solve for head sizes and key-value heads; say why where nothing solves all equations."""
    strange = [name for name in module.others if not PLAIN.match(name) and not name.endswith("bias")]
    first = shapes[next(iter(module.tensors.values()))]
    counted = first[1] if len(first) == 3 else None
    heads = claims.heads or counted
    if strange:
        return f"it holds {printable(strange[0])}, too"
    if heads is None or counted not in (None, heads):
        return f"the configuration states {heads} heads, an axis of q counts {counted}" if heads else NO_COUNT
    sizes = {slot: _out_and_in(slot, name, shapes[name]) for slot, name in module.tensors.items()}
    q, k, v = (sizes["qkv"][0] // 3,) * 3 if "qkv" in sizes else (sizes[slot][0] for slot in "qkv")
    width, columns = next(iter(sizes.values()))[1], sizes["o"][1]
    if heads > q:
        raise ArchitectureError(
            f"config.json claims {heads} heads, but the queries of {printable(module.path)!r} have {q} rows. "
            "Correct the config, or pass --no-heads to take whole matrices."
        )
    size, value_size = q // heads, columns // heads
    kv_heads = k // size
    if (q, k, columns) != (heads * size, kv_heads * size, heads * value_size) or v != kv_heads * value_size:
        return f"{q}, {k}, {v} rows of q, k, v and {columns} columns of o are no whole sizes of {heads} heads"
    if not kv_heads or heads % kv_heads or (claims.kv_heads and kv_heads not in claims.kv_heads | {heads}):
        return f"{k} rows of k make {kv_heads} key-value heads, which the configuration contradicts"
    if claims.sizes and size not in claims.sizes and size * heads != width:
        return f"a head of q has {size} rows, the configuration says {', '.join(map(str, sorted(claims.sizes)))}"
    return Dimensions(width=width, heads=heads, kv_heads=kv_heads, head_dim=size), value_size
