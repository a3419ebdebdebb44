"""Searches: which heads, how many directions, how far between two models, measured by the quality of a live model."""

from diffract.search.api import connect, search_rewind, search_truncate, verify
from diffract.search.learned import search_directions, search_svf
from diffract.search.plan import Estimate

__all__ = [
    "Estimate",
    "connect",
    "search_directions",
    "search_rewind",
    "search_svf",
    "search_truncate",
    "verify",
]
