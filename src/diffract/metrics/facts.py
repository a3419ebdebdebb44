"""What a metric is, and what it can be computed from: facts about b matrices at once.

Some facts are found out by looking at weights; derived ones follow from others, are computed when they are first asked
for, and are then kept, so that all columns of one fit share it. Facts are words here; which function derives one stands
in ``catalog``, as those functions declare metrics with this file.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, overload

from torch import Tensor

from diffract.errors import SelectionError, suggest

NEEDS = ("shape", "entries", "sigma_max", "sigmas", "null", "vectors", "matrix")
"""What finding out a fact costs, cheapest first."""


@dataclass(frozen=True)
class Fact:
    """A row of ``FACTS``.

    Attributes:
        summary: Shape and meaning; M = min(m, n), all float64.
        need: The dearest thing that it takes, of ``NEEDS``.
        pair: Whether only a comparison knows it.
        degree: Power of a that scaling all matrices by a > 0 multiplies it with.
        sources: Names of the facts that it is derived from, in order; none if looking at weights tells it.
    """

    summary: str
    need: str
    pair: bool = False
    sources: tuple[str, ...] = ()
    degree: int = 0


FACTS: dict[str, Fact] = {
    "shape": Fact("(m, n), two integers", "shape"),
    "epsilon": Fact("machine epsilon of the stored dtype", "shape"),
    "squares": Fact("(b,), squared Frobenius norm", "entries", degree=2),
    "moments": Fact("sums of the first four powers of the entries about a centre, (b,) each", "entries"),
    "sigma_max": Fact("(b,), the largest singular value", "sigma_max", degree=1),
    "sigmas": Fact("(b, M), singular values, descending", "sigmas", degree=1),
    "resolved": Fact("(b,), the smallest singular value that the method tells from zero", "sigmas", degree=1),
    "null_sigmas": Fact("(b, M), singular values of the same entries in a seeded random order", "null", degree=1),
    "drawn": Fact("(b,), whether nulls that take many draws are drawn for the matrix", "null"),
    "row_squares": Fact("(b, m), squared norms of the rows", "entries", degree=2),
    "col_squares": Fact("(b, n), squared norms of the columns", "entries", degree=2),
    "block_sigmas": Fact("(b, floor(N / M), M), singular values of the M x M blocks side by side", "null", degree=1),
    "U": Fact("(b, m, M), left singular vectors as columns", "vectors"),
    "Vh": Fact("(b, M, n), right singular vectors as rows", "vectors"),
    "matrix": Fact("(b, m, n), float64", "matrix", degree=1),
    "base_row_squares": Fact("(b, m), squared norms of the rows of W0", "entries", pair=True, degree=2),
    "base_col_squares": Fact("(b, n), squared norms of the columns of W0", "entries", pair=True, degree=2),
    "base_epsilon": Fact("machine epsilon of the base's stored dtype", "shape", pair=True),
    "base_squares": Fact("(b,), squared Frobenius norm of the base W0", "entries", pair=True, degree=2),
    "delta_squares": Fact("(b,), squared Frobenius norm of D = W1 - W0", "entries", pair=True, degree=2),
    "delta_along": Fact("(b,), <D, W0>", "entries", pair=True, degree=2),
    "changed": Fact("(b,), number of entries that differ", "entries", pair=True),
    "rounding_squares": Fact(
        "(b,), mean squared norm of what rounding W1 to the coarser of both dtypes does", "entries", pair=True, degree=2
    ),
    "delta_sigmas": Fact(
        "(b, <= M), singular values of D, descending; those left out are zero", "sigmas", pair=True, degree=1
    ),
    "base_sigmas": Fact("(b, M), singular values of W0", "sigmas", pair=True, degree=1),
    "base_resolved": Fact("(b,), the smallest of them that the method tells from zero", "sigmas", pair=True, degree=1),
    "left_cosines": Fact("(b, M, M), U0^T U1, signs as they fall", "vectors", pair=True),
    "right_cosines": Fact("(b, M, M), V0^T V1, signs as they fall", "vectors", pair=True),
    "diagonal": Fact("(b, M), u0_i^T D v0_i", "vectors", pair=True, degree=1),
    "delta_energy": Fact("(b, M), ||u0_i^T D||^2", "vectors", pair=True, degree=2),
    "delta_row_energy": Fact("(b, M), sum_r u0_ri^2 ||D_r||^2, D_r the rows of D", "vectors", pair=True, degree=2),
}
"""Facts by name. Derived ones are added below, in order of what they come from."""


def _derive(name: str, summary: str, *sources: str) -> None:
    known = [FACTS[source] for source in sources]
    need = max((fact.need for fact in known), key=NEEDS.index)
    FACTS[name] = Fact(summary, need, any(fact.pair for fact in known), sources)


TAIL_LAWS = ("power_law", "exponential", "log_normal", "truncated_power_law")
"""Tail laws, in the order in which comparisons take them."""

_derive("eigenvalues", "(b, M), lambda = sigma^2 / N, N = max(m, n)", "sigmas", "shape")
_derive("null_eigenvalues", "(b, M), those of the permuted matrix", "null_sigmas", "shape")
_derive("resolved_sigmas", "(b, M), sigmas, zero where not resolved", "sigmas", "resolved")
_derive("resolved_eigenvalues", "(b, M), their eigenvalues", "resolved_sigmas", "shape")
_derive("bulk", "the Marchenko-Pastur law of the noise, random_matrix.Bulk", "resolved_eigenvalues", "shape")
_derive("bulk_warnings", "why there is no such law, one text a matrix", "bulk", "resolved_eigenvalues")
_derive(
    "shaped_sigmas", "(b, M), resolved sigmas, all zero where equal up to rounding",
    *("sigmas", "resolved", "shape", "epsilon"),
)  # fmt: skip
_derive("tail_eigenvalues", "(b, M), their eigenvalues", "shaped_sigmas", "shape")
_derive(
    "ordered_tails", "eigenvalues in order with sums over their tails, heavy_tails.order.Ordered", "tail_eigenvalues"
)
for _law in TAIL_LAWS:
    _derive(
        f"{_law}_candidates", "fit to every tail that may be the one, heavy_tails.search.Candidates", "ordered_tails"
    )
_derive("power_law_scan", "(b, M), distance of the power law with xmin at each eigenvalue", "power_law_candidates")
_derive("power_law", "fitted tail, heavy_tails.PowerLaw", "power_law_candidates", "power_law_scan")
_derive("truncated_power_law", "likewise", "truncated_power_law_candidates")
_derive("exponential", "likewise", "exponential_candidates")
_derive("log_normal", "likewise", "log_normal_candidates")
_derive(
    "tail_comparisons",
    "power law against the others, heavy_tails.Comparisons",
    *("tail_eigenvalues", "power_law", *(f"{_law}_candidates" for _law in TAIL_LAWS)),
)
_derive("tail_warnings", "what speaks against the power law, one text a matrix", "power_law", "tail_eigenvalues")
_derive("peaks", "peaks in the density of ln sigma, peaks.Peaks", "shaped_sigmas")
_derive(
    "rowcol_sigmas", "(b, d, M), those of Gaussians with the matrix's row and column norms, d draws",
    *("row_squares", "col_squares", "drawn"),
)  # fmt: skip
_derive("separable", "the law of row and column norms, separable.Separable", *("row_squares", "col_squares", "drawn"))
_derive("separable_warnings", "why there is no such law, one text a matrix", "separable")
_derive("sep_sigmas", "(b, M), singular values that follow that law exactly", "separable", "shape")
_derive("rowcol_peaks", "(b, d), peaks in each draw", "rowcol_sigmas")
_derive("rowcol_alphas", "(b, d), exponent of the power law of each draw", "rowcol_sigmas", "shape")
_derive("row_sigmas", "likewise with its row norms alone", *("row_squares", "shape", "drawn"))
_derive("row_peaks", "(b, d), peaks in each draw", "row_sigmas")
_derive("base_resolved_sigmas", "(b, M), likewise of W0", "base_sigmas", "base_resolved")
_derive("base_shaped_sigmas", "(b, M), shaped sigmas of W0", *("base_sigmas", "base_resolved", "shape", "base_epsilon"))
_derive("base_peaks", "peaks of W0", "base_shaped_sigmas")
_derive("scale_change", "(b,), <D, W0> / ||W0||^2", "delta_along", "base_squares")
_derive(
    "free_squares", "(b,), squared norm of D_free = D - scale_change W0", "delta_squares", "delta_along", "base_squares"
)
_MATRIX = ("epsilon", "shape")
_derive("directions", "(b, M), whether direction i is resolved", "sigmas", "resolved", "squares", *_MATRIX)
_derive(
    "base_directions",
    "(b, M), likewise of W0",
    *("base_sigmas", "base_resolved", "base_squares", "base_epsilon", "shape"),
)
_OWN = ("row_squares", "col_squares", "sigmas", "directions")
_derive(
    "rowcol_agreement",
    "numbers of agreement by name, (b,) each, of unrelated Gaussians with the row and column norms of W0 and W1",
    *("drawn", *(f"base_{name}" for name in _OWN), *_OWN),
)
_derive(
    "energy_expected",
    "(b, M), delta_energy as noise, scaling and turns would have it; NaN for base directions that are not resolved",
    *("delta_energy", "delta_row_energy", "base_sigmas", "base_directions"),
)
_derive("energy_ratio", "(b, M), delta_energy over that", "delta_energy", "energy_expected")
_derive(
    "energy_by_peak", "(b, k), delta_energy over its expectation in each peak of W0",
    *("delta_energy", "energy_expected", "base_peaks"),
)  # fmt: skip
_RESOLVED = ("base_directions", "directions")
_derive(
    "window",
    "(b, M, M), whether base sigma i is resolved and within 5% of tuned sigma j",
    *("base_sigmas", "sigmas", "base_directions"),
)
for _side, _u in (("left", "u"), ("right", "v")):
    _overlap = f"{_side}_overlap"
    _derive(_overlap, f"(b, M, M), |{_u}0_i . {_u}1_j|, 0 where one is not resolved", f"{_side}_cosines", *_RESOLVED)
    _derive(f"{_side}_agreement", f"(b, M), |{_u}0_i . {_u}1_i|, NaN where not resolved", _overlap, *_RESOLVED)
    _derive(f"{_side}_best_match", f"(b, M), max_j |{_u}0_i . {_u}1_j|, NaN likewise", _overlap, *_RESOLVED)
    _derive(
        f"{_side}_agreement_window",
        f"(b, M), norm of {_u}1_i projected on its window of base vectors, NaN likewise",
        *(_overlap, "window", *_RESOLVED),
    )


def behind(names: Iterable[str]) -> frozenset[str]:
    """Return ``names`` and all facts that they are derived from."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name not in found:  # many facts share their sources: each is followed once
            found.add(name)
            ahead.extend(FACTS[name].sources)
    return frozenset(found)


