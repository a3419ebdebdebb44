"""Every metric of the catalog: against NumPy, under scaling, rotation, transposition and permutation, and by chance.

``REFERENCES`` holds a definition in NumPy for each. What its declaration claims is held against what it does, and what
it does not claim too. All facts are computed the way a scan and a comparison compute them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import scipy
import spectral_references as slow
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffract.analysis.facts import MetricPlan, StackPair, pair_facts, single_facts
from diffract.analysis.held import Stack
from diffract.metrics import CATALOG, GROUPS, Facts, Metric, heavy_tails, separable
from diffract.metrics.agreement import best_match_chance, cosine_chance, principal_angle_chance
from diffract.metrics.facts import behind
from diffract.metrics.heavy_tails.fit import fit_tails
from diffract.metrics.heavy_tails.significance import LAWS
from diffract.metrics.nulls import dip

BOOTSTRAPPED = {m.name for m in GROUPS["p_values"]}
"""A thousand fits each: they have a test of their own, below."""

LEVELS = {m.name for m in GROUPS["agreement_levels"]} | {"pl_alpha_rowcol", "pl_alpha_rowcol_pvalue"}
"""Numbers of draws, of float32: they are held against NumPy in ``test_nulls``."""

QUICK = [name for name in CATALOG if name not in BOOTSTRAPPED | LEVELS]

DRAWN = {name for name in QUICK if "drawn" in behind(CATALOG[name].facts)}
"""Draws and laws of row and column norms: most of the time goes to them."""

CPU = torch.device("cpu")

TOLERANCE = {"exact": 1e-9, "gram": 1e-5}
"""Vectors move by eps over the relative gap of sigmas, which is kept above 1e-3: 1e-12, and room. From Gram matrices by
eps (sigma_1 / sigma)^2 over the gap, sigma / sigma_1 being kept above 1e-2: 1e-8, and room."""

EQUAL = 1e-12
"""Dips of samples of one mode are all 1 / 2n, but for rounding, and count as equal."""


@dataclass
class Case:
    """A base and its tuned matrix in float64, the dtype that they were stored in, and their decompositions."""

    w0: np.ndarray
    w: np.ndarray
    dtype: torch.dtype

    @cached_property
    def delta(self) -> np.ndarray:
        return self.w - self.w0

    @cached_property
    def base(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.linalg.svd(self.w0, full_matrices=False)

    @cached_property
    def tuned(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.linalg.svd(self.w, full_matrices=False)

    @property
    def sigmas(self) -> np.ndarray:
        return self.tuned[1]

    @cached_property
    def delta_sigmas(self) -> np.ndarray:
        return np.linalg.svd(self.delta, compute_uv=False)

    @cached_property
    def resolved(self) -> tuple[int, int]:
        """How many directions of base and tuned are above what rounding to the stored dtype does."""
        m, n = self.w.shape
        factor = torch.finfo(self.dtype).eps * (1 / math.sqrt(m) + 1 / math.sqrt(n))
        first, second = (int((s > factor * np.linalg.norm(s)).sum()) for s in (self.base[1], self.sigmas))
        return first, second

    def overlap(self, side: str) -> np.ndarray:
        (U0, _, V0), (U1, _, V1) = self.base, self.tuned
        whole = np.abs(U0.T @ U1) if side == "left" else np.abs(V0 @ V1.T)
        return whole[: self.resolved[0], : self.resolved[1]]

    def vectors(self, side: str) -> tuple[np.ndarray, np.ndarray]:
        """Base and tuned vectors as columns."""
        (U0, _, V0), (U1, _, V1) = self.base, self.tuned
        return (U0, U1) if side == "left" else (V0.T, V1.T)

    @cached_property
    def noise(self) -> dict[str, float]:
        return slow.noise(self.sigmas, self.w.shape)

    @cached_property
    def energy(self) -> np.ndarray:
        return ((self.base[0].T @ self.delta) ** 2).sum(1)

    @cached_property
    def expected(self) -> np.ndarray:
        rows = (self.base[0] ** 2).T @ (self.delta**2).sum(1)
        return slow.expected_energy(self.energy, rows, self.base[1], np.arange(len(rows)) < self.resolved[0])

    @cached_property
    def peaks(self) -> list[np.ndarray]:
        return slow.members(self.base[1])

    def separable(self, m: Metric) -> float:
        """By the law itself, which its own tests hold against draws."""
        squares = torch.from_numpy(self.w**2)[None]
        facts = Facts(row_squares=squares.sum(2), col_squares=squares.sum(1), shape=self.w.shape)
        facts |= {
            "drawn": torch.ones(1, dtype=torch.bool),
            "resolved_eigenvalues": torch.from_numpy(self.eigenvalues)[None],
        }
        return m(*(facts[name] for name in m.facts)).item()

    @cached_property
    def rowcol(self) -> np.ndarray:
        return np.linalg.svd(slow.rowcol_draws(self.w), compute_uv=False)

    @cached_property
    def row(self) -> np.ndarray:
        return np.linalg.svd(slow.row_draws(self.w), compute_uv=False)

    @property
    def eigenvalues(self) -> np.ndarray:
        return self.sigmas**2 / max(self.w.shape)

    @cached_property
    def tails(self) -> dict[str, Any]:
        """Laws with two parameters by the fit itself: ``heavy_tails`` is held against references in its own tests."""
        values = torch.from_numpy(self.eigenvalues)[None]
        xmin = fit_tails(values, LAWS["power_law"]).xmin
        at = {name: fit_tails(values, law, at=xmin).parameters for name, law in LAWS.items()}
        found: dict[str, Any] = {
            name: getattr(heavy_tails, name)(values) for name in ("truncated_power_law", "log_normal")
        }
        return found | {"comparisons": heavy_tails.compare_laws(values, xmin, at)}

    @cached_property
    def slow_tails(self) -> dict[str, dict[str, float]]:
        return {law: slow.best_tail(self.eigenvalues, law) for law in ("power_law", "exponential")}

    def window(self, j: int) -> list[int]:
        return [
            i
            for i, s in enumerate(self.base[1][: self.resolved[0]])
            if abs(s - self.sigmas[j]) <= 0.05 * self.sigmas[j]
        ]


def entropy_rank(S: np.ndarray) -> float:
    p = S[S > 0] / S.sum()
    return math.exp(-(p * np.log(p)).sum())


def numerical_rank(c: Case) -> float:
    eps = torch.finfo(c.dtype).eps
    return float((min(max(c.w.shape) * eps, max(eps, 1e-3)) * c.sigmas[0] < c.sigmas).sum())


def energy_rank(c: Case) -> float:
    total, k = 0.0, 0
    while total < 0.9 * (c.sigmas**2).sum():
        total += c.sigmas[k] ** 2
        k += 1
    return float(k)


def kurtosis(c: Case) -> float:
    z = c.w - c.w.mean()
    return (z**4).mean() / (z**2).mean() ** 2 - 3 if (z**2).mean() > 0 else math.nan


def rounding_floor(c: Case) -> float:
    info = torch.finfo(c.dtype)
    magnitude = np.maximum(np.abs(c.w), info.smallest_normal)
    return math.sqrt(((np.exp2(np.frexp(magnitude)[1] - 1.0) * info.eps) ** 2).sum() / 12)


def value_share(c: Case) -> float:
    (U, _, V) = c.base
    return sum((U[:, i] @ c.delta @ V[i]) ** 2 for i in range(len(V))) / (c.delta**2).sum()


def scale_change(c: Case) -> float:
    return (c.delta * c.w0).sum() / (c.w0**2).sum()


def free(c: Case) -> np.ndarray:
    """The part of the change that no multiple of the base explains; all zero where only rounding is left."""
    left = c.delta - scale_change(c) * c.w0
    return left if (left**2).sum() > 1e-12 * (c.delta**2).sum() else np.full_like(left, math.nan)


def value_share_turned(c: Case) -> float:
    (U0, S0, V0), (U1, _, V1) = c.base, c.tuned
    weights = np.abs(U0.T @ U1) * np.abs(V0 @ V1.T)
    base, tuned = scipy.optimize.linear_sum_assignment(weights, maximize=True)
    moved = np.zeros_like(c.w0)
    for i, j in zip(base, tuned, strict=True):
        moved += S0[i] * np.outer(U1[:, j], V1[j])
    return float((np.diag(U0.T @ (moved - c.w0) @ V0.T) ** 2).sum() / (c.delta**2).sum())


def subspace(c: Case, side: str, k: int) -> float:
    first, second = (v[:, :k] for v in c.vectors(side))
    return np.linalg.norm(first.T @ second) ** 2 / k if k <= min(c.resolved) else math.nan


def angle(c: Case, side: str, k: int) -> float:
    first, second = (v[:, :k] for v in c.vectors(side))
    return float(scipy.linalg.subspace_angles(first, second).mean()) if k <= min(c.resolved) else math.nan


def angle_chance(c: Case, dimension: int, k: int) -> float:
    """By simulation; ``test_subspaces`` holds it against Gaussian matrices."""
    return principal_angle_chance(dimension, k)[1] if k <= min(c.resolved) else math.nan


def largest_cosine(dimension: int, count: int) -> float:
    """Mean largest of |Gaussians| over the mean length of a Gaussian vector."""
    none = lambda x: 1 - (2 * scipy.stats.norm.cdf(x) - 1) ** count  # noqa: E731
    largest = scipy.integrate.quad(none, 0, np.inf, epsabs=1e-13)[0]
    return largest / scipy.stats.chi.mean(dimension)


def window_level(c: Case, dimension: int) -> float:
    """Mean norm of random unit vectors in windows: mean lengths of Gaussian vectors over the one in d dimensions."""
    sizes = [len(c.window(j)) for j in range(c.resolved[1])]
    return float(np.mean([scipy.stats.chi.mean(k) if k else 0.0 for k in sizes])) / scipy.stats.chi.mean(dimension)


def in_window(c: Case, side: str) -> float:
    first, second = c.vectors(side)
    return float(np.mean([np.linalg.norm(first[:, c.window(j)].T @ second[:, j]) for j in range(c.resolved[1])]))


REFERENCES: dict[str, Callable[[Case], float]] = {
    "frobenius_norm": lambda c: np.linalg.norm(c.w),
    "spectral_norm": lambda c: np.linalg.norm(c.w, 2),
    "nuclear_norm": lambda c: np.linalg.norm(c.w, "nuc"),
    "stable_rank": lambda c: (np.linalg.norm(c.w) / np.linalg.norm(c.w, 2)) ** 2,
    "effective_rank": lambda c: entropy_rank(c.sigmas),
    "participation_ratio": lambda c: (c.sigmas**2).sum() ** 2 / (c.sigmas**4).sum(),
    "numerical_rank": numerical_rank,
    "energy_rank_90": energy_rank,
    "aspect_ratio": lambda c: max(c.w.shape) / min(c.w.shape),
    "condition_number": lambda c: np.linalg.cond(c.w),
    "entry_std": lambda c: c.w.std(),
    "entry_kurtosis": kurtosis,
    "delta_frobenius": lambda c: np.linalg.norm(c.delta),
    "delta_relative": lambda c: np.linalg.norm(c.delta) / np.linalg.norm(c.w0),
    "delta_spectral": lambda c: np.linalg.norm(c.delta, 2),
    "delta_stable_rank": lambda c: (np.linalg.norm(c.delta) / np.linalg.norm(c.delta, 2)) ** 2,
    "delta_effective_rank": lambda c: entropy_rank(c.delta_sigmas),
    "delta_changed_share": lambda c: (c.w != c.w0).mean(),
    "delta_rounding_floor": rounding_floor,
    "value_share": value_share,
    "value_share_chance": lambda c: 1 / max(c.w.shape),
    "spectral_shift_share": lambda c: ((c.sigmas - c.base[1]) ** 2).sum() / (c.delta**2).sum(),
    "value_share_turned": value_share_turned,
    "sigma_change_relative": lambda c: np.linalg.norm(c.sigmas - c.base[1]) / np.linalg.norm(c.base[1]),
    "scale_change": scale_change,
    "delta_free_relative": lambda c: np.linalg.norm(np.nan_to_num(free(c))) / np.linalg.norm(c.w0),
    "value_share_free": lambda c: float(
        (np.diag(c.base[0].T @ free(c) @ c.base[2].T) ** 2).sum() / (free(c) ** 2).sum()
    ),
    "spectral_shift_share_free": lambda c: (
        ((c.sigmas - abs(1 + scale_change(c)) * c.base[1]) ** 2).sum() / (free(c) ** 2).sum()
    ),
    "intruders": lambda c: float(sum(v.max() < 0.5 for v in c.overlap("left").T[:10])),
}

for _name in ("variance", "edge", "ks", "spikes", "spikes_tw", "soft_rank", "bulk_share"):
    REFERENCES[f"mp_{_name}"] = lambda c, n=_name: c.noise[n]
_TAIL = ("xmin", "ks", "tail_count")
for _name in ("alpha", "alpha_stderr_fixed_xmin", *_TAIL):
    REFERENCES[f"pl_{_name}"] = lambda c, n=_name: c.slow_tails["power_law"][n]
for _name in ("rate", *_TAIL):
    REFERENCES[f"exp_{_name}"] = lambda c, n=_name: c.slow_tails["exponential"][n]
for _name in ("alpha", "rate", *_TAIL):
    REFERENCES[f"tpl_{_name}"] = lambda c, n=_name: getattr(c.tails["truncated_power_law"], n).item()
for _name in ("mu", "sigma", *_TAIL):
    REFERENCES[f"ln_{_name}"] = lambda c, n=_name: getattr(c.tails["log_normal"], n).item()
for _short, _law in (("tpl", "truncated_power_law"), ("ln", "log_normal")):
    REFERENCES[f"pl_vs_{_short}"] = lambda c, law=_law: getattr(c.tails["comparisons"], law).ratio.item()
    REFERENCES[f"pl_vs_{_short}_p"] = lambda c, law=_law: getattr(c.tails["comparisons"], law).p.item()


def alpha(c: Case) -> float:
    return c.slow_tails["power_law"]["alpha"]


REFERENCES |= {
    "pl_vs_exp": lambda c: slow.against_exponential(c.eigenvalues)[0],
    "pl_vs_exp_p": lambda c: slow.against_exponential(c.eigenvalues)[1],
    "alpha_hat": lambda c: alpha(c) * math.log10(c.eigenvalues[0]),
    "log10_alpha_norm": lambda c: math.log10((c.eigenvalues ** alpha(c)).sum()),
    "null_w1": lambda c: slow.null_distance(c.w, c.sigmas),
    "null_spectral_norm": lambda c: slow.null_sigmas(c.w)[0],
    "mp_spikes_tw_rowcol": lambda c: float(np.nanmean([slow.noise(S, c.w.shape)["spikes_tw"] for S in c.rowcol])),
    "sep_ks": lambda c: c.separable(separable.sep_ks),
    "sep_edge": lambda c: c.separable(separable.sep_edge),
    "sep_spikes": lambda c: c.separable(separable.sep_spikes),
    "sep_modes": lambda c: c.separable(separable.sep_modes),
    "peak_count_rowcol": lambda c: float(np.mean([slow.peak_count(S) for S in c.rowcol])),
    "peak_count_rowcol_pvalue": lambda c: slow.reached(
        slow.peak_count(c.sigmas), [slow.peak_count(S) for S in c.rowcol]
    ),
    "peak_count_row": lambda c: float(np.mean([slow.peak_count(S) for S in c.row])),
    "peak_count_row_pvalue": lambda c: slow.reached(slow.peak_count(c.sigmas), [slow.peak_count(S) for S in c.row]),
    "dip_pvalue": lambda c: slow.reached(dip(np.log(c.sigmas)) - EQUAL, [dip(np.log(S)) for S in c.rowcol]),
    "pl_alpha_stderr": lambda c: slow.exponent_scatter(c.eigenvalues),
    "pl_alpha_farms": lambda c: slow.block_exponent(c.w),
    "donoho_gavish_threshold": lambda c: slow.hard_threshold(c.sigmas, c.w.shape),
    "donoho_gavish_rank": lambda c: float((c.sigmas > slow.hard_threshold(c.sigmas, c.w.shape)).sum()),
    "peak_count": lambda c: slow.peak_count(c.sigmas),
    "peak_enrichment": lambda c: slow.enrichment(c.energy / c.expected, c.peaks),
    "peak_enrichment_pvalue": lambda c: slow.enrichment_pvalue(c.energy / c.expected, c.peaks),
    **{f"energy_tenth_{k + 1}": lambda c, k=k: slow.tenth(c.energy, c.expected, k) for k in range(10)},
}

for _side in ("left", "right"):

    def _d(c: Case, side: str = _side) -> int:
        return c.w.shape[0 if side == "left" else 1]

    REFERENCES |= {
        f"{_side}_agreement_mean": lambda c, s=_side: np.diag(c.overlap(s)).mean(),
        f"{_side}_agreement_chance": (
            # E |x_1| / ||x|| for a Gaussian x in d dimensions
            lambda c, d=_d: math.gamma(d(c) / 2) / math.gamma((d(c) + 1) / 2) / math.sqrt(math.pi)
        ),
        f"{_side}_best_match_mean": lambda c, s=_side: c.overlap(s).max(1).mean(),
        f"{_side}_best_match_chance": lambda c, d=_d: largest_cosine(d(c), c.resolved[1]),
        f"{_side}_subspace_8": lambda c, s=_side: subspace(c, s, 8),
        f"{_side}_subspace_8_chance": lambda c, d=_d: 8 / d(c) if min(c.resolved) >= 8 else math.nan,
        f"{_side}_subspace_32": lambda c, s=_side: subspace(c, s, 32),
        f"{_side}_subspace_32_chance": lambda c, d=_d: 32 / d(c) if min(c.resolved) >= 32 else math.nan,
        **{f"{_side}_angle_{k}": lambda c, s=_side, k=k: angle(c, s, k) for k in (8, 32)},
        **{f"{_side}_angle_{k}_chance": lambda c, d=_d, k=k: angle_chance(c, d(c), k) for k in (8, 32)},
        f"{_side}_agreement_window_mean": lambda c, s=_side: in_window(c, s),
        f"{_side}_agreement_window_chance": lambda c, d=_d: window_level(c, d(c)),
    }


def test_every_metric_has_its_reference() -> None:
    assert set(REFERENCES) == set(QUICK)


# Computing


def stack_of(w: torch.Tensor) -> Stack:
    w = w if w.ndim == 3 else w[None]
    return Stack(len(w), (w.shape[1], w.shape[2]), w.dtype, lambda: iter([w]))


def compute(
    base: torch.Tensor, tuned: torch.Tensor, method: str, names: Sequence[str] = QUICK
) -> dict[str, torch.Tensor]:
    """Metrics by name; those of one matrix of the tuned one."""
    found = {}
    for pair in (False, True):
        metrics = tuple(CATALOG[name] for name in names if CATALOG[name].pair == pair)
        plan = MetricPlan(metrics, method=method)
        if pair:
            facts = pair_facts(StackPair(stack_of(base), stack_of(tuned)), plan, CPU)[1].facts
        else:
            facts = single_facts(stack_of(tuned), plan, CPU).facts
        found |= {m.name: m(*(facts[fact] for fact in m.facts)) for m in metrics}
    return found


def numbers(base: torch.Tensor, tuned: torch.Tensor, method: str, names: Sequence[str] = QUICK) -> dict[str, float]:
    return {name: value.item() for name, value in compute(base, tuned, method, names).items()}


def room(name: str, tolerance: float) -> float:
    """A cosine near 1 that is off by e is an angle off by sqrt(2 e)."""
    return math.sqrt(2 * tolerance) if "_angle_" in name else tolerance


def differing(found: dict[str, float], want: dict[str, float], tolerance: float) -> dict[str, tuple[float, float]]:
    return {
        name: (found[name], value)
        for name, value in want.items()
        if found[name] != pytest.approx(value, rel=room(name, tolerance), abs=room(name, tolerance), nan_ok=True)
    }


# Matrices


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(n, n, seed=seed)).Q


def make_pair(m: int, n: int, size: float, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A base with sigmas from 1 to 3 and a tuned matrix of which a third of the entries are unchanged."""
    k = min(m, n)
    sigmas = torch.linspace(3, 1, k, dtype=torch.float64)
    base = rotation(m, seed)[:, :k] * sigmas @ rotation(n, seed + 1)[:k]
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(seed + 2)) < 0.67
    mask[0, 0] = True
    return base.to(dtype), (base + size * gaussian(m, n, seed=seed + 3) * mask).to(dtype)


