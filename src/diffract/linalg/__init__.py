"""Spectra of batches of matrices: float64 accuracy, bounded memory, CPU or CUDA. Sees tensors only."""

from diffract.linalg.circuits import CircuitFactors, circuit_pair, circuit_spectrum
from diffract.linalg.exact import LowRank, Spectrum, factored_spectrum, lapack, mirrored
from diffract.linalg.pair import (
    PairSpectrum,
    pair_from_matrices,
    pair_from_sums,
    pair_values,
    replace_pairs,
    weak_pairs,
)
from diffract.linalg.spectrum import Method, TopSpectrum, gram_values, gram_vectors, spectrum, takes_gram, top_spectrum
from diffract.linalg.sums import Moments, PairSums, Sums, change_grams

__all__ = [
    "CircuitFactors",
    "LowRank",
    "Method",
    "Moments",
    "PairSpectrum",
    "PairSums",
    "Spectrum",
    "Sums",
    "TopSpectrum",
    "change_grams",
    "circuit_pair",
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
    "spectrum",
    "takes_gram",
    "top_spectrum",
    "weak_pairs",
]
