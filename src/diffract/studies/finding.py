"""A finding: what was claimed, what came out here, against which control, and in words whether it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import plotly.io
import polars as pl

from diffract import stats
from diffract.errors import RunError, printable
from diffract.store import whole_folder
from diffract.tables import write_table

if TYPE_CHECKING:
    from diffract.studies.study import Study

Verdict = Literal["holds", "does not hold", "cannot tell"]


@dataclass(frozen=True)
class Number:
    """A number with its interval.

    Attributes:
        name: What the number is.
        value: The number; null if there is none.
        low: Lower end of its 95% interval, where there is one.
        high: Upper end.
        unit: Such as bits per byte.
        chance: What the control, or chance, gives.
    """

    name: str
    value: float | None
    _: KW_ONLY
    low: float | None = None
    high: float | None = None
    unit: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What the test of a claim gives.

    Attributes:
        verdict: Whether the claim holds here.
        because: Why that is the verdict, in words.
        numbers: The numbers that the verdict is made of, and others worth knowing.
        figures: Captions and figures.
        tables: What the figures are drawn from.
    """

    verdict: Verdict
    because: str
    numbers: list[Number]
    figures: list[tuple[str, go.Figure]] = field(default_factory=list)
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A claim and its test, which every study can ask for by name.

    Attributes:
        name: What recipes call the finding.
        title: A heading.
        claim: What is expected elsewhere.
        control: What the numbers are held against.
        test: Finds out whether the claim holds in a study.
    """

    name: str
    title: str
    claim: str
    control: str
    test: Callable[[Study], Evidence]


def finding(*, title: str, claim: str, control: str) -> Callable[[Callable[[Study], Evidence]], Finding]:
    """Declare a finding at the function that tests it, whose name it has.

    Args:
        title: A heading.
        claim: What is expected elsewhere.
        control: What the numbers are held against.

    Returns:
        A decorator that makes a record of a function. It registers nothing: ``diffract.studies.findings`` lists what
        there is.
    """
    return lambda test: Finding(test.__name__, title, claim, control=control, test=test)


def save_evidence(found: Evidence, folder: Path, *, key: str) -> None:
    """Write what a test gave; the folder appears whole or not at all.

    Args:
        found: What to write.
        folder: Where to.
        key: Stands for all that the evidence was made from.
    """
    plain = {
        "format": 1,
        "kind": "finding",
        "key": key,
        "verdict": found.verdict,
        "because": found.because,
        "numbers": [asdict(number) for number in found.numbers],
        "figures": [{"caption": caption, "figure": plain_figure(made)} for caption, made in found.figures],
        "tables": list(found.tables),
    }
    with whole_folder(folder, force=True) as draft:
        for name, table in found.tables.items():
            write_table(table, draft / f"{name}.parquet")
        (draft / "manifest.json").write_text(json.dumps(plain), encoding="utf-8")


def plain_figure(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as plain values."""
    return json.loads(str(figure.to_json()))


def load_evidence(folder: Path, *, key: str) -> Evidence | None:
    """Read what a test gave; return none if there is nothing, or it was made from something else.

    Raises:
        RunError: The folder of the finding is damaged.
    """
    if not folder.exists():
        return None
    try:
        plain: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if plain["key"] != key:
            return None
        return Evidence(
            plain["verdict"],
            plain["because"],
            numbers=[Number(**number) for number in plain["numbers"]],
            figures=[(f["caption"], plotly.io.from_json(json.dumps(f["figure"]))) for f in plain["figures"]],
            tables={name: pl.read_parquet(folder / f"{name}.parquet") for name in plain["tables"]},
        )
    except (OSError, KeyError, ValueError, TypeError, RecursionError, pl.exceptions.PolarsError) as error:
        raise RunError(
            f"{str(folder)!r} is damaged ({printable(error)}). Remove it and run the study again."
        ) from error


RESAMPLES = 2000
FEWEST = 5
"""Points below which a rank correlation says nothing."""


def shown(number: Number) -> str:
    """Return a number with its interval, for a sentence.

    >>> shown(Number("gain", 0.25, low=0.125, high=0.5, unit="bits per byte"))
    '0.25 bits per byte (95% interval 0.125 to 0.5)'
    """
    unit = f" {number.unit}" if number.unit else ""
    interval = "" if number.low is None else f" (95% interval {number.low:.3g} to {number.high:.3g})"
    return f"{number.value:.3g}{unit}{interval}" if number.value is not None else "no number"


def better(number: Number, claim: str, *, than: float = 0.0) -> tuple[Verdict, str]:
    """Judge a claim that holds if a number is above another.

    Args:
        number: With its interval.
        claim: What holds if the whole interval is above.
        than: What it is held against.
    """
    said = f"{number.name[0].upper()}{number.name[1:]}: {shown(number)}"
    if number.value is None or number.low is None or number.high is None:
        return "cannot tell", f"{said}; there is no interval to judge by."
    if number.low > than:
        return "holds", f"{said}; {claim}."
    if number.high < than:
        return "does not hold", f"{said}; the opposite of what is claimed ({claim})."
    return "cannot tell", f"{said}; the interval includes {than:.3g}: it cannot be told whether {claim}."


def median(name: str, values: Sequence[float | None], *, unit: str = "", chance: float | None = None) -> Number:
    """Return a median over matrices or heads with its percentile-bootstrap interval over them."""
    known = np.array([v for v in values if v is not None], dtype=float)
    if not len(known):
        return Number(name, None, unit=unit, chance=chance)
    low, high = stats.bootstrap(partial(np.median, axis=-1), known, resamples=RESAMPLES)
    return Number(name, float(np.median(known)), low=low, high=high, unit=unit, chance=chance)


def rank_correlation(name: str, a: npt.ArrayLike, b: npt.ArrayLike, *, given: int = 0) -> Number:
    """Return Spearman's correlation with its interval by Fisher's transformation (Bonett & Wright 2000).

    No interval below four points more than are ``given``; it is approximate below ten.

    Args:
        name: What to call it.
        a: One value for each point.
        b: The same of the other.
        given: Quantities that were taken out of both before, as in a partial correlation.
    """
    count = np.size(a) - given
    if count < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Number(name, None, chance=0.0)
    rho = float(stats.spearman(np.asarray(a, float), np.asarray(b, float)))
    if count < FEWEST:
        return Number(name, rho, chance=0.0)
    low, high = stats.spearman_interval(rho, count)
    return Number(name, rho, low=low, high=high, chance=0.0)
