"""What an adapter holds, from its factors alone: how much rank it uses, how much would do, what merging would lose.

Of a change s B A nothing of the size of a weight is formed: with B = Q_B R_B and A^T = Q_A R_A its singular values are
those of the small s R_B R_A^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.checkpoints import Reference, open_checkpoint, row_blocks
from diffract.checkpoints.adapter_parts import Adapter, LoraParts
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.checkpoints.open import open_adapter_parts
from diffract.edits.edit import Row
from diffract.errors import SelectionError, printable
from diffract.settings import Progress, natural_key

BF16_HALF_STEP = 2.0**-8
"""Half of the distance of neighbouring bfloat16 numbers, relative to the power of two below them."""


@dataclass(frozen=True)
class Audit:
    """What is known of an adapter.

    Attributes:
        reference: The adapter.
        modules: A row per module: ``name``, stated ``rank``, ``used`` singular values above the rounding of the stored
            factors, ``effective_rank`` exp(-sum p ln p) with p = sigma / sum sigma, ``suffices`` directions that hold
            the asked share of energy, Frobenius ``norm`` of the change, its ``share`` of all squared norms,
            ``rms`` of its entries, and ``lost_above``: base entries of this size and more stay as they are in bfloat16
            when a change of that rms is merged into them. ``None`` where factors are not finite or zero.
        rank_pattern: For modules that need less than ``rank``, the rank that suffices; as PEFT reads it.
        rank: The largest rank that suffices in any module.
        overlap: A row per module that two adapters share: ``name``, ``cosine`` of the changes with ``cosine_chance``
            (standard deviation between random directions), and of the directions that suffice ``output`` and ``input``
            ||U1^T U2||_F^2 / min(k1, k2) with ``output_chance`` and ``input_chance``.
        merging: A row per tensor, where a base was given: ``name``, ``error`` ||bf16(W + D) - W - D||_F / ||D||_F, and
            ``unmoved``, the share of entries that are bf16(W) still.
        whole: Tensors that the adapter holds whole or by rows, which have no rank.
    """

    reference: str
    modules: list[Row]
    rank_pattern: dict[str, int]
    rank: int
    overlap: list[Row] = field(default_factory=list)
    merging: list[Row] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Spectrum:
    """Singular values and vectors of a change: U (out, r), S (r,), V (in, r)."""

    U: Float64[Tensor, "out r"]
    S: Float64[Tensor, " r"]
    V: Float64[Tensor, "in r"]


def audit(
    adapter: str | Path,
    *,
    against: str | Path | None = None,
    base: Reference | None = None,
    energy: float = 0.99,
    download: bool = False,
    progress: Progress | None = None,
) -> Audit:
    """Say what an adapter holds; its base is not needed.

    Args:
        adapter: A folder, ``FOLDER#name`` for one of several, or a name on the hub.
        against: Another adapter, to say how far both change the same directions.
        base: The base, to measure what merging into bfloat16 loses; it is read whole.
        energy: The share of a change's squared Frobenius norm that suffices.
        download: Fetch what is on the hub whole instead of reading byte ranges.
        progress: Called with modules done, all modules, and what was just finished.

    Raises:
        DiffractError: There is no such adapter, or ``energy`` is no share.
    """
    if not 0 < energy <= 1:
        raise SelectionError(f"energy: expected a share above 0 and up to 1, got {energy}.")
    held, other = open_adapter_parts(adapter, download=download), None
    try:
        other = None if against is None else open_adapter_parts(against, download=download)
        for opened in (held, other):
            if opened is not None and opened.settings.taken:
                raise SelectionError(
                    f"{opened.settings.where}: its factors hold what init_lora_weights {opened.settings.taken!r} took "
                    "out of the base too, so that they alone do not tell the change. Convert it with PEFT "
                    "(path_initial_model_for_weight_conversion), or compare it with its base: diffract compare."
                )
        rows: list[Row] = []
        overlaps: list[Row] = []
        for done, low_rank in enumerate(held.low_rank.values(), 1):
            match = other and other.low_rank.get(low_rank.module)
            spectra = dict(_spectra(other, match)) if other and match and match.shape == low_rank.shape else {}
            for name, spectrum in _spectra(held, low_rank):
                rows.append(_module_row(name, spectrum, (low_rank, energy)))
                twin = spectra.get(name)
                if twin is not None:
                    overlaps.append(_overlap_row(name, (spectrum, twin), energy))
            if progress:
                progress(done, len(held.low_rank), low_rank.module)
        whole = [*held.whole, *held.tokens, *held.biases]
    finally:
        held.weights.close()
        if other is not None:
            other.weights.close()
    if against is not None and not overlaps:
        raise SelectionError(f"{printable(adapter)} and {printable(against)} adapt no module of the same shape.")
    rows, overlaps = (sorted(found, key=lambda row: natural_key(row["name"])) for found in (rows, overlaps))
    total = math.fsum(row["norm"] ** 2 for row in rows if row["norm"])
    for row in rows:
        row["share"] = row["norm"] ** 2 / total if row["norm"] is not None and total else None
    needed = {row["name"]: max(row["suffices"] or 1, 1) for row in rows}
    rank = max(needed.values(), default=0)
    # The largest rank is the adapter's own; PEFT lists exceptions alone.
    pattern = {name: k for name, k in needed.items() if k < rank}
    merging = [] if base is None else _merging(adapter, base, download=download)
    return Audit(str(adapter), rows, pattern, rank=rank, overlap=overlaps, merging=merging, whole=whole)


def _spectra(adapter: Adapter, low_rank: LoraParts) -> list[tuple[str, _Spectrum | None]]:
    """Return the spectrum of a module's change, of stacked experts one each; ``None`` where it is not finite."""
    B, A = low_rank.read(adapter.weights)
    if B.ndim == 2:
        return [(low_rank.module, _spectrum(B, A))]
    return [(f"{low_rank.module}.{i}", _spectrum(b, a)) for i, (b, a) in enumerate(zip(B, A, strict=True))]


