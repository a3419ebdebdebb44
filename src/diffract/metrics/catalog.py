"""Every metric, in one dict: the order is that of the table's columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from diffract.errors import SelectionError, suggest
from diffract.metrics import heavy_tails, pair, random_matrix, single
from diffract.metrics.facts import INVARIANCES, Metric

ENTRY_POINTS = "diffract.metrics"

ALL = INVARIANCES
ENTRIES = frozenset({"transpose", "permutation"})
TRANSPOSED = frozenset[str]()

NORMS = (
    Metric(
        "frobenius_norm", single.frobenius_norm, ("squares",), "sqrt(sum w^2)", "weight", "[0, inf)",
        "Golub & Van Loan 2013, 2.3", 1, ALL,
    ),
    Metric(
        "spectral_norm", single.spectral_norm, ("sigma_max",), "sigma_1", "weight", "[0, inf)",
        "Golub & Van Loan 2013, 2.3", 1, ALL,
    ),
    Metric(
        "nuclear_norm", single.nuclear_norm, ("sigmas",), "sum of sigma", "weight", "[0, inf)",
        "Horn & Johnson 2013, 5.6", 1, ALL,
    ),
)  # fmt: skip

RANKS = (
    Metric(
        "stable_rank", single.stable_rank, ("squares", "sigma_max"), "||W||_F^2 / ||W||_2^2", "1", "[1, M]",
        "Rudelson & Vershynin 2007", 0, ALL,
    ),
    Metric(
        "effective_rank", single.effective_rank, ("sigmas",), "exp of the entropy (nats) of sigma / sum sigma", "1",
        "[1, M]", "Roy & Vetterli 2007", 0, ALL,
    ),
    Metric(
        "participation_ratio", single.participation_ratio, ("sigmas",),
        "(sum lambda)^2 / sum lambda^2, lambda = sigma^2", "1", "[1, M]", "Bell & Dean 1970", 0, ALL,
    ),
    Metric(
        "numerical_rank", single.numerical_rank, ("sigmas", "shape", "epsilon"),
        "sigmas above rtol sigma_1, rtol = min(max(m, n) eps, max(eps, 0.001))", "count", "[0, M]",
        "Golub & Van Loan 2013, 5.4", 0, ALL,
    ),
    Metric(
        "energy_rank_90", single.energy_rank_90, ("sigmas",), "smallest k whose sigmas hold 90% of sum sigma^2",
        "count", "[1, M]", "Jolliffe 2002, 6.1", 0, ALL,
    ),
)  # fmt: skip

SHAPE = (
    Metric(
        "aspect_ratio", single.aspect_ratio, ("shape", "squares"), "Q = max(m, n) / min(m, n)", "1", "[1, inf)",
        "Martin & Mahoney 2021", 0, ALL,
    ),
    Metric(
        "condition_number", single.condition_number, ("sigmas", "resolved"), "sigma_1 / sigma_M, where resolved", "1",
        "[1, inf)", "Golub & Van Loan 2013, 2.6", 0, ALL,
    ),
    Metric(
        "entry_std", single.entry_std, ("moments",), "standard deviation of the entries", "weight", "[0, inf)",
        "", 1, ENTRIES,
    ),
    Metric(
        "entry_kurtosis", single.entry_kurtosis, ("moments",), "excess kurtosis of the entries; 0 for a Gaussian", "1",
        "[-2, inf)", "", 0, ENTRIES,
    ),
)  # fmt: skip

CHANGE = (
    Metric(
        "delta_frobenius", pair.delta_frobenius, ("delta_squares",), "||D||_F, D = W1 - W0", "weight", "[0, inf)",
        "", 1, ALL,
    ),
    Metric(
        "delta_relative", pair.delta_relative, ("delta_squares", "base_squares"), "||D||_F / ||W0||_F", "1",
        "[0, inf)", "", 0, ALL,
    ),
    Metric(
        "delta_spectral", pair.delta_spectral, ("delta_sigmas",), "||D||_2", "weight", "[0, inf)", "", 1, ALL,
    ),
    Metric(
        "delta_stable_rank", pair.delta_stable_rank, ("delta_sigmas",), "||D||_F^2 / ||D||_2^2", "1", "[1, M]",
        "Rudelson & Vershynin 2007", 0, ALL,
    ),
    Metric(
        "delta_effective_rank", pair.delta_effective_rank, ("delta_sigmas",),
        "exp of the entropy (nats) of D's sigma / sum sigma", "1", "[1, M]", "Roy & Vetterli 2007", 0, ALL,
    ),
    Metric(
        "delta_changed_share", pair.delta_changed_share, ("changed", "shape"), "share of entries that differ",
        "1", "[0, 1]", "", 0, ENTRIES,
    ),
    Metric(
        "delta_rounding_floor", pair.delta_rounding_floor, ("rounding_squares",),
        "norm that rounding W1 to its dtype alone causes: sqrt(sum ulp^2 / 12)", "weight", "[0, inf)",
        "Higham 2002, 2.1", None, ENTRIES,
    ),
    Metric(
        "value_share", pair.value_share, ("diagonal", "delta_squares"),
        "sum C_ii^2 / ||D||_F^2, C = U0^T D V0: what of the change lies in singular values", "1", "[0, 1]", "",
        0, ALL,
    ),
    Metric(
        "value_share_chance", lambda shape, delta_squares: torch.full_like(delta_squares, 1 / max(shape)),
        ("shape", "delta_squares"), "chance level of value_share: 1 / max(m, n)", "1", "(0, 1]", "", 0, ALL,
    ),
    Metric(
        "spectral_shift_share", pair.spectral_shift_share, ("base_sigmas", "sigmas", "delta_squares"),
        "sum (sigma_i(W1) - sigma_i(W0))^2 / ||D||_F^2", "1", "[0, 1]", "Mirsky 1960", 0, ALL,
    ),
    Metric(
        "intruders", pair.intruders, ("left_overlap",),
        "top 10 left vectors of W1 whose best match in W0 is below 0.5", "count", "[0, 10]",
        "Shuttleworth et al. 2024", 0, frozenset({"rotation", "permutation"}),
    ),
)  # fmt: skip


CLAUSET = "Clauset, Shalizi & Newman 2009"
TAILS = {"pl": "power_law", "tpl": "truncated_power_law", "exp": "exponential", "ln": "log_normal"}
TAIL_VERSION = {"pl": 1, "tpl": 2, "exp": 1, "ln": 2}
"""Laws whose iterations start from tables differ from version 1 in the ninth digit."""

_PARAMETERS = {
    "pl": (("alpha", "exponent of rho ~ lambda^-alpha above xmin", "1", "[1, inf)", 0),
           ("alpha_stderr", "(alpha - 1) / sqrt(values in the tail)", "1", "[0, inf)", 0)),
    "tpl": (("alpha", "alpha of rho ~ lambda^-alpha exp(-rate lambda), at least 1", "1", "[1, inf)", 0),
            ("rate", "rate of the same", "weight^-2", "[0, inf)", -2)),
    "exp": (("rate", "rate of rho ~ exp(-rate lambda)", "weight^-2", "[0, inf)", -2),),
    "ln": (("mu", "mean of ln lambda before truncation at xmin", "ln weight^2", "(-inf, inf)", None),
           ("sigma", "standard deviation of ln lambda, likewise", "1", "[0, inf)", 0)),
}  # fmt: skip


def _tail_rows(short: str) -> list[Metric]:
    """Rows of one family of tail laws, all of one fit."""
    law = TAILS[short]
    called = law.replace("_", " ")
    common = (
        ("xmin", f"where the {called}'s tail begins", "weight^2", "[0, inf)", 2),
        ("ks", f"Kolmogorov-Smirnov distance of the {called}'s tail", "1", "[0, 1]", 0),
        ("tail_count", f"eigenvalues in the {called}'s tail", "count", "[0, M]", 0),
    )
    return [
        Metric(
            f"{short}_{field}",
            attrgetter(field),
            (law,),
            summary,
            unit,
            value_range,
            CLAUSET,
            degree,
            ALL,
            version=TAIL_VERSION[short],
        )
        for field, summary, unit, value_range, degree in (*_PARAMETERS[short], *common)
    ]


def _against_rows(short: str) -> list[Metric]:
    """Rows that hold the power law against another law on the power law's tail."""
    law, name = TAILS[short], f"pl_vs_{short}"
    called = law.replace("_", " ")
    return [
        Metric(name, attrgetter(f"{law}.ratio"), ("tail_comparisons",),
               f"normalised log-likelihood ratio of power law and {called}; positive: power law", "1", "(-inf, inf)",
               "Vuong 1989", 0, ALL, version=TAIL_VERSION[short]),
        Metric(f"{name}_p", attrgetter(f"{law}.p"), ("tail_comparisons",),
               f"two-sided p of {name}: large, neither is better", "1", "[0, 1]", "Vuong 1989", 0, ALL,
               version=TAIL_VERSION[short]),
    ]  # fmt: skip


