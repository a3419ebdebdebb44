"""TSV-M: changes merged by their top singular vectors, made orthogonal across tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.edits.directions import decomposed, exact, matmul, require_same_shape, wider
from diffract.linalg import takes_gram


def tsv_merge(deltas: Sequence[Float[Tensor, "m n"]]) -> Float64[Tensor, "m n"]:
    """Return U_perp diag(S) V_perp^T of T changes, T >= 1.

    Of each change the top k = floor(M / T) singular directions are taken (floor is the source's choice), at least 1.
    U, S and V are theirs side by side, T k of them, and U_perp = P Q^T from the singular value decomposition
    P Sigma Q^T of U is the nearest matrix with orthonormal columns; V_perp likewise.

    Two cases that the source leaves open: directions of sigma = 0 have arbitrary vectors and are left out, so that a
    task that changed nothing does not bend the others. And where U has not full column rank (tasks that share a
    direction exactly, or T > M) the nearest matrix is not unique; P Q^T is then taken over its non-zero singular values
    alone. Two equal changes thus give the top half of their directions once, at full strength. Directions that tasks
    share nearly but not exactly are pulled apart along their difference, however small it is.

    Args:
        deltas: D_i = W_i - W0, in the ``work_dtype`` of their checkpoints: float64 goes by LAPACK, float32 (from 16
            bits) by Gram matrices where these are accurate enough (see ``decomposed``).

    Returns:
        One change alone comes back to rounding. Zero if all are.

    Raises:
        ValueError: If there is none, shapes differ or are empty, or a value is not finite.

    Source: Gargiulo et al. 2025, "Task Singular Vectors", TSV-Merge.

    >>> one, two = torch.zeros(2, 2), torch.zeros(2, 2)
    >>> one[0, 0], two[1, 1] = 3.0, 2.0
    >>> tsv_merge([one, two])
    tensor([[3., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    if not deltas:
        raise ValueError("expected one change or more, got none")
    require_same_shape(*deltas)
    gram = takes_gram(wider(*(d.dtype for d in deltas)), "auto")
    # Tasks share the directions that there are, so that all fit into one basis.
    count = max(1, min(deltas[0].shape) // len(deltas))
    parts = []
    for found in (decomposed(exact(delta), gram=gram) for delta in deltas):
        k = min(count, int((found.told > 0).sum()))  # directions that can be told from zero
        parts.append((found.U[:, :k], found.S[:k], found.Vh[:k]))
    U, S, Vh = torch.cat([u for u, _, _ in parts], 1), torch.cat([s for _, s, _ in parts]), [v for _, _, v in parts]
    # No task changed anything.
    if len(S) == 0:
        return torch.zeros(deltas[0].shape, dtype=torch.float64, device=S.device)
    return matmul(nearest_orthonormal(U, gram=gram) * S, nearest_orthonormal(torch.cat(Vh), gram=gram))


def nearest_orthonormal(x: Float64[Tensor, "p q"], *, gram: bool) -> Float64[Tensor, "p q"]:
    """Return P Q^T of x = P Sigma Q^T, over the non-zero singular values: the polar factor.

    Of all matrices with orthonormal columns (p >= q) or rows (p <= q) it is the nearest in the Frobenius norm
    (Schönemann 1966, the orthogonal Procrustes problem); a partial isometry where x has not full rank.
    """
    found = decomposed(x, gram=gram)
    return found.added(slice(0, int((found.told > 0).sum())), torch.ones_like(found.S))


def iso_c(deltas: Sequence[Float[Tensor, "m n"]]) -> Float64[Tensor, "m n"]:
    """Return mean(S) U Vh of the sum U diag(S) Vh of the changes: its isotropic version.

    Singular vectors of zeros are arbitrary, and would get as much weight as all others. A sum of rank r < M therefore
    keeps its rank: its r singular values become their mean and the others stay zero. The nuclear norm is that of the
    sum either way; for full rank this is the source's definition.

    Args:
        deltas: D_i = W_i - W0, one or more, in the ``work_dtype`` of their checkpoints: float64 goes by LAPACK, float32
            (from 16 bits) by the Gram matrix where that is accurate enough (see ``decomposed``).

    Returns:
        r equal singular values, r the rank. Zero for a zero sum.

    Raises:
        ValueError: If there is none, shapes differ or are empty, or a value is not finite.

    Source: Marczak et al. 2025, "No task left behind", Iso-C.

    >>> import torch
    >>> iso_c([torch.diag(torch.tensor([5.0, 0.0])), torch.diag(torch.tensor([0.0, -3.0]))]).diagonal()
    tensor([ 4., -4.], dtype=torch.float64)
    """
    if not deltas:
        raise ValueError("expected one change or more, got none")
    require_same_shape(*deltas)
    total = exact(deltas[0]).clone()
    for delta in deltas[1:]:
        total += exact(delta)
    found = decomposed(total, gram=takes_gram(wider(*(d.dtype for d in deltas)), "auto"))
    rank = int((found.told > 0).sum())
    if rank == 0:
        return total.zero_()
    return found.added(slice(0, rank), found.S[:rank].mean().expand(len(found.S)))