def well_defined(base: torch.Tensor, tuned: torch.Tensor) -> bool:
    """Whether sigmas are resolved and lie apart, so that vectors are defined, and no threshold is hit by chance."""
    S = [torch.linalg.svdvals(w.double()) for w in (base, tuned)]
    apart = all(bool((-s.diff() > 1e-3 * s[0]).all()) and bool(s[-1] > 1e-2 * s[0]) for s in S)
    edge = ((S[0][:, None] - S[1]).abs() / (0.05 * S[1]) - 1).abs().min()
    return apart and bool(edge > 1e-5) and bool((base != tuned).any())


SHAPES = st.one_of(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.sampled_from([(33, 36), (36, 33), (10, 40)]))
SIZES = st.sampled_from([0.01, 0.3, 2.0])
SEEDS = st.integers(0, 2**20)
METHODS = st.sampled_from(["exact", "gram"])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])

NAMES = st.sampled_from([[name for name in QUICK if name not in DRAWN]] * 4 + [QUICK])
"""What is drawn joins in every fifth example."""

FEW = settings(max_examples=40, deadline=None, derandomize=True)
"""Seeded by the test's text, so that a run is a repetition; no deadline, as BLAS takes its time to start."""


@FEW
@given(SHAPES, SIZES, SEEDS, METHODS, DTYPES, NAMES)
def test_numpy_agrees(
    shape: tuple[int, int], size: float, seed: int, method: str, dtype: torch.dtype, names: list[str]
) -> None:
    base, tuned = make_pair(*shape, size, seed, dtype)
    assume(well_defined(base, tuned))
    case = Case(base.double().numpy(), tuned.double().numpy(), dtype)
    want = {name: float(REFERENCES[name](case)) for name in names}
    assert differing(numbers(base, tuned, method, names), want, TOLERANCE[method]) == {}


