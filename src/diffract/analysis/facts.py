"""Facts about stacks of matrices: each is computed once, and only if a metric needs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any

import polars as pl
import torch
from torch import Tensor

from diffract.analysis.held import Stack
from diffract.linalg import (
    LowRank,
    Method,
    Moments,
    PairSpectrum,
    PairSums,
    Spectrum,
    Sums,
    factored_spectrum,
    gram_values,
    gram_vectors,
    lapack,
    mirrored,
    pair_from_matrices,
    pair_from_sums,
    pair_values,
    replace_pairs,
    spectrum,
    takes_gram,
    top_spectrum,
    weak_pairs,
)
from diffract.metrics import CURVES, Facts, Metric, sources
from diffract.metrics.random_matrix import entry_order, permuted

OVERLAPS = ("left_cosines", "right_cosines", "diagonal", "delta_energy")
SPECTRA = ("sigma_max", "sigmas", "resolved", "base_sigmas")


@dataclass(frozen=True)
class MetricPlan:
    """What is computed of every matrix and every pair.

    Attributes:
        metrics: The requested metrics.
        method: How spectra are computed.
        vectors: Whether singular vectors are saved.
        apart: Whether a tuned matrix is analysed alone, like in a scan, and of the pair only what speaks of two.
    """

    metrics: tuple[Metric, ...] = ()
    method: Method = "auto"
    vectors: bool = False
    apart: bool = False

    @property
    def single(self) -> tuple[Metric, ...]:
        """Metrics of one matrix."""
        return tuple(m for m in self.metrics if not m.pair)

    @property
    def alone(self) -> MetricPlan:
        """What of the plan speaks of one matrix."""
        return replace(self, metrics=self.single)

    @property
    def between(self) -> MetricPlan:
        """What of the plan speaks of two matrices."""
        return replace(self, metrics=tuple(m for m in self.metrics if m.pair))

    @property
    def facts(self) -> frozenset[str]:
        """Facts that must be found out for the metrics, and for what is saved."""
        saved = {"sigmas", "U", "Vh"} if self.vectors else set()
        return sources(fact for m in self.metrics for fact in m.facts) | saved

    def needs(self, *facts: str) -> bool:
        """Whether any of these facts is wanted."""
        return not self.facts.isdisjoint(facts)

    @property
    def powers(self) -> int:
        """Highest power of the entries to sum."""
        return 4 if self.needs("moments") else 2

    @property
    def key(self) -> list[object]:
        """What of the plan the numbers depend on."""
        return [[m.key for m in self.metrics], self.method]


LARGE = 512
"""Short side from which the largest sigma alone is cheaper by iteration than by the eigensolver."""

NULL_SEED = 0
"""Seed of the order in which the permutation null puts the entries."""

TOP_STEPS = 10
"""Iterations after which the eigensolver would have been cheaper."""


@dataclass(frozen=True)
class StackFacts:
    """What was found out about b matrices.

    Attributes:
        facts: By the names of ``metrics.FACTS``; derived ones are computed when they are asked for.
        finite: (b,), whether all entries are finite; the facts of a matrix that is not mean nothing.
        spectrum: All singular values, if they were computed.
    """

    facts: Facts
    finite: Tensor
    spectrum: Spectrum | None


def single_facts(stack: Stack, plan: MetricPlan, device: torch.device) -> StackFacts:
    """Find out what the metrics of one matrix need."""
    by_gram = takes_gram(stack.dtype, plan.method)
    products = by_gram and plan.needs("U", "Vh", *SPECTRA)
    sums = Sums(stack.count, stack.shape, powers=plan.powers, products=products, device=device)
    for piece in stack.pieces():
        sums.add(piece.to(device))
    finite = sums.moments.second.isfinite()
    grams = _safe(sums.gram, finite) if products else None
    facts = _entry_facts(stack, sums.moments)
    svd = None
    if plan.needs("U", "Vh"):
        whole = _safe(stack.whole().to(device), finite)
        svd = lapack(whole, vectors=True) if grams is None else gram_vectors(grams, whole, plan.method)
    elif plan.needs("sigmas", "resolved"):
        svd = _values(grams, stack, finite)
    elif plan.needs("sigma_max"):
        facts["sigma_max"] = _values(grams, stack, finite).S[:, 0] if grams is None else _largest(grams)
    facts |= _whole_facts(stack, plan, device, finite)
    return StackFacts(Facts(facts | _spectrum_facts(svd)), finite, svd)


def pair_facts(
    base: Stack, tuned: Stack, plan: MetricPlan, device: torch.device, *, change: LowRank | None = None
) -> tuple[StackFacts, StackFacts]:
    """Find out what the metrics of a base, of its tuned matrix and of the pair need.

    Args:
        base: W0.
        tuned: W1.
        plan: What is wanted.
        device: Where to compute.
        change: D as factors, where it is known so: it then counts, and W1 = W0 + D is not rounded.

    Returns:
        What is known of the base, and of the tuned and the pair.
    """
    exact = not (takes_gram(base.dtype, plan.method) and takes_gram(tuned.dtype, plan.method))
    sums = _sum_pairs(base, tuned, plan, device, change, exact=exact)
    first, second = sums.base_moments, sums.tuned_moments
    finite0 = first.second.isfinite()
    finite = finite0 & second.second.isfinite()
    for total in (sums.base_gram, sums.cross, sums.delta_gram):
        total.copy_(_safe(total, finite[: len(total)]))
    facts0, facts1 = _entry_facts(base, first), _entry_facts(tuned, second)
    facts1 |= {"base_squares": first.second, "delta_squares": sums.delta_squares}
    facts1 |= {"changed": sums.changed, "rounding_squares": sums.rounding_squares}
    if plan.needs("delta_sigmas"):
        facts1["delta_sigmas"] = _delta_sigmas(sums, base, tuned, change, finite, exact=exact)
    pair = None
    if plan.needs(*SPECTRA, *OVERLAPS):
        pair = _compare_spectra(sums, base, tuned, change, plan, finite, exact=exact)
        facts1["base_sigmas"] = pair.base.S
        facts1["base_resolved"] = pair.base.resolved
        if pair.left_overlap is not None:
            facts1 |= _overlap_facts(pair)
    found0 = StackFacts(Facts(facts0 | _spectrum_facts(pair and pair.base)), finite0, pair and pair.base)
    found1 = StackFacts(Facts(facts1 | _spectrum_facts(pair and pair.tuned)), finite, pair and pair.tuned)
    for found, stack in ((found0, base), (found1, tuned)):
        found.facts.update(_whole_facts(stack, plan, device, found.finite))
        if plan.needs("U", "Vh"):
            own = single_facts(stack, plan, device).facts
            found.facts.update({name: own[name] for name in ("U", "Vh")})
    return found0, found1


def _whole_facts(stack: Stack, plan: MetricPlan, device: torch.device, finite: Tensor) -> dict[str, Tensor]:
    """Return facts for which all entries must be at hand at once."""
    facts = {}
    if plan.needs("matrix"):
        facts["matrix"] = stack.whole().to(device).double()
    if plan.needs("null_sigmas"):
        facts["null_sigmas"] = _null_sigmas(stack, plan, device, finite)
    return facts


def _null_sigmas(stack: Stack, plan: MetricPlan, device: torch.device, finite: Tensor) -> Tensor:
    """Return singular values of the permuted matrices; NaN for those that are too large to be held."""
    if stack.streamed:
        return torch.full((stack.count, min(stack.shape)), torch.nan, dtype=torch.float64, device=device)
    whole = _safe(stack.whole().to(device), finite)
    order = _null_order(stack.shape, device)
    shuffled = permuted(whole, order).view(stack.count, min(stack.shape), max(stack.shape))  # short side first: faster
    return spectrum(shuffled, method=plan.method).S


@lru_cache(maxsize=2)
def _null_order(shape: tuple[int, int], device: torch.device) -> Tensor:
    """The order of entries that makes the null of every matrix of a shape."""
    return entry_order(shape, seed=NULL_SEED, device=device)


def _sum_pairs(
    base: Stack, tuned: Stack, plan: MetricPlan, device: torch.device, change: LowRank | None, *, exact: bool
) -> PairSums:
    vectors = not exact and plan.needs(*SPECTRA, *OVERLAPS)
    sums = PairSums(
        base.count,
        base.shape,
        powers=plan.powers,
        delta=vectors or (not exact and change is None and plan.needs("delta_sigmas")),
        vectors=vectors,
        rounding=tuned.rounding(),
        device=device,
    )
    for one, other in _piece_pairs(base, tuned, change, device):
        sums.add(one, other)
    return sums


def _piece_pairs(
    base: Stack, tuned: Stack, change: LowRank | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | LowRank]]:
    if change is None:
        for one, other in zip(base.pieces(), tuned.pieces(), strict=True):
            yield one.to(device), other.to(device)
        return
    moved, start = LowRank(change.B.to(device), change.A.to(device)), 0
    for one in base.pieces():
        yield one.to(device), moved.rows(start, start + one.shape[1])
        start += one.shape[1]


def _compare_spectra(
    sums: PairSums,
    base: Stack,
    tuned: Stack,
    change: LowRank | None,
    plan: MetricPlan,
    finite: Tensor,
    *,
    exact: bool,
) -> PairSpectrum:
    """Return spectra, and overlaps where they are wanted; by LAPACK where Gram matrices are too coarse for vectors."""

    def by_lapack(places: list[int]) -> PairSpectrum:
        at, device = torch.tensor(places), finite.device
        one = _safe(base.whole()[at].to(device), finite[places])
        other = _safe(tuned.whole()[at].to(device), finite[places])
        if change is not None:
            other = one.double() + (change.B[at] @ change.A[at]).to(device)
        return pair_from_matrices(one, other)

    if exact:
        return by_lapack(list(range(base.count)))
    pair = pair_from_sums(sums) if plan.needs(*OVERLAPS) else pair_values(sums)
    weak = [] if base.streamed else weak_pairs(pair)
    return replace_pairs(pair, weak, by_lapack(weak)) if weak else pair


def _overlap_facts(pair: PairSpectrum) -> dict[str, Tensor]:
    """Return overlaps, and what of the change goes with each direction; a zero matrix has no vectors."""
    assert pair.left_overlap is not None and pair.right_overlap is not None
    assert pair.diagonal is not None and pair.energy is not None
    zero = ((pair.base.S[:, 0] == 0) | (pair.tuned.S[:, 0] == 0))[:, None]
    return {
        "left_cosines": pair.left_overlap.clamp_(-1.0, 1.0).masked_fill_(zero[:, :, None], torch.nan),
        "right_cosines": pair.right_overlap.clamp_(-1.0, 1.0).masked_fill_(zero[:, :, None], torch.nan),
        "diagonal": pair.diagonal.masked_fill(zero, torch.nan),
        "delta_energy": pair.energy.masked_fill(zero, torch.nan),
    }


def _delta_sigmas(
    sums: PairSums, base: Stack, tuned: Stack, change: LowRank | None, finite: Tensor, *, exact: bool
) -> Tensor:
    if change is not None:
        return factored_spectrum(change.B, change.A).S.to(finite.device)
    if exact:
        difference = tuned.whole().double() - base.whole().double()
        return lapack(_safe(difference.to(finite.device), finite), vectors=False).S
    return gram_values(sums.delta_gram).S


def _values(grams: Tensor | None, stack: Stack, finite: Tensor) -> Spectrum:
    if grams is not None:
        return gram_values(grams)
    return lapack(_safe(stack.whole().to(finite.device), finite), vectors=False)


def _largest(grams: Tensor) -> Tensor:
    """Largest singular values: the square root of each Gram matrix's largest eigenvalue."""
    if grams.shape[-1] < LARGE:
        return gram_values(grams).S[:, 0]
    tops = [top_spectrum(g, 1, steps=TOP_STEPS) for g in mirrored(grams)]
    found = [t.S if t.converged else gram_values(g[None]).S[0, :1].square() for t, g in zip(tops, grams, strict=True)]
    return torch.cat(found).sqrt()


