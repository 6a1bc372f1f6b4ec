"""The use-case for one ModelStreamInfer: each message is routed on its own, over shared upstream streams.

One *leg* is an upstream stream to one endpoint for one model: all messages that go to both travel on it, so Triton sees
a sequence's requests in order. Models do not share legs, since a Triton whose stream has requests of decoupled models
among others ends up answering nothing or crashing (seen with 2.51). Upstream ids are the gateway's own, so that answers
find their request; the caller's id is put back.

Order, as Triton keeps it: answers of models that answer once come in the order of their requests; those of decoupled
models come as they are made, in order per request. Which kind a model is shows in its first answer: a decoupled one
says with it that it is not the last, or ends with an empty one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.errors import GatewayError, UpstreamFailed
from gateway.hooks import AttemptEnded, CallEnded, CallObserver
from gateway.infer.attempts import Attempt
from gateway.infer.correlation import with_own_id
from gateway.infer.exchange import Request
from gateway.infer.inference import SERVICE, Inference, Work, request_for, served_by
from gateway.infer.metadata import echoed, first_values, passed_on, served_trailers
from gateway.infer.pipelines import PipelineModel
from gateway.status import Code, Meaning, Verdict, code_of, judge_in_band
from gateway.types import Facts, Metadata, Served
from gateway.upstream.connection import CallFailed, StreamCall
from gateway.upstream.endpoint import Endpoint
from gateway.wire.peek import (
    ENABLE_EMPTY_FINAL,
    Head,
    StreamHead,
    peek_request,
    peek_stream_response,
    rename_stream_response,
    stream_error,
    stream_response,
)

_log = logging.getLogger(__name__)

_STREAM = SERVICE + "ModelStreamInfer"
_FINAL = "triton_final_response"
_WANTS_EMPTY_FINAL = "triton_enable_empty_final_response"
_ERRORS_END_STREAM = "triton_grpc_error"

_FAREWELL_SECONDS = 1.0  # how long a server may take to end a stream on which all is said

_MANY_LEGS = 32
"""Upstream streams of one caller's; clients call a few models on one stream. Beyond this idle ones are ended."""

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How much of one stream may be under way before no more of it is read."""

    requests: int = 1024
    bytes: int = 64 << 20  # of request bodies kept for a retry and of answers held for their turn


@dataclass(eq=False, slots=True)
class Message:
    """One request of the stream, until its last answer has been written."""

    request: Request | None  # None once an answer has come: it can't be sent again
    size: int  # of the request's body
    head: Head
    observer: CallObserver
    key: str  # its id upstream
    work: Work | None = None  # None for a pipeline
    attempt: Attempt | None = None
    answers: int = 0
    answer_bytes: int = 0
    served: Served | None = None
    held: deque[bytes] = field(default_factory=deque)  # answers that wait for their turn
    done: bool = False


@dataclass(eq=False, slots=True)
class Leg:
    """One upstream stream and the messages that are on it."""

    endpoint: Endpoint
    call: StreamCall
    messages: dict[str, Message] = field(default_factory=dict)
    ended: bool = False
    reader: asyncio.Task[None] | None = None


class StreamSession:
    """One caller's ModelStreamInfer, from its first message to its end."""

    def __init__(
        self,
        inference: Inference,
        opening: Request,
        write: Write,
        limits: StreamLimits,
    ) -> None:
        """opening: the call's metadata, deadline and peer; its body is not used."""
        self._inference = inference
        self._opening = opening
        self._facts = first_values(opening.metadata)
        self._passed_on = passed_on(opening.metadata)
        self._write = write
        self._limits = limits
        self._legs: dict[tuple[Endpoint, str], Leg] = {}  # by Triton model as well
        self._tasks: set[asyncio.Task[None]] = set()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._accepted = 0
        self._open: set[Message] = set()
        self._who: tuple[dict[str, None], dict[str, None], dict[str, None]] = ({}, {}, {})
        self._attempts = 0
        self._kept_bytes = 0  # of requests without an answer yet
        self._held_bytes = 0  # of answers that wait for their turn
        self._progress = asyncio.Event()  # something of that has changed, or where a message is
        self._has_room = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._order: deque[Message] = deque()  # those whose answers must keep the order of the requests
        self._answering = asyncio.Lock()
        self._account(0)

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Serve the stream to its end.

        :raises GatewayError: if the stream as a whole ends with a status.
        """
        self._spawn(self._serve(requests))
        try:
            await self._end
        finally:
            await self._abandon()

    def trailing_metadata(self) -> Metadata:
        """Who answered on this stream: each name once, in order of their first answer; the attempts in total."""
        variants, versions, endpoints = (",".join(names) for names in self._who)
        served = Served("", variants, versions, endpoints, self._attempts)
        return (*served_trailers(served), *echoed(self._facts))

    async def _serve(self, requests: AsyncIterator[bytes]) -> None:
        async for body in requests:
            await self._has_room.wait()
            await self._accept(body)
        await self._is_idle.wait()
        for leg in self._legs.values():
            await leg.call.done_writing()
        readers = [leg.reader for leg in self._legs.values() if leg.reader is not None]
        if readers:  # each server ends its stream itself; to be cancelled is for it a failure that it may count
            await asyncio.wait(readers, timeout=_FAREWELL_SECONDS)
        self._end_with(None)

    # Requests

    async def _accept(self, body: bytes) -> None:
        inference, opening = self._inference, self._opening
        head = peek_request(body)
        facts = Facts(self._facts, head.parameters if head.entries else {}, head.model_version)
        request = Request(body, opening.metadata, opening.deadline, opening.peer, "ModelStreamInfer")
        decided = inference.decide(head, facts)
        observer = inference.report(request.method, decided, request.peer, body)
        self._accepted += 1
        message = Message(request, len(body), head, observer, f"{self._accepted}:{head.id}")
        self._open.add(message)
        self._account(len(body))
        if head.model_name not in inference.decoupled:
            self._order.append(message)
        pipeline = inference.topology.pipelines.get(head.model_name)
        if pipeline is not None:
            self._spawn(self._run_pipeline(message, pipeline, request))
            return
        try:
            message.work = inference.begin(decided, observer)
            await self._send(message)
        except GatewayError as error:
            await self._fail(message, error)

    async def _send(self, message: Message) -> None:
        """Put a message on the leg of the next endpoint to try.

        :raises GatewayError: if there is none.
        """
        work, request, inference = message.work, message.request, self._inference
        assert work is not None and request is not None  # noqa: S101, PT018  (forwarded, and not answered yet)
        attempt = work.attempts.maybe_next()
        if attempt is None:
            raise inference.given_up(work)
        message.attempt = attempt
        timeout = inference.remaining(self._opening.deadline)
        metadata = [*self._passed_on, *inference.attempt_started(work, attempt)]
        if work.upstream_id is not None:
            message.key = f"{message.key.partition(':')[0]}:{work.upstream_id}"
        leg = self._leg_to(attempt, metadata, timeout)
        leg.messages[message.key] = message
        self._progress.set()
        attempt.endpoint.begin()
        body = request_for(attempt.variant, request.body, message.head, id=message.key, extra=ENABLE_EMPTY_FINAL)
        try:
            await leg.call.write(body)
        except CallFailed:
            return  # the leg has ended: its reader sees why, and takes care of every message on it

    def _leg_to(self, attempt: Attempt, metadata: Metadata, timeout: float | None) -> Leg:
        endpoint, key = attempt.endpoint, (attempt.endpoint, attempt.variant.model)
        leg = self._legs.get(key)
        if leg is None or leg.ended:
            if len(self._legs) >= _MANY_LEGS:
                self._cut_idle_legs()
            leg = self._legs[key] = Leg(endpoint, endpoint.connection.stream(_STREAM, metadata, timeout))
            leg.reader = self._spawn(self._read_leg(leg))
        return leg

    def _cut_idle_legs(self) -> None:
        """A caller may name any number of models on one stream, also such as do not exist."""
        for key, leg in list(self._legs.items()):
            if not leg.messages:
                self._spawn(leg.call.done_writing())  # the server then ends it
                del self._legs[key]

    async def _run_pipeline(self, message: Message, pipeline: PipelineModel, request: Request) -> None:
        try:
            reply = await pipeline.infer(request, message.observer)
        except GatewayError as error:
            await self._fail(message, error)
        else:
            message.served = reply.served
            await self._answer(message, stream_response(reply.body), last=True)

    # Answers

    async def _read_leg(self, leg: Leg) -> None:
        try:
            while (body := await self._read(leg)) is not None:
                head = peek_stream_response(body)
                message = self._addressee(leg, head)
                if message is None:
                    _log.warning("endpoint %s answered a request that it was not sent", leg.endpoint.address)
                elif head.error:
                    await self._take_error(leg, message, head, body)
                else:
                    await self._take_answer(leg, message, head, body)
        except CallFailed as failure:
            await self._leg_ended(leg, failure)
        else:
            await self._leg_ended(leg, CallFailed(Code.UNAVAILABLE, "the stream ended", from_server=False))

    async def _read(self, leg: Leg) -> bytes | None:
        """A leg's next message; not before those held here have become fewer, unless all wait for one of this leg's."""
        while self._held_bytes >= self._limits.bytes and self._order[0].key not in leg.messages:
            self._progress.clear()
            await self._progress.wait()
        return await leg.call.read()

    @staticmethod
    def _addressee(leg: Leg, head: StreamHead) -> Message | None:
        key = head.response.id if head.response else ""
        if not key and len(leg.messages) == 1:  # an error that Triton could not attribute
            return next(iter(leg.messages.values()))
        return leg.messages.get(key)

    async def _take_answer(self, leg: Leg, message: Message, head: StreamHead, body: bytes) -> None:
        response, work = head.response, message.work
        if response is None or work is None or message.attempt is None:
            return
        last = response.is_final
        if response.is_empty_final or not last:
            self._inference.decoupled.add(message.head.model_name)
        message.served = served_by(work, message.attempt, response.model_version)
        if last:
            self._leave(leg, message)
            self._inference.attempt_answered(work)
        if response.is_empty_final and message.head.parameters.get(_WANTS_EMPTY_FINAL) is not True:
            await self._answer(message, None, last=True)
            return
        renamed = rename_stream_response(body, head, model_name=work.route.model, id=message.head.id)
        await self._answer(message, renamed, last=last, in_turn=last and not response.is_empty_final)

    async def _take_error(self, leg: Leg, message: Message, head: StreamHead, body: bytes) -> None:
        """Try the message elsewhere if that may help; else hand Triton's own error on."""
        response = head.response
        last = response is None or response.parameters.get(_FINAL) is not False  # a decoupled model may go on after it
        text = with_own_id(head.error, message.key, message.head.id)
        if last:
            self._leave(leg, message)
            if await self._retried(message, CallFailed(Code.UNKNOWN, text), judge_in_band(text)):
                return
        else:
            self._inference.decoupled.add(message.head.model_name)
        name = message.head.model_name if response and response.model_name else None
        renamed = rename_stream_response(body, replace(head, error=text), model_name=name, id=message.head.id)
        await self._answer(message, renamed, last=last, in_turn=last, code=Code.UNKNOWN, text=text)

    async def _leg_ended(self, leg: Leg, failure: CallFailed) -> None:
        leg.ended = True
        if failure.from_server and _ERRORS_END_STREAM in self._facts:
            self._end_with(UpstreamFailed(code_of(failure.code), failure.text, failure.trailing))
            return
        for message in list(leg.messages.values()):
            self._leave(leg, message)
            if not await self._retried(message, failure, None):
                text = "The stream to the endpoint broke before the last answer."
                await self._fail(message, UpstreamFailed(Code.UNAVAILABLE, text))

    async def _retried(self, message: Message, failure: CallFailed, verdict: Verdict | None) -> bool:
        """Send a message again if its failure allows and no answer has gone out. False: the caller must be told."""
        work, attempt = message.work, message.attempt
        if work is None or attempt is None:
            return False
        try:
            self._inference.attempt_failed(work, attempt, failure, verdict)
        except UpstreamFailed:
            return False
        if message.answers:
            return False
        try:
            await self._send(message)
        except GatewayError as error:
            await self._fail(message, error)
        return True

    async def _fail(self, message: Message, error: GatewayError) -> None:
        body = stream_error(error.text, message.head.id)
        await self._answer(message, body, last=True, code=error.code, text=error.text)

    async def _answer(
        self,
        message: Message,
        body: bytes | None,
        *,
        last: bool,
        in_turn: bool = True,
        code: Code = Code.OK,
        text: str = "",
    ) -> None:
        """Write an answer, or hold it until those before it are written. Waits while the caller reads slowly."""
        async with self._answering:
            if message.done:
                return
            if message.request is not None:
                message.request = None
                self._account(-message.size)
            if body is not None:
                message.answers += 1
                message.answer_bytes += len(body)
                message.held.append(body)
                self._held_bytes += len(body)
            message.done = last
            if not in_turn and message in self._order:
                self._order.remove(message)
            if message not in self._order:
                await self._write_held(message)
            await self._write_in_order()
            if last:
                self._ended(message, code, text)
            self._account(0)
            self._progress.set()

    async def _write_in_order(self) -> None:
        while self._order:
            first = self._order[0]
            await self._write_held(first)
            if not first.done:
                return
            self._order.popleft()

    async def _write_held(self, message: Message) -> None:
        while message.held:
            body = message.held.popleft()
            self._held_bytes -= len(body)
            await self._write(body)

    # Bookkeeping

    def _leave(self, leg: Leg, message: Message) -> None:
        if leg.messages.pop(message.key, None) is not None:
            leg.endpoint.end()

    def _account(self, size: int) -> None:
        self._kept_bytes += size
        full = len(self._open) >= self._limits.requests or self._kept_bytes + self._held_bytes >= self._limits.bytes
        _set(self._has_room, not full)
        _set(self._is_idle, not self._open)

    def _ended(self, message: Message, code: Code, text: str) -> None:
        self._open.discard(message)
        self._account(0)
        if (served := message.served) is not None:
            self._attempts += served.attempts
            for names, name in zip(self._who, (served.variant, served.model_version, served.endpoint), strict=True):
                names[name] = None
        message.observer.ended(
            CallEnded(code, text, message.served, message.size, message.answer_bytes, self._inference.clock())
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end_with(error)

    def _end_with(self, error: BaseException | None) -> None:
        if self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)

    async def _abandon(self) -> None:
        """Leave nothing behind, whether the stream ended well or the caller went away."""
        for leg in self._legs.values():
            if not leg.ended:
                leg.call.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for leg in self._legs.values():
            for message in list(leg.messages.values()):
                self._leave(leg, message)
                message.observer.attempt_ended(AttemptEnded(Code.CANCELLED, "", Meaning.ENDED, self._inference.clock()))
        for message in list(self._open):
            self._ended(message, Code.CANCELLED, "the stream ended before the last answer")


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()
