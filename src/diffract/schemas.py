"""The tables of every kind of run and their columns.

Every kind of run over checkpoints has

``models``    one row per model: what it is, and model-level numbers
``tensors``   one row per model and stored tensor: what became of it (analysed, tied, unmatched, ...)

A scan, a comparison or a trajectory

``metrics``   one row per model and matrix: labels, how it was computed, then one column per metric
``spectra``   one row per model, matrix and quantity (``sigma``, ``delta_sigma``, ``left_agreement``, ...): a list

A comparison also

``heads``     one row per tuned model and head
``vectors``   one row per tuned model and tensor that is no matrix (norms, biases, gains): how much it changed
``tokens``    one row per token whose row in a table of tokens changed out of line with the others
``configuration``  one row per difference of configuration, tokenizer, generation settings and storage

The heads of several domains

``heads``     one row per domain and head: how much it changed, and what of that other domains share
``domains``   one row per pair of domains
``scores``    one row per domain, reference domain and head
``lorenz``    the points of each domain's Lorenz curve

A share of the work of several processes

``tasks``     one row per task, a tensor: what it was foretold to take, and what it took

The lineage of several checkpoints

``lineage``   one row per pair: the word, and the correlation of the entries
``tree``      one row per branch

An audit

``facts``     one row per fact about a checkpoint that its numbers do not tell

An evaluation

``items``     one row per task and item
``summary``   one row per task: quality and its interval

A search of heads or directions

``points``   one row per point of a curve, split and task: quality, and the paired difference to the tuned model
``choice``   what was chosen on the selection split, and what the held-out split says of it
``items``    one row per state, split, task and item: what all else is computed from
``effects``  of heads: one row per head, what rewinding it alone gains, and what the cheaper orders go by
``orders``   of heads: one row per order, how well its scores rank heads as measured effects do

A search for factors has ``points``, ``choice`` and ``items`` too, and

``factors``  one row per singular direction, or whole part, that has a factor: what was learned of it

A search between models has ``paths``, ``pairs``, ``simplex`` and ``items``; a study ``findings`` and ``numbers``.

In searches the same model is one ``state``, a number, wherever it is met; state 0 is the tuned model itself. ``low``
and ``high`` are the ends of an interval; a ``gain`` is a difference with the sign that makes better positive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from diffract.attention import HEADS


def _of(dtype: Any, names: Sequence[str]) -> dict[str, Any]:
    """Columns of one type, in the order in which they are named."""
    return dict.fromkeys(names, dtype)


LABELS: dict[str, Any] = {
    **_of(pl.String, ["model", "name", "tensor"]),
    "layer": pl.Int32,
    **_of(pl.String, ["block", "projection"]),
    **_of(pl.Int32, ["head", "kv_head", "expert"]),
    **_of(pl.Int64, ["rows", "cols"]),
    "dtype": pl.String,
}
"""Columns that say which matrix a row speaks of; ``(model, name)`` is unique."""

OUTCOME: dict[str, Any] = {**_of(pl.String, ["status", "method"]), "resolved": pl.Float64, "warning": pl.String}
"""``status`` ok | zero | non_finite | unpaired | failed; ``method`` of the spectrum, and the smallest sigma that it
resolves; ``warning``: what speaks against the fitted power law, where there is one.
"""

SPECTRA: dict[str, Any] = {**_of(pl.String, ["model", "name", "quantity"]), "values": pl.List(pl.Float64)}

MODELS: dict[str, Any] = {
    **_of(pl.String, ["model", "role", "reference", "family"]),
    **_of(pl.Int64, ["parameters", "size_bytes"]),
    **_of(pl.Int32, ["tensors", "matrices"]),
    "digest": pl.String,
}
"""``role`` is ``model`` (scan), ``base`` or ``tuned`` (compare), ``checkpoint`` (trajectory); model-level numbers
follow as further columns.
"""

TIMELINE: dict[str, Any] = {"order": pl.Int32, "stage": pl.Int32, "step": pl.Int64, "tokens": pl.Int64}
"""Columns of ``metrics`` and ``models`` in a trajectory: place in the series from 0 on, and what the names tell."""

AGAINST: dict[str, Any] = {"against": pl.String}
"""Column of ``models`` in a trajectory: which checkpoint each is compared with; null for the first."""

RELATION: dict[str, Any] = {"lineage": pl.String, "lineage_correlation": pl.Float64}
"""Columns of ``models`` where models are compared: how each is related to what it is compared with, and the median
correlation of their matrices' entries. Of a ``stranger``, and of a ``rearranged`` model whose parts lie under other
names, the numbers of a whole change are null. Rows of ``metrics``, or of ``heads`` in a run of heads, keep theirs
beside the word ``lineage``."""

BREAKS: dict[str, Any] = {"breaks": pl.Boolean}
"""Column of ``models`` in a trajectory: whether a checkpoint falls out of line with the one before it."""

TENSORS: dict[str, Any] = {
    **_of(pl.String, ["model", "tensor"]),
    "shape": pl.List(pl.Int64),
    "dtype": pl.String,
    "size_bytes": pl.Int64,
    **_of(pl.String, ["outcome", "note"]),
}
"""``outcome``: analysed | retyped | unmatched | resized | tied | not_selected | vector | not_matrix | not_float |
empty | buffer | set_aside.

