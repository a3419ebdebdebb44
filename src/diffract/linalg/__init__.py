"""Spectra of batches of matrices: float64 accuracy, bounded memory, CPU or CUDA. Sees tensors only."""

from diffract.linalg.changes import change_grams
from diffract.linalg.circuits import circuit_spectrum, rotary
from diffract.linalg.exact import Spectrum, lapack
from diffract.linalg.factored import LowRank, factored_spectrum
from diffract.linalg.pair import (
    PairSpectrum,
    pair_from_matrices,
    pair_from_sums,
    pair_values,
    replace_pairs,
    weak_pairs,
)
from diffract.linalg.spectrum import Method, gram_values, gram_vectors, spectrum, takes_gram
from diffract.linalg.sums import Moments, PairSums, Sums
from diffract.linalg.symmetric import mirrored
from diffract.linalg.topk import TopSpectrum, top_spectrum

__all__ = [
    "LowRank",
    "Method",
    "Moments",
    "PairSpectrum",
    "PairSums",
    "Spectrum",
    "Sums",
    "TopSpectrum",
    "change_grams",
    "circuit_spectrum",
    "factored_spectrum",
    "gram_values",
    "gram_vectors",
    "lapack",
    "mirrored",
    "pair_from_matrices",
    "pair_from_sums",
    "pair_values",
    "replace_pairs",
    "rotary",
    "spectrum",
    "takes_gram",
    "top_spectrum",
    "weak_pairs",
]
