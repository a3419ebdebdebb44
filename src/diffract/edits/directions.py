"""The singular directions of one matrix, and sums of some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import blake3
import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffract.checkpoints import as_bytes
from diffract.edits.rule import Rule, rounded
from diffract.errors import RunError
from diffract.linalg import Sums, gram_vectors, lapack
from diffract.linalg.blas import product
from diffract.metrics.random_matrix import donoho_gavish_rank, fit_bulk

MEMORY_BYTES = 1 << 30
"""Bytes of decompositions that are kept in memory; those beyond lie in files."""

Found: TypeAlias = tuple[Tensor, ...]
"""What a decomposition comes to: values and vectors."""

Way: TypeAlias = Literal["gram", "lapack", "directions"]
"""Eigenvalues and short-side vectors of a Gram matrix, an SVD by LAPACK, or one by whichever way suffices."""


@dataclass(frozen=True)
class Directions:
    """A singular value decomposition, U diag(S) Vh.

    Attributes:
        U: Left vectors as columns.
        S: Descending.
        Vh: Right vectors as rows.
        resolved: Smallest sigma that the method tells from zero.
    """

    U: Float64[Tensor, "m M"]
    S: Float64[Tensor, " M"]
    Vh: Float64[Tensor, "M n"]
    resolved: float

    @property
    def told(self) -> Float64[Tensor, " M"]:
        """Singular values; those that the method cannot tell from zero are zero."""
        return self.S.where(self.resolved < self.S, 0.0)

    def added(self, chosen: slice | Tensor, S: Tensor | None = None) -> Float64[Tensor, "m n"]:
        """Return the sum of sigma_i u_i v_i^T over some directions, with other sigmas if they are given."""
        sigmas = self.S if S is None else S
        return matmul(self.U[:, chosen] * sigmas[chosen], self.Vh[chosen])

    def factors(
        self, chosen: slice, dtype: torch.dtype = torch.float64
    ) -> tuple[Float64[Tensor, "m k"], Float64[Tensor, "k n"]]:
        """Return U sqrt(S) and sqrt(S) Vh of some directions: their product is the sum of these.

        Both hold values of ``dtype``, what they will be stored in.

        Raises:
            ValueError: If one of them overflows it.
        """
        roots = self.S[chosen].sqrt()
        found = self.U[:, chosen] * roots, roots[:, None] * self.Vh[chosen]
        B, A = (factor.to(dtype).double() for factor in found)
        if not bool(B.isfinite().all() and A.isfinite().all()):
            raise ValueError(f"factor_dtype: expected one that holds the factors; they overflow {dtype}")
        return B, A


class Decompositions:
    """Decompositions that are made once and found again by the bytes of the matrices that they are of.

    So edits of one model after another, as searches make them, decompose each matrix once. Whatever changes the
    matrices, such as an edit before, has them decomposed anew.

    Args:
        folder: Where those are kept that find no place in memory; whoever made the folder removes it.
        memory_bytes: How much is kept in memory.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._room = folder, memory_bytes
        self._held: dict[str, Found] = {}
        self._filed: dict[str, list[Path]] = {}

    def of(self, way: Way, matrices: Sequence[Tensor], make: Callable[[], Found]) -> Found:
        """Return what ``make`` returns for these matrices, now or before; it must not be changed.

        Raises:
            RunError: A file cannot be written or read.
        """
        hasher = blake3.blake3(way.encode())
        for matrix in matrices:
            hasher.update(f"{matrix.dtype} {tuple(matrix.shape)} {matrix.device}".encode())
            hasher.update(as_bytes(matrix.cpu()))
        key = hasher.hexdigest()
        if key in self._held:
            return self._held[key]
        try:
            if key in self._filed:
                return tuple(torch.from_numpy(np.load(path)).to(matrices[0].device) for path in self._filed[key])
            found = make()
            size = sum(one.nbytes for one in found)
            if size <= self._room:
                self._room -= size
                self._held[key] = found
            else:
                places = [self._folder / f"{key}-{place}.npy" for place in range(len(found))]
                for path, one in zip(places, found, strict=True):
                    np.save(path, one.cpu().numpy())
                self._filed[key] = places
        except OSError as error:
            where = f"decompositions in {str(self._folder)!r}"
            raise RunError(f"cannot keep {where}: {error.strerror or error}. Make room, or write elsewhere.") from error
        return found


def known_or_new(
    known: Decompositions | None, way: Way, matrices: Sequence[Tensor], make: Callable[[], Found]
) -> Found:
    """Return a decomposition that is known, or make it; without ``known`` none is kept."""
    return known.of(way, matrices, make) if known else make()


def decomposed(x: Float64[Tensor, "m n"], *, gram: bool) -> Directions:
    """Return the singular directions of a finite matrix.

    Args:
        x: The matrix.
        gram: Whether the Gram matrix may serve, as for entries that come from 16 or 32 stored bits. Even then LAPACK
            runs where sigma_M <= 1e-5 sigma_1 (see ``linalg.gram_vectors``), and U diag(S) Vh is x to float64
            rounding; vectors are orthonormal to eps (sigma_1 / sigma)^2 <= 2e-6. Otherwise LAPACK, to eps.
    """
    stack = x[None]
    if gram:
        sums = Sums(1, tuple(x.shape), powers=0, products=True, device=x.device)
        sums.add(stack)
        found = gram_vectors(sums.gram, stack)
    else:
        found = lapack(stack, vectors=True)
    assert found.U is not None and found.Vh is not None
    return Directions(found.U[0], found.S[0], found.Vh[0], float(found.resolved[0]))


