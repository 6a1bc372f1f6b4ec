"""The server's end: requests become `ServerCall`s, checked so that nothing malformed gets further.

Source: grpc `doc/PROTOCOL-HTTP2.md`; RFC 9113 section 8.3.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.http2.engine import WRITE_SIZE, server_engine
from gateway.http2.frames import (
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
from gateway.http2.hpack import Field, NeverIndexed
from gateway.http2.limits import Bucket, Limits
from gateway.http2.prices import ANSWERED, EARLY, FORCED, PATIENT, REFUSED_HEAD, WASTED
from gateway.http2.strangers import ALPN, NotHttp2, answer_to
from gateway.rpc.budget import Budget
from gateway.rpc.codes import CallFailed
from gateway.rpc.connection import BUG_TEXT, DRAIN_STEP, Connection
from gateway.rpc.deadlines import Deadlines
from gateway.rpc.framing import ACCEPT_ENCODING, SMALL, SMALL_PREFIXES, prefix
from gateway.rpc.metadata import Fields, encode_message
from gateway.rpc.requests import NO_HEAD, RequestHead, RequestHeads
from gateway.rpc.stream import Stream
from gateway.status import Code

RESPONSE: Final[tuple[Field, ...]] = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", ACCEPT_ENCODING),
)
OK_STATUS: Final[tuple[Field, ...]] = ((b"grpc-status", b"0"),)
_STATUS_FIELDS: Final[dict[Code, Field]] = {code: (b"grpc-status", b"%d" % code) for code in Code}


_REQUEST: Final = RequestReceived  # a module constant, as in `connection`
_numbers: Final = itertools.count()


def refusal(code: Code, text: str, trailing: Fields) -> tuple[Field, ...]:
    """The whole answer to a call that is refused before anything else was answered."""
    return (*RESPONSE, _STATUS_FIELDS[code], NeverIndexed(b"grpc-message", encode_message(text)), *trailing)


def _nothing() -> None: ...


def _no_fault(fault: str) -> None: ...


NO_HTTP1: Final = (
    "this port speaks gRPC, which is HTTP/2; call it by a gRPC client (health and metrics have a port of their own)"
)


class ServerCall(Stream):
    """One call from a client.

    Answer a unary call with `reply` or `finish`, a streaming one with `send_headers`, `send_message` and `finish`.
    """

    server: ServerConnection  # the same as `connection`, with its full type
    head: RequestHead
    deadline: float | None = None  # on the clock of `now`
    remote_done = False  # the client has half-closed
    streaming = False  # is it a client-streaming call? Then the first message may take its time
    cut_through = False  # may `on_request` come before the message is complete?
    on_request: Callable[[ServerCall], None] | None = None
    """Called when a unary call's message is complete in `body`, or a streaming client has half-closed. With
    `cut_through` it is also called with the front of a large message in `body` and `missing` bytes yet to come, and
    again as more arrives, until `on_chunk` is set."""
    on_cancel: Callable[[Code], None] | None = None
    """Called with CANCELLED or DEADLINE_EXCEEDED when the call ends before it was answered."""
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
        """Answer a unary call with one message and OK. encoding: how `body` is compressed; b"" if it is not."""
        if self.done:
            return
        connection = self.server
        engine, stream_id = connection.engine, self.id
        try:
            if len(body) <= SMALL and not encoding:  # the common case
                head = (*RESPONSE, *initial) if initial else RESPONSE
                engine.send_answer(stream_id, head, SMALL_PREFIXES[len(body)] + body, OK_STATUS, trailing)
            else:
                extra = ((b"grpc-encoding", encoding),) if encoding else ()
                engine.send_response(stream_id, (*RESPONSE, *initial, *extra))
                engine.send_data(stream_id, prefix(len(body), bool(encoding)))
                engine.send_data(stream_id, body)
                engine.send_trailers(stream_id, (*OK_STATUS, *trailing))
        except EngineError:
            pass  # the stream has ended, which an event will report
        connection.answered(self)

    def send_headers(self, initial: Fields = (), encoding: bytes = b"") -> None:
        """Send the response headers, once."""
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
        """End the call with a status: as trailers, or trailers-only if no headers were sent."""
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
            pass  # the stream has ended, which an event will report
        self.server.answered(self)

    def fail(self, code: Code, text: str, trailing: Fields = ()) -> None:
        """End the call with an error status, after what was sent of a streamed answer."""
        self.finish(code, text, trailing)

    def refuse(self, answer: tuple[Field, ...]) -> None:
        """End the call by header fields alone, as made by `refusal`, which are the same for many calls."""
        if self.done:
            return
        try:  # noqa: SIM105  (a context manager costs more)
            self.connection.engine.send_response(self.id, answer, end_stream=True, repeats=True)
        except EngineError:
            pass  # the stream has ended, which an event will report
        self.server.answered(self)

    def refuse_http(self, status: bytes) -> None:
        """Answer a request that is not gRPC with an HTTP status."""
        try:
            self.connection.engine.send_response(self.id, [(b":status", status)], end_stream=True)
        except EngineError:
            return
        self.server.answered(self)

    def expire(self) -> None:
        """End the call: its deadline has passed."""
        if not self.done:
            if self.unsent:
                self.reset(ErrorCode.CANCEL)  # else the status would wait behind an answer that nobody waits for
            self.finish(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")
            self._end(Code.DEADLINE_EXCEEDED)

    def limit(self, deadline: float) -> None:
        """Have the call end then at the latest. deadline: on the clock of `now`."""
        deadlines = self.server._deadlines
        if self.done or (self.deadline is not None and self.deadline <= deadline):
            return
        if self.deadline is not None:
            deadlines.discard(self._deadline_key, self)
        self.deadline = deadline
        self._deadline_key = deadlines.add(deadline, self, self.server.now)

    def is_wasted(self, now: float) -> bool:
        """Would a reset now waste work, done for a client that never waited for it?"""
        age = now - self.begun
        if self.done or self._head_sent or age >= PATIENT:
            return False
        return self.deadline is None or 2 * age < self.deadline - self.begun  # near its deadline a client may give up

    def _forget(self) -> None:
        self.on_request = self.on_cancel = None
        Stream._forget(self)

    def _end(self, code: Code) -> None:
        callback, self.on_cancel = self.on_cancel, None
        if callback is not None:
            callback(code)


@dataclass(frozen=True, slots=True)
class Ends:
    """When a connection gets its GOAWAY, on the clock of `now`; None is never."""

    at: float | None = None
    grace: float | None = None  # seconds for running calls; None is as long as they take


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
        """accept: called with each valid request, to set the call's callbacks or end it.
        heads: the heads that several connections share; None keeps them for this one.
        """
        super().__init__(server_engine(limits), limits, now, wake, budget)
        self.peer = peer
        self.on_fault: Callable[[str], None] = _no_fault  # called with why a stream was reset for the client's error
        self.on_stranger: Callable[[str], None] = _no_fault  # called with what a client speaks that speaks no HTTP/2
        self.on_full: Callable[[], None] = _nothing  # `max_streams` calls are open: the client has to wait
        self.number = next(_numbers)  # unique in this process
        self.certificate: Mapping[str, Any] | None = None  # of the client, if TLS has verified one
        self._accept = accept
        self._deadlines = deadlines
        self._heads = heads or RequestHeads(limits)
        self._ends = ends
        self._last_head = NO_HEAD  # the head of the last request, since the next one is probably the same
        self._last_headers: tuple[Field, ...] = ()
        self._resets = Bucket(limits.resets, now)
        self._answered = 0  # calls answered since the last `_charge`
        self._answered_early: set[ServerCall] = set()  # calls answered before the client half-closed
        # How many open calls may each have a whole `stream_window`, and up to how many no limit needs a check
        self._full_window_calls = limits.connection_window // 2 // limits.stream_window
        self._no_check_up_to = min(self._full_window_calls, limits.max_streams - 1)
        self._has_small_windows = False  # are the windows reduced, because many streams are open?
        self._heads_bytes = 0  # bytes of open calls' header lists that no other call shares
        self._outliving = 0  # closed calls whose work still runs
        self._second_goaway_at: float | None = None
        self._cut_at: float | None = None

    @property
    def weight(self) -> int:
        """Bytes that are kept for this client, about: collected, not passed on yet, and not taken by the client."""
        waiting = [call._unacknowledged + call.unsent for call in self.streams.values()]
        return self.budget.held + sum(waiting)

    def turn_away(self, call: ServerCall, reason: str) -> None:
        """Close at once, and tell the client that this call, its last one, has not begun: it may make it elsewhere."""
        self._last_id = call.id - 1
        self.break_off(ErrorCode.NO_ERROR, reason)

    # Peers that speak something else

    def _peer_failed(self, failure: EngineError) -> None:
        super()._peer_failed(failure)
        if isinstance(failure, NotHttp2):
            self._goaway = answer_to(failure.speaks, NO_HTTP1)
            self.on_stranger(failure.speaks)

    def not_chosen(self) -> None:
        super().not_chosen()
        self.on_stranger(ALPN)

    # Requests

    def _worth_handling(self, events: list[Event]) -> list[Event]:
        """All but the requests that the same read also resets ("rapid reset"): those do not begin."""
        gone = {event.stream_id for event in events if isinstance(event, StreamReset)}
        return [e for e in events if not (isinstance(e, RequestReceived) and e.stream_id in gone)]

    def _headers(self, event: HeadersEvent) -> None:
        if type(event) is not _REQUEST:
            self._request_trailers(event.stream_id)
            return
        stream_id = event.stream_id
        call = ServerCall(self, stream_id)
        self._last_id = stream_id
        self.streams[stream_id] = self._latest = call
        if event.end_stream:
            call.remote_done = True
        if len(self.streams) + self._outliving > self._no_check_up_to and self._is_over_limit():
            call.done = True
            call.reset(ErrorCode.REFUSED_STREAM)
            return
        try:
            if event.headers is not self._last_headers:
                self._last_head = self._read(event.headers)
                self._last_headers = event.headers
            head = self._last_head
            if head.size:
                self._count_head(call, head)
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
        """The head of a request. raises: CallFailed if it can't be served, which has a price."""
        try:
            return self._heads.read(headers)
        except CallFailed as failure:
            if failure.code is not Code.DEADLINE_EXCEEDED:  # a deadline that has passed is no fault of the client's
                self.engine.glitches += REFUSED_HEAD
            raise

    def _is_over_limit(self) -> bool:
        """Are there more open calls than allowed? The answer counts the new one. Many open calls reduce the windows."""
        taken = len(self.streams) + self._outliving
        if taken > self._full_window_calls and not self._has_small_windows:
            self._has_small_windows = self._resize(self.limits.connection_window // 2 // self.limits.max_streams)
        if taken == self.limits.max_streams:
            self.on_full()
        return taken > self.limits.max_streams

    def _count_head(self, call: ServerCall, head: RequestHead) -> None:
        """raises: CallFailed if the header lists of open calls take too much memory."""
        if self._heads_bytes + head.size > self.limits.open_heads_bytes:
            raise CallFailed(
                Code.RESOURCE_EXHAUSTED,
                "Request headers of the calls that are open on this connection are over the limit of "
                f"{self.limits.open_heads_bytes} bytes",
            )
        self._heads_bytes += head.size
        call._head_bytes = head.size

    def _resize(self, window: int) -> bool:
        """Resize each stream's window, so that all together fit the connection's and no call can starve the others."""
        if self.limits.max_streams <= 2 * self._full_window_calls:
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
            if stream.missing == 0 and stream.on_request is not None and not stream.streaming:  # the common case
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
            call._ended_unread = True
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
        """The engine has the whole answer."""
        call.done = True
        if call._charged:
            call.release()
        if call.deadline is not None:
            self._deadlines.discard(call._deadline_key, call)
        if call.remote_done:
            self._answered += 1
        else:
            self._answered_early.add(call)
        self.wake()

    def _call_closed(self, stream: ServerCall, error_code: int) -> None:
        self._answered_early.discard(stream)
        if stream._head_bytes:
            self._heads_bytes -= stream._head_bytes
        if self._has_small_windows and len(self.streams) < self._full_window_calls // 2:
            self._has_small_windows = not self._resize(self.limits.stream_window)
        if not stream.done:
            stream.done = True
            if stream.deadline is not None:
                self._deadlines.discard(stream._deadline_key, stream)
            stream._end(Code.CANCELLED)

    def hold(self) -> None:
        """Count a call against `max_streams` after its end, until `release`: its work still runs."""
        self._outliving += 1

    def release(self) -> None:
        self._outliving -= 1

    def output(self) -> bytes:
        if self.engine.has_heard_nothing and not self.closed:
            return b""  # our SETTINGS wait for the client's preface: whoever speaks something else may read the answer
        data = super().output()
        if self._answered_early and len(data) < WRITE_SIZE and not self.closed:
            self._reset_early()
        return data

    def _reset_early(self) -> None:
        """Stop requests whose answer was written before they were complete (RFC 9113 section 8.1)."""
        for call in [c for c in self._answered_early if not c.unsent]:
            self._answered_early.discard(call)
            self._charge(EARLY)
            call.reset(ErrorCode.NO_ERROR)

    # Endings of the connection

    def drain(self, grace: float | None = None) -> None:
        """Send the first of two GOAWAYs. grace: seconds until running calls are cut; None lets them end."""
        if not self.draining:
            self.draining = True
            self._second_goaway_at = self.now + DRAIN_STEP
            self.engine.ping()  # the answer shows that all requests sent before the GOAWAY have arrived
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
            self.leave_if_old(now)
        elif not self.streams and now - self._active_at > self.limits.idle_seconds:
            self.reason = "idle"
            self.drain(0.0)

    def leaves_before(self, instant: float) -> float | None:
        """When it will have its maximum age, if that is before this instant."""
        at = self._ends.at
        return at if at is not None and at < instant and not self.draining else None

    def leave_if_old(self, now: float) -> None:
        """Ask the client to leave, if the connection has its maximum age."""
        if not self.draining and self._ends.at is not None and now >= self._ends.at:
            self.now = now
            self.reason = "maximum age"
            self.drain(self._ends.grace)

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
            self.on_fault(event.fault)
            self._charge(FORCED)
        elif event.by is EndedBy.PEER:
            call = self.streams.get(event.stream_id)
            if call is None or call.is_wasted(self.now):  # None: the request and its reset came in one read
                self._charge(WASTED)
        elif event.error_code == ErrorCode.REFUSED_STREAM:
            self._charge(WASTED)  # the work of the calls that it has reset still runs

    def _charge(self, tokens: float) -> None:
        self._resets.take(self._answered * ANSWERED, self.now)
        self._answered = 0
        if not self._resets.take(tokens, self.now):
            self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many streams were reset")

    def _tick_stream(self, stream: ServerCall) -> None:
        super()._tick_stream(stream)
        if stream.done or stream.remote_done or (stream.streaming and not stream.has_partial_message):
            return
        waiting_for_us = stream._unacknowledged > 0 or not self.reads
        slow = stream._received < self.limits.min_rate and not waiting_for_us
        stream._received = 0
        stream._idle_ticks = stream._idle_ticks + 1 if slow else 0
        if stream._idle_ticks > self.limits.first_message_seconds:
            stream.fail(Code.DEADLINE_EXCEEDED, "The request message did not arrive in time")
            stream._end(Code.DEADLINE_EXCEEDED)
