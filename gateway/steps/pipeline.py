"""steps (pure): pipelines and their parts, as they run. May use step, spec; `build` makes them.

A pipeline works on a set of named tensors. The set begins with the inputs; each part adds what it makes, or replaces
it; the outputs are taken from the set at the end. The driver runs local parts on threads and carries out the calls:

    rows = pipeline.accept(tensors)
    for part in pipeline.parts:
        if isinstance(part, LocalStep):
            tensors |= part.run(tensors)                # or: work = part.start(…), its tasks on threads, work.result()
        else:
            answer = await call(part.model, part.arguments(tensors), part.requested)
            tensors |= part.results(answer, rows)
    return pipeline.answer(tensors)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from gateway.errors import BadInput, GatewayError, Overloaded
from gateway.steps.step import BadTensor, RowStep, Step, StepFailed, WrongAnswer
from gateway.v2.spec import Array, Tensors, TensorSpec, describe

T = TypeVar("T")

_MOST_TEXT: Final = 1000
"""Most characters of a step's own text: a status travels in a header, whose size is limited."""


@dataclass(frozen=True, slots=True)
class Work:
    """A step under way: `tasks` may run at once, on any threads, and `result()` is called when all are done."""

    tasks: tuple[Callable[[], None], ...]
    result: Callable[[], dict[str, Array]]
    is_brief: bool = False  # too short for a thread; see `Step.is_brief`

    def run(self) -> dict[str, Array]:
        for task in self.tasks:
            task()
        return self.result()


