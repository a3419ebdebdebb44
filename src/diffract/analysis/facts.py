"""Facts about stacks of matrices: each is computed once, and only if a metric needs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
from diffract.metrics import CURVES, FACTS, Facts, Metric, behind, sources
from diffract.metrics.random_matrix import entry_order, permuted

OVERLAPS = ("left_cosines", "right_cosines", "diagonal", "delta_energy", "delta_row_energy")
SPECTRA = ("sigma_max", "sigmas", "resolved", "base_sigmas")


@dataclass(frozen=True)
class MetricPlan:
    """What is computed of every matrix and every pair.

    Attributes:
        metrics: The requested metrics.
        method: How spectra are computed.
        vectors: Whether singular vectors are saved.
        nulls: Names of the matrices for which nulls that take many draws are drawn; ``None`` for all.
        noise: Names of the matrices for which noise of equal norm is drawn; ``None`` for all.
        noises: Which noises are drawn, of ``noise.NOISES``.
        apart: Whether a tuned matrix is analysed alone, like in a scan, and of the pair only what speaks of two.
    """

    metrics: tuple[Metric, ...] = ()
    method: Method = "auto"
    vectors: bool = False
    nulls: frozenset[str] | None = None
    noise: frozenset[str] | None = None
    noises: tuple[str, ...] = ()
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

    @property
    def choices(self) -> list[object]:
        """For which matrices nulls and noise are drawn, which noise, and whether vectors are kept."""
        chosen = [None if names is None else sorted(names) for names in (self.nulls, self.noise)]
        return [*chosen, list(self.noises), self.vectors]


LARGE = 512
"""Short side from which the largest sigma alone is cheaper by iteration than by the eigensolver.

