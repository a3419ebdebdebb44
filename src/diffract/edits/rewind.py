"""Rewind: give heads, matrices, experts or tensors back the base's weights."""

from __future__ import annotations

from diffract.edits.bench import Bench, Planned
from diffract.edits.directions import rounded
from diffract.edits.draft import Change, Draft
from diffract.edits.heads import (
    Units,
    change_norms,
    find_units,
    least_first,
    parse_heads,
    places_by_tensor,
    read_scores,
    reference_scores,
    shuffled,
)
from diffract.edits.interpolate import straight
from diffract.edits.settings import Rewind, describe
from diffract.errors import SelectionError


def plan_rewind(step: Rewind, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes."""
    base = bench.other(step.to)
    units = find_units(bench, step.unit, step.select)
    chosen, scores = _choose(step, bench, draft, units)
    parts = list(units.chosen(chosen, step.kv))
    changes = {}
    for name, places in places_by_tensor(bench, parts).items():
        changes[name] = Change(tuple((place, straight(base, name)(step.amount)) for place in places))
    summary = {
        "base": describe(step.to),
        "rewound": len(chosen),
        "of": len(units.names),
        "shared parts rewound": sum(len(part.owners) > 1 for part in parts),
        "shared parts": sum(len(part.owners) > 1 for part in units.parts),
        "names": chosen,
    }
    return Planned(changes, summary, [{"name": n, "score": scores.get(n), "rewound": n in chosen} for n in scores])


def _choose(step: Rewind, bench: Bench, draft: Draft, units: Units) -> tuple[list[str], dict[str, float]]:
    """Return the units that are rewound, in order, and what each was ordered by."""
    if step.heads is not None:
        return parse_heads(step.heads, units), {}
    assert step.fraction is not None
    count = rounded(step.fraction, len(units.names))
    if count in (0, len(units.names)):
        return list(units.names)[:count], {}
    if step.order == "random":
        return shuffled(units.names, step.seed)[:count], {}
    scores = _scores(step, bench, draft, units)
    order = least_first(scores)
    if step.reverse != (step.order == "greedy"):  # the best effect comes first
        order.reverse()
    return order[:count], scores


def _scores(step: Rewind, bench: Bench, draft: Draft, units: Units) -> dict[str, float]:
    base = bench.other(step.to)
    if step.order == "greedy":
        assert step.scores is not None
        return read_scores(step.scores, units, "effect", model=step.domain)
    if step.scores is None:
        domain = change_norms(units, draft.blocks, base)
    else:
        domain = read_scores(step.scores, units, "head_delta", model=step.domain)
    if step.order == "magnitude":
        return domain
    assert step.reference is not None
    if step.scores is None:
        reference = change_norms(units, bench.other(step.reference).blocks, base)
    elif isinstance(step.reference, str):
        reference = read_scores(step.scores, units, "head_delta", model=step.reference)
    else:
        raise SelectionError("with scores, reference is the name of a model in them, expected text.")
    return reference_scores(domain, reference)