@FEW
@given(SHAPES, SIZES, SEEDS, METHODS, DTYPES, NAMES, st.integers(-12, 12))
def test_scaling(
    shape: tuple[int, int],
    size: float,
    seed: int,
    method: str,
    dtype: torch.dtype,
    names: list[str],
    exponent: int,
) -> None:
    base, tuned = make_pair(*shape, size, seed, dtype)
    assume(well_defined(base, tuned))
    degrees = {name: degree for name in names if (degree := CATALOG[name].degree) is not None}
    factor = 2.0**exponent
    want = numbers(base, tuned, method, list(degrees))
    after = numbers(base * factor, tuned * factor, method, list(degrees))
    # A power of two is exact in every dtype, so only the tolerance of the metric's own unit counts.
    got = {name: value / factor ** degrees[name] for name, value in after.items()}
    assert differing(got, want, TOLERANCE[method]) == {}


def claiming(invariance: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if invariance in CATALOG[name].invariant]


@FEW
@given(SHAPES, SIZES, SEEDS, METHODS)
def test_rotation(shape: tuple[int, int], size: float, seed: int, method: str) -> None:
    base, tuned = make_pair(*shape, size, seed, torch.float64)
    assume(well_defined(base, tuned))
    left, right = rotation(shape[0], seed + 10), rotation(shape[1], seed + 11)
    names = claiming("rotation", QUICK)
    want = numbers(base, tuned, method, names)
    assert differing(numbers(left @ base @ right, left @ tuned @ right, method, names), want, TOLERANCE[method]) == {}


