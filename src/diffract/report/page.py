"""The page: template, style, script and data in one file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from diffract.errors import RunError, printable
from diffract.report.payload import embed, payload
from diffract.report.words import concentration, headlines
from diffract.settings import size_text
from diffract.store import write_text
from diffract.tables import Tables

PAGES = ("scan", "compare", "trajectory", "heads", "lineage")
"""Kinds of run that have a page."""


def write(tables: Tables, path: str | Path) -> Path:
    """Write the report of a run; it appears whole or not at all.

    Raises:
        RunError: Such a run has no report, or the file cannot be written.
    """
    if tables.kind not in PAGES:
        raise RunError(f"a run of `diffract {tables.kind}` has no report; one of {', '.join(PAGES)} has.")
    return write_text(path, render(tables))


def render(tables: Tables) -> str:
    """Return the report of a run as HTML that needs nothing else, no network either."""
    data, found = payload(tables), headlines(tables)
    notable = {printable(name, 60): said for name, said in tables.manifest.get("notable", {}).items()}
    names = dict.fromkeys([*notable, *(h.model for h in found)])
    glossary = tables.manifest["metrics"]
    # by group of the catalog, in its order; what is in none comes last
    groups = sorted(dict.fromkeys(m.get("group", "") for m in glossary.values()), key=lambda group: group == "")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["size"] = size_text
    environment.filters["printable"] = printable
    return environment.from_string(_resource("template.html.j2")).render(
        manifest=tables.manifest,
        kind=data["kind"],
        models=_described(tables),
        headlines=[(name, [h for h in found if h.model == name]) for name in names],
        notable=notable,
        concentration=concentration(tables.models),
        glossary=[
            (g.replace("_", " "), {k: m for k, m in glossary.items() if m.get("group", "") == g}) for g in groups
        ],
        page=data,
        pairs=tables.lineage.to_dicts() if tables.kind == "lineage" else [],
        data=Markup(embed(data)),
        css=Markup(_resource("report.css")),
        js=Markup(_resource("report.js")),
        plotly=Markup(get_plotlyjs()),
    )


def _described(tables: Tables) -> list[dict[str, Any]]:
    """Models with their architecture in words."""
    rows = []
    for row in tables.manifest.get("models", []):
        known = {
            k: v for k, v in row.get("architecture", {}).items() if v not in (None, "") and k not in ("family", "note")
        }
        facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items())
        rows.append({**row, "facts": facts, "architecture": row.get("architecture", {})})
    return rows


@cache
def _resource(name: str) -> str:
    return (files("diffract.report") / name).read_text(encoding="utf-8")
