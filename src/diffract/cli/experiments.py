"""What is printed of edits, evaluations, searches, training and studies, and what sums them up for ``--json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diffract.cli.console import Given, interval, kept, note, number, place, say, say_place, say_table, warn
from diffract.errors import printable

if TYPE_CHECKING:
    import polars as pl

    from diffract.checkpoints.provenance import Verdict
    from diffract.edits import EditPreview
    from diffract.edits.to_files import Edited
    from diffract.run import Run
    from diffract.search import Estimate
    from diffract.studies.runner import StudyPreview
    from diffract.train import TrainPreview, TrainRun

IN_SUMMARY = ("choice", "orders", "effects", "pairs")
"""Tables of a search that its summary holds, if there."""

NAME_WIDTH = 26


# edits


def show_edits(found: Sequence[Edited | EditPreview], given: Given) -> None:
    """Print what each step did or would do, and what was written or would be."""
    from diffract.edits.to_files import said
    from diffract.settings import size_text

    edited: Any
    for edited in found:
        for label in [] if given["dry_run"] else edited.manifest["same_weights_as"]:
            say(f"THE SAME WEIGHTS as {printable(label)}: every tensor that was written is equal to the bit.")
        for text in edited.notes if given["dry_run"] else edited.manifest["notes"]:
            say(text)
        for step in sum_up_edit(edited)["steps"]:
            say(f"{step['step']}:")
            for key, value in step["summary"].items():
                say(f"  {key:<{NAME_WIDTH}} {said(value)}")
        if given["dry_run"]:
            written = "the adapter" if edited.written_bytes is None else size_text(edited.written_bytes)
            say(f"would change {edited.changed} of {edited.tensors} tensors")
            say(f"would read {size_text(edited.read_bytes)}, write {written}, in about {edited.seconds:.3g} s")
            if edited.written_bytes and edited.changed_bytes < edited.written_bytes:
                shared = "where unchanged bytes are shared (reflinks; with --link whole files)"
                say(f"  of these {size_text(edited.changed_bytes)} change, all that is written {shared}")
        else:
            say(f"written: {edited.folder} (details in manifest.json)")


def sum_up_edits(found: Sequence[Edited | EditPreview], given: Given) -> Any:
    """Return what was done or would be: of one checkpoint, or a list of them."""
    each = [sum_up_edit(edited) for edited in found]
    return each if len(each) > 1 else each[0]


def show_lora(found: Any, given: Given) -> None:
    """Print what was written, or of an audit what each module uses and needs."""
    if not given["audit"]:
        show_edits(found, given)
        return
    from diffract.edits.adapter_audit import summary
    from diffract.edits.to_files import said

    for key, value in summary(found).items():
        say(f"{key:<{NAME_WIDTH}} {said(value)}")
    tables = {
        "module": (found.modules, ("rank", "used", "suffices", "effective_rank", "norm", "share", "lost_above")),
        "overlap": (found.overlap, ("cosine", "cosine_chance", "output", "output_chance", "input", "input_chance")),
        "merged in bfloat16": (found.merging, ("error", "unmoved")),
    }
    for title, (rows, columns) in tables.items():
        if rows:
            wide = max(len(title), *(len(row["name"]) for row in rows))
            say(f"\n{title:<{wide}} {' '.join(f'{column:>14}' for column in columns)}")
            for row in rows:
                cells = ("-" if row[column] is None else said(row[column]) for column in columns)
                say(f"{printable(row['name']):<{wide}} {' '.join(f'{cell:>14}' for cell in cells)}")
    say(f"\nthe rank that suffices: {json.dumps({'r': found.rank, 'rank_pattern': found.rank_pattern})}")


def sum_up_lora(found: Any, given: Given) -> Any:
    """Return what was written, or an audit whole."""
    return asdict(found) if given["audit"] else sum_up_edits(found, given)


def sum_up_edit(edited: Any) -> dict[str, Any]:
    """Return what was done for one checkpoint, or everything that is known beforehand."""
    if hasattr(edited, "manifest"):
        told = {name: edited.manifest[name] for name in ("steps", "same_weights_as", "notes", "written_bytes")}
        return {"output": str(edited.folder), **told}
    return asdict(edited)


def show_verdict(found: Verdict, given: Given) -> None:
    """Print what of an edited checkpoint is as its manifest says."""
    say(f"{found.tensors} tensors as they were written, {found.inputs} of the inputs as they were read")


def tell_faults(found: Verdict, silent: bool) -> bool:
    """Tell what is not as the manifest says, also where nothing else is to be printed; whether there is anything."""
    lines = [*(f"not checked: {text}" for text in found.unchecked), *(f"differs: {text}" for text in found.faults)]
    for text in [] if silent else lines:
        note(text)
    return bool(found.faults)


# eval

Evaluated = tuple["Run", "Run | None", "pl.DataFrame | None"]
"""An evaluation, the one that it is compared with, and the differences."""


def show_evaluation(found: Evaluated, given: Given) -> None:
    """Print the quality in each task, and how it differs from the other model's."""
    run, other, differences = found
    warn(run.manifest["warnings"])
    rows = [
        [
            *(row["task"], number(row["quality"], 4), interval(row["low"], row["high"], ".4g")),
            *(str(row["items"]), row["unit"] + (f" (chance {number(c)})" if (c := row["chance"]) is not None else "")),
            row["better"],
        ]
        for row in run.summary.iter_rows(named=True)
    ]
    say_table(["task", "quality", "95% interval", "items", "unit", "better"], rows)
    if other is not None and differences is not None:
        before = dict(other.summary.select("task", "quality").iter_rows())
        lines = [
            [
                *(row["task"], number(before[row["task"]], 4), f"{row['difference']:+.3g}"),
                interval(row["low"], row["high"], "+.3g"),
                "better" if row["gain"] > 0 else "worse" if row["gain"] < 0 else "the same",
                *(number(row["p"]), number(row["p_holm"])),
            ]
            for row in differences.iter_rows(named=True)
        ]
        headers = ["task", "other", "difference", "95% interval", "", "p", "p (Holm)"]
        say_table(headers, lines, title=f"Against {other.manifest['models'][0]['reference']}, item by item:")
    say_place(given, "run")


