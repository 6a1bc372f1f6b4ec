"""HTTP/2 by hand: frames out, frames in, header blocks without compression, on blocking sockets.

Independent of the product's engine and as rude as a test wants it; only header blocks that come in are read by a
library (`hpack`). `Peer` is one end of a connection, of either role. Source: RFC 9113 sections 4 and 6, RFC 7541.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import hpack

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, PRIORITISED, ACK = 0x1, 0x4, 0x8, 0x20, 0x1
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME_SIZE, MAX_HEADER_LIST = range(1, 7)
CODES = (
    *("NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED"),
    *("FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM"),
    *("INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED"),
)

HANG = 60.0  # seconds that nothing takes which comes at all, however busy the machine is

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Pair = tuple[bytes, bytes]


def u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + u32(stream) + payload


def settings(values: Iterable[tuple[int, int]] = ()) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(key.to_bytes(2, "big") + u32(value) for key, value in values))


def headers(stream: int, block: bytes, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, block)


def data(stream: int, body: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, stream, body)


def rst(stream: int, code: int = 8) -> bytes:
    return frame(RST, 0, stream, u32(code))


def window(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, u32(size))


def goaway(last: int, code: int = 0, text: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, u32(last) + u32(code) + text)


def ping(opaque: bytes = bytes(8), flags: int = 0) -> bytes:
    return frame(PING, flags, 0, opaque)


def message(body: bytes, flag: int = 0) -> bytes:
    """A gRPC message with its prefix."""
    return bytes((flag,)) + u32(len(body)) + body


def integer(first: int, bits: int, value: int) -> bytes:
    """RFC 7541 section 5.1; `first` has the bits above the prefix."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    out, value = [first | most], value - most
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def literal(name: bytes, value: bytes, kind: int = 0x00) -> bytes:
    """A field with a new name. kind: 0x00 without indexing, 0x40 incrementally indexed, 0x10 never indexed."""
    return bytes((kind,)) + integer(0, 7, len(name)) + name + integer(0, 7, len(value)) + value


def block(fields: Iterable[Pair]) -> bytes:
    return b"".join(literal(name, value) for name, value in fields)


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes
    fields: tuple[tuple[str, str], ...] = ()  # of a HEADERS frame

    @property
    def code(self) -> int:
        """Of RST_STREAM and GOAWAY."""
        return int.from_bytes(self.payload[4:8] if self.kind == GOAWAY else self.payload[:4], "big")


