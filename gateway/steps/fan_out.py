"""steps (pure): fan-outs: items made of each row, worked on together, and handed back to the rows that they are of.

The items of all rows are one set of tensors, in which an item is a row: so the parts inside are those of any pipeline,
and a model gets the items of all rows together, in batches of one shape. `owners` alone says which row an item is of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gateway.errors import BadInput
from gateway.steps.rows import Columns, Ragged, column_of, fits, shown, take
from gateway.steps.running import StepPart, Work
from gateway.steps.step import BadTensor, SplitStep, StepFailed, WrongAnswer
from gateway.v2.spec import Array, TensorSpec, dtype_of

if TYPE_CHECKING:
    from gateway.steps.pipeline import Part

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a fan-out may make of one request."""

    most: int  # items of one row
    most_together: int  # items of all rows
    most_bytes: int  # of the items of all rows, as they are made


@dataclass(frozen=True, slots=True)
class Items:
    """The items of a request, those of a row together and in their order, the rows in theirs."""

    owners: Array  # (items,): the row that each is of, ascending
    columns: Columns  # by the pipeline's names; empty if there are no items

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def places(self) -> Array:
        """(items,): each one's place among the items of its row, from 0."""
        return np.asarray(np.arange(len(self.owners)) - np.searchsorted(self.owners, self.owners))


