"""Scale: multiply each singular direction of what training changed by a factor of its own, as a table says."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffract.edits.edit import TUNED, Edit, FactorTable, Model, Planned, Row, describe, saved_table

if TYPE_CHECKING:
    from torch import Tensor

    from diffract.edits.bench import Bench
    from diffract.edits.draft import Apply, Draft, Place
    from diffract.edits.factors import Scaled


class Scale(Edit):
    """Multiply the singular directions of what training changed with factors, such as learned ones."""

    name: ClassVar = "scale"
    usage: ClassVar = "diffract scale TUNED --base BASE --factors RUN/factors.parquet -o OUT"
    arguments: ClassVar = (TUNED,)

    base: Model
    """What the model was tuned from."""
    factors: FactorTable
    """A table with columns name, direction and factor: 1 is the tuned model, 0 the base. Without a direction the factor
    is of the whole change of a matrix, of a head's slice or of a tensor."""

    def saved(self, folder: Path, output: Path) -> Scale:
        """Return the edit with a table that lies beside the checkpoint, where it has one in memory."""
        return self.model_copy(update=saved_table(self.factors, folder, output))

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return changes of all matrices, slices and vectors that the table names."""
        from diffract.edits.draft import Change, flat
        from diffract.edits.factors import find_scaled, read_factors
        from diffract.edits.spectral_edits import scale_change

        found = find_scaled(read_factors(self.factors), bench)
        (base,) = bench.meet([self.base], {one.tensor for one in found}, chosen=True)
        parts: dict[str, list[tuple[Place, Apply]]] = defaultdict(list)

        def along(one: Scaled) -> Apply:
            def scaled(values: Tensor, place: Place) -> Tensor:
                start = flat(base.read(one.tensor, place))
                found = scale_change(flat(values), start, one.factors, known=bench.decompositions)
                return found.reshape(values.shape)

            return scaled

        rows: list[Row] = []
        for one in found:
            # What the base lacks, such as rows of added tokens, has no change that could be scaled.
            place = base.shared(one.tensor, one.place)
            if place is None:
                continue
            whole = one.factors.ndim == 0
            # Of a whole change the way back is a line: of a vector too, and in blocks.
            apply = base.towards(one.tensor, 1 - float(one.factors)) if whole else along(one)
            parts[one.tensor].append((place, apply))
            own = [float(one.factors)] if whole else one.factors.tolist()
            told = {"least": min(own), "most": max(own), "mean": sum(own) / len(own)}
            rows.append({"name": one.name, "factors": len(own), **told})
        summary = {"base": describe(self.base), "factors": sum(row["factors"] for row in rows), "parts": len(rows)}
        # Singular directions are of the whole matrix: a block of it has others.
        spectral = {one.tensor for one in found if one.factors.ndim}
        changes = {name: Change(tuple(own), whole=name in spectral) for name, own in parts.items()}
        return Planned(changes, summary, rows)