def _spectrum(B: Float64[Tensor, "out r"], A: Float64[Tensor, "r in"]) -> _Spectrum | None:
    if not bool(B.isfinite().all() and A.isfinite().all()):
        return None
    # Of two triangles of the rank's size, so that the change is never multiplied out.
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return _Spectrum(left.Q @ U, S, right.Q @ Vh.mT)


def _suffices(S: Tensor, energy: float) -> int:
    """Return the fewest directions with this share of the energy; 0 for a zero change."""
    sums = S.square().cumsum(0)
    if not float(sums[-1]):
        return 0
    # the last sums are equal up to rounding: the whole energy is reached where it is but for that
    return int((sums < energy * sums[-1] * (1 - 4 * torch.finfo(S.dtype).eps)).sum()) + 1


def _module_row(name: str, spectrum: _Spectrum | None, asked: tuple[LoraParts, float]) -> Row:
    low_rank, energy = asked
    row: Row = {"name": name, "rank": low_rank.rank}
    keys = ("used", "effective_rank", "suffices", "norm", "rms", "lost_above")
    if spectrum is None:
        return row | dict.fromkeys(keys)
    S, entries = spectrum.S, len(spectrum.U) * len(spectrum.V)
    norm = float(torch.linalg.vector_norm(S))
    stored = torch.finfo(TORCH_DTYPES[low_rank.B.dtype]).eps
    floor = S[0] * min(max(len(spectrum.U), len(spectrum.V)) * stored, max(stored, 1e-3))
    used = int((floor < S).sum())
    p = S[S > 0] / S.sum()
    rms = norm / math.sqrt(entries)
    effective = float(torch.exp(-(p * p.log()).sum())) if norm else None
    found = (used, effective, _suffices(S, energy), norm, rms, rms / BF16_HALF_STEP)
    return row | dict(zip(keys, found, strict=True))


def _overlap_row(name: str, pair: tuple[_Spectrum | None, _Spectrum], energy: float) -> Row:
    one, two = pair
    keys = ("cosine", "cosine_chance", "output", "output_chance", "input", "input_chance")
    counts = [0 if s is None else _suffices(s.S, energy) for s in pair]
    if one is None or not all(counts):
        return {"name": name, **dict.fromkeys(keys)}
    outputs, inputs = len(one.U), len(one.V)
    inner = ((one.U.mT @ two.U) * (one.V.mT @ two.V) * one.S[:, None] * two.S).sum()
    cosine = float(inner / torch.linalg.vector_norm(one.S) / torch.linalg.vector_norm(two.S))
    sides = ((one.U, two.U), (one.V, two.V))
    output, input_ = (float((a[:, : counts[0]].mT @ b[:, : counts[1]]).square().sum()) for a, b in sides)
    least, most = min(counts), max(counts)
    values = (cosine, (outputs * inputs) ** -0.5, output / least, most / outputs, input_ / least, most / inputs)
    return {"name": name, **dict(zip(keys, values, strict=True))}


def _merging(adapter: str | Path, base: Reference, *, download: bool) -> list[Row]:
    """Merge into bfloat16 block by block, and compare with the sum and with the base."""
    rows: list[Row] = []
    with (
        open_checkpoint(base, download=download) as origin,
        open_checkpoint(adapter, base=origin, download=download) as merged,
    ):
        for name in merged.factors:
            missed, change, unmoved = [], [], 0
            for block in row_blocks(merged.info(name)):
                before, after = origin.read(name, block).double(), merged.read_unrounded(name, block).double()
                rounded = after.bfloat16()
                missed.append(float((rounded.double() - after).square().sum()))
                change.append(float((after - before).square().sum()))
                unmoved += int((rounded == before.bfloat16()).sum())
            whole = math.fsum(change)
            error = math.sqrt(math.fsum(missed) / whole) if whole else None
            rows.append({"name": name, "error": error, "unmoved": unmoved / merged.info(name).entries})
    return rows


def summary(found: Audit) -> Mapping[str, Any]:
    """Return what an audit comes to: its totals, in words of the record."""
    measured = [row for row in found.modules if row["norm"] is not None]
    used = [row["used"] for row in measured] or [0]
    need = [row["suffices"] for row in measured] or [0]
    ranks = [row["rank"] for row in found.modules] or [0]
    told: dict[str, Any] = {
        "modules": len(found.modules),
        "rank": f"{min(ranks)} to {max(ranks)}",
        "used": f"{min(used)} to {max(used)}",
        "suffices": f"{min(need)} to {max(need)}",
        "norm": math.sqrt(math.fsum(row["norm"] ** 2 for row in measured)),
    }
    if found.whole:
        told["held whole or by rows"] = len(found.whole)
    if bad := len(found.modules) - len(measured):
        told["not finite"] = bad
    return told
