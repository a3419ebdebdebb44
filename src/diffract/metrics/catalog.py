"""Every metric by group, in the order of the table's columns; and which function derives which fact.

A metric declares itself where it is computed (``built_in``); it is in the catalog by its name here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from diffract.errors import SelectionError, suggest
from diffract.metrics import agreement, heavy_tails, nulls, pair, peaks, profile, random_matrix, separable, single
from diffract.metrics.facts import FACTS, TAIL_LAWS, Metric
from diffract.metrics.heavy_tails import significance
from diffract.metrics.heavy_tails.fit import Candidates, fit_candidates, order, scan_distances, search
from diffract.settings import METRIC_ENTRY_POINTS

GROUPS: dict[str, tuple[Metric, ...]] = {
    "norms": (single.frobenius_norm, single.spectral_norm, single.nuclear_norm),
    "ranks": (
        single.stable_rank,
        single.effective_rank,
        single.participation_ratio,
        single.numerical_rank,
        single.energy_rank_90,
    ),
    "shape": (single.aspect_ratio, single.condition_number, single.entry_std, single.entry_kurtosis),
    "change": (
        pair.delta_frobenius,
        pair.delta_relative,
        pair.delta_spectral,
        pair.delta_stable_rank,
        pair.delta_effective_rank,
        pair.delta_changed_share,
        pair.delta_rounding_floor,
        pair.value_share,
        pair.value_share_chance,
        pair.value_share_turned,
        pair.spectral_shift_share,
        pair.sigma_change_relative,
        pair.scale_change,
        pair.delta_free_relative,
        pair.value_share_free,
        pair.spectral_shift_share_free,
        agreement.intruders,
    ),
    "agreement": agreement.AGREEMENT,
    "angles": agreement.ANGLES,
    "agreement_levels": nulls.AGREEMENT_LEVELS,
    "heavy_tails": (*heavy_tails.METRICS, nulls.pl_alpha_rowcol, nulls.pl_alpha_rowcol_pvalue),
    "random_matrix": (
        *random_matrix.BULK,
        nulls.mp_spikes_tw_rowcol,
        *separable.METRICS,
        random_matrix.null_w1,
        random_matrix.null_spectral_norm,
        random_matrix.donoho_gavish_threshold,
        random_matrix.donoho_gavish_rank,
    ),
    "spectral_shape": (
        peaks.PEAK_COUNT,
        *nulls.ROWCOL_PEAKS,
        nulls.dip_pvalue,
        profile.peak_enrichment,
        profile.seeded_enrichment_pvalue,
    ),
    "peak_nulls": nulls.ROW_PEAKS,
    "profile": profile.PROFILE,
    "p_values": heavy_tails.P_VALUES,
}
"""Metrics by group; a group's name stands for its members. A metric is added to one, and its definition in NumPy to the
tests, which hold it and its claims against it."""

DEFAULT = ("norms", "ranks", "shape", "change", "agreement")
"""Groups that are computed unless others are named."""

LEFT_OUT = ("peak_nulls", "p_values")
"""Groups that ``all`` does not hold: further draws, for which fewer matrices would have any, and what takes minutes."""

CATALOG: dict[str, Metric] = {row.name: row for rows in GROUPS.values() for row in rows}
"""Metrics by name."""


# Derived facts


def eigenvalues(sigmas: Tensor, shape: tuple[int, int]) -> Tensor:
    """lambda_i = sigma_i^2 / N, N = max(m, n) (Martin & Mahoney 2021)."""
    return sigmas.square() / max(shape)


def _resolved(sigmas: Tensor, floor: Tensor) -> Tensor:
    """Singular values; those that the method cannot tell from zero are zero."""
    return sigmas.where(sigmas > floor[:, None], 0.0)


def _compared(values: Tensor, tail: heavy_tails.PowerLaw, *laws: Candidates) -> heavy_tails.Comparisons:
    parameters = (law.parameters_at(tail.tail_count) for law in laws)
    return heavy_tails.compare_laws(values, tail.xmin, dict(zip(TAIL_LAWS, parameters, strict=True)))


def _agreement_by_norms(drawn: Tensor, *own: Tensor) -> dict[str, Tensor]:
    measure = lambda known: nulls.agreements(Facts(known))  # noqa: E731
    return nulls.unrelated_pairs(nulls.Own(*own[:4]), nulls.Own(*own[4:]), drawn, measure=measure)


DERIVED: dict[str, Callable[..., Any]] = {
    "eigenvalues": eigenvalues,
    "null_eigenvalues": eigenvalues,
    "resolved_sigmas": _resolved,
    "resolved_eigenvalues": eigenvalues,
    "bulk": random_matrix.fit_bulk,
    "bulk_warnings": random_matrix.bulk_warnings,
    "shaped_sigmas": single.shaped,
    "tail_eigenvalues": eigenvalues,
    "base_resolved_sigmas": _resolved,
    "base_shaped_sigmas": single.shaped,
    "ordered_tails": order,
    **{f"{law}_candidates": partial(fit_candidates, law=significance.LAWS[law]) for law in TAIL_LAWS},
    "power_law_scan": scan_distances,
    # A figure wants the scan of all distances whole, so the least one is taken of it and not searched for.
    "power_law": lambda candidates, scan: heavy_tails.PowerLaw.of(
        candidates.nearest(scan[candidates.tails.row, candidates.tails.last])
    ),
    "truncated_power_law": lambda candidates: heavy_tails.TruncatedPowerLaw.of(search(candidates)),
    "exponential": lambda candidates: heavy_tails.Exponential.of(search(candidates)),
    "log_normal": lambda candidates: heavy_tails.LogNormal.of(search(candidates)),
    "tail_comparisons": _compared,
    "tail_warnings": lambda tail, values: heavy_tails.describe_warning(heavy_tails.tail_warning(tail, values), tail),
    "peaks": peaks.spectral_peaks,
    "rowcol_sigmas": nulls.rowcol_sigmas,
    "separable": separable.separable_law,
    "separable_warnings": separable.separable_warnings,
    "sep_sigmas": separable.sep_sigmas,
    "rowcol_peaks": nulls.drawn_peaks,
    "rowcol_alphas": nulls.drawn_alphas,
    "row_sigmas": nulls.row_sigmas,
    "row_peaks": nulls.drawn_peaks,
    "rowcol_agreement": _agreement_by_norms,
    "base_peaks": peaks.spectral_peaks,
    "scale_change": pair.scale_change,
    "free_squares": pair.free_squares,
    "energy_expected": profile.expected_energy,
    "energy_ratio": profile.energy_ratio,
    "energy_by_peak": profile.by_peak,
    "directions": agreement.resolved_directions,
    "base_directions": agreement.resolved_directions,
    "window": agreement.window,
    **{f"{side}_overlap": agreement.overlap for side in ("left", "right")},
    **{f"{side}_agreement": agreement.agreement for side in ("left", "right")},
    **{f"{side}_best_match": agreement.best_match for side in ("left", "right")},
    **{f"{side}_agreement_window": agreement.agreement_window for side in ("left", "right")},
}
"""What derives a fact from its ``sources``, in their order."""


class Facts(dict[str, Any]):
    """Facts by name; a derived one is computed when it is first asked for."""

    def __missing__(self, name: str) -> Any:
        if name not in DERIVED:
            raise KeyError(name)
        self[name] = value = DERIVED[name](*(self[source] for source in FACTS[name].sources))
        return value


# Choosing


def choose_metrics(chosen: str | Iterable[str | Metric] | None, *, pair: bool) -> list[Metric]:
    """Return the metrics of a scan or a comparison.

    Args:
        chosen: Names of metrics, of groups, or of installed extensions, or metrics of one's own; text is names
            separated by commas. ``all`` is everything but ``LEFT_OUT``; ``None`` is the default groups.
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
        if not isinstance(choice, str):
            named.append(choice)
        elif choice == "all" or choice in GROUPS:
            groups = GROUPS.keys() - LEFT_OUT if choice == "all" else {choice}
            grouped += [m for group in GROUPS if group in groups for m in GROUPS[group] if pair or not m.pair]
        else:
            named.append(_find(choice))
    names = [m.name for m in named]
    for m in named:
        if names.count(m.name) > 1:
            raise SelectionError(f"metric {m.name!r} is given twice. Rename one of them, or leave one out.")
        if m.pair and not pair:
            raise SelectionError(f"metric {m.name!r} speaks of two checkpoints. Use it with compare.")
    # A metric that is given by itself stands for the one of that name in a group.
    found = list({m.name: m for m in grouped if m.name not in names}.values()) + named
    if not found:
        raise SelectionError("no metric is chosen. Name one, or leave the option out for the usual ones.")
    return found


def split_names(text: str) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def installed_metrics() -> dict[str, Any]:
    """Return the entry points of installed extensions by name; nothing is loaded."""
    return {point.name: point for point in entry_points(group=METRIC_ENTRY_POINTS)}


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
