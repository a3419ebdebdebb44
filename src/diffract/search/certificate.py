"""Certificates of checkpoints that a search has written: what is shown on held-out documents, and beside what.

It certifies the checkpoint, not the method: better in the target, no worse in what was to be kept, held out. It lies
beside the weights with a page for readers; ``diffract verify`` checks it, and replays the evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from diffract._version import __version__
from diffract.checkpoints.provenance import Verdict, read_manifest, write_manifest
from diffract.errors import CheckpointError, DiffractError, printable
from diffract.evaluate import Evaluator, Task, load_subject, load_tasks, summarise
from diffract.evaluate.model import model_digest
from diffract.evaluate.statistics import documents_of
from diffract.search.plan import UNCHANGED
from diffract.search.scorer import Rows, Scorer, difference_rows
from diffract.search.stage import task_entries

CERTIFICATE = "certificate.json"
PAGE = "CERTIFICATE.md"
KIND = "diffract certificate"
FORMAT = 1

FEWEST = 30
"""Held-out documents that the target and each part of what is to be kept need."""

MARGIN = 0.05
"""Share of what training gained or lost in a task that still counts as no worse."""

REPLAYED = 1e-6
"""Relative difference of a quality that a replay on another machine may show: sums of logits in another order."""

Claim = Literal["target", "kept", "sentinel"]
"""What a task says of a checkpoint: what was wanted, what must be kept, or what nobody optimised."""


@dataclass(frozen=True)
class Chosen:
    """What is certified.

    Attributes:
        claims: What each task says of it.
        items: The held-out scores of the written checkpoint.
        controls: The rows of controls in the table of choices.
        texts: The documents that something was learned on, by task.
        told: Settings, seeds, what was optimised and what it cost, as the manifest of the run has them.
    """

    claims: Mapping[str, Claim]
    items: pl.DataFrame
    controls: Rows
    texts: Mapping[str, Sequence[str]]
    told: Mapping[str, Any]


def dominates(one: pl.DataFrame, other: pl.DataFrame, tasks: Sequence[Task]) -> bool:
    """Whether one model is no worse than another in any task, and by its interval better in one.

    Args:
        one: Its scores.
        other: Those of the other, on the same items.
        tasks: The tasks that count.
    """
    rows = difference_rows(other, one, tasks)
    surely = any(row["gain_low"] is not None and row["gain_low"] > 0 for row in rows)
    return surely and all(row["gain"] >= 0 for row in rows)


def held_out_rows(scorer: Scorer, chosen: Chosen) -> Rows:
    """Return for each task what the checkpoint gains over the tuned model on the held-out split, and the words."""
    tasks = scorer.tasks["held-out"]
    tuned = scorer.score("held-out", UNCHANGED)
    base = next((point for point in scorer.points if point.key == "base"), None)
    spans = [None] * len(tasks) if base is None else scorer.rows("held-out", base)
    qualities = summarise(chosen.items, tasks, resamples=1)["quality"].to_list()
    before = summarise(tuned, tasks, resamples=1)["quality"].to_list()
    found = []
    for i, (task, row) in enumerate(zip(tasks, difference_rows(tuned, chosen.items, tasks), strict=True)):
        own, span = chosen.items.filter(pl.col("task") == task.name), spans[i]
        claim, margin = chosen.claims[task.name], 0.0
        # The margin is a share of what training did here, if it surely did anything.
        if span is not None and span["gain_low"] is not None and span["gain_low"] * span["gain_high"] > 0:
            margin = MARGIN * abs(span["gain"])
        documents = len(set(documents_of(own["item"])))
        numbers = {"gain": row["gain"], "low": row["gain_low"], "high": row["gain_high"], "margin": margin}
        told = {"task": task.name, "claim": claim, "unit": task.unit, "documents": documents, **numbers}
        found.append({**told, "tuned": before[i], "checkpoint": qualities[i], "words": words(told)})
    return found


def words(row: Mapping[str, Any]) -> str:
    """Return what may be said of a task."""
    name, within = row["task"], f"(95%, {row['documents']} documents)"
    low, high = row["low"], row["high"]
    if low is None:
        return f"{name}: not testable, too few documents ({row['documents']})"
    if low > 0:
        return f"better in {name} {within}"
    if high < 0 and (row["claim"] == "target" or low < -row["margin"]):
        return f"worse in {name} {within}"
    if row["claim"] == "target":
        return f"better in {name}: not shown {within}"
    return f"no worse in {name} {within}" if low >= -row["margin"] else f"no worse in {name}: not shown {within}"


def certify(folder: str | Path, scorer: Scorer, chosen: Chosen) -> list[str]:
    """Write certificate and page beside a checkpoint, and its three lines on the model card.

    Args:
        folder: The checkpoint that an edit wrote.
        scorer: What scored the models of the search.
        chosen: What is certified.

    Returns:
        Why there is none; nothing where it was written.
    """
    rows = held_out_rows(scorer, chosen)
    refused = [
        f"{row['task']} has {row['documents']} held-out documents, {FEWEST} are needed"
        for row in rows
        if row["claim"] != "sentinel" and row["documents"] < FEWEST
    ]
    texts = {"fit": {name: sorted(own) for name, own in chosen.texts.items()}}
    for split in ("selection", "held-out"):
        texts[split] = {
            t.name: sorted(set(documents_of(pl.Series([i.id for i in t.items])))) for t in scorer.tasks[split]
        }
    used = {name for part in ("fit", "selection") for own in texts[part].values() for name in own}
    if leaked := sorted(used & {name for own in texts["held-out"].values() for name in own}):
        refused.append(f"{len(leaked)} documents are both chosen on and reported on, first {printable(leaked[0])}")
    if refused:
        return refused
    counting = [t for t in scorer.tasks["held-out"] if chosen.claims[t.name] != "sentinel"]
    # Choices have a row for each task, and several may be one model; the tuned model itself is no control.
    others = {row["state"]: row for row in chosen.controls if row["state"] != 0}
    controls = [_control(row, scorer, chosen, counting) for row in others.values()]
    manifest = read_manifest(folder)
    content = {
        "kind": KIND,
        "format": FORMAT,
        "diffract": __version__,
        "lines": three_lines(rows, controls),
        "held_out": rows,
        "controls": controls,
        **chosen.told,
        "tasks": {split: {t.name: t.key for t in tasks} for split, tasks in scorer.tasks.items()},
        "documents": texts,
        "outputs": manifest["outputs"],
    }
    place = Path(folder)
    (place / CERTIFICATE).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    (place / PAGE).write_text(page(content), encoding="utf-8")
    with (place / "README.md").open("a", encoding="utf-8") as card:
        card.write("\n## Certificate\n\n" + "".join(f"- {line}\n" for line in content["lines"]))
    write_manifest(place, {key: value for key, value in manifest.items() if key != "files"})
    return []


def _control(row: Mapping[str, Any], scorer: Scorer, chosen: Chosen, counting: Sequence[Task]) -> dict[str, Any]:
    """Say what a control gains where it counts, and whether the checkpoint leaves it behind."""
    name = row.get("recipe") or row.get("order") or row["rule"]
    seed = f" {row['seed']}" if name.startswith(("random", "dare")) and "seed" in row else ""
    items = scorer.score("held-out", scorer.points[row["state"]])
    gains = difference_rows(scorer.score("held-out", UNCHANGED), items, counting)
    return {
        "control": f"{name}{seed}" + " reversed" * bool(row.get("reverse")),
        "left_behind": dominates(chosen.items, items, counting),
        "gains": {
            t.name: {"gain": g["gain"], "low": g["gain_low"], "high": g["gain_high"]}
            for t, g in zip(counting, gains, strict=True)
        },
    }


def three_lines(rows: Rows, controls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is shown, what does as well, and which sentinels got worse."""
    as_well = [control["control"] for control in controls if not control["left_behind"]]
    beside = "no control stands beside it: a bare claim"
    if controls:
        beside = f"better than all of {len(controls)} controls in one task and no worse in any"
    if as_well:
        beside = f"not left behind: {', '.join(as_well)} {'does' if len(as_well) == 1 else 'do'} as well in some task"
    sentinels = [row for row in rows if row["claim"] == "sentinel"]
    worse = [row["words"] for row in sentinels if row["high"] is not None and row["high"] < 0]
    last = f"of {len(sentinels)} sentinels none got worse" if sentinels else "no sentinel was looked at"
    return ["; ".join(row["words"] for row in rows if row["claim"] != "sentinel"), beside, "; ".join(worse) or last]