``set_aside`` ones are no weights: scales of quantised weights, optimizer states, unknown dtypes; ``note`` says which.
``retyped`` tensors are compared, though base and tuned store other dtypes; ``unmatched`` and ``resized`` ones are
analysed alone.
"""

VECTORS: dict[str, Any] = {
    **_of(pl.String, ["model", "tensor"]),
    "layer": pl.Int32,
    "kind": pl.String,
    "shape": pl.List(pl.Int64),
    **_of(pl.String, ["dtype", "status"]),
    **_of(pl.Float64, ["norm", "delta", "delta_relative", "largest_change"]),
    "largest_at": pl.List(pl.Int64),
    **_of(pl.Float64, ["base_there", "tuned_there"]),
    "out_of_line": pl.Boolean,
}
"""Columns of ``vectors``: ``norm`` is ||W0||, ``delta`` ||W1 - W0||, ``delta_relative`` their ratio, null where the
base is zero (``status`` zero); ``largest_change`` is that of the entry that changed most, which lies at ``largest_at``,
and the two values there follow. ``status`` unpaired: only one of the two has it, or in another shape. ``out_of_line``:
ln(delta_relative) lies over 6 MAD and ln 3 above the median of its ``kind``, the names without their numbers, or of all
vectors where the kind has fewer than four."""

TOKENS: dict[str, Any] = {
    **_of(pl.String, ["model", "tensor"]),
    "row": pl.Int64,
    "token": pl.String,
    **_of(pl.Float64, ["norm", "delta", "delta_relative", "median_relative"]),
    "largest_at": pl.Int64,
    **_of(pl.Float64, ["base_there", "tuned_there"]),
}
"""Columns of ``tokens``: the rows that changed out of line, by the rule of ``vectors`` among the rows that changed,
whose median is ``median_relative``; ``token`` is the row's text, null where no tokenizer lies there."""

CONFIGURATION: dict[str, Any] = _of(pl.String, ["model", "file", "key", "base", "tuned", "effect"])
"""Columns of ``configuration``: ``effect`` is computation (what the model makes of the same tokens), text (which tokens
a text becomes, and how answers are drawn) or none."""

DOMAINS: dict[str, Any] = {
    **_of(pl.String, ["a", "b"]),
    "heads": pl.Int32,
    "entries": pl.Int64,
    **_of(pl.Float64, ["spearman", "cosine", "cosine_chance", "cosine_chance_abs"]),
}
"""Columns of ``domains``: Spearman's correlation of ``head_delta`` over ``heads`` heads, and the cosine of the changes
themselves over ``entries`` entries, every slice once. The cosine of random directions has mean 0, standard deviation
``cosine_chance`` = 1 / sqrt(entries) and mean absolute value ``cosine_chance_abs``, about sqrt(2 / (pi entries))."""

REFERENCE_SCORES: dict[str, Any] = {
    **_of(pl.String, ["domain", "reference"]),
    "layer": pl.Int32,
    "block": pl.String,
    "head": pl.Int32,
    "score": pl.Float64,
}
"""Columns of ``scores``: scale01(``head_delta`` of the domain) - scale01(that of the reference), in [-1, 1]."""

LINEAGE: dict[str, Any] = {
    "a": pl.String,
    "b": pl.String,
    "lineage": pl.String,
    "r": pl.Float64,
    "matrices": pl.Int32,
    "share": pl.Float64,
    **_of(pl.List(pl.String), ["shared", "moved"]),
}
"""Columns of ``lineage``: ``lineage`` same | same values | descendant or sibling | far | rearranged | stranger | cannot
tell; ``r``, the median over ``matrices`` of a common shape (of a rearranged model over what belongs together), which
hold a ``share`` of the smaller model's blocks; the matrices that are ``shared`` to the bit, by what ``a`` calls them;
which layers, heads or neurons of ``b`` were ``moved`` from where in ``a``.
"""

