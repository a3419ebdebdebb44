"""Which matrices are drawn for: noise beside a change, and nulls of single matrices, within what the rest costs.

All is foretold from shapes, never measured by a clock, so that the same models give the same choice on any machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from diffract.analysis.facts import MetricPlan
from diffract.analysis.work import PAIR_COST, AnyTask, HeadTask, TensorTask
from diffract.matrices import Matrix, pair_seconds, scan_cost, scan_seconds
from diffract.matrices.layout import READ_SECONDS
from diffract.metrics import behind
from diffract.metrics.nulls import DRAWS, PAIR_DRAWS
from diffract.metrics.separable import GROUPS

MOST_NOISE = 8
"""Matrices of each role for which noise is drawn unless it is drawn for all."""

NOISE_SHARE = 0.25
"""What noise may cost, of the plan."""

SMALL_PLAN = 1.2e11
"""A plan so cheap, some ten seconds of one core, that noise is drawn for all of its matrices."""

MOST_NULLS = 32
"""Matrices for which nulls are drawn unless all are asked for."""

FREE_COST = 1.2e10
"""What drawing nulls may cost in any case, as ``scan_cost`` counts: a second of one core."""

SCAN_SHARE, METRICS_COST = 1 / 3, 1.5e8
"""What the other metrics of a matrix take beside which nulls are drawn: so much of what is foretold, and so much more
whatever its size (measured at 16 x 128 to 1024 x 1024)."""


def in_turns(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Return matrices in the order in which some of them are chosen to be drawn for.

    Roles (block and projection) take turns, the cheapest matrix first; each role's own are in a seeded random order.
    """
    roles: dict[tuple[str | None, str | None], list[Matrix]] = {}
    for m in matrices:
        roles.setdefault((m.block, m.projection), []).append(m)
    orders = [torch.randperm(len(role), generator=torch.Generator().manual_seed(0)).tolist() for role in roles.values()]
    shuffled = [[role[i] for i in order] for role, order in zip(roles.values(), orders, strict=True)]
    turns = [(turn, scan_cost([m]), m.name, m) for role in shuffled for turn, m in enumerate(role)]
    return [m for *_, m in sorted(turns, key=lambda one: one[:3])]


def null_cost(matrix: Matrix, plan: MetricPlan) -> float:
    """Return what the nulls of a matrix cost, as ``scan_cost`` counts, from its shape; measured like ``SCAN_SHARE``."""
    wanted = behind(fact for metric in plan.metrics for fact in metric.facts)
    draws = DRAWS * (scan_cost([matrix]) / 8 + 6e6)  # sigmas of a Gram matrix alone, and counts of peaks, dips, spikes
    pairs = PAIR_DRAWS * (scan_cost([matrix]) + 4e7)  # vectors of both, and all of their overlaps
    law = 4e6 * sum(min(side, GROUPS) for side in matrix.shape)
    resamples = 5e7 + 1.2e6 * min(matrix.shape)  # the whole fit, in the bootstrap of its exponent
    prices = {"rowcol_sigmas": draws, "row_sigmas": draws, "rowcol_agreement": pairs, "separable": law}
    return sum(price for fact, price in {**prices, "power_law": resamples}.items() if fact in wanted)


def choose_nulls(matrices: Sequence[Matrix], plan: MetricPlan, cost: float) -> frozenset[str]:
    """Return the names of the matrices for which nulls are drawn unless all are asked for.

    They are chosen ``in_turns`` until there are ``MOST_NULLS``, or what they cost equals what else the metrics of all
    matrices take, ``FREE_COST`` at least. All is foretold from shapes.

    Args:
        matrices: Those of one model.
        plan: What is computed.
        cost: Of the rest of the plan, as tasks tell it.
    """
    chosen, left = [], max(SCAN_SHARE * cost + METRICS_COST * len(matrices), FREE_COST)
    for m in in_turns(matrices):
        if len(chosen) < MOST_NULLS and null_cost(m, plan) <= left:
            chosen.append(m.name)
            left -= null_cost(m, plan)
    return frozenset(chosen)


def choose_noise(tasks: Sequence[AnyTask], *, times: int = 1) -> frozenset[str]:
    """Return the names of the matrices for which noise is drawn unless it is asked for all or for none.

    All of a ``SMALL_PLAN``, which a series of comparisons is that asks for these tasks ``times`` times. Else they are
    chosen ``in_turns``, ``MOST_NOISE`` of each role, as long as together they cost no more than ``NOISE_SHARE`` of the
    plan, foretold from shapes: each role has one before any has two.
    """
    plan = sum(task.cost for task in tasks)
    paired = {m.name: len(t.tuned) for t in tasks if isinstance(t, TensorTask) for m in t.matrices if t.tuned}
    matrices = [m for t in tasks if isinstance(t, TensorTask) for m in t.matrices if t.tuned]
    if times * plan <= SMALL_PLAN:
        return frozenset(paired)
    chosen, spent, counts = [], 0.0, Counter()
    for m in in_turns(matrices):
        role, price = (m.block, m.projection), PAIR_COST * paired[m.name] * scan_cost([m])
        if counts[role] < MOST_NOISE and spent + price <= NOISE_SHARE * plan:
            chosen.append(m.name)
            spent += price
            counts[role] += 1
    return frozenset(chosen)


SPECTRA = ("sigma_max", "sigmas", "resolved", "delta_sigmas", "left_cosines", "right_cosines", "diagonal")
"""Facts for which products and eigenvalues are taken."""

RATE = 2.5e10
"""What one core does in a second of what ``scan_cost`` counts: between heads, 1.4e10, and large matrices, 7.7e10."""


def foretold_seconds(task: AnyTask, plan: MetricPlan) -> float:
    """Return how long one core takes for a task of a plan, about: what shares of the work are cut by.

    Draws count, those of noise as further comparisons, those of nulls as ``null_cost`` foretells them.
    """
    if isinstance(task, HeadTask):
        return READ_SECONDS * task.cost
    if not isinstance(task, TensorTask):
        return task.cost / RATE
    spectra = plan.needs(*SPECTRA)
    if not task.tuned:
        seconds = scan_seconds(task.matrices, spectra=spectra)
    else:
        seconds = len(task.tuned) * pair_seconds(task.matrices, spectra=spectra)
        seconds += plan.apart * scan_seconds(task.matrices, spectra=spectra)
    noisy = [m for m in task.matrices if plan.noise is None or m.name in plan.noise]
    seconds += len(plan.noises) * len(task.tuned) * pair_seconds(noisy, spectra=spectra)
    nulls = plan.needs("drawn")
    drawn = [m for m in task.matrices if nulls and (plan.nulls is None or m.name in plan.nulls)]
    models = 1 if plan.apart else 1 + len(task.tuned)
    return seconds + models * sum(null_cost(m, plan) for m in drawn) / RATE
