"""What is printed of analyses: a function that shows a run, and one that sums it up for ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.cli.console import Given, kept, number, percent, place, say, say_place, say_table, warn
from diffract.errors import printable

if TYPE_CHECKING:
    import polars as pl

    from diffract.inspection import Inspection
    from diffract.run import Run

EVOLVING = {
    "delta_relative": ("change", "of the weights relative to {against} (Frobenius norm)"),
    "lineage_correlation": ("correlation", "of the weights with those"),
    "value_share": ("in values", "share of it in singular values"),
    "head_top10_share": ("top heads", "share of it in the top tenth of heads"),
    "stable_rank_median": ("stable rank", "median over matrices"),
    "peaked_matrices": ("peaked", "matrices with at least two spectral peaks (where nulls are drawn, beyond them)"),
}
"""What is shown of a trajectory's ``models``, as far as it was computed: what the table calls it, and what that is."""

SHOWN_HEADS = 5
"""Heads of each domain that are shown."""

APART = {"stranger": "no descendant of the base", "rearranged": "parts of the base at other places"}
"""What is said of a model whose change as a whole has no numbers."""


# scan, compare, trajectory


def show_analysis(run: Run, given: Given) -> None:
    """Print what a comparison has to say first, then a sentence on each model of it or of a scan."""
    _say_notable(run)
    warn(run.manifest["warnings"])
    for row in run.models.iter_rows(named=True):
        say(_model_sentence(row))
    nulls = run.manifest.get("nulls", {"drawn": 0, "of": 0})
    if nulls["drawn"] < nulls["of"]:
        say(f"nulls of many draws: for {nulls['drawn']} of {nulls['of']} matrices (--nulls all for every one)")
    _say_timing(run)
    say_place(given, "report", "report.html")


def _say_notable(run: Run) -> None:
    """Print what has to be said of each model before any number."""
    for name, sentences in run.manifest.get("notable", {}).items():
        for sentence in sentences:
            say(f"{printable(name)}: {sentence}")


def _say_timing(run: Run) -> None:
    """Print where the time went, where that was asked for."""
    if seconds := run.manifest.get("timing"):
        told = ", ".join(f"{piece} {_time(own)}" for piece, own in seconds.items())
        say(f"time, threads together: {told}; from start to end {_time(run.manifest['seconds'])}")


def sum_up_analysis(run: Run, given: Given) -> dict[str, Any]:
    """Return the models of a scan, a comparison or a trajectory, with settings and places."""
    places = {"run": place(given), "report": place(given, "report.html")}
    return {**kept(run.manifest, ("notable",)), "models": run.models.to_dicts(), **places}


def _model_sentence(row: dict[str, Any]) -> str:
    from diffract.report.words import BEYOND, beside_noise, is_rounding, rest_of_change, times
    from diffract.settings import size_text

    head = f"{row['model']} ({row['role']}, {row['family']}): "
    if row["role"] != "tuned":
        return f"{head}{size_text(row['parameters'], '')} parameters, {row['matrices']} matrices"
    if row.get("lineage") in APART:
        return f"{head}{APART[row['lineage']]}"
    if row.get("delta_relative") == 0:
        return f"{head}none of its matrices changed"
    relative = f"relative change {number(row.get('delta_relative'))}"
    parts = [relative + rest_of_change(row)]
    if is_rounding(row):
        return head + parts[0]
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
    marked = [f"{row['model']} BREAKS" if row.get("breaks") else row["model"] for row in rows]
    cells = [[_evolving(name, row[name]) for name in shown] for row in rows]
    say_table(headers, [[name, *own] for name, own in zip(marked, cells, strict=True)])
    if known := [" ".join(EVOLVING[name]) for name in shown if name in EVOLVING]:
        say("; ".join(known).format(against=f"the {run.manifest['settings']['against']} checkpoint"))
    _say_timing(run)
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
    _say_notable(run)
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
    _say_timing(run)
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


# any of these, a share of one, or the run that shares are joined to


def show_share(run: Run, given: Given) -> None:
    """Print what a share did, and what comes next."""
    share, tasks = run.manifest["share"], run.tasks
    say(
        f"share {share['index']} of {share['count']}: {len(tasks)} of {share['tasks']} tensors, "
        f"{tasks['matrices'].sum()} matrices, {run.manifest['seconds']:.1f} s of work"
    )
    say(f"When all are there: diffract collect {given['output']}")


def sum_up_share(run: Run, given: Given) -> dict[str, Any]:
    """Return which share it is, and its tasks with their seconds."""
    return {**kept(run.manifest, ("share", "made_on")), "tasks": run.tasks.to_dicts(), "run": place(given)}


SHOWN_KINDS: Mapping[str, tuple[Callable[[Run, Given], None], Callable[[Run, Given], dict[str, Any]]]] = {
    "scan": (show_analysis, sum_up_analysis),
    "compare": (show_analysis, sum_up_analysis),
    "trajectory": (show_trajectory, sum_up_analysis),
    "heads": (show_heads, sum_up_heads),
    "share": (show_share, sum_up_share),
}
"""How a run of each kind is shown and summed up."""


