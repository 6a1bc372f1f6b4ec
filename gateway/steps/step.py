"""steps (pure): the interfaces of steps, and what steps raise. May use rows, spec, errors, pydantic.

A step is a function over named tensors that declares what it reads and writes. It is built once, from typed parameters
and a reader for its files, and is then called from many threads at the same time: it keeps no state of a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from gateway.errors import BadInput, GatewayError
from gateway.status import Code
from gateway.steps.rows import Column
from gateway.v2.spec import Array, Tensors, TensorSpec, dtype_of

Read = Callable[[str], bytes]
"""Returns the content of the file that a parameter names, or raises OSError. The reader decides where paths begin."""


class Params(BaseModel):
    """Parameters of a step. Every field says unit, range, default and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)


P = TypeVar("P", bound=Params)


class BadTensor(BadInput):
    """An input, or one row of it, is not usable. `tensor` is the step's own name for the input."""

    def __init__(self, tensor: str, reason: str, row: int | None = None) -> None:
        at = "" if row is None else f", row {row}"
        super().__init__(f"input '{tensor}'{at}: {reason}")
        self.tensor = tensor
        self.reason = reason
        self.row = row


class WrongAnswer(GatewayError):
    """A model's answer is not what the next part needs: the config or the model is wrong."""

    code = Code.INTERNAL


class StepFailed(GatewayError):
    """A step raised an exception, or made what it does not declare: the step is at fault.

    The caller is told the step's name and the exception's type. `__cause__` has the rest, for the log.
    """

    code = Code.INTERNAL

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"step '{step}' failed ({reason}); the gateway's log has the details")
        self.step = step


class StepError(Exception):
    """A step cannot be built. `parameter` is the one at fault; "" means all of them."""

    def __init__(self, parameter: str, wrong: str, right: str = "") -> None:
        super().__init__(f"{parameter}: {wrong}" if parameter else wrong)
        self.parameter = parameter
        self.wrong = wrong
        self.right = right


class AnyStep(ABC, Generic[P]):
    """What all steps are. Subclasses set `params_type`, and `reads` and `writes` when they are built."""

    params_type: ClassVar[type[Params]]
    reads: tuple[TensorSpec, ...]
    writes: tuple[TensorSpec, ...]

    @abstractmethod
    def __init__(self, params: P, read: Read) -> None:
        """Load all that calls need.

        :raises StepError: if a file is missing or invalid, or parameters contradict one another.
        """


class Step(AnyStep[P]):
    """A step that makes rows of rows: as many as there are."""

    @abstractmethod
    def __call__(self, tensors: Tensors) -> Mapping[str, Column]:
        """Make the tensors of `writes` from those of `reads`.

        tensors:  each as declared in `reads`, all with the same number of rows, which may be 0; not to be changed.
        returns:  each as declared in `writes`, same number of rows. Where a size is -1 rows may differ: `Ragged`, or
                  `column_of(rows)`.
        raises:   BadTensor naming the first row that cannot be used; WrongAnswer if a model's answer cannot.
        """

    def is_brief(self, tensors: Tensors) -> bool:
        """Do these rows take less than some 100 µs, so that a thread would cost more?"""
        return False


class RowStep(Step[P]):
    """A step that makes each row by itself, so that several threads can make the rows of one request.

    Shapes in `writes` are fixed: no -1.
    """

    @abstractmethod
    def fill(self, tensors: Tensors, out: Tensors, rows: range) -> None:
        """Make these rows, in place. Calls for different rows may run at the same time.

        raises:   as `Step.__call__`.
        """

    def allocate(self, rows: int) -> dict[str, Array]:
        """Uninitialised arrays for all of `writes`."""
        return {spec.name: np.empty((rows, *spec.shape), dtype_of(spec.datatype)) for spec in self.writes}

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        rows = len(tensors[self.reads[0].name])
        out = self.allocate(rows)
        self.fill(tensors, out, range(rows))
        return out


class SplitStep(AnyStep[P]):
    """A step that makes items of each row, any number of them, for a `fan_out`. `writes` is said of one item."""

    @abstractmethod
    def split(self, row: Tensors) -> Iterable[Tensors]:
        """The items of one row, in their order; none if there are none.

        row:      each tensor as declared in `reads`, without the batch axis; not to be changed.
        returns:  for each item the arrays of `writes`, without a batch axis: one element is an array of shape (), where
                  the spec says []. Make them one by one (`yield`): after the most that the config allows, nobody asks
                  for the next.
        raises:   as `Step.__call__`; a BadTensor needs no row.
        """
