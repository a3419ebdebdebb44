"""Quality of a model: tasks, scores of their items, and what may be said of differences."""

from diffract.evaluate.catalog import load_tasks
from diffract.evaluate.model import Subject, load_subject
from diffract.evaluate.run import Evaluation, Evaluator, evaluate, load_evaluation
from diffract.evaluate.statistics import holm, paired, summarise
from diffract.evaluate.tasks import Task

__all__ = [
    "Evaluation",
    "Evaluator",
    "Subject",
    "Task",
    "evaluate",
    "holm",
    "load_evaluation",
    "load_subject",
    "load_tasks",
    "paired",
    "summarise",
]