def _entry_facts(stack: Stack, moments: Moments) -> dict[str, Any]:
    epsilon = torch.finfo(stack.dtype).eps
    return {"shape": stack.shape, "epsilon": epsilon, "squares": moments.second, "moments": moments}


def _spectrum_facts(spectrum: Spectrum | None) -> dict[str, Any]:
    if spectrum is None:
        return {}
    S = spectrum.S
    return {
        "sigmas": S,
        "sigma_max": S[:, 0],
        "resolved": spectrum.resolved,
        "U": spectrum.U,
        "Vh": spectrum.Vh,
    }


def _safe(stack: Tensor, finite: Tensor) -> Tensor:
    """Put zeros for matrices that are not finite, so that no solver stumbles over them."""
    if not len(stack) or bool(finite.all()):
        return stack
    return torch.where(finite[:, None, None], stack, torch.zeros((), dtype=stack.dtype, device=stack.device))


CURVE = "curve."
"""Prefix of the columns that hold what runs along the spectrum."""


ONE_AT_A_TIME = Lock()
"""Metrics are many small operations, each of which gives the interpreter's lock away and takes it back: two threads in
them at once spend their time waiting for each other, one beside a thread in a long operation does not."""


def bundle(found: StackFacts, metrics: Sequence[Metric]) -> pl.DataFrame:
    """Return one row per matrix: outcome, metrics, and lists along the spectrum. What has no value is null."""
    with ONE_AT_A_TIME:
        return _owned(pl.DataFrame(_columns(found, metrics)))


