"""Truncate: keep some of the singular directions of what training changed."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from diffract.edits.bench import Bench
from diffract.edits.draft import Draft, Place
from diffract.edits.operations.rules import NoiseRule, Rule, Side
from diffract.edits.operations.truncate import truncate
from diffract.edits.step import Model, Planned, Step, describe, flat, matrix_changes
from diffract.matrices import Matrix


class Truncate(Step):
    """Truncate the change: of the difference to the base keep only some singular directions."""

    name: ClassVar[str] = "truncate"

    base: Model
    """What the model was tuned from."""
    drop: float | None = None
    """Drop this fraction of the singular directions."""
    rank: int | None = None
    """Keep so many."""
    energy: float | None = None
    """Keep the fewest that hold this share of the squared Frobenius norm."""
    above: float | None = None
    """Keep those whose singular value exceeds this."""
    rule: NoiseRule | None = None
    """Keep what rises above noise: donoho-gavish or mp-edge."""
    band: tuple[float, float] | None = None
    """Keep a band of the spectrum: from and to, as fractions counted from the largest."""
    side: Side = "head"
    """head keeps what the rule picks, tail the rest."""
    per: Literal["matrix", "head"] = "matrix"
    """Whether each matrix is truncated as a whole, or each attention head's slice by itself."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; all by default."""

    @model_validator(mode="after")
    def _check(self) -> Truncate:
        self.criterion()
        return self

    def criterion(self) -> Rule:
        """Return the rule that the settings make."""
        return Rule(self.drop, self.rank, self.energy, self.above, self.rule, self.band, self.side)

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what the step changes; how many directions stayed is known once it is computed."""
        base, rule = bench.other(self.base), self.criterion()
        matrices = bench.matrices(self.select, heads=self.per == "head")
        rows: list[dict[str, Any]] = []

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            found = truncate(values, flat(base.read(matrix.tensor, place)), rule)
            share = {"kept": found.kept, "of": found.total, "energy_share": found.energy_share}
            rows.append({"name": matrix.name, **share})
            return found.values

        return Planned(matrix_changes(bench, matrices, edit), {"base": describe(self.base)}, rows)
