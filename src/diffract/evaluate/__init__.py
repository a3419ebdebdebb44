"""Quality of a model: tasks, scores of their items, and what may be said of differences.

Names are imported when they are first used, so that tasks and statistics can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffract.evaluate.catalog import load_tasks
    from diffract.evaluate.model import Subject, load_subject
    from diffract.evaluate.run import Evaluator, compare_scores
    from diffract.evaluate.statistics import paired, summarise
    from diffract.evaluate.tasks import Task
    from diffract.stats import holm

_PLACES = {
    "Evaluator": "evaluate.run",
    "Subject": "evaluate.model",
    "Task": "evaluate.tasks",
    "compare_scores": "evaluate.run",
    "holm": "stats",
    "load_subject": "evaluate.model",
    "load_tasks": "evaluate.catalog",
    "paired": "evaluate.statistics",
    "summarise": "evaluate.statistics",
}

__all__ = [
    "Evaluator",
    "Subject",
    "Task",
    "compare_scores",
    "holm",
    "load_subject",
    "load_tasks",
    "paired",
    "summarise",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffract.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"diffract.{_PLACES[name]}"), name)
