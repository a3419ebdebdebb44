"""The report of a study: one self-contained HTML file, a section for each finding."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from diffract._version import __version__
from diffract.errors import printable
from diffract.folders import write_text
from diffract.studies.family import Family
from diffract.studies.finding import Finding, Number
from diffract.studies.settings import StudyRecipe

BADGES = {"holds": "yes", "does not hold": "no", "cannot tell": "open"}
"""Verdicts by the class that colours them."""


def write_report(recipe: StudyRecipe, family: Family, findings: list[Finding], path: Path) -> Path:
    """Write the report; it appears whole or not at all, and needs no network.

    Raises:
        RunError: It cannot be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"printable": printable, "value": value, "interval": interval}
    text = environment.from_string(_resource("diffract.studies", "study.html.j2")).render(
        recipe=recipe,
        family=family,
        findings=findings,
        badges=BADGES,
        version=__version__,
        css=Markup(_resource("diffract.report", "report.css") + _resource("diffract.studies", "study.css")),
        plotly=Markup(get_plotlyjs()),
        figures=Markup(_embedded(findings)),
    )
    return write_text(path, text)


def value(number: float | None) -> str:
    """Return a number for people.

    >>> value(0.123456), value(None), value(12345.6)
    ('0.1235', '-', '1.235e+04')
    """
    return "-" if number is None else f"{number:.4g}"


def interval(number: Number) -> str:
    """Return the interval of a number, or nothing."""
    return "" if number.low is None or number.high is None else f"{number.low:.3g} to {number.high:.3g}"


def _embedded(findings: list[Finding]) -> str:
    """Return all figures as JSON that is safe within a script element."""
    plain: dict[str, Any] = {
        f"{finding.name}-{index}": json.loads(made.to_json())
        for finding in findings
        for index, (_, made) in enumerate(finding.figures)
    }
    return json.dumps(plain).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _resource(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")
