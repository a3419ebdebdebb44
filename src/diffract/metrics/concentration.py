"""How a change is spread over heads, and how the changes of several domains lie to each other.

NumPy arrays of one number per head, or Gram matrices <D_a, D_b> of the domains' deltas: the deltas themselves are not
needed. Numbers that do not exist are NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

Values = Float64[np.ndarray, "n"]
DomainGrams = Float64[np.ndarray, "*heads domains domains"]


@dataclass(frozen=True)
class DomainSplit:
    """What the deltas of several domains share, and the specific rest.

    Attributes:
        mean_squares: (*heads,), ||mean_a D_a||^2; with D domains of unrelated deltas 1/D of their mean square, not 0.
        shared_squares: (*heads,), mean of <D_a, D_b> over a != b: the squared norm of a part common to all domains,
            clear of what is specific; 0 by chance, and it may be negative.
        cosine: (*heads, D), of D_a and the mean of the others; its sign tells along from against.
        share: (*heads, D), cosine^2: of ||D_a||^2 what projection on the mean of the others explains.
        specific_squares: (*heads, D), (1 - share) ||D_a||^2.
    """

    mean_squares: np.ndarray
    shared_squares: np.ndarray
    cosine: np.ndarray
    share: np.ndarray
    specific_squares: np.ndarray


def gini(values: np.ndarray) -> float:
    """Gini coefficient of non-negative values: 0 when all are equal, towards 1 when one has all. NaN if all are zero.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 1.0]))
    (0.0, 0.5)
    """
    ordered = np.sort(values)
    n, total = len(ordered), ordered.sum()
    if n == 0 or total == 0:
        return math.nan
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n)


def top_share(values: np.ndarray, share: float = 0.1) -> tuple[float, float]:
    """Return what the largest ``share`` of values (rounded up) have of the sum, and what they would if all were equal.

    >>> top_share(np.array([3.0, 1.0]), 0.5)
    (0.75, 0.5)
    """
    n, total = len(values), values.sum()
    if n == 0 or total == 0:
        return math.nan, math.nan
    k = math.ceil(share * n)
    return float(np.sort(values)[-k:].sum() / total), k / n


def lorenz(values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Points of the Lorenz curve: the share of values, smallest first, and what they have of the sum (Lorenz 1905).

    Twice the area between it and the diagonal, by trapezia, is ``gini``.

    Args:
        values: n of them, non-negative.

    Returns:
        Both (n + 1,), from 0 to 1. The second is NaN if all values are zero.

    >>> lorenz(np.array([3.0, 1.0]))[1].tolist()
    [0.0, 0.25, 1.0]
    """
    n, total = len(values), values.sum()
    held = np.concatenate([[0.0], np.sort(values).cumsum()])
    return np.arange(n + 1) / max(n, 1), held / total if total else np.full(n + 1, math.nan)


def spearman(first: Values, second: Values) -> float:
    """Spearman's rank correlation, in [-1, 1]: Pearson's of the ranks, equal values sharing their mean rank.

    Returns:
        NaN for fewer than three values (two always give 1 or -1), for constant ones, and where one is NaN.

    >>> round(spearman(np.array([1.0, 5.0, 9.0]), np.array([2.0, 4.0, 3.0])), 12)
    0.5
    """
    from scipy.stats import rankdata  # takes 0.4 s to import

    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (first, second))
    size = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if len(x) > 2 and size else math.nan


def scale01(values: np.ndarray) -> np.ndarray:
    """(X - min X) / (max X - min X) over all heads that have a value; NaN for the others, and for all if X is constant.

    >>> scale01(np.array([2.0, 4.0, 3.0])).tolist()
    [0.0, 1.0, 0.5]
    """
    known = values[np.isfinite(values)]
    if known.size == 0 or known.min() == known.max():
        return np.full(values.shape, math.nan)
    return np.where(np.isfinite(values), (values - known.min()) / (known.max() - known.min()), math.nan)


def reference_score(change_domain: np.ndarray, change_reference: np.ndarray) -> np.ndarray:
    """Reference-domain score scale01(||W_domain - W_base||_F) - scale01(||W_reference - W_base||_F), in [-1, 1].

    High: specific to the domain. Low: rewind first.

    Args:
        change_domain: Frobenius norm of each head's change under training on the domain.
        change_reference: The same under training on the reference corpus.
    """
    return scale01(change_domain) - scale01(change_reference)


def delta_cosine(gram: DomainGrams) -> np.ndarray:
    """Cosines <D_a, D_b> / (||D_a|| ||D_b||) of domains' deltas, (*heads, D, D). NaN for a domain that did not change.

    Beside it stands ``delta_cosine_chance``.
    """
    size = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / size[..., :, None] / size[..., None, :]


def delta_cosine_chance(entries: int) -> float:
    """Root mean square of the cosine of random directions: 1 / sqrt(entries)."""
    return 1 / math.sqrt(entries)


def split_domains(gram: DomainGrams) -> DomainSplit:
    """Split the deltas of D domains into the domain-agnostic part, their mean direction, and the specific rest.

    A domain is projected on the mean of the others, so that its own noise does not count as shared. If D_a = S + N_a,
    the N_a orthogonal to S and each other with squared norm v, and s = ||S||^2, then ``shared_squares`` is s, and

        cosine^2 = s / (s + v) * s / (s + v / (D - 1))

    which is below the true share s / (s + v) as the others' mean is noisy too; with many domains the difference goes.
    Chance gives a share of 1 / entries, a cosine of 1 / sqrt(entries) in the root mean square.

    Args:
        gram: Inner products <D_a, D_b>; a head's over its slices together.

    Returns:
        NaN for a domain that did not change or whose others did not, and for a single domain.
    """
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    count = gram.shape[-1]
    others = 1.0 - np.eye(count)
    along = (gram * others).sum(-1)
    # Summed over the others alone; the whole sum less the domain's own would cancel where its delta is the largest.
    others_squares = np.einsum("ab,...bc,ac->...a", others, gram, others)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = along / np.sqrt(squares * others_squares)
        shared = along.sum(-1) / np.float64(count * (count - 1))
    share = cosine**2
    mean = np.asarray(gram.sum((-2, -1)) / count**2)  # of a single Gram matrix NumPy makes scalars
    return DomainSplit(mean, np.asarray(shared), cosine, share, (1 - share) * squares)