def page(content: Mapping[str, Any]) -> str:
    """Return the certificate for readers, as Markdown."""
    lines = [f"- {printable(line, 400)}" for line in content["lines"]]
    rows = []
    for row in content["held_out"]:
        ends = "" if row["low"] is None else f"{row['low']:+.4g} to {row['high']:+.4g}"
        numbers = f"{row['tuned']:.4g} | {row['checkpoint']:.4g} | {row['gain']:+.4g} | {ends} | {row['documents']}"
        rows.append(f"| {printable(row['task'])} | {row['claim']} | {numbers} |")
    controls = [
        f"| {printable(control['control'])} | "
        + "; ".join(f"{printable(name)} {own['gain']:+.4g}" for name, own in control["gains"].items())
        + f" | {'yes' if control['left_behind'] else 'no'} |"
        for control in content["controls"]
    ]
    return "\n".join([
        "# Certificate",
        "",
        f"Of this checkpoint, by diffract {content['diffract']}: held out, against the tuned model.",
        "`certificate.json` has digests, documents, settings and cost; `diffract verify --replay` evaluates again.",
        "",
        *lines,
        "",
        "| task | claim | tuned | checkpoint | gain | 95% | documents |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "| control | gains | left behind |",
        "|---|---|---|",
        *controls,
        "",
    ])  # fmt: skip


