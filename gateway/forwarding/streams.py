"""The use-case for one ModelStreamInfer: each message is routed on its own, over shared upstream streams.

One *leg* is an upstream stream to one endpoint for one model: all messages that go to both travel on it, so Triton sees
a sequence's requests in order. Models do not share legs, since a Triton whose stream has requests of decoupled models
among others ends up answering nothing or crashing (seen with 2.51).

Answers find their request by its id, so ids under way on one leg differ. A caller's id goes to the model as it is; the
second request of the same id goes on another leg beside the first, so that one that means to stop the first names it.
Only a request without an id gets one here, and one whose place is on a leg that has its id already (of a sequence, or
the fifth at once) gets a suffix. What the caller sees is its own id.

Order, as Triton keeps it: answers of models that answer once come in the order of their requests; those of decoupled
models come as they are made, in order per request. Which kind a model is shows in its first answer: a decoupled one
says with it that it is not the last, or ends with an empty one.

A session works by callbacks: the caller's side and the legs tell it what has come, and it never waits. Who is to be
held up is told so: a caller by `take` being False until `Caller.feed`, a leg by `message_arrived` until `feed`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Collection, Container
from dataclasses import dataclass, replace
from typing import Final, Protocol

from gateway.errors import GatewayError, MalformedMessage, SequenceLost, UpstreamFailed
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.correlation import with_own_id
from gateway.forwarding.exchange import Request
from gateway.forwarding.inference import Inference, Work, request_for, served_by
from gateway.forwarding.metadata import echoed, served_trailers
from gateway.forwarding.pipelines import PipelineModel
from gateway.hooks import AttemptEnded, CallEnded, CallObserver, CallStarted
from gateway.rpc.budget import Budget
from gateway.rpc.metadata import metadata_from
from gateway.status import Code, Meaning, Origin, Verdict, code_of, judge_in_band
from gateway.types import Facts, Metadata, Served
from gateway.upstream.connection import CallFailed, StreamCall
from gateway.upstream.endpoint import Endpoint
from gateway.v2.names import STREAM
from gateway.v2.peek import (
    ENABLE_EMPTY_FINAL,
    Head,
    StreamHead,
    bool_parameter,
    has_entry,
    maybe_id,
    parameters_of,
    rename_stream_response,
    stream_error,
    stream_response,
)
from gateway.v2.repeats import StreamRequestHeads, StreamResponseHeads

_log = logging.getLogger(__name__)

_FINAL: Final = "triton_final_response"
_WANTS_EMPTY_FINAL: Final = "triton_enable_empty_final_response"
_IS_FINAL: Final = bool_parameter(_FINAL, True)
"""Part of the only answer of a pipeline, as of any model's last answer on a stream, asked for or not."""

_ERRORS_END_STREAM: Final = "triton_grpc_error"

_LANES: Final = 4
"""Legs to one endpoint for one model, for requests that share an id and are under way at once."""

_DECOUPLED: Final = "decoupled"
"""Key of what an endpoint remembers of a model that has been seen to answer several times, or to end with nothing."""

_NAMES_TOLD: Final = 1024
"""Characters of each list of who answered: it becomes one header field, and servers choose what their versions are."""

_QUIET_SECONDS: Final = 60.0  # between two lines about an endpoint's answers that nobody asked for

_FAREWELL_SECONDS: Final = 1.0  # how long a server may take to end a stream on which all is said

_SENT_AGAIN_AT_ONCE: Final = 32  # messages of an upstream stream that has ended; half a millisecond

_MANY_LEGS: Final = 32
"""Upstream streams of one caller's; clients call a few models on one stream. Beyond this idle ones are ended."""


class Caller(Protocol):
    """The caller's side of a stream, as a transport has it. No method waits."""

    def send(self, body: bytes) -> bool:
        """Write an answer. False: it reads slowly, and `StreamSession.caller_has_room` will be called."""
        ...

    def feed(self) -> None:
        """More requests are wanted, after `StreamSession.take` said that none were."""
        ...

    def finish(self, error: Exception | None) -> None:
        """The stream has ended: well, or with an error. Called once, unless the session is cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How much of one stream may be under way before no more of it is read."""

    requests: int = 1024
    bytes: int = 64 << 20  # of request bodies kept for a retry and of answers held for their turn


