"""What is in a checkpoint that nobody mentioned: facts about precision, values, copies, tokens, files and the card.

Facts, not judgements: each has a place and a count. What could come by chance has a bound beside its definition. Every
tensor is read once, in blocks.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from blake3 import blake3
from jaxtyping import Float
from torch import Tensor

from diffract.analysis.scan import Options, open_all
from diffract.analysis.tables import Member, describe, model_row
from diffract.analysis.vectors import is_table
from diffract.checkpoints import Reference, row_blocks
from diffract.checkpoints.checkpoint import as_bytes
from diffract.checkpoints.configurations import token_texts
from diffract.errors import CheckpointError
from diffract.matrices import Layout
from diffract.matrices.lineage import tell_lineage
from diffract.schemas import FACTS, MODELS
from diffract.tables import Tables, frame

BLOCK_BYTES = 1 << 24

CORNER = 128
"""Rows of each block in which few values are looked for: as many as block-wise FP8 has under one scale."""

GROUPS = ((16, (128, 64, 32)), (256, (1024,)))
"""Most different values, and entries of a row that hold no more of them, where they lie on a grid of 4 or 8 bits. Of
Gaussian or heavy-tailed values rounded to bfloat16, 32 entries had 26 different ones at least in 400,000 draws, 1,024
had 644 in 20,000, and a block of 128 x 128 had 1,897 in 300."""

CODE, PICKLES = (".py", ".so", ".ipynb", ".sh"), (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

CARD, CARD_BYTES = "README.md", 1 << 16
"""A model's card, and how much of it may be settings."""

INITIAL_DEVIATIONS = 5
"""How far the norm of a row may lie from that of its initial distribution, in standard deviations."""

Row = dict[str, Any]


@dataclass
class _Seen:
    """What one pass over a tensor has found."""

    infinite: int = 0
    zero_rows: int = 0
    nonzero_columns: Tensor | None = None
    low: float = float("inf")
    high: float = float("-inf")
    as_bf16: bool = True
    as_f16: bool = True
    grids: dict[str, bool] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    slices: list[str] = field(default_factory=list)