def read_certificate(folder: str | Path) -> dict[str, Any] | None:
    """Return the certificate of a checkpoint, ``None`` where there is none.

    Raises:
        CheckpointError: It cannot be read, or is none of this version.
    """
    path = Path(folder) / CERTIFICATE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{printable(path)} is no JSON: {printable(error)}. It was damaged.") from error
    wanted = {"models": list, "settings": dict, "tasks": dict, "held_out": list, "outputs": dict}
    if not isinstance(found, dict) or (found.get("kind"), found.get("format")) != (KIND, FORMAT):
        raise CheckpointError(f"{printable(path)} is no certificate of format {FORMAT}. Update diffract.")
    if lost := [key for key, kind in wanted.items() if not isinstance(found.get(key), kind)]:
        raise CheckpointError(f"{printable(path)} lacks {lost[0]!r}. It was damaged.")
    return found


def check_certificate(folder: str | Path, verdict: Verdict, *, replay: bool) -> None:
    """Add to a verdict what is wrong with a checkpoint's certificate, if it has one.

    Args:
        folder: The checkpoint.
        verdict: What is known already.
        replay: Whether both models are evaluated again on the held-out split.

    Raises:
        DiffractError: The certificate cannot be read.
    """
    stated = read_certificate(folder)
    if stated is None:
        return
    if stated["outputs"] != read_manifest(folder)["outputs"]:
        verdict.faults.append("the certificate is of other weights than the manifest's")
    if not replay:
        verdict.unchecked.append("the certificate's qualities: --replay evaluates again")
        return
    try:
        faults = list(_replayed(folder, stated))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{printable(folder)}, {CERTIFICATE}: {printable(error)} is damaged.") from error
    except DiffractError as error:
        verdict.unchecked.append(f"the certificate's qualities: {error}")
        return
    verdict.faults += faults


def _replayed(folder: str | Path, stated: Mapping[str, Any]) -> list[str]:
    """Evaluate the checkpoint and the tuned model again, and return what differs from what is stated."""
    settings = stated["settings"]
    entries = [e for role in ("beside", "eval", "keep") for e in task_entries(settings[role])]
    asked = {name: settings[name] for name in ("data", "limit", "shots")}
    tasks = load_tasks(entries, split="held-out", **asked)
    keys = {task.name: task.key for task in tasks}
    if keys != stated["tasks"]["held-out"]:
        return ["the certificate's held-out texts are not those that are found today"]
    faults = []
    (tuned,) = (model for model in stated["models"] if model["role"] == "tuned")
    for what, reference in (("tuned", tuned["reference"]), ("checkpoint", str(folder))):
        subject = load_subject(reference, device=settings["device"], dtype=settings["dtype"])
        if what == "tuned" and model_digest(subject.model) != tuned["digest"]:
            faults.append(f"{printable(reference)} is not the tuned model that was searched")
        qualities = summarise(Evaluator(subject, tasks).scores(), tasks, resamples=1)["quality"].to_list()
        found = dict(zip(keys, qualities, strict=True))
        faults += [
            f"{row['task']}: the {what} model's quality is {found[row['task']]:.6g}, "
            f"the certificate says {row[what]:.6g}"
            for row in stated["held_out"]
            if abs(found[row["task"]] - row[what]) > REPLAYED * abs(row[what])
        ]
    return faults
