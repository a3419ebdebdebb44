"""Spectra of the circuits of attention heads, from their factors: no d x d product is formed.

Of a head with h dimensions ``qk`` = W_q^T W_k and ``ov`` = W_o W_v are both L^T R with factors (h, d): L = W_q and
R = W_k, or L = W_o^T and R = W_v. They do not change when a head's basis does (W_q -> A W_q, W_k -> A^-T W_k), as
slices do.

With the Gram matrices L L^T = C_L C_L^T and R R^T = C_R C_R^T in Cholesky factors, L = C_L Q_L with orthonormal rows,
so the nonzero singular values of L^T R are those of the small C_L^T C_R.

Of a pair the columns of L0^T and of L1^T - L0^T span at most 2h dimensions, those of the right factors as many: in
orthonormal bases of both spaces both maps, and their difference, are matrices of 2h x 2h, whose singular values, and
whose vectors' inner products, are those of the d x d maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.linalg import matrix_norm

from diffract.linalg.blas import product
from diffract.linalg.exact import EPSILON, Spectrum, factored_spectrum, lapack
from diffract.linalg.pair import PairSpectrum, pair_from_spectra
from diffract.linalg.spectrum import Method, takes_gram

CONDITION = 1e4
"""Largest ||C||_F ||C^-1||_F, a bound on sigma_1 / sigma_h of a factor, at which Gram matrices serve.

Rounding the two Gram matrices then moves each sigma of the circuit by at most about 2 eps CONDITION^2 = 4e-8 of it.
"""


def circuit_spectrum(
    left: Float[Tensor, "b h m"],
    right: Float[Tensor, "g h n"],
    *,
    right_of_left: Int64[Tensor, "b"] | None = None,
    method: Method = "auto",
) -> Spectrum:
    """Return the singular values of L^T R for each head, min(h, m, n) of them: the others are zero.

    **Error.** By Cholesky factors of the Gram matrices (``gram``) at most about eps (k_L^2 + k_R^2) of each sigma, k
    being a factor's sigma_1 / sigma_h; factors with ||C||_F ||C^-1||_F above 1e4 take C from their QR factors instead
    (``lapack``), with an error of eps ||L||_2 ||R||_2. So every sigma is within 1e-7 sigma_1 as long as ||L||_2 ||R||_2
    < 1e8 sigma_1, that is, unless the large directions of L and R miss each other almost wholly. Measured at k = 1e3
    where they do: 2e-11 of each sigma, and 6e-13 with QR factors, which take five to ten times as long (h = 128, d =
    2048, Gram matrices given). ``auto`` takes QR factors for float64 weights, as ``spectrum`` does.

    **Rotary embeddings.** A query at position p meets a key at position s through W_q^T R(s - p) W_k, with R a rotation
    of pairs of the head's dimensions (Su et al. 2021, section 3.2); the plain product is the circuit at distance zero.
    At other distances the spectrum differs. Each sigma_i stays between sigma_h(W_k) sigma_i(W_q) and sigma_1(W_k)
    sigma_i(W_q), also with q and k exchanged, and the product of all h of them stays the same.

    **Norms of q and k** (OLMo-2 over all heads, Qwen3 per head) stand between the two factors: they divide by a number
    that each token has of its own, so the circuit's scale, unlike its shape, is not what the model sees. Their gains
    multiply the factors' rows; whoever wants them in does that before. Biases (Qwen2) are not part of a circuit.

    Args:
        left: W_q, or W_o^T, of each query head.
        right: W_k, or W_v, of each key-value head.
        right_of_left: For each query head its key-value head, where several share one; by default one each.
        method: As for ``spectrum``.

    Returns:
        Values without vectors; ``resolved`` is h eps ||L||_F ||R||_F. Zero for a zero factor, NaN where a factor is
        not finite.
    """
    heads = torch.arange(len(left), device=left.device) if right_of_left is None else right_of_left
    (left, finite_L), (right, finite_R) = _finite(left), _finite(right)
    C_L, sound_L = _roots(left, method)
    C_R, sound_R = _roots(right, method)
    core = product(C_L.mT.contiguous(), C_R[heads])
    known = finite_L & finite_R[heads]
    size = matrix_norm(C_L) * matrix_norm(C_R)[heads]
    names = ("gram" if sound else "lapack" for sound in (sound_L & sound_R[heads]).tolist())
    S = lapack(core, vectors=False).S.where(known[:, None], torch.nan)
    return Spectrum(S, tuple(names), (left.shape[1] * EPSILON * size).where(known, torch.nan))


@dataclass(frozen=True)
class CircuitFactors:
    """The factors of the circuits L^T R of one attention block.

    Attributes:
        left: (b, h, m), W_q, or W_o^T, of each query head.
        right: (g, h, n), W_k, or W_v, of each key-value head.
        right_of_left: (b,), for each query head its key-value head.
        epsilon: Machine epsilon of the dtype in which they are stored.
    """

    left: Tensor
    right: Tensor
    right_of_left: Tensor
    epsilon: float


@dataclass(frozen=True)
class CircuitPair:
    """What the circuits of two models have to do with each other.

    Attributes:
        spectra: Spectra and overlaps; ``resolved`` is the smallest sigma that rounding the factors leaves standing.
        delta: (b, <= 2h, <= 2h), the change of the map in orthonormal bases of the spaces that its factors span.
        finite: (b,), whether all factors are; what is said of a circuit of which one is not means nothing.
    """

    spectra: PairSpectrum
    delta: Tensor
    finite: Tensor


def circuit_pair(base: CircuitFactors, tuned: CircuitFactors) -> CircuitPair:
    """Compare the composed maps C0 = L0^T R0 and C1 = L1^T R1 of each head, without forming either.

    QR of [L0^T, L1^T - L0^T] and [R0^T, R1^T - R0^T] gives orthonormal bases in which all of both maps lies. The change
    is made from those of the factors, D = dL^T R1 + L0^T dR, and is zero where it is no larger than rounding.

    **What is resolved.** Rounding the entries of a stored L (h, m) adds noise whose largest sigma is about
    eps ||L||_F (1 / sqrt(h) + 1 / sqrt(m)), and times ||R||_2 to the circuit; that of R likewise.

    Args:
        base: Factors of the one model.
        tuned: Of the other; as many, of the same shapes.
    """
    sides = (base.left, tuned.left), (base.right, tuned.right)
    (A0, dA, sound_L), (B0, dB, sound_R) = (_joint(one, other) for one, other in sides)
    heads = base.right_of_left
    B0, dB = B0[heads], dB[heads]
    A1, B1 = A0 + dA, B0 + dB
    delta = product(dA, B1.mT) + product(A0, dB.mT)
    # a change of a head's basis alone changes the factors, and the map by no more than rounding
    rounding = A0.shape[-1] * EPSILON * sum(matrix_norm(A) * matrix_norm(B) for A, B in ((A0, B0), (A1, B1)))
    delta = delta.where((matrix_norm(delta) > rounding)[:, None, None], 0.0)
    first, second = _composed(A0, B0, base), _composed(A1, B1, tuned)
    return CircuitPair(pair_from_spectra(first, second, delta), delta, sound_L & sound_R[heads])


def _joint(base: Float[Tensor, "b h d"], tuned: Float[Tensor, "b h d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors and their changes as columns (b, k, h) in one orthonormal basis, and which are finite."""
    (base, finite), (tuned, also) = _finite(base), _finite(tuned)
    roots = []
    for one, other in zip(base, tuned, strict=True):  # heads one by one: in float64 they take many times their memory
        first = one.double()
        roots.append(torch.linalg.qr(torch.cat([first, other.double() - first]).mT, mode="r").R)
    first, change = torch.stack(roots).chunk(2, dim=-1)
    return first, change, finite & also