def audit(reference: Reference, options: Options, *, base: Reference | None = None) -> Tables:
    """Say what is in a checkpoint.

    Args:
        reference: The checkpoint; text may begin with ``name=``.
        options: How it is opened and read.
        base: What it descends from; by default the ``base_model`` of its card, where that is a folder here.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    with ExitStack() as stack:
        (name,), (layout,) = open_all([reference], options, stack)
        facts = [*_tensors(layout, options), *_files(layout)]
        folder = Path(layout.checkpoint.reference)
        card = _card(folder) if folder.is_dir() else {}
        facts += _of_card(card, folder) if folder.is_dir() else []
        facts += _lineage(card, layout, base, options)
        member = Member(name, "model", layout)
    models = frame([model_row(member, len(layout.matrices))], MODELS)
    settings = {"base": str(base) if base else None}
    known = {"kind": "audit", "settings": settings, "seconds": round(time.monotonic() - begun, 3)}
    manifest = describe([member], models, known, glossary={}, warnings=[])
    return Tables(manifest, {"facts": frame(facts, FACTS), "models": models})


def _fact(topic: str, fact: str, where: str, **numbers: Any) -> Row:
    return {"topic": topic, "fact": fact, "where": where, "count": None, "of": None, "note": None} | numbers


def _tensors(layout: Layout, options: Options) -> Iterator[Row]:
    """Yield what the weights themselves tell."""
    tokens = token_texts(layout.checkpoint)
    copies: dict[str, list[str]] = defaultdict(list)
    held: dict[str, list[str]] = defaultdict(list)
    floats = [entry for entry in layout.entries.values() if entry.info.is_float and entry.info.entries]
    for done, entry in enumerate(floats, start=1):
        name, table = entry.info.name, is_table(entry, layout, len(tokens))
        seen = _read(layout, name, rows=table)
        yield from _of_values(name, entry.info.shape, seen)
        if seen.low == seen.high:  # of which nothing else could be told
            continue
        # Ties are meant; a copy that nobody stated is the fact.
        if entry.outcome != "tied":
            for number, digest in enumerate(seen.slices):
                copies[digest].append(name if len(seen.slices) == 1 else f"{name}[{number}]")
        if entry.info.dtype in {"F32", "F64"} and (seen.as_bf16 or seen.as_f16):
            held[f"{entry.info.dtype} that holds {'BF16' if seen.as_bf16 else 'F16'}"].append(name)
        grid = next((word for word, holds in seen.grids.items() if holds), None)
        if grid:
            held[grid].append(name)
        if table:
            yield from _of_tokens(name, seen, layout, tokens)
        if options.progress:
            options.progress(done, len(floats), name)
    for word, names in held.items():
        yield _fact("precision", word, _some(names), count=len(names), of=len(floats))
    for names in copies.values():
        if len(names) > 1:
            yield _fact("copies", "equal to the bit", _some(names), count=len(names))


def _read(layout: Layout, name: str, *, rows: bool) -> _Seen:
    """Read a tensor once.

    Args:
        layout: Whose it is.
        name: What it is called.
        rows: Whether norm and digest of each row are wanted.
    """
    info, seen = layout.checkpoint.info(name), _Seen()
    stacked = len(info.shape) == 3
    whole = blake3()
    for span in row_blocks(info, BLOCK_BYTES):
        block = layout.checkpoint.read(name, span)
        if stacked:
            seen.slices += [blake3(as_bytes(one)).hexdigest() for one in block]
        else:
            whole.update(as_bytes(block))
        # Few operations know dtypes of eight bits; float32 holds all of their numbers.
        values = block if block.dtype in {torch.float32, torch.float64} else block.float()
        finite = values.isfinite()
        seen.infinite += int((~finite).sum())
        if finite.any():
            seen.low, seen.high = (
                min(seen.low, float(values[finite].min())),
                max(seen.high, float(values[finite].max())),
            )
        if info.dtype in {"F32", "F64"}:
            # NaN is equal to nothing, so that a tensor with one holds no narrower numbers
            seen.as_bf16 = seen.as_bf16 and bool((values.bfloat16().to(values.dtype) == values).all())
            seen.as_f16 = seen.as_f16 and bool((values.half().to(values.dtype) == values).all())
        if len(info.shape) == 2:
            zero = values == 0
            seen.zero_rows += int(zero.all(1).sum())
            columns = (~zero).any(0)
            seen.nonzero_columns = columns if seen.nonzero_columns is None else seen.nonzero_columns | columns
            for word, holds in _grids(values[:CORNER]).items():
                seen.grids[word] = seen.grids.get(word, True) and holds
            if rows:
                seen.norms.append(values.double().norm(dim=1))
                seen.hashes += [blake3(as_bytes(row)).digest(16) for row in block]
    seen.slices = seen.slices or [whole.hexdigest()]
    return seen


def _grids(values: Float[Tensor, "rows cols"]) -> dict[str, bool]:
    """Return on which grids values may lie, the coarsest first; empty where there are too few of them to tell."""
    found = {}
    rows, cols = values.shape
    for most, widths in GROUPS:
        for width in widths:
            if cols % width == 0:
                found[f"at most {most} values in every {width} entries of a row"] = _few(
                    values.reshape(-1, width), most
                )
    if rows >= CORNER and cols >= CORNER:
        corners = values[:CORNER, : cols // CORNER * CORNER].reshape(CORNER, -1, CORNER).transpose(0, 1)
        word = f"at most 256 values in every {CORNER} x {CORNER} block"
        found[word] = _few(corners.reshape(len(corners), -1), 256)
    return found


def _few(groups: Float[Tensor, "groups entries"], most: int) -> bool:
    ordered = groups.sort(dim=1).values
    different = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    # Groups of one value lie on every grid, and say nothing of it.
    return bool((different <= most).all()) and bool((different > 1).any())


def _of_values(name: str, shape: Sequence[int], seen: _Seen) -> Iterator[Row]:
    entries = int(np.prod(shape))
    if seen.infinite:
        yield _fact("values", "not finite", name, count=seen.infinite, of=entries)
    if seen.low == seen.high == 0:
        yield _fact("values", "all zero", name, count=entries, of=entries)
    elif seen.low == seen.high and len(shape) > 1:
        yield _fact("values", "all equal", name, count=entries, of=entries, note=f"{seen.low:.6g}")
    elif seen.nonzero_columns is not None:
        if seen.zero_rows:
            yield _fact("values", "rows of zeros", name, count=seen.zero_rows, of=shape[0])
        if dead := int((~seen.nonzero_columns).sum()):
            yield _fact("values", "columns of zeros", name, count=dead, of=shape[1])


def _of_tokens(name: str, seen: _Seen, layout: Layout, tokens: dict[int, str]) -> Iterator[Row]:
    """Yield what the rows of a table of tokens tell of tokens that training never met."""
    norms, count = torch.cat(seen.norms), len(seen.hashes)
    alike: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in enumerate(seen.hashes):
        alike[digest].append(row)
    for places in alike.values():
        if len(places) > 1 and norms[places[0]] > 0:
            yield _fact("tokens", "equal rows", name, count=len(places), of=count, note=_named(places, tokens))
    scale = layout.checkpoint.config.get("initializer_range")
    width = layout.checkpoint.info(name).shape[1]
    if isinstance(scale, float | int) and scale > 0:
        # the norm of `width` Gaussian entries is scale * sqrt(width), give or take scale / sqrt(2)
        near = (norms - scale * width**0.5).abs() < INITIAL_DEVIATIONS * scale / 2**0.5
        if 0 < int(near.sum()) < count:
            places = near.nonzero()[:, 0].tolist()
            note = f"norms as drawn with initializer_range {scale:g}: {_named(places, tokens)}"
            yield _fact("tokens", "rows of the initial norm", name, count=len(places), of=count, note=note)
    if tokens and count > len(tokens):
        yield _fact("tokens", "rows without a token", name, count=count - len(tokens), of=count)


def _named(places: Sequence[int], tokens: dict[int, str]) -> str:
    return _some([repr(tokens[place]) if place in tokens else str(place) for place in places])


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _files(layout: Layout) -> Iterator[Row]:
    """Yield files that hold code, or could run some when they are loaded, and what the configuration says of them."""
    folder = Path(layout.checkpoint.reference)
    names = (
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    )
    names = names or sorted(layout.checkpoint.companions)
    for fact, endings in (("code", CODE), ("pickle", PICKLES)):
        if found := [name for name in names if name.endswith(endings)]:
            yield _fact("files", fact, _some(found), count=len(found), of=len(names))
    for key, called in (layout.checkpoint.config.get("auto_map") or {}).items():
        yield _fact("files", "code named by the configuration", "config.json", note=f"{key}: {called}")


def _card(folder: Path) -> dict[str, Any]:
    """Return the settings at the head of a model's card; empty where there are none that can be read."""
    if not (folder / CARD).is_file():
        return {}
    with (folder / CARD).open("rb") as file:
        head = re.match(r"---\s*\n(.*?)\n---", file.read(CARD_BYTES).decode("utf-8", "replace"), re.DOTALL)
    try:
        # an anchor is of no use in a card, and a few of them make a document of gigabytes
        found = yaml.safe_load(head[1]) if head and "&" not in head[1] else None
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_card(card: dict[str, Any], folder: Path) -> Iterator[Row]:
    licences = sorted(p.name for p in folder.iterdir() if re.match(r"(?i)(licen[cs]e|copying|notice)", p.name))
    stated = card.get("license")
    if stated or licences:
        yield _fact("card", "licence", _some(licences) or CARD, note=str(stated) if stated else None)
    else:
        yield _fact("card", "no licence stated", CARD)
    if card.get("base_model"):
        yield _fact("card", "base_model", CARD, note=_some([str(one) for one in _list(card["base_model"])]))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _lineage(card: dict[str, Any], layout: Layout, base: Reference | None, options: Options) -> Iterator[Row]:
    """Yield how the model is related to what it is said to descend from, where that is here."""
    stated = [str(one) for one in _list(card.get("base_model") or [])]
    folder = Path(layout.checkpoint.reference).parent
    here = [path for one in stated for path in (Path(one), folder / one) if path.is_dir()]
    chosen = base if base is not None else next(iter(here), None)
    if chosen is None:
        return
    with ExitStack() as stack:
        try:
            _, (other,) = open_all([chosen], options, stack)
        except CheckpointError as error:
            if base is not None:
                raise
            yield _fact("card", "base_model cannot be read", str(chosen), note=str(error))
            return
        found = tell_lineage(other, layout)
        r = None if found.correlation is None else f"median correlation {found.correlation:.4g}"
        yield _fact("card", f"lineage: {found.word}", other.checkpoint.reference, note=r)