def sources(names: Iterable[str]) -> frozenset[str]:
    """Return the facts that must be found out by looking at weights so that all of ``names`` can be had."""
    return frozenset(name for name in behind(names) if not FACTS[name].sources)


@dataclass(frozen=True)
class Quantity:
    """A row of ``CURVES``.

    Attributes:
        fact: Read for it.
        summary: What its values are, and along what they run.
        when: Fact whose presence says that it is wanted; ``fact`` itself by default.
        function: From the fact to (b, k); the fact itself by default. NaN stands for no value.
        ragged: Whether rows have lengths of their own; NaN beyond the end.
    """

    fact: str
    summary: str
    when: str = ""
    function: Callable[[Any], Tensor] | None = None
    ragged: bool = False

    def wanted(self, facts: Mapping[str, Any]) -> bool:
        """Whether what it comes from was found out."""
        return (self.when or self.fact) in facts

    def values(self, facts: Mapping[str, Any]) -> Tensor:
        """Return (b, k)."""
        value = facts[self.fact]
        return self.function(value) if self.function else value


CURVES: dict[str, Quantity] = {
    "sigma": Quantity("sigmas", "singular values, descending; what follows runs along them unless it says otherwise"),
    "null_sigma": Quantity("null_sigmas", "singular values of the same entries in a random order"),
    "sep_sigma": Quantity("sep_sigmas", "singular values that follow the law of row and column norms", "separable"),
    "pl_ks_scan": Quantity("power_law_scan", "distance of the power law whose xmin is that sigma^2 / N", "power_law"),
    "peak": Quantity(
        "peaks",
        "number of the peak that a sigma belongs to, from 0; -1 for none",
        function=lambda found: found.membership.double(),
    ),
    "peak_position": Quantity(
        "peaks", "one a peak: ln sigma of its top", function=attrgetter("positions"), ragged=True
    ),
    "peak_width": Quantity("peaks", "one a peak: its width in ln sigma", function=attrgetter("widths"), ragged=True),
    "peak_mass": Quantity("peaks", "one a peak: its share of the sigmas", function=attrgetter("masses"), ragged=True),
    "delta_sigma": Quantity("delta_sigmas", "singular values of D"),
    "delta_energy": Quantity("delta_energy", "||u0_i^T D||^2"),
    "energy_expected": Quantity("energy_expected", "the same as noise, scaling and turns would have it"),
    "energy_by_peak": Quantity(
        "energy_by_peak", "one a peak of the base: delta_energy over its expectation", "energy_expected", ragged=True
    ),
}
"""Quantities by name. Those of overlaps are kept whenever overlaps were computed, whatever asked for them."""

