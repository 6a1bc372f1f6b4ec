"""steps (pure): does a pipeline fit the models that it calls? May use build, pipeline, spec.

`build` checks what the config alone tells; what a model takes and answers, only its server knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.steps.build import Finding, Where
from gateway.steps.fan_out import FanOut
from gateway.steps.pipeline import ModelCall, Part, Pipeline
from gateway.steps.running import StepPart
from gateway.v2.spec import DATATYPES, TensorSpec


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """An input or output as in a model's metadata: `shape` has all axes, and the batch axis too if there is one."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's metadata and config say."""

    who: str  # names the model in texts: several may stand behind one public name
    inputs: tuple[ModelTensor, ...]
    outputs: tuple[ModelTensor, ...]
    max_batch_size: int  # 0: the model does no batching, and has no batch axis


def facts_of(pipeline: Pipeline) -> ModelFacts:
    """The facts of a pipeline, for another pipeline that calls it."""

    def tensors(specs: Sequence[TensorSpec]) -> tuple[ModelTensor, ...]:
        return tuple(ModelTensor(spec.name, spec.datatype, (-1, *spec.shape)) for spec in specs)

    who = f"pipeline '{pipeline.name}'"
    return ModelFacts(who, tensors(pipeline.inputs), tensors(pipeline.outputs), pipeline.max_batch_size)


def compare(pipeline: Pipeline, facts: Mapping[str, Sequence[ModelFacts]]) -> list[Finding]:
    """Everything in a pipeline that does not fit the models.

    facts:  by public model, one of each variant that could be asked; a model that is not there is not compared.
    """
    findings = _Comparison(facts, pipeline.max_batch_size, ("max_batch_size",)).findings(pipeline)
    return list({str(finding): finding for finding in findings}.values())  # several variants may cause one finding


@dataclass(slots=True)
class _Comparison:
    """The working set while the parts are compared in order."""

    facts: Mapping[str, Sequence[ModelFacts]]
    most: int  # rows of one call
    most_at: Where  # where that is said
    made: dict[str, list[tuple[str, TensorSpec]]] = field(default_factory=dict)  # by tensor: who makes it, and its type
    is_open: bool = False  # may there be more tensors, from a model whose facts are not known?

    def findings(self, pipeline: Pipeline) -> Iterator[Finding]:
        for spec in pipeline.inputs:
            self.made[spec.name] = [("", spec)]
        yield from self._parts(("steps",), pipeline.parts)
        for number, spec in enumerate(pipeline.outputs):
            yield from self._use(("outputs", number), "the pipeline promises", spec, spec.name)

    def _parts(self, above: Where, parts: Sequence[Part]) -> Iterator[Finding]:
        for number, part in enumerate(parts):
            where = (*above, number)
            if isinstance(part, ModelCall):
                for model in self.facts.get(part.model, ()):
                    yield from self._call(where, part, model)
                self._take_outputs(part)
            elif isinstance(part, FanOut):
                yield from self._fan_out((*where, "fan_out"), part)
            else:
                yield from self._reads(where, part)
                for spec in part.step.writes:
                    self.made[part.outputs[spec.name]] = [("", spec)]

    def _fan_out(self, where: Where, part: FanOut) -> Iterator[Finding]:
        yield from self._reads(where, part.split)
        inside = _Comparison(self.facts, part.max_batch_size, (*where, "max_batch_size"))
        for spec in part.split.step.writes:
            inside.made[part.split.outputs[spec.name]] = [("", spec)]
        yield from inside._parts((*where, "steps"), part.parts)
        for number, spec in enumerate(part.outputs):
            yield from inside._use((*where, "outputs", number), "the items hand back", spec, spec.name)
        for spec in part.writes:
            self.made[spec.name] = [("", spec)]

    def _call(self, where: Where, part: ModelCall, model: ModelFacts) -> Iterator[Finding]:
        """Everything in a call that one model would refuse."""
        takes = {tensor.name: tensor for tensor in model.inputs}
        for own, name in part.inputs.items():
            if own not in takes:
                yield Finding((*where, "inputs", own), f"{model.who} has no input '{own}'", _known(model.inputs))
                continue
            yield from self._send((*where, "inputs", own), name, model, takes[own])
        for tensor in model.inputs:
            if tensor.name not in part.inputs and not tensor.optional:
                yield Finding((*where, "inputs"), f"{model.who} needs an input '{tensor.name}'", _known(model.inputs))
        answers = {tensor.name for tensor in model.outputs}
        for own in part.outputs:
            if own not in answers:
                yield Finding((*where, "outputs", own), f"{model.who} has no output '{own}'", _known(model.outputs))
        if 0 < model.max_batch_size < self.most:
            yield Finding(
                self.most_at,
                f"is {self.most}, but {model.who} takes {model.max_batch_size} rows at most",
                f"at most {model.max_batch_size}",
            )

    def _send(self, where: Where, name: str, model: ModelFacts, tensor: ModelTensor) -> Iterator[Finding]:
        wanted = _row_of(tensor, model, self.most)
        if wanted is None:
            shown = f"{tensor.datatype} {list(tensor.shape)}"
            yield Finding(where, f"{model.who} takes '{tensor.name}' as {shown}, which has no batch axis")
            return
        for who, spec in self.made.get(name, ()):
            if not wanted.agrees(spec):
                sent = f"'{name}' is {spec} a row" + (f" from {who}" if who else "")
                yield Finding(where, f"{model.who} takes '{tensor.name}' as {wanted} a row, but {sent}")

    def _take_outputs(self, part: ModelCall) -> None:
        models = self.facts.get(part.model, ())
        if not models:
            for name in part.outputs.values():
                self.made[name] = []
            if not part.outputs:  # all outputs are taken, and any of them may replace a tensor
                self.made, self.is_open = {}, True
            return
        made: dict[str, list[tuple[str, TensorSpec]]] = {name: [] for name in part.outputs.values()}
        for model in models:
            for tensor in model.outputs:
                if part.outputs and tensor.name not in part.outputs:
                    continue
                row = _row_of(tensor, model, self.most, answered=True)
                name = part.outputs.get(tensor.name, tensor.name)
                made.setdefault(name, []).extend([(model.who, row)] if row is not None else [])
        self.made |= made

    def _reads(self, where: Where, part: StepPart) -> Iterator[Finding]:
        for spec in part.step.reads:
            yield from self._use(where, f"step '{part.name}' reads", spec, part.inputs[spec.name])

    def _use(self, where: Where, who: str, spec: TensorSpec, name: str) -> Iterator[Finding]:
        if name not in self.made:
            if not self.is_open:
                yield Finding(where, f"{who} '{name}', which no model answers")
            return
        for maker, made in self.made[name]:
            if not spec.agrees(made):
                yield Finding(where, f"{who} '{name}' as {spec} a row, but {maker} answers {made}")


def _row_of(tensor: ModelTensor, model: ModelFacts, most: int, *, answered: bool = False) -> TensorSpec | None:
    """One row of a model's tensor, in the gateway's types; None if it has no batch axis.

    most:  rows that there can be.
    """
    if not tensor.shape or tensor.datatype not in DATATYPES:
        return None
    if model.max_batch_size == 0 and tensor.shape[0] != -1 and (tensor.shape[0], most) != (1, 1):
        return None
    datatype = next(known for known in DATATYPES if known == tensor.datatype)
    if answered and datatype == "BF16":
        datatype = "FP32"  # the gateway converts such an answer to FP32
    return TensorSpec(tensor.name, datatype, tensor.shape[1:])


def _known(tensors: Sequence[ModelTensor]) -> str:
    return f"it has {', '.join(tensor.name for tensor in tensors) or 'none'}"
