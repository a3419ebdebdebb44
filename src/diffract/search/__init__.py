"""Searches: which heads, how many directions, how far between two models, measured by the quality of a live model.

Names are imported when they are first used, so that the command line can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffract.search.connectivity import connect
    from diffract.search.plan import Estimate
    from diffract.search.rewind import search_rewind
    from diffract.search.truncate import search_truncate

_PLACES = {
    "Estimate": "plan",
    "connect": "connectivity",
    "search_rewind": "rewind",
    "search_truncate": "truncate",
}

__all__ = [
    "Estimate",
    "connect",
    "search_rewind",
    "search_truncate",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffract.search' has no attribute {name!r}")
    return getattr(import_module(f"diffract.search.{_PLACES[name]}"), name)
