"""What a metric can be computed from: facts about b matrices at once.

Some facts are found out by looking at weights; derived ones follow from others, are computed when they are first asked
for, and are then kept, so that all columns of one fit share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from diffract.metrics import agreement, heavy_tails, peaks, random_matrix
from diffract.metrics.heavy_tails.families import LAWS
from diffract.metrics.heavy_tails.order import order
from diffract.metrics.heavy_tails.search import Candidates, fit_candidates, scan_distances, search

Record = TypeVar("Record", heavy_tails.TruncatedPowerLaw, heavy_tails.Exponential, heavy_tails.LogNormal)

NEEDS = ("shape", "entries", "sigma_max", "sigmas", "null", "vectors", "matrix")
"""What finding out a fact costs, cheapest first."""


@dataclass(frozen=True)
class Fact:
    """A row of ``FACTS``.

    Attributes:
        summary: Shape and meaning; M = min(m, n), all float64.
        need: The dearest thing that it takes, of ``NEEDS``.
        pair: Whether only a comparison knows it.
        function: What derives it, from ``sources`` in order; ``None`` if looking at weights tells it.
        sources: Names of other facts.
    """

    summary: str
    need: str
    pair: bool = False
    function: Callable[..., Any] | None = None
    sources: tuple[str, ...] = ()


FACTS: dict[str, Fact] = {
    "shape": Fact("(m, n), two integers", "shape"),
    "epsilon": Fact("machine epsilon of the stored dtype", "shape"),
    "squares": Fact("(b,), squared Frobenius norm", "entries"),
    "moments": Fact("sums of the first four powers of the entries, (b,) each", "entries"),
    "sigma_max": Fact("(b,), the largest singular value", "sigma_max"),
    "sigmas": Fact("(b, M), singular values, descending", "sigmas"),
    "resolved": Fact("(b,), the smallest singular value that the method tells from zero", "sigmas"),
    "null_sigmas": Fact("(b, M), singular values of the same entries in a seeded random order", "null"),
    "U": Fact("(b, m, M), left singular vectors as columns", "vectors"),
    "Vh": Fact("(b, M, n), right singular vectors as rows", "vectors"),
    "matrix": Fact("(b, m, n), float64", "matrix"),
    "base_squares": Fact("(b,), squared Frobenius norm of the base W0", "entries", pair=True),
    "delta_squares": Fact("(b,), squared Frobenius norm of D = W1 - W0", "entries", pair=True),
    "changed": Fact("(b,), number of entries that differ", "entries", pair=True),
    "rounding_squares": Fact("(b,), mean squared norm of what rounding W1 to its dtype does", "entries", pair=True),
    "delta_sigmas": Fact("(b, <= M), singular values of D, descending; those left out are zero", "sigmas", pair=True),
    "base_sigmas": Fact("(b, M), singular values of W0", "sigmas", pair=True),
    "base_resolved": Fact("(b,), the smallest of them that the method tells from zero", "sigmas", pair=True),
    "left_cosines": Fact("(b, M, M), U0^T U1, signs as they fall", "vectors", pair=True),
    "right_cosines": Fact("(b, M, M), V0^T V1, signs as they fall", "vectors", pair=True),
    "diagonal": Fact("(b, M), u0_i^T D v0_i", "vectors", pair=True),
    "delta_energy": Fact("(b, M), ||u0_i^T D||^2", "vectors", pair=True),
}
"""Facts by name. Derived ones are added below, in order of what they come from."""


def _derive(name: str, summary: str, function: Callable[..., Any], *sources: str) -> None:
    known = [FACTS[source] for source in sources]
    need = max((fact.need for fact in known), key=NEEDS.index)
    FACTS[name] = Fact(summary, need, any(fact.pair for fact in known), function, sources)


def eigenvalues(sigmas: Tensor, shape: tuple[int, int]) -> Tensor:
    """lambda_i = sigma_i^2 / N, N = max(m, n) (Martin & Mahoney 2021)."""
    return sigmas.square() / max(shape)


def _resolved_sigmas(sigmas: Tensor, resolved: Tensor) -> Tensor:
    """Singular values; those that the method cannot tell from zero are zero."""
    return sigmas.where(sigmas > resolved[:, None], 0.0)


def _tail_warnings(found: heavy_tails.PowerLaw, values: Tensor) -> tuple[str, ...]:
    return heavy_tails.describe_warning(heavy_tails.tail_warning(found, values), found)


def _searched(record: type[Record], candidates: Candidates) -> Record:
    return record.of(search(candidates))


def _scanned(candidates: Candidates, scan: Tensor) -> heavy_tails.PowerLaw:
    """The power law whose distance is the least of the scan."""
    return heavy_tails.PowerLaw.of(candidates.nearest(scan[candidates.tails.row, candidates.tails.last]))


def _compare_tails(values: Tensor, tail: heavy_tails.PowerLaw, *laws: Candidates) -> heavy_tails.Comparisons:
    return heavy_tails.compare_laws(values, tail.xmin, *(law.parameters_at(tail.tail_count) for law in laws))


def _in_peak(found: peaks.Peaks) -> Tensor:
    return found.membership >= 0


_derive("eigenvalues", "(b, M), lambda = sigma^2 / N, N = max(m, n)", eigenvalues, "sigmas", "shape")
_derive("null_eigenvalues", "(b, M), those of the permuted matrix", eigenvalues, "null_sigmas", "shape")
_derive("bulk", "the Marchenko-Pastur law of the noise, random_matrix.Bulk", random_matrix.fit_bulk,
        "eigenvalues", "shape")  # fmt: skip
_derive("resolved_sigmas", "(b, M), sigmas, zero where not resolved", _resolved_sigmas, "sigmas", "resolved")
_derive("tail_eigenvalues", "(b, M), eigenvalues, zero where not resolved", eigenvalues, "resolved_sigmas", "shape")
_derive("ordered_tails", "eigenvalues in order with sums over their tails, heavy_tails.order.Ordered", order,
        "tail_eigenvalues")  # fmt: skip
for _law in LAWS:
    _derive(f"{_law}_candidates", "fit to every tail that may be the one, heavy_tails.search.Candidates",
            partial(fit_candidates, law=LAWS[_law]), "ordered_tails")  # fmt: skip
_derive("power_law_scan", "(b, M), distance of the power law with xmin at each eigenvalue", scan_distances,
        "power_law_candidates")  # fmt: skip
_derive("power_law", "fitted tail, heavy_tails.PowerLaw", _scanned, "power_law_candidates", "power_law_scan")
_derive("truncated_power_law", "likewise", partial(_searched, heavy_tails.TruncatedPowerLaw),
        "truncated_power_law_candidates")  # fmt: skip
_derive("exponential", "likewise", partial(_searched, heavy_tails.Exponential), "exponential_candidates")
_derive("log_normal", "likewise", partial(_searched, heavy_tails.LogNormal), "log_normal_candidates")
_derive("tail_comparisons", "power law against the others, heavy_tails.Comparisons", _compare_tails,
        "tail_eigenvalues", "power_law", *(f"{_law}_candidates" for _law in LAWS))  # fmt: skip
_derive("tail_warnings", "what speaks against the power law, one text a matrix", _tail_warnings,
        "power_law", "tail_eigenvalues")  # fmt: skip
_derive("peaks", "peaks in the density of ln sigma, peaks.Peaks", peaks.spectral_peaks, "resolved_sigmas")
_derive("base_resolved_sigmas", "(b, M), likewise of W0", _resolved_sigmas, "base_sigmas", "base_resolved")
_derive("base_peaks", "peaks of W0", peaks.spectral_peaks, "base_resolved_sigmas")
_derive("in_base_peak", "(b, M), whether base sigma i lies in a peak", _in_peak, "base_peaks")
_derive("window", "(b, M, M), whether base sigma i is within 5% of tuned sigma j", agreement.window,
        "base_sigmas", "sigmas")  # fmt: skip
for _side, _u in (("left", "u"), ("right", "v")):
    _overlap = f"{_side}_overlap"
    _derive(_overlap, f"(b, M, M), |{_u}0_i . {_u}1_j|", agreement.overlap, f"{_side}_cosines")
    _derive(f"{_side}_agreement", f"(b, M), |{_u}0_i . {_u}1_i|", agreement.agreement, _overlap)
    _derive(f"{_side}_best_match", f"(b, M), max_j |{_u}0_i . {_u}1_j|", agreement.best_match, _overlap)
    _derive(f"{_side}_agreement_window", f"(b, M), norm of {_u}1_i projected on its window of base vectors",
            agreement.agreement_window, _overlap, "window")  # fmt: skip


def sources(names: Iterable[str]) -> frozenset[str]:
    """Return the facts that must be found out by looking at weights so that all of ``names`` can be had."""
    found: set[str] = set()
    for name in names:
        fact = FACTS[name]
        found |= sources(fact.sources) if fact.function else {name}
    return frozenset(found)


class Facts(dict[str, Any]):
    """Facts by name; a derived one is computed when it is first asked for."""

    def __missing__(self, name: str) -> Any:
        fact = FACTS[name]
        if fact.function is None:
            raise KeyError(name)
        self[name] = value = fact.function(*(self[source] for source in fact.sources))
        return value
