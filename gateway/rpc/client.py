"""The client's end: a `ClientCall` per request on a connection that many callers share.

Every field that a caller chose is sent never-indexed, so that it can't change the compression state that other callers
share. Source: grpc `doc/PROTOCOL-HTTP2.md`, gRFC A6 (which failures were not processed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from gateway.http2.engine import client_engine
from gateway.http2.frames import (
    BOTH,
    MAX_CONCURRENT_STREAMS,
    TRUE_BINARY_METADATA,
    EndedBy,
    EngineError,
    ErrorCode,
    GoAwayReceived,
    HeadersDropped,
    HeadersEvent,
    ResponseReceived,
    SettingsReceived,
)
from gateway.http2.hpack import Field, NeverIndexed
from gateway.http2.limits import Limits, MiB
from gateway.rpc.budget import Budget
from gateway.rpc.codes import CallFailed, from_field, from_http, from_reset
from gateway.rpc.connection import Connection
from gateway.rpc.deadlines import Deadlines
from gateway.rpc.framing import ACCEPT_ENCODING, SMALL, SMALL_PREFIXES, prefix
from gateway.rpc.metadata import Fields, decode_message, format_timeout, is_legal, is_metadata
from gateway.rpc.stream import Stream
from gateway.status import OK, Code, Origin

_RESPONSE: Final = ResponseReceived  # a module constant, as in `connection`
_JUST_OK: Final[Fields] = ((b"grpc-status", b"0"),)
UNKNOWN: Final = Code.UNKNOWN
SERVER: Final = Origin.SERVER
ASSUMED_STREAMS: Final = 100  # open streams, until the server's SETTINGS arrive
LEAST_TIME: Final = 0.2  # seconds; a unary call is sent at least this timeout, and is still given up at its own
MOST_DROPPED: Final = 16 * MiB  # bytes of one header block, above which a connection takes no new calls
DISCARD_SECONDS: Final = 0.2  # seconds after which a call that was left to finish is reset
LOST_BY_PROXY: Final = frozenset((b"502", b"503", b"504"))  # it can't be told whether the server behind it has begun
UNLIMITED: Final = (1 << 31) - 1  # servers that send no limit, as C-core's, have none (RFC 9113 section 6.5.2)


def _nothing() -> None: ...


def _ignore(name: bytes) -> None: ...


class ClientCall(Stream):
    """One call to a server.

    Give it to `ClientConnection.start`. It ends with exactly one call of `on_done`. After that `code` and `text` have
    the status, `body` the answer of a unary call, `initial` the metadata before it, and `trailing` all that came after.
    """

    request: bytes | None = None  # the message of a unary call, or its front
    request_more = 0  # bytes of the message that `send_chunk` has to send
    request_encoding = b""  # how `request` is compressed; b"" if it is not
    code: Code
    text = ""
    initial: Fields = ()
    trailing: Fields = ()
    is_just_ok = False  # is the status OK, with nothing beside it in `trailing`?
    origin = SERVER  # who made the status of a call that is done
    unprocessed = False  # the server has not processed the call, so any call may be tried again (gRFC A6)
    on_head: Callable[[ClientCall], None] | None = None
    on_front: Callable[[ClientCall], None] | None = None
    """Called with the front of a large answer in `body` and `missing` bytes yet to come, and again as more arrives,
    until `on_chunk` is set. None: answers are collected whole."""
    on_started: Callable[[ClientCall], None] | None = None  # the call has a stream, and its request was given to it
    on_done: Callable[[ClientCall], None] | None = None
    on_unprocessed: Callable[[ClientCall], bool] | None = None
    """Called before an unprocessed call ends; True takes the call over, and it does not end."""
    on_released: Callable[[bool], None] | None = None  # see `keep_for_server`
    is_own: Callable[[Code, str, bool], bool] | None = None  # likewise
    retried = False
    patient = False  # waits for a connection without end
    _half_closed = False
    _http_status = b""
    _deadline_key = 0
    _discard_key = 0
    _discarded = False  # the call has ended, and the server still works for it

    def __init__(self, path: bytes, fields: Fields, deadlines: Deadlines, deadline: float | None, now: float) -> None:
        """fields: metadata; those that a caller chose must be `NeverIndexed`. deadline: on the clock of `now`."""
        self.path = path
        self.request_fields = fields
        self.code = UNKNOWN
        self.deadline = deadline
        self._deadlines = deadlines
        if deadline is not None:
            self._deadline_key = deadlines.add(deadline, self, now)

    @property
    def from_server(self) -> bool:
        """Did the server send the call's status?"""
        return self.origin is SERVER

    # Before the call has a stream, `request` collects what is passed on, and `unsent` makes its sender wait.

    def send_chunk(self, data: bytes | memoryview) -> None:
        if self.id:
            super().send_chunk(data)
        elif not self.done:
            self.request = b"".join((self.request or b"", data))
            self.request_more -= len(data)

    @property
    def unsent(self) -> int:
        return super().unsent if self.id else len(self.request or b"")

    def when_writable(self, callback: Callable[[], None]) -> None:
        if self.id:
            super().when_writable(callback)
        else:
            self.on_writable = callback

    def half_close(self) -> None:
        """Send END_STREAM: no more requests follow."""
        if self._half_closed or self.done or self.closed or not self.id:
            return
        self._half_closed = True
        try:
            self.connection.engine.send_data(self.id, b"", end_stream=True)
        except EngineError:
            return  # the stream has ended, which an event will report
        self.connection.wake()

    def cancel(
        self,
        code: Code = Code.CANCELLED,
        text: str = "Locally cancelled by application!",
        origin: Origin = Origin.GIVEN_UP,
    ) -> None:
        """End the call, at any time. A unary one is not reset at once: see `_is_left_to_finish`."""
        if not self.done:
            if self.id and self.on_released is None and not self._is_left_to_finish():
                self.reset(ErrorCode.CANCEL)
            self.end(code, text, origin)

    def _is_left_to_finish(self) -> bool:
        """May the server finish the call, though its answer will be dropped?

        This holds for a unary call whose request the server has whole. Its answer is mostly on its way, and Triton 2.51
        crashes when calls are reset as it answers them: one caller who cancelled requests of 400 KB ended it for all
        within seconds. A call that takes long is reset all the same.
        """
        if self.closed or not self.is_sent or self.on_message is not None or self.on_chunk is not None:
            return False  # one that has closed has an answer that is still being inflated
        connection = cast("ClientConnection", self.connection)
        if connection.discarded >= connection.most_discarded:
            return False
        connection.discarded += 1
        self._discarded = True
        if self.deadline is not None:
            self._deadlines.discard(self._deadline_key, self)  # before the next one, which may be of the same tick
        self.request = b""  # which may be large, as what its caller has may be
        self.on_front = None
        now = max(connection.now, self._deadlines.clock())
        self._discard_key = self._deadlines.add(now + DISCARD_SECONDS, self, now)
        return True

    @property
    def is_sent(self) -> bool:
        """Is it a unary call whose request the server has whole?"""
        return self.request is not None and self._half_closed and not self.unsent

    def expire(self) -> None:
        """End the call at its deadline; reset one that was left to finish."""
        if self._discarded:
            self.reset(ErrorCode.CANCEL)
        else:
            self.cancel(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def end(self, code: Code, text: str, origin: Origin) -> None:
        """End the call, once."""
        if self.unprocessed and self.on_unprocessed is not None and self.on_unprocessed(self):
            return
        self.done = True
        self.code = code
        self.text = text
        self.origin = origin
        if not self.id:
            self._wake_writer()
        if self.deadline is not None and not self._discarded:
            self._deadlines.discard(self._deadline_key, self)
        callback, self.on_done = self.on_done, None
        if callback is not None:
            callback(self)
        if not self.id or self.closed:
            self._forget()
        if not self.id and self.on_released is not None:
            self.release_memory(True)

    def keep_for_server(self, released: Callable[[bool], None], is_own: Callable[[Code, str, bool], bool]) -> None:
        """Its server may read memory of ours. To be called before it is started.

        It runs out unheard when it is given up, and its server is not told of its deadline: a reset and a timeout end
        the call there, and not the reading.

        released: called once, with True when the server is done with it, that is, has answered or never got it; with
        False when nobody can tell: the connection broke, or somebody else ended the stream.
        is_own: is a status the server's own word, and not a proxy's? Asked with its text, and whether the peer is made
        with gRPC's C core.
        """
        self.on_released = released
        self.is_own = is_own
        self.runs_out = True

    def release_memory(self, is_answered: bool) -> None:
        """Say that the server reads no memory of ours any more, or that nobody can tell."""
        callback, self.on_released = self.on_released, None
        self.is_own = None
        if callback is not None:
            callback(is_answered)

    @property
    def is_kept(self) -> bool:
        """May its server read memory of ours yet? Then it runs out, whether it has ended here or not."""
        return self.on_released is not None and bool(self.id) and not self.closed

    @property
    def is_answered(self) -> bool:
        """Has the server itself ended the stream that has closed, or never begun with it?"""
        if self.unprocessed:
            return True
        if self.ended_by is not BOTH or self.is_own is None:
            return False
        code: Code | None = None
        text = ""
        for name, value in self.trailing:
            if name == b"grpc-status":
                code = from_field(value)
            elif name == b"grpc-message":
                text = decode_message(value)
        return code is not None and self.is_own(code, text, cast("ClientConnection", self.connection).is_core)

    def _forget(self) -> None:
        self.on_head = self.on_front = self.on_started = self.on_unprocessed = None
        Stream._forget(self)

    def rewind(self) -> None:
        """Make the call one that was never started, to retry it."""
        self.retried = True
        self.id = 0
        self.closed = self._half_closed = self.unprocessed = self.discarding = False
        self.ended_by = BOTH
        self.fault = ""
        self.initial = self.trailing = ()
        self._http_status = b""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The header list of a response."""

    fields: tuple[Field, ...]
    metadata: Fields  # what of it is legal metadata
    status: bytes  # HTTP status, followed by a content-type that is not gRPC's
    encoding: bytes  # grpc-encoding
    dropped: bytes  # name of a field that is not legal metadata, or b""


def _read_head(fields: tuple[Field, ...]) -> ResponseHead:
    status = encoding = wrong = dropped = b""
    for name, value in fields:
        if not _may_pass(name, value):
            dropped = name
        if name == b":status":
            status = value
        elif name == b"grpc-encoding":
            encoding = value
        elif name == b"content-type" and not value.startswith(b"application/grpc"):
            wrong = b", content-type " + value[:40]
    metadata = tuple([field for field in fields if is_metadata(field[0]) and is_legal(field[0], field[1])])
    return ResponseHead(fields, metadata, status + wrong if status == b"200" else status, encoding, dropped)


def _may_pass(name: bytes, value: bytes) -> bool:
    return is_legal(name, value) or name.startswith(b":")


def _legal(fields: Fields) -> Fields:
    return tuple([field for field in fields if _may_pass(field[0], field[1])])


class ClientConnection(Connection[ClientCall]):
    """One connection to one server."""

    def __init__(
        self,
        limits: Limits,
        now: float,
        wake: Callable[[], None],
        *,
        authority: str,
        scheme: str = "http",
        user_agent: str = "inference-gateway",
        most_discarded: int = 0,
        budget: Budget | None = None,
    ) -> None:
        """most_discarded: calls that may be left to finish at once; see `ClientCall._is_left_to_finish`."""
        super().__init__(client_engine(limits), limits, now, wake, budget)
        self.max_streams = self._server_streams = ASSUMED_STREAMS
        self._dropping = 0  # the stream with a header block that is too large and is dropped as it arrives, or 0
        self.most_discarded = most_discarded
        self.discarded = 0  # calls that have ended while the server still works for them
        self.answered = False  # has the server ever sent a status?
        self.is_core = False  # is the peer made with gRPC's C core, as its settings tell?
        self.pinged_too_often = False  # the server has sent GOAWAY "too_many_pings"
        self.on_room: Callable[[], None] = _nothing  # a call has ended, or the server allows more calls
        self.on_leave: Callable[[], None] = _nothing  # the server takes no more calls on this connection
        self.on_greeted: Callable[[], None] = _nothing  # the server's first SETTINGS arrived: it speaks HTTP/2
        self.on_closed: Callable[[], None] = _nothing  # the connection has closed, for `reason`
        self._pseudo: tuple[Field, ...] = (
            (b":method", b"POST"),
            (b":scheme", scheme.encode()),
            (b":authority", authority.encode()),
        )
        self._head: tuple[Field, ...] = (
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", user_agent.encode()),
            (b"grpc-accept-encoding", ACCEPT_ENCODING),
        )
        self._heads: dict[bytes, tuple[Field, ...]] = {}  # by path; our own code chooses paths, so there are few
        self.on_dropped: Callable[[bytes], None] = _ignore  # called with the name of a field that can't be passed on
        # The head of the last response, since the next one is probably the same
        self._last_head = ResponseHead((), (), b"", b"", b"")

    def has_heard_since(self, other: ClientConnection) -> bool:
        """Has the server said anything here after its last word on another connection?"""
        return self._active_at > other._active_at

    @property
    def has_room(self) -> bool:
        return not self.draining and len(self.streams) < self.max_streams

    # Calls

    def start(self, call: ClientCall) -> None:
        """Open the stream, and send the request of a unary call.

        raises: EngineError if no stream can be opened; then nothing was sent.
        """
        path, body = call.path, call.request
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = (*self._pseudo, (b":path", path), *self._head)
        fields = call.request_fields
        own: Fields = ()
        if call.deadline is not None and call.on_released is None:
            left = call.deadline - self.now
            if left < LEAST_TIME and self.most_discarded and body is not None:
                left = LEAST_TIME
            own = (NeverIndexed(b"grpc-timeout", format_timeout(left)),)
        if call.request_encoding:
            own = (NeverIndexed(b"grpc-encoding", call.request_encoding), *own)
        engine = self.engine
        call.connection = self
        more = call.request_more
        if body is not None and len(body) <= SMALL and not more and not call.request_encoding:  # the common case
            stream_id = call.id = engine.send_call(head, own, fields, SMALL_PREFIXES[len(body)] + body)
            self.streams[stream_id] = call
            call._half_closed = True
        else:
            stream_id = call.id = engine.send_request(head, own, fields)
            self.streams[stream_id] = call
            if body is not None:
                call._half_closed = not more
                engine.send_data(stream_id, prefix(len(body) + more, bool(call.request_encoding)))
                engine.send_data(stream_id, body, end_stream=not more)
        if call.on_started is not None:
            call.on_started(call)
        if call.on_writable is not None:
            self.watch(call)
        self.wake()

    # Events

    def _headers(self, event: HeadersEvent) -> None:
        call = self._maybe_stream(event.stream_id)
        if call is None or call.done:
            if call is not None and call.on_released is not None and event.end_stream:
                call.trailing = event.headers
            return
        if type(event) is not _RESPONSE:
            call.trailing = event.headers
            return
        head = self._last_head
        if event.headers is not head.fields and event.headers != head.fields:
            head = self._last_head = _read_head(event.headers)
        call._http_status = head.status
        call.discarding = head.status != b"200"
        if head.encoding:
            call.encoding = head.encoding
        if head.dropped:
            self.on_dropped(head.dropped)
        if event.end_stream:
            call.trailing = _legal(head.fields) if head.dropped else head.fields  # the response is trailers-only
            return
        call.initial = head.metadata
        if call.on_head is not None and not call.discarding:
            call.on_head(call)

    def _headers_dropped(self, event: HeadersDropped) -> None:
        call = self.streams.get(event.stream_id)
        if call is not None and not call.done:
            what = "trailers" if event.are_trailers else "headers"
            text = f"The {what} of the server's answer are larger than the limit of {event.limit} bytes"
            call.end(Code.RESOURCE_EXHAUSTED, text, Origin.ANSWER)
        self._dropping = event.stream_id
        self.max_streams = 0  # no new call may wait behind the rest of the block
        if event.size > MOST_DROPPED and not self.draining:
            self.reason = "a header block that does not end"
            self.drain()
            self.on_leave()

    def _data_taken(self, stream: ClientCall, ended: bool) -> None:
        if stream.on_front is not None and stream.missing > self.limits.whole_bytes:
            stream._offer_front(stream.on_front)
        elif stream.compressed and stream.missing == 0 and not stream._is_inflating:
            self._inflate_answer(stream)

    def _inflate_answer(self, call: ClientCall) -> None:
        compressed, call.body = call.body, b""

        def plain(body: bytes) -> None:
            call.body = body
            call.compressed = False

        self.inflate(call, compressed, plain)

    def _call_failed(self, stream: ClientCall, failure: CallFailed) -> None:
        if failure.code is Code.RESOURCE_EXHAUSTED and stream._http_status:  # an answer that is too large has been made
            stream.release_memory(True)
        stream.reset(ErrorCode.CANCEL)
        stream.end(failure.code, failure.text, Origin.ANSWER)

    def _call_closed(self, stream: ClientCall, error_code: int) -> None:
        if stream._discarded:
            stream._discarded = False
            self.discarded -= 1
            stream._deadlines.discard(stream._discard_key, stream)
        elif not stream.done:
            if stream.is_behind and stream.ended_by is EndedBy.BOTH:
                stream._ended_unread = True  # the reader gets all messages before the end
            else:
                self._end(stream, error_code)
        if stream.on_released is not None and stream.closed:  # it is not, if it is tried once more
            stream.release_memory(stream.is_answered)
        if stream.id == self._dropping:
            self._dropping = 0
            self.max_streams = self._server_streams
        self.on_room()

    def _all_read(self, stream: ClientCall) -> None:
        self._end(stream, 0)

    def _end(self, call: ClientCall, error_code: int) -> None:
        """End a call whose stream has closed. A status from the server wins over a reset that follows it."""
        if call.trailing == _JUST_OK and call.missing == 0:  # the common case
            self.answered = True
            call.is_just_ok = True
            call.end(OK, "", SERVER)
            return
        code: Code | None = None
        text = ""
        dropped = b""
        for name, value in call.trailing:
            if name == b"grpc-status":
                code = from_field(value)
            elif name == b"grpc-message":
                text = decode_message(value)
            elif not _may_pass(name, value):
                dropped = name
        if dropped:
            self.on_dropped(dropped)
            call.trailing = _legal(call.trailing)
        if code is None:
            self._end_by_http(call, error_code)
            return
        self.answered = True
        if code is OK and call.has_partial_message:
            call.end(Code.INTERNAL, "The server ended the call without a whole message", Origin.ANSWER)
        else:
            call.end(code, text, SERVER)

    def _end_by_http(self, call: ClientCall, error_code: int) -> None:
        """End a call for which the server sent no status."""
        by = call.ended_by
        if by is EndedBy.CONNECTION:
            call.end(Code.UNAVAILABLE, f"Connection lost: {self.reason}", Origin.LOST)
        elif by is EndedBy.FAULT:
            text = f"The server broke the rules of HTTP/2 ({call.fault}), error {error_code}"
            call.end(from_reset(error_code), text, Origin.ANSWER)
        elif by is EndedBy.US:
            text = f"Stream was reset by the client with HTTP/2 error {error_code}"
            call.end(from_reset(error_code), text, Origin.ANSWER)
        elif by is EndedBy.PEER:
            call.unprocessed = error_code == ErrorCode.REFUSED_STREAM and not call._http_status
            text = f"Stream was reset by the server with HTTP/2 error {error_code}"
            is_late = error_code == ErrorCode.CANCEL and call.deadline is not None and self.now >= call.deadline
            if is_late:  # the server's clock noticed the deadline first; C-core does the same
                call.end(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", Origin.GIVEN_UP)
            else:
                call.end(from_reset(error_code), text, Origin.PEER)
        elif call._http_status and call._http_status != b"200":
            shown = call._http_status.decode("latin-1")
            origin = Origin.LOST if call._http_status in LOST_BY_PROXY else Origin.PEER
            call.end(from_http(call._http_status), f"The server answered with HTTP status {shown}", origin)
        else:
            call.end(Code.UNKNOWN, "The server ended the call without a status", Origin.PEER)

    def _tick_stream(self, stream: ClientCall) -> None:
        """End a call whose server does not read the request."""
        if not self.full and stream._tick(int(self.limits.write_stall_seconds), self.limits.min_rate):
            text = f"The server did not read the request for {self.limits.write_stall_seconds:g} s"
            stream.cancel(Code.UNAVAILABLE, text, Origin.CONNECTION)

    def _settings(self, event: SettingsReceived) -> None:
        if event.settings.get(TRUE_BINARY_METADATA):
            self.is_core = True
        limit = event.settings.get(MAX_CONCURRENT_STREAMS, None if self.greeted else UNLIMITED)
        if limit is not None:
            self._server_streams = limit
            if not self._dropping:
                self.max_streams = limit
            self.on_room()
        self.on_greeted()

    def _peer_leaves(self, event: GoAwayReceived) -> None:
        self.pinged_too_often = event.debug_data == b"too_many_pings"  # gRFC A8
        self.on_leave()

    def close(self, reason: str) -> None:
        super().close(reason)
        self.on_closed()

    def drain(self) -> None:
        """Take no new calls, and close once the running ones have ended."""
        if not self.draining:
            self.draining = True
            self.engine.send_goaway()
            self.wake()
