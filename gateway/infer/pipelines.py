"""The use-case of a pipeline: its local steps on threads, its calls through `Inference`, as one public model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadInput, GatewayError, Overloaded, UnknownModel
from gateway.hooks import CallObserver, StepEnded
from gateway.infer.exchange import Reply, Request, Timings
from gateway.infer.messages import build_request, build_response, parse_request, parse_response, tensors_of
from gateway.infer.metadata import served_trailers
from gateway.stages import Array, LocalStep, ModelCall, Pipeline, Tensors, Work
from gateway.types import Served

PIPELINE_VERSION = "1"
"""What a pipeline says its version is, and the only one it has: the protocol wants one."""

_PLATFORM = "gateway_pipeline"

_RESERVED = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)
"""Parameters of a pipeline's request that Triton interprets: meant for one model, not for each that is called."""

Call = Callable[[Request, CallObserver], Awaitable[Reply]]
"""Answers a pipeline's call of a public model, reporting to the pipeline's own observer."""


class Threads:
    """Runs local steps off the event loop, on a few threads with a bounded queue before them."""

    def __init__(self, threads: int, queue: int) -> None:
        """threads: how many tasks run at once. queue: how many steps may be under way beyond as many as threads."""
        self.threads = threads
        self._queue = queue
        self._under_way = 0
        # Tasks wait here and not in the executor, which would keep a cancelled one, and its tensors, in its queue.
        self._free = asyncio.Semaphore(threads)
        self._executor: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Threads:
        self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="step")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._executor is not None:
            await asyncio.to_thread(self._executor.shutdown)

    async def run(self, work: Work) -> dict[str, Array]:
        """Run all tasks of a step; the first error ends it.

        :raises Overloaded: if the queue is full.
        """
        if self._under_way >= self.threads + self._queue:
            raise Overloaded(
                f"{self._under_way} requests are being prepared or wait for that: pipelines.threads is {self.threads} "
                f"and pipelines.queue {self._queue}"
            )
        self._under_way += 1
        try:
            if len(work.tasks) == 1:
                await self._run(work.tasks[0])
            else:
                await self._run_all(work.tasks)
        finally:
            self._under_way -= 1
        return work.result()

    async def _run_all(self, tasks: Sequence[Callable[[], None]]) -> None:
        running = [asyncio.ensure_future(self._run(task)) for task in tasks]
        try:
            await asyncio.gather(*running)
        finally:
            for each in running:
                each.cancel()

    async def _run(self, task: Callable[[], None]) -> None:
        """A thread that has begun can't be stopped: it stays taken, also when nobody waits for it any more."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, task)
        running.add_done_callback(self._one_more_free)
        await asyncio.wait([running])  # which, unlike awaiting it, leaves it alone when this is cancelled
        running.result()

    def _one_more_free(self, running: asyncio.Future[None]) -> None:
        self._free.release()
        if not running.cancelled():
            running.exception()  # nobody may be there any more to take it


@dataclass(slots=True)
class Run:
    """One request of a pipeline: what it works on, and what came of its calls."""

    request: Request
    observer: CallObserver
    id: str
    parameters: Mapping[str, Any]
    timings: Timings = field(default_factory=Timings)
    served: Served | None = None  # by the last call
    attempts: int = 0


@dataclass(slots=True)
class _Totals:
    """What ModelStatistics tells of one pipeline in this process."""

    ok: int = 0
    ok_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    rows: int = 0
    last: int = 0  # milliseconds since the epoch

    def add(self, rows: int, ns: int) -> None:
        self.ok += 1
        self.ok_ns += ns
        self.rows += rows
        self.last = time.time_ns() // 1_000_000

    def add_failure(self, ns: int) -> None:
        self.failed += 1
        self.failed_ns += ns


class PipelineModel:
    """One pipeline as a public model: it answers requests, and questions about itself."""

    def __init__(
        self,
        pipeline: Pipeline,
        threads: Threads,
        call: Call,
        is_ready: Callable[[str], bool],
        before: PipelineModel | None = None,
    ) -> None:
        """is_ready: can a public model be called now? before: of the same name, whose statistics go on here."""
        self.name = pipeline.name
        self.pipeline = pipeline
        self._threads = threads
        self._call = call
        self._is_model_ready = is_ready
        self._totals: _Totals = before._totals if before else _Totals()

    async def infer(self, request: Request, observer: CallObserver) -> Reply:
        """Answer a ModelInferRequest.

        :raises GatewayError: with the status that the caller gets.
        """
        message = parse_request(request.body)
        if message.model_version not in ("", PIPELINE_VERSION):
            raise UnknownModel(self.name, message.model_version)
        tensors = tensors_of(message.inputs, message.raw_input_contents)
        wanted = self._wanted(message.outputs)
        parameters = {key: value for key, value in message.parameters.items() if _is_passed_on(key)}
        run = Run(request, observer, message.id, parameters)
        try:
            made = await self.run(tensors, run)
        except GatewayError as error:
            error.served = self._asked_last(run, error.served)
            raise
        types = {spec.name: spec.datatype for spec in self.pipeline.outputs}
        body = build_response(
            self.name, PIPELINE_VERSION, message.id, {name: (types[name], made[name]) for name in wanted}
        )
        served = self.served(run)
        return Reply(body, (), served_trailers(served), served, run.timings)

    async def run(self, tensors: Tensors, run: Run) -> dict[str, Array]:
        """Run the pipeline on arrays; answers its outputs.

        :raises GatewayError: with the status that the caller gets.
        """
        began = time.perf_counter_ns()
        try:
            rows = self.pipeline.accept(tensors)
            made = self.pipeline.answer(await self._run_parts(dict(tensors), rows, run))
        except BaseException:  # cancellations and bugs count as well
            self._totals.add_failure(time.perf_counter_ns() - began)
            raise
        self._totals.add(rows, time.perf_counter_ns() - began)
        return made

    async def _run_parts(self, working: dict[str, Array], rows: int, run: Run) -> dict[str, Array]:
        called = False
        for part in self.pipeline.parts:
            began = time.monotonic()
            if isinstance(part, ModelCall):
                working |= part.results(await self._call_model(part, working, run), rows)
                called = True
                run.timings.model += time.monotonic() - began
            else:
                working |= await self._run_step(part, working, rows, run)
                took = time.monotonic() - began
                if called:
                    run.timings.postprocess += took
                else:
                    run.timings.preprocess += took
        return working

    async def _run_step(self, part: LocalStep, working: Tensors, rows: int, run: Run) -> dict[str, Array]:
        began, error = time.monotonic(), ""
        try:
            work = part.start(working, self._threads.threads)
            return work.run() if work.is_brief else await self._threads.run(work)
        except GatewayError as exc:
            error = exc.text
            raise
        finally:
            run.observer.step_ended(StepEnded(part.name, rows, began, time.monotonic(), error))

    async def _call_model(self, part: ModelCall, working: Tensors, run: Run) -> dict[str, Array]:
        body = build_request(
            part.model, part.arguments(working), outputs=part.requested, id=run.id, parameters=run.parameters
        )
        request = run.request
        reply = await self._call(
            Request(body, request.metadata, request.deadline, request.peer, request.method), run.observer
        )
        run.served = reply.served
        run.attempts += reply.served.attempts
        return {name: array for name, (_, array) in parse_response(reply.body).items()}

    def served(self, run: Run) -> Served:
        """Who answered one run: the last call's variant, under the pipeline's name."""
        last = run.served
        if last is None:
            return Served(self.name, "", PIPELINE_VERSION, "", 0)
        return Served(self.name, last.variant, last.model_version, last.endpoint, run.attempts)

    def _asked_last(self, run: Run, by_call: Served | None) -> Served | None:
        """Of a run that failed: by_call is who was asked by the call that did, None if it was no call."""
        if by_call is None:
            return self.served(run) if run.served is not None else None
        attempts = run.attempts + by_call.attempts
        return Served(self.name, by_call.variant, by_call.model_version, by_call.endpoint, attempts)

    def _wanted(self, requested: Sequence[Any]) -> list[str]:
        """Names of the outputs to answer. requested: InferRequestedOutputTensor messages; none means all."""
        names = [spec.name for spec in self.pipeline.outputs]
        for output in requested:
            if output.name not in names:
                raise BadInput(f"output '{output.name}' is unknown; '{self.name}' has {', '.join(names)}")
            if output.parameters:
                keys = ", ".join(sorted(output.parameters))
                raise BadInput(f"output '{output.name}': a pipeline's output takes no parameters, but {keys} is given")
        return [output.name for output in requested] or names

    # What it says of itself, as any model

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
        """Of this process."""
        totals = self._totals
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


def _is_passed_on(parameter: str) -> bool:
    return parameter not in _RESERVED and not parameter.startswith("triton_")


def _config_type(datatype: str) -> int:
    name = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return int(config_pb.DataType.Value(name))
