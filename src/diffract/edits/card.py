"""The model card of an edited checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from diffract._version import __version__
from diffract.errors import printable

SHOWN = 12
"""Names that the card lists; the manifest has all."""


def model_card(recipe: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], *, adapter: bool = False) -> str:
    """Return the README of an edited checkpoint.

    Args:
        recipe: As it stands in a file.
        steps: What each step did.
        adapter: Whether it is a PEFT adapter.
    """
    library = "peft" if adapter else "transformers"
    head = yaml.safe_dump({"base_model": recipe["model"], "library_name": library, "tags": ["diffract"]})
    lines = [f"- `{step['step']}`: {_listed(step['summary'])}" for step in steps]
    return f"""---
{head}---

# Edited checkpoint

Made by diffract {__version__} from `{printable(recipe["model"])}`. `manifest.json` holds the digests of all that
went in and came out; `diffract verify` compares them with what is there.

{chr(10).join(lines) or "- nothing was changed"}

## Recipe

```yaml
{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}```
"""


def _listed(summary: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {said(value)}" for key, value in summary.items())


def said(value: Any) -> str:
    """Return a value of a summary as text of bounded length."""
    if value is None:
        return "not finite"
    if isinstance(value, list):
        rest = f" and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
        return printable(", ".join(map(str, value[:SHOWN])) + rest, 400)
    if isinstance(value, dict):
        return printable(", ".join(f"{k}={v}" for k, v in value.items()), 400)
    return f"{value:.4g}" if isinstance(value, float) else printable(value, 400)
