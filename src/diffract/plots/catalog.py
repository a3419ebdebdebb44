"""Every kind of figure: what draws it, what it needs, and which options it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import plotly.graph_objects as go
import polars as pl

from diffract.errors import RunError, SelectionError, printable, suggest
from diffract.plots.agreement import agreement
from diffract.plots.choice import (
    Choice,
    Frames,
    Tabled,
    base_model,
    of_projection,
    pick,
    pick_matrix,
    pick_metric,
    pick_model,
    read_frames,
)
from diffract.plots.heads import (
    SCALES,
    SIGNED,
    SIZES,
    head_effects,
    head_heatmap,
    head_maps,
    layer_violins,
    lorenz,
    reference_scores,
)
from diffract.plots.searches import (
    MEASURES,
    connectivity_matrix,
    model_paths,
    model_simplex,
    rewind_curves,
    truncation_curves,
)
from diffract.plots.spectra import AXES as DENSITY_AXES
from diffract.plots.spectra import density, ks_scan, spectrum
from diffract.plots.training import AXES as EVOLUTION_AXES
from diffract.plots.training import OVER, evolution, ridge

COMPARE = "diffract compare BASE TUNED -o RUN"
SCAN_ALL = "diffract scan MODEL --metrics all -o RUN` or `diffract compare BASE TUNED --metrics all -o RUN"
HEADS = "diffract heads BASE TUNED -o RUN"
TRAJECTORY = "diffract trajectory MODEL... -o RUN"
SEARCH_REWIND = "diffract search rewind BASE TUNED -o RUN"
SEARCH_TRUNCATE = "diffract search truncate BASE TUNED -o RUN"
CONNECT = "diffract connect BASE NAME=MODEL NAME=MODEL --eval TASKS -o RUN"

CHANGE_FIRST = ("delta_relative", "effective_rank", "stable_rank")
SHADE = "left_agreement_mean"


@dataclass(frozen=True)
class Kind:
    """A row of the catalog.

    Attributes:
        draw: Draws it.
        summary: One line.
        make: The command that makes a run for it.
        tables: Which must be there.
        quantities: Of the spectra table; all must be there.
        columns: Of the first table; at least one must be there.
        further: Tables that it uses where they are there.
        options: Names of the options that it takes.
    """

    draw: Callable[[Frames, Choice], go.Figure]
    summary: str
    make: str
    tables: tuple[str, ...]
    quantities: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    further: tuple[str, ...] = ("models",)
    options: tuple[str, ...] = ()


def _density(frames: Frames, choice: Choice) -> go.Figure:
    model = pick_model(frames, choice.model)
    matrix = pick_matrix(frames, choice.matrix, model, "sigma")
    axes = pick("axes", choice.axes, DENSITY_AXES)
    return density(frames["spectra"], frames["metrics"], matrix, model=model, axes=axes)


def _ks(frames: Frames, choice: Choice) -> go.Figure:
    model = pick_model(frames, choice.model)
    matrix = pick_matrix(frames, choice.matrix, model, "pl_ks_scan")
    return ks_scan(frames["spectra"], frames["metrics"], matrix, model=model)


def _spectrum(frames: Frames, choice: Choice) -> go.Figure:
    model = pick_model(frames, choice.model)
    base = base_model(frames, model)
    matrix = pick_matrix(frames, choice.matrix, model, "sigma")
    if base is None:
        return spectrum(frames["spectra"], matrix, base=model)
    return spectrum(frames["spectra"], matrix, base=base, tuned=model)


def _agreement(frames: Frames, choice: Choice) -> go.Figure:
    model = pick_model(frames, choice.model)
    matrix = pick_matrix(frames, choice.matrix, model, "left_agreement")
    return agreement(frames["spectra"], frames["metrics"], matrix, model=model, base=base_model(frames, model))


def _heads(frames: Frames, choice: Choice) -> go.Figure:
    metric = pick("metric", choice.metric, [m for m in SCALES if m in frames["heads"].columns])
    return head_maps(_domains(frames, choice.model), metric=metric)


def _lorenz(frames: Frames, choice: Choice) -> go.Figure:
    return lorenz(_domains(frames, choice.model, "lorenz"), frames["models"])


def _scores(frames: Frames, choice: Choice) -> go.Figure:
    names = frames["heads"]["model"].unique(maintain_order=True).to_list()
    if len(names) < 2:
        raise SelectionError(
            "scores hold domains against each other: the run needs two tuned models. Make one with "
            "`diffract heads BASE TUNED1 TUNED2 -o RUN`."
        )
    reference = pick("reference", choice.reference, names)
    others = [name for name in names if name != reference]
    shown = others if choice.model is None else [pick("model", choice.model, others)]
    return reference_scores(frames["heads"].filter(pl.col("model").is_in([*shown, reference])), reference)


def _evolution(frames: Frames, choice: Choice) -> go.Figure:
    metrics = of_projection(frames["metrics"], choice.projection)
    metric = pick_metric(metrics, choice.metric, CHANGE_FIRST[1:])
    names = metrics["name"].unique(maintain_order=True).to_list()
    matrix = None if choice.matrix is None else pick("matrix", choice.matrix, names)
    axes = pick("axes", choice.axes, EVOLUTION_AXES)
    return evolution(metrics, metric, over=_over(metrics, choice.over), matrix=matrix, axes=axes)


def _ridge(frames: Frames, choice: Choice) -> go.Figure:
    metrics, over = frames["metrics"], _over(frames["metrics"], choice.over)
    if choice.layer is None and choice.projection is None:
        names = [pick_matrix(frames, choice.matrix, pick_model(frames, None), "sigma")]
        return ridge(frames["spectra"], metrics, names, over=over)
    if choice.matrix is not None:
        raise SelectionError(
            "ridge draws one matrix, or pools those of a layer or projection. Leave out one of the two."
        )
    rows = of_projection(metrics, choice.projection, choice.layer)
    where = "all layers" if choice.layer is None else f"layer {choice.layer}"
    title = f"{where}, {choice.projection or 'all matrices'}"
    return ridge(frames["spectra"], metrics, rows["name"].unique(maintain_order=True).to_list(), title=title, over=over)


def _violins(frames: Frames, choice: Choice) -> go.Figure:
    rows = _of_model(frames, choice)
    metric = pick_metric(rows, choice.metric, CHANGE_FIRST)
    shaded = SHADE in rows.columns and metric != SHADE and rows[SHADE].count() > 0
    title = ", ".join(filter(None, [choice.projection, rows["model"][0]]))
    return layer_violins(rows, metric, colour=SHADE if shaded else None, title=title)


def _head_heatmap(frames: Frames, choice: Choice) -> go.Figure:
    rows = _of_model(frames, Choice(model=choice.model))
    metric = pick_metric(rows, choice.metric, CHANGE_FIRST)
    cut = rows.filter(pl.coalesce("head", "kv_head").is_not_null())["projection"].unique(maintain_order=True).to_list()
    return head_heatmap(rows, metric, pick("projection", choice.projection, cut, "q"), model=rows["model"][0])


def _rewind(frames: Frames, choice: Choice) -> go.Figure:
    points = frames["points"]
    return rewind_curves(points, _task(points, choice.task), measure=pick("metric", choice.metric, list(MEASURES)))


def _truncation(frames: Frames, choice: Choice) -> go.Figure:
    points = frames["points"]
    return truncation_curves(points, _task(points, choice.task), measure=pick("metric", choice.metric, list(MEASURES)))


def _effects(frames: Frames, choice: Choice) -> go.Figure:
    effects = frames["effects"]
    known = [name for name in (SIGNED | SIZES) if effects[name].count() > 0]
    return head_effects(effects, metric=pick("metric", choice.metric, known))


def _paths(frames: Frames, choice: Choice) -> go.Figure:
    paths = frames["paths"]
    return model_paths(paths, task=None if choice.task is None else _task(paths, choice.task))


def _connectivity(frames: Frames, choice: Choice) -> go.Figure:
    pairs = frames["pairs"]
    return connectivity_matrix(pairs, task=None if choice.task is None else _task(pairs, choice.task))


def _simplex(frames: Frames, choice: Choice) -> go.Figure:
    if frames["simplex"].is_empty():
        raise SelectionError("the run has no simplex: that takes three models, and a budget that suffices.")
    return model_simplex(frames["simplex"], _task(frames["simplex"], choice.task))


def _task(table: pl.DataFrame, wanted: str | None) -> str:
    return pick("task", wanted, table["task"].unique(maintain_order=True).to_list())


def _domains(frames: Frames, wanted: str | None, table: str = "heads") -> pl.DataFrame:
    heads = frames[table]
    if wanted is None:
        return heads
    return heads.filter(pl.col("model") == pick("model", wanted, heads["model"].unique(maintain_order=True).to_list()))


def _of_model(frames: Frames, choice: Choice) -> pl.DataFrame:
    model = pick_model(frames, choice.model)
    return of_projection(frames["metrics"].filter(pl.col("model") == model), choice.projection)


def _over(metrics: pl.DataFrame, wanted: str | None) -> str | None:
    known = [c for c in OVER if c in metrics.columns and metrics[c].count() > 0]
    return None if wanted is None else pick("time axis", wanted, known)


ONE_MATRIX = ("matrix", "model")
SPECTRA = ("metrics", "spectra")

KINDS: dict[str, Kind] = {
    "density": Kind(
        _density,
        "density of one matrix's eigenvalues, with the Marchenko-Pastur law, the permuted matrix and four tail fits",
        SCAN_ALL,
        SPECTRA,
        ("sigma",),
        ("pl_alpha", "mp_variance"),
        options=(*ONE_MATRIX, "axes"),
    ),
    "ks": Kind(
        _ks,
        "distance of the best power law for every place where its tail might begin",
        SCAN_ALL,
        SPECTRA,
        ("sigma", "pl_ks_scan"),
        ("pl_xmin",),
        options=ONE_MATRIX,
    ),
    "spectrum": Kind(
        _spectrum,
        "singular values of one matrix: base, tuned, and the change",
        "diffract scan MODEL -o RUN` or `" + COMPARE,
        SPECTRA,
        ("sigma",),
        options=ONE_MATRIX,
    ),
    "agreement": Kind(
        _agreement,
        "how far singular vectors of base and tuned agree along the spectrum, beside chance",
        COMPARE,
        SPECTRA,
        ("left_agreement",),
        options=ONE_MATRIX,
    ),
    "heads": Kind(
        _heads,
        "change of every head, a map for each domain, the same colours in all",
        HEADS,
        ("heads",),
        columns=tuple(SCALES),
        further=(),
        options=("model", "metric"),
    ),
    "lorenz": Kind(
        _lorenz,
        "how unevenly each domain's change is spread over heads",
        HEADS,
        ("lorenz",),
        columns=("change_share",),
        options=("model",),
    ),
    "scores": Kind(
        _scores,
        "which heads a domain changed more than a reference domain did",
        "diffract heads BASE TUNED1 TUNED2 -o RUN",
        ("heads",),
        columns=("head_delta",),
        further=(),
        options=("model", "reference"),
    ),
    "evolution": Kind(
        _evolution,
        "a metric over training: median and quartiles of each projection, or one matrix",
        TRAJECTORY,
        ("metrics",),
        columns=("order",),
        options=("metric", "matrix", "projection", "over", "axes"),
    ),
    "ridge": Kind(
        _ridge,
        "spectra over training, of one matrix or pooled over a layer or projection",
        TRAJECTORY,
        SPECTRA,
        ("sigma",),
        ("order",),
        options=("matrix", "layer", "projection", "over"),
    ),
    "violins": Kind(
        _violins,
        "spread of a metric within each layer, coloured by how far singular vectors agree",
        "diffract scan MODEL -o RUN` or `" + COMPARE,
        ("metrics",),
        options=("metric", "model", "projection"),
    ),
    "head_heatmap": Kind(
        _head_heatmap,
        "a metric over the layers and heads of one projection",
        "diffract scan MODEL -o RUN` or `" + COMPARE,
        ("metrics",),
        options=("metric", "model", "projection"),
    ),
    "rewind": Kind(
        _rewind,
        "quality as more and more heads go back to the base, by several orders, on both splits",
        SEARCH_REWIND,
        ("points",),
        columns=("order",),
        further=(),
        options=("task", "metric"),
    ),
    "effects": Kind(
        _effects,
        "what rewinding each head alone gains, or what cheaper orders go by",
        SEARCH_REWIND,
        ("effects",),
        columns=("effect",),
        further=(),
        options=("metric",),
    ),
    "truncation": Kind(
        _truncation,
        "quality against how much energy, and how many bytes, of the change are kept, beside controls",
        SEARCH_TRUNCATE,
        ("points",),
        columns=("rule",),
        further=(),
        options=("task", "metric"),
    ),
    "paths": Kind(
        _paths,
        "quality on the lines between models, and barriers",
        CONNECT,
        ("paths",),
        further=(),
        options=("task",),
    ),
    "connectivity": Kind(
        _connectivity,
        "barriers between each pair of models",
        CONNECT,
        ("pairs",),
        further=(),
        options=("task",),
    ),
    "simplex": Kind(
        _simplex,
        "quality of mixtures of three models",
        CONNECT,
        ("simplex",),
        further=(),
        options=("task",),
    ),
}


def plot(
    kind: str,
    run: str | Path | Tabled,
    *,
    matrix: str | None = None,
    model: str | None = None,
    metric: str | None = None,
    reference: str | None = None,
    projection: str | None = None,
    layer: int | None = None,
    over: str | None = None,
    axes: str | None = None,
    task: str | None = None,
) -> go.Figure:
    """Draw a figure of a run; needs no weights and no torch.

    Args:
        kind: A name of ``diffract.plots.KINDS``.
        run: A run folder, or a run.
        matrix: A name in the tables. By default, of the matrices with most singular values the one that changed most.
        model: A name in the tables; the first tuned one by default, where a figure shows one.
        metric: A column; ``delta_relative`` or ``effective_rank`` by default.
        reference: The model that ``scores`` holds the others against; the first by default.
        projection: Such as ``q`` or ``attn.q``.
        layer: Whose matrices ``ridge`` pools.
        over: ``tokens``, ``step`` or ``order``; the first that is known for every checkpoint.
        axes: Of y and x: ``log-log`` or ``lin-log`` for ``density``, those and ``lin-lin``, ``log-lin`` for
            ``evolution``.
        task: Of a search; the first, that decided, by default.

    Raises:
        SelectionError: A name is not known, or the kind does not take an option.
        RunError: It is no run folder, or lacks what the figure needs; the message says which command makes it.
    """
    choice = Choice(matrix, model, metric, reference, projection, layer, over, axes, task)
    found = _kind(kind)
    _refuse_ignored(kind, found, choice)
    frames = read_frames(run, (*found.tables, *found.further))
    _check(kind, found, frames)
    return found.draw(frames, choice)


def _kind(name: str) -> Kind:
    if name not in KINDS:
        near = suggest(name, KINDS) or f" Known: {', '.join(KINDS)}."
        raise SelectionError(f"unknown kind of plot {printable(name)!r}.{near}")
    return KINDS[name]


def _refuse_ignored(name: str, kind: Kind, choice: Choice) -> None:
    for option, value in asdict(choice).items():
        if value is not None and option not in kind.options:
            raise SelectionError(f"{name} takes no {option}; it takes {', '.join(kind.options)}.")


def _check(name: str, kind: Kind, frames: Frames) -> None:
    """Say what a run lacks for a figure, and which command makes it."""
    lacks = [f"{table}.parquet" for table in kind.tables if table not in frames]
    if not lacks and kind.quantities:
        has = set(frames["spectra"]["quantity"].unique())
        lacks = [f"{quantity} in spectra.parquet" for quantity in kind.quantities if quantity not in has]
    if not lacks and kind.columns and not set(kind.columns) & set(frames[kind.tables[0]].columns):
        lacks = [f"{' or '.join(kind.columns)} in {kind.tables[0]}.parquet"]
    if lacks:
        raise RunError(f"{name} needs {', '.join(lacks)}, which the run does not have. Make one with `{kind.make}`.")
