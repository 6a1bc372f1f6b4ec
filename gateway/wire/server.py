"""The server's end: requests become `ServerCall`s, checked so that nothing malformed gets further.

Source: grpc `doc/PROTOCOL-HTTP2.md`; RFC 9113 section 8.3.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.status import Code
from gateway.wire.budget import Budget
from gateway.wire.codes import CallFailed
from gateway.wire.connection import BUG_TEXT, DRAIN_STEP, Connection
from gateway.wire.deadlines import Deadlines
from gateway.wire.engine import WRITE_SIZE, server_engine
from gateway.wire.fields import Fields, encode_message
from gateway.wire.frames import (
    LEAST_FRAME,
    EndedBy,
    EngineError,
    ErrorCode,
    Event,
    HeadersEvent,
    RequestReceived,
    StreamClosed,
    StreamReset,
)
from gateway.wire.hpack import Field, NeverIndexed
from gateway.wire.limits import Bucket, Limits
from gateway.wire.messages import ACCEPT_ENCODING, SMALL, SMALL_PREFIXES, prefix
from gateway.wire.prices import ANSWERED, EARLY, FORCED, PATIENT, REFUSED_HEAD, WASTED
from gateway.wire.requests import NO_HEAD, RequestHead, RequestHeads
from gateway.wire.stream import Stream

RESPONSE: Final[tuple[Field, ...]] = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", ACCEPT_ENCODING),
)
OK_STATUS: Final[tuple[Field, ...]] = ((b"grpc-status", b"0"),)
_STATUS_FIELDS: Final[dict[Code, Field]] = {code: (b"grpc-status", b"%d" % code) for code in Code}


_REQUEST: Final = RequestReceived  # as in `connection`
_numbers: Final = itertools.count()


def _nothing() -> None: ...


class ServerCall(Stream):
    """One call from a client.

    Answer a unary one with `reply` or `finish`; a streaming one with `send_headers`, `send_message` and `finish`.
    """

    server: ServerConnection  # is `connection`, by its full type
    head: RequestHead
    deadline: float | None = None  # on the clock of `now`
    remote_done = False  # the client has half-closed
    streaming = False  # many requests may come: no timer for the first
    cut_through = False  # may `on_request` come before the message is complete?
    on_request: Callable[[ServerCall], None] | None = None
    """A unary call's message is in `body`; a streaming client has half-closed. With `cut_through`, of a large
    message the front is in `body`, `missing` bytes are to come; called again as more arrives, unless `on_chunk`
    was set."""
    on_cancel: Callable[[Code], None] | None = None
    """The call ended without our doing: CANCELLED or DEADLINE_EXCEEDED. Not called after it was answered."""
    _head_sent = False
    _deadline_key = 0
    _head_bytes = 0

    def __init__(self, connection: ServerConnection, stream_id: int) -> None:
        self.connection = self.server = connection
        self.id = stream_id
        self.begun = connection.now
        self.head = NO_HEAD

    @property
    def peer(self) -> str:
        return self.server.peer

    def reply(self, body: bytes, initial: Fields = (), trailing: Fields = (), encoding: bytes = b"") -> None:
        """Answer a unary call whole. `encoding`: how `body` is compressed, if it is."""
        if self.done:
            return
        connection = self.server
        engine, stream_id = connection.engine, self.id
        try:
            if not initial and not encoding:
                engine.send_response(stream_id, RESPONSE)
            else:
                extra = ((b"grpc-encoding", encoding),) if encoding else ()
                engine.send_response(stream_id, (*RESPONSE, *initial, *extra))
            if len(body) <= SMALL and not encoding:
                engine.send_data(stream_id, SMALL_PREFIXES[len(body)] + body)
            else:
                engine.send_data(stream_id, prefix(len(body), bool(encoding)))
                engine.send_data(stream_id, body)
            engine.send_trailers(stream_id, (*OK_STATUS, *trailing))
        except EngineError:
            pass  # the client has gone; its call is closed by the event that says so
        connection.answered(self)

    def send_headers(self, initial: Fields = (), encoding: bytes = b"") -> None:
        """Begin the answer; at most once."""
        if self.done or self._head_sent:
            return
        self._head_sent = True
        extra = [(b"grpc-encoding", encoding)] if encoding else []
        try:
            self.connection.engine.send_response(self.id, [*RESPONSE, *extra, *initial])
        except EngineError:
            return
        self.connection.wake()

    def finish(self, code: Code, text: str = "", trailing: Fields = ()) -> None:
        """End the answer with a status; trailers-only if nothing was sent before."""
        if self.done:
            return
        status: list[Field] = [_STATUS_FIELDS[code], *trailing]
        if text:
            status.insert(1, NeverIndexed(b"grpc-message", encode_message(text)))  # texts would fill the table
        try:
            if self._head_sent:
                self.connection.engine.send_trailers(self.id, status)
            else:
                self.connection.engine.send_response(self.id, [*RESPONSE, *status], end_stream=True)
        except EngineError:
            pass  # as in `reply`
        self.server.answered(self)

    def fail(self, code: Code, text: str, trailing: Fields = ()) -> None:
        """End with an error; of a streamed answer, after what was sent of it."""
        self.finish(code, text, trailing)

    def refuse_http(self, status: bytes) -> None:
        """Not gRPC: answer in HTTP's own terms."""
        try:
            self.connection.engine.send_response(self.id, [(b":status", status)], end_stream=True)
        except EngineError:
            return
        self.server.answered(self)

    def expire(self) -> None:
        """The deadline has passed."""
        if not self.done:
            if self.unsent:
                self.reset(ErrorCode.CANCEL)  # a status would wait behind an answer that nobody waits for
            self.finish(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")
            self._end(Code.DEADLINE_EXCEEDED)

    def is_wasted(self, now: float) -> bool:
        """Does a reset now throw away work that the client never waited for?"""
        age = now - self.begun
        if self.done or self._head_sent or age >= PATIENT:
            return False
        return self.deadline is None or 2 * age < self.deadline - self.begun  # else its time is, or was nearly, up

    def _forget(self) -> None:
        self.on_request = self.on_cancel = None
        Stream._forget(self)

    def _end(self, code: Code) -> None:
        callback, self.on_cancel = self.on_cancel, None
        if callback is not None:
            callback(code)


@dataclass(frozen=True, slots=True)
class Ends:
    """When a connection is asked to leave, on the clock of `now`; None is never."""

    at: float | None = None
    grace: float | None = None  # seconds for its calls; None is as long as they take


class ServerConnection(Connection[ServerCall]):
    """One client's connection."""

    def __init__(
        self,
        limits: Limits,
        now: float,
        wake: Callable[[], None],
        *,
        accept: Callable[[ServerCall], None],
        deadlines: Deadlines,
        heads: RequestHeads | None = None,
        peer: str = "",
        ends: Ends = Ends(),
        budget: Budget | None = None,
    ) -> None:
        """accept: told of each good request; sets the call's callbacks or ends it. heads: if connections share them."""
        super().__init__(server_engine(limits), limits, now, wake, budget)
        self.peer = peer
        self.on_full: Callable[[], None] = _nothing  # as many calls at once as may be: the next one waits at the client
        self.number = next(_numbers)  # its own in this process
        self._accept = accept
        self._deadlines = deadlines
        self._heads = heads or RequestHeads(limits)
        self._ends = ends
        self._usual = NO_HEAD  # of the last request, and probably of the next one
        self._usual_fields: tuple[Field, ...] = ()
        self._resets = Bucket(limits.resets, now)
        self._answered = 0  # calls, since streams were last counted
        self._early: set[ServerCall] = set()  # answered before the client was done
        self._wide_most = limits.connection_window // 2 // limits.stream_window  # calls that may have `stream_window`
        self._few = min(self._wide_most, limits.max_streams - 1)  # calls at once with which there is nothing to do
        self._is_narrow = False  # has the peer less on each, since there are more?
        self._heads_bytes = 0  # of open calls, where no others share theirs
        self._working = 0  # calls that are over on the wire while their work still runs
        self._second_goaway_at: float | None = None
        self._cut_at: float | None = None

    # Requests

    def _thinned_out(self, events: Sequence[Event]) -> Sequence[Event]:
        """Requests that the same read also resets are not even begun ("rapid reset")."""
        gone = {event.stream_id for event in events if isinstance(event, StreamReset)}
        return [e for e in events if not (isinstance(e, RequestReceived) and e.stream_id in gone)]

    def _headers(self, event: HeadersEvent) -> None:
        if type(event) is not _REQUEST:
            self._request_trailers(event.stream_id)
            return
        stream_id = event.stream_id
        call = ServerCall(self, stream_id)
        self._last_id = stream_id
        self.streams[stream_id] = call
        if event.end_stream:
            call.remote_done = True
        if len(self.streams) + self._working > self._few and self._is_beyond_limit():
            call.done = True
            call.reset(ErrorCode.REFUSED_STREAM)
            return
        try:
            if event.headers is not self._usual_fields:
                self._usual = self._read(event.headers)
                self._usual_fields = event.headers
            head = self._usual
            if head.size:
                self._hold_head(call, head)
            call.head = head
            if head.http_status:
                self.engine.glitches += REFUSED_HEAD
                call.refuse_http(head.http_status)
                return
            if head.encoding:
                call.encoding = head.encoding
            if head.timeout is not None:
                call.deadline = self.now + head.timeout
                call._deadline_key = self._deadlines.add(call.deadline, call, self.now)
            self._accept(call)
            if event.end_stream:
                self._half_closed(call)
        except CallFailed as failure:
            self._call_failed(call, failure)
        except Exception as error:
            self.on_bug(error)
            self._call_failed(call, CallFailed(Code.INTERNAL, BUG_TEXT))

    def _read(self, headers: tuple[Field, ...]) -> RequestHead:
        """raises: CallFailed, of a head that can't be served; it is counted, whatever the request's flags."""
        try:
            return self._heads.read(headers)
        except CallFailed as failure:
            if failure.code is not Code.DEADLINE_EXCEEDED:  # which is a busy client's, who waited too long elsewhere
                self.engine.glitches += REFUSED_HEAD
            raise

    def _is_beyond_limit(self) -> bool:
        """Of calls at once, with the one that has just come."""
        taken = len(self.streams) + self._working
        if taken > self._wide_most and not self._is_narrow:
            self._is_narrow = self._resize(self.limits.connection_window // 2 // self.limits.max_streams)
        if taken == self.limits.max_streams:
            self.on_full()
        return taken > self.limits.max_streams

    def _hold_head(self, call: ServerCall, head: RequestHead) -> None:
        """raises: CallFailed if the open calls have too much in theirs."""
        if self._heads_bytes + head.size > self.limits.open_heads_bytes:
            raise CallFailed(
                Code.RESOURCE_EXHAUSTED,
                "Request headers of the calls that are open on this connection are over the limit of "
                f"{self.limits.open_heads_bytes} bytes",
            )
        self._heads_bytes += head.size
        call._head_bytes = head.size

    def _resize(self, window: int) -> bool:
        """Of each call. All are no more than the connection's, so that none that waits holds up its neighbours."""
        if self.limits.max_streams <= 2 * self._wide_most:
            return False
        self.wake()
        return self.engine.resize_windows(max(window, LEAST_FRAME))

    def _request_trailers(self, stream_id: int) -> None:
        call = self.streams.get(stream_id)
        if call is not None and not call.done:
            try:
                self._half_closed(call)
            except CallFailed as failure:
                self._call_failed(call, failure)

    def _data_taken(self, stream: ServerCall, ended: bool) -> None:
        if ended:
            if stream.missing == 0 and stream.on_request is not None and not stream.streaming:  # nearly always
                stream.remote_done = True
                if stream.compressed:
                    self._inflate_request(stream)
                else:
                    stream.on_request(stream)
            else:
                self._half_closed(stream)
        elif stream.cut_through and stream.missing > self.limits.whole_bytes and stream.on_request is not None:
            stream._offer_front(stream.on_request)

    def _half_closed(self, call: ServerCall) -> None:
        call.remote_done = True
        if call.done:
            return
        if not call.streaming:
            if call.missing != 0:
                raise CallFailed(Code.INTERNAL, "A unary call ended before its message was complete")
            if call.compressed:
                self._inflate_request(call)
                return
        elif call.is_behind:
            call._ends_late = True
            return
        elif call.has_partial_message:
            raise CallFailed(Code.INTERNAL, "The call ended within a message")
        if call.on_request is not None:
            call.on_request(call)

    def _all_read(self, stream: ServerCall) -> None:
        self._half_closed(stream)

    def _inflate_request(self, call: ServerCall) -> None:
        compressed, call.body = call.body, b""

        def plain(body: bytes) -> None:
            call.body = body
            call.compressed = False
            if call.on_request is not None:
                call.on_request(call)

        self.inflate(call, compressed, plain)

    # Endings of calls

    def _call_failed(self, stream: ServerCall, failure: CallFailed) -> None:
        stream.fail(failure.code, failure.text)
        stream._end(Code.CANCELLED)

    def answered(self, call: ServerCall) -> None:
        """All of the answer is with the engine."""
        call.done = True
        if call._charged:
            call.release()
        if call.deadline is not None:
            self._deadlines.discard(call._deadline_key, call)
        if call.remote_done:
            self._answered += 1
        else:
            self._early.add(call)
        self.wake()

    def _call_closed(self, stream: ServerCall, error_code: int) -> None:
        self._early.discard(stream)
        if stream._head_bytes:
            self._heads_bytes -= stream._head_bytes
        if self._is_narrow and len(self.streams) < self._wide_most // 2:
            self._is_narrow = not self._resize(self.limits.stream_window)
        if not stream.done:
            stream.done = True
            if stream.deadline is not None:
                self._deadlines.discard(stream._deadline_key, stream)
            stream._end(Code.CANCELLED)

    def hold(self) -> None:
        """A call's work outlives it on the wire: it still counts against `max_streams`. Undone by `release`."""
        self._working += 1

    def release(self) -> None:
        self._working -= 1

    def output(self) -> bytes:
        data = super().output()
        if self._early and len(data) < WRITE_SIZE and not self.closed:
            self._reset_early()
        return data

    def _reset_early(self) -> None:
        """Once an early answer is written, tell the client to stop sending (RFC 9113 section 8.1)."""
        for call in [c for c in self._early if not c.unsent]:
            self._early.discard(call)
            self._charge(EARLY)
            call.reset(ErrorCode.NO_ERROR)

    # Endings of the connection

    def drain(self, grace: float | None = None) -> None:
        """Two-step GOAWAY; calls that still run `grace` seconds later are cut."""
        if not self.draining:
            self.draining = True
            self._second_goaway_at = self.now + DRAIN_STEP
            self.engine.ping()  # its answer says that what was on its way has come
            self.engine.send_shutdown_notice()
            self.wake()
        if grace is not None:
            self._cut_at = self.now + grace

    def tick(self, now: float) -> None:
        super().tick(now)
        if self.closed:
            return
        if self.draining:
            self._tick_drain(now)
        elif self._ends.at is not None and now >= self._ends.at:
            self.reason = "maximum age"
            self.drain(self._ends.grace)
        elif not self.streams and now - self._active_at > self.limits.idle_seconds:
            self.reason = "idle"
            self.drain(0.0)

    def _tick_drain(self, now: float) -> None:
        if self._cut_at is not None and now >= self._cut_at and self._second_goaway_at is None:
            self.break_off(ErrorCode.NO_ERROR, self.reason or "draining took too long")
        elif self._second_goaway_at is not None and now >= self._second_goaway_at:
            self._ping_answered()

    def _ping_answered(self) -> None:
        if self._second_goaway_at is not None:
            self._second_goaway_at = None
            self.engine.send_goaway()
            self.wake()

    def _count_end(self, event: StreamClosed) -> None:
        if event.by is EndedBy.FAULT:
            self._charge(FORCED)
        elif event.by is EndedBy.PEER:
            call = self.streams.get(event.stream_id)
            if call is None or call.is_wasted(self.now):  # None: it was reset by the read that brought it
                self._charge(WASTED)
        elif event.error_code == ErrorCode.REFUSED_STREAM:
            self._charge(WASTED)  # as what it has reset still runs

    def _charge(self, tokens: float) -> None:
        self._resets.take(self._answered * ANSWERED, self.now)
        self._answered = 0
        if not self._resets.take(tokens, self.now):
            self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many streams were reset")

    def _tick_stream(self, stream: ServerCall) -> None:
        super()._tick_stream(stream)
        if stream.done or stream.remote_done or (stream.streaming and not stream.has_partial_message):
            return
        waiting_for_us = stream._held > 0 or not self.reads
        slow = stream._received < self.limits.min_rate and not waiting_for_us
        stream._received = 0
        stream._idle_ticks = stream._idle_ticks + 1 if slow else 0
        if stream._idle_ticks > self.limits.first_message_seconds:
            stream.fail(Code.DEADLINE_EXCEEDED, "The request message did not arrive in time")
            stream._end(Code.DEADLINE_EXCEEDED)