@FEW
@given(SHAPES, SIZES, SEEDS, METHODS, DTYPES, NAMES)
def test_transposition(
    shape: tuple[int, int], size: float, seed: int, method: str, dtype: torch.dtype, names: list[str]
) -> None:
    base, tuned = make_pair(*shape, size, seed, dtype)
    assume(well_defined(base, tuned))
    # What belongs to a side changes sides.
    other = {name: "right_" + name.removeprefix("left_") for name in names if name.startswith("left_")}
    assert other
    same = claiming("transpose", names)
    before = numbers(base, tuned, method, [*same, *other])
    after = numbers(base.mT.contiguous(), tuned.mT.contiguous(), method, [*same, *other.values()])
    got = {name: after[other.get(name, name)] for name in before}
    assert differing(got, before, TOLERANCE[method]) == {}


@FEW
@given(SHAPES, SIZES, SEEDS, METHODS, DTYPES, NAMES)
def test_permutation(
    shape: tuple[int, int], size: float, seed: int, method: str, dtype: torch.dtype, names: list[str]
) -> None:
    base, tuned = make_pair(*shape, size, seed, dtype)
    assume(well_defined(base, tuned))
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.randperm(shape[0], generator=generator), torch.randperm(shape[1], generator=generator)
    names = claiming("permutation", names)
    want = numbers(base, tuned, method, names)
    assert differing(numbers(base[rows][:, cols], tuned[rows][:, cols], method, names), want, TOLERANCE[method]) == {}