@dataclass(frozen=True, slots=True)
class LocalStep:
    """A part that runs in the gateway."""

    name: str  # from the config, for telemetry
    step: Step[Any]
    inputs: Mapping[str, str]  # the step's name of each tensor that it reads → the pipeline's name
    outputs: Mapping[str, str]

    def run(self, tensors: Tensors) -> dict[str, Array]:
        """Run the step on the working set; returns what it makes, by the pipeline's names.

        raises:  BadInput naming the pipeline's tensor; WrongAnswer if what a model answered is not what the step reads;
                 Overloaded if there is no memory for it; StepFailed for whatever else the step throws or makes.
        """
        return self.start(tensors, 1).run()

    def start(self, tensors: Tensors, most: int) -> Work:
        """Prepare to run, in at most `most` tasks; only a RowStep runs in more than one.

        tensors: the working set: at least one tensor, and all with the same number of rows.
        raises:  as `run`; so do the tasks and `result()`, and none raises anything else.
        """
        given = {spec.name: self._given(spec, tensors) for spec in self.step.reads}
        rows = len(next(iter(tensors.values())))
        if isinstance(self.step, RowStep) and most > 1 and rows > 1:
            return self._by_rows(self.step, given, rows, min(most, rows))
        made: list[dict[str, Array]] = []

        def task() -> None:
            made.append(self._guarded(lambda: self._rename(self.step(given), rows)))

        return Work((task,), lambda: made[0], self._guarded(lambda: bool(self.step.is_brief(given))))

    def _by_rows(self, step: RowStep[Any], given: dict[str, Array], rows: int, tasks: int) -> Work:
        out = self._guarded(lambda: step.allocate(rows))

        def task(share: range) -> None:
            self._guarded(lambda: step.fill(given, out, share))

        shares = [range(rows * number // tasks, rows * (number + 1) // tasks) for number in range(tasks)]
        tasks_of = tuple(partial(task, share) for share in shares)
        return Work(tasks_of, lambda: self._guarded(lambda: self._rename(out, rows)))

    def _given(self, spec: TensorSpec, tensors: Tensors) -> Array:
        name = self.inputs[spec.name]
        if name not in tensors:
            raise WrongAnswer(f"step '{self.name}' needs a tensor '{name}', which no model answered")
        if not spec.admits(tensors[name]):
            raise WrongAnswer(f"step '{self.name}' needs '{name}' as {spec} a row, got {describe(tensors[name])}")
        return tensors[name]

    def _guarded(self, act: Callable[[], T]) -> T:
        """Run a step's code, which may raise anything: `sys.exit` in a library, a panic of a Rust extension.

        An exception that is no `Exception` would end the event loop, or leave a caller unanswered; none gets out.
        """
        try:
            return act()
        except BaseException as thrown:
            failure = self._maybe_failure(thrown)
            if failure is not None:
                raise failure from thrown.__cause__
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

    def _rename(self, made: object, rows: int) -> dict[str, Array]:
        """What the step made, by the pipeline's names. raises: StepFailed if it is not what the step declares."""
        if not isinstance(made, Mapping):
            raise StepFailed(self.name, f"it made {type(made).__name__}, instead of arrays by name")
        return {self.outputs[spec.name]: self._checked(spec, made.get(spec.name), rows) for spec in self.step.writes}

    def _checked(self, spec: TensorSpec, array: object, rows: int) -> Array:
        declared = f"declares '{spec.name}' as {spec} a row and made"
        if not isinstance(array, np.ndarray):
            got = "nothing" if array is None else type(array).__name__
            raise StepFailed(self.name, f"it {declared} {got}")
        if not spec.admits(array):
            raise StepFailed(self.name, f"it {declared} {describe(array)}")
        if len(array) != rows:
            raise StepFailed(self.name, f"it made {len(array)} rows of '{spec.name}' from {rows}")
        if spec.datatype == "BYTES":
            other = next((type(each) for each in array.flat if not isinstance(each, bytes)), None)
            if other is not None:
                raise StepFailed(self.name, f"it {declared} elements of type {other.__name__}")
        return array


def _readable(text: str) -> str:
    """The text without surrogates, and cut: a status has to carry it."""
    return text[:_MOST_TEXT].encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A part that calls another public model."""

    model: str
    inputs: Mapping[str, str]  # the model's name of each input → the pipeline's name
    # the model's name of each output to request → the pipeline's name; empty: all outputs, by their own names
    outputs: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.model

    @property
    def requested(self) -> tuple[str, ...]:
        """Names of the outputs to request; empty: all."""
        return tuple(self.outputs)

    def arguments(self, tensors: Tensors) -> dict[str, Array]:
        """The inputs of the call, by the model's names.

        raises:  WrongAnswer if one should have come from an earlier call and did not.
        """
        missing = [name for name in self.inputs.values() if name not in tensors]
        if missing:
            raise WrongAnswer(f"'{self.model}' needs a tensor '{missing[0]}', which no model answered")
        return {own: tensors[name] for own, name in self.inputs.items()}

    def results(self, answer: Tensors, rows: int) -> dict[str, Array]:
        """The outputs of the call, by the pipeline's names.

        raises:  WrongAnswer if an output that was asked for is missing, or one has not `rows` rows.
        """
        for own in self.outputs:
            if own not in answer:
                raise WrongAnswer(
                    f"'{self.model}' did not answer the output '{own}'; it has {', '.join(answer) or 'none'}"
                )
        for own, array in answer.items():
            if array.ndim == 0 or len(array) != rows:
                raise WrongAnswer(f"'{self.model}' answered '{own}' as {describe(array)} to {rows} rows")
        return {self.outputs.get(own, own): array for own, array in answer.items() if own in (self.outputs or answer)}


Part = LocalStep | ModelCall


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A declared pipeline whose parts fit together."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    parts: tuple[Part, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Public names of the models that the pipeline calls, each once."""
        return tuple(dict.fromkeys(part.model for part in self.parts if isinstance(part, ModelCall)))

    def accept(self, tensors: Tensors) -> int:
        """Check the tensors that a caller sent; returns the number of rows.

        raises:  BadInput if an input is missing, unknown, of another datatype or shape, or the rows are none, too many,
                 or not as many in each.
        """
        declared = {spec.name: spec for spec in self.inputs}
        for name in tensors:
            if name not in declared:
                raise BadInput(f"input '{name}' is unknown; '{self.name}' takes {', '.join(declared)}")
        for name, spec in declared.items():
            if name not in tensors:
                raise BadInput(f"input '{name}' is missing; '{self.name}' takes {', '.join(declared)}")
            self._check_input(spec, tensors[name])
        rows = len(tensors[self.inputs[0].name])
        for name, array in tensors.items():
            if len(array) != rows:
                raise BadInput(f"input '{name}' has {len(array)} rows, '{self.inputs[0].name}' has {rows}")
        return rows

    def answer(self, tensors: Tensors) -> dict[str, Array]:
        """The outputs, in the order in which they are declared.

        raises:  WrongAnswer if one that comes from a model is missing or not as declared.
        """
        for spec in self.outputs:
            if spec.name not in tensors:
                raise WrongAnswer(f"no model answered '{spec.name}', which '{self.name}' promises")
            if not spec.admits(tensors[spec.name]):
                raise WrongAnswer(
                    f"'{self.name}' promises '{spec.name}' as {spec} a row, got {describe(tensors[spec.name])}"
                )
        return {spec.name: tensors[spec.name] for spec in self.outputs}

    def _check_input(self, spec: TensorSpec, array: Array) -> None:
        if not spec.admits(array):
            want = (
                f"{spec.datatype} [rows, {', '.join(map(str, spec.shape))}]"
                if spec.shape
                else f"{spec.datatype} [rows]"
            )
            raise BadInput(f"input '{spec.name}': expected {want}, got {describe(array)}")
        if not 1 <= len(array) <= self.max_batch_size:
            raise BadInput(f"input '{spec.name}': {len(array)} rows; '{self.name}' takes 1 to {self.max_batch_size}")