class Message:
    """One request of the stream, until its last answer has been written."""

    work: Work | None = None  # None for a pipeline
    attempt: Attempt | None = None
    answers = 0
    answer_bytes = 0
    served: Served | None = None
    asked: Served | None = None  # who was asked last, if the message has failed
    callers_fault = False  # has it failed by its caller's fault, although the code does not say so?
    failed: tuple[CallFailed, Verdict] | None = None  # an error among its answers, after which it went on
    held: deque[bytes] | None = None  # answers that wait for their turn
    done = False
    key = ""  # its id upstream

    def __init__(self, body: bytes, head: Head, observer: CallObserver) -> None:
        self.body: bytes | None = body  # None once an answer has come: it can't be sent again
        self.size = len(body)
        self.head = head
        self.id = head.id.partition("\0")[0]  # as a model's answer has it: Triton's core keeps ids as C does
        self.observer = observer
        self.in_order = True  # its answers keep the order of the requests, until its model is known to be decoupled


LegKey = tuple[Endpoint, str, int]
"""Where to, for which Triton model, and the lane beside others of the same."""


class Leg:
    """One upstream stream and the messages that are on it."""

    __slots__ = ("_session", "call", "endpoint", "heads", "key", "messages")

    def __init__(self, session: StreamSession, key: LegKey, metadata: Metadata, timeout: float | None) -> None:
        self._session = session
        self.endpoint = key[0]
        self.key = key
        self.messages: dict[str, Message] = {}
        self.heads = StreamResponseHeads()
        self.call: StreamCall = self.endpoint.connection.stream(STREAM, metadata, timeout, self)

    def message_arrived(self, body: bytes) -> bool:
        return self._session.answer_arrived(self, body)

    def has_room(self) -> None:
        self._session.leg_has_room(self)

    def ended(self, failure: CallFailed | None) -> None:
        self._session.leg_ended(self, failure or CallFailed(Code.UNAVAILABLE, "the stream ended", origin=Origin.LOST))


class Names:
    """Different names in the order in which they came, as one text of bounded length."""

    def __init__(self) -> None:
        self.text = ""
        self._known: set[str] = set()
        self._is_full = False

    def add(self, name: str) -> None:
        if not name or self._is_full or name in self._known:
            return
        text = f"{self.text},{name}" if self.text else name
        if len(text) > _NAMES_TOLD:
            text, self._is_full = f"{self.text},...".lstrip(","), True
        self._known.add(name)
        self.text = text


def own_id(taken: Container[str]) -> str:
    """An id for a request that has none: a number, since some models read one, and not one that other callers get."""
    while (id := str(random.getrandbits(62))) in taken:
        pass
    return id


def _lost(failure: CallFailed) -> UpstreamFailed:
    """What the caller is told of a message whose leg has ended for good."""
    if failure.origin is Origin.ANSWER:
        return UpstreamFailed(code_of(failure.code), f"The endpoint's answer can't be used: {failure.text}")
    return UpstreamFailed(Code.UNAVAILABLE, "The stream to the endpoint broke before the last answer.")


def distinct_id(id: str, taken: Collection[str]) -> str:
    """The id, or one that begins with it and is not taken; of a number it is a number."""
    mark = "" if id.isascii() and id.isdigit() else "-"
    made, count = id, max(len(taken), 1)
    while made in taken:
        made = f"{id}{mark}{count}"
        count += 1
    return made


def _asks_wrongly(head: Head) -> bool:
    """Does it ask for the empty last message with something else than a bool? That is for Triton to refuse."""
    if not head.entries:
        return False
    asked = head.parameters.get(_WANTS_EMPTY_FINAL)
    if asked is None:
        return has_entry(head, _WANTS_EMPTY_FINAL)
    return not isinstance(asked, bool)


