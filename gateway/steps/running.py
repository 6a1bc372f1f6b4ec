"""steps (pure): one step of a pipeline as it runs, guarded against whatever its code does. May use step, rows, spec."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar

import numpy as np

from gateway.errors import BadInput, GatewayError, Overloaded
from gateway.steps.rows import Batch, Column, Columns, Mixed, Ragged, batches, fits, merge, shown, take
from gateway.steps.step import AnyStep, BadTensor, RowStep, Step, StepFailed, WrongAnswer
from gateway.v2.spec import Array, Tensors, TensorSpec, dtype_of

T = TypeVar("T")
Made_co = TypeVar("Made_co", covariant=True)

_MOST_TEXT: Final = 1000
"""Most characters of a step's own text: a status travels in a header, whose size is limited."""


@dataclass(frozen=True, slots=True)
class Work(Generic[Made_co]):
    """A step under way: `tasks` may run at once, on any threads, and `result()` is called when all are done."""

    tasks: tuple[Callable[[], None], ...]
    result: Callable[[], Made_co]
    is_brief: bool = False  # too short for a thread; see `Step.is_brief`

    def run(self) -> Made_co:
        for task in self.tasks:
            task()
        return self.result()


@dataclass(frozen=True, slots=True)
class StepPart:
    """What parts that run a step in the gateway have in common."""

    name: str  # from the config, for telemetry
    step: AnyStep[Any]
    inputs: Mapping[str, str]  # the step's name of each tensor that it reads → the pipeline's name
    outputs: Mapping[str, str]

    def given(self, tensors: Columns) -> dict[str, Column]:
        """What the step reads, by its own names.

        raises:  WrongAnswer if that is not there, or not what the step reads: it comes from a model.
        """
        return {spec.name: self._given(spec, tensors) for spec in self.step.reads}

    def _given(self, spec: TensorSpec, tensors: Columns) -> Column:
        name = self.inputs[spec.name]
        if name not in tensors:
            raise WrongAnswer(f"step '{self.name}' needs a tensor '{name}', which no model answered")
        if not fits(spec, tensors[name]):
            raise WrongAnswer(f"step '{self.name}' needs '{name}' as {spec} a row, got {shown(tensors[name])}")
        return tensors[name]

    def guarded(self, act: Callable[[], T]) -> T:
        """Run a step's code, which may raise anything: `sys.exit` in a library, a panic of a Rust extension.

        An exception that is no `Exception` would end the event loop, or leave a caller unanswered; none gets out.
        """
        try:
            return act()
        except BaseException as thrown:
            failure = self._maybe_failure(thrown)
            try:
                if failure is not None:
                    raise failure from thrown.__cause__
            finally:
                del failure  # which would refer to itself by its traceback, and keep what the step has made
            raise StepFailed(self.name, type(thrown).__name__) from thrown

    def _maybe_failure(self, thrown: BaseException) -> GatewayError | None:
        """The error that a step means for the caller, with the pipeline's names of tensors; None for any other."""
        try:
            if isinstance(thrown, BadTensor):
                return BadTensor(self.inputs.get(thrown.tensor, thrown.tensor), _readable(thrown.reason), thrown.row)
            if isinstance(thrown, StepFailed):
                return thrown
            for kind in (BadInput, WrongAnswer, Overloaded):
                if isinstance(thrown, kind):
                    return kind(_readable(thrown.text))
        except Exception:  # noqa: S110  (reading the exception may fail too)
            pass
        return None

    def checked(self, spec: TensorSpec, array: object) -> Column:
        """What the step made, if it is as declared. raises: StepFailed if it is not."""
        declared = f"declares '{spec.name}' as {spec} a row and made"
        if not isinstance(array, np.ndarray | Ragged):
            got = "nothing" if array is None else type(array).__name__
            raise StepFailed(self.name, f"it {declared} {got}")
        if not fits(spec, array):
            raise StepFailed(self.name, f"it {declared} {shown(array)}")
        if spec.datatype == "BYTES":
            texts = [array] if isinstance(array, np.ndarray) else array.rows
            other = next((type(each) for row in texts for each in row.flat if not isinstance(each, bytes)), None)
            if other is not None:
                raise StepFailed(self.name, f"it {declared} elements of type {other.__name__}")
        return array