@dataclass
class Answer:
    """What came on one stream."""

    heads: list[dict[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None

    @property
    def http(self) -> str | None:
        return self.heads[0].get(":status") if self.heads else None

    @property
    def status(self) -> str | None:
        return self.heads[-1].get("grpc-status") if self.heads else None

    @property
    def text(self) -> str:
        return self.heads[-1].get("grpc-message", "") if self.heads else ""

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


Own = TypeVar("Own", bound="Peer")


class Peer:
    """One end of a connection. Sends nothing by itself but acknowledgements of SETTINGS."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.settings: dict[int, int] = {}
        self.acknowledged = False
        self.answers: dict[int, Answer] = {}
        self.goaway: Frame | None = None
        self.closed = False
        self.received = bytearray()
        self._decoder = hpack.Decoder(max_header_list_size=1 << 20)

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def greet(self, values: Iterable[tuple[int, int]] = ((INITIAL_WINDOW, 65_535),)) -> Peer:
        """As a client: preface and SETTINGS, and wait for the server's."""
        self.send(PREFACE + settings(values))
        self.wait(lambda: self.acknowledged and bool(self.settings))
        return self

    def send(self, bytes_: bytes) -> bool:
        """Has the peer taken them? Not if it has closed, or takes nothing for as long as the socket's timeout."""
        self.sock.settimeout(15.0)
        try:
            self.sock.sendall(bytes_)
        except OSError:
            return False
        return True

    def read(self, seconds: float = HANG) -> Frame | None:
        """The next frame, with the header block whole if it begins one; None when the peer has closed.

        raises: TimeoutError. What has come until then is kept.
        """
        until = time.monotonic() + seconds
        while not (size := _whole_frames(self.received)):
            if not self._receive(until):
                self.closed = True
                return None
        taken = bytes(self.received[:size])
        del self.received[:size]
        return self._note(_first_frame(taken))

    def take(self, size: int, seconds: float) -> bytes | None:
        """So many bytes; None when the peer has closed before. raises: TimeoutError."""
        until = time.monotonic() + seconds
        while len(self.received) < size:
            if not self._receive(until):
                return None
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    def _receive(self, until: float) -> bool:
        self.sock.settimeout(max(0.001, until - time.monotonic()))
        try:
            piece = self.sock.recv(65_536)
        except TimeoutError:
            raise
        except OSError:  # reset
            return False
        self.received += piece
        return bool(piece)

    def _note(self, got: Frame) -> Frame:
        if got.kind == SETTINGS:
            if got.flags & ACK:
                self.acknowledged = True
            else:
                pairs = [got.payload[at : at + 6] for at in range(0, len(got.payload), 6)]
                self.settings |= {int.from_bytes(p[:2], "big"): int.from_bytes(p[2:], "big") for p in pairs} or {0: 0}
                self.send(frame(SETTINGS, ACK, 0))
        elif got.kind == GOAWAY:
            self.goaway = got
        elif got.stream:
            answer = self.answers.setdefault(got.stream, Answer())
            if got.kind == HEADERS:
                got = got._replace(fields=tuple((str(k), str(v)) for k, v in self._decoder.decode(_fragment(got))))
                answer.heads.append(dict(got.fields))
            elif got.kind == DATA:
                answer.body += got.payload
            elif got.kind == RST:
                answer.reset = got.code
            if got.kind in (HEADERS, DATA) and got.flags & END_STREAM:
                answer.ended = True
        return got

    def wait(self, until: Callable[[], object], seconds: float = HANG) -> bool:
        """Read until something is true; False when the peer closes or is silent before."""
        end = time.monotonic() + seconds
        while not until():
            try:
                if self.read(max(0.001, end - time.monotonic())) is None:
                    return bool(until())
            except TimeoutError:
                return False
        return True

    def wait_closed(self, seconds: float = HANG) -> bool:
        self.wait(lambda: False, seconds)
        return self.closed

    def answer(self, stream: int, seconds: float = HANG) -> Answer:
        """What comes on a stream until it ends, the connection does, or time is up."""
        answer = self.answers.setdefault(stream, Answer())
        self.wait(lambda: answer.over, seconds)
        return answer


def _whole_frames(received: bytearray) -> int:
    """Bytes of the first frame, with the CONTINUATION frames that belong to it; 0 if they have not all come."""
    at, flags = 0, 0
    while at == 0 or not flags & END_HEADERS:
        if len(received) < at + 9:
            return 0
        kind = received[at + 3]
        flags = received[at + 4] if kind in (HEADERS, CONTINUATION) else END_HEADERS
        at += 9 + int.from_bytes(received[at : at + 3], "big")
    return at if at <= len(received) else 0


def _first_frame(taken: bytes) -> Frame:
    size, flags = int.from_bytes(taken[:3], "big"), taken[4]
    got = Frame(taken[3], flags, int.from_bytes(taken[5:9], "big") & 0x7FFF_FFFF, taken[9 : 9 + size])
    if len(taken) == 9 + size:
        return got
    block, at = _fragment(got), 9 + size
    while at < len(taken):
        size = int.from_bytes(taken[at : at + 3], "big")
        block += taken[at + 9 : at + 9 + size]
        at += 9 + size
    return got._replace(flags=flags & END_STREAM | END_HEADERS, payload=block)


def _fragment(got: Frame) -> bytes:
    pad = got.payload[0] if got.flags & PADDED else 0
    start = (1 if got.flags & PADDED else 0) + (5 if got.flags & PRIORITISED else 0)
    return got.payload[start : len(got.payload) - pad]


def connect(port: int, *, buffer: int = 0) -> Peer:
    """A client's end, not greeted yet. buffer: bytes of the socket's receive buffer; 0 is the system's."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(HANG)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect(("127.0.0.1", port))
    return Peer(sock)
