"""Metrics: functions of facts about matrices, and the catalog that lists them. Sees tensors only."""

from diffract.metrics.catalog import CATALOG, GROUPS, Facts, choose_metrics, installed_metrics, split_names
from diffract.metrics.facts import CURVES, FACTS, NEEDS, Metric, behind, metric, sources

__all__ = [
    "CATALOG",
    "CURVES",
    "FACTS",
    "GROUPS",
    "NEEDS",
    "Facts",
    "Metric",
    "behind",
    "choose_metrics",
    "installed_metrics",
    "metric",
    "sources",
    "split_names",
]