HEAVY_TAILS = (
    *(row for short in TAILS for row in _tail_rows(short)),
    *(row for short in ("exp", "tpl", "ln") for row in _against_rows(short)),
    Metric(
        "alpha_hat", lambda tail, values: heavy_tails.alpha_hat(tail.alpha, values[:, 0]),
        ("power_law", "eigenvalues"), "pl_alpha log10 lambda_1", "log10 weight^2", "(-inf, inf)",
        "Martin, Peng & Mahoney 2021", None, ALL,
    ),
    Metric(
        "log10_alpha_norm", lambda tail, values: heavy_tails.log10_alpha_norm(values, tail.alpha),
        ("power_law", "tail_eigenvalues"), "log10 sum lambda^pl_alpha", "log10 weight^2", "(-inf, inf)",
        "Martin, Peng & Mahoney 2021", None, ALL,
    ),
)  # fmt: skip


def _p_value(law: str, values: Tensor, *, refit: bool = True) -> Tensor:
    return heavy_tails.p_value(values, law, refit=refit).p  # pyright: ignore[reportArgumentType] (a name of TAILS)


P_VALUES = (
    *(
        Metric(
            f"{short}_pvalue", partial(_p_value, law), ("tail_eigenvalues",),
            f"share of 1,000 bootstrap draws that fit a {law.replace('_', ' ')} worse; small: it is none", "1",
            "[0, 1]", CLAUSET, 0, ALL,
        )
        for short, law in TAILS.items()
    ),
    Metric(
        "pl_pvalue_fixed_xmin", partial(_p_value, "power_law", refit=False), ("tail_eigenvalues",),
        "pl_pvalue with xmin kept on each draw: cheaper, and too large", "1", "[0, 1]", CLAUSET, 0, ALL,
    ),
)  # fmt: skip

