"""Which matrices are drawn for: noise beside a change, and nulls of single matrices, within what the rest costs.

All is foretold from shapes, never measured by a clock, so that the same models give the same choice on any machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from diffract.analysis.facts import MetricPlan
from diffract.analysis.work import PAIR_COST, AnyTask, HeadTask, TensorTask
from diffract.matrices import Matrix, pair_seconds, scan_cost, scan_seconds
from diffract.matrices.layout import (
    PAIR_PRODUCTS,
    PAIR_VECTORS_SECONDS,
    PRODUCT_SECONDS,
    READ_SECONDS,
    VALUES_SECONDS,
)
from diffract.metrics import behind
from diffract.metrics.facts import TAIL_LAWS
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

NULLS_SHARE = 0.8
"""What nulls may take of the rest: both take at most twice the rest, though what is foretold errs by a tenth."""

FREE_SECONDS = 0.25
"""What drawing nulls may take of one core in any case: a fraction of what starting Python and torch takes."""

DRAW_VALUE_SECONDS, DRAW_ENTRY_SECONDS = 2.5e-6, 9e-9
"""What a Gaussian with a matrix's norms takes beside product and eigensolver: for each of its singular values, and per
entry that is drawn, scaled and cast. Measured, like all prices here, with one thread at 16 x 64 to 1024 x 1024."""

PAIR_OF_DRAWS_SECONDS = 2e-3
"""What two of them take for themselves, whose vectors are compared."""

LAW_SECONDS = 3e-4
"""What the law of row and column norms takes for each row and column that it tells apart."""

PRICES = {
    **dict.fromkeys([f"{law}_candidates" for law in TAIL_LAWS], (5e-4, 1e-5)),
    "bulk": (5e-4, 0.0),
    "peaks": (2e-3, 1e-5),
}
"""What deriving a fact takes of one core: for each matrix, and for each of its singular values."""

NULL_PRICES = {
    **dict.fromkeys(("rowcol_peaks", "row_peaks"), (1.5e-3, 1e-5)),
    "dip_pvalue": (8e-3, 1.5e-5),
    "mp_spikes_tw_rowcol": (6e-4, 2e-6),
    "rowcol_alphas": (1e-3, 5e-5),
    "pl_alpha_stderr": (1e-3, 5e-5),
}
"""The same of what is found of all draws, or resamples, of a matrix: facts, and metrics that find it themselves."""


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


def null_seconds(matrix: Matrix, plan: MetricPlan) -> float:
    """Return how long one core takes for the nulls of a matrix, about, from its shape."""
    wanted = behind(fact for metric in plan.metrics for fact in metric.facts) | {m.name for m in plan.metrics}
    entries, short = matrix.entries, min(matrix.shape)
    values = DRAW_VALUE_SECONDS * short + VALUES_SECONDS * short**3
    draw = (DRAW_ENTRY_SECONDS + PRODUCT_SECONDS * short) * entries + values
    vectors = PAIR_PRODUCTS * PRODUCT_SECONDS * short * entries + PAIR_VECTORS_SECONDS * short**3
    pair = PAIR_OF_DRAWS_SECONDS + 2 * DRAW_ENTRY_SECONDS * entries + vectors
    prices = {
        **dict.fromkeys(("rowcol_sigmas", "row_sigmas"), DRAWS * draw),
        "rowcol_agreement": PAIR_DRAWS * pair,
        "separable": LAW_SECONDS * sum(min(side, GROUPS) for side in matrix.shape),
        **{name: each + per_value * short for name, (each, per_value) in NULL_PRICES.items()},
    }
    return sum(price for name, price in prices.items() if name in wanted)


def _own_seconds(matrix: Matrix, plan: MetricPlan) -> float:
    """Return how long one core takes for the metrics of a matrix without nulls, once its spectrum is known, about."""
    wanted = behind(fact for metric in plan.metrics for fact in metric.facts)
    short = min(matrix.shape)
    permuted = PRODUCT_SECONDS * matrix.entries * short + VALUES_SECONDS * short**3
    prices = {name: each + per_value * short for name, (each, per_value) in PRICES.items()}
    prices["null_sigmas"] = permuted
    return sum(price for name, price in prices.items() if name in wanted)


def choose_nulls(matrices: Sequence[Matrix], plan: MetricPlan, tasks: Sequence[AnyTask]) -> frozenset[str]:
    """Return the names of the matrices for which nulls are drawn unless all are asked for.

    They are chosen ``in_turns`` until there are ``MOST_NULLS``, or what they take is ``NULLS_SHARE`` of what the tasks
    take without them, or ``FREE_SECONDS``. All is foretold from shapes.

    Args:
        matrices: Those of one model.
        plan: What is computed.
        tasks: Everything that is computed of these, of one model or of models that are compared.
    """
    without = replace(plan, nulls=frozenset())
    rest = sum(foretold_seconds(task, without) for task in tasks)
    chosen, left = [], max(NULLS_SHARE * rest, FREE_SECONDS)
    models = max(_models(task, plan) for task in tasks if isinstance(task, TensorTask))
    for m in in_turns(matrices):
        seconds = models * null_seconds(m, plan)
        if len(chosen) < MOST_NULLS and seconds <= left:
            chosen.append(m.name)
            left -= seconds
    return frozenset(chosen)


def _models(task: TensorTask, plan: MetricPlan) -> int:
    """Return of how many models a task finds the numbers of a single matrix."""
    return 1 if plan.apart else 1 + len(task.tuned)


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

    Draws count, those of noise as further comparisons, those of nulls as ``null_seconds`` foretells them.
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
    of_each = sum(_own_seconds(m, plan) for m in task.matrices) + sum(null_seconds(m, plan) for m in drawn)
    return seconds + _models(task, plan) * of_each
