"""Quality of a model: tasks, scores of their items, and what may be said of differences."""

from diffract.evaluate.catalog import load_tasks
from diffract.evaluate.model import Subject, load_subject
from diffract.evaluate.run import Evaluator, compare_scores
from diffract.evaluate.statistics import paired, summarise
from diffract.evaluate.tasks import Task
from diffract.stats import holm

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
