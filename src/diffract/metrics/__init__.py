"""Metrics: functions of facts about matrices, and the catalog that lists them. Sees tensors only."""

from diffract.metrics.catalog import CATALOG, choose_metrics, installed_metrics
from diffract.metrics.metric import FACTS, NEEDS, PAIR_FACTS, Metric, metric

__all__ = [
    "CATALOG",
    "FACTS",
    "NEEDS",
    "PAIR_FACTS",
    "Metric",
    "choose_metrics",
    "installed_metrics",
    "metric",
]
