"""stages (pure): pipelines and their parts, as they run. May use step, spec; `build` makes them.

A pipeline works on a set of named tensors: its inputs at first; each part adds what it makes, or replaces it; the
outputs are taken from the set at the end. Whoever drives it runs the local parts on threads and carries out the calls:

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
from gateway.stages.spec import Array, Tensors, TensorSpec, describe
from gateway.stages.step import BadTensor, RowStep, Step, StepFailed, WrongAnswer

T = TypeVar("T")

_MOST_TEXT: Final = 1000
"""Characters of a step's own text: a status travels in a header, whose size is limited."""


@dataclass(frozen=True, slots=True)
class Work:
    """A step under way: `tasks` may run at once, on any threads; `result()` is for when all are done."""

    tasks: tuple[Callable[[], None], ...]
    result: Callable[[], dict[str, Array]]
    is_brief: bool = False  # not worth a thread: see `Step.is_brief`

    def run(self) -> dict[str, Array]:
        for task in self.tasks:
            task()
        return self.result()


@dataclass(frozen=True, slots=True)
class LocalStep:
    """A part that runs in the gateway."""

    name: str  # as declared, for telemetry
    step: Step[Any]
    inputs: Mapping[str, str]  # the step's name of each tensor it reads → the pipeline's
    outputs: Mapping[str, str]

    def run(self, tensors: Tensors) -> dict[str, Array]:
        """What the step makes of the working set, by the pipeline's names.

        raises:  BadInput naming the pipeline's tensor; WrongAnswer if what a model answered is not what the step reads;
                 Overloaded if there is no memory for it; StepFailed for whatever else the step throws or makes.
        """
        return self.start(tensors, 1).run()

    def start(self, tensors: Tensors, most: int) -> Work:
        """Get ready to run, in at most `most` tasks (more than one only if the step makes rows one by one).

        tensors: the working set, which is not empty, and all of the same number of rows.
        raises:  as `run`, here or in a task or in its result. Nothing else leaves a step's code, in any of them.
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
        """Run a step's code where it may throw anything: `sys.exit` in a library, a panic of a Rust extension.

        What is no `Exception` would end the event loop, or leave a caller without an answer, so nothing of it leaves.
        """
        try:
            return act()
        except BaseException as thrown:
            told = self._maybe_told(thrown)
            if told is not None:
                raise told from thrown.__cause__
            raise StepFailed(self.name, type(thrown).__name__) from thrown

    def _maybe_told(self, thrown: BaseException) -> GatewayError | None:
        """What a step may tell the caller itself, by the pipeline's names, which are those that callers know."""
        try:
            if isinstance(thrown, BadTensor):
                return BadTensor(self.inputs.get(thrown.tensor, thrown.tensor), _readable(thrown.reason), thrown.row)
            if isinstance(thrown, StepFailed):
                return thrown
            for kind in (BadInput, WrongAnswer, Overloaded):
                if isinstance(thrown, kind):
                    return kind(_readable(thrown.text))
        except Exception:  # noqa: S110  (an exception that can't even be read is one more way to fail)
            pass
        return None

    def _rename(self, made: object, rows: int) -> dict[str, Array]:
        """What was made, by the pipeline's names. raises: StepFailed if that is not what the step declares."""
        if not isinstance(made, Mapping):
            raise StepFailed(self.name, f"it made {type(made).__name__}, no arrays by name")
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
    """A text that can travel in a status: no surrogates, not too long."""
    return text[:_MOST_TEXT].encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A part that another public model does."""

    model: str
    inputs: Mapping[str, str]  # the model's name of each input → the pipeline's
    outputs: Mapping[str, str]  # the model's name of each output to ask for → the pipeline's; empty: all, as they are

    @property
    def name(self) -> str:
        return self.model

    @property
    def requested(self) -> tuple[str, ...]:
        """Names of the outputs to ask for; none means all."""
        return tuple(self.outputs)

    def arguments(self, tensors: Tensors) -> dict[str, Array]:
        """The inputs to send, by the model's names.

        raises:  WrongAnswer if one should have come from an earlier call and did not.
        """
        missing = [name for name in self.inputs.values() if name not in tensors]
        if missing:
            raise WrongAnswer(f"'{self.model}' needs a tensor '{missing[0]}', which no model answered")
        return {own: tensors[name] for own, name in self.inputs.items()}

    def results(self, answer: Tensors, rows: int) -> dict[str, Array]:
        """What was answered, by the pipeline's names.

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
        """Public names of the models it calls, each once."""
        return tuple(dict.fromkeys(part.model for part in self.parts if isinstance(part, ModelCall)))

    def accept(self, tensors: Tensors) -> int:
        """Check what a caller sent; the number of rows.

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
