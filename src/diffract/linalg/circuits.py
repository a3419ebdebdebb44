"""Spectra of the circuits of attention heads, from their factors: no d x d product is formed.

Of a head with h dimensions ``qk`` = W_q^T W_k and ``ov`` = W_o W_v are both L^T R with factors (h, d): L = W_q and
R = W_k, or L = W_o^T and R = W_v. They do not change when a head's basis does (W_q -> A W_q, W_k -> A^-T W_k), as
slices do.

With the Gram matrices L L^T = C_L C_L^T and R R^T = C_R C_R^T in Cholesky factors, L = C_L Q_L with orthonormal rows,
so the nonzero singular values of L^T R are those of the small C_L^T C_R.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffract.linalg.blas import product
from diffract.linalg.exact import EPSILON, Spectrum, lapack
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
    size = torch.linalg.matrix_norm(C_L) * torch.linalg.matrix_norm(C_R)[heads]
    names = ("gram" if sound else "lapack" for sound in (sound_L & sound_R[heads]).tolist())
    S = lapack(core, vectors=False).S.where(known[:, None], torch.nan)
    return Spectrum(S, tuple(names), (left.shape[1] * EPSILON * size).where(known, torch.nan))


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
    sound = torch.linalg.matrix_norm(C) * torch.linalg.matrix_norm(back) <= CONDITION
    weak = (~sound).nonzero().flatten()
    return (C.index_copy(0, weak, _qr_root(factors[weak])) if len(weak) else C), sound


def _qr_root(factors: Float[Tensor, "b h d"]) -> Tensor:
    """Return R^T of L^T = Q R."""
    return torch.linalg.qr(factors.double().mT, mode="r").R.mT
