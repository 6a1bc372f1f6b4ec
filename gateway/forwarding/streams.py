"""The use-case for one ModelStreamInfer: each message is routed on its own, over shared upstream streams.

`upstream_streams` has the streams to the endpoints and the request ids on them; `answer_order` decides when an answer
may be sent to the caller. Whether a model is decoupled shows in its first answer: a decoupled model says with it that
it is not the last, or ends with an empty one.

A session works by callbacks: the caller's side and the upstream streams tell it what has arrived, and it never waits.
Back-pressure: `take` and `answer_arrived` return False to pause their side, and `feed` of that side resumes it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Final, Protocol

from gateway.errors import GatewayError, MalformedMessage, SequenceLost, UpstreamFailed
from gateway.forwarding.answer_order import AnswerOrder, HeldBytes
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.correlation import with_own_id
from gateway.forwarding.exchange import Request, request_for
from gateway.forwarding.inference import Inference
from gateway.forwarding.metadata import echoed, served_trailers
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.upstream_streams import Message, StreamOwner, UpstreamStream, UpstreamStreams
from gateway.forwarding.work import Work, served_by
from gateway.hooks import AttemptEnded, CallEnded, CallStarted
from gateway.rpc.budget import Budget
from gateway.rpc.metadata import metadata_from
from gateway.status import WRONG, Code, Meaning, Origin, Verdict, classify_in_band, code_of
from gateway.types import Facts, Metadata, Served
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.v2.faults import Fault
from gateway.v2.peek import (
    ENABLE_EMPTY_FINAL,
    Head,
    StreamHead,
    bool_parameter,
    has_entry,
    maybe_id,
    parameters_of,
    rename_response,
    rename_stream_response,
    stream_error,
    stream_response,
)
from gateway.v2.repeats import StreamRequestHeads

_log = logging.getLogger(__name__)

_FINAL: Final = "triton_final_response"
_WANTS_EMPTY_FINAL: Final = "triton_enable_empty_final_response"
_IS_FINAL: Final = bool_parameter(_FINAL, True)
"""Part of a pipeline's only answer. Triton puts it into a model's last answer on a stream, asked for or not."""

_ERRORS_END_STREAM: Final = "triton_grpc_error"
"""Metadata key by which a caller asks that an error end the whole stream with its status, as Triton offers it."""

_DECOUPLED: Final = "decoupled"
"""Key under which an endpoint remembers that a model has answered one request several times, or ended with nothing."""

_MOST_NAMES_LENGTH: Final = 1024
"""Characters of each list of who answered: it becomes one header field, and servers choose what their versions are."""

_LOG_EVERY_SECONDS: Final = 60.0  # between two log lines about one endpoint's answers to no request

_CLOSE_SECONDS: Final = 1.0  # how long a server may take to end a stream after the last answer on it

_RESENT_PER_TURN: Final = 32  # messages sent again in one turn of the loop, which takes about half a millisecond


class Caller(Protocol):
    """The caller's side of a stream, as a transport has it. No method waits."""

    def send(self, body: bytes) -> bool:
        """Write an answer. False: the caller reads slowly, and `StreamSession.caller_has_room` will be called."""
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


class _Names:
    """Different names in the order in which they came, as one comma-separated text of bounded length."""

    def __init__(self) -> None:
        self.text = ""
        self._known: set[str] = set()
        self._is_full = False

    def add(self, name: str) -> None:
        if not name or self._is_full or name in self._known:
            return
        text = f"{self.text},{name}" if self.text else name
        if len(text) > _MOST_NAMES_LENGTH:
            text, self._is_full = f"{self.text},...".lstrip(","), True
        self._known.add(name)
        self.text = text


def _error_of(failure: CallFailed) -> UpstreamFailed:
    """The error that the caller gets for a message whose upstream stream has ended."""
    if failure.origin is Origin.ANSWER:
        return UpstreamFailed(code_of(failure.code), f"The endpoint's answer can't be used: {failure.text}")
    return UpstreamFailed(Code.UNAVAILABLE, "The stream to the endpoint broke before the last answer.")


def _ignore(fault: Fault | None) -> None: ...


def _has_wrong_empty_final(head: Head) -> bool:
    """Is the parameter that asks for an empty last answer something else than a bool? Triton must refuse it itself."""
    if not head.entries:
        return False
    asked = head.parameters.get(_WANTS_EMPTY_FINAL)
    if asked is None:
        return has_entry(head, _WANTS_EMPTY_FINAL)
    return not isinstance(asked, bool)


