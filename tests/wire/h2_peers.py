"""python-hyper's `h2` at the other end of a wire connection, joined in memory; time moves by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import h2.config
import h2.connection
import h2.events

from gateway.wire.client import ClientCall, ClientConnection
from gateway.wire.deadlines import Deadlines
from gateway.wire.limits import Limits
from gateway.wire.server import ServerCall, ServerConnection

Pair = tuple[str | bytes, str | bytes]

REQUEST: tuple[Pair, ...] = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test.Service/Echo"),
    (":authority", "test:1"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def request(*extra: Pair, without: Iterable[str] = (), **changed: str) -> list[Pair]:
    """Good request fields; keyword arguments replace pseudo-fields, so `path="/x"`."""
    fields = [(name, changed.get(str(name).lstrip(":"), value)) for name, value in REQUEST if name not in without]
    return [*fields, *extra]


def message(body: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(body).to_bytes(4, "big") + body


def lenient(client: bool) -> h2.config.H2Configuration:
    """An h2 that sends what it is told to, right or wrong."""
    return h2.config.H2Configuration(
        client_side=client,
        header_encoding="utf-8" if client else None,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
    )


class Answer:
    """What one stream has brought to an h2 client."""

    def __init__(self) -> None:
        self.heads: list[dict[str, str]] = []
        self.body = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def trailers(self) -> dict[str, str]:
        return self.heads[-1] if self.heads else {}

    @property
    def status(self) -> str | None:
        return self.trailers.get("grpc-status")

    @property
    def text(self) -> str | None:
        return self.trailers.get("grpc-message")


class ServerUnderTest:
    """A `ServerConnection` with an h2 client on it. Unless told otherwise, calls are echoed."""

    def __init__(
        self,
        accept: Callable[[ServerCall], None] | None = None,
        limits: Limits | None = None,
        *,
        greet: bool = True,
    ) -> None:
        self.now = 1000.0
        self.deadlines = Deadlines()
        self.calls: list[ServerCall] = []
        self.bugs: list[Exception] = []
        self._accept = accept or echo
        self.connection = ServerConnection(
            limits or Limits(), self.now, lambda: None, accept=self._on_call, deadlines=self.deadlines, peer="test"
        )
        self.connection.on_bug = self.bugs.append
        self.h2 = h2.connection.H2Connection(lenient(client=True))
        self.events: list[h2.events.Event] = []
        self.answers: dict[int, Answer] = {}
        self.auto_window = True
        if greet:
            self.h2.initiate_connection()
            self.pump()

    def _on_call(self, call: ServerCall) -> None:
        self.calls.append(call)
        self._accept(call)

    def pump(self, chunk: int = 0) -> None:
        """Carry bytes both ways until nothing moves. chunk: bytes per delivery to us; 0 is all at once."""
        while True:
            up = self.h2.data_to_send()
            for piece in _cut(up, chunk):
                self.connection.receive(piece, self.now)
            down = self.read()
            if not up and not down:
                return
            if down:
                self._hear(self.h2.receive_data(down))

    def read(self) -> bytes:
        pieces = []
        while (piece := self.connection.output()) or self.connection.has_work:
            pieces.append(piece)
            self.connection.advance()
        return b"".join(pieces)

    def raw(self, data: bytes) -> bytes:
        """Hand over bytes that no h2 would send; answers ours."""
        self.connection.receive(data, self.now)
        return self.read()

    def _hear(self, events: Sequence[h2.events.Event]) -> None:
        self.events += events
        for event in events:
            answer = self.answers.setdefault(getattr(event, "stream_id", 0) or 0, Answer())
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                answer.heads.append({str(k): str(v) for k, v in event.headers or []})
            elif isinstance(event, h2.events.DataReceived):
                answer.body += event.data or b""
                if self.auto_window:
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            elif isinstance(event, h2.events.StreamEnded):
                answer.ended = True
            elif isinstance(event, h2.events.StreamReset):
                answer.reset = event.error_code

    def open(self, fields: Sequence[Pair] = REQUEST, *, end: bool = False) -> int:
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, list(fields), end_stream=end)
        return stream

    def call(self, body: bytes = b"hello", fields: Sequence[Pair] = REQUEST, *, raw: bytes | None = None) -> Answer:
        """A unary call, made and answered. raw: the DATA as it is, prefix and all."""
        stream = self.open(fields)
        self.h2.send_data(stream, message(body) if raw is None else raw, end_stream=True)
        self.pump()
        return self.answers[stream]

    def tick(self, seconds: float) -> None:
        """Let time pass, a second at a time."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            self.deadlines.expire(self.now)
            self.connection.tick(self.now)
            self.pump()

    @property
    def goaways(self) -> list[h2.events.ConnectionTerminated]:
        return [event for event in self.events if isinstance(event, h2.events.ConnectionTerminated)]


def echo(call: ServerCall) -> None:
    call.on_request = lambda done: done.reply(done.body)


class ClientUnderTest:
    """A `ClientConnection` with an h2 server on it, which the test plays by hand."""

    def __init__(self, limits: Limits | None = None, most_discarded: int = 0) -> None:
        self.now = 1000.0
        self.deadlines = Deadlines()
        self.connection = ClientConnection(
            limits or Limits(), self.now, lambda: None, authority="test:1", most_discarded=most_discarded
        )
        self.h2 = h2.connection.H2Connection(lenient(client=False))
        self.events: list[h2.events.Event] = []
        self.h2.initiate_connection()
        self.pump()

    def pump(self, chunk: int = 0) -> None:
        while True:
            up = b""
            while (piece := self.connection.output()) or self.connection.has_work:
                up += piece
                self.connection.advance()
            if up:
                self.events += self.h2.receive_data(up)
            down = self.h2.data_to_send()
            for part in _cut(down, chunk):
                self.connection.receive(part, self.now)
            if not up and not down:
                return

    def start(
        self, body: bytes | None = b"hello", fields: Sequence[tuple[bytes, bytes]] = (), **kw: float
    ) -> ClientCall:
        call = ClientCall(b"/test.Service/Echo", fields, self.deadlines, kw.get("deadline"), self.now)
        call.request = body
        self.connection.start(call)
        self.pump()
        return call

    def respond(self, call: ClientCall, *fields: Pair, status: str = "200", end: bool = False) -> None:
        self.h2.send_headers(
            call.id, [(":status", status), ("content-type", "application/grpc"), *fields], end_stream=end
        )

    def finish(self, call: ClientCall, *fields: Pair) -> None:
        self.h2.send_headers(call.id, list(fields), end_stream=True)
        self.pump()


def _cut(data: bytes, size: int) -> list[bytes]:
    if not data:
        return []
    return [data[i : i + size] for i in range(0, len(data), size)] if size else [data]