RANDOM_MATRIX = (
    *(
        Metric(f"mp_{field}", attrgetter(field), ("bulk",), summary, unit, value_range, source, degree, ALL)
        for field, summary, unit, value_range, source, degree in (
            ("variance", "v of the noise: mean lambda of what remains after spikes are removed", "weight^2", "[0, inf)",
             "Marchenko & Pastur 1967", 2),
            ("edge", "l+ = v (1 + sqrt(M / N))^2, where the noise ends", "weight^2", "[0, inf)",
             "Marchenko & Pastur 1967", 2),
            ("ks", "Kolmogorov-Smirnov distance of the eigenvalues up to l+ from the law", "1", "[0, 1]", "", 0),
            ("spikes", "eigenvalues above l+", "count", "[0, M]", "Martin & Mahoney 2021", 0),
            ("spikes_tw", "eigenvalues above the 99% Tracy-Widom edge: noise has one in 1% of matrices", "count",
             "[0, M]", "Johnstone 2001", 0),
            ("soft_rank", "l+ / lambda_1: about 1 for noise", "1", "[0, 4]", "Martin & Mahoney 2021", 0),
            ("bulk_share", "what eigenvalues up to l+ hold of sum lambda", "1", "[0, 1]", "", 0),
        )
    ),
    Metric(
        "null_w1", random_matrix.null_w1, ("eigenvalues", "null_eigenvalues"),
        "Wasserstein-1 distance of the eigenvalues from those of the permuted entries, over mean lambda", "1", "[0, 2)",
        "", 0, TRANSPOSED,
    ),
    Metric(
        "null_spectral_norm", lambda null_sigmas: null_sigmas[:, 0], ("null_sigmas",),
        "sigma_1 of the same entries in a random order", "weight", "[0, inf)", "", 1, TRANSPOSED,
    ),
    Metric(
        "donoho_gavish_threshold", random_matrix.hard_threshold, ("resolved_sigmas", "shape"),
        "omega(M / N) median sigma: below it a singular value is better dropped", "weight", "[0, inf)",
        "Gavish & Donoho 2014", 1, ALL,
    ),
    Metric(
        "donoho_gavish_rank", random_matrix.rank_above_threshold, ("resolved_sigmas", "shape"),
        "singular values above donoho_gavish_threshold", "count", "[0, M]", "Gavish & Donoho 2014", 0, ALL,
    ),
)  # fmt: skip