Product and eigensolver take 1.6 times as long as product and iteration at 512 x 512, 3.7 at 2048 x 2048, 1.9 at
2048 x 8192, 5.9 at 4096 x 4096 and 3.0 at 4096 x 11008 (processor time of one thread) if one direction stands out.
Where none does, as in pure noise, the iteration gives up and costs up to as much again.
"""

null_order = lru_cache(maxsize=2)(partial(entry_order, seed=0))
"""The order of entries that makes the permutation null of every matrix of a shape; it is costly to draw."""

TOP_STEPS = 10
"""Iterations after which the eigensolver would have been cheaper."""


@dataclass(frozen=True)
class StackFacts:
    """What was found out about b matrices.

    Attributes:
        facts: By the names of ``metrics.FACTS``; derived ones are computed when they are asked for.
        finite: (b,), whether all entries are finite; the facts of a matrix that is not mean nothing.
        spectrum: All singular values, if they were computed.
        unit: (b,), powers of two; facts are those of W / unit. ``None`` where it is 1.
    """

    facts: Facts
    finite: Tensor
    spectrum: Spectrum | None
    unit: Tensor | None = None

    def in_weights(self) -> Facts:
        """Return the facts of W itself, some of which may be too large or too small for a number."""
        if self.unit is None:
            return self.facts
        known = {name: value for name, value in self.facts.items() if not FACTS[name].sources}
        for name, value in known.items():
            if (degree := FACTS[name].degree) and value is not None:
                # Powers of two move exponents alone: what is found of scaled entries is exact in the weights' own unit.
                known[name] = value * (self.unit**degree).view(-1, *[1] * (value.ndim - 1))
        return Facts(known)


ORDINARY = (1e-60, 1e60)
"""Largest entries between which sums of fourth powers are ordinary numbers."""


def unit_of(*stacks: Stack) -> Tensor | None:
    """Return for each matrix the power of two that makes its largest entry an ordinary number, ``None`` if all are 1.

    Whether a matrix is zero, or finite, is a matter of its entries and not of their squares. Only float64 holds entries
    whose squares are no numbers.
    """
    if all(stack.dtype != torch.float64 for stack in stacks):
        return None
    peaks = [piece.abs().flatten(1).amax(1) for stack in stacks for piece in stack.pieces()]
    largest = torch.stack(peaks).amax(0)
    strange = (largest > 0) & largest.isfinite() & ((largest < ORDINARY[0]) | (largest > ORDINARY[1]))
    if not bool(strange.any()):
        return None
    # 2^1000 at most: the inverse of a smaller number would be infinite.
    return largest.where(strange, 1.0).log2().floor().clamp(-1000, 1000).exp2().where(strange, 1.0)


def single_facts(stack: Stack, plan: MetricPlan, device: torch.device) -> StackFacts:
    """Find out what the metrics of one matrix need."""
    unit = unit_of(stack)
    if unit is not None:
        return replace(single_facts(stack.over(unit), plan, device), unit=unit.to(device))
    by_gram = takes_gram(stack.dtype, plan.method)
    products = by_gram and plan.needs("U", "Vh", *SPECTRA)
    sums = Sums(stack.count, stack.shape, powers=plan.powers, products=products, device=device)
    for piece in stack.pieces():  # the one pass over a matrix that may be too large to be held
        sums.add(piece.to(device))
    finite = sums.moments.squares.isfinite()
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
    facts |= _whole_facts(stack, plan, finite)
    return StackFacts(Facts(facts | _spectrum_facts(svd)), finite, svd)


@dataclass(frozen=True)
class StackPair:
    """Matrices of a base and the same ones of a checkpoint that descends from it.

    Attributes:
        base: W0.
        tuned: W1.
        change: D as factors, where it is known so: it then counts, and W1 = W0 + D is not rounded.
    """

    base: Stack
    tuned: Stack
    change: LowRank | None = None

    def over(self, unit: Tensor) -> StackPair:
        """Return the pair with each matrix divided by its unit, (b,)."""
        change = self.change and LowRank(self.change.B / unit[:, None, None], self.change.A)
        return StackPair(self.base.over(unit), self.tuned.over(unit), change)

    def takes_gram(self, method: Method) -> bool:
        """Whether products of the short sides serve for both."""
        return takes_gram(self.base.dtype, method) and takes_gram(self.tuned.dtype, method)

    def pieces(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor | LowRank]]:
        """Yield pieces of W0, each with that of W1, or of D where it is known as factors."""
        if self.change is None:
            for one, other in zip(self.base.pieces(), self.tuned.pieces(), strict=True):
                yield one.to(device), other.to(device)
            return
        moved, start = LowRank(self.change.B.to(device), self.change.A.to(device)), 0
        for one in self.base.pieces():
            yield one.to(device), moved.rows(start, start + one.shape[1])
            start += one.shape[1]

    def by_lapack(self, places: list[int], finite: Tensor) -> PairSpectrum:
        """Return spectra and overlaps of some of the pairs from the matrices themselves."""
        at, device = torch.tensor(places), finite.device
        one = _safe(self.base.whole()[at].to(device), finite[places])
        other = _safe(self.tuned.whole()[at].to(device), finite[places])
        if self.change is not None:
            other = one.double() + (self.change.B[at] @ self.change.A[at]).to(device)
        return pair_from_matrices(one, other)


def pair_facts(pair: StackPair, plan: MetricPlan, device: torch.device) -> tuple[StackFacts, StackFacts]:
    """Find out what the metrics of a base, of its tuned matrix and of the pair need.

    Returns:
        What is known of the base, and of the tuned and the pair.
    """
    unit = unit_of(pair.base, pair.tuned)
    if unit is not None:
        found = pair_facts(pair.over(unit), plan, device)
        return replace(found[0], unit=unit.to(device)), replace(found[1], unit=unit.to(device))
    base, tuned = pair.base, pair.tuned
    sums = _sum_pairs(pair, plan, device)
    first, second = sums.base_moments, sums.tuned_moments
    finite0 = first.squares.isfinite()
    finite = finite0 & second.squares.isfinite()
    for total in (sums.base_gram, sums.cross, sums.delta_gram, sums.weighed_gram):
        total.copy_(_safe(total, finite[: len(total)]))
    facts0, facts1 = _entry_facts(base, first), _entry_facts(tuned, second)
    facts1 |= {"base_epsilon": facts0["epsilon"], "base_squares": first.squares, "delta_squares": sums.delta_squares}
    facts1 |= {"delta_along": sums.along, "changed": sums.changed, "rounding_squares": sums.rounding_squares}
    if plan.needs("delta_sigmas"):
        facts1["delta_sigmas"] = _delta_sigmas(pair, sums, finite, method=plan.method)
    spectra = None
    if plan.needs(*SPECTRA, *OVERLAPS):
        spectra = _compare_spectra(pair, sums, finite, plan=plan)
        facts1["base_sigmas"] = spectra.base.S
        facts1["base_resolved"] = spectra.base.resolved
        if spectra.left_overlap is not None:
            facts1 |= overlap_facts(spectra)
    found0 = StackFacts(Facts(facts0 | _spectrum_facts(spectra and spectra.base)), finite0, spectra and spectra.base)
    found1 = StackFacts(Facts(facts1 | _spectrum_facts(spectra and spectra.tuned)), finite, spectra and spectra.tuned)
    for found, stack in ((found0, base), (found1, tuned)):
        found.facts.update(_whole_facts(stack, plan, found.finite))
        if plan.needs("U", "Vh"):  # a pair's overlaps come without vectors of the long side
            own = single_facts(stack, plan, device).facts
            found.facts.update({name: own[name] for name in ("U", "Vh")})
    if plan.needs("base_row_squares", "base_col_squares"):
        found1.facts.update({f"base_{name}": found0.facts[name] for name in ("row_squares", "col_squares")})
    return found0, found1


def _whole_facts(stack: Stack, plan: MetricPlan, finite: Tensor) -> dict[str, Tensor]:
    """Return facts for which all entries must be at hand at once."""
    facts, device = {}, finite.device
    if plan.needs("matrix"):
        facts["matrix"] = stack.whole().to(device).double()
    if plan.needs("row_squares", "col_squares"):
        rows, cols = [], torch.zeros(stack.count, stack.shape[1], dtype=torch.float64, device=device)
        for piece in stack.pieces():
            squares = piece.to(device).double().square()
            rows.append(squares.sum(2))
            cols += squares.sum(1)
        facts |= {"row_squares": torch.cat(rows, 1), "col_squares": cols}
    (short, long), count = sorted(stack.shape), stack.count
    if not plan.needs("null_sigmas", "block_sigmas"):
        return facts
    if stack.streamed:  # such a tensor is never held whole
        # Order and blocks need all entries at once: null, and not a number of a part.
        unknown = torch.full((count, long // short, short), torch.nan, dtype=torch.float64, device=device)
        return facts | {"null_sigmas": unknown[:, 0], "block_sigmas": unknown}
    whole = _safe(stack.whole().to(device), finite)
    if plan.needs("null_sigmas"):
        # the short side first, which is faster; shuffled entries have no orientation that would matter
        shuffled = permuted(whole, null_order(stack.shape, device=device)).view(count, short, long)
        facts["null_sigmas"] = spectrum(shuffled, method=plan.method).S
    if plan.needs("block_sigmas"):
        wide = whole if stack.shape[0] == short else whole.mT
        blocks = wide[:, :, : long // short * short].unflatten(2, (-1, short)).transpose(1, 2)
        found = spectrum(blocks, method=plan.method)
        facts["block_sigmas"] = found.S.where(found.resolved[..., None] < found.S, 0.0)
    return facts


def _sum_pairs(pair: StackPair, plan: MetricPlan, device: torch.device) -> PairSums:
    by_gram = pair.takes_gram(plan.method)
    vectors = by_gram and plan.needs(*SPECTRA, *OVERLAPS)
    sums = PairSums(
        pair.base.count,
        pair.base.shape,
        powers=plan.powers,
        delta=vectors or (by_gram and pair.change is None and plan.needs("delta_sigmas")),
        vectors=vectors,
        row_energy=vectors and plan.needs("delta_row_energy"),
        # A change between two dtypes holds the rounding to the coarser, whichever model is stored in it.
        rounding=min(pair.base.rounding(), pair.tuned.rounding()),
        device=device,
    )
    for one, other in pair.pieces(device):
        sums.add(one, other)
    return sums


def _compare_spectra(pair: StackPair, sums: PairSums, finite: Tensor, *, plan: MetricPlan) -> PairSpectrum:
    """Return spectra, and overlaps where they are wanted; by LAPACK where Gram matrices are too coarse for vectors."""
    if not pair.takes_gram(plan.method):
        return pair.by_lapack(list(range(pair.base.count)), finite)
    found = pair_from_sums(sums) if plan.needs(*OVERLAPS) else pair_values(sums)
    # LAPACK holds the whole matrix: of one that is too large Gram matrices have to do.
    weak = [] if pair.base.streamed else weak_pairs(found)
    return replace_pairs(found, weak, pair.by_lapack(weak, finite)) if weak else found


def overlap_facts(pair: PairSpectrum) -> dict[str, Tensor]:
    """Return overlaps, and what of the change goes with each direction; a zero matrix has no vectors."""
    assert pair.left_overlap is not None and pair.right_overlap is not None
    assert pair.diagonal is not None and pair.energy is not None
    # Any basis would do for a zero matrix; which one the solver gives says nothing.
    zero = ((pair.base.S[:, 0] == 0) | (pair.tuned.S[:, 0] == 0))[:, None]
    found = {
        "left_cosines": pair.left_overlap.clamp_(-1.0, 1.0).masked_fill_(zero[:, :, None], torch.nan),
        "right_cosines": pair.right_overlap.clamp_(-1.0, 1.0).masked_fill_(zero[:, :, None], torch.nan),
        "diagonal": pair.diagonal.masked_fill(zero, torch.nan),
        "delta_energy": pair.energy.masked_fill(zero, torch.nan),
    }
    if pair.row_energy is not None:
        found["delta_row_energy"] = pair.row_energy.masked_fill(zero, torch.nan)
    return found


def _delta_sigmas(pair: StackPair, sums: PairSums, finite: Tensor, *, method: Method) -> Tensor:
    """Return the singular values of D by the most direct way that is open."""
    if pair.change is not None:  # from the thin factors, so that D is never formed
        return factored_spectrum(pair.change.B, pair.change.A).S.to(finite.device)
    if not pair.takes_gram(method):
        difference = pair.tuned.whole().double() - pair.base.whole().double()
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
    # of a Gram matrix these are the squares of the sigmas; one that does not converge costs TOP_STEPS more than none
    tops = [top_spectrum(g, 1, steps=TOP_STEPS) for g in mirrored(grams)]
    found = [t.S if t.converged else gram_values(g[None]).S[0, :1].square() for t, g in zip(tops, grams, strict=True)]
    return torch.cat(found).sqrt()


def _entry_facts(stack: Stack, moments: Moments) -> dict[str, Any]:
    epsilon = torch.finfo(stack.dtype).eps
    drawn = torch.ones_like(moments.squares, dtype=torch.bool)
    return {"shape": stack.shape, "epsilon": epsilon, "squares": moments.squares, "moments": moments, "drawn": drawn}


def _spectrum_facts(spectrum: Spectrum | None) -> dict[str, Any]:
    if spectrum is None:
        return {}
    found = {"sigmas": spectrum.S, "sigma_max": spectrum.S[:, 0], "resolved": spectrum.resolved}
    return found | {"U": spectrum.U, "Vh": spectrum.Vh}


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


def numbers(found: StackFacts, metrics: Sequence[Metric]) -> pl.DataFrame:
    """Return the metrics alone, one row per matrix. What has no value is null."""
    with ONE_AT_A_TIME:
        return _settled(pl.DataFrame(_metric_columns(found, metrics, found.in_weights())))


def bundle(found: StackFacts, metrics: Sequence[Metric]) -> pl.DataFrame:
    """Return one row per matrix: outcome, metrics, and lists along the spectrum. What has no value is null."""
    for name in {"rowcol_sigmas", "row_sigmas", "rowcol_agreement", "separable"} & behind(
        fact for m in metrics for fact in m.facts
    ):
        _ = found.facts[name]  # hundreds of decompositions, or an iteration, which others need not wait for
    with ONE_AT_A_TIME:
        return _settled(pl.DataFrame(_columns(found, metrics)))


def _settled(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows in Polars' own memory.

    Small arrays that live on among large temporaries keep the allocator from giving these back, a few MB for each
    tensor, and memory would grow with the number of layers.
    """
    return rows.select(pl.all().gather(pl.int_range(len(rows))))


