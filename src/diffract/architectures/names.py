"""Names of tensors: which template of a family one fits, whatever a wrapper or a larger model puts before it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from diffract.architectures.spec import Role

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Words that wrappers of modules put anywhere into names: they say nothing about the model."""

_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
_NUMBER = re.compile(r"\{(layer|expert|head)\}|([0-9]+)")


@dataclass(frozen=True)
class Fit:
    """A template that a name ends in.

    Attributes:
        prefix: What stands before it, with its last dot.
        template: The template.
        role: What the tensor is.
        numbers: Of layer, expert and head, as far as the template has them.
    """

    prefix: str
    template: str
    role: Role
    numbers: Mapping[str, int]


class Templates:
    """The name templates of a family, found by their form: a name's numbers are left out of it.

    A checkpoint may have hundreds of thousands of names, which have few forms; each form costs one look-up per dot.

    Args:
        tensors: Role of each template.
    """

    def __init__(self, tensors: Mapping[str, Role]) -> None:
        self._forms: dict[str, list[tuple[str, Role, list[str | int]]]] = {}
        self._ends: dict[str, list[tuple[int, str, Role, list[str | int]]]] = {}
        for template, role in tensors.items():
            wanted = [slot or int(digits) for slot, digits in _NUMBER.findall(template)]
            self._forms.setdefault(_NUMBER.sub("#", template), []).append((template, role, wanted))

    def fits(self, name: str) -> list[Fit]:
        """Return the templates that a name ends in, from a dot on, the longest first."""
        form = _form(name)
        if form not in self._ends:
            starts = [0, *(m.end() for m in re.finditer(r"\.", form))]
            self._ends[form] = [(dot, *end) for dot, at in enumerate(starts) for end in self._forms.get(form[at:], ())]
        found = []
        for dot, template, role, wanted in self._ends[form]:
            numbers = [int(digits) if len(digits) < 7 else -1 for _, digits in _NUMBER.findall(name)]
            own = numbers[len(numbers) - len(wanted) :]
            if all(isinstance(w, str) or w == n for w, n in zip(wanted, own, strict=True)) and -1 not in own:
                slots = {w: n for w, n in zip(wanted, own, strict=True) if isinstance(w, str)}
                prefix = "".join(f"{word}." for word in name.split(".")[:dot])
                found.append(Fit(prefix, template, role, slots))
        return found


@lru_cache(1 << 17)  # each name is asked for once per family
def _form(name: str) -> str:
    return _NUMBER.sub("#", name)


def unwrapped(name: str) -> str:
    """Return a name without the words of wrappers.

    >>> unwrapped("module.layers.0._orig_mod.self_attn.q_proj.weight")
    'layers.0.self_attn.q_proj.weight'
    """
    return _WRAPPER.sub("", name)


_NORMS = ("norm", "layernorm")
_NORMED = {"q": ("q", "query"), "k": ("k", "key")}


def norm_names(tensor: str, projection: str | None) -> tuple[str, ...]:
    """Return what the norm of queries or keys may be called that stands beside their projection, without its ending.

    Fused projections have norms that belong to one of their parts, which their names tell.

    >>> norm_names("layers.0.self_attn.q_proj.weight", "q")[0]
    'layers.0.self_attn.q_norm'
    """
    module = tensor.removesuffix(".weight").rpartition(".")[0]
    return tuple(f"{module}.{word}_{norm}" for word in _NORMED.get(projection or "", ()) for norm in _NORMS)


def bias_name(tensor: str) -> str | None:
    """Return what the bias beside a weight is called; ``None`` for a tensor that is not called a weight.

    >>> bias_name("layers.0.self_attn.in_proj_weight")
    'layers.0.self_attn.in_proj_bias'
    """
    stem = tensor.removesuffix("weight").removesuffix("kernel")
    return f"{stem}bias" if stem != tensor else None


def outer_prefixes(prefix: str) -> list[str]:
    """Return a prefix and every beginning of it, the longest first.

    >>> outer_prefixes("model.language_model.")
    ['model.language_model.', 'model.', '']
    """
    words = prefix.split(".")[:-1]
    return [*accumulate((f"{word}." for word in words), initial="")][::-1]


def fit_names(templates: Templates, names: Iterable[str]) -> tuple[str, dict[str, Fit]]:
    """Find the prefix of a family in a checkpoint, and what stands behind it.

    Of several (the towers of a vision-language model are alike) the one that most templates with a layer fit counts.
    Templates without a layer, such as an output head's, may stand behind a beginning of it.

    Args:
        templates: Of the family.
        names: All names, without words of wrappers.

    Returns:
        The prefix, and the fit of each name that has one; two tensors never have one place.
    """
    found = {name: fits for name in names if (fits := templates.fits(name))}
    every = [fit for fits in found.values() for fit in fits]
    layered = [fit for fit in every if "layer" in fit.numbers] or every
    kinds = Counter(prefix for prefix, _ in dict.fromkeys((fit.prefix, fit.template) for fit in layered))
    prefix = max(kinds, key=lambda p: kinds[p], default="")
    outer = outer_prefixes(prefix)
    taken: dict[tuple[object, ...], str] = {}
    kept: dict[str, Fit] = {}
    for name, fits in found.items():
        own = (f for f in fits if f.prefix == prefix or (f.prefix in outer and "layer" not in f.numbers))
        fit = next(own, None)
        if fit and taken.setdefault((fit.role.part, fit.role.stacked, *fit.numbers.items()), name) == name:
            kept[name] = fit
    return prefix, kept