def test_what_is_not_claimed_is_not_so() -> None:
    base, tuned = make_pair(33, 36, 0.3, 5, torch.float64)
    before = numbers(base, tuned, "exact")
    left, right = rotation(33, 20), rotation(36, 21)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    after = {
        "rotation": numbers(left @ base @ right, left @ tuned @ right, "exact"),
        "transpose": numbers(base.mT.contiguous(), tuned.mT.contiguous(), "exact"),
        "permutation": numbers(base[:, order], tuned[:, order], "exact"),
    }
    # Counts may happen to be the same: this matrix has one peak, and so have all draws.
    counts = {"sep_spikes", "sep_modes", "mp_spikes_tw_rowcol"}
    counts |= {f"peak_count_{null}{ending}" for null in ("rowcol", "row") for ending in ("", "_pvalue")}
    happens = {"rotation": counts, "transpose": counts | {"intruders"}, "permutation": counts}
    for invariance, found in after.items():
        for name in set(QUICK) - set(claiming(invariance, QUICK)) - happens[invariance]:
            assert found[name] != pytest.approx(before[name], rel=1e-6, abs=0), (name, invariance)
    # A metric that has no degree goes with no power of the scale.
    rest = [name for name in QUICK if CATALOG[name].degree is None]
    powers = [
        {
            name: math.log(abs(value / before[name]), a)
            for name, value in numbers(a * base, a * tuned, "exact", rest).items()
        }
        for a in (1.7, 5.0)
    ]
    for name in rest:
        assert powers[0][name] != pytest.approx(powers[1][name], abs=1e-3), name


