"""The client's end: a `ClientCall` per request on a connection that many callers share.

Every field that a caller chose is sent never-indexed, so one caller's values can't disturb the compression state, and
with it the calls, of another. Source: grpc `doc/PROTOCOL-HTTP2.md`, gRFC A6 (which failures were not processed).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gateway.status import Code
from gateway.wire.codes import CallFailed, from_field, from_http, from_reset
from gateway.wire.connection import Connection
from gateway.wire.deadlines import Deadlines
from gateway.wire.engine import (
    MAX_CONCURRENT_STREAMS,
    DataReceived,
    EngineError,
    ErrorCode,
    Field,
    GoAwayReceived,
    NeverIndexed,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamReset,
    TrailersReceived,
    client_engine,
)
from gateway.wire.fields import Fields, decode_message, format_timeout
from gateway.wire.limits import Limits
from gateway.wire.messages import ACCEPT_ENCODING, prefix
from gateway.wire.stream import SMALL, Stream

ASSUMED_STREAMS = 100  # at once, until the server's SETTINGS come
UNLIMITED = (1 << 31) - 1  # unless they tell a limit (RFC 9113 section 6.5.2); C-core's servers tell none


def _nothing() -> None: ...


class ClientCall(Stream):
    """One call to a server.

    Give it to `ClientConnection.start`; it ends with one call of `on_done`, whatever happens. After that `code` and
    `text` say how, `body` has a unary answer, and `initial` and `trailing` the fields that came.
    """

    __slots__ = (
        "_deadline_key",
        "_deadlines",
        "_half_closed",
        "_http_status",
        "code",
        "deadline",
        "from_server",
        "initial",
        "on_done",
        "on_front",
        "on_head",
        "on_started",
        "on_unprocessed",
        "path",
        "patient",
        "request",
        "request_encoding",
        "request_fields",
        "request_more",
        "retried",
        "text",
        "trailing",
        "unprocessed",
        "was_reset",
    )

    def __init__(self, path: bytes, fields: Fields, deadlines: Deadlines, deadline: float | None, now: float) -> None:
        """fields: metadata; those that a caller chose must be `NeverIndexed`. deadline: on the clock of `now`."""
        super().__init__()
        self.path = path
        self.request_fields = fields
        self.request: bytes | None = None  # of a unary call: its message, or the front of it
        self.request_more = 0  # bytes of it that `send_chunk` will bring
        self.request_encoding = b""  # how the request is compressed, if it is
        self.deadline = deadline
        self.code = Code.UNKNOWN
        self.text = ""
        self.initial: Fields = ()
        self.trailing: Fields = ()
        self.from_server = False  # did the server give the status, or did this end make it?
        self.unprocessed = False  # the server did not look at it: it may be tried again by anyone
        self.on_head: Callable[[ClientCall], None] | None = None
        self.on_front: Callable[[ClientCall], None] | None = None
        """A large answer's front is in `body`, `missing` bytes are to come. Called again as more arrives, unless
        `on_chunk` was set. Without it answers are collected whole."""
        self.on_started: Callable[[ClientCall], None] | None = None  # it has a stream, and its request is on the way
        self.on_done: Callable[[ClientCall], None] | None = None
        self.on_unprocessed: Callable[[ClientCall], bool] | None = None  # takes the call over, and says so
        self.retried = False
        self.patient = False  # waits for a connection, however long that takes
        self._half_closed = False
        self._http_status = b""
        self.was_reset = False  # by the server; even with NO_ERROR that cuts an answer off
        self._deadlines = deadlines
        self._deadline_key = deadlines.add(deadline, self, now) if deadline is not None else 0

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

    def _send_in_turns(self, rest: memoryview) -> None:
        """Queue a large request piece by piece: the engine would send it whole before the calls that come after it."""
        size = self.connection.limits.unsent_bytes
        last = len(rest) <= size
        try:
            self.connection.engine.send_data(self.id, rest[:size], end_stream=last)
        except EngineError:
            return  # its end is on the way
        self.connection.wake()
        if not last:
            self.when_writable(lambda: None if self.done or self.closed else self._send_in_turns(rest[size:]))

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

    def cancel(self, code: Code = Code.CANCELLED, text: str = "Locally cancelled by application!") -> None:
        """End it from this side; at any time."""
        if not self.done:
            if self.id:
                self.reset(ErrorCode.CANCEL)
            self.end(code, text)

    def expire(self) -> None:
        """The deadline has passed."""
        self.cancel(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def end(self, code: Code, text: str) -> None:
        """The one end of a call."""
        if self.unprocessed and self.on_unprocessed is not None and self.on_unprocessed(self):
            return
        self.done = True
        self.code = code
        self.text = text
        if not self.id:
            self._let_go()
        if self.deadline is not None:
            self._deadlines.discard(self._deadline_key, self)
        callback, self.on_done = self.on_done, None
        if callback is not None:
            callback(self)
        if not self.id:
            self._forget()

    def _forget(self) -> None:
        super()._forget()
        self.on_head = self.on_front = self.on_started = self.on_unprocessed = None

    def rewind(self) -> None:
        """As if it had never been started."""
        self.retried = True
        self.id = 0
        self.closed = self._half_closed = self.unprocessed = self.from_server = self.was_reset = False
        self.initial = self.trailing = ()
        self._http_status = b""


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
    ) -> None:
        super().__init__(client_engine(limits), limits, now, wake)
        self.max_streams = ASSUMED_STREAMS
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

    @property
    def has_room(self) -> bool:
        return not self.draining and len(self.streams) < self.max_streams

    # Calls

    def start(self, call: ClientCall) -> None:
        """Open the stream, and send the message of a unary call.

        raises: EngineError if no stream can be opened any more; then nothing was sent.
        """
        head = [*self._pseudo, (b":path", call.path), *self._head]
        if call.deadline is not None:
            head.append(NeverIndexed(b"grpc-timeout", format_timeout(call.deadline - self.now)))
        if call.request_encoding:
            head.append(NeverIndexed(b"grpc-encoding", call.request_encoding))
        if call.request_fields:
            head.extend(call.request_fields)
        engine = self.engine
        call.connection = self
        stream_id = call.id = engine.send_request(head)
        self.streams[stream_id] = call
        body = call.request
        if body is not None:
            more = call.request_more
            call._half_closed = not more
            length = prefix(len(body) + more, bool(call.request_encoding))
            if len(body) <= SMALL:
                engine.send_data(stream_id, length + body, end_stream=not more)
            elif more or call.on_writable is not None:  # it comes piece by piece already
                engine.send_data(stream_id, length)
                engine.send_data(stream_id, body, end_stream=not more)
            else:
                engine.send_data(stream_id, length)
                call._send_in_turns(memoryview(body))
        if call.on_started is not None:
            call.on_started(call)
        if call.on_writable is not None:
            self.watch(call)
        self.wake()

    # Events

    def _headers(self, event: RequestReceived | ResponseReceived | TrailersReceived) -> None:
        call = self.streams.get(event.stream_id)
        if call is None or call.done:
            return
        if type(event) is ResponseReceived:
            self._response(call, event)
        else:
            call.trailing = event.headers

    def _response(self, call: ClientCall, event: ResponseReceived) -> None:
        fields = event.headers
        if event.end_stream:
            call.trailing = fields  # trailers-only
        else:
            call.initial = fields
        for name, value in fields:
            if name == b":status":
                call._http_status = value
            elif name == b"grpc-encoding":
                call.encoding = value
            elif name == b"content-type" and not value.startswith(b"application/grpc") and call._http_status == b"200":
                call._http_status += b", content-type " + value[:40]
        if call._http_status == b"200" and not event.end_stream and call.on_head is not None:
            call.on_head(call)

    def _reset_by_peer(self, event: StreamReset) -> None:
        call = self.streams.get(event.stream_id)
        if call is not None:
            call.was_reset = True

    def _data(self, stream: ClientCall | None, event: DataReceived) -> None:
        if stream is not None and stream._http_status != b"200":
            stream = None  # an error page, not messages
        super()._data(stream, event)

    def _data_taken(self, stream: ClientCall, ended: bool) -> None:
        if stream.on_front is not None and stream.missing > self.limits.whole_bytes:
            stream._offer_front(stream.on_front)

    def _call_failed(self, stream: ClientCall, failure: CallFailed) -> None:
        stream.reset(ErrorCode.CANCEL)
        stream.end(failure.code, failure.text)

    def _call_closed(self, stream: ClientCall, error_code: int) -> None:
        if not stream.done:
            stream.end(*self._status(stream, error_code))
        self.on_room()

    def _status(self, call: ClientCall, error_code: int) -> tuple[Code, str]:
        """Read how the stream ended. gRPC's own status wins, even where a reset follows it."""
        code: Code | None = None
        text = ""
        for name, value in call.trailing:
            if name == b"grpc-status":
                code = from_field(value)
            elif name == b"grpc-message":
                text = decode_message(value)
        if code is not None:
            call.from_server = self.answered = True
            if code is Code.OK and call.has_partial_message:
                return Code.INTERNAL, "The server ended the call without a whole message"
            return code, text
        if error_code < 0:
            return Code.UNAVAILABLE, f"Connection lost: {self.reason}"
        if error_code or call.was_reset:
            call.unprocessed = error_code == ErrorCode.REFUSED_STREAM and not call._http_status
            return from_reset(error_code), f"Stream was reset by the server with HTTP/2 error {error_code}"
        if call._http_status and call._http_status != b"200":
            shown = call._http_status.decode("latin-1")
            return from_http(call._http_status), f"The server answered with HTTP status {shown}"
        return Code.UNKNOWN, "The server ended the call without a status"

    def _settings(self, event: SettingsReceived) -> None:
        limit = event.settings.get(MAX_CONCURRENT_STREAMS, None if self.greeted else UNLIMITED)
        if limit is not None:
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
            self._try(partial(self.engine.send_goaway, ErrorCode.NO_ERROR))
