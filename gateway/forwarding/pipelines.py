"""The use-case of a pipeline as one public model: local steps run on threads, model calls through `Models`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BUG_TEXT, BadInput, BadRequest, Bug, GatewayError, UnknownModel, UpstreamFailed
from gateway.forwarding.beside import beside
from gateway.forwarding.caller import unchecked
from gateway.forwarding.complaints import Complaints
from gateway.forwarding.exchange import Reply, Request, Timings
from gateway.forwarding.messages import build_response, read_request, read_response, request_parts, tensors_of
from gateway.forwarding.metadata import REQUEST_ID, served_trailers
from gateway.forwarding.room import Share
from gateway.forwarding.shared_arrays import arrays_in, raw_tensors, size_of
from gateway.forwarding.threads import Owner, Threads
from gateway.hooks import CallObserver, StepEnded
from gateway.status import Code
from gateway.steps import (
    Array,
    BadTensor,
    Batch,
    Column,
    Columns,
    FanOut,
    Items,
    LocalStep,
    ModelCall,
    Part,
    Pipeline,
    Split,
    StepFailed,
    Tensors,
    Work,
    WrongAnswer,
    batches,
    take,
)
from gateway.types import Served
from gateway.upstream.placed import Held
from gateway.v2 import weight
from gateway.v2.versions import read_version

_log = logging.getLogger(__name__)

PIPELINE_VERSION = "1"
"""The only version of a pipeline: the V2 protocol requires that a model has one."""

_PLATFORM = "gateway_pipeline"

_RESERVED = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)
"""Request parameters that Triton interprets. They are meant for one model, so the pipeline's models do not get them."""

_TRITONS_OWN: Final = "triton_"
_EMPTY_FINAL: Final = "triton_enable_empty_final_response"

_BOOL: Final = (("bool_param",), "bool_param")
_PARAMETER_TYPES: Final = {
    "sequence_id": (("int64_param", "string_param"), "int64_param or string_param"),
    "sequence_start": _BOOL,
    "sequence_end": _BOOL,
    "priority": (("int64_param", "uint64_param"), "int64_param or uint64_param"),
    "timeout": (("int64_param",), "int64_param"),
    _EMPTY_FINAL: _BOOL,
}
_OTHER_TYPES: Final = (
    ("int64_param", "bool_param", "string_param", "double_param"),
    "int64_param, bool_param, or string_param",
)
"""The types of any other parameter. Each entry has the types that Triton accepts, and its own words for them."""

_REFUSALS: Final = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.FAILED_PRECONDITION,
        Code.OUT_OF_RANGE,
        Code.UNIMPLEMENTED,
    }
)
"""Codes with which a model refuses a request as wrong. The pipeline wrote that request and has checked its caller's, so
the refusal is not the caller's fault. (PERMISSION_DENIED and UNAUTHENTICATED are about the caller's own metadata.)
"""

_BRIEF_SECONDS: Final = 0.05  # a step that declares itself brief may take so long on the event loop
_MOST_NOT_BRIEF: Final = 3  # after so many longer runs it runs on threads; a busy machine may cause one or two

_COPIES: Final = 3
"""Copies of a request in memory: the bytes, the parsed message, and the arrays or the request to a model."""

_FAULT_SECONDS: Final = 300.0  # how long a refused call is remembered, if no later one succeeds
_MOST_FAULT_LENGTH: Final = 500  # characters that are kept of the reason

_MUCH: Final = 4 << 20
"""Bytes that a part may make of a request without asking for room. Pages and their lines are tens of MiB each."""

_CALLS_AT_ONCE: Final = 4
"""Calls of one request that are under way at once: enough for the instances of a model, few enough to be fair."""

T = TypeVar("T")

Call = Callable[[Request, CallObserver], Awaitable[Reply]]
"""Answers a pipeline's call of a public model, reporting to the pipeline's own observer."""

Hold = Callable[[str, int], Held | None]
"""Memory of so many bytes that is shared with whoever answers the calls of a public model; None if there is none."""