SPECTRAL_SHAPE = (
    Metric(
        "peak_count", attrgetter("count"), ("peaks",), "peaks in the density of ln sigma, prominence 5% of the highest",
        "count", "[1, M]", "Scott 1992, 6.3", 0, ALL,
    ),
    Metric(
        "peak_enrichment", pair.peak_enrichment, ("delta_energy", "in_base_peak"),
        "mean ||u0_i^T D||^2 inside the base's spectral peaks over outside", "1", "[0, inf)", "", 0,
        frozenset({"rotation", "permutation"}),
    ),
    Metric(
        "peak_enrichment_pvalue", pair.seeded_pvalue, ("delta_energy", "in_base_peak"),
        "share of 999 permutations of the labels with an enrichment as large", "1", "(0, 1]", "Phipson & Smyth 2010", 0,
        frozenset({"rotation", "permutation"}),
    ),
)  # fmt: skip


def _dimension(side: str, shape: tuple[int, int]) -> int:
    return shape[0] if side == "left" else shape[1]


def _constant(chance: Callable[..., float], side: str) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    """A chance level that depends on the shape alone, as a metric of an overlap."""
    return lambda overlap, size: overlap.new_full((len(overlap),), chance(_dimension(side, size), overlap.shape[-1]))


def _angle_chance(d: int, count: int, *, k: int) -> float:
    return pair.principal_angle_chance(d, k)[1] if k <= count else torch.nan


def _window_chance(side: str, window: Tensor, size: tuple[int, int]) -> Tensor:
    return pair.agreement_window_chance(window, _dimension(side, size))


def _agreement_rows(side: str) -> list[Metric]:
    overlap = f"{side}_overlap"
    who = f"{side} singular vectors"

    def row(name: str, function: Callable[..., Tensor], facts: Sequence[str], summary: str) -> Metric:
        invariant = frozenset({"rotation", "permutation"})
        return Metric(f"{side}_{name}", function, tuple(facts), summary, "1", "[0, 1]", "", 0, invariant)

    def chance(name: str, level: Callable[..., float], summary: str) -> Metric:
        return row(name, _constant(level, side), (overlap, "shape"), f"chance level: {summary}")

    shared = [
        both
        for k in (8, 32)
        for both in (
            row(
                f"subspace_{k}",
                partial(pair.subspace, k=k),
                (overlap,),
                f"||{side} top-{k} overlap||_F^2 / {k}",
            ),
            chance(f"subspace_{k}_chance", lambda d, count, k=k: k / d if k <= count else torch.nan, f"{k} / d"),
        )
    ]
    return [
        row("agreement_mean", pair.mean, (f"{side}_agreement",), f"mean |cos| of matching {who}"),
        chance("agreement_chance", lambda d, count: pair.cosine_chance(d), "mean |cos| of random unit vectors"),
        row("best_match_mean", pair.mean, (f"{side}_best_match",), f"mean over base {who} of the largest |cos|"),
        chance("best_match_chance", pair.best_match_chance, "sqrt(2 ln M / d)"),
        *shared,
        row("agreement_window_mean", pair.mean, (f"{side}_agreement_window",),
            f"mean norm of tuned {who} in the span of base ones with sigma within 5%"),
        row("agreement_window_chance", partial(_window_chance, side), ("window", "shape"),
            "chance level: mean sqrt(vectors in the window / d)"),
    ]  # fmt: skip