def show_run(run: Run, given: Given) -> None:
    """Print what a run of its kind has to say; of ``collect`` the run lies where the shares did."""
    SHOWN_KINDS[run.kind][0](run, {"output": given.get("run"), **given})


def sum_up_run(run: Run, given: Given) -> dict[str, Any]:
    """Return what ``--json`` prints of a run of its kind."""
    return SHOWN_KINDS[run.kind][1](run, {"output": given.get("run"), **given})


# inspect, metrics, report, plot


def show_lineage(run: Run, given: Given) -> None:
    """Print families and strangers in sentences, how near each pair is as a matrix, and the branches of the tree."""
    from diffract.plots.lineage import near
    from diffract.report.words import kinship

    warn(run.manifest["warnings"])
    names = run.models["model"].to_list()
    for _, sentence, details in kinship(run.tables):
        say(sentence)
        for detail in details:
            say(f"  {detail}")
    pairs = {(row["a"], row["b"]): row["r"] for row in run.lineage.iter_rows(named=True)}
    places = {name: str(place) for place, name in enumerate(names, start=1)}
    table = []
    for a in names:
        cells = ["" if a == b else near(pairs.get((a, b), pairs.get((b, a)))) for b in names]
        table.append([f"{places[a]} {a}", *cells])
    say_table(["", *places.values()], table, title="Median correlation of the entries of the blocks' matrices:")
    for rooted, title in ((True, "Tree, from its root"), (False, "Tree, without a root")):
        rows = [row for row in run.tree.iter_rows(named=True) if bool(row["rooted"]) == rooted]
        if branches := [f"{row['a']} {'->' if rooted else '-'} {row['b']} ({near(row['r'])})" for row in rows]:
            say(f"{title}: {', '.join(branches)}")
    if told_by := run.manifest["settings"].get("root_told_by"):
        say(f"The earliest is told by {told_by}.")
    if middles := run.models.filter("middle")["model"].to_list():
        say(f"In the middle of a path, as base of its ends or as a stage between them: {', '.join(middles)}")
    say_place(given, "report", "report.html")


def sum_up_lineage(run: Run, given: Given) -> dict[str, Any]:
    """Return pairs, branches and models."""
    found = {name: run[name].to_dicts() for name in ("lineage", "tree", "models")}
    return {**kept(run.manifest), **found, "run": place(given)}


TOPICS = {
    "precision": "Precision",
    "values": "Values",
    "copies": "Copies",
    "tokens": "Tokens",
    "files": "Files",
    "card": "Card and licence",
}
"""What the terminal calls the topics of an audit, in this order."""

SHOWN_FACTS = 12
"""Facts of a topic that are printed."""


def show_audit(run: Run, given: Given) -> None:
    """Print the facts about a checkpoint by topic."""
    warn(run.manifest["warnings"])
    for topic, title in TOPICS.items():
        rows = run.facts.filter(topic=topic).to_dicts()
        if not rows:
            say(f"{title}: nothing to tell.")
            continue
        say(f"{title}:")
        for row in rows[:SHOWN_FACTS]:
            count = (
                f" ({row['count']:,} of {row['of']:,})" if row["of"] else f" ({row['count']:,})" if row["count"] else ""
            )
            note = f": {printable(row['note'])}" if row["note"] else ""
            say(f"  {printable(row['fact'])}{count}: {printable(row['where'])}{note}")
        if len(rows) > SHOWN_FACTS:
            say(f"  and {len(rows) - SHOWN_FACTS} more of the kind: --json or -o RUN has them.")
    say_place(given, "run")


def sum_up_audit(run: Run, given: Given) -> dict[str, Any]:
    """Return all facts."""
    return {**kept(run.manifest), "facts": run.facts.to_dicts(), "run": place(given)}


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
    alone, pair = (_time(seconds) for seconds in (found.seconds_per_core, found.compare_seconds))
    say(f"  cost          about {alone} of one core, a comparison {pair}; {peak} of workspace for the largest tensor")
    for what, shares in {"a scan": found.scan_shares, "a comparison": found.compare_shares}.items():
        if shares:
            mean = sum(shares) / len(shares)
            most = max(shares) / mean if mean else 1.0
            say(f"  {len(shares)} shares      {what}: {_time(mean)} each, the longest {most:.2f} times that")
    warn(found.warnings)


def _time(seconds: float) -> str:
    minutes = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
    return f"{seconds:.1f} s" if seconds < 60 else minutes


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


def show_fetched(found: Mapping[str, Any], given: Given) -> None:
    """Print how many bytes were fetched, or would be."""
    from diffract.settings import size_text

    done = "fetched" if found["fetched"] else "to fetch"
    say(f"{done}: {size_text(found['fetch_bytes'])}")


def list_plots() -> None:
    """Print the kinds of figures with their options."""
    from diffract.plots import KINDS

    for name, kind in KINDS.items():
        say(f"{name:14s}{kind.summary}")
        say(f"{'':14s}options: {', '.join(f'--{option}' for option in kind.options)}")


def show_path(what: str) -> Callable[[Path, Given], None]:
    """Return a function that prints where something lies."""
    return lambda path, given: say(f"{what}: {path}")