class StreamSession:
    """One caller's ModelStreamInfer, from its first message to its end."""

    def __init__(
        self, inference: Inference, opening: Request, caller: Caller, limits: StreamLimits, budget: Budget
    ) -> None:
        """opening: the call's metadata, deadline and peer; its body is not used. budget: of its connection, from which
        the bytes that are kept and held here are paid."""
        self._inference = inference
        self._opening = opening
        self._facts = opening.metadata.values
        self._passed_on = metadata_from(opening.metadata.passed)
        self._caller = caller
        self._limits = limits
        self._budget = budget
        self._heads = StreamRequestHeads()
        self._legs: dict[LegKey, Leg] = {}
        self._leaving: set[Leg] = set()  # those that take no more messages and have not ended
        self._full_legs: set[Leg] = set()  # those that take no more now
        self._paused: set[Leg] = set()  # those that were told to bring no more answers
        self.tasks: set[asyncio.Task[None]] = set()  # of pipelines
        self._farewell: asyncio.TimerHandle | None = None
        self._is_over = False
        self._bereft: deque[tuple[Message, CallFailed]] = deque()  # messages whose leg has ended, to be sent again
        self._waiting: deque[bytes] = deque()  # requests that came while there was no room
        self._is_fed = True  # more requests are wanted
        self._is_going_on = False
        self._no_more = False  # the caller has said that there are no more requests
        self._open: set[Message] = set()
        self._order: deque[Message] = deque()  # those whose answers must keep the order of the requests
        self._held_bytes = 0  # of answers that wait for their turn
        self._bytes = 0  # of those, of requests without an answer yet, and of requests that wait
        self._caller_full = False  # the caller reads slowly
        self._is_choked = False  # and answers that no server held back are piling up meanwhile
        self._who = (Names(), Names(), Names())  # variants, versions, endpoints
        self._last_served: Served | None = None
        self._attempts = 0

    @property
    def open_messages(self) -> int:
        """Those without their last answer."""
        return len(self._open)

    def trailing_metadata(self) -> Metadata:
        """Who answered on this stream: each name once, in order of their first answer; the attempts in total."""
        variants, versions, endpoints = self._who
        served = Served("", variants.text, versions.text, endpoints.text, self._attempts)
        return (*served_trailers(served), *echoed(self._facts))

    # The caller's side

    def take(self, body: bytes) -> bool:
        """A request has come. False: let none follow until `Caller.feed`; those on their way are kept all the same."""
        if self._is_over:
            return False
        try:
            if self._is_fed:
                self._accept(body)
            else:
                self._waiting.append(body)
                self._hold(len(body))
        except Exception as error:
            self.fail(error)
            return False
        self._is_fed = not self._waiting and self._has_room()
        return self._is_fed

    def end_of_requests(self) -> None:
        self._no_more = True
        self._is_fed = False
        self._go_on()

    def caller_has_room(self) -> None:
        """It has read what it was sent."""
        self._caller_full = self._is_choked = False
        self._write_in_order()
        self._feed_legs()
        self._go_on()

    def cancel(self) -> None:
        """Leave nothing behind: the caller went away, or its deadline has passed."""
        if self._is_over:
            return
        self._is_over = True
        self._budget.give(self._bytes)
        self._bytes = 0
        if self._farewell is not None:
            self._farewell.cancel()
        for task in self.tasks:
            task.cancel()
        for leg in (*self._legs.values(), *self._leaving):
            leg.call.cancel()
            for message in list(leg.messages.values()):
                self._leave(leg, message)
                message.observer.attempt_ended(AttemptEnded(Code.CANCELLED, "", Meaning.ENDED, self._inference.clock()))
        for message in list(self._open):
            self._ended(message, Code.CANCELLED, "the stream ended before the last answer")
        for left in (
            self._legs,
            self._leaving,
            self._full_legs,
            self._paused,
            self._bereft,
            self._waiting,
            self._order,
        ):
            left.clear()

    def fail(self, error: Exception) -> None:
        """End the stream as a whole with an error."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if not self._is_over:
            self.cancel()
            self._caller.finish(error)

    # Requests

    def _has_room(self) -> bool:
        limits = self._limits
        return (
            len(self._open) < limits.requests
            and self._has_bytes_left()
            and not self._full_legs
            and not self._bereft
            and not self._is_choked
        )

    def _has_bytes_left(self) -> bool:
        """May more be kept? Always one message, whatever others hold: so each session goes on with its own answers."""
        return not self._bytes or self._is_within(self._bytes)

    def _is_within(self, size: int) -> bool:
        return size < self._limits.bytes and self._budget.has_room

    def _hold(self, size: int) -> None:
        self._bytes += size
        self._budget.hold(size)

    def _give(self, size: int) -> None:
        if not self._is_over:  # else all has been given
            self._bytes -= size
            self._budget.give(size)

    def _go_on(self) -> None:
        """Take what waits if there is room for it, then have the caller send more; or end, if that was all."""
        if self._is_fed or self._is_over or self._is_going_on:
            return
        self._is_going_on = True
        try:
            while self._waiting and self._has_room():
                body = self._waiting.popleft()
                self._give(len(body))
                self._accept(body)
        except Exception as error:
            self.fail(error)
            return
        finally:
            self._is_going_on = False
        if self._waiting:
            return
        if self._no_more:
            if not self._open and not self._order:
                self._say_farewell()
        elif self._has_room():
            self._is_fed = True
            self._caller.feed()

    def _say_farewell(self) -> None:
        """Each server ends its stream itself; to be cancelled is for it a failure that it may count."""
        if self._farewell is None:
            self._farewell = asyncio.get_running_loop().call_later(_FAREWELL_SECONDS, self._end, None)
            for leg in self._legs.values():
                leg.call.done_writing()
        if not self._legs and not self._leaving:
            self._end(None)

    def _accept(self, body: bytes) -> None:
        inference, name = self._inference, ""
        try:
            head = self._heads.peek(body)
            name = head.model_name
            facts = Facts(self._facts, parameters_of(head), head.model_version)
        except GatewayError as error:
            self._refuse(body, error, name)
            return
        decided = inference.decide(head, facts)
        observer = inference.report("ModelStreamInfer", decided, self._opening.peer, body)
        message = self._enter(Message(body, head, observer))
        pipeline = inference.current.now.pipelines.get(name)
        if pipeline is not None:
            self._start_pipeline(message, pipeline)
            return
        try:
            message.work = inference.begin(decided, observer)
            self._send(message)
        except GatewayError as error:
            self._fail_message(message, error)

    def _enter(self, message: Message) -> Message:
        """It has its place among the others of the stream."""
        self._open.add(message)
        self._hold(message.size)
        self._order.append(message)
        return message

    def _refuse(self, body: bytes, error: GatewayError, name: str) -> None:
        """Answer a message that can't be read as far as it must be; those beside it are no worse for it.

        It costs what any message does that is answered here, so however many come, the limits of the stream hold.

        name: of its model, if that can be read.
        """
        inference, id = self._inference, maybe_id(body)
        known, now = inference.topology.is_known(name), inference.clock()
        started = CallStarted("ModelStreamInfer", name, known, id, self._opening.peer, now, Facts(self._facts))
        head = Head(name, "", id, False, [], 0, 0, None, [])
        message = self._enter(Message(body, head, inference.hooks.call_started(started)))
        self._fail_message(message, error)

    def _send(self, message: Message) -> None:
        """Put a message on the leg of the next endpoint to try.

        :raises GatewayError: if there is none.
        """
        work, body, inference = message.work, message.body, self._inference
        assert work is not None and body is not None  # noqa: S101, PT018  (forwarded, and not answered yet)
        attempt = inference.maybe_next(work)
        if attempt is None:
            raise inference.given_up(work)
        message.attempt = attempt
        timeout = inference.remaining(self._opening.deadline)
        added = inference.attempt_started(work, attempt)
        attempt.began = 0.0  # how many answers there are, and when, is the model's affair
        endpoint, variant = attempt.endpoint, attempt.variant
        if message.in_order and endpoint.has_seen(variant.model, variant.version, _DECOUPLED):
            self._let_pass(message)
        key = self._place(message, work, attempt)
        leg = self._legs.get(key)
        if leg is None:
            context = inference.context_of(work.facts)
            leg = self._new_leg(key, (*self._passed_on, *added, *context), timeout)
        wanted = message.id or work.upstream_id
        message.key = own_id(leg.messages) if wanted is None else distinct_id(wanted, leg.messages)
        leg.messages[message.key] = message
        endpoint.begin()
        if leg in self._paused:  # it may be the one whose answers are waited for now
            self._feed_legs()
        extra = b"" if _asks_wrongly(message.head) else ENABLE_EMPTY_FINAL
        request = request_for(variant, body, message.head, id=message.key, extra=extra)
        if not leg.call.send(request):
            self._full_legs.add(leg)
            self._is_fed = False

    def _place(self, message: Message, work: Work, attempt: Attempt) -> LegKey:
        """The first leg that has no request of the same id under way. A sequence stays on one, whatever its ids are."""
        id = message.id
        if id and work.sequence is None:
            for lane in range(_LANES):
                key = (attempt.endpoint, attempt.variant.model, lane)
                leg = self._legs.get(key)
                if leg is None or id not in leg.messages:
                    return key
        return (attempt.endpoint, attempt.variant.model, 0)

    def _new_leg(self, key: LegKey, metadata: Metadata, timeout: float | None) -> Leg:
        if len(self._legs) >= _MANY_LEGS:
            self._cut_idle_legs()
        leg = Leg(self, key, metadata, timeout)
        self._legs[key] = leg
        return leg

    def _cut_idle_legs(self) -> None:
        """A caller may name any number of models on one stream, also such as do not exist."""
        for leg in [leg for leg in self._legs.values() if not leg.messages]:
            leg.call.done_writing()  # the server then ends it
            del self._legs[leg.key]
            self._leaving.add(leg)

    def leg_has_room(self, leg: Leg) -> None:
        self._full_legs.discard(leg)
        self._go_on()

    def _start_pipeline(self, message: Message, pipeline: PipelineModel) -> None:
        opening = self._opening
        assert message.body is not None  # noqa: S101  (it has just come)
        request = Request(message.body, opening.metadata, opening.deadline, opening.peer, "ModelStreamInfer")
        task = asyncio.ensure_future(self._run_pipeline(message, pipeline, request))
        self.tasks.add(task)
        task.add_done_callback(self._pipeline_done)

    async def _run_pipeline(self, message: Message, pipeline: PipelineModel, request: Request) -> None:
        try:
            reply = await pipeline.infer(request, message.observer)
        except GatewayError as error:
            self._fail_message(message, error)
        else:
            message.served = reply.served
            self._answer_unasked(message, stream_response(reply.body, _IS_FINAL))

    def _pipeline_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    # Answers

    def answer_arrived(self, leg: Leg, body: bytes) -> bool:
        """A leg brings an answer. False: it must bring no more until it is fed."""
        if self._is_over:
            return False
        try:
            head = leg.heads.peek(body)
            message = self._addressee(leg, head)
            if message is None:
                self._answered_unsent(leg.endpoint)
            elif head.error:
                self._take_error(leg, message, head, body)
            else:
                self._take_answer(leg, message, head, body)
        except MalformedMessage as error:  # by the server: what it has of other messages can't be told either
            leg.call.cancel()
            self.leg_ended(leg, CallFailed(error.code, error.text, origin=Origin.ANSWER))
            return False
        except Exception as error:
            self.fail(error)
            return False
        if self._may_read(leg):
            return True
        self._paused.add(leg)
        return False

    def _may_read(self, leg: Leg) -> bool:
        """May it bring more? Not while answers held here are many, unless all wait for one of this leg's."""
        if self._caller_full:
            return False
        return not self._held_bytes or self._is_within(self._held_bytes) or self._order[0].key in leg.messages

    def _feed_legs(self) -> None:
        for leg in [leg for leg in self._paused if self._may_read(leg)]:
            self._paused.discard(leg)
            leg.call.feed()

    @staticmethod
    def _answered_unsent(endpoint: Endpoint) -> None:
        """Log it once a minute: a server that does it once may do it without end."""
        endpoint.unasked_answers += 1
        now = time.monotonic()
        if now >= endpoint.unasked_quiet_until:
            _log.warning(
                "endpoint %s answered %d requests that it was not sent; told at most once a minute",
                endpoint.address,
                endpoint.unasked_answers,
            )
            endpoint.unasked_answers, endpoint.unasked_quiet_until = 0, now + _QUIET_SECONDS

    @staticmethod
    def _addressee(leg: Leg, head: StreamHead) -> Message | None:
        key = head.response.id if head.response else ""
        if not key and len(leg.messages) == 1:  # an error that Triton could not attribute
            return next(iter(leg.messages.values()))
        return leg.messages.get(key)

    def _take_answer(self, leg: Leg, message: Message, head: StreamHead, body: bytes) -> None:
        response, work = head.response, message.work
        if response is None or work is None or message.attempt is None:
            return
        last = response.is_final
        # Triton's own end of a decoupled answer names no version. An answer of a model does, also one without tensors.
        is_closing = last and not response.has_tensors and not response.model_version
        if is_closing or not last:
            self._saw_decoupled(message.attempt)
        if message.served is None or not is_closing:
            message.served = served_by(work, message.attempt, response.model_version)
        code, text = Code.OK, ""
        if last:
            self._leave(leg, message)
            code, text = self._how_ended(message)
        if is_closing and message.head.parameters.get(_WANTS_EMPTY_FINAL) is not True:
            self._answer(message, None, last=True, code=code, text=text)
            return
        renamed = rename_stream_response(body, head, model_name=work.route.model, id=message.id)
        self._answer(message, renamed, last=last, in_turn=last and not is_closing, code=code, text=text)

    def _how_ended(self, message: Message) -> tuple[Code, str]:
        """Report the attempt, whose last answer is here: it failed if one of them was an error."""
        work, attempt = message.work, message.attempt
        assert work is not None and attempt is not None  # noqa: S101, PT018  (it has been sent)
        if message.failed is None:
            self._inference.attempt_answered(work)
            return Code.OK, ""
        failure, verdict = message.failed
        self._learn(work, attempt, failure, verdict)
        return code_of(failure.code), failure.text

    @staticmethod
    def _saw_decoupled(attempt: Attempt) -> None:
        """Remember it until the model changes, so that later requests need not wait for their turn."""
        attempt.endpoint.known(attempt.variant.model, attempt.variant.version).kept[_DECOUPLED] = True

    def _take_error(self, leg: Leg, message: Message, head: StreamHead, body: bytes) -> None:
        """Try the message elsewhere if that may help; else hand Triton's own error on."""
        response = head.response
        last = response is None or response.parameters.get(_FINAL) is not False  # a decoupled model may go on after it
        text = with_own_id(head.error, message.key, message.id)
        by_model = response is not None and response.model_name != ""
        code, verdict = self._judge(message, text, by_model=by_model)
        if last:
            self._leave(leg, message)
            if self._retried(message, CallFailed(code, text), verdict):
                return
        else:
            if message.attempt is not None:
                self._saw_decoupled(message.attempt)
            message.failed = message.failed or (CallFailed(code, text), verdict)
        name = message.head.model_name if response and response.model_name else None
        id = message.id if by_model else message.head.id  # Triton's front has the id as it came
        renamed = rename_stream_response(body, replace(head, error=text), model_name=name, id=id)
        self._answer(message, renamed, last=last, in_turn=last, code=code, text=text)

    @staticmethod
    def _judge(message: Message, text: str, *, by_model: bool) -> tuple[Code, Verdict]:
        attempt, head = message.attempt, message.head
        variant = attempt.variant if attempt is not None else None
        asked = (variant.model, variant.version or head.model_version) if variant else (head.model_name, "")
        return judge_in_band(text, by_model=by_model, model=asked[0], version=asked[1], id=head.id)

    def leg_ended(self, leg: Leg, failure: CallFailed) -> None:
        if self._is_over:
            return
        if failure.from_server and _ERRORS_END_STREAM in self._facts:
            self.fail(self._ended_by_error(leg, failure))
            return
        for legs in (self._leaving, self._full_legs, self._paused):
            legs.discard(leg)
        if self._legs.get(leg.key) is leg:
            del self._legs[leg.key]
        messages = list(leg.messages.values())
        for message in messages:
            self._leave(leg, message)
        is_new = not self._bereft
        self._bereft.extend((message, failure) for message in messages)
        if is_new:
            self._find_others()

    def _find_others(self) -> None:
        """Send messages whose leg has ended once more: some in this turn of the loop, the others in the next ones."""
        self._is_going_on = True  # what waits is for later: it may end the session, and with it what this loop is about
        try:
            for _ in range(min(_SENT_AGAIN_AT_ONCE, len(self._bereft))):
                message, failure = self._bereft.popleft()
                if not self._retried(message, failure, None):
                    self._fail_message(message, _lost(failure))
                if self._is_over:
                    return
        except Exception as error:
            self.fail(error)
            return
        finally:
            self._is_going_on = False
        if self._bereft:
            self._is_fed = False  # what comes meanwhile must not overtake them
            asyncio.get_running_loop().call_soon(self._find_others)
            return
        self._go_on()

    def _ended_by_error(self, leg: Leg, failure: CallFailed) -> GatewayError:
        """Triton ended its stream with the error of one of its requests, as the caller has asked it to."""
        code, text = code_of(failure.code), failure.text
        for message in list(leg.messages.values()):
            text = with_own_id(text, message.key, message.id)
            self._leave(leg, message)
            work, attempt = message.work, message.attempt
            if work is not None and attempt is not None:
                own = CallFailed(failure.code, text, failure.trailing)
                self._learn(work, attempt, own, None)
                message.asked = served_by(work, attempt, attempt.variant.version)
            self._ended(message, code, text)
        return UpstreamFailed(code, text, failure.trailing)

    def _retried(self, message: Message, failure: CallFailed, verdict: Verdict | None) -> bool:
        """Send a message again if its failure allows and no answer has gone out; or say that its sequence is lost.

        False: the caller must be told of the failure.
        """
        work, attempt = message.work, message.attempt
        if work is None or attempt is None:
            return False
        refused = self._learn(work, attempt, failure, verdict)
        if isinstance(refused, SequenceLost) and not message.answers:
            self._fail_message(message, refused)
            return True
        if refused is not None or message.answers:
            message.asked = served_by(work, attempt, attempt.variant.version)
            return False
        try:
            self._send(message)
        except GatewayError as error:
            self._fail_message(message, error)
        return True

    def _learn(self, work: Work, attempt: Attempt, failure: CallFailed, verdict: Verdict | None) -> GatewayError | None:
        """Report a failed attempt. Not None: it must not be tried elsewhere."""
        try:
            self._inference.attempt_failed(work, attempt, failure, verdict)
        except GatewayError as error:
            return error
        return None

    def _fail_message(self, message: Message, error: GatewayError) -> None:
        message.asked = message.asked or error.served
        message.callers_fault = error.is_callers
        self._answer_unasked(message, stream_error(error.text, message.head.id), error.code, error.text)

    def _answer_unasked(self, message: Message, body: bytes, code: Code = Code.OK, text: str = "") -> None:
        """The only answer, made here: no server can be told to wait, so the caller must be if it reads slowly."""
        self._answer(message, body, last=True, code=code, text=text)
        if self._caller_full:
            self._is_choked = True
            self._is_fed = False

    def _answer(
        self,
        message: Message,
        body: bytes | None,
        *,
        last: bool,
        in_turn: bool = True,
        code: Code = Code.OK,
        text: str = "",
    ) -> None:
        """Write an answer, or hold it until those before it are written."""
        if message.done:
            return
        if message.body is not None:
            message.body = None
            self._give(message.size)
        if not in_turn and message.in_order:
            self._let_pass(message)
        if body is not None:
            message.answers += 1
            message.answer_bytes += len(body)
            if message.in_order and (message.held or self._order[0] is not message):
                self._hold_answer(message, body)
            elif not self._caller.send(body):
                self._caller_full = True
        if last:
            message.done = True
            self._ended(message, code, text)
            if message.in_order and self._order[0] is message:
                self._write_in_order()
        if self._paused:
            self._feed_legs()
        if not self._is_fed:
            self._go_on()

    def _hold_answer(self, message: Message, body: bytes) -> None:
        if message.held is None:
            message.held = deque()
        message.held.append(body)
        self._held_bytes += len(body)
        self._hold(len(body))

    def _let_pass(self, message: Message) -> None:
        """It is a decoupled model's: its answers need not wait."""
        message.in_order = False
        order = self._order
        was_first = order[0] is message
        if order[-1] is message:  # it has only just come
            order.pop()
        else:
            order.remove(message)
        self._write_held(message, at_once=True)
        if was_first:
            self._write_in_order()

    def _write_in_order(self) -> None:
        """Those whose turn has come, as long as the caller takes them."""
        order = self._order
        while order:
            first = order[0]
            if first.held:
                self._write_held(first)
            if first.held or not first.done:
                return
            order.popleft()

    def _write_held(self, message: Message, *, at_once: bool = False) -> None:
        held = message.held
        while held and (at_once or not self._caller_full):
            body = held.popleft()
            self._held_bytes -= len(body)
            self._give(len(body))
            if not self._caller.send(body):
                self._caller_full = True

    # Bookkeeping

    def _leave(self, leg: Leg, message: Message) -> None:
        if leg.messages.pop(message.key, None) is not None:
            leg.endpoint.end()

    def _ended(self, message: Message, code: Code, text: str) -> None:
        self._open.discard(message)
        served = message.served
        who = served or message.asked
        if who is not None:
            self._attempts += who.attempts
            if who is not self._last_served:
                self._last_served = who
                for names, name in zip(self._who, (who.variant, who.model_version, who.endpoint), strict=True):
                    names.add(name)
        now, sizes = self._inference.clock(), (message.size, message.answer_bytes)
        message.observer.ended(CallEnded(code, text, served, *sizes, now, message.callers_fault))