def _columns(found: StackFacts, metrics: Sequence[Metric]) -> dict[str, pl.Series]:
    finite = found.finite.tolist()
    zero = (found.facts["squares"] == 0).tolist()
    status = ["zero" if z else "ok" if f else "non_finite" for f, z in zip(finite, zero, strict=True)]
    spectrum = found.spectrum
    count = len(status)
    columns: dict[str, pl.Series] = {
        "status": pl.Series(status, dtype=pl.String),
        "method": pl.Series(list(spectrum.method) if spectrum else [None] * count, dtype=pl.String),
        "resolved": _numbers(spectrum.resolved if spectrum else None, finite),
    }
    for metric in metrics:
        columns[metric.name] = _numbers(metric(*(found.facts[fact] for fact in metric.facts)), finite)
    doubts = found.facts["tail_warnings"] if "power_law" in found.facts else [None] * count
    columns["warning"] = pl.Series([text or None for text in doubts], dtype=pl.String)
    for name, curve in CURVES.items():
        if curve.wanted(found.facts):
            columns[CURVE + name] = _lists(curve.values(found.facts), finite, ragged=curve.ragged)
    return columns


def _owned(rows: pl.DataFrame) -> pl.DataFrame:
    """Copy rows into memory of Polars' own.

    Small arrays that live on among large temporaries keep the allocator from giving these back, a few MB for each
    tensor: memory would grow with the number of layers.
    """
    return rows.select(pl.all().gather(pl.int_range(len(rows))))


def _numbers(values: Tensor | None, finite: list[bool]) -> pl.Series:
    if values is None:
        return pl.Series([None] * len(finite), dtype=pl.Float64)
    known = zip(values.tolist(), finite, strict=True)
    return pl.Series([v if ok and math.isfinite(v) else None for v, ok in known], dtype=pl.Float64)


def _lists(values: Tensor, finite: list[bool], *, ragged: bool) -> pl.Series:
    """One list per matrix; null where a matrix is not finite or the quantity has no value."""
    rows = pl.Series(values.cpu().numpy(), dtype=pl.Array(pl.Float64, values.shape[1])).arr.to_list()
    unknown = values.isnan()
    if ragged:
        rows = rows.list.eval(pl.element().filter(pl.element().is_not_nan()))
    elif bool(unknown.any()):
        rows = rows.list.eval(pl.element().fill_nan(None))
    missing = [not ok or bad for ok, bad in zip(finite, unknown.all(1).tolist(), strict=True)]
    return rows if not any(missing) else rows.set(pl.Series(missing), None)
