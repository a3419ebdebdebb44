"""A finding: what was claimed, what came out here, against which control, and in words whether it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import plotly.io
import polars as pl

from diffract.errors import RunError, printable
from diffract.folders import whole_folder
from diffract.studies.settings import Name

Verdict = Literal["holds", "does not hold", "cannot tell"]


@dataclass(frozen=True)
class Number:
    """A number with its interval.

    Attributes:
        name: What it is.
        value: The number; null if there is none.
        low: Lower end of its 95% interval, where there is one.
        high: Upper end.
        unit: Such as bits per byte.
        chance: What the control, or chance, gives.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class Finding:
    """One section of a study.

    Attributes:
        name: Of the recipe.
        title: A heading.
        claim: What is expected elsewhere.
        verdict: Whether it holds here.
        because: Why that is the verdict, in words.
        control: What the numbers are held against.
        numbers: The numbers that the verdict is made of, and others worth knowing.
        figures: Captions and figures.
        tables: What the figures are drawn from.
    """

    name: Name
    title: str
    claim: str
    verdict: Verdict
    because: str
    control: str
    numbers: list[Number]
    figures: list[tuple[str, go.Figure]] = field(default_factory=list)
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)


def save_finding(finding: Finding, folder: Path, *, key: str) -> None:
    """Write a finding; the folder appears whole or not at all.

    Args:
        finding: What to write.
        folder: Where.
        key: Of what it was made from.
    """
    plain = {"format": 1, "kind": "finding", "key": key} | {
        name: value for name, value in vars(finding).items() if name not in ("figures", "tables", "numbers")
    }
    plain["numbers"] = [asdict(number) for number in finding.numbers]
    plain["figures"] = [{"caption": caption, "figure": json.loads(made.to_json())} for caption, made in finding.figures]
    plain["tables"] = list(finding.tables)
    with whole_folder(folder, force=True) as draft:
        for name, table in finding.tables.items():
            table.write_parquet(draft / f"{name}.parquet")
        (draft / "manifest.json").write_text(json.dumps(plain), encoding="utf-8")


def load_finding(folder: Path, *, key: str | None = None) -> Finding | None:
    """Read a finding; none if there is none, or one that was made from something else.

    Raises:
        RunError: It is damaged.
    """
    if not folder.exists():
        return None
    try:
        plain: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if key is not None and plain.pop("key") != key:
            return None
        kept = {name: plain[name] for name in ("name", "title", "claim", "verdict", "because", "control")}
        figures = [(f["caption"], plotly.io.from_json(json.dumps(f["figure"]))) for f in plain["figures"]]
        tables = {name: pl.read_parquet(folder / f"{name}.parquet") for name in plain["tables"]}
        return Finding(**kept, numbers=[Number(**n) for n in plain["numbers"]], figures=figures, tables=tables)
    except (OSError, KeyError, ValueError, TypeError, pl.exceptions.PolarsError) as error:
        raise RunError(
            f"{str(folder)!r} is damaged ({printable(error)}). Remove it and run the study again."
        ) from error
