"""Which tensor plays which role in a model: one JSON file per model family."""

from diffract.architectures.dimensions import Dimensions, TensorPlace
from diffract.architectures.resolve import Architecture, require_heads, resolve
from diffract.architectures.spec import Role, Spec, builtin_specs, load_spec

__all__ = [
    "Architecture",
    "Dimensions",
    "Role",
    "Spec",
    "TensorPlace",
    "builtin_specs",
    "load_spec",
    "require_heads",
    "resolve",
]