def _is_brief(tensors: Tensors) -> bool:
    """Do the tensors have so few texts that they may be encoded on the event loop?"""
    return sum(array.size for array in tensors.values() if array.dtype.kind == "O") * weight.TEXT <= weight.BRIEF


class CallRefused(UpstreamFailed):
    """A model refuses the request of a pipeline, whose config does not fit the model. This is not the caller's fault.

    It carries the trailers of the model's answer, and who refused.
    """

    def __init__(self, pipeline: str, model: str, refusal: GatewayError) -> None:
        super().__init__(
            Code.INTERNAL,
            f"pipeline '{pipeline}' does not fit the model '{model}' that it calls, which refused its request "
            f"({refusal.code.name}); the gateway's log has the details",
            refusal.trailers if isinstance(refusal, UpstreamFailed) else (),
        )
        self.served = refusal.served
        self.detail = f"'{model}' refused the pipeline's call: {refusal.code.name}: {refusal.text}"  # not for callers


@dataclass(slots=True)
class Run:
    """The state of one request to a pipeline."""

    request: Request
    observer: CallObserver
    share: Share  # of `Threads.room`
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    served: Served | None = None  # who answered the last model call
    attempts: int = 0  # of all model calls
    has_called: bool = False  # has a model been called? What steps take from then on is post-processing


class SharedTotals(Protocol):
    """Counts of pipelines that each worker keeps for itself, and that any worker can add up."""

    def own(self, pipeline: str) -> Sequence[int]:
        """The numbers that this worker, or the one that it replaced, kept last; empty if there are none."""

    def keep(self, pipeline: str, numbers: Sequence[int]) -> None: ...

    def of_all(self, pipeline: str) -> Sequence[Sequence[int]]:
        """The numbers that each worker has kept, including this one."""


@dataclass(slots=True)
class _Totals:
    """Counts of one pipeline for ModelStatistics."""

    ok: int = 0
    ok_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    rows: int = 0
    last: int = 0  # when the last inference ended, in milliseconds since the Unix epoch

    @property
    def numbers(self) -> Sequence[int]:
        return self.ok, self.ok_ns, self.failed, self.failed_ns, self.rows, self.last

    def include(self, numbers: Sequence[int]) -> None:
        """Add another worker's numbers."""
        ok, ok_ns, failed, failed_ns, rows, last = numbers
        self.ok += ok
        self.ok_ns += ok_ns
        self.failed += failed
        self.failed_ns += failed_ns
        self.rows += rows
        self.last = max(self.last, last)

    def add(self, rows: int, ns: int) -> None:
        self.ok += 1
        self.ok_ns += ns
        self.rows += rows
        self.last = time.time_ns() // 1_000_000

    def add_failure(self, ns: int) -> None:
        self.failed += 1
        self.failed_ns += ns


