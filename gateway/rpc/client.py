"""The client's end: a `ClientCall` per request on a connection that many callers share.

Every field that a caller chose is sent never-indexed, so one caller's values can't disturb the compression state, and
with it the calls, of another. Source: grpc `doc/PROTOCOL-HTTP2.md`, gRFC A6 (which failures were not processed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, cast

from gateway.http2.engine import client_engine
from gateway.http2.frames import (
    BOTH,
    MAX_CONCURRENT_STREAMS,
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
from gateway.rpc.metadata import Fields, decode_message, format_timeout, is_legal
from gateway.rpc.stream import Stream
from gateway.status import OK, Code, Origin

_RESPONSE: Final = ResponseReceived  # as in `connection`
_JUST_OK: Final = ((b"grpc-status", b"0"),)
UNKNOWN: Final = Code.UNKNOWN
SERVER: Final = Origin.SERVER
ASSUMED_STREAMS: Final = 100  # at once, until the server's SETTINGS come
LEAST_TIME: Final = 0.2  # seconds that the server is told a small call has, however soon it is given up here
MOST_DROPPED: Final = 16 * MiB  # of one header block; then nothing new is begun on a connection
DISCARD_SECONDS: Final = 0.2  # so a call that was given up is reset then, if it has not ended
LOST_BY_PROXY: Final = frozenset((b"502", b"503", b"504"))  # it can't be told whether its server has begun
UNLIMITED: Final = (1 << 31) - 1  # unless they tell a limit (RFC 9113 section 6.5.2); C-core's servers tell none


def _nothing() -> None: ...


def _ignore(name: bytes) -> None: ...


class ClientCall(Stream):
    """One call to a server.

    Give it to `ClientConnection.start`; it ends with one call of `on_done`, whatever happens. After that `code` and
    `text` say how, `body` has a unary answer, and `initial` and `trailing` the fields that came.
    """

    request: bytes | None = None  # of a unary call: its message, or the front of it
    request_more = 0  # bytes of it that `send_chunk` will bring
    request_encoding = b""  # how the request is compressed, if it is
    code: Code
    text = ""
    initial: Fields = ()
    trailing: Fields = ()
    origin = SERVER  # who ended it, once it is done
    unprocessed = False  # the server did not look at it: it may be tried again by anyone
    on_head: Callable[[ClientCall], None] | None = None
    on_front: Callable[[ClientCall], None] | None = None
    """A large answer's front is in `body`, `missing` bytes are to come. Called again as more arrives, unless
    `on_chunk` was set. Without it answers are collected whole."""
    on_started: Callable[[ClientCall], None] | None = None  # it has a stream, and its request is on the way
    on_done: Callable[[ClientCall], None] | None = None
    on_unprocessed: Callable[[ClientCall], bool] | None = None  # takes the call over, and says so
    retried = False
    patient = False  # waits for a connection, however long that takes
    _half_closed = False
    _http_status = b""
    _deadline_key = 0
    _discard_key = 0
    _discarded = False  # it is over, and its answer will be dropped

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
        """Did the server give the status it ended with?"""
        return self.origin is SERVER

    # Before it has a stream, a request that is passed on waits in `request`; its sender is told to wait.

    def send_chunk(self, data: bytes) -> None:
        if self.id:
            super().send_chunk(data)
        elif not self.done:
            self.request = (self.request or b"") + data
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
        """No more requests."""
        if self._half_closed or self.done or self.closed or not self.id:
            return
        self._half_closed = True
        try:
            self.connection.engine.send_data(self.id, b"", end_stream=True)
        except EngineError:
            return  # its end is on the way
        self.connection.wake()

    def cancel(
        self,
        code: Code = Code.CANCELLED,
        text: str = "Locally cancelled by application!",
        origin: Origin = Origin.GIVEN_UP,
    ) -> None:
        """End it from this side; at any time. The server may not hear of it: see `_is_left_to_finish`."""
        if not self.done:
            if self.id and not self._is_left_to_finish():
                self.reset(ErrorCode.CANCEL)
            self.end(code, text, origin)

    def _is_left_to_finish(self) -> bool:
        """May the server finish it, and its answer be dropped?

        Of a small unary call that it has whole: the answer is on its way, most often, and a Triton that is told of very
        many calls that ended early, or sees their deadlines pass, may crash (seen with 2.51). What takes long is reset
        all the same.
        """
        if not self.is_small or self.on_message is not None or self.on_chunk is not None or self.unsent:
            return False
        connection = cast("ClientConnection", self.connection)
        if connection.discarded >= connection.most_discarded:
            return False
        connection.discarded += 1
        self._discarded = True
        self._discard_key = self._deadlines.add(connection.now + DISCARD_SECONDS, self, connection.now)
        return True

    @property
    def is_small(self) -> bool:
        """Is it unary, with a small request that was or will be sent at once?"""
        return self.request is not None and len(self.request) <= SMALL and not self.request_more

    def expire(self) -> None:
        """The deadline has passed, or the time for an answer that will be dropped."""
        if self._discarded:
            self.reset(ErrorCode.CANCEL)
        else:
            self.cancel(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def end(self, code: Code, text: str, origin: Origin) -> None:
        """The one end of a call."""
        if self.unprocessed and self.on_unprocessed is not None and self.on_unprocessed(self):
            return
        self.done = True
        self.code = code
        self.text = text
        self.origin = origin
        if not self.id:
            self._let_go()
        if self.deadline is not None:
            self._deadlines.discard(self._deadline_key, self)
        callback, self.on_done = self.on_done, None
        if callback is not None:
            callback(self)
        if not self.id or self.closed:
            self._forget()

    def _forget(self) -> None:
        self.on_head = self.on_front = self.on_started = self.on_unprocessed = None
        Stream._forget(self)

    def rewind(self) -> None:
        """As if it had never been started."""
        self.retried = True
        self.id = 0
        self.closed = self._half_closed = self.unprocessed = self.deaf = False
        self.ended_by = BOTH
        self.initial = self.trailing = ()
        self._http_status = b""


class ResponseHead(NamedTuple):
    """What the header list of an answer says."""

    fields: tuple[Field, ...]
    status: bytes  # HTTP's; followed by what is wrong if the content is not gRPC's
    encoding: bytes  # grpc-encoding
    dropped: bytes  # the name of a field that is no legal metadata, if there is one


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
    return ResponseHead(fields, status + wrong if status == b"200" else status, encoding, dropped)


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
        """most_discarded: small calls that are given up and may finish all the same, at once."""
        super().__init__(client_engine(limits), limits, now, wake, budget)
        self.max_streams = self._server_streams = ASSUMED_STREAMS
        self._held_by = 0  # the stream whose header block is so large that it is dropped as it comes
        self.most_discarded = most_discarded
        self.discarded = 0  # calls that are over, while the server still works at their answers
        self.answered = False  # has the server ever ended a call with a status?
        self.pinged_too_often = False  # says the server, which leaves for it
        self.on_room: Callable[[], None] = _nothing  # a call has ended, or the server allows more at once
        self.on_leave: Callable[[], None] = _nothing  # the server takes no more calls on this connection
        self.on_greeted: Callable[[], None] = _nothing  # the server's first SETTINGS came: it speaks HTTP/2
        self.on_closed: Callable[[], None] = _nothing  # it ended, for `reason`
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
        self._heads: dict[bytes, tuple[Field, ...]] = {}  # by path, which our own code chooses
        self.on_dropped: Callable[[bytes], None] = _ignore  # the name of a server's field that can't be passed on
        self._usual = ResponseHead((), b"", b"", b"")  # of the last answer, and probably of the next one

    def has_heard_since(self, other: ClientConnection) -> bool:
        """Has the server said anything here after its last word on another connection?"""
        return self._active_at > other._active_at

    @property
    def has_room(self) -> bool:
        return not self.draining and len(self.streams) < self.max_streams

    # Calls

    def start(self, call: ClientCall) -> None:
        """Open the stream, and send the message of a unary call.

        raises: EngineError if no stream can be opened any more; then nothing was sent.
        """
        path, body = call.path, call.request
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = (*self._pseudo, (b":path", path), *self._head)
        fields = call.request_fields
        if call.deadline is not None:
            left = call.deadline - self.now
            if left < LEAST_TIME and self.most_discarded and call.is_small:
                left = LEAST_TIME
            fields = (NeverIndexed(b"grpc-timeout", format_timeout(left)), *fields)
        if call.request_encoding:
            fields = (NeverIndexed(b"grpc-encoding", call.request_encoding), *fields)
        engine = self.engine
        call.connection = self
        stream_id = call.id = engine.send_request(head, fields)
        self.streams[stream_id] = call
        if body is not None:
            more = call.request_more
            call._half_closed = not more
            if len(body) <= SMALL and not more and not call.request_encoding:  # nearly always
                engine.send_data(stream_id, SMALL_PREFIXES[len(body)] + body, end_stream=True)
            else:
                engine.send_data(stream_id, prefix(len(body) + more, bool(call.request_encoding)))
                engine.send_data(stream_id, body, end_stream=not more)
        if call.on_started is not None:
            call.on_started(call)
        if call.on_writable is not None:
            self.watch(call)
        self.wake()

    # Events

    def _headers(self, event: HeadersEvent) -> None:
        call = self.streams.get(event.stream_id)
        if call is None or call.done:
            return
        if type(event) is not _RESPONSE:
            call.trailing = event.headers
            return
        head = self._usual
        if event.headers is not head.fields and event.headers != head.fields:
            head = self._usual = _read_head(event.headers)
        call._http_status = head.status
        call.deaf = head.status != b"200"
        if head.encoding:
            call.encoding = head.encoding
        fields: Fields = head.fields
        if head.dropped:
            self.on_dropped(head.dropped)
            fields = _legal(fields)
        if event.end_stream:
            call.trailing = fields  # trailers-only
            return
        call.initial = fields
        if call.on_head is not None and not call.deaf:
            call.on_head(call)

    def _headers_dropped(self, event: HeadersDropped) -> None:
        call = self.streams.get(event.stream_id)
        if call is not None and not call.done:
            what = "trailers" if event.are_trailers else "headers"
            text = f"The {what} of the server's answer are larger than the limit of {event.limit} bytes"
            call.end(Code.RESOURCE_EXHAUSTED, text, Origin.ANSWER)
        self._held_by = event.stream_id
        self.max_streams = 0  # nothing new is begun behind the rest of the block
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
        stream.reset(ErrorCode.CANCEL)
        stream.end(failure.code, failure.text, Origin.ANSWER)

    def _call_closed(self, stream: ClientCall, error_code: int) -> None:
        if stream._discarded:
            stream._discarded = False
            self.discarded -= 1
            stream._deadlines.discard(stream._discard_key, stream)
        elif not stream.done:
            if stream.is_behind and stream.ended_by is EndedBy.BOTH:
                stream._ends_late = True  # its end comes after its messages
            else:
                self._end(stream, error_code)
        if stream.id == self._held_by:
            self._held_by = 0
            self.max_streams = self._server_streams
        self.on_room()

    def _all_read(self, stream: ClientCall) -> None:
        self._end(stream, 0)

    def _end(self, call: ClientCall, error_code: int) -> None:
        """As the stream ended. gRPC's own status wins, even where a reset follows it."""
        if call.trailing == _JUST_OK and call.missing == 0:  # nearly always
            self.answered = True
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
        """The server gave no status of gRPC's."""
        by = call.ended_by
        if by is EndedBy.CONNECTION:
            call.end(Code.UNAVAILABLE, f"Connection lost: {self.reason}", Origin.LOST)
        elif by is EndedBy.FAULT or by is EndedBy.US:
            text = f"The server broke the rules of HTTP/2, error {error_code}"
            call.end(from_reset(error_code), text, Origin.ANSWER)
        elif by is EndedBy.PEER:
            call.unprocessed = error_code == ErrorCode.REFUSED_STREAM and not call._http_status
            text = f"Stream was reset by the server with HTTP/2 error {error_code}"
            is_late = error_code == ErrorCode.CANCEL and call.deadline is not None and self.now >= call.deadline
            if is_late:  # its clock noticed first, as C-core has it
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
        """A server that takes nothing of a request is as good as gone, for this call."""
        if not self.full and stream._tick(int(self.limits.write_stall_seconds), self.limits.min_rate):
            text = f"The server took nothing of the request for {self.limits.write_stall_seconds:g} s"
            stream.cancel(Code.UNAVAILABLE, text, Origin.CONNECTION)

    def _settings(self, event: SettingsReceived) -> None:
        limit = event.settings.get(MAX_CONCURRENT_STREAMS, None if self.greeted else UNLIMITED)
        if limit is not None:
            self._server_streams = limit
            if not self._held_by:
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
        """Take no more calls; close once the running ones have ended."""
        if not self.draining:
            self.draining = True
            self.engine.send_goaway()
            self.wake()
