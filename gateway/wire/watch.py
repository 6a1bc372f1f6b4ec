"""What nghttp2 doesn't tell of a client's frames: that one is half here, and that one is on a stream it may not name.

nghttp2 drops frames on closed streams and PRIORITY without a word, and a half frame gives no event. Only the headers of
frames are read here: about a microsecond for a call. Sources: RFC 9113 sections 4.1, 5.1, 5.1.1, 6.3; RFC 7540 5.3.1.
"""

from __future__ import annotations

import struct
from typing import Final

from gateway.wire.engine import ErrorCode

HEADER: Final = 9  # bytes of a frame's header
PREFACE: Final = 24  # bytes before the first frame
MOST_OPEN: Final = 1000  # streams remembered as open on the client's side; reset ones stay so there

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
CONTINUATION: Final = 9
_RARE: Final = (PRIORITY, RST_STREAM, CONTINUATION)
END_STREAM: Final = 1
END_HEADERS: Final = 4

_unpack: Final = struct.Struct(">HBBBI").unpack_from  # length, in two parts, kind, flags, stream

Fault = tuple[ErrorCode, str]


class FrameWatch:
    """Reads all that one client sends."""

    __slots__ = ("_floor", "_head", "_in_block", "_in_data", "_last", "_open", "_skip", "since")

    def __init__(self) -> None:
        self.since: float | None = None  # when that began which has still not come whole: a frame or a header block
        self._head = b""  # of a frame whose header is cut
        self._skip = PREFACE  # bytes to come of what is not looked at
        self._in_data = False  # are they those of a DATA frame? It may be long, and has a timer of its own
        self._in_block = False  # is a header block to be continued?
        self._last = 0  # the highest stream that was opened
        self._open: set[int] = set()  # streams that the client has neither ended nor reset
        self._floor = 0  # of streams up to here nothing is known

    def read(self, data: bytes, now: float) -> Fault | None:
        """The next bytes. Answers what is wrong with them, after which the connection should be cut."""
        at, start, kind = self._skip, -1, -1
        cut, in_block = bool(self._head), self._in_block
        data = self._head + data if cut else data
        whole = len(data) - HEADER
        opened = self._open
        while at <= whole:
            high, low, kind, flags, stream = _unpack(data, at)
            if kind <= HEADERS:  # nearly always
                stream &= 0x7FFF_FFFF
                if kind == HEADERS:
                    self._in_block = not flags & END_HEADERS
                    if stream > self._last:
                        self._begin(stream)
                if stream not in opened and self._floor < stream <= self._last:
                    return ErrorCode.STREAM_CLOSED, "a frame on a stream that the client has ended, reset or skipped"
                if flags & END_STREAM:
                    opened.discard(stream)
            elif kind in _RARE:
                if kind == PRIORITY and at + HEADER + 4 > len(data):
                    break  # what it depends on is still to come
                if self._is_wrong(kind, data[at : at + HEADER + 4]):
                    return ErrorCode.PROTOCOL_ERROR, "PRIORITY on no stream, or depending on itself"
            start = at
            at += HEADER + (high << 8 | low)
        if start >= 0:
            self._in_data = kind == DATA
        if at < len(data):
            start = at
            self._head, self._skip = data[at:], 0
        else:
            self._head, self._skip = b"", at - len(data)
        is_half = self._head or self._in_block or (self._skip and not self._in_data)
        is_new = self.since is None or (start >= (1 if cut else 0) and not in_block)  # it began with these bytes
        self.since = None if not is_half else now if is_new else self.since
        return None

    def _is_wrong(self, kind: int, frame: bytes) -> bool:
        """A frame of the rarer kinds."""
        if kind == PRIORITY:
            return frame[5:9] in (b"\0\0\0\0", frame[9:13])
        if kind == RST_STREAM:
            self._open.discard(int.from_bytes(frame[5:9], "big"))
        else:
            self._in_block = not frame[4] & END_HEADERS
        return False

    def _begin(self, stream: int) -> None:
        if len(self._open) >= MOST_OPEN:
            self._open.clear()
            self._floor = self._last
        self._last = stream
        self._open.add(stream)