class PipelineModel:
    """One pipeline as a public model: it answers inference requests and RPCs about the model."""

    def __init__(
        self,
        pipeline: Pipeline,
        threads: Threads,
        call: Call,
        is_ready: Callable[[str], bool],
        before: PipelineModel | None = None,
        *,
        shared: SharedTotals | None = None,
        hold: Hold = lambda model, size: None,
        turn_of: Callable[[Mapping[str, str], Hashable], Hashable] = lambda metadata, connection: connection,
    ) -> None:
        """
        turn_of:   whose turn a request with this metadata, of this connection, waits for.
        hold:      memory in which the tensors of a call can be made.
        is_ready:  can a public model be called now?
        before:    the pipeline that this one replaces, whose statistics go on here.
        shared:    adds the statistics of all workers; None if this process is the only one.
        """
        self.name = pipeline.name
        self.pipeline = pipeline
        self._threads = threads
        self._call = call
        self._is_model_ready = is_ready
        self._shared = shared
        self._hold = hold
        self._turn_of = turn_of
        self._totals: _Totals = before._totals if before else _Totals(*(shared.own(self.name) if shared else ()))
        self._complaints = Complaints(pipeline.name)
        self._not_brief: dict[str, int] = {}  # how often a step that declares itself brief was not
        self._refused: dict[str, tuple[float, str]] = {}  # by part: when its last fault was, and why
        self.mismatches: Sequence[str] = ()  # how it does not fit its models; set by `Contracts`

    async def infer(self, request: Request, observer: CallObserver) -> Reply:
        """Answer a ModelInferRequest.

        :raises GatewayError: with the status that the caller gets. Apart from a cancellation, it raises nothing else.
        """
        run = Run(request, observer, self._threads.room.share())
        run.share.take(_COPIES * len(request.body))
        try:
            return await self._infer(request, run)
        except GatewayError:
            raise
        except Exception as error:
            _log.exception("pipeline '%s': unforeseen failure", self.name)
            raise Bug(BUG_TEXT) from error
        finally:
            run.share.leave(run.share.held)

    async def _infer(self, request: Request, run: Run) -> Reply:
        units, message = await read_request(request.body)
        version = read_version(message.model_version)
        if version not in ("", PIPELINE_VERSION):
            raise UnknownModel(self.name, version)
        _check_parameters(message.parameters)
        texts = weight.weight_of_texts(message.inputs, message.raw_input_contents)
        if texts or units > weight.BRIEF:
            self._pay(run, texts + units)
        is_brief = max(texts, units) <= weight.BRIEF
        tensors = await beside(is_brief, partial(tensors_of, message.inputs, message.raw_input_contents))
        wanted = self._wanted(message.outputs)
        run.id = message.id
        run.parameters = {key: value for key, value in message.parameters.items() if _is_passed_on(key)}
        try:
            made = await self.run(tensors, run)
        except GatewayError as error:
            error.served = self._asked_last(run, error.served)
            raise
        types = {spec.name: spec.datatype for spec in self.pipeline.outputs}
        answer = {name: (types[name], made[name]) for name in wanted}
        build = partial(build_response, self.name, PIPELINE_VERSION, message.id, answer)
        body = await beside(_is_brief(made), build)
        served = self.served(run)
        return Reply(body, (), served_trailers(served), served, run.timings)

    def _pay(self, run: Run, units: int) -> None:
        """Count the memory that the parsed request needs beyond its bytes, before it is parsed further.

        units: the weight of the request (`v2.weight`).
        :raises TooHeavy: if that is more than any request may take.
        :raises Overloaded: if there is no room for it now.
        """
        if units > weight.MOST:
            raise weight.too_heavy()
        run.share.take(units * weight.BYTES_EACH)

    async def run(self, tensors: Tensors, run: Run) -> dict[str, Array]:
        """Run the pipeline on arrays and return its outputs.

        :raises GatewayError: with the status that the caller gets.
        """
        began = time.perf_counter_ns()
        try:
            rows = self.pipeline.accept(tensors)
            most = self.pipeline.max_batch_size
            made = self._answer(await self._run_parts(self.pipeline.parts, tensors, rows, most, run), rows, run)
        except BaseException:  # cancellations and bugs count as well
            self._totals.add_failure(time.perf_counter_ns() - began)
            raise
        else:
            self._totals.add(rows, time.perf_counter_ns() - began)
            return made
        finally:
            if self._shared is not None:  # at once, since another worker may get the next ModelStatistics
                self._shared.keep(self.name, self._totals.numbers)

    async def _run_parts(
        self, parts: Sequence[Part], tensors: Columns, rows: int, most: int, run: Run
    ) -> dict[str, Column]:
        """The tensors, and what the parts make. most: rows of one model call."""
        working = dict(tensors)
        for number, part in enumerate(parts):
            made: Columns
            if isinstance(part, ModelCall):
                made = await self._call_model(part, working, rows, most, run)
            elif isinstance(part, FanOut):
                made = await self._fan_out(part, working, rows, run)
            else:
                into = self._maybe_in_place(part, parts[number + 1 :], rows)
                start: Callable[[], Work[Columns]] = partial(part.start, working, self._threads.threads, into)
                made = await self._run_step(part, start, rows, run)
            working |= made
            self._count(run, sum(column.nbytes for column in made.values()))
        return working

    def _maybe_in_place(self, part: LocalStep, following: Sequence[Part], rows: int) -> dict[str, Array] | None:
        """Arrays where the model will read them, if a step makes all that the next call sends."""
        call = next((each for each in following if isinstance(each, ModelCall)), None)
        if call is None:
            return None
        wanted = part.into(set(call.inputs.values()), rows)
        size = size_of(wanted)
        held = self._hold(call.model, size) if size else None
        return None if held is None else arrays_in(held, wanted)

    def _count(self, run: Run, size: int) -> None:
        """Count what a part has made.

        :raises Overloaded: if it is much, and there is no room for it beside other requests.
        """
        if size > _MUCH:
            run.share.take(size)
        else:
            run.share.grow(size)

    async def _fan_out(self, part: FanOut, working: Columns, rows: int, run: Run) -> Columns:
        """Make the items of all rows, run the inner parts on all of them, and give each row its own back.

        :raises Overloaded: if there is no room for the items, or what is made of them, beside other requests.
        """
        held = run.share.held
        split = partial(part.split.start, working, self._threads.threads, part.bounds)
        items = await self._run_step(part.split, split, rows, run)
        self._count(run, sum(column.nbytes for column in items.columns.values()))
        inside: Columns = {}
        if len(items):
            inside = await self._run_items(part, items, run)
        size = part.size(items, inside, rows)
        self._count(run, size)
        made = await beside(size <= _MUCH, partial(part.gather, items, inside, rows))
        run.share.leave(run.share.held - held)  # only what the rows got is kept, which is counted as of any part
        return made

    async def _run_items(self, part: FanOut, items: Items, run: Run) -> Columns:
        try:
            made = await self._run_parts(part.parts, items.columns, len(items), part.max_batch_size, run)
        except BadTensor as exc:
            if exc.row is None or exc.row >= len(items):
                raise
            item = f"item {items.places[exc.row]} of it: {exc.reason}"
            raise BadTensor(exc.tensor, item, int(items.owners[exc.row])) from exc
        try:
            part.check(made)
        except WrongAnswer as exc:
            self._blame(f"fan-out {part.name}", exc.text, len(items), run)
            raise
        self._refused.pop(f"fan-out {part.name}", None)
        return made

    async def _run_step(self, part: LocalStep | Split, start: Callable[[], Work[T]], rows: int, run: Run) -> T:
        began, error = time.monotonic(), ""
        try:
            work = start()
            if work.is_brief and self._not_brief.get(part.name, 0) < _MOST_NOT_BRIEF:
                made = self._run_brief(part, work)
            else:
                request = run.request
                turn = self._turn_of(request.metadata.values, request.peer)
                made = await self._threads.run(work, Owner(self.name, part.name), request.deadline, turn)
            self._refused.pop(part.name, None)
            return made
        except GatewayError as exc:
            error = exc.text or type(exc).__name__
            if isinstance(exc, StepFailed):
                self._complaints.log(part.name, _id_of(run), exc.text, exc.__cause__)
            elif isinstance(exc, WrongAnswer):
                self._refused[part.name] = time.monotonic(), error
                self._complaints.log(part.name, _id_of(run), error)
            raise
        finally:
            took = time.monotonic() - began
            if run.has_called:
                run.timings.postprocess += took
            else:
                run.timings.preprocess += took
            run.observer.step_ended(StepEnded(part.name, rows, began, time.monotonic(), error))

    def _run_brief(self, part: LocalStep | Split, work: Work[T]) -> T:
        """Run a step on the event loop, and count it if it was not as brief as it declares."""
        began = time.monotonic()
        try:
            return work.run()
        finally:
            if time.monotonic() - began > _BRIEF_SECONDS:
                self._not_brief[part.name] = self._not_brief.get(part.name, 0) + 1

    async def _call_model(self, part: ModelCall, working: Columns, rows: int, most: int, run: Run) -> dict[str, Column]:
        """Call a model, once for each batch of rows. The config chooses the model and its inputs, so a refusal is never
        the caller's fault.
        """
        began = time.monotonic()
        try:
            arguments = part.arguments(working)
            asked = [partial(self._ask_model, part, arguments, batch, run) for batch in batches(arguments, rows, most)]
            made = part.merged(await _all(asked), rows)
        except CallRefused as exc:
            self._blame(f"call {part.name}", exc.detail, rows, run)
            raise
        except WrongAnswer as exc:
            self._blame(f"call {part.name}", exc.text, rows, run)
            raise
        run.has_called = True
        run.timings.model += time.monotonic() - began
        self._refused.pop(f"call {part.name}", None)
        return made

    async def _ask_model(self, part: ModelCall, arguments: Columns, batch: Batch, run: Run) -> tuple[Batch, Columns]:
        """What the model answers to these rows."""
        is_much = sum(column.nbytes for column in arguments.values()) > _MUCH
        sent = await beside(not is_much, partial(take, arguments, batch))
        build = partial(request_parts, part.model, sent, outputs=part.requested, id=run.id, parameters=run.parameters)
        front, raw = await beside(_is_brief(sent), build)
        came = run.request
        metadata = unchecked(came.metadata)
        try:
            reply = await self._call(
                Request(front, metadata, came.deadline, came.peer, came.method, raw_tensors(raw)), run.observer
            )
        except BadTensor as exc:  # the called model is a pipeline whose step found a fault in the caller's data
            if exc.row is None or exc.row >= len(batch):
                raise
            found = BadTensor(exc.tensor, exc.reason, int(batch[exc.row]))
            found.served = exc.served
            raise found from exc
        except GatewayError as exc:
            if exc.code not in _REFUSALS:
                raise
            raise CallRefused(self.name, part.model, exc) from exc
        run.served = reply.served
        run.attempts += reply.served.attempts
        answer = {name: array for name, (_, array) in (await read_response(reply.body)).items()}
        return batch, part.results(answer, len(batch))

    def _answer(self, working: Columns, rows: int, run: Run) -> dict[str, Array]:
        try:
            made = self.pipeline.answer(working)
        except WrongAnswer as exc:
            self._blame("outputs", exc.text, rows, run)
            raise
        self._refused.pop("outputs", None)
        return made

    def _blame(self, part: str, text: str, rows: int, run: Run) -> None:
        """Record a mismatch between this pipeline's config and its models, for the log, the metrics and `/state`."""
        now = time.monotonic()
        self._refused[part] = now, text[:_MOST_FAULT_LENGTH]
        self._complaints.log(part, _id_of(run), text)
        run.observer.step_ended(StepEnded(part, rows, now, now, text))

    @property
    def faults(self) -> list[str]:
        """Known mismatches between this pipeline and the models that it calls."""
        since = time.monotonic() - _FAULT_SECONDS
        refused = list(self._refused.values())  # a copy, since metrics read it from another thread
        return [*self.mismatches, *(text for at, text in refused if at >= since)]

    def served(self, run: Run) -> Served:
        """Who answered one run: the variant of its last model call, under the pipeline's name."""
        last = run.served
        if last is None:
            return Served(self.name, "", PIPELINE_VERSION, "", 0)
        return Served(self.name, last.variant, last.model_version, last.endpoint, run.attempts)

    def _asked_last(self, run: Run, by_call: Served | None) -> Served | None:
        """Who was asked last in a run that failed. by_call: who the failed call asked; None if a step failed."""
        if by_call is None:
            return self.served(run) if run.served is not None else None
        attempts = run.attempts + by_call.attempts
        return Served(self.name, by_call.variant, by_call.model_version, by_call.endpoint, attempts)

    def _wanted(self, requested: Sequence[Any]) -> list[str]:
        """The names of the outputs to return. requested: InferRequestedOutputTensor messages; none means all."""
        names = [spec.name for spec in self.pipeline.outputs]
        for output in requested:
            if output.name not in names:
                raise BadInput(f"output '{output.name}' is unknown; '{self.name}' has {', '.join(names)}")
            if output.parameters:
                keys = ", ".join(sorted(output.parameters))
                raise BadInput(f"output '{output.name}': a pipeline's output takes no parameters, but {keys} is given")
        return [output.name for output in requested] or names

    # RPCs about the model

    def is_ready(self) -> bool:
        return all(map(self._is_model_ready, self.pipeline.models))

    def metadata(self) -> pb.ModelMetadataResponse:
        answer = pb.ModelMetadataResponse(name=self.name, versions=[PIPELINE_VERSION], platform=_PLATFORM)
        for spec in self.pipeline.inputs:
            answer.inputs.add(name=spec.name, datatype=spec.datatype, shape=(-1, *spec.shape))
        for spec in self.pipeline.outputs:
            answer.outputs.add(name=spec.name, datatype=spec.datatype, shape=(-1, *spec.shape))
        return answer

    def config(self) -> pb.ModelConfigResponse:
        config = config_pb.ModelConfig(name=self.name, platform=_PLATFORM, max_batch_size=self.pipeline.max_batch_size)
        for spec in self.pipeline.inputs:
            config.input.add(name=spec.name, data_type=_config_type(spec.datatype), dims=spec.shape)
        for spec in self.pipeline.outputs:
            config.output.add(name=spec.name, data_type=_config_type(spec.datatype), dims=spec.shape)
        return pb.ModelConfigResponse(config=config)

    def statistics(self) -> pb.ModelStatistics:
        """The statistics of all workers."""
        totals = self._totals
        if self._shared is not None:
            totals = _Totals()
            for numbers in self._shared.of_all(self.name):
                totals.include(numbers)
        return pb.ModelStatistics(
            name=self.name,
            version=PIPELINE_VERSION,
            last_inference=totals.last,
            inference_count=totals.rows,
            execution_count=totals.ok,
            inference_stats=pb.InferStatistics(
                success=pb.StatisticDuration(count=totals.ok, ns=totals.ok_ns),
                fail=pb.StatisticDuration(count=totals.failed, ns=totals.failed_ns),
            ),
        )