def _composed(A: Float[Tensor, "b k h"], B: Float[Tensor, "b l h"], stored: CircuitFactors) -> Spectrum:
    """Return the decomposition of A B^T, ``resolved`` being what rounding the stored factors leaves standing."""
    size_A, size_B = (matrix_norm(x) for x in (A, B))
    top_A, top_B = (matrix_norm(x, 2) for x in (A, B))
    (_, h, m), n = stored.left.shape, stored.right.shape[2]
    rounding = size_A * top_B * (h**-0.5 + m**-0.5) + top_A * size_B * (h**-0.5 + n**-0.5)
    floor = h * EPSILON * size_A * size_B + stored.epsilon * rounding
    return replace(factored_spectrum(A, B.mT, vectors=True), resolved=floor)


def _finite(factors: Float[Tensor, "b h d"]) -> tuple[Tensor, Tensor]:
    """Return factors with zeros for those that hold NaN or infinity, and which do not."""
    finite = factors.isfinite().flatten(1).all(1)
    return factors if bool(finite.all()) else factors.where(finite[:, None, None], 0.0), finite


def _roots(factors: Float[Tensor, "b h d"], method: Method) -> tuple[Tensor, Tensor]:
    """Return C (b, h, min(h, d)) with C C^T = L L^T for each factor L, and whether it came from the Gram matrix."""
    # more rows than columns make a singular Gram matrix, which has no Cholesky factor
    if not takes_gram(factors.dtype, method) or factors.shape[1] > factors.shape[2]:
        return _qr_root(factors), torch.zeros(len(factors), dtype=torch.bool, device=factors.device)
    x = factors.double()
    C, failed = torch.linalg.cholesky_ex(product(x, x.mT))
    one = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    # NaN makes the bound below fail, so that what Cholesky refused goes to QR as well.
    C = C.where((failed == 0)[:, None, None], torch.nan)
    back = torch.linalg.solve_triangular(C, one.expand_as(C), upper=False)
    sound = matrix_norm(C) * matrix_norm(back) <= CONDITION
    weak = (~sound).nonzero().flatten()
    return (C.index_copy(0, weak, _qr_root(factors[weak])) if len(weak) else C), sound


def _qr_root(factors: Float[Tensor, "b h d"]) -> Tensor:
    """Return R^T of L^T = Q R."""
    return torch.linalg.qr(factors.double().mT, mode="r").R.mT