TREE: dict[str, Any] = {"a": pl.String, "b": pl.String, "r": pl.Float64, "rooted": pl.Boolean}
"""Columns of ``tree``: its branches, the nearest pairs first; ``a`` is nearer to the root where the tree has one."""

FACTS: dict[str, Any] = {
    **_of(pl.String, ["topic", "fact", "where"]),
    **_of(pl.Int64, ["count", "of"]),
    "note": pl.String,
}
"""Columns of ``facts``: ``topic`` precision | values | copies | tokens | files | card; the ``fact`` in words, the
tensors or files where it is so, for ``count`` of ``of`` entries, rows, tensors or files; ``note``: what else is known.
"""

LORENZ: dict[str, Any] = {"model": pl.String, **_of(pl.Float64, ["heads_share", "change_share"])}
"""Columns of ``lorenz``: what the least changed ``heads_share`` of heads have of the sum of ||D||_F^2."""

ITEM_SCORES: dict[str, Any] = {
    **_of(pl.String, ["task", "item"]),
    **_of(pl.Float64, ["value", "weight"]),
    "output": pl.String,
}
"""Columns of a table of scores; ``(task, item)`` is unique. An item is a document, or ``DOCUMENT:PART`` of one.

The quality of a task is sum(``value``) / sum(``weight``). Of bits per byte ``value`` is the bits that the model needs
for the item's text, ``weight`` its UTF-8 bytes; elsewhere ``value`` is 0 or 1 (of lm-evaluation-harness its metric)
and ``weight`` 1. ``output`` is what the model answered, where it answers.
"""

SUMMARY: dict[str, Any] = {
    "task": pl.String,
    **_of(pl.Float64, ["quality", "low", "high"]),
    "items": pl.Int64,
    **_of(pl.String, ["unit", "better"]),
    "chance": pl.Float64,
}
"""Columns of ``summary``; ``low`` and ``high`` are the interval's ends, null where the items are parts of fewer than
five documents; ``chance`` is the quality of guessing."""

QUALITY: dict[str, Any] = {
    "state": pl.Int32,
    **_of(pl.String, ["split", "task"]),
    **_of(pl.Float64, ["quality", "low", "high"]),
    "items": pl.Int64,
    **_of(pl.Float64, ["difference", "diff_low", "diff_high", "gain", "gain_low", "gain_high", "p"]),
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
    **_of(pl.Int32, ["head", "state"]),
    "task": pl.String,
    **_of(pl.Float64, ["effect", "low", "high", "p", "p_holm"]),
    **_of(pl.Float64, ["magnitude", "reference", "first_order", "activation"]),
}
"""Columns of ``effects``: ``effect`` is the gain of rewinding this head alone on the selection split, with its paired
interval; ``p`` is two-sided, ``p_holm`` the same for all heads together (Holm). Null where it was not measured. What
cheaper orders go by, of what moves with the head alone: ``magnitude`` is ||W1 - W0||_F, ``reference`` the score,
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

ITEMS: dict[str, Any] = {"state": pl.Int32, "split": pl.String, **ITEM_SCORES}
"""Columns of ``items``: quality of a task is sum(``value``) / sum(``weight``)."""


ON_TRUNCATION: dict[str, Any] = {
    "rule": pl.String,
    "seed": pl.Int32,
    "fraction": pl.Float64,
    "directions": pl.Int64,
    **_of(pl.Float64, ["energy", "bytes", "drop"]),
}
"""Columns of ``points`` and ``choice`` of a truncation search: ``fraction`` of directions that the curve drops (of rule
``energy``: of the energy), or of those of the curve ``drop`` that a control is matched to. Of the change D = W1 - W0 of
all matrices what is kept: how many singular ``directions``, of DARE none; the share of ``energy``, sum ||D||_F^2; the
share of ``bytes`` (see ``change.py``). ``drop`` is DARE's probability. Rows with rule ``base`` are the base model.
"""

TRUNCATION_CHOICE: dict[str, Any] = ON_TRUNCATION | _CHOSEN


ON_RECIPE: dict[str, Any] = {"recipe": pl.String, "at": pl.Float64, "role": pl.String}
"""Columns of ``points`` and ``choice`` of a search for factors: ``recipe`` directions or svf, the same ``then polish``,
or a control; ``at`` is lambda of factors, the rate of fine-tuning, the share of the base in an interpolation. ``role``
of the task: target, kept or beside. Rows with recipe ``base`` are the base model."""

RECIPE_CHOICE: dict[str, Any] = ON_RECIPE | {"dominated_by": pl.List(pl.String)} | _CHOSEN
"""Columns of ``choice`` of a search for factors: a row per recipe and task. ``dominated_by`` names recipes that on the
held-out split are no worse in any target and kept task and whose interval shows them better in one."""

FACTORS: dict[str, Any] = {
    **_of(pl.String, ["name", "tensor"]),
    "layer": pl.Int32,
    **_of(pl.String, ["block", "projection"]),
    **_of(pl.Int32, ["head", "kv_head", "expert", "direction"]),
    "sigma": pl.Float64,
    "peak": pl.Int32,
    "factor": pl.Float64,
}
"""Columns of ``factors``: of each singular ``direction``, the largest ``sigma`` first, which ``peak`` of its matrix's
spectrum it belongs to, if to one, and its ``factor``: 1 is the tuned model, 0 the base. Without a direction the factor
is of the whole change of a matrix, a slice or a vector. ``diffract scale`` and ``svf`` read this table."""


PATHS: dict[str, Any] = {
    **_of(pl.String, ["a", "b"]),
    "at": pl.Float64,
    "state": pl.Int32,
    "task": pl.String,
    **_of(pl.Float64, ["quality", "low", "high", "linear", "gap", "gap_low", "gap_high"]),
}
"""Columns of ``paths``: quality of (1 - at) a + at b on the held-out split; ``linear`` is the line between the ends'
qualities there, and ``gap`` how much worse than it the model is, positive is worse.
"""

PAIRS: dict[str, Any] = {
    **_of(pl.String, ["a", "b", "task"]),
    "counts": pl.Boolean,
    **_of(pl.Float64, ["quality_a", "quality_b", "barrier", "low", "high", "at"]),
    **_of(pl.Boolean, ["connected", "pair_connected"]),
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
    **_of(pl.Float64, ["quality", "low", "high"]),
}
"""Columns of ``simplex``: held-out quality of base + scale * sum of ``weights`` times (``models`` - base)."""


FINDINGS: dict[str, Any] = {"finding": pl.String, "verdict": pl.String, "because": pl.String}
"""Columns of a study's ``findings``: ``because`` is the reason in words, null where the finding's folder is not there.
"""

NUMBERS: dict[str, Any] = {
    **_of(pl.String, ["finding", "name"]),
    **_of(pl.Float64, ["value", "low", "high"]),
    "unit": pl.String,
    "chance": pl.Float64,
}
"""Columns of a study's ``numbers``: what each verdict rests on, its 95% interval, and what the control gives."""

