"""What is printed for a run of each kind: a function that shows it, and one that sums it up for ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.cli.console import interval, note, number, percent, say, say_table, warn
from diffract.errors import printable

if TYPE_CHECKING:
    import polars as pl

    from diffract.api import Inspection
    from diffract.checkpoints.provenance import Verdict
    from diffract.edits import EditPreview
    from diffract.edits.to_files import Edited
    from diffract.run import Run
    from diffract.search import Estimate
    from diffract.studies.runner import StudyPreview
    from diffract.train import TrainPreview, TrainRun

Given = Mapping[str, Any]
"""What was given for a command's arguments and options, by name."""

EVOLVING = {
    "delta_relative": ("change", "of the weights relative to {against} (Frobenius norm)"),
    "lineage_correlation": ("correlation", "of the weights with those"),
    "value_share": ("in values", "share of it in singular values"),
    "head_top10_share": ("top heads", "share of it in the top tenth of heads"),
    "stable_rank_median": ("stable rank", "median over matrices"),
    "peaked_matrices": ("peaked", "matrices with at least two spectral peaks"),
}
"""What is shown of a trajectory's ``models``, as far as it was computed: what the table calls it, and what that is."""

SHOWN_HEADS = 5
"""Heads of each domain that are shown."""

IN_SUMMARY = ("choice", "orders", "effects", "pairs")
"""Tables of a search that its summary holds, if there."""

NAME_WIDTH = 26


def everything(found: Any, given: Given) -> Any:
    """Return all that was found."""
    return found if isinstance(found, dict) else asdict(found)


def kept(manifest: Mapping[str, Any], further: Sequence[str] = ()) -> dict[str, Any]:
    """Return what every summary takes from a manifest, and what else there is of it."""
    names = ("kind", "seconds", "settings", *further, "warnings")
    return {name: manifest[name] for name in names if name in manifest}


def place(given: Given, name: str = "") -> str | None:
    """Return where a run was written, or a file in it; ``None`` if nowhere."""
    return str(given["output"] / name) if given["output"] else None


def say_place(given: Given, what: str, name: str = "") -> None:
    """Print where a run, or a file in it, was written, if anywhere."""
    if (written := place(given, name)) is not None:
        say(f"{what}: {written}")


# scan, compare, trajectory


def show_analysis(run: Run, given: Given) -> None:
    """Print what a comparison has to say first, then a sentence on each model of it or of a scan."""
    for name, sentences in run.manifest.get("notable", {}).items():
        for sentence in sentences:
            say(f"{printable(name)}: {sentence}")
    warn(run.manifest["warnings"])
    for row in run.models.iter_rows(named=True):
        say(_model_sentence(row))
    say_place(given, "report", "report.html")


def sum_up_analysis(run: Run, given: Given) -> dict[str, Any]:
    """Return the models of a scan, a comparison or a trajectory, with settings and places."""
    places = {"run": place(given), "report": place(given, "report.html")}
    return {**kept(run.manifest, ("notable",)), "models": run.models.to_dicts(), **places}


def _model_sentence(row: Mapping[str, Any]) -> str:
    from diffract.report.words import BEYOND, beside_noise, is_rounding, times
    from diffract.settings import size_text

    head = f"{row['model']} ({row['role']}, {row['family']}): "
    if row["role"] != "tuned":
        return f"{head}{size_text(row['parameters'], '')} parameters, {row['matrices']} matrices"
    if row.get("lineage") == "stranger":
        return f"{head}no descendant of the base"
    relative = f"relative change {number(row.get('delta_relative'))}"
    if is_rounding(row):
        return f"{head}{relative}, no more than rounding to the stored dtype alone would cause"
    parts = [relative]
    for quantity, text in BEYOND.items():
        if (excess := row.get(f"{quantity}_excess")) is not None:
            parts.append(f"{times(excess)} {text} {beside_noise(row, quantity)}")
    share, noise = row.get("head_top10_share"), row.get("head_top10_share_noise")
    if share is not None and noise is not None:
        text = "of attention's part in the top tenth of heads"
        parts.append(f"{percent(share)} {text} (noise of the same norms {percent(noise)})")
    return head + "; ".join(parts)


