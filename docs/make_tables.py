"""Write tables.md: every table of every kind of run, its columns and their types, from what schemas.py says of them.

python docs/make_tables.py            # rewrite the page
python docs/make_tables.py --check    # say whether it is up to date
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from itertools import pairwise
from pathlib import Path

from diffract import attention, schemas

PAGE = Path(__file__).with_name("tables.md")

INTRODUCTION = """# Tables

<!-- made by make_tables.py from schemas.py -->

Every run is a folder of Parquet files; `run["NAME"]` or `run.NAME` is the same table in Polars. This page lists their
columns. What a number means where a column alone does not say it stands in [runs](runs.md); the numbers of matrices,
with units and ranges, in [metrics](metrics.md).

- **Null** is what has no value: the row does not have it (a head of an embedding), it was not asked for, or its
  definition does not hold (then [metrics](metrics.md) says when). It is never a zero, and never NaN.
- **Units**: norms are in units of the weights; shares, agreements and relative changes are numbers from 0 to 1 unless
  they say otherwise; entropies are in nats; sizes in bytes. `low` and `high` are the ends of a 95% interval.
- **What is stable**: a column keeps name, type and meaning until the second number of the version rises, and the
  changelog says so then. Columns may be added at any time: choose by name, not by place.

Besides the columns below come, in `metrics`, one column per metric (`Float64`; counts are whole), and in `models` the
numbers of the whole model that the kind of run has.
"""

SAME = {
    "share": "Shares of a run, `diffract scan MODEL --shard I/N`",
    "scan": "Runs of `diffract scan`",
    "compare": "Runs of `diffract compare`",
    "trajectory": "Runs of `diffract trajectory`",
    "heads": "Runs of `diffract heads`",
    "lineage": "Runs of `diffract lineage`",
    "audit": "Runs of `diffract audit`",
    "eval": "Runs of `diffract eval`",
    "search rewind": "Runs of `diffract search rewind`",
    "search truncate": "Runs of `diffract search truncate`",
    "search directions": "Runs of `diffract search directions`",
    "search svf": "Runs of `diffract search svf`",
    "connect": "Runs of `diffract connect`",
    "study": "Runs of `diffract study run`",
}


def said() -> dict[str, str]:
    """What stands below each constant in the modules of columns, by its name."""
    body = [statement for module in (schemas, attention) for statement in ast.parse(inspect.getsource(module)).body]
    found = {}
    for statement, text in pairwise(body):
        target = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[target.id] = (
                re.sub(r"\s+", " ", str(text.value.value)).strip().replace("``", "`").replace(" | ", ", ")
            )
    return found


def page() -> str:
    """Return the page as Markdown."""
    texts, lines, written = said(), [INTRODUCTION], {}
    rows = dict(re.findall(r"^``(\w+)``\s+(?:of heads: )?(.+)$", schemas.__doc__ or "", re.MULTILINE))
    groups = [(name, value) for name, value in vars(schemas).items() if isinstance(value, dict) and name in texts]
    for kind, tables in schemas.KINDS.items():
        lines.append(f"## {SAME[kind]}\n")
        for table, columns in tables.items():
            if (first := written.setdefault((table, *columns), kind)) != kind:
                lines.append(f"`{table}`: as of [{SAME[first].lower()}](#{anchor(SAME[first])}).\n")
                continue
            lines.append(
                f"### `{table}` of {kind}\n\n{rows[table]}\n" if table in rows else f"### `{table}` of {kind}\n"
            )
            lines.append("| column | type |\n|---|---|")
            lines += [f"| `{name}` | {dtype} |" for name, dtype in columns.items()]
            notes = [texts[name] for name, group in groups if name in texts and group and set(group) <= set(columns)]
            lines += ["", *(f"{note}\n" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def anchor(title: str) -> str:
    """The part of a link that leads to a heading."""
    return re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    made = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == made else f"{PAGE} is not up to date: python {__file__}")
    PAGE.write_text(made, encoding="utf-8")