def sum_up_evaluation(found: Evaluated, given: Given) -> dict[str, Any]:
    """Return the quality in each task, and the differences."""
    run, other, differences = found
    against = {"models": other.manifest["models"], "summary": other.summary.to_dicts()} if other else None
    return {
        **kept(run.manifest, ("models", "tasks")),
        "summary": run.summary.to_dicts(),
        "against": against,
        "differences": differences.to_dicts() if differences is not None else None,
        "run": place(given),
    }


# search, connect


def show_search(found: Run | Estimate, given: Given) -> None:
    """Print what a search found or chose; of a dry run what it would cost."""
    if given["dry_run"]:
        estimate: Any = found
        for split, count in estimate.evaluations.items():
            say(f"{split:<10} {count} evaluations of {number(estimate.seconds_each[split])} s")
        say(f"together   {number(estimate.seconds)} s, at most: equal models are evaluated once")
        for text in estimate.left_out:
            say(f"left out   {text}")
        return
    run: Any = found
    warn([*run.manifest["warnings"], *(f"left out: {text}" for text in run.manifest["left_out"])])
    if run.kind == "connect":
        _show_connections(run)
    elif run.kind in ("search directions", "search svf"):
        _show_recipes(run)
    else:
        _show_choice(run)
    say_place(given, "run")


def sum_up_search(found: Run | Estimate, given: Given) -> dict[str, Any]:
    """Return what a search found or chose; of a dry run what it would cost."""
    if given["dry_run"]:
        return vars(found)
    run: Any = found
    tables = {name: run[name].to_dicts() for name in IN_SUMMARY if name in run.tables}
    manifest = kept(run.manifest, ("evaluations", "left_out", "chosen", "written"))
    return {**manifest, **tables, "run": place(given)}


def _show_choice(run: Run) -> None:
    """Print of each curve its best point and the furthest without loss, and what was written."""
    task = run.manifest["tasks"]["held-out"][0]
    say(f"{task['name']}: gain in {task['unit']}, positive is better; chosen on selection, reported on held-out")
    what, at = ("order", "fraction") if run.kind == "search rewind" else ("rule", "bytes")
    points = run.choice.rows(named=True)
    rows = []
    for best, far in zip(points[::2], points[1::2], strict=True):  # two points of each curve follow each other
        name = best[what]
        if name.partition("-")[0] in ("random", "dare"):
            name = f"{name} {best['seed']}"
        if best.get("reverse"):
            name = f"{name} reversed"
        ends = interval(best["held_out_gain_low"], best["held_out_gain_high"])
        gains = [number(best["selection_gain"]), number(best["held_out_gain"]), ends]
        rows.append([name, f"{best[at]:.3g}", *gains, f"{far[at]:.3g}", number(far["held_out_gain"])])
    say_table([what, "best at", "selection", "held-out", "95%", "no loss to", "held-out"], rows)
    if what == "rule":
        say("points are the share of the change's bytes that is kept")
    elif run.orders.height:
        ranks = [[row["order"], number(row["spearman"])] for row in run.orders.rows(named=True)]
        say_table(["order", "rank correlation"], ranks, title="How orders rank heads, against measured effects:")
    _show_written(run)


def _show_recipes(run: Run) -> None:
    """Print what each recipe gains in each task, what it is dominated by, and what was written."""
    settings = run.manifest["settings"]
    say(f"{settings['factors']:,} factors, lambda {settings['lambda']:g}; gains over the tuned model, held-out split")
    rows = [
        [
            *(row["recipe"] + " (control)" * row["control"], f"{row['at']:g}", f"{row['task']} ({row['role']})"),
            *(number(row["selection_gain"]), number(row["held_out_gain"])),
            interval(row["held_out_gain_low"], row["held_out_gain_high"]),
        ]
        for row in run.choice.rows(named=True)
    ]
    say_table(["recipe", "at", "task", "choose part", "held-out", "95%"], rows)
    recipes = run.choice.unique("recipe", maintain_order=True).rows(named=True)
    for row in recipes:
        if row["dominated_by"]:
            say(f"{row['recipe']}: dominated by {', '.join(row['dominated_by'])}")
    free = [row["recipe"] for row in recipes if not row["dominated_by"]]
    say(f"undominated, of {len(recipes)}: {', '.join(free)}")
    _show_written(run)