def bounds(text: str, shape: tuple[int, int]) -> tuple[float, float]:
    low, high = text.strip("[]()").split(", ")
    return float(low), {"M": float(min(shape)), "inf": math.inf, "pi/2": math.pi / 2}.get(high) or float(high)


@FEW
@given(SHAPES, SIZES, SEEDS, METHODS, DTYPES, NAMES)
def test_values_lie_in_the_stated_range(
    shape: tuple[int, int], size: float, seed: int, method: str, dtype: torch.dtype, names: list[str]
) -> None:
    base, tuned = make_pair(*shape, size, seed, dtype)
    assume(bool((base != tuned).any()))
    for name, value in numbers(base, tuned, method, names).items():
        low, high = bounds(CATALOG[name].range, shape)
        # A bound that is reached may be passed by rounding: of sums 1e-12, of Gram matrices' sigmas 1e-6.
        slack = 1e-12 if method == "exact" else 1e-6
        assert math.isnan(value) or low - slack * (1 + abs(low)) <= value <= high + slack * (1 + high), name


@pytest.mark.parametrize("method", ["exact", "gram"])
def test_a_stack_gives_what_single_matrices_give(method: str) -> None:
    pairs = [make_pair(9, 14, 0.3, seed, torch.float32) for seed in (1, 2, 3)]
    whole = compute(torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]), method)
    for i, (base, tuned) in enumerate(pairs):
        one = numbers(base, tuned, method)
        # Reductions over a batch may vectorise in another order: a few eps.
        assert differing({name: value[i].item() for name, value in whole.items()}, one, 1e-12) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BOOTSTRAPPED))
