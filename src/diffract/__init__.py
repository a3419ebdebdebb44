"""diffract: see what a training stage did to a language model's weights.

    run = diffract.compare("base", "math=tuned")
    run.metrics, run.spectra, run.models
    run.report("report.html")

Names are imported when they are first used, so that ``import diffract`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffract._version import __version__
from diffract.errors import (
    ArchitectureError,
    CheckpointError,
    DiffractError,
    RecipeError,
    RunError,
    SelectionError,
)

if TYPE_CHECKING:
    from diffract.api import audit, compare, heads, lineage, scan, trajectory
    from diffract.api import evaluate as eval
    from diffract.callback import SpectralCallback
    from diffract.checkpoints import Checkpoint
    from diffract.checkpoints import open_checkpoint as open
    from diffract.cluster import collect
    from diffract.edits import LiveModel, Recipe, apply
    from diffract.inspection import Inspection, inspect
    from diffract.metrics import Metric, metric
    from diffract.plots import plot
    from diffract.run import Run, load_run
    from diffract.search import verify

_PLACES = {
    "Checkpoint": ("diffract.checkpoints", "Checkpoint"),
    "Inspection": ("diffract.inspection", "Inspection"),
    "LiveModel": ("diffract.edits", "LiveModel"),
    "Metric": ("diffract.metrics", "Metric"),
    "Recipe": ("diffract.edits", "Recipe"),
    "Run": ("diffract.run", "Run"),
    "SpectralCallback": ("diffract.callback", "SpectralCallback"),
    "apply": ("diffract.edits", "apply"),
    "audit": ("diffract.api", "audit"),
    "collect": ("diffract.cluster", "collect"),
    "compare": ("diffract.api", "compare"),
    "eval": ("diffract.api", "evaluate"),
    "heads": ("diffract.api", "heads"),
    "inspect": ("diffract.inspection", "inspect"),
    "lineage": ("diffract.api", "lineage"),
    "load_run": ("diffract.run", "load_run"),
    "metric": ("diffract.metrics", "metric"),
    "open": ("diffract.checkpoints", "open_checkpoint"),
    "plot": ("diffract.plots", "plot"),
    "scan": ("diffract.api", "scan"),
    "trajectory": ("diffract.api", "trajectory"),
    "verify": ("diffract.search", "verify"),
}

__all__ = [
    "ArchitectureError",
    "Checkpoint",
    "CheckpointError",
    "DiffractError",
    "Inspection",
    "LiveModel",
    "Metric",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "SelectionError",
    "SpectralCallback",
    "__version__",
    "apply",
    "audit",
    "collect",
    "compare",
    "eval",
    "heads",
    "inspect",
    "lineage",
    "load_run",
    "metric",
    "open",
    "plot",
    "scan",
    "trajectory",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _PLACES:
        raise AttributeError(f"module 'diffract' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