def _angle_rows(side: str) -> list[Metric]:
    cosines = f"{side}_cosines"

    def row(name: str, function: Callable[..., Tensor], facts: Sequence[str], summary: str) -> Metric:
        return Metric(f"{side}_{name}", function, tuple(facts), summary, "rad", "[0, pi/2]", "Bjorck & Golub 1973", 0,
                      frozenset({"rotation", "permutation"}))  # fmt: skip

    return [
        both
        for k in (8, 32)
        for both in (
            row(f"angle_{k}", partial(pair.mean_principal_angle, k=k), (cosines,),
                f"mean principal angle between the {side} top-{k} spaces"),
            row(f"angle_{k}_chance", _constant(partial(_angle_chance, k=k), side), (cosines, "shape"),
                f"chance level: random spaces of {k} dimensions"),
        )
    ]  # fmt: skip


GROUPS: dict[str, tuple[Metric, ...]] = {
    "norms": NORMS,
    "ranks": RANKS,
    "shape": SHAPE,
    "change": CHANGE,
    "agreement": (*_agreement_rows("left"), *_agreement_rows("right")),
    "angles": (*_angle_rows("left"), *_angle_rows("right")),
    "heavy_tails": HEAVY_TAILS,
    "random_matrix": RANDOM_MATRIX,
    "spectral_shape": SPECTRAL_SHAPE,
    "p_values": P_VALUES,
}
"""Metrics by group; a group's name stands for its members. A metric is added to one, with its row in the property table
of the tests."""

DEFAULT = ("norms", "ranks", "shape", "change", "agreement")
"""Groups that are computed unless others are named."""

LEFT_OUT = ("p_values",)
"""Groups that ``all`` does not hold, as they take minutes."""

CATALOG: dict[str, Metric] = {row.name: row for rows in GROUPS.values() for row in rows}
"""Metrics by name."""


def choose_metrics(chosen: str | Iterable[str | Metric] | None, *, pair: bool) -> list[Metric]:
    """Return the metrics of a scan or a comparison.

    Args:
        chosen: Names of metrics, of groups, or of installed extensions, or metrics of one's own; text is names
            separated by commas. ``all`` is everything but p-values; ``None`` is the default groups.
        pair: Whether two matrices are compared. Where there is one, pair metrics of a group are left out.

    Raises:
        SelectionError: A name is not known, is given twice, or speaks of two matrices where there is one.
    """
    if chosen is None:
        chosen = DEFAULT
    elif isinstance(chosen, str):
        chosen = split_names(chosen)
    named: list[Metric] = []
    grouped: list[Metric] = []
    for choice in chosen:
        members = _group(choice) if isinstance(choice, str) else None
        if members is None:
            named.append(_find(choice) if isinstance(choice, str) else choice)
        else:
            grouped += [m for m in members if pair or not m.pair]
    _check(named, pair=pair)
    names = {m.name for m in named}
    found = list({m.name: m for m in grouped if m.name not in names}.values()) + named
    if not found:
        raise SelectionError("no metric is chosen. Name one, or leave the option out for the usual ones.")
    return found


def split_names(text: str) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _group(name: str) -> tuple[Metric, ...] | None:
    """Members of a group, ``None`` if there is none of that name."""
    if name == "all":
        return tuple(m for group, rows in GROUPS.items() if group not in LEFT_OUT for m in rows)
    return GROUPS.get(name)


def _check(named: list[Metric], *, pair: bool) -> None:
    names = [m.name for m in named]
    for m in named:
        if names.count(m.name) > 1:
            raise SelectionError(f"metric {m.name!r} is given twice. Rename one of them, or leave one out.")
        if m.pair and not pair:
            raise SelectionError(f"metric {m.name!r} speaks of two checkpoints. Use it with compare.")


def installed_metrics() -> dict[str, Any]:
    """Return the entry points of installed extensions by name; nothing is loaded."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _find(name: str) -> Metric:
    if name in CATALOG:
        return CATALOG[name]
    extensions = installed_metrics()
    if name not in extensions:
        known = [*CATALOG, *GROUPS, "all", *extensions]
        raise SelectionError(f"unknown metric {name!r}.{suggest(name, known)} `diffract metrics` lists them.")
    loaded = extensions[name].load()
    if not isinstance(loaded, Metric):
        raise SelectionError(f"entry point {name!r} is a {type(loaded).__name__}, expected a diffract.metric.")
    return loaded