for _side, _u in (("left", "u"), ("right", "v")):
    CURVES |= {
        f"{_side}_agreement": Quantity(f"{_side}_agreement", f"|{_u}0_i . {_u}1_i|", f"{_side}_cosines"),
        f"{_side}_best_match": Quantity(f"{_side}_best_match", f"max_j |{_u}0_i . {_u}1_j|", f"{_side}_cosines"),
        f"{_side}_agreement_window": Quantity(
            f"{_side}_agreement_window", f"norm of {_u}1_i in the span of its window", f"{_side}_cosines"
        ),
    }


INVARIANCES = frozenset({"rotation", "transpose", "permutation"})
OF_ENTRIES = frozenset({"transpose", "permutation"})
OF_VECTORS = frozenset({"rotation", "permutation"})
OF_THE_ORDER = frozenset[str]()
"""What leaves a metric as it is that looks at entries, at one side's singular vectors, at where each entry stands."""


@dataclass(frozen=True)
class Metric:
    """A number per matrix, or per pair of matrices.

    Attributes:
        name: Column in the metrics table.
        function: Takes the facts, in that order; returns (b,), NaN where the metric has no value.
        facts: Keys of ``FACTS``.
        summary: One line; the formula.
        unit: Of the value.
        range: In which values lie.
        source: Where the definition stands.
        degree: Power of a that scaling all matrices by a > 0 multiplies it with; ``None`` if there is none.
        invariant: Which of ``INVARIANCES`` leave it unchanged.
        version: Raised when its numbers change.
        code: Digest of a user's function, so that results of an older text of it are never taken for it.
    """

    name: str
    function: Callable[..., Tensor]
    facts: tuple[str, ...]
    summary: str
    unit: str = "1"
    range: str = ""
    source: str = ""
    degree: int | None = None
    invariant: frozenset[str] = frozenset()
    version: int = 1
    code: str = ""

    @property
    def pair(self) -> bool:
        """Whether it speaks of two matrices."""
        return any(FACTS[fact].pair for fact in self.facts)

    @property
    def needs(self) -> str:
        """The dearest thing that it is computed from, of ``NEEDS``."""
        return max((FACTS[fact].need for fact in self.facts), key=NEEDS.index)

    @property
    def key(self) -> str:
        """What identifies its numbers in a cache."""
        return f"{self.name}/{self.version}{self.code}"

    def __call__(self, *facts: Any) -> Tensor:
        """Compute it, from the facts in order."""
        return self.function(*facts)


