"""The client's end: a `ClientCall` per request on a connection that many callers share.

Every field that a caller chose is sent never-indexed, so one caller's values can't disturb the compression state, and
with it the calls, of another. Source: grpc `doc/PROTOCOL-HTTP2.md`, gRFC A6 (which failures were not processed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.status import OK, Code
from gateway.wire.budget import Budget
from gateway.wire.codes import CallFailed, from_field, from_http, from_reset
from gateway.wire.connection import Connection
from gateway.wire.deadlines import Deadlines
from gateway.wire.engine import client_engine
from gateway.wire.fields import Fields, decode_message, format_timeout
from gateway.wire.frames import (
    MAX_CONCURRENT_STREAMS,
    EngineError,
    ErrorCode,
    GoAwayReceived,
    HeadersEvent,
    ResponseReceived,
    SettingsReceived,
    StreamReset,
)
from gateway.wire.hpack import Field, NeverIndexed
from gateway.wire.limits import Limits
from gateway.wire.messages import ACCEPT_ENCODING, SMALL, SMALL_PREFIXES, prefix
from gateway.wire.stream import Stream

_RESPONSE: Final = ResponseReceived  # as in `connection`
_JUST_OK: Final = ((b"grpc-status", b"0"),)
UNKNOWN: Final = Code.UNKNOWN
ASSUMED_STREAMS: Final = 100  # at once, until the server's SETTINGS come
UNLIMITED: Final = (1 << 31) - 1  # unless they tell a limit (RFC 9113 section 6.5.2); C-core's servers tell none


def _nothing() -> None: ...


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
    from_server = False  # did the server give the status, or did this end make it?
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
    was_reset = False  # by the server; even with NO_ERROR that cuts an answer off
    _half_closed = False
    _http_status = b""
    _deadline_key = 0

    def __init__(self, path: bytes, fields: Fields, deadlines: Deadlines, deadline: float | None, now: float) -> None:
        """fields: metadata; those that a caller chose must be `NeverIndexed`. deadline: on the clock of `now`."""
        self.path = path
        self.request_fields = fields
        self.code = UNKNOWN
        self.deadline = deadline
        if deadline is not None:
            self._deadlines = deadlines
            self._deadline_key = deadlines.add(deadline, self, now)

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
        if not self.id or self.closed:
            self._forget()

    def _forget(self) -> None:
        self.on_head = self.on_front = self.on_started = self.on_unprocessed = None
        Stream._forget(self)

    def rewind(self) -> None:
        """As if it had never been started."""
        self.retried = True
        self.id = 0
        self.closed = self._half_closed = self.unprocessed = self.from_server = self.was_reset = self.deaf = False
        self.initial = self.trailing = ()
        self._http_status = b""


class ResponseHead(NamedTuple):
    """What the header list of an answer says."""

    fields: tuple[Field, ...]
    status: bytes  # HTTP's; followed by what is wrong if the content is not gRPC's
    encoding: bytes  # grpc-encoding


def _read_head(fields: tuple[Field, ...]) -> ResponseHead:
    status = encoding = wrong = b""
    for name, value in fields:
        if name == b":status":
            status = value
        elif name == b"grpc-encoding":
            encoding = value
        elif name == b"content-type" and not value.startswith(b"application/grpc"):
            wrong = b", content-type " + value[:40]
    return ResponseHead(fields, status + wrong if status == b"200" else status, encoding)


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
        budget: Budget | None = None,
    ) -> None:
        super().__init__(client_engine(limits), limits, now, wake, budget)
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
        self._heads: dict[bytes, tuple[Field, ...]] = {}  # by path, which our own code chooses
        self._usual = ResponseHead((), b"", b"")  # of the last answer, and probably of the next one

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
            fields = (NeverIndexed(b"grpc-timeout", format_timeout(call.deadline - self.now)), *fields)
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
        if event.end_stream:
            call.trailing = head.fields  # trailers-only
            return
        call.initial = head.fields
        if call.on_head is not None and not call.deaf:
            call.on_head(call)

    def _reset_by_peer(self, event: StreamReset) -> None:
        call = self.streams.get(event.stream_id)
        if call is not None:
            call.was_reset = True

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
        stream.end(failure.code, failure.text)

    def _call_closed(self, stream: ClientCall, error_code: int) -> None:
        if not stream.done:
            if stream.is_behind and not error_code and not stream.was_reset:
                stream._ends_late = True  # its end comes after its messages
            else:
                stream.end(*self._status(stream, error_code))
        self.on_room()

    def _all_read(self, stream: ClientCall) -> None:
        stream.end(*self._status(stream, 0))

    def _status(self, call: ClientCall, error_code: int) -> tuple[Code, str]:
        """Read how the stream ended. gRPC's own status wins, even where a reset follows it."""
        if call.trailing == _JUST_OK and call.missing == 0:  # nearly always
            call.from_server = self.answered = True
            return OK, ""
        code: Code | None = None
        text = ""
        for name, value in call.trailing:
            if name == b"grpc-status":
                code = from_field(value)
            elif name == b"grpc-message":
                text = decode_message(value)
        if code is None:
            return self._status_by_http(call, error_code)
        call.from_server = self.answered = True
        if code is OK and call.has_partial_message:
            return Code.INTERNAL, "The server ended the call without a whole message"
        return code, text

    def _status_by_http(self, call: ClientCall, error_code: int) -> tuple[Code, str]:
        """The server gave none of gRPC."""
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
            self.engine.send_goaway()
            self.wake()
