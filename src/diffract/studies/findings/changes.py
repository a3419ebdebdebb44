"""Where the change lies: in singular vectors rather than values, and in few heads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract import stats
from diffract.api import compare
from diffract.api import heads as measure
from diffract.plots.agreement import profile
from diffract.plots.heads import head_maps, lorenz
from diffract.plots.searches import curves
from diffract.studies.finding import RESAMPLES, Evidence, Number, better, finding, median, shown
from diffract.studies.study import NOISE, Study

METRICS = (
    "delta_frobenius", "delta_relative", "value_share_free", "spectral_shift_share_free",
    "left_agreement_mean", "left_agreement_chance", "left_subspace_8", "left_subspace_8_chance", "profile",
)  # fmt: skip


@finding(
    title="Singular values against singular vectors",
    claim="Continual pre-training moves singular values less than noise of the same norm does; it turns vectors.",
    control="noise of the same norm in every tensor; of both changes, what scales a matrix as a whole is left out",
)
def vectors(study: Study) -> Evidence:
    """Split each matrix's change into values and vectors; noise of the same norms is the control.

    Of any small change in many dimensions nearly all turns vectors, of noise 99%: alone, the share says nothing.
    """
    tuned = study.tuned
    study.say(f"base against {len(tuned)} domains and noise")
    models = [f"{name}={ref}" for name, ref in {**tuned, NOISE: study.noise(study.recipe.target)}.items()]
    run = compare(study.base, *models, metrics=METRICS, cache=False, noise="none")
    # A share of no change is no number; and of tables of tokens only those rows change whose tokens are read.
    changed = run.metrics.filter(pl.col("delta_frobenius") > 0, pl.col("block").is_in(["attn", "mlp"]))
    of = {name: changed.filter(pl.col("model") == name) for name in [*tuned, NOISE]}
    moved, along = (
        {name: median(f"{metric}, {name}, median over matrices", rows[metric].to_list()) for name, rows in of.items()}
        for metric in ("spectral_shift_share_free", "value_share_free")
    )
    target = study.recipe.target
    # Matrix by matrix, as they differ more from each other than any from its noise.
    pairs = of[target].join(of[NOISE], on="name", suffix="_noise")
    less = median(
        "share of the change that moving singular values alone would take, noise's less its own, median over matrices",
        (pairs["spectral_shift_share_free_noise"] - pairs["spectral_shift_share_free"]).to_list(),
    )
    verdict, because = better(less, "singular values move less than noise of the same norm moves them")
    beside = f"Along directions of the base lie {shown(along[target])} of the change, {shown(along[NOISE])} of noise."
    return Evidence(
        verdict,
        f"{because} {beside}",
        numbers=[less, *moved.values(), *along.values()],
        figures=[
            _figure(of, "value_share_free", "share of the change in singular values"),
            _figure(of, "left_agreement_mean", "mean |cos| of left vectors"),
            (
                "Where along the spectrum of the base the change sits, beside what noise and turns would give.",
                profile(run.metrics, run.spectra, model=study.recipe.target),
            ),
        ],
        tables={"metrics": run.metrics, "models": run.models},
    )


def _figure(of: dict[str, pl.DataFrame], metric: str, title: str) -> tuple[str, go.Figure]:
    table = pl.concat(
        rows.group_by("layer").agg(
            y=pl.col(metric).median(), low=pl.col(metric).quantile(0.25), high=pl.col(metric).quantile(0.75)
        ).select(name=pl.lit(name), x="layer", y="y", low="low", high="high")
        for name, rows in of.items()
    )  # fmt: skip
    return f"{title[0].upper()}{title[1:]} by layer: median over matrices, band of quartiles.", curves(
        table, x="layer", y=title
    )


@finding(
    title="Heterogeneity of attention heads",
    claim="Few heads carry most of the change; some change in every domain, some are specific to one.",
    control="noise of the same norm in every tensor; chance cosine of random directions",
)
def heads(study: Study) -> Evidence:
    """Measure how unevenly heads change, and what domains share; noise of the same norms is the control."""
    tuned, target = study.tuned, study.recipe.target
    run = measure(study.base, *(f"{name}={ref}" for name, ref in tuned.items()), cache=False)
    noise = measure(study.base, f"{NOISE}={study.noise(target)}", cache=False)
    norms = {name: _norms(run.heads, name) for name in tuned} | {NOISE: _norms(noise.heads, NOISE)}
    shares = {name: _top_share(name, values) for name, values in norms.items()}
    even = shares[NOISE]
    verdict, because = better(
        shares[target],
        "the top tenth of heads carries twice what it would carry of noise and more",
        than=2 * (even.value or 0),
    )
    alike, agnostic = run.domains, run.models.filter(role="tuned")["agnostic_share"][0]
    shared = Number("share of attention's change that all domains have in common", agnostic, chance=0.0)
    return Evidence(
        verdict,
        f"{because} {_said(alike)}",
        numbers=[*shares.values(), *_between(alike, norms), shared],
        figures=[
            ("Norm of the change of every head, by domain.", head_maps(run.heads)),
            (
                "What share of the squared change the least changed heads have together; noise beside it.",
                lorenz(pl.concat([run.lorenz, noise.lorenz]), pl.concat([run.models, noise.models], how="diagonal")),
            ),
        ],
        tables={"heads": run.heads, "domains": run.domains, "scores": run.scores, "noise": noise.heads},
    )


def _between(alike: pl.DataFrame, norms: dict[str, np.ndarray]) -> Iterator[Number]:
    """Yield what two domains have in common: which heads change, and in which direction."""
    for row in alike.iter_rows(named=True):
        pair = f"{row['a']} and {row['b']}"
        both = norms[row["a"]], norms[row["b"]]
        # A pair of heads is drawn together; the interval is over heads.
        low, high = stats.bootstrap(stats.spearman, *both, resamples=RESAMPLES // 4)
        rho = float(stats.spearman(*both))
        yield Number(f"rank correlation of heads' changes, {pair}", rho, low=low, high=high, chance=0.0)
        yield Number(f"cosine of attention's changes, {pair}", row["cosine"], chance=row["cosine_chance"])


def _norms(table: pl.DataFrame, name: str) -> np.ndarray:
    return table.filter(model=name, status="ok")["head_delta"].to_numpy()


def _top_share(name: str, norms: np.ndarray) -> Number:
    """Return what the top tenth of heads holds of the squared change, with a bootstrap interval over heads."""
    # Squares of norms add up, as norms do not.
    squares = norms**2
    low, high = stats.bootstrap(stats.top_share, squares, resamples=RESAMPLES)
    title = f"share of the squared change in the top tenth of heads, {name}"
    even = stats.top_count(len(norms)) / len(norms)
    return Number(title, float(stats.top_share(squares)), low=low, high=high, chance=even)


def _said(alike: pl.DataFrame) -> str:
    if not alike.height:
        return "With one domain nothing can be said of what domains share."
    low, high = alike["spearman"].min(), alike["spearman"].max()
    cosine = alike["cosine"].abs().max()
    return (
        f"Between {alike.height} pairs of domains heads' changes have rank correlations of {low:.2f} to {high:.2f}; "
        f"the changes themselves have cosines of at most {cosine:.2f} (chance {alike['cosine_chance'].max():.4f})."
    )