@overload
def metric(function: Callable[..., Tensor], /) -> Metric: ...
@overload
def metric(
    *, name: str = ..., summary: str = ..., unit: str = ..., range: str = ..., version: int = ...
) -> Callable[[Callable[..., Tensor]], Metric]: ...
def metric(
    function: Callable[..., Tensor] | None = None,
    /,
    *,
    name: str = "",
    summary: str = "",
    unit: str = "1",
    range: str = "",
    version: int = 1,
) -> Metric | Callable[[Callable[..., Tensor]], Metric]:
    """Make a metric of one's own of a function; a decorator.

    The function's parameters name the facts it is computed from (``FACTS``); it works on b matrices at once and
    returns (b,). Pass the metric to ``scan`` or ``compare`` in ``metrics``, or name it in the entry point group
    ``diffract.metrics`` to have it on the command line.

    Args:
        function: What computes it.
        name: Column name; the function's name by default.
        summary: One line; the docstring's first line by default.
        unit: Of the value.
        range: In which values lie.
        version: Raise it when what the function calls, or a global that it reads, changes; a change of its own text,
            its defaults or its closure is noticed.

    Raises:
        SelectionError: A parameter is no fact.

    Examples:
        >>> @metric
        ... def sigma_gap(sigmas):
        ...     "Ratio of the two largest singular values."
        ...     return sigmas[:, 0] / sigmas[:, 1]
        >>> sigma_gap.needs
        'sigmas'
    """

    def declare(function: Callable[..., Tensor]) -> Metric:
        called, facts = name or function.__name__, tuple(inspect.signature(function).parameters)
        for fact in facts:
            if fact not in FACTS:
                near = suggest(fact, FACTS)
                raise SelectionError(
                    f"metric {called!r}: parameter {fact!r} is no fact.{near} Known: {', '.join(FACTS)}."
                )
        words: dict[str, Any] = {"unit": unit, "range": range, "source": "user", "version": version}
        told = summary or (inspect.getdoc(function) or "").strip().partition("\n")[0]
        # The text is part of what the numbers are kept under: nobody raises a version in a notebook.
        code = f"/{_digest(function)}"
        return Metric(name=called, function=function, facts=facts, summary=told, **words, code=code)

    return declare if function is None else declare(function)