class StreamSession(StreamOwner):
    """One caller's ModelStreamInfer, from its first message to its end."""

    def __init__(
        self, inference: Inference, opening: Request, caller: Caller, limits: StreamLimits, budget: Budget
    ) -> None:
        """opening: the call's metadata, deadline and peer; its body is not used. budget: of the caller's connection,
        which pays for the bytes that the session keeps.
        """
        self._inference = inference
        self._opening = opening
        self._facts = opening.metadata.values
        self._access = opening.metadata.access  # of the caller, as it was when his last message came
        self._passed_on = metadata_from(opening.metadata.passed)
        self._caller = caller
        self._limits = limits
        self._bytes = HeldBytes(limits.bytes, budget)
        self._heads = StreamRequestHeads()
        self._upstreams = UpstreamStreams(self)
        self.tasks: set[asyncio.Task[None]] = set()  # pipelines that run
        self._close_timer: asyncio.TimerHandle | None = None
        self._is_over = False
        self._to_resend: deque[tuple[Message, CallFailed]] = deque()  # messages whose upstream stream has ended
        self._waiting: deque[bytes] = deque()  # requests that came while there was no room
        self._wants_requests = True  # the caller was not told to pause
        self._is_busy = False  # requests are being accepted or sent again, further up the stack
        self._no_more = False  # the caller has half-closed the stream
        self._open: set[Message] = set()  # messages without their last answer
        self._order: AnswerOrder[Message] = AnswerOrder(caller.send, self._bytes)
        self._caller_lags = False  # locally made answers exceed what the caller reads: accept no more requests
        self._variants, self._versions, self._endpoints = _Names(), _Names(), _Names()
        self._last_served: Served | None = None
        self.last_end: tuple[Code, str] = (Code.OK, "")  # of the message that ended last; an answer in-band has no code
        self._attempts = 0

    @property
    def open_messages(self) -> int:
        """How many messages have not had their last answer."""
        return len(self._open)

    def trailing_metadata(self) -> Metadata:
        """Who answered on this stream, each name once, in order of their first answer; and the attempts in total."""
        return (*served_trailers(self.served), *echoed(self._facts))

    @property
    def served(self) -> Served:
        """Who answered on this stream, and the attempts in total."""
        return Served("", self._variants.text, self._versions.text, self._endpoints.text, self._attempts)

    # The caller's side

    def take(self, body: bytes) -> bool:
        """A request has come. False: let none follow until `Caller.feed`; requests that come earlier are kept."""
        if self._is_over:
            return False
        try:
            if self._wants_requests:
                self._accept(body)
            else:
                self._waiting.append(body)
                self._bytes.hold(len(body))
        except Exception as error:
            self.fail(error)
            return False
        self._wants_requests = not self._waiting and self._has_room()
        return self._wants_requests

    def end_of_requests(self) -> None:
        """The caller has half-closed the stream."""
        self._no_more = True
        self._wants_requests = False
        self._proceed()

    def caller_has_room(self) -> None:
        """The caller has read what it was sent."""
        self._order.caller_is_full = self._caller_lags = False
        self._order.advance()
        self._upstreams.resume(self._may_read)
        self._proceed()

    def cancel(self) -> None:
        """Leave nothing behind: the caller went away, or its deadline has passed."""
        if self._is_over:
            return
        self._is_over = True
        self._bytes.close()
        if self._close_timer is not None:
            self._close_timer.cancel()
        for task in self.tasks:
            task.cancel()
        for stream in self._upstreams.all():
            stream.call.cancel()
            for message in list(stream.messages.values()):
                stream.remove(message)
                message.observer.attempt_ended(AttemptEnded(Code.CANCELLED, "", Meaning.ENDED, self._inference.clock()))
        for message in list(self._open):
            self._report_end(message, Code.CANCELLED, "the stream ended before the last answer")
        self._upstreams.clear()
        self._order.clear()
        self._to_resend.clear()
        self._waiting.clear()

    def fail(self, error: Exception) -> None:
        """End the stream as a whole with an error."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if not self._is_over:
            self.cancel()
            self._caller.finish(error)

    # Requests

    def _has_room(self) -> bool:
        return (
            len(self._open) < self._limits.requests
            and self._bytes.has_room
            and self._upstreams.have_room
            and not self._to_resend
            and not self._caller_lags
        )

    def _proceed(self) -> None:
        """Accept requests that wait, as far as there is room; then have the caller send more, or end the stream."""
        if self._wants_requests or self._is_over or self._is_busy:
            return
        self._is_busy = True
        try:
            while self._waiting and self._has_room():
                body = self._waiting.popleft()
                self._bytes.release(len(body))
                self._accept(body)
        except Exception as error:
            self.fail(error)
            return
        finally:
            self._is_busy = False
        if self._waiting:
            return
        if self._no_more:
            if not self._open and self._order.maybe_first is None:
                self._close_upstreams()
        elif self._has_room():
            self._wants_requests = True
            self._caller.feed()

    def _close_upstreams(self) -> None:
        """Let each server end its stream itself: a server may count a cancelled stream as a failure."""
        if self._close_timer is None:
            self._close_timer = asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._end, None)
            self._upstreams.done_writing()
        if self._upstreams.have_ended:
            self._end(None)

    def _accept(self, body: bytes) -> None:
        inference, name = self._inference, ""
        try:
            head = self._heads.peek(body)
            name = head.model_name
            facts = Facts(self._facts, parameters_of(head), head.model_version)
            access = self._access
            if access is not None:
                access = self._access = access.renewed()
            decided = inference.decide(head, facts, inference.draw(), access, body)
            quota = (
                inference.enter_quota(self._opening.metadata, head, body, len(body), access)
                if inference.quotas.is_on
                else None
            )
        except GatewayError as error:
            self._refuse(body, error, name)
            return
        observer = inference.report(self._opening.method, decided, self._opening.peer, body)
        message = self._enter(Message(body, head, observer))
        message.quota = quota
        pipeline = inference.current.seen_by(access).pipelines.get(name)
        if pipeline is not None:
            self._start_pipeline(message, pipeline)
            return
        try:
            work = message.work = inference.begin(decided, observer, self._opening.peer)
            if inference.shadows.table and work.sequence is None:
                message.shadows = inference.shadows.drawn(work.route.model)
                message.copied = body if message.shadows else b""
            if inference.exposures.table:
                message.exposed = inference.exposed(work, decided)
            if inference.rolled.table:
                message.counted = inference.rolled_begun(work)
            self._send(message)
        except GatewayError as error:
            self._fail_message(message, error)

    def _enter(self, message: Message) -> Message:
        """Count a message as open, and give it its place in the order."""
        self._open.add(message)
        self._bytes.hold(message.size)
        self._order.enter(message)
        return message

    def _refuse(self, body: bytes, error: GatewayError, name: str) -> None:
        """Answer a message whose head can't be read with an error; other messages of the stream are not affected.

        The message counts as any other that is answered here, so the limits of the stream hold for such messages too.

        name: of its model, "" if that can't be read.
        """
        inference, id = self._inference, maybe_id(body)
        known, now = inference.is_known(name, self._access), inference.clock()
        started = CallStarted(self._opening.method, name, known, id, self._opening.peer, now, Facts(self._facts))
        head = Head(name, "", id, False, [], 0, 0, None, [])
        message = self._enter(Message(body, head, inference.hooks.call_started(started)))
        self._fail_message(message, error)

    def _send(self, message: Message) -> None:
        """Send a message on the stream to the endpoint that is next to be tried.

        :raises GatewayError: if no endpoint is left to try.
        """
        work, body, inference = message.work, message.body, self._inference
        assert work is not None and body is not None  # noqa: S101, PT018  (a forwarded message without an answer)
        attempt = inference.maybe_next(work)
        if attempt is None:
            raise inference.given_up(work)
        message.attempt = attempt
        timeout = inference.remaining(self._opening.deadline)
        added = inference.attempt_started(work, attempt)
        attempt.began = 0.0  # the model decides how many answers there are, and when
        variant, upstreams = attempt.variant, self._upstreams
        if message.in_order and attempt.endpoint.has_seen(variant.model, variant.version, _DECOUPLED):
            self._order.release(message)
        key = upstreams.key_for(message, work, attempt)
        stream = upstreams.maybe_open(key)
        if stream is None:
            context = inference.context_of(work.facts)
            stream = upstreams.begin(key, (*self._passed_on, *added, *context), timeout)
        stream.add(message, message.id or work.upstream_id)
        if upstreams.is_paused(stream):  # the first answer in the order may now be one of this stream's
            upstreams.resume(self._may_read)
        extra = b"" if _has_wrong_empty_final(message.head) else ENABLE_EMPTY_FINAL
        request = request_for(variant, body, message.head, id=message.key, extra=extra + work.own_sequence)
        if not stream.call.send(request):
            upstreams.filled(stream)
            self._wants_requests = False

    def upstream_has_room(self, stream: UpstreamStream) -> None:
        self._upstreams.has_room(stream)
        self._proceed()

    def _start_pipeline(self, message: Message, pipeline: PipelineModel) -> None:
        opening = self._opening
        assert message.body is not None  # noqa: S101  (the message has just come)
        request = Request(message.body, opening.metadata, opening.deadline, opening.peer, opening.method)
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
            self._answer_locally(message, stream_response(reply.body, _IS_FINAL))

    def _pipeline_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    # Answers from upstream

    def answer_arrived(self, stream: UpstreamStream, body: bytes) -> bool:
        if self._is_over:
            return False
        try:
            head = stream.heads.peek(body)
            message = stream.maybe_message(head)
            if message is None:
                self._log_unasked(stream.endpoint)
            elif head.error:
                self._take_error(stream, message, head, body)
            else:
                self._take_answer(stream, message, head, body)
        except MalformedMessage as error:  # nothing else that this server sends on the stream can be attributed either
            stream.call.cancel()
            self.upstream_ended(stream, CallFailed(error.code, error.text, origin=Origin.ANSWER))
            return False
        except Exception as error:
            self.fail(error)
            return False
        if self._may_read(stream):
            return True
        self._upstreams.pause(stream)
        return False

    def _may_read(self, stream: UpstreamStream) -> bool:
        """May the stream bring more answers? Not while many are held, unless all of them wait for one of its own."""
        order = self._order
        if order.caller_is_full:
            return False
        if not order.held_bytes or self._bytes.is_within(order.held_bytes):
            return True
        first = order.maybe_first
        return first is not None and first.key in stream.messages

    @staticmethod
    def _log_unasked(endpoint: Endpoint) -> None:
        """Log an answer to no request, at most once a minute: a server that sends one may send them without end."""
        endpoint.unasked_answers += 1
        now = time.monotonic()
        if now >= endpoint.unasked_quiet_until:
            _log.warning(
                "endpoint %s sent %d answers that belong to no request under way (logged at most once a minute)",
                endpoint.address,
                endpoint.unasked_answers,
            )
            endpoint.unasked_answers, endpoint.unasked_quiet_until = 0, now + _LOG_EVERY_SECONDS

    def _take_answer(self, stream: UpstreamStream, message: Message, head: StreamHead, body: bytes) -> None:
        response, work = head.response, message.work
        if response is None or work is None or message.attempt is None:
            return
        last = response.is_final
        # Triton's own end of a decoupled answer names no version. An answer of a model does, also one without tensors.
        is_closing = last and not response.has_tensors and not response.model_version
        if is_closing or not last:
            self._remember_decoupled(message.attempt)
        if self._inference.checks.table and not is_closing and self._is_looked_at(stream, message, head, body):
            return
        self._pass_answer(stream, message, head, body)

    def _pass_answer(self, stream: UpstreamStream, message: Message, head: StreamHead, body: bytes) -> None:
        response, work = head.response, message.work
        if response is None or work is None or message.attempt is None:
            return
        last = response.is_final
        is_closing = last and not response.has_tensors and not response.model_version
        if message.served is None or not is_closing:
            message.served = served_by(work, message.attempt, response.model_version)
        code, text = Code.OK, ""
        if last:
            stream.remove(message)
            code, text = self._report_attempt(message)
        if is_closing and message.head.parameters.get(_WANTS_EMPTY_FINAL) is not True:
            self._answer(message, None, last=True, code=code, text=text)
            return
        renamed = rename_stream_response(body, head, model_name=work.route.model, id=message.id)
        if last and not message.answers and code is Code.OK:
            if message.shadows:
                self._copy(message, rename_response(body, response))
            exposed = message.exposed
            if exposed is not None and exposed.running.confidences and self._inference.is_measured(exposed, work):
                answer = rename_response(body, response)
                self._inference.exposures.scored(exposed, answer, self._inference.answers.peek(answer))
        self._answer(message, renamed, last=last, in_turn=last and not is_closing, code=code, text=text)

    def _is_looked_at(self, stream: UpstreamStream, message: Message, head: StreamHead, body: bytes) -> bool:
        """Is the answer looked at, and given to its caller, or not, once that is done? Of several: counted."""
        work, attempt, response, inference = message.work, message.attempt, head.response, self._inference
        checked = inference.checks.table.get(work.route.model) if work is not None else None
        if checked is None or attempt is None or response is None or not checked.takes(attempt, len(body)):
            return False
        settings, asked = checked.settings, (message.body or b"")[: message.head.raw]
        answer = rename_response(body, response)
        is_only = response.is_final and not message.answers and message.failed is None
        if not is_only:
            checked.look(attempt, answer, inference.answers.peek(answer), asked, _ignore)
            return False
        stream.remove(message)

        def on_found(fault: Fault | None) -> None:
            if self._is_over:
                return
            try:
                if fault is not None and settings.fails(fault):
                    self._answer_is_wrong(message, fault)
                else:
                    self._pass_answer(stream, message, head, body)
            except Exception as error:
                self.fail(error)

        checked.look(attempt, answer, inference.answers.peek(answer), asked, on_found)
        return True

    def _answer_is_wrong(self, message: Message, fault: Fault) -> None:
        failure = CallFailed(Code.INTERNAL, fault.text, origin=Origin.ANSWER)
        if not self._retried(message, failure, WRONG):
            self._fail_message(message, _error_of(failure))

    def _copy(self, message: Message, answer: bytes) -> None:
        """Send copies of a message that has one answer to its model's shadows."""
        assert message.served is not None  # noqa: S101  (it has been answered)
        passed, variant, unit = self._opening.metadata.passed, message.served.variant, message.exposed
        if unit is not None and message.work is not None and not self._inference.is_measured(unit, message.work):
            unit = None
        self._inference.shadows.answered(message.shadows, variant, message.copied, message.head, passed, answer, unit)

    def _report_attempt(self, message: Message) -> tuple[Code, str]:
        """Report an attempt after its last answer; it failed if one of its answers was an error."""
        work, attempt = message.work, message.attempt
        assert work is not None and attempt is not None  # noqa: S101, PT018  (the message has been sent)
        if message.failed is None:
            message.observer.attempt_ended(self._inference.attempt_answered(work))
            return Code.OK, ""
        failure, verdict = message.failed
        self._report_failed(work, attempt, failure, verdict)
        return code_of(failure.code), failure.text

    @staticmethod
    def _remember_decoupled(attempt: Attempt) -> None:
        """Remember it until the model changes, so that answers to later requests need not wait for their turn."""
        attempt.endpoint.known(attempt.variant.model, attempt.variant.version).kept[_DECOUPLED] = True

    def _take_error(self, stream: UpstreamStream, message: Message, head: StreamHead, body: bytes) -> None:
        """Try the message elsewhere if that may help; else pass Triton's own error on."""
        response = head.response
        last = response is None or response.parameters.get(_FINAL) is not False  # a decoupled model may go on after it
        text = with_own_id(head.error, message.key, message.id)
        if message.work is not None:
            text = message.work.in_callers_words(text)
        by_model = response is not None and response.model_name != ""
        code, verdict = self._classify(message, text, by_model=by_model)
        if last:
            stream.remove(message)
            if self._retried(message, CallFailed(code, text), verdict):
                return
        else:
            if message.attempt is not None:
                self._remember_decoupled(message.attempt)
            message.failed = message.failed or (CallFailed(code, text), verdict)
        name = message.head.model_name if response and response.model_name else None
        id = message.id if by_model else message.head.id  # Triton's front end repeats the id with what follows a NUL
        renamed = rename_stream_response(body, replace(head, error=text), model_name=name, id=id)
        self._answer(message, renamed, last=last, in_turn=last, code=code, text=text)

    @staticmethod
    def _classify(message: Message, text: str, *, by_model: bool) -> tuple[Code, Verdict]:
        attempt, head = message.attempt, message.head
        variant = attempt.variant if attempt is not None else None
        asked = (variant.model, variant.version or head.model_version) if variant else (head.model_name, "")
        return classify_in_band(text, by_model=by_model, model=asked[0], version=asked[1], id=head.id)

    # The end of upstream streams, and retries

    def upstream_ended(self, stream: UpstreamStream, failure: CallFailed) -> None:
        if self._is_over:
            return
        if failure.from_server and _ERRORS_END_STREAM in self._facts:
            self.fail(self._error_that_ended(stream, failure))
            return
        self._upstreams.ended(stream)
        messages = list(stream.messages.values())
        for message in messages:
            stream.remove(message)
        is_new = not self._to_resend
        self._to_resend.extend((message, failure) for message in messages)
        if is_new:
            self._resend_some()

    def _resend_some(self) -> None:
        """Send messages whose upstream stream has ended again: some now, the others in later turns of the loop."""
        self._is_busy = True  # `_proceed` must wait, since it may end the session in the middle of this loop
        try:
            for _ in range(min(_RESENT_PER_TURN, len(self._to_resend))):
                message, failure = self._to_resend.popleft()
                if not self._retried(message, failure, None):
                    self._fail_message(message, _error_of(failure))
                if self._is_over:
                    return
        except Exception as error:
            self.fail(error)
            return
        finally:
            self._is_busy = False
        if self._to_resend:
            self._wants_requests = False  # requests that come meanwhile must not overtake these
            asyncio.get_running_loop().call_soon(self._resend_some)
            return
        self._proceed()

    def _error_that_ended(self, stream: UpstreamStream, failure: CallFailed) -> GatewayError:
        """The error for a caller that has asked that errors end the stream, after Triton ended its stream with one."""
        code, text = code_of(failure.code), failure.text
        for message in list(stream.messages.values()):
            text = with_own_id(text, message.key, message.id)
            stream.remove(message)
            work, attempt = message.work, message.attempt
            if work is not None and attempt is not None:
                text = work.in_callers_words(text)
                own = CallFailed(failure.code, text, failure.trailing)
                self._report_failed(work, attempt, own, None)
                message.asked = served_by(work, attempt, attempt.variant.version)
            self._report_end(message, code, text)
        return UpstreamFailed(code, text, failure.trailing)

    def _retried(self, message: Message, failure: CallFailed, verdict: Verdict | None) -> bool:
        """Send a message again if its failure allows that and the caller has had no answer to it.

        False: the caller must get the failure. True: the message was sent again, or has been answered with the error
        that its sequence is lost or that no endpoint is left.
        """
        work, attempt = message.work, message.attempt
        if work is None or attempt is None:
            return False
        refused = self._report_failed(work, attempt, failure, verdict)
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

    def _report_failed(
        self, work: Work, attempt: Attempt, failure: CallFailed, verdict: Verdict | None
    ) -> GatewayError | None:
        """Report a failed attempt. Returns an error if the message must not be tried elsewhere."""
        try:
            self._inference.attempt_failed(work, attempt, failure, verdict)
        except GatewayError as error:
            return error
        return None

    # Answers to the caller

    def _fail_message(self, message: Message, error: GatewayError) -> None:
        message.asked = message.asked or error.served
        message.callers_fault = error.is_callers
        self._answer_locally(message, stream_error(error.text, message.head.id), error.code, error.text)

    def _answer_locally(self, message: Message, body: bytes, code: Code = Code.OK, text: str = "") -> None:
        """Send the only answer, made here: no server can be paused, so a caller that reads slowly must be."""
        self._answer(message, body, last=True, code=code, text=text)
        if self._order.caller_is_full:
            self._caller_lags = True
            self._wants_requests = False

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
        """Send an answer in its turn. body: None if the last answer is not for the caller.

        in_turn:  False if the answer shows that the model is decoupled.
        """
        if message.done:
            return
        if message.body is not None:
            message.body = None
            self._bytes.release(message.size)
        if not in_turn and message.in_order:
            self._order.release(message)
        if body is not None:
            message.answers += 1
            message.answer_bytes += len(body)
            self._order.write(message, body)
        if last:
            message.done = True
            self._report_end(message, code, text)
            self._order.ended(message)
        if self._upstreams.any_paused:
            self._upstreams.resume(self._may_read)
        if not self._wants_requests:
            self._proceed()

    def _report_end(self, message: Message, code: Code, text: str) -> None:
        """Report a message as a call that has ended, and note who answered it for the trailing metadata."""
        self._open.discard(message)
        self.last_end = (code, text)
        served = message.served
        who = served or message.asked
        if who is not None:
            self._attempts += who.attempts
            if who is not self._last_served:
                self._last_served = who
                self._variants.add(who.variant)
                self._versions.add(who.model_version)
                self._endpoints.add(who.endpoint)
        if message.exposed is not None and message.work is not None:
            size = message.answer_bytes
            self._inference.exposed_ended(message.exposed, message.work, code, message.callers_fault, size)
        if message.counted is not None and message.work is not None:
            self._inference.rolled_ended(message.counted, message.work, code, message.callers_fault, None)
        now, sizes = self._inference.clock(), (message.size, message.answer_bytes)
        if message.quota is not None:
            quota, message.quota = message.quota, None
            quota.leave(message.answer_bytes, now)
        message.observer.ended(CallEnded(code, text, served, *sizes, now, message.callers_fault))
