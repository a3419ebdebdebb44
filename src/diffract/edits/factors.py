"""Tables of factors: one for each singular direction of a matrix, or one for all of a matrix, a slice or a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from diffract.edits.bench import Bench
from diffract.edits.draft import Place, everything, place_of
from diffract.errors import SelectionError, printable, suggest
from diffract.matrices import Matrix
from diffract.settings import read_file

COLUMNS = ("name", "direction", "factor")
"""What a table of factors has at least."""

READERS = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".json": pl.read_json}


def read_table(path: str, columns: Sequence[str]) -> pl.DataFrame:
    """Read a table that a user names.

    Args:
        path: Parquet, CSV or JSON.
        columns: What it must have.

    Raises:
        SelectionError: It cannot be read, or lacks a column.
    """
    reader = READERS.get(Path(path).suffix)
    if reader is None:
        raise SelectionError(f"{printable(path)}: expected a .parquet, .csv or .json table.")
    try:
        table = reader(BytesIO(read_file(Path(path))))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise SelectionError(f"cannot read {printable(path)}: {printable(error)}. Check the file.") from error
    if missing := [name for name in columns if name not in table.columns]:
        raise SelectionError(
            f"{printable(path)} has no column {missing[0]!r}, expected {', '.join(columns)}."
            f"{suggest(missing[0], table.columns)}"
        )
    return table


def read_factors(table: str | pl.DataFrame) -> dict[str, Tensor]:
    """Return the factors of each name: a vector of one for each direction, or a number for the whole.

    Args:
        table: The table, or where it is. ``direction`` counts from 0, the largest singular value; it is null where
            the factor is of the whole.

    Raises:
        SelectionError: The table cannot be read, a factor is no finite number, or the directions of a name are not
            0, 1, 2, ... each once.
    """
    where = "the table of factors" if isinstance(table, pl.DataFrame) else printable(table)
    found = table if isinstance(table, pl.DataFrame) else read_table(table, COLUMNS)
    kinds = [found[column].dtype for column in COLUMNS]
    whole = found["direction"].null_count() == len(found)  # of which .csv says that it is text
    if not (kinds[0] == pl.String and kinds[2].is_numeric() and (kinds[1].is_integer() or whole)):
        raise SelectionError(f"{where}: expected names, whole numbers and numbers in {', '.join(COLUMNS)}.")
    factors: dict[str, Tensor] = {}
    for (name,), rows in found.select(COLUMNS).group_by("name", maintain_order=True):
        own = rows.sort("direction")
        # A null is no number either, and is told in the same way.
        values = own["factor"].cast(pl.Float64).fill_null(float("nan")).to_torch()
        alone = own["direction"].to_list() == [None]
        if not bool(values.isfinite().all()) or (not alone and own["direction"].to_list() != list(range(len(own)))):
            raise SelectionError(
                f"{where}, {printable(name)!r}: expected a finite factor for each direction 0, 1, 2, ..., or one "
                "without a direction. It is not whole; take it from the run folder again."
            )
        factors[str(name)] = values[0] if alone else values
    return factors


@dataclass(frozen=True)
class Scaled:
    """What a name in a table of factors stands for.

    Attributes:
        name: The name of a matrix, of a head's slice, or of a tensor.
        tensor: The tensor that it lies in.
        place: Where in it.
        factors: A vector, one for each singular direction, or a number.
        matrix: The matrix or slice; of other tensors there is none.
    """

    name: str
    tensor: str
    place: Place
    factors: Tensor
    matrix: Matrix | None


def find_scaled(factors: Mapping[str, Tensor], bench: Bench) -> list[Scaled]:
    """Return what the names of factors stand for in a model.

    Raises:
        SelectionError: A name is not in the model, a matrix has another number of directions, or two names overlap.
    """
    matrices = {m.name: m for m in (*bench.layout.matrices, *bench.whole_layout.matrices)}
    entries = bench.entries()
    found: list[Scaled] = []
    by_tensor: dict[str, list[Scaled]] = defaultdict(list)
    for name, own in factors.items():
        matrix = matrices.get(name)
        if matrix is None and (name not in entries or own.ndim):
            known = "is a vector, which has no directions" if name in entries else "is not in this model"
            raise SelectionError(
                f"factors: {printable(name)!r} {known}. They belong to another pair of models."
                f"{suggest(name, [*matrices, *entries])}"
            )
        if matrix is not None and own.ndim and len(own) != min(matrix.shape):
            raise SelectionError(
                f"factors: {printable(name)!r} has {len(own)} of them, expected {min(matrix.shape)}, one for each "
                "singular direction. They belong to another pair of models."
            )
        tensor = name if matrix is None else matrix.tensor
        shape = bench.checkpoint.info(tensor).shape
        place = everything(shape) if matrix is None else place_of(matrix, shape)
        one = Scaled(name, tensor, place, factors=own, matrix=matrix)
        # Where two overlap it would matter which comes first.
        if twin := next((other for other in by_tensor[tensor] if _meet(other.place, place)), None):
            raise SelectionError(
                f"factors: {printable(twin.name)!r} and {printable(name)!r} are parts of one tensor that overlap. "
                "Keep the factors of one of them."
            )
        by_tensor[tensor].append(one)
        found.append(one)
    return found


def _meet(a: Place, b: Place) -> bool:
    return all(x.start < y.stop and y.start < x.stop for x, y in zip(a, b, strict=True))


def as_table(factors: Mapping[str, Tensor]) -> pl.DataFrame:
    """Return factors as a table that ``read_factors`` reads."""
    rows = [
        (name, None if own.ndim == 0 else i, value)
        for name, own in factors.items()
        for i, value in enumerate(torch.atleast_1d(own).tolist())
    ]
    return pl.DataFrame(rows, schema={"name": pl.String, "direction": pl.Int32, "factor": pl.Float64}, orient="row")