@dataclass(frozen=True, slots=True)
class Split(StepPart):
    """The step of a fan-out that makes the items."""

    step: SplitStep[Any]

    def start(self, tensors: Columns, tasks: int, bounds: Bounds) -> Work[Items]:
        """Prepare to make the items of all rows, in at most `tasks` tasks.

        tensors: the working set: at least one tensor, and all with the same number of rows.
        raises:  BadInput where a row has more items than the bounds allow; else as `LocalStep.start`.
        """
        given = self.given(tensors)
        rows = len(next(iter(tensors.values())))
        made: list[list[dict[str, Array]]] = [[] for _ in range(rows)]
        count = _Count(bounds, self.name)
        done: list[int] = []
        items: list[Items] = []

        def task(share: range) -> None:
            for row in share:
                self.guarded(partial(self._fill, made[row], given, row, count))
            done.extend(share)
            if len(done) == rows:  # the last task puts them together, since whoever takes them may be an event loop
                items.append(self._items(made))

        most = min(tasks, rows)
        shares = [range(rows * number // most, rows * (number + 1) // most) for number in range(most)]
        return Work(tuple(partial(task, share) for share in shares), lambda: items[0])

    def _fill(self, items: list[dict[str, Array]], given: Columns, row: int, count: _Count) -> None:
        """Make the items of one row, and none beyond the bounds."""
        one = {name: array[0] for name, array in take(given, np.array([row])).items()}
        try:
            for item in self.step.split(one):
                items.append(self._checked_item(item))
                count.add(row, len(items), sum(array.nbytes for array in items[-1].values()))
        except BadTensor as exc:
            raise BadTensor(exc.tensor, exc.reason, row) from exc

    def _checked_item(self, item: object) -> dict[str, Array]:
        if not isinstance(item, Mapping):
            raise StepFailed(self.name, f"it made {type(item).__name__}, instead of arrays by name")
        checked: dict[str, Array] = {}
        for spec in self.step.writes:
            array = item.get(spec.name)
            if not isinstance(array, np.ndarray):
                raise StepFailed(
                    self.name, f"it declares '{spec.name}' as {spec} an item and made {type(array).__name__}"
                )
            self.checked(spec, array[None])
            checked[self.outputs[spec.name]] = array
        return checked

    def _items(self, made: list[list[dict[str, Array]]]) -> Items:
        owners = np.repeat(np.arange(len(made)), [len(items) for items in made])
        every = [item for items in made for item in items]
        return Items(owners, {name: column_of([item[name] for item in every]) for name in every[0]} if every else {})


@dataclass(slots=True)
class _Count:
    """What the tasks of one split have made. Several threads add to it, so each may exceed a bound by an item."""

    bounds: Bounds
    step: str
    items: int = 0
    bytes: int = 0

    def add(self, row: int, of_row: int, size: int) -> None:
        """:raises BadInput: if that is more than the bounds allow."""
        self.items += 1
        self.bytes += size
        bounds = self.bounds
        if of_row > bounds.most:
            raise BadInput(f"row {row}: '{self.step}' finds more than {bounds.most} items in it (fan_out.most)")
        fewer = "send fewer rows at once"
        if self.items > bounds.most_together:
            most = f"{bounds.most_together} items in all rows (fan_out.most_together)"
            raise BadInput(f"'{self.step}' finds more than {most}; {fewer}")
        if self.bytes > bounds.most_bytes:
            most = f"{bounds.most_bytes / MIB:.0f} MiB (fan_out.most_bytes)"
            raise BadInput(f"the items that '{self.step}' finds take more than {most}; {fewer}, or smaller ones")


@dataclass(frozen=True, slots=True)
class FanOut:
    """A part that makes items of each row, runs parts on all items together, and hands their tensors to the rows."""

    split: Split
    parts: tuple[Part, ...]
    outputs: tuple[TensorSpec, ...]  # what goes back, as it is of one item
    count: str  # the tensor that says how many items each row has
    bounds: Bounds
    max_batch_size: int  # most items of one model call

    @property
    def name(self) -> str:
        return self.split.name

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        """What the rows get."""
        of_items = (TensorSpec(spec.name, spec.datatype, (-1, *spec.shape)) for spec in self.outputs)
        return (*of_items, TensorSpec(self.count, "INT32", (1,)))

    def check(self, working: Columns) -> None:
        """raises: WrongAnswer if a tensor that goes back comes from a model and is not as declared."""
        for spec in self.outputs:
            if spec.name not in working:
                raise WrongAnswer(f"no model answered '{spec.name}', which the items of '{self.name}' hand back")
            if not fits(spec, working[spec.name]):
                got = shown(working[spec.name])
                raise WrongAnswer(f"the items of '{self.name}' hand back '{spec.name}' as {spec}, got {got}")

    def size(self, items: Items, working: Columns, rows: int) -> int:
        """Bytes that `gather` takes: a row with few items takes as much as the one with the most."""
        of_item = sum(
            math.prod(_largest(spec, working)) * dtype_of(spec.datatype).itemsize for spec in self.outputs if len(items)
        )
        return rows * _longest(items) * of_item

    def gather(self, items: Items, working: Columns, rows: int) -> dict[str, Array]:
        """What the rows get: (rows, items of the row with the most, …), filled up with zeros or empty texts.

        working: the set of the items after the last part, which `check` has passed.
        """
        made = {spec.name: self._gather(spec, items, working, rows) for spec in self.outputs}
        made[self.count] = np.bincount(items.owners, minlength=rows).astype(np.int32)[:, None]
        return made

    def _gather(self, spec: TensorSpec, items: Items, working: Columns, rows: int) -> Array:
        dtype = dtype_of(spec.datatype)
        if not len(items):
            return np.zeros((rows, 0, *(max(size, 0) for size in spec.shape)), dtype)
        shape = (rows, _longest(items), *_largest(spec, working))
        whole = np.full(shape, b"", dtype) if spec.datatype == "BYTES" else np.zeros(shape, dtype)
        column = working[spec.name]
        if isinstance(column, Ragged):
            for owner, place, row in zip(items.owners, items.places, column.rows, strict=True):
                at = (owner, place, *map(slice, row.shape))
                whole[at] = row
        else:
            whole[items.owners, items.places] = column
        return whole


def _longest(items: Items) -> int:
    return int(np.bincount(items.owners).max()) if len(items) else 0


def _largest(spec: TensorSpec, working: Columns) -> tuple[int, ...]:
    """The largest size of each axis among all items."""
    column = working[spec.name]
    shapes = [row.shape for row in column.rows] if isinstance(column, Ragged) else [column.shape[1:]]
    return tuple(map(max, zip(*shapes, strict=True)))