async def _all(asked: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """The answers to calls, in their order, a few at a time. The first error ends the others.

    :raises BaseException: what the first call to fail raises, once none of them runs any more.
    """
    if len(asked) == 1:
        return [await asked[0]()]
    answers: dict[int, T] = {}
    left = iter(enumerate(asked))

    async def ask() -> None:
        for number, each in left:
            answers[number] = await each()

    tasks = [asyncio.ensure_future(ask()) for _ in range(min(_CALLS_AT_ONCE, len(asked)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [answers[number] for number in range(len(asked))]


def _id_of(run: Run) -> str:
    return run.id or run.request.metadata.values.get(REQUEST_ID, "")


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse, in Triton's words, what Triton would refuse: it is the caller's fault, and not the pipeline's.

    parameters: InferParameter messages by key.
    """
    for key, parameter in parameters.items():
        if key.startswith(_TRITONS_OWN) and key != _EMPTY_FINAL:
            raise BadRequest(
                f"parameter keys starting with '{_TRITONS_OWN}' are reserved for Triton usage. Only the following keys "
                f"starting with '{_TRITONS_OWN}' are allowed: {_EMPTY_FINAL}"
            )
        types, expected = _PARAMETER_TYPES.get(key, _OTHER_TYPES)
        if parameter.WhichOneof("parameter_choice") not in types:
            raise BadRequest(f"invalid value type for '{key}' parameter, expected {expected}.")


def _is_passed_on(parameter: str) -> bool:
    return parameter not in _RESERVED and not parameter.startswith(_TRITONS_OWN)


def _config_type(datatype: str) -> int:
    name = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return int(config_pb.DataType.Value(name))