def show_trajectory(run: Run, given: Given) -> None:
    """Print a row for each checkpoint."""
    warn(run.manifest["warnings"])
    rows = run.models.to_dicts()
    shown = [name for name in ("stage", "step", "tokens", *EVOLVING) if any(row.get(name) is not None for row in rows)]
    headers = ["checkpoint", *(EVOLVING.get(name, [name])[0] for name in shown)]
    say_table(headers, [[row["model"], *(_evolving(name, row[name]) for name in shown)] for row in rows])
    if known := [" ".join(EVOLVING[name]) for name in shown if name in EVOLVING]:
        say("; ".join(known).format(against=f"the {given['against']} checkpoint"))
    say_place(given, "report", "report.html")


def _evolving(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("value_share", "head_top10_share"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if name in ("stage", "step", "tokens", "peaked_matrices") else f"{value:#.3g}".rstrip(".")


# heads


def show_heads(run: Run, given: Given) -> None:
    """Print a sentence on each domain, its most changed and most specific heads, and how domains agree."""
    warn(run.manifest["warnings"])
    domains = run.models.filter(role="tuned")
    count = run.heads.height // domains.height
    for row in domains.iter_rows(named=True):
        say(_domain_sentence(row, count))
    _say_heads("Most changed heads and the norm of their change:", most_changed(run), "head_delta")
    if domains.height > 1:
        _say_heads("Most specific heads and their lowest score against another domain:", most_specific(run), "score")
        chance = number(run.domains["cosine_chance"].max())  # pyright: ignore[reportArgumentType] (Float64)
        title = f"Rank correlation of head changes above, cosine of the changes below (chance 0 ± {chance}):"
        say_table(["", *domains["model"]], _agreement(run), title=title)
        agnostic = percent(domains["agnostic_share"][0])
        say(f"Domain-agnostic part of the attention's change, all domains together: {agnostic} (chance 0%)")
    say_place(given, "run")


def sum_up_heads(run: Run, given: Given) -> dict[str, Any]:
    """Return models, domains, and the first heads of each."""
    return {
        **kept(run.manifest),
        "models": run.models.to_dicts(),
        "domains": run.domains.to_dicts(),
        "most_changed": {name: top.to_dicts() for name, top in most_changed(run).items()},
        "most_specific": {name: top.to_dicts() for name, top in most_specific(run).items()},
        "run": place(given),
    }


def most_changed(run: Run) -> dict[str, pl.DataFrame]:
    """Return the heads of each domain whose change is the largest."""
    known = run.heads.filter(run.heads["rank"].is_not_null())
    columns = ["layer", "block", "head", "head_delta", "head_delta_relative", "shared_share"]
    return {name: known.filter(model=name).sort("rank").select(columns).head(SHOWN_HEADS) for name in _domains(run)}


def most_specific(run: Run) -> dict[str, pl.DataFrame]:
    """Return the heads of each domain whose lowest score against any other is the highest."""
    scores = run.scores.filter(run.scores["score"].is_not_null()).drop("reference")
    lowest = scores.group_by("domain", "layer", "block", "head", maintain_order=True).min()
    ordered = lowest.sort("score", descending=True, maintain_order=True)
    return {name: ordered.filter(domain=name).drop("domain").head(SHOWN_HEADS) for name in _domains(run)}


def _domains(run: Run) -> list[str]:
    return run.models.filter(role="tuned")["model"].to_list()


def _domain_sentence(row: Mapping[str, Any], count: int) -> str:
    share = row["head_top10_share"]
    parts = [f"relative change of attention {number(row['attention_delta_relative'])}"]
    if share is not None:
        chance = percent(row["head_top10_share_chance"])
        noise = row.get("head_top10_share_noise")
        beside = f"noise {percent(noise)}, even spread {chance}" if noise is not None else f"even spread {chance}"
        parts.append(f"top tenth of {count} heads carries {percent(share)} ({beside})")
        parts.append(f"Gini {number(row['head_gini'])}")
    if row["shared_cosine"] is not None:
        parts.append(f"cosine with the other domains' mean {number(row['shared_cosine'])}")
    return f"{row['model']}: " + "; ".join(parts)


def _say_heads(title: str, tops: Mapping[str, pl.DataFrame], column: str) -> None:
    """Print one column of heads for each domain."""

    def named(row: Mapping[str, Any]) -> str:
        block = "" if row["block"] == "attn" else f"{row['block']} "
        return f"{block}L{row['layer']} h{row['head']}  {number(row[column])}"

    cells = [[named(row) for row in top.iter_rows(named=True)] for top in tops.values()]
    ranks = [[str(rank), *row] for rank, row in enumerate(zip_longest(*cells, fillvalue=""), start=1)]
    say_table(["", *tops], ranks, title=title)


def _agreement(run: Run) -> list[list[str]]:
    """Return Spearman's correlation above the diagonal, the cosine below it."""
    names = _domains(run)
    found = {(row["a"], row["b"]): row for row in run.domains.iter_rows(named=True)}

    def cell(a: str, b: str) -> str:
        if a == b:
            return ""
        return number(found[a, b]["spearman"] if (a, b) in found else found[b, a]["cosine"])

    return [[a, *(cell(a, b) for b in names)] for a in names]


# inspect, metrics, report, plot


def show_lineage(run: Run, given: Given) -> None:
    """Print how each pair is related, strangers first in one sentence, and the branches of the tree."""
    warn(run.manifest["warnings"])
    pairs = {(row["a"], row["b"]): row for row in run.lineage.iter_rows(named=True)}
    told = [row for row in pairs.values() if row["lineage"] in ("stranger", "rearranged")]
    for row in told[:SHOWN_HEADS]:
        both = f"{row['a']} and {row['b']}"
        tables = f" They share {', '.join(map(printable, row['shared']))} to the bit." if row["shared"] else ""
        if row["lineage"] == "stranger":
            say(f"{both} are strangers: neither descends from the other (r {number(row['r'])}).{tables}")
        else:
            say(f"{both}: one is the other rearranged (layers, heads or neurons at other places).")
    if len(told) > SHOWN_HEADS:
        say(f"... and {len(told) - SHOWN_HEADS} pairs more; the table below has them all.")
    names = run.models["model"].to_list()
    table = []
    for a in names:
        cells = [pairs.get((a, b), pairs.get((b, a))) for b in names]
        table.append([a, *("" if one is None else _related(one) for one in cells)])
    say_table(["", *names], table, title="Median correlation of the entries of the blocks' matrices:")
    if len(run.tree):
        arrow = "->" if run.manifest["settings"]["root"] else "-"
        branches = ", ".join(f"{a} {arrow} {b} ({r:.3f})" for a, b, r in run.tree.iter_rows())
        say(f"Tree{'' if given['root'] else ', without a root'}: {branches}")
    if middles := run.models.filter("middle")["model"].to_list():
        say(f"In the middle of a path: {', '.join(middles)}")
    say_place(given, "run")


def _related(pair: Mapping[str, Any]) -> str:
    return pair["lineage"] if pair["r"] is None else f"{pair['r']:.3f} {pair['lineage']}"


def sum_up_lineage(run: Run, given: Given) -> dict[str, Any]:
    """Return pairs, branches and models."""
    found = {name: run[name].to_dicts() for name in ("lineage", "tree", "models")}
    return {**kept(run.manifest), **found, "run": place(given)}


def show_inspection(found: Inspection, given: Given) -> None:
    """Print what the headers of a checkpoint tell."""
    from diffract.settings import size_text

    known = ", ".join(f"{k} {v}" for k, v in found.dimensions.items() if v is not None)
    parameters, bytes_, peak = size_text(found.parameters, ""), size_text(found.size_bytes), size_text(found.peak_bytes)
    say(printable(found.reference))
    say(f"  architecture  {found.family}" + (f" ({known})" if known else ""))
    say(f"  tensors       {found.tensors}, {parameters} parameters, {bytes_}")
    say(f"  a scan takes  {found.matrices} matrices:")
    for kind in found.kinds:
        rows, cols = kind.shape
        say(f"    {kind.count:6d} x {printable(kind.part):24s} {rows} x {cols}  {kind.dtype}")
    if found.left_out:
        say(f"  left out      {', '.join(f'{count} {outcome}' for outcome, count in found.left_out.items())}")
    work, seconds = size_text(found.multiplications, ""), found.seconds_per_core
    minutes = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
    time = f"{seconds:.1f} s" if seconds < 60 else minutes
    say(f"  cost          about {work} multiplications, {time} on one core, {peak} of workspace for the largest tensor")
    warn(found.warnings)


def show_metrics(found: Mapping[str, Any], given: Given) -> None:
    """Print the catalog of metrics, or of the facts that a metric can be made of."""
    for fact in found.get("facts", []):
        say(f"{fact['name']}  (needs {fact['needs']})\n    {fact['summary']}")
    for row in found.get("metrics", []):
        source = f"  [{row['source']}]" if row["source"] else ""
        say(f"{row['name']}  ({row['group']}, of a {row['of']}, needs {row['needs']})")
        say(f"    {row['summary']}; unit {row['unit']}, range {row['range']}{source}")
    if found.get("extensions"):
        say("installed extensions: " + ", ".join(found["extensions"]))


def show_cache(found: Mapping[str, Any], given: Given) -> None:
    """Print what the cache holds, and what was removed from it."""
    from diffract.settings import size_text

    say(f"{found['folder']}: {size_text(sum(row['size_bytes'] for row in found['kinds']))}")
    rows = [
        [r["kind"], f"{r['files']:,}", size_text(r["size_bytes"]), f"{r['unused_days']:.1f}"] for r in found["kinds"]
    ]
    say_table(["kind", "files", "size", "days unused at most"], rows)
    if given["prune"] is not None:
        say(f"removed: {found['removed']} files, {size_text(found['removed_bytes'])}")


def list_plots() -> None:
    """Print the kinds of figures with their options."""
    from diffract.plots import KINDS

    for name, kind in KINDS.items():
        say(f"{name:14s}{kind.summary}")
        say(f"{'':14s}options: {', '.join(f'--{option}' for option in kind.options)}")


def show_path(what: str) -> Callable[[Path, Given], None]:
    """Return a function that prints where something lies."""
    return lambda path, given: say(f"{what}: {path}")


# edits


def show_edits(found: Sequence[Edited | EditPreview], given: Given) -> None:
    """Print what each step did or would do, and what was written or would be."""
    from diffract.edits.to_files import said
    from diffract.settings import size_text

    edited: Any
    for edited in found:
        for label in [] if given["dry_run"] else edited.manifest["same_weights_as"]:
            say(f"THE SAME WEIGHTS as {printable(label)}: every tensor that was written is equal to the bit.")
        for step in sum_up_edit(edited)["steps"]:
            say(f"{step['step']}:")
            for key, value in step["summary"].items():
                say(f"  {key:<{NAME_WIDTH}} {said(value)}")
        if given["dry_run"]:
            written = "the adapter" if edited.written_bytes is None else size_text(edited.written_bytes)
            say(f"would change {edited.changed} of {edited.tensors} tensors")
            say(f"would read {size_text(edited.read_bytes)}, write {written}, in about {edited.seconds:.3g} s")
        else:
            say(f"written: {edited.folder} (details in manifest.json)")


def sum_up_edits(found: Sequence[Edited | EditPreview], given: Given) -> Any:
    """Return what was done or would be: of one checkpoint, or a list of them."""
    each = [sum_up_edit(edited) for edited in found]
    return each if len(each) > 1 else each[0]


def sum_up_edit(edited: Any) -> dict[str, Any]:
    """Return what was done for one checkpoint, or everything that is known beforehand."""
    if hasattr(edited, "manifest"):
        told = {name: edited.manifest[name] for name in ("steps", "same_weights_as")}
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
        lines = [_difference(row, before[row["task"]]) for row in differences.iter_rows(named=True)]
        headers = ["task", "other", "difference", "95% interval", "", "p", "p (Holm)"]
        say_table(headers, lines, title=f"Against {other.manifest['models'][0]['reference']}, item by item:")
    say_place(given, "run")


def _difference(row: Mapping[str, Any], before: float) -> list[str]:
    verdict = "better" if row["gain"] > 0 else "worse" if row["gain"] < 0 else "the same"
    ends = interval(row["low"], row["high"], "+.3g")
    values = [row["task"], number(before, 4), f"{row['difference']:+.3g}", ends, verdict]
    return [*values, number(row["p"]), number(row["p_holm"])]


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