def test_bootstrapped_p_values_are_invariant_and_in_range(name: str) -> None:
    base, _ = make_pair(24, 30, 0.3, 4, torch.float64)

    def value(w: torch.Tensor) -> float:
        facts = single_facts(stack_of(w), MetricPlan((CATALOG[name],), method="exact"), CPU).facts
        return CATALOG[name](*(facts[fact] for fact in CATALOG[name].facts)).item()

    found = value(base)
    assert 0 <= found <= 1
    assert found * 1000 == pytest.approx(round(found * 1000), abs=1e-9)  # a share of 1,000 draws
    left, right = rotation(24, 20), rotation(30, 21)
    # Rounding may move a draw across the observed distance: two of a thousand.
    for same in (base * 4.0, base.mT.contiguous(), left @ base @ right):
        assert value(same) == pytest.approx(found, abs=2e-3)
    assert math.isnan(value(0 * base))


@cache
def together(method: str) -> dict[str, float]:
    return numbers(*make_pair(34, 40, 0.3, 4, torch.float32), method)


@pytest.mark.parametrize("method", ["auto", "exact", "gram"])
@pytest.mark.parametrize("name", QUICK)
def test_a_metric_alone_gives_what_it_gives_among_all(name: str, method: str) -> None:
    base, tuned = make_pair(34, 40, 0.3, 4, torch.float32)
    m = CATALOG[name]
    plan = MetricPlan((m,), method=method)
    if m.pair:
        facts = pair_facts(StackPair(stack_of(base), stack_of(tuned)), plan, CPU)[1].facts
    else:
        facts = single_facts(stack_of(tuned), plan, CPU).facts
    alone = m(*(facts[fact] for fact in m.facts)).item()
    # Another solver (with or without vectors) may serve it: its tolerance.
    tolerance = room(name, TOLERANCE["exact" if method == "exact" else "gram"])
    assert alone == pytest.approx(together(method)[name], rel=tolerance, nan_ok=True)


