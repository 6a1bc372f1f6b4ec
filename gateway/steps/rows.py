"""steps (pure): tensors whose rows differ in shape, and batches of rows that have one shape. May use spec, numpy.

A step and a model take arrays, whose rows have one shape. Where the rows of a tensor differ (pages of several sizes),
they are kept one by one, and whoever works on them gets batches of rows that are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gateway.v2.spec import Array, TensorSpec, describe


class Ragged:
    """One tensor whose rows differ in shape. `rows` has an array of each, without the batch axis; at least one."""

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[Array]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)


Column = Array | Ragged
Columns = Mapping[str, Column]
Batch = Array
"""Numbers of rows, ascending."""


def column_of(rows: Sequence[Array]) -> Column:
    """A tensor from its rows, at least one, which have no batch axis: an array if they are alike."""
    first = rows[0]
    if all(row.shape == first.shape and row.dtype == first.dtype for row in rows):
        return np.stack(rows)
    return Ragged(rows)


def fits(spec: TensorSpec, column: Column) -> bool:
    """Is every row what the spec says?"""
    if isinstance(column, Ragged):
        return all(spec.admits(row[None]) for row in column.rows)
    return spec.admits(column)


def shown(column: Column) -> str:
    """As `describe`: of rows that differ, two."""
    if not isinstance(column, Ragged):
        return describe(column)
    other = next((row for row in column.rows if row.shape != column.rows[0].shape), column.rows[-1])
    return f"rows as different as {describe(column.rows[0])} and {describe(other)}"


def batches(columns: Columns, rows: int, most: int) -> list[Batch]:
    """All rows, in batches of at most `most` that have one shape in every column. No row is in two of them."""
    ragged = [column for column in columns.values() if isinstance(column, Ragged)]
    if not ragged:
        return [np.arange(start, min(start + most, rows)) for start in range(0, rows, most)]
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row in range(rows):
        alike.setdefault(tuple(column.rows[row].shape for column in ragged), []).append(row)
    return [np.array(group[at : at + most]) for group in alike.values() for at in range(0, len(group), most)]


def take(columns: Columns, batch: Batch) -> dict[str, Array]:
    """The rows of one batch, as arrays; an array of which all rows are taken is not copied."""
    return {name: _take(column, batch) for name, column in columns.items()}


def _take(column: Column, batch: Batch) -> Array:
    if isinstance(column, Ragged):
        return np.stack([column.rows[row] for row in batch])
    if len(batch) and batch[-1] - batch[0] == len(batch) - 1:  # neighbours: a view
        return column[batch[0] : batch[-1] + 1]
    return column[batch]


class Mixed(Exception):
    """Batches of one request were answered by tensors that are not of one kind. The text names the first."""


def merge(made: Sequence[tuple[Batch, Columns]], rows: int) -> dict[str, Column]:
    """What was made of each batch, as columns of all rows in their order. The batches have each row once.

    :raises Mixed: if they differ in names, datatypes or numbers of axes.
    """
    _, first = made[0]
    if len(made) == 1:
        return dict(first)
    for _, each in made:
        if each.keys() != first.keys():
            raise Mixed(f"{', '.join(each) or 'nothing'} for some rows, {', '.join(first) or 'nothing'} for others")
    return {name: _merge(name, [(batch, each[name]) for batch, each in made], rows) for name in first}


def _merge(name: str, made: Sequence[tuple[Batch, Column]], rows: int) -> Column:
    kinds = {kind for _, column in made for kind in _kinds(column)}
    if len(kinds) > 1:
        raise Mixed(f"'{name}' as {' and '.join(sorted({shown(column) for _, column in made})[:2])}")
    if len({column.shape[1:] if isinstance(column, np.ndarray) else None for _, column in made}) == 1:
        (_, first) = made[0]
        if isinstance(first, np.ndarray):
            whole = np.empty((rows, *first.shape[1:]), first.dtype)
            for batch, column in made:
                whole[batch] = column
            return whole
    each: list[Array | None] = [None] * rows
    for batch, column in made:
        for row, array in zip(batch, column.rows if isinstance(column, Ragged) else rows_of(column), strict=True):
            each[row] = array
    return column_of([array for array in each if array is not None])


def rows_of(array: Array) -> list[Array]:
    """Its rows as arrays, also where a row is one element."""
    return [array[row : row + 1].reshape(array.shape[1:]) for row in range(len(array))]


def _kinds(column: Column) -> set[tuple[np.dtype[np.generic], int]]:
    if isinstance(column, Ragged):
        return {(row.dtype, row.ndim) for row in column.rows}
    return {(column.dtype, column.ndim - 1)}