def _show_written(run: Run) -> None:
    """Print what was written, if anything was."""
    if written := run.manifest["written"]:
        scores = ", ".join(f"{row['task']} {row['written']:.4g}" for row in written["held_out"])
        same = "as the live model" if written["same_scores"] else "not quite as the live model"
        say(f"written: {written['folder']} ({scores}, {same})")


def _show_connections(run: Run) -> None:
    """Print the barrier between each pair of models."""
    tolerance = run.manifest["settings"]["tolerance"]
    say(f"barriers on the held-out split, in the tasks' units; connected below {tolerance:g}")
    rows = [
        [
            *(f"{row['a']} - {row['b']}", row["task"] if row["counts"] else f"({row['task']})"),
            *(number(row["quality_a"]), number(row["quality_b"]), number(row["barrier"])),
            *(interval(row["low"], row["high"]), f"{row['at']:.3g}"),
            "yes" if row["pair_connected"] else "no",
        ]
        for row in run.pairs.rows(named=True)
    ]
    say_table(["models", "task", "quality a", "quality b", "barrier", "95%", "at", "connected"], rows)


# train, study


def show_training(found: TrainRun | TrainPreview, given: Given) -> None:
    """Print the last loss and where the model lies; of a dry run parameters, steps, tokens and epochs."""
    from diffract.settings import size_text

    known: Any = found
    if given["dry_run"]:
        say(f"{known.parameters:,} parameters, vocabulary of {known.vocabulary:,}")
        say(f"{known.steps:,} steps of {known.batch_tokens:,} tokens: {known.tokens:,} tokens")
        rows = [
            [name, f"{part['share']:.1%}", f"{part['available']:,}", f"{part['tokens']:,}", number(part["epochs"])]
            for name, part in known.parts.items()
        ]
        say_table(["part", "share", "tokens there", "tokens taken", "epochs"], rows)
        say(f"checkpoints after {', '.join(f'{tokens:,}' for tokens in known.checkpoints)} tokens")
        return
    warn(known.warnings)
    last = _last(known)
    rate = size_text(last["tokens"] / known.seconds, " tokens/s")
    say(f"loss {last['loss']:.4f} after {last['tokens']:,} tokens in {known.seconds:.0f} s ({rate})")
    say(f"written: {known.final}")


def sum_up_training(found: TrainRun | TrainPreview, given: Given) -> dict[str, Any]:
    """Return where the checkpoints of a training run lie, and its last loss; of a dry run all that is known."""
    if given["dry_run"]:
        return vars(found)
    run: Any = found
    return {
        "output": str(run.folder),
        "final": str(run.final),
        "checkpoints": {str(tokens): str(path) for tokens, path in run.checkpoints.items()},
        "last": _last(run),
        "seconds": run.seconds,
        "warnings": list(run.warnings),
    }


def _last(run: TrainRun) -> dict[str, Any]:
    from diffract.train.records import read_log

    return read_log(run.log)[-1]


def show_study(found: Run | StudyPreview, given: Given) -> None:
    """Print the verdict on each finding; of a dry run what would be trained and scored."""
    known: Any = found
    if not given["dry_run"]:
        say_table(["finding", "verdict"], known.findings.select("finding", "verdict").rows())
        for name, because in known.findings.select("finding", "because").rows():
            say(f"{name}: {because}")
        say_place(given, "report", "report.html")
        return
    summary = sum_up_study(found, given)
    say_table(["training run", "tokens"], [[name, f"{count:,}"] for name, count in summary["training_runs"].items()])
    side = f", {known.recipe.jobs} side by side" if known.recipe.jobs > 1 else ""
    say(f"{len(known.jobs)} training runs{side}, {known.tokens:,} tokens together")
    say(f"{known.models} checkpoints scored in {', '.join(summary['tasks'])}")
    say(f"findings: {', '.join(summary['findings'])}")
    for text in known.missing:
        say(f"missing: {text} (--data says where files are)")
    for text in known.remote:
        say(f"from the network: {text}")


def sum_up_study(found: Run | StudyPreview, given: Given) -> dict[str, Any]:
    """Return the verdict on each finding; of a dry run what would be trained and scored."""
    known: Any = found
    if not given["dry_run"]:
        verdicts = dict(known.findings.select("finding", "verdict").iter_rows())
        return {"run": place(given), "report": place(given, "report.html"), "verdicts": verdicts}
    return {
        "study": known.recipe.name,
        "training_runs": {job.name: job.recipe["tokens"] for job in known.jobs},
        "training_tokens": known.tokens,
        "models": known.models,
        "tasks": [*known.recipe.quality.tasks.values(), *known.recipe.quality.further],
        "findings": list(known.recipe.findings),
        "missing": known.missing,
        "from_the_network": known.remote,
    }
