"""steps (pure): builds a declared pipeline, or finds everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from gateway.steps.catalogue import UnknownStep, did_you_mean, find_step, module_of, one_line
from gateway.steps.declare import FanOutDeclaration, PartDeclaration, PipelineSpec, TensorDeclaration
from gateway.steps.fan_out import Bounds, FanOut, Split
from gateway.steps.pipeline import ModelCall, Part, Pipeline
from gateway.steps.running import LocalStep
from gateway.steps.step import AnyStep, Read, RowStep, SplitStep, Step, StepError
from gateway.v2.spec import DATATYPES, TensorSpec

Where = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a declared pipeline, and what would be right."""

    where: Where  # keys from the PipelineSpec down, such as ("steps", 2, "with", "k")
    wrong: str
    right: str = ""

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.where))}: {self.wrong}" + (f"; {self.right}" if self.right else "")


class PipelineError(Exception):
    """The declared pipeline cannot work; `findings` says everything that is wrong."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = tuple(findings)


def build_pipeline(name: str, declared: PipelineSpec, read: Read, imported: Set[str] = frozenset()) -> Pipeline:
    """Build a pipeline, with its steps and their files.

    name:    the public model's, for errors.
    read:    reads the files that parameters of steps name.
    imported: modules that were there before: Python does not import them again, and findings about their steps say so.
    raises:  PipelineError with every finding: an unknown step or parameter, a file that is missing, a tensor that
             nothing makes or that is of another datatype or shape than what reads it.
    """
    check = _Check(read, imported)
    check.begin(declared.inputs)
    parts = check.parts(("steps",), declared.steps)
    check.end(declared.inputs, declared.outputs)
    if check.findings:
        raise PipelineError(check.findings)
    return Pipeline(
        name=name,
        inputs=tuple(tensor.spec for tensor in declared.inputs),
        outputs=tuple(tensor.spec for tensor in declared.outputs),
        max_batch_size=declared.max_batch_size,
        parts=parts,
    )


@dataclass(slots=True)
class _Check:
    """What is known of the working set while the parts are checked in order."""

    read: Read
    imported: Set[str]
    findings: list[Finding] = field(default_factory=list)
    known: dict[str, TensorSpec | None] = field(default_factory=dict)  # None: the type is not known before a call
    used: set[str] = field(default_factory=set)
    latest: list[str] | None = field(default_factory=list)  # what the last part made; None: all outputs of a model
    open: bool = False  # may there be tensors that are not in `known`?
    broken: bool = False  # is there an unknown step, so that what it reads and writes is not known?

    def begin(self, inputs: tuple[TensorDeclaration, ...]) -> None:
        for number, tensor in enumerate(inputs):
            if tensor.name in self.known:
                self._find(("inputs", number, "name"), f"a second input '{tensor.name}'", "each name once")
            self.known[tensor.name] = tensor.spec
        self.latest = list(self.known)

    def end(self, inputs: tuple[TensorDeclaration, ...], outputs: tuple[TensorDeclaration, ...]) -> None:
        self._promise(("outputs",), "the pipeline promises", outputs)
        for number, tensor in enumerate(inputs):
            if tensor.name not in self.used and not self.broken:
                self._find(("inputs", number, "name"), f"nothing reads the input '{tensor.name}'", "drop it, or use it")

    def _promise(self, where: Where, who: str, outputs: tuple[TensorDeclaration, ...]) -> None:
        seen: set[str] = set()
        for number, tensor in enumerate(outputs):
            if tensor.name in seen:
                self._find((*where, number, "name"), f"a second output '{tensor.name}'", "each name once")
            seen.add(tensor.name)
            self._use((*where, number), who, tensor.spec, tensor.name)

    def parts(self, where: Where, declared: tuple[PartDeclaration, ...]) -> tuple[Part, ...]:
        """Those parts that can be built; of the others there are findings."""
        parts = [self._part((*where, number), part) for number, part in enumerate(declared)]
        return tuple(part for part in parts if part is not None)

    def _part(self, where: Where, declared: PartDeclaration) -> Part | None:
        if declared.call is not None:
            return self._call(where, declared.call, declared)
        if declared.fan_out is not None:
            return self._fan_out((*where, "fan_out"), declared.fan_out)
        step = self._construct(where, declared.step or "", declared.with_)
        if isinstance(step, Step):
            return self._local(where, step, declared)
        if step is not None:
            self._find(
                (*where, "step"), f"'{declared.step}' makes items of rows", "name it in a fan_out", declared.step or ""
            )
        self.open, self.latest, self.broken = True, None, True
        return None

    def _fan_out(self, where: Where, declared: FanOutDeclaration) -> FanOut | None:
        split = self._split(where, declared)
        inside = _Check(self.read, self.imported, self.findings)
        if split is None:
            inside.open, inside.latest, inside.broken = True, None, True
        else:
            inside.known = {split.outputs[spec.name]: spec for spec in split.step.writes}
            inside.latest = list(inside.known)
        parts = inside.parts((*where, "steps"), declared.steps)
        inside._promise((*where, "outputs"), "the items hand back", declared.outputs)
        if declared.count in (tensor.name for tensor in declared.outputs):
            self._find((*where, "count"), f"'{declared.count}' is one of the outputs too", "another name")
        bounds = Bounds(declared.most, declared.most_together, declared.most_bytes)
        outputs = tuple(tensor.spec for tensor in declared.outputs)
        if split is None:
            self.known |= {spec.name: None for spec in outputs} | {declared.count: None}
            self.broken = True
            return None
        made = FanOut(split, parts, outputs, declared.count, bounds, declared.max_batch_size)
        self.known |= {spec.name: spec for spec in made.writes}
        self.latest = [spec.name for spec in made.writes]
        return made

    def _split(self, where: Where, declared: FanOutDeclaration) -> Split | None:
        step = self._construct(where, declared.step, declared.with_)
        if not isinstance(step, SplitStep):
            if step is not None:
                self._find(
                    (*where, "step"), f"step '{declared.step}' makes no items of a row", "a split step", declared.step
                )
            return None
        inputs = self._names((*where, "inputs"), declared.step, [spec.name for spec in step.reads], declared.inputs)
        outputs = self._names((*where, "items"), declared.step, [spec.name for spec in step.writes], declared.items)
        for spec in step.reads:
            self._use(where, f"step '{declared.step}' reads", spec, inputs[spec.name])
        return Split(declared.step, step, inputs, outputs)

    def _construct(self, where: Where, name: str, parameters: dict[str, Any]) -> AnyStep[Any] | None:
        """The step; None, with findings, if its name or parameters are wrong."""
        try:
            step_type = find_step(name)
        except UnknownStep as exc:
            self._find((*where, "step"), exc.wrong, exc.right, name)
            return None
        try:
            step = step_type(step_type.params_type.model_validate(parameters), self.read)
            _check_declared(step)
            return step
        except ValidationError as exc:
            fields = [info.alias or name for name, info in step_type.params_type.model_fields.items()]
            self._refuse_parameters((*where, "with"), exc, fields, name)
        except StepError as exc:
            at = (*where, "with", *([exc.parameter] if exc.parameter else []))
            self._find(at, f"step '{name}': {exc.wrong}", exc.right, name)
        except BaseException as exc:  # a user's step may raise anything while it is built, `SystemExit` too
            self._find((*where, "step"), f"step '{name}' cannot be built: {one_line(exc)}", step=name)
        return None

    def _refuse_parameters(self, where: Where, refused: ValidationError, fields: list[str], step: str) -> None:
        """One finding for each parameter; pydantic reports one for each type that the value could have."""
        texts: dict[Where, list[str]] = {}
        for error in refused.errors():
            at = (*where, *error["loc"][:1])
            if error["type"] == "extra_forbidden":
                name = str(at[-1])
                known = f"known: {', '.join(fields)}" if fields else "it takes none"
                self._find(at, f"unknown parameter '{name}'", known + did_you_mean(name, fields), step)
            else:
                texts.setdefault(at, []).append(error["msg"].removeprefix("Value error, "))
        for at, reasons in texts.items():
            self._find(at, ", or: ".join(dict.fromkeys(reasons)), step=step)

    def _local(self, where: Where, step: Step[Any], declared: PartDeclaration) -> LocalStep:
        name = declared.step or ""
        inputs = self._names((*where, "inputs"), name, [spec.name for spec in step.reads], declared.inputs)
        outputs = self._names((*where, "outputs"), name, [spec.name for spec in step.writes], declared.outputs)
        for spec in step.reads:
            self._use(where, f"step '{name}' reads", spec, inputs[spec.name])
        for spec in step.writes:
            self.known[outputs[spec.name]] = spec
        self.latest = list(outputs.values())
        return LocalStep(name, step, inputs, outputs)

    def _names(self, where: Where, step: str, own: list[str], renamed: dict[str, str] | None) -> dict[str, str]:
        for name in renamed or {}:
            if name not in own:
                right = f"known: {', '.join(own) or 'none'}{did_you_mean(name, own)}"
                self._find((*where, name), f"step '{step}' has no tensor '{name}'", right, step)
        return {name: (renamed or {}).get(name, name) for name in own}

    def _call(self, where: Where, model: str, declared: PartDeclaration) -> ModelCall:
        inputs = declared.inputs
        if inputs is None:
            if self.latest is None and not self.broken:
                self._find(where, f"call of '{model}': not known what to send it", "name them: inputs: [...]")
            inputs = {name: name for name in self.latest or ()}
        for name in inputs.values():
            self._use(where, f"call of '{model}' sends", None, name)
        outputs = declared.outputs or {}
        self.known.update(dict.fromkeys(outputs.values()))
        if outputs:
            self.latest = list(outputs.values())
        else:
            self.open, self.latest = True, None
            self.known = dict.fromkeys(self.known)  # the model's answer may replace any of them
        return ModelCall(model, inputs, outputs)

    def _use(self, where: Where, who: str, spec: TensorSpec | None, name: str) -> None:
        """Note that a tensor is read; check that it exists, and its type if that is known."""
        self.used.add(name)
        if name not in self.known:
            if not self.open:
                there = ", ".join(self.known)
                self._find(
                    where,
                    f"{who} '{name}', which nothing before makes",
                    f"there are: {there}{did_you_mean(name, list(self.known))}",
                )
            return
        found = self.known[name]
        if spec is not None and found is not None and not spec.agrees(found):
            self._find(where, f"{who} '{name}' as {spec} a row, but it is {found}")

    def _find(self, where: Where, wrong: str, right: str = "", step: str = "") -> None:
        """step: the one that it is about, whose code may be older than its file."""
        module = module_of(step) if step and self.imported else ""
        if module in self.imported:
            old = f"'{module}' was imported before, and Python does so once: if its code has changed, restart"
            right = f"{right}; {old}" if right else old
        self.findings.append(Finding(where, wrong, right))


def _check_declared(step: AnyStep[Any]) -> None:
    """Check what a step declares, once, so that no call has to.

    :raises TypeError: if the declaration is invalid.
    """
    for side in ("reads", "writes"):
        specs = getattr(step, side)
        if not isinstance(specs, tuple) or not all(isinstance(spec, TensorSpec) for spec in specs):
            raise TypeError(f"'{side}' must be a tuple of TensorSpec")
        for spec in specs:
            if spec.datatype not in DATATYPES or not all(isinstance(size, int) for size in spec.shape):
                raise TypeError(f"'{side}' has '{spec.name}' as {spec}, which is not a tensor of the V2 protocol")
    if isinstance(step, RowStep):
        if not step.reads:
            raise TypeError("a step that makes rows must read something")
        if any(-1 in spec.shape for spec in step.writes):
            raise TypeError("a step that makes rows one by one must know their shapes: no -1 in 'writes'")
