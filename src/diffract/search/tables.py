"""Tables of searches, and their run folders.

Every search has

``points``   one row per point of a curve, split and task: quality, and the paired difference to the tuned model
``choice``   what was chosen on the selection split, and what the held-out split says of it
``items``    one row per state, split, task and item: what all else is computed from

``search rewind`` further has

``effects``  one row per head: what rewinding it alone gains, and what the cheaper orders go by
``orders``   one row per order: how well its scores rank heads as measured effects do

``connect`` has ``paths``, ``pairs``, ``simplex`` and ``items``.

The same model is one ``state``, a number, wherever it is met; state 0 is the tuned model itself. ``low`` and ``high``
are the ends of an interval; a ``gain`` is a difference with the sign that makes better positive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import polars as pl

from diffract.tables import RunTables

QUALITY: dict[str, Any] = {
    "state": pl.Int32,
    "split": pl.String,
    "task": pl.String,
    "quality": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "items": pl.Int64,
    "difference": pl.Float64,
    "diff_low": pl.Float64,
    "diff_high": pl.Float64,
    "gain": pl.Float64,
    "gain_low": pl.Float64,
    "gain_high": pl.Float64,
    "p": pl.Float64,
}
"""Columns of ``points`` after those that say which: quality and its interval over ``items`` items; against the tuned
model the ``difference``, the ``gain``, their paired intervals, and the two-sided p-value.
"""

ON_CURVE: dict[str, Any] = {
    "order": pl.String,
    "seed": pl.Int32,
    "reverse": pl.Boolean,
    "fraction": pl.Float64,
    "count": pl.Int32,
    "heads": pl.List(pl.String),
}
"""Columns of ``points`` and ``choice`` of a rewind search: the first ``count`` heads in an order were rewound, a
``fraction`` of all. Rows with order ``base`` are the base model, for comparison; they have no heads.
"""

EFFECTS: dict[str, Any] = {
    "name": pl.String,
    "layer": pl.Int32,
    "block": pl.String,
    "head": pl.Int32,
    "state": pl.Int32,
    "task": pl.String,
    "effect": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "p": pl.Float64,
    "p_holm": pl.Float64,
    "magnitude": pl.Float64,
    "reference": pl.Float64,
    "first_order": pl.Float64,
    "activation": pl.Float64,
}
"""Columns of ``effects``: ``effect`` is the gain of rewinding this head alone on the selection split, with its paired
interval; ``p`` is two-sided, ``p_holm`` the same for all heads together (Holm). Null where it was not measured. What
cheaper orders go by: ``magnitude`` is ||W1 - W0||_F of the head, ``reference`` the reference-domain score,
``first_order`` the gain that the slope of the loss promises, ``activation`` the root mean square of D x. Effects on
further tasks follow as ``effect_TASK``.
"""

ORDER_ROWS: dict[str, Any] = {"order": pl.String, "spearman": pl.Float64, "heads": pl.Int32}
"""Columns of ``orders``: rank correlation with ``effect`` over heads, signed so that 1 is the order of greedy."""

_CHOSEN: dict[str, Any] = {
    "which": pl.String,
    "control": pl.Boolean,
    "state": pl.Int32,
    "task": pl.String,
    **{
        f"{split}_{name}": pl.Float64
        for split in ("selection", "held_out")
        for name in ("quality", "low", "high", "gain", "gain_low", "gain_high", "p")
    },
}

CHOICE: dict[str, Any] = ON_CURVE | _CHOSEN
"""Columns of ``choice``: ``which`` is ``best`` (the highest gain on the selection split) or ``without-loss`` (the
furthest point without loss there); ``control`` tells curves that stand for comparison; then what each split says.
"""

ITEMS: dict[str, Any] = {
    "state": pl.Int32,
    "split": pl.String,
    "task": pl.String,
    "item": pl.String,
    "value": pl.Float64,
    "weight": pl.Float64,
    "output": pl.String,
}
"""Columns of ``items``: quality of a task is sum(``value``) / sum(``weight``)."""


ON_TRUNCATION: dict[str, Any] = {
    "rule": pl.String,
    "seed": pl.Int32,
    "fraction": pl.Float64,
    "directions": pl.Int64,
    "energy": pl.Float64,
    "bytes": pl.Float64,
    "drop": pl.Float64,
}
"""Columns of ``points`` and ``choice`` of a truncation search: ``fraction`` of directions that the curve drops (of rule
``energy``: of the energy), or of those of the curve ``drop`` that a control is matched to. Of the change D = W1 - W0 of
all matrices what is kept: how many singular ``directions``, of DARE none; the share of ``energy``, sum ||D||_F^2; the
share of ``bytes`` (see ``change.py``). ``drop`` is DARE's probability. Rows with rule ``base`` are the base model.
"""

TRUNCATION_CHOICE: dict[str, Any] = ON_TRUNCATION | _CHOSEN


PATHS: dict[str, Any] = {
    "a": pl.String,
    "b": pl.String,
    "at": pl.Float64,
    "state": pl.Int32,
    "task": pl.String,
    "quality": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "linear": pl.Float64,
    "gap": pl.Float64,
    "gap_low": pl.Float64,
    "gap_high": pl.Float64,
}
"""Columns of ``paths``: quality of (1 - at) a + at b on the held-out split; ``linear`` is the line between the ends'
qualities there, and ``gap`` how much worse than it the model is, positive is worse.
"""

PAIRS: dict[str, Any] = {
    "a": pl.String,
    "b": pl.String,
    "task": pl.String,
    "counts": pl.Boolean,
    "quality_a": pl.Float64,
    "quality_b": pl.Float64,
    "barrier": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "at": pl.Float64,
    "connected": pl.Boolean,
    "pair_connected": pl.Boolean,
}
"""Columns of ``pairs``: ``barrier`` is the largest ``gap`` on the path, both ends included, so at least 0, and ``at``
where it is. ``connected``: the interval's upper end is below the tolerance; ``pair_connected``: in every task that
``counts``.
"""

SIMPLEX: dict[str, Any] = {
    "models": pl.List(pl.String),
    "weights": pl.List(pl.Float64),
    "state": pl.Int32,
    "task": pl.String,
    "quality": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}
"""Columns of ``simplex``: held-out quality of base + scale * sum of ``weights`` times (``models`` - base)."""


@dataclass(frozen=True)
class ConnectTables(RunTables):
    """The tables of ``connect``.

    Attributes:
        paths: One row per pair, place on the path between them, and task.
        pairs: One row per pair and task.
        simplex: One row per mixture of three models and task; empty for other numbers of models.
        items: One row per state, task and item.
        manifest: Version, settings, models with digests, warnings.
    """

    KINDS = ("connect",)
    SCHEMAS = {"paths": PATHS, "pairs": PAIRS, "simplex": SIMPLEX, "items": ITEMS}  # noqa: RUF012

    paths: pl.DataFrame
    pairs: pl.DataFrame
    simplex: pl.DataFrame
    items: pl.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TruncateTables(RunTables):
    """The tables of ``search truncate``.

    Attributes:
        points: One row per point of a curve, split and task.
        choice: Two rows per curve.
        items: One row per state, split, task and item.
        manifest: Version, settings, models with digests, warnings.
    """

    KINDS = ("search truncate",)
    SCHEMAS = {"points": ON_TRUNCATION | QUALITY, "choice": TRUNCATION_CHOICE, "items": ITEMS}  # noqa: RUF012

    points: pl.DataFrame
    choice: pl.DataFrame
    items: pl.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewindTables(RunTables):
    """The tables of ``search rewind``.

    Attributes:
        points: One row per point of a curve, split and task.
        effects: One row per head.
        orders: One row per order.
        choice: Two rows per curve.
        items: One row per state, split, task and item.
        manifest: Version, settings, models with digests, warnings.
    """

    KINDS = ("search rewind",)
    SCHEMAS = {  # noqa: RUF012
        "points": ON_CURVE | QUALITY,
        "effects": EFFECTS,
        "orders": ORDER_ROWS,
        "choice": CHOICE,
        "items": ITEMS,
    }

    points: pl.DataFrame
    effects: pl.DataFrame
    orders: pl.DataFrame
    choice: pl.DataFrame
    items: pl.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)