Schemas = Mapping[str, Mapping[str, Any]]

_OF_MATRICES: Schemas = {"metrics": LABELS | OUTCOME, "spectra": SPECTRA, "models": MODELS, "tensors": TENSORS}

SHARE_TASKS: dict[str, Any] = {
    "task": pl.Int64,
    "tensor": pl.String,
    **_of(pl.Int64, ["matrices"]),
    **_of(pl.Float64, ["foretold_seconds", "seconds"]),
}
"""One row per task that a share did: its place in the whole plan, what it reads, seconds foretold and measured."""

KINDS: dict[str, Schemas] = {
    "scan": _OF_MATRICES,
    "compare": {
        **_OF_MATRICES,
        "heads": HEADS,
        "vectors": VECTORS,
        "tokens": TOKENS,
        "configuration": CONFIGURATION,
    },
    "trajectory": _OF_MATRICES,
    "heads": {
        "heads": HEADS,
        "domains": DOMAINS,
        "scores": REFERENCE_SCORES,
        "lorenz": LORENZ,
        "models": MODELS,
        "tensors": TENSORS,
    },
    "share": {"tasks": SHARE_TASKS},
    "lineage": {"lineage": LINEAGE, "tree": TREE, "models": MODELS},
    "audit": {"facts": FACTS, "models": MODELS},
    "eval": {"items": ITEM_SCORES, "summary": SUMMARY},
    "search rewind": {
        "points": ON_CURVE | QUALITY,
        "effects": EFFECTS,
        "orders": ORDER_ROWS,
        "choice": CHOICE,
        "items": ITEMS,
    },
    "search truncate": {"points": ON_TRUNCATION | QUALITY, "choice": TRUNCATION_CHOICE, "items": ITEMS},
    "search directions": {"points": ON_RECIPE | QUALITY, "choice": RECIPE_CHOICE, "factors": FACTORS, "items": ITEMS},
    "search svf": {"points": ON_RECIPE | QUALITY, "choice": RECIPE_CHOICE, "factors": FACTORS, "items": ITEMS},
    "connect": {"paths": PATHS, "pairs": PAIRS, "simplex": SIMPLEX, "items": ITEMS},
    "study": {"findings": FINDINGS, "numbers": NUMBERS},
}
"""The tables of each kind of run, the main one first, and the columns that each begins with."""