def built_in(
    summary: str,
    *,
    range: str,
    unit: str = "1",
    source: str = "",
    degree: int | None = 0,
    invariant: frozenset[str] = INVARIANCES,
    version: int = 1,
    name: str = "",
    facts: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Metric]:
    """Declare a metric of the catalog where it is computed; a decorator that registers nothing.

    Its results are kept under name and version alone: raise the version when its numbers change.

    Args:
        summary: One line; the formula.
        range: In which values lie.
        unit: Of the value.
        source: Where the definition stands.
        degree: Power of a that scaling all matrices by a > 0 multiplies it with; ``None`` if there is none.
        invariant: Which of ``INVARIANCES`` leave it unchanged.
        version: Of its numbers.
        name: Column name; the function's name by default.
        facts: What it takes; by default the function's parameters name them.
    """

    def declare(function: Callable[..., Any]) -> Metric:
        return Metric(
            name=name or function.__name__,
            function=function,
            facts=facts or tuple(inspect.signature(function).parameters),
            summary=summary,
            unit=unit,
            range=range,
            source=source,
            degree=degree,
            invariant=invariant,
            version=version,
        )

    return declare


def _digest(function: Callable[..., Tensor]) -> str:
    """Digest of a function's text, default values and closure; what it reads from elsewhere is not in it."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    bound = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None), cells]
    return hashlib.sha256(_text(function).encode() + b"".join(map(_bytes, bound))).hexdigest()[:16]


def _bytes(value: Any) -> bytes:
    """What tells a value apart; one that cannot be pickled has its address in its text and is taken for no other."""
    try:
        return pickle.dumps(value)
    except Exception:
        return repr(value).encode()


def _text(function: Callable[..., Tensor]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt: the compiled code tells it apart
        code = getattr(function, "__code__", None)
        return repr((code.co_code, code.co_consts, code.co_names)) if code else repr(function)
