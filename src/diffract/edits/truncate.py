"""Truncate and LASER: keep some of the singular directions of what training changed, or of weights themselves."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from diffract.edits.edit import TUNED, Edit, Model, Planned, Row, describe, words_of
from diffract.edits.rule import NoiseRule, Rule, Side

if TYPE_CHECKING:
    from torch import Tensor

    from diffract.edits.bench import Bench
    from diffract.edits.draft import Draft, Place
    from diffract.edits.spectral_edits import Truncated
    from diffract.matrices import Matrix


Band = Annotated[tuple[float, float], BeforeValidator(words_of)]


class Truncate(Edit):
    """Keep only some singular directions of the difference between a tuned model and its base."""

    name: ClassVar = "truncate"
    usage: ClassVar = "diffract truncate TUNED --base BASE --drop 0.5 -o OUT"
    arguments: ClassVar = (TUNED,)

    base: Model
    """What the model was tuned from."""
    drop: float | None = None
    """Drop this fraction of the singular directions."""
    rank: int | None = None
    """Keep so many singular directions of each matrix."""
    energy: float | None = None
    """Keep the fewest that hold this share of the squared Frobenius norm."""
    above: float | None = None
    """Keep those whose singular value exceeds this."""
    rule: NoiseRule | None = None
    """Keep what rises above noise: donoho-gavish or mp-edge."""
    band: Band | None = None
    """Keep a band of the spectrum: from and to, as fractions counted from the largest."""
    side: Side = "head"
    """head keeps what the rule picks, tail the rest, random as many by chance, of energy as many as hold it."""
    seed: int = 0
    """Of side random."""
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
        return Rule(
            drop=self.drop,
            rank=self.rank,
            energy=self.energy,
            above=self.above,
            rule=self.rule,
            band=self.band,
            side=self.side,
        )

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what is changed; how many directions stay is known once it is computed."""
        from diffract.edits.draft import flat, matrix_changes
        from diffract.edits.mixing import seeded
        from diffract.edits.spectral_edits import truncate

        asked, rule = bench.matrices(self.select, heads=self.per == "head"), self.criterion()
        (base,) = bench.meet([self.base], {m.tensor for m in asked}, chosen=self.select is not None)
        matrices = base.shared_matrices(asked)
        rows: list[Row] = []

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            chance = seeded(self.seed, matrix.name) if self.side == "random" else None
            start = flat(base.read(matrix.tensor, place))
            found = truncate(values, start, rule, chance, known=bench.decompositions)
            rows.append(_kept(matrix, found))
            return found.values

        summary = {"base": describe(self.base), "matrices": len(matrices)}
        return Planned(matrix_changes(draft, matrices, edit), summary, rows, _kept_in_all)


class Laser(Edit):
    """LASER: replace chosen weight matrices by their largest singular directions."""

    name: ClassVar = "laser"
    usage: ClassVar = "diffract laser MODEL --select 'layers 20-, mlp.up' --keep 0.1 -o OUT"
    takes_others: ClassVar = False

    keep: Annotated[float, Field(gt=0, le=1)]
    """Share rho of the singular directions that is kept, rounded down; one at least."""
    select: str
    """Which matrices, such as 'layers 20-, mlp.up'."""

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return changes of the selected matrices to what of them is kept."""
        from diffract.edits.draft import matrix_changes
        from diffract.edits.spectral_edits import laser

        matrices = bench.matrices(self.select, heads=False)
        rows: list[Row] = []

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            found = laser(values, self.keep)
            rows.append(_kept(matrix, found))
            return found.values

        return Planned(matrix_changes(draft, matrices, edit), {"matrices": len(matrices)}, rows, _kept_in_all)


def _kept(matrix: Matrix, found: Truncated) -> Row:
    """Say how many directions of a matrix stayed, and what they hold."""
    return {"name": matrix.name, "kept": found.kept, "of": found.total, "energy_share": found.energy_share}


def _kept_in_all(rows: list[Row]) -> dict[str, Any]:
    """Say how many directions stayed in all matrices, and what share of a matrix's energy these typically hold."""
    return {
        "directions kept": sum(row["kept"] for row in rows),
        "of": sum(row["of"] for row in rows),
        "energy kept, median": median(row["energy_share"] for row in rows),
    }