def matmul(x: Float64[Tensor, "m k"], y: Float64[Tensor, "k n"]) -> Float64[Tensor, "m n"]:
    """Return x y; zeros for k = 0."""
    return product(x[None], y[None])[0]


def fewer(kept: slice, total: int, device: torch.device) -> tuple[Int64[Tensor, " k"], bool]:
    """Return the kept directions and ``True``, or the dropped ones and ``False``: whichever are fewer."""
    every = torch.arange(total, device=device)
    chosen = every[kept]
    if 2 * len(chosen) <= total:
        return chosen, True
    return torch.cat([every[: kept.start], every[kept.stop :]]), False


def energy_share(S: Float64[Tensor, " M"], kept: slice) -> float:
    """Share of sum sigma^2 that the kept directions hold, in [0, 1]; 1 for a zero matrix."""
    energy = S.square()
    whole = float(energy.sum())
    return min(float(energy[kept].sum()) / whole, 1.0) if whole > 0 else 1.0


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an edit's result for input of a stored dtype: float64 for 64 and 32 bits, else float32.

    Edits compute in float64 throughout. The result has at least 16 bits of significand more than what it is stored in,
    so that the caller's rounding to the stored dtype is in effect the only one.

    >>> work_dtype(torch.float32), work_dtype(torch.bfloat16)
    (torch.float64, torch.float32)
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def wider(*dtypes: torch.dtype) -> torch.dtype:
    """Return the one with the most bits: what tensors of several dtypes count as together."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def widened(w: Float[Tensor, "m n"], dtype: torch.dtype) -> Float[Tensor, "m n"]:
    """Return a contiguous copy in a dtype that holds every value exactly."""
    return w.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def exact(w: Float[Tensor, "m n"]) -> Float64[Tensor, "m n"]:
    """Return a matrix in float64; float64 input is not copied.

    Raises:
        ValueError: If it is empty, or holds NaN or an infinity.
    """
    if w.numel() == 0:
        raise ValueError(f"expected a matrix with entries, got shape {tuple(w.shape)}")
    found = w.detach().double()
    if not bool(found.isfinite().all()):
        raise ValueError("expected finite values, got NaN or an infinity")
    return found


def require_same_shape(*tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all tensors have the shape of the first."""
    for place, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            want, got = tuple(tensors[0].shape), tuple(tensor.shape)
            raise ValueError(f"expected matrices of one shape, got {want} and, at place {place}, {got}")


def kept(
    S: Float64[Tensor, " M"], shape: tuple[int, int], rule: Rule, order: Int64[Tensor, " M"] | None = None
) -> slice:
    """Return the range of directions that a rule keeps.

    A zero matrix has no directions: nothing is kept, whatever the rule. The two noise rules compare singular values
    with each other, which says nothing about a matrix of one (M = 1): it is kept, for dropping needs evidence. Of a
    matrix of low rank without noise they keep all sigma > 0 as long as the zeros outnumber these (``donoho-gavish``)
    or the signal does not hide itself (``mp-edge``, see ``noise_variance``).

    Args:
        S: All M singular values, descending; zero those that cannot be told from zero.
        shape: (m, n) of the matrix.
        rule: Which to keep.
        order: Of side ``random``, in which order directions are taken.

    Returns:
        With start and stop in 0 .. M, of the directions as they are taken. The ranges of ``head`` and ``tail`` meet
        without overlap.

    Source: Gavish & Donoho 2014 (``donoho-gavish``); Marchenko & Pastur 1967 (``mp-edge``).

    >>> import torch
    >>> kept(torch.tensor([4.0, 2.0, 1.0]).double(), (3, 3), Rule(energy=0.9))  # 16 + 4 of 21
    slice(0, 2, None)
    """
    total = len(S)
    assert total == min(shape)
    # Of a zero matrix every rule would pick among arbitrary vectors.
    if total == 0 or not bool(S[0] > 0):
        return slice(0, 0)
    if rule.band is not None:
        return slice(*(rounded(edge, total) for edge in rule.band))
    if order is not None and rule.energy is not None:
        count = _energy_count(S[order], rule.energy)
    else:
        count = _head_count(S, shape, rule)
    return slice(count, total) if rule.side == "tail" else slice(0, count)


def random_order(S: Float64[Tensor, " M"], generator: torch.Generator) -> Int64[Tensor, " M"]:
    """Return the directions in a random order; those of sigma = 0, which hold nothing, come last.

    Args:
        S: All singular values, descending.
        generator: On the CPU, so that every device gets the same order.
    """
    positive = int((S > 0).sum())
    shuffled = torch.randperm(positive, generator=generator).to(S.device)
    return torch.cat([shuffled, torch.arange(positive, len(S), device=S.device)])


def _head_count(S: Tensor, shape: tuple[int, int], rule: Rule) -> int:
    """How many directions the criterion picks, the largest first."""
    total = len(S)
    if rule.drop is not None:
        return total - rounded(rule.drop, total)
    if rule.rank is not None:
        return min(rule.rank, total)
    if rule.above is not None:
        return int((rule.above < S).sum())
    if rule.energy is not None:
        return _energy_count(S, rule.energy)
    # One singular value has no others to stand out from; it stays, for dropping needs evidence.
    if total == 1:
        return 1
    if rule.rule == "donoho-gavish":
        found = donoho_gavish_rank(S[None], shape)
    else:
        found = fit_bulk(S[None].square() / max(shape), shape).spikes
    return int(found.nan_to_num(total))  # where noise is the minority there is no edge, and nothing is dropped


def _energy_count(S: Tensor, share: float) -> int:
    # All of the energy is every sigma > 0: in a running sum the smallest would be lost.
    if share == 1:
        return int((S > 0).sum())
    energy = S.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1