def _columns(found: StackFacts, metrics: Sequence[Metric]) -> dict[str, pl.Series]:
    finite = found.finite.tolist()
    zero = (found.facts["squares"] == 0).tolist()
    status = ["zero" if z else "ok" if f else "non_finite" for f, z in zip(finite, zero, strict=True)]
    spectrum, plain = found.spectrum, found.in_weights()
    count = len(status)
    columns: dict[str, pl.Series] = {
        "status": pl.Series(status, dtype=pl.String),
        "method": pl.Series(list(spectrum.method) if spectrum else [None] * count, dtype=pl.String),
        "resolved": _numbers(plain["resolved"] if spectrum else None, finite),
    }
    columns |= _metric_columns(found, metrics, plain)
    asked = {"tail_warnings": "power_law", "bulk_warnings": "bulk", "separable_warnings": "separable"}
    doubts = [found.facts[words] for words, fact in asked.items() if fact in found.facts] or [("",) * count]
    texts = ["; ".join(filter(None, words)) or None for words in zip(*doubts, strict=True)]
    columns["warning"] = pl.Series(texts, dtype=pl.String)
    for name, curve in CURVES.items():
        if curve.wanted(found.facts):
            columns[CURVE + name] = _lists(curve.values(plain), finite, ragged=curve.ragged)
    return columns


def _metric_columns(found: StackFacts, metrics: Sequence[Metric], plain: Facts) -> dict[str, pl.Series]:
    """Return a column for each metric; ``plain`` are the facts of the weights as they are."""
    finite, columns = found.finite.tolist(), {}
    for metric in metrics:
        # A metric that does not scale, such as a logarithm, is computed in the weights' own unit, whatever that loses.
        if found.unit is None or metric.degree is None:
            values = metric(*(plain[fact] for fact in metric.facts))
        else:  # a matrix needs a unit of its own, and the metric says how it scales
            values = metric(*(found.facts[fact] for fact in metric.facts)) * found.unit**metric.degree
        columns[metric.name] = _numbers(values, finite)
    return columns


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
