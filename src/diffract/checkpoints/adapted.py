"""The sum of a base and an adapter, block by block: in float64, and rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING

from diffract.checkpoints.adapter_parts import LoraParts
from diffract.checkpoints.checkpoint import Checkpoint, Factors, Range, row_blocks
from diffract.checkpoints.header import TensorInfo
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:  # headers are read without torch
    import torch


@dataclass(frozen=True)
class AdaptedTensor:
    """What an adapter makes of one tensor of its base.

    Attributes:
        info: The tensor as the result has it.
        start: Where the values come from that the rest is done to, and what they are called there.
        low_rank: What is added.
        transposed: The tensor is stored (in, out).
        shift: Name of what is added to a bias, and its scale.
        rows: Numbers of the rows that are replaced, and the name of what replaces them.
        taken: How factors were taken out of the weight before training, as `Settings.taken` says.
    """

    info: TensorInfo
    start: tuple[Checkpoint, str]
    low_rank: LoraParts | None = None
    transposed: bool = False
    shift: tuple[str, float] | None = None
    rows: tuple[list[int], str] | None = None
    taken: str = ""


@dataclass
class _AtHand:
    """What blocks of one adapted tensor need: its factors as they are stored, DoRA's magnitudes, norms of outputs."""

    name: str
    sides: tuple[torch.Tensor, torch.Tensor]
    magnitude: torch.Tensor | None
    norms: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Adapted:
    """A base's tensors with an adapter's changes: computed in float64, and rounded once to the dtype they have."""

    base: Checkpoint
    weights: Checkpoint
    changes: Mapping[str, AdaptedTensor]
    owns_base: bool
    kept: local = field(default_factory=local)

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis, rounded if the adapter changes the tensor."""
        from diffract.checkpoints.dtypes import TORCH_DTYPES

        if info.name not in self.changes:
            return self.base.read(info.name, rows)
        return self.unrounded(info.name, rows).to(TORCH_DTYPES[info.dtype])

    def unrounded(self, name: str, rows: Range | None) -> torch.Tensor:
        """Return entries of a changed tensor as they are before rounding, in float64, or as they are stored."""
        change = self.changes[name]
        found = self._sum(name, rows) if change.low_rank else change.start[0].read_unrounded(change.start[1], rows)
        if change.low_rank is not None and change.low_rank.magnitude is not None:
            found = self._scaled(name, found, rows)
        if change.shift is not None:
            shift, scale = change.shift
            found = found.double() + scale * self.weights.read(shift, rows).double()
        if change.rows is not None:
            found = self._with_rows(found, change.rows, rows)
        return found

    def _sum(self, name: str, rows: Range | None) -> torch.Tensor:
        """Return rows of a weight plus those of the product of factors."""
        change = self.changes[name]
        left, right = self._at_hand(name).sides
        if right.ndim == 3 and rows is not None:
            right = right[slice(*rows)]
        values = change.start[0].read_unrounded(change.start[1], rows).double()
        return values + ((left if rows is None else left[slice(*rows)]) @ right).reshape(values.shape)

    def _scaled(self, name: str, values: torch.Tensor, rows: Range | None) -> torch.Tensor:
        """Give the outputs of a sum DoRA's magnitudes."""
        import torch

        change, held = self.changes[name], self._at_hand(name)
        assert held.magnitude is not None
        if not change.transposed:
            magnitude = held.magnitude if rows is None else held.magnitude[slice(*rows)]
            ratio = magnitude / torch.linalg.vector_norm(values.flatten(1), dim=1)
            return values * ratio.reshape(-1, *(1 for _ in values.shape[1:]))
        # The norms run along the leading axis of what is stored (in, out): one pass over its blocks for all of them.
        if held.norms is None:
            squares = [self._sum(name, block).square().sum(0) for block in row_blocks(change.info)]
            held.norms = torch.stack(squares).sum(0).sqrt()
        return values * (held.magnitude / held.norms)

    def _at_hand(self, name: str) -> _AtHand:
        """Return an adapted tensor's factors, kept for its next block: blocks are asked for one after another."""
        held: _AtHand | None = getattr(self.kept, "tensor", None)
        if held is None or held.name != name:
            change = self.changes[name]
            assert change.low_rank is not None
            magnitude = change.low_rank.magnitude
            scale = None if magnitude is None else self.weights.read(magnitude).double().flatten()
            held = _AtHand(name, self._sides(change), scale)
            self.kept.tensor = held
        return held

    def _sides(self, change: AdaptedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read factors whose product is added to a tensor as it is stored; what was taken out of it is subtracted."""
        import torch

        assert change.low_rank is not None
        B, A = change.low_rank.read(self.weights)
        if change.taken:
            stored = change.start[0].read_unrounded(change.start[1]).double()
            if not bool(stored.isfinite().all()):
                raise CheckpointError(f"{printable(change.info.name)!r} of the base is not finite. Mend the base.")
            rank, weight = change.low_rank.rank, stored.mT if change.transposed else stored
            first_B, first_A = _principal(weight, rank) if change.taken == "pissa" else _leading(weight, rank)
            scale = 1.0 if change.taken == "pissa" else change.low_rank.scale
            B, A = torch.cat([B, -scale * first_B], dim=1), torch.cat([A, first_A])
        return (A.mT, B.mT) if change.transposed else (B, A)

    def _with_rows(self, values: torch.Tensor, rows: tuple[list[int], str], span: Range | None) -> torch.Tensor:
        numbers, name = rows
        first, last = span or (0, values.shape[0])
        inside = [(at, number - first) for at, number in enumerate(numbers) if first <= number < last]
        found = values.double().clone()
        if inside:
            at, here = ([pair[i] for pair in inside] for i in (0, 1))
            found[here] = self.weights.read(name).double()[at]
        return found

    def factors(self, name: str) -> Factors:
        """Read the change of a tensor as factors."""
        return Factors(*self._sides(self.changes[name]))

    def close(self) -> None:
        """Close the adapter's weights, and the base if it was opened for it."""
        self.weights.close()
        if self.owns_base:
            self.base.close()


def _principal(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the part of a weight in its first singular directions, which PiSSA (Meng et al. 2024) takes.

    The directions are those of the Gram matrix of the short side: in float64 the first are as good as by an SVD, and
    sooner there.
    """
    import torch

    if weight.shape[0] > weight.shape[1]:
        A, B = _principal(weight.mT, rank)
        return B.mT, A.mT
    directions = torch.linalg.eigh(weight @ weight.mT).eigenvectors[:, -rank:]
    return directions, directions.mT @ weight


def _leading(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first columns of Q and rows of R of a weight, which OLoRA (Büyükakyüz 2024) starts from."""
    import torch

    Q, R = torch.linalg.qr(weight)
    return Q[:, :rank], R[:rank]
