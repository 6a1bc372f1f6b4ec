"""steps (pure): pipelines and their parts, as they run. May use running, fan_out, rows, spec; `build` makes them.

A pipeline works on a set of named tensors. The set begins with the inputs; each part adds what it makes, or replaces
it; the outputs are taken from the set at the end. The driver runs local parts on threads and carries out the calls:

    rows = pipeline.accept(tensors)
    for part in pipeline.parts:
        if isinstance(part, LocalStep):
            tensors |= part.run(tensors)                # or: work = part.start(…), its tasks on threads, work.result()
        elif isinstance(part, ModelCall):
            arguments = part.arguments(tensors)
            made = [(batch, part.results(await call(part.model, take(arguments, batch), part.requested), len(batch)))
                    for batch in batches(arguments, rows, pipeline.max_batch_size)]
            tensors |= part.merged(made, rows)
        else:
            items = part.split.start(tensors, 1, part.bounds).run()
            working = …                                 # part.parts on items.columns, as here, if there are items
            tensors |= part.gather(items, working, rows)
    return pipeline.answer(tensors)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gateway.errors import BadInput
from gateway.steps.fan_out import FanOut
from gateway.steps.rows import Batch, Column, Columns, Mixed, Ragged, fits, merge, shown
from gateway.steps.running import LocalStep
from gateway.steps.step import WrongAnswer
from gateway.v2.spec import Array, Tensors, TensorSpec, describe


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

    def arguments(self, tensors: Columns) -> dict[str, Column]:
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

    def merged(self, made: Sequence[tuple[Batch, Columns]], rows: int) -> dict[str, Column]:
        """The outputs of the calls for all batches, by the pipeline's names.

        raises:  WrongAnswer if the calls were answered by tensors of several kinds, as different variants may.
        """
        try:
            return merge(made, rows)
        except Mixed as exc:
            raise WrongAnswer(f"'{self.model}' answered {exc}") from exc


Part = LocalStep | ModelCall | FanOut


def calls_of(parts: Iterable[Part]) -> Iterator[ModelCall]:
    """Every call of a model among these parts and inside them."""
    for part in parts:
        if isinstance(part, ModelCall):
            yield part
        elif isinstance(part, FanOut):
            yield from calls_of(part.parts)


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
        return tuple(dict.fromkeys(call.model for call in calls_of(self.parts)))

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

    def answer(self, tensors: Columns) -> dict[str, Array]:
        """The outputs, in the order in which they are declared.

        raises:  WrongAnswer if one is missing or not as declared, since it comes from a model, or its rows differ.
        """
        answer: dict[str, Array] = {}
        for spec in self.outputs:
            if spec.name not in tensors:
                raise WrongAnswer(f"no model answered '{spec.name}', which '{self.name}' promises")
            column = tensors[spec.name]
            if isinstance(column, Ragged) or not fits(spec, column):
                raise WrongAnswer(f"'{self.name}' promises '{spec.name}' as {spec} a row, got {shown(column)}")
            answer[spec.name] = column
        return answer

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