# Chance


def five_errors(values: torch.Tensor, level: float) -> bool:
    """Whether the mean is within five standard errors of a level: false alarms once in two million."""
    return abs(values.mean().item() - level) <= 5 * values.std().item() / len(values) ** 0.5


@pytest.mark.parametrize("dimension", [2, 3, 10, 64])
def test_mean_cosine_of_random_unit_vectors(dimension: int) -> None:
    first, second = gaussian(2, 40_000, dimension, seed=dimension)
    cosines = torch.nn.functional.cosine_similarity(first, second).abs()
    assert five_errors(cosines, cosine_chance(dimension))


UNRELATED = [(9, 14), (14, 9), (10, 10), (8, 64), (64, 8), (16, 24), (32, 32), (48, 32)]


@pytest.mark.parametrize("shape", UNRELATED, ids=str)
def test_chance_levels_of_unrelated_matrices(shape: tuple[int, int]) -> None:
    base, tuned = gaussian(2, 2000, *shape, seed=7)
    names = [m.name for m in GROUPS["agreement"] if "angle" not in m.name and "32" not in m.name]
    found = compute(base, tuned, "exact", names)
    for side in ("left", "right"):
        # Gaussian matrices have Haar-distributed vectors: these levels are exact.
        assert five_errors(found[f"{side}_agreement_mean"], found[f"{side}_agreement_chance"][0].item())
        assert five_errors(found[f"{side}_subspace_8"], found[f"{side}_subspace_8_chance"][0].item())
        level = best_match_chance(shape[0 if side == "left" else 1], min(shape))
        assert found[f"{side}_best_match_chance"].tolist() == [level] * 2000
        assert found[f"{side}_best_match_mean"].mean().item() == pytest.approx(level, rel=0.01)
        assert five_errors(found[f"{side}_best_match_mean"], level)
        assert five_errors(found[f"{side}_agreement_window_mean"] - found[f"{side}_agreement_window_chance"], 0.0)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)], ids=str)
def test_value_share_of_random_changes(shape: tuple[int, int]) -> None:
    base = gaussian(1, *shape, seed=1).expand(3000, *shape)
    names = ["value_share", "value_share_chance"]
    found = compute(base, base + 0.1 * gaussian(3000, *shape, seed=2), "exact", names)
    assert found["value_share_chance"][0].item() == pytest.approx(1 / max(shape), rel=1e-15)
    assert five_errors(found["value_share"], 1 / max(shape))