@dataclass(frozen=True, slots=True)
class LocalStep(StepPart):
    """A part that runs in the gateway."""

    step: Step[Any]

    def run(self, tensors: Columns) -> dict[str, Column]:
        """Run the step on the working set; returns what it makes, by the pipeline's names.

        raises:  BadInput naming the pipeline's tensor; WrongAnswer if what a model answered is not what the step reads;
                 Overloaded if there is no memory for it; StepFailed for whatever else the step throws or makes.
        """
        return self.start(tensors, 1).run()

    def start(self, tensors: Columns, most: int, into: Tensors | None = None) -> Work[dict[str, Column]]:
        """Prepare to run, in at most `most` tasks; only a RowStep, or rows that differ in shape, run in more than one.

        tensors: the working set: at least one tensor, and all with the same number of rows.
        into:    uninitialised arrays for some of what it makes, by the pipeline's names, as `into` has asked for; they
                 may stay unused.
        raises:  as `run`; so do the tasks and `result()`, and none raises anything else.
        """
        given = self.given(tensors)
        rows = len(next(iter(tensors.values())))
        arrays = {name: column for name, column in given.items() if isinstance(column, np.ndarray)}
        if len(arrays) < len(given):
            return self._by_shape(given, rows, most)
        return self._start(arrays, rows, most, into)

    def into(self, names: Collection[str], rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of arrays that it can be given to fill, by the pipeline's names, if it makes all of these.

        Empty if it does not, or makes arrays of its own: only a RowStep fills arrays, and one that does not allocate
        them by itself. BF16 is not among them, since its arrays are not what a model reads.
        """
        step = self.step
        if not isinstance(step, RowStep) or type(step).allocate is not RowStep.allocate or not rows:
            return {}
        made = {self.outputs[spec.name]: spec for spec in step.writes}
        if not all(name in made and made[name].datatype not in ("BYTES", "BF16") for name in names):
            return {}
        return {name: ((rows, *made[name].shape), dtype_of(made[name].datatype)) for name in names}

    def _start(
        self, given: dict[str, Array], rows: int, most: int, into: Tensors | None = None
    ) -> Work[dict[str, Column]]:
        if isinstance(self.step, RowStep) and (into or (most > 1 and rows > 1)):
            return self._by_rows(self.step, given, rows, min(most, rows), into or {})
        made: list[dict[str, Column]] = []

        def task() -> None:
            made.append(self.guarded(lambda: self._rename(self.step(given), rows)))

        return Work((task,), lambda: made[0], self.guarded(lambda: bool(self.step.is_brief(given))))

    def _by_rows(
        self, step: RowStep[Any], given: Tensors, rows: int, tasks: int, into: Tensors
    ) -> Work[dict[str, Column]]:
        out = {own: into[name] for own, name in self.outputs.items() if name in into}
        if len(out) < len(step.writes):
            out = self.guarded(lambda: step.allocate(rows)) | out

        def task(share: range) -> None:
            self.guarded(lambda: step.fill(given, out, share))

        shares = [range(rows * number // tasks, rows * (number + 1) // tasks) for number in range(tasks)]
        tasks_of = tuple(partial(task, share) for share in shares)
        is_brief = tasks == 1 and self.guarded(lambda: bool(step.is_brief(given)))
        return Work(tasks_of, lambda: self.guarded(lambda: self._rename(out, rows)), is_brief)

    def _by_shape(self, given: Columns, rows: int, most: int) -> Work[dict[str, Column]]:
        """One run of the step for each shape, dealt out to at most `most` tasks."""
        groups = batches(given, rows, rows)
        made: list[tuple[Batch, Columns]] = []
        merged: list[dict[str, Column]] = []

        def task(share: Sequence[Batch]) -> None:
            made.extend([(batch, self._run_batch(given, batch)) for batch in share])
            if len(made) == len(groups):  # the last task merges, since whoever takes the result may be an event loop
                merged.append(self._merged(made, rows))

        shares = [groups[number::most] for number in range(min(most, len(groups)))]
        return Work(tuple(partial(task, share) for share in shares), lambda: merged[0])

    def _run_batch(self, given: Columns, batch: Batch) -> dict[str, Column]:
        try:
            return self._start(take(given, batch), len(batch), 1).run()
        except BadTensor as exc:
            known = isinstance(exc.row, int) and 0 <= exc.row < len(batch)  # the step has counted those of its batch
            raise BadTensor(exc.tensor, exc.reason, int(batch[exc.row]) if known else None) from exc.__cause__

    def _merged(self, made: Sequence[tuple[Batch, Columns]], rows: int) -> dict[str, Column]:
        try:
            return merge(made, rows)
        except Mixed as exc:
            raise StepFailed(self.name, f"it made {exc}") from exc

    def _rename(self, made: object, rows: int) -> dict[str, Column]:
        """What the step made, by the pipeline's names. raises: StepFailed if it is not what the step declares."""
        if not isinstance(made, Mapping):
            raise StepFailed(self.name, f"it made {type(made).__name__}, instead of arrays by name")
        return {self.outputs[spec.name]: self._checked(spec, made.get(spec.name), rows) for spec in self.step.writes}

    def _checked(self, spec: TensorSpec, made: object, rows: int) -> Column:
        column = self.checked(spec, made)
        if len(column) != rows:
            raise StepFailed(self.name, f"it made {len(column)} rows of '{spec.name}' from {rows}")
        return column


def _readable(text: str) -> str:
    """The text without surrogates, and cut: a status has to carry it."""
    return text[:_MOST_TEXT].encode("utf-8", "replace").decode("utf-8")
