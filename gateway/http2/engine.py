"""One end of an HTTP/2 connection, sans-IO: frames, stream states and flow control. Source: RFC 9113.

Bytes go in by `receive_data` and come out by `data_to_send`; both leave `events`. The engine is made for many small
calls: it frames a small body at once. A body that is large, or has no window, waits in its stream, and streams take
turns. Whoever consumes received bytes returns their window with `acknowledge`. A connection error is raised as
`EngineError`; a stream error only resets the stream. The owner enforces the limits that need a clock: see `glitches`,
`partial_unit`, and the events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from mypy_extensions import i64, mypyc_attr

from gateway.bounded import make_room
from gateway.http2.frames import (
    ACK,
    BOTH,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LEAST_FRAME,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    MOST_FRAME,
    MOST_ID,
    MOST_WINDOW,
    NO_RFC7540_PRIORITIES,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WINDOW_UPDATED,
    WITH_PRIORITY,
    ConnectionClosed,
    DataReceived,
    EndedBy,
    EngineError,
    ErrorCode,
    Event,
    GoAwayReceived,
    HeadersDropped,
    PingAcknowledged,
    PingReceived,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TinyReceived,
    TrailersReceived,
    frame,
    frame_header,
    frame_starts,
    goaway_frame,
    number,
    printable,
    settings_frame,
)
from gateway.http2.header_lists import (
    TOO_LARGE,
    HeaderList,
    Malformed,
    checked_request,
    checked_response,
    checked_trailers,
)
from gateway.http2.hpack import KEPT, KEPT_BYTES, BadBlock, Decoder, Encoder, Field, TooLarge
from gateway.http2.limits import Limits
from gateway.http2.prices import (
    BODIES_AT_ONCE,
    EMPTY_DATA,
    LATE_BULK,
    LATE_END,
    LATE_FRAME,
    LEAST_CONTINUATION,
    MALFORMED_HEAD,
    PRIORITY_FRAME,
    SMALL_CONTINUATION,
    TINY,
    UNKNOWN_FRAME,
)
from gateway.http2.states import (
    ALL_SENT,
    AWAITING,
    BODY,
    BODY_END,
    CLOSED,
    HALF_CLOSED_REMOTE,
    HEAD,
    HEAD_END,
    OPEN,
    TRAILERS,
    Strays,
    after,
    fault_text,
)
from gateway.http2.strangers import NotHttp2, maybe_not_http2, not_http2

WRITE_SIZE: Final = 262_144  # bytes; one call of `data_to_send` returns little more
SMALL: Final = 4096 + 5  # bytes of a body that is framed at once, without taking turns
SMALL_BLOCK: Final = 1024  # bytes of a header block, up to which it may be framed in one piece with others
FRAME_BYTES: Final = 65_536  # payload of a frame that is sent; streams take turns by the frame
MOST_RECEIVED: Final = 1 << 20  # payload of a frame that is taken: a large body may come in one, read in few pieces
MOST_OTHER: Final = 65_536  # likewise, of a client's frame that is no DATA: such a one must be here whole
MOST_RESIZED: Final = 20_000  # stream windows that the peer's SETTINGS may change between two outputs: some ms of work
MOST_PADDING: Final = 256  # bytes of a frame, the length of its padding with it (RFC 9113 section 6.1)

_OF_CONNECTION: Final = frozenset((SETTINGS, PING, GOAWAY))
_PROTOCOL: Final = ErrorCode.PROTOCOL_ERROR
_SIZE: Final = ErrorCode.FRAME_SIZE_ERROR
_FLOW: Final = ErrorCode.FLOW_CONTROL_ERROR
_WRONG_LENGTH: Final = "a body whose length is not its content-length"
_CALM: Final = ErrorCode.ENHANCE_YOUR_CALM
_WITHIN_BLOCK: Final = "a frame came between the frames of a header block"
_HEADS: Final = frame_starts(SMALL_BLOCK, HEADERS, END_HEADERS)
_ENDS: Final = frame_starts(SMALL_BLOCK, HEADERS, END_HEADERS | END_STREAM)
_BODIES: Final = frame_starts(SMALL, DATA, 0)
_LAST_BODIES: Final = frame_starts(SMALL, DATA, END_STREAM)
_DROPPED: Final = b"\x80"  # stands for a block that was dropped; it is not a valid block


@mypyc_attr(acyclic=True)
class _Stream:
    """What the engine knows of one stream."""

    def __init__(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.id = stream_id
        self.send_window = send_window  # bytes that we may send
        self.receive_window = receive_window  # bytes that the peer may send
        self.unacknowledged = 0  # bytes consumed, for which no WINDOW_UPDATE was sent
        self.state = AWAITING
        self.length = -1  # content-length; -1 if none
        self.received = 0  # bytes of body received
        self.queue: deque[bytes | memoryview] | None = None
        self.queued = 0  # bytes in the queue
        self.ends = False  # END_STREAM was sent, or will be with the last byte of the queue
        self.trailers: Sequence[Field] | None = None  # the trailers to send after the queue
        self.is_ready = False  # has a place in `Engine._ready`


_NONE: Final = _Stream(-1, 0, 0)


class Engine:
    """One end of a connection, in either role: `server_engine` and `client_engine` make it."""

    _latest = _NONE  # the stream that was asked for last

    def __init__(self, limits: Limits, is_client: bool) -> None:
        self.glitches = 0  # frames that an honest peer has little reason to send; the owner resets the count
        self.tiny = 0  # tokens of `Limits.tiny` for frames of closed streams; the owner resets the count
        self.is_behind = False  # are received bytes left unread? `receive_data` reads on, with no new bytes too
        self.decoded = 0  # bytes of header blocks that had to be decoded; the owner resets the count
        self._limits = limits
        self._is_client = is_client
        self._events: list[Event] = []
        self._streams: dict[int, _Stream] = {}
        self._next_id = 1
        self._last_id = 0  # the highest stream id that the peer has opened
        self._strays = Strays()
        # Receiving
        self._decoder = Decoder(limits.header_list_bytes_hard)
        # Header lists by block, for as long as the decoder's table does not change
        self._known_lists: dict[bytes, HeaderList] = {}
        self._known_trailers: dict[bytes, HeaderList] = {}
        self._known_as_of = 0
        self._malformed = ""  # what is wrong with the header list that was found malformed last
        self._rest = b""  # the part of a frame that has arrived
        self._units = 0  # complete frames and header blocks received
        self._in_preface = not is_client
        self._greeted = False  # the peer's first SETTINGS arrived
        self._block = bytearray()  # the part of a header block that has arrived
        self._block_id = 0  # the stream of `_block`, or 0
        self._block_flags = 0
        self._block_frames = 0
        self._block_size = 0  # bytes of the block received so far
        self._block_dropped = False  # the block is larger than the limit, so its fields are not kept
        # The DATA frame that is delivered in parts
        self._body_id = 0
        self._body_left = self._padding_left = 0  # bytes still to come of it, and after it
        self._body_ends = self._body_is_tiny = False
        self._bodies_left = 0  # DATA and late frames that `receive_data` may still read before it stops
        self._receive_window = DEFAULT_WINDOW  # bytes that the peer may send on the connection
        self._unacknowledged = 0  # bytes consumed, for which no WINDOW_UPDATE was sent
        self._update_at = limits.connection_window // 2  # bytes to consume before a WINDOW_UPDATE is sent
        self._update_stream_at = limits.stream_window // 2
        # INITIAL_WINDOW_SIZE of the SETTINGS that the peer has acknowledged last, and of those that it has not
        self._initial_receive_window = limits.stream_window
        self._pending_settings = deque((limits.stream_window,))
        # Sending
        self._encoder = Encoder()
        self._out: list[bytes | memoryview] = []
        self._out_size = 0  # bytes of bodies in `_out`
        self._send_window = DEFAULT_WINDOW  # bytes that we may send on the connection
        self._initial_send_window = DEFAULT_WINDOW  # bytes that we may send on a new stream
        self._resized = 0  # stream windows that the peer's SETTINGS changed since the last output
        self._frame_most = LEAST_FRAME  # bytes of payload that the peer takes in a frame
        self._ready: deque[_Stream] = deque()  # streams with a body to send
        self._queued = 0  # bytes of bodies that wait in all streams
        self._replies = 0  # acknowledgements of SETTINGS and PING made since the last output
        self._goaway_id = MOST_ID  # streams with higher ids are ignored
        self._is_ending = False  # a GOAWAY was sent or received
        self._has_ended = False
        self._greet(limits)

    def _greet(self, limits: Limits) -> None:
        settings = {
            INITIAL_WINDOW_SIZE: limits.stream_window,
            MAX_FRAME_SIZE: MOST_RECEIVED,
            MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
        }
        if self._is_client:
            self._out.append(PREFACE)
            settings[ENABLE_PUSH] = 0
        else:
            settings[MAX_CONCURRENT_STREAMS] = limits.max_streams
            settings[NO_RFC7540_PRIORITIES] = 1
        self._out.append(settings_frame(settings))
        more = limits.connection_window - DEFAULT_WINDOW
        if more > 0:
            self._update_window(0, more)
            self._receive_window += more

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events = self._events
        if events:
            self._events = []
        return events

    @property
    def has_heard_nothing(self) -> bool:
        """Is this a server whose client has not begun with the preface yet?"""
        return self._in_preface

    @property
    def partial_unit(self) -> int:
        """The number of the frame or header block that has arrived in part, or 0. DATA frames do not count."""
        return self._units + 1 if self._rest or self._block_id else 0

    def _maybe_stream(self, stream_id: int) -> _Stream | None:
        """The open stream of this number. It is mostly the same as the last time: frames of one come together."""
        if self._latest.id != stream_id:
            found = self._streams.get(stream_id)
            if found is None:
                return None
            self._latest = found
        return self._latest

    # Receiving

    def receive_data(self, data: bytes) -> None:
        """Read received bytes, or a part of them if they hold very many frames: then `is_behind` is set.

        raises: EngineError if the peer broke the protocol; the connection has to end.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        self.is_behind = False
        self._bodies_left = BODIES_AT_ONCE
        at: i64 = 0  # compiled, a plain machine integer: a header has nine bytes, which are read one by one
        size: i64 = len(data)
        if self._in_preface:
            at = self._read_preface(data)
        while at < size:
            if self._body_left or self._padding_left:
                at = self._more_body(data, at)
                continue
            if self._bodies_left <= 0:
                self.is_behind = True
                break
            start = at + HEADER
            if start > size:
                break
            length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            kind, flags = data[at + 3], data[at + 4]
            stream_id = number(data, at + 5) & MOST_ID
            if length > MOST_OTHER:
                self._check_length(data, kind, length)
            end: i64 = start + length
            if kind == DATA and self._greeted and not (flags & PADDED and start == size and length):
                if self._block_id:
                    raise EngineError(_PROTOCOL, _WITHIN_BLOCK)
                at = self._begin_body(flags, stream_id, length, data, start)
                continue
            if end > size:
                break
            self._frame(kind, flags, stream_id, data[start:end])
            if not self._block_id:
                self._units += 1
            at = end
        if at < size:
            self._rest = data[at:]

    def _check_length(self, data: bytes, kind: int, length: int) -> None:
        """raises: EngineError if the frame that has begun is too large, or is no frame at all."""
        if length > MOST_RECEIVED or not self._greeted:
            stranger = maybe_not_http2(data) if self._is_client and not self._greeted else None
            raise stranger or EngineError(_SIZE, f"a frame of {length} bytes is larger than {MOST_RECEIVED}")
        if kind != DATA and not self._is_client:
            raise EngineError(_CALM, f"a frame of {length} bytes that is no DATA")

    @property
    def maybe_stranger(self) -> NotHttp2 | None:
        """What the peer speaks that has ended the connection before a whole frame, if that can be told."""
        return maybe_not_http2(self._rest) if self._is_client and not self._greeted else None

    @property
    def body_left(self) -> int:
        """Bytes yet to come of the DATA frame that has begun; 0 if a frame is to begin.

        -1 if another frame has come in part, or if padding follows: then whoever asks can't know what comes next.
        """
        return -1 if self._rest or self.is_behind or self._padding_left else self._body_left

    @property
    def body_of(self) -> int:
        """The stream of the DATA frame that has begun; 0 if nobody takes its bytes."""
        return self._body_id if self._body_id in self._streams else 0

    def skip_body(self, size: int) -> None:
        """Take note of bytes of that frame that are taken elsewhere: of all but its last one, which ends it here."""
        self._body_left -= size
        stream = self._maybe_stream(self._body_id)
        if stream is not None and stream.length >= 0:
            stream.received += size

    def _read_preface(self, data: bytes) -> int:
        if not PREFACE.startswith(data[: len(PREFACE)]):
            raise not_http2(data)
        if len(data) < len(PREFACE):
            self._rest = data
            return len(data)
        self._in_preface = False
        return len(PREFACE)

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block_id and kind != CONTINUATION:
            raise EngineError(_PROTOCOL, _WITHIN_BLOCK)
        if not self._greeted and (kind != SETTINGS or flags & ACK):
            said = f": {printable(payload[8:])}" if kind == GOAWAY else ""
            raise EngineError(_PROTOCOL, f"the first frame is not SETTINGS{said}")
        if kind == HEADERS:
            self._headers(flags, stream_id, payload)
        elif kind == WINDOW_UPDATE:
            self._window_update(stream_id, payload)
        elif kind == RST_STREAM:
            self._rst_stream(stream_id, payload)
        elif kind == CONTINUATION:
            self._continuation(flags, stream_id, payload)
        elif kind == PRIORITY:
            self._priority(stream_id, payload)
        else:
            self._connection_frame(kind, flags, stream_id, payload)

    def _connection_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id and kind in _OF_CONNECTION:
            raise EngineError(_PROTOCOL, "SETTINGS, PING or GOAWAY on a stream other than 0")
        if kind == SETTINGS:
            self._settings(flags, payload)
        elif kind == PING:
            self._ping(flags, payload)
        elif kind == GOAWAY:
            self._goaway(payload)
        elif kind == PUSH_PROMISE:
            raise EngineError(_PROTOCOL, "PUSH_PROMISE is not allowed")
        else:
            self.glitches += UNKNOWN_FRAME

    # Bodies

    def _begin_body(self, flags: int, stream_id: int, size: int, data: bytes, start: int) -> int:
        """Take in a DATA frame of `size` bytes, whose payload begins in `data` at `start`, as far as it has arrived.

        Answers where what follows begins: another frame, or padding.
        """
        begin, padding = start, 0
        if flags & PADDED:
            padding = data[start] + 1 if size else 1
            begin += 1
            if padding > size:
                raise EngineError(_PROTOCOL, "the padding is longer than its frame")
            self._pad(stream_id, padding)
        end = min(begin + size - padding, len(data))
        self._body(stream_id, size - padding, flags & END_STREAM != 0, data[begin:end])
        if padding:
            self.acknowledge(padding, stream_id)
        return end

    def _pad(self, stream_id: int, padding: int) -> None:
        """Take in the padding of a DATA frame, with the byte that says how much it is."""
        if padding > self._receive_window:
            raise EngineError(_FLOW, "more DATA than the connection's window allows")
        self._receive_window -= padding
        self._padding_left = padding - 1
        stream = self._maybe_stream(stream_id)
        if stream is not None:
            stream.receive_window -= padding  # below zero no more DATA is accepted

    def _body(self, stream_id: int, length: int, ends: bool, part: bytes) -> None:
        """Take in a DATA frame of `length` bytes, of which `part` has arrived."""
        self._units += 1
        self._bodies_left -= 1
        stream = self._maybe_stream(stream_id)
        if length > self._receive_window:
            raise EngineError(_FLOW, "more DATA than the connection's window allows")
        self._receive_window -= length
        if stream is None or stream.state >= AWAITING or length > stream.receive_window:
            self._body_fault(stream_id, stream, ends, length)
            stream = None  # its bytes are dropped
        elif not length and not ends:
            self.glitches += EMPTY_DATA
        if stream is not None:
            stream.receive_window -= length
        self._body_id = stream_id
        self._body_ends = ends
        self._body_is_tiny = length < TINY and not ends
        self._body_left = length - len(part)
        self._deliver(stream, part)

    def _more_body(self, data: bytes, at: int) -> int:
        if not self._body_left:
            end = min(at + self._padding_left, len(data))
            self._padding_left -= end - at
            return end
        end = min(at + self._body_left, len(data))
        self._body_left -= end - at
        self._deliver(self._maybe_stream(self._body_id), data[at:end])
        return end

    def _deliver(self, stream: _Stream | None, data: bytes) -> None:
        ends = self._body_ends and not self._body_left
        if stream is None:
            self.acknowledge(len(data), 0)
            return
        if not data and not ends:
            return
        if stream.length >= 0:
            stream.received += len(data)
            if stream.received > stream.length or (ends and stream.received != stream.length):
                self.acknowledge(len(data), 0)
                self._refuse(stream, _PROTOCOL, _WRONG_LENGTH)
                return
        if self._body_is_tiny:
            self._events.append(TinyReceived(stream.id, data, ends))
        else:
            self._events.append(DataReceived(stream.id, data, ends))
        if ends:
            self._move(stream, BODY_END)

    def _body_fault(self, stream_id: int, stream: _Stream | None, ends: bool, length: int) -> None:
        """Answer DATA on a stream that can't take it. raises: EngineError if it is a connection error."""
        if stream is None:
            self._on_no_stream(stream_id, "DATA")
            self._late_frame(stream_id, ends, length)
        elif stream.state >= AWAITING:
            self._fault(stream, BODY_END if ends else BODY)
        else:
            self._refuse(stream, _FLOW, "more DATA than its window allows")

    def _on_no_stream(self, stream_id: int, what: str) -> None:
        """Check a frame on a stream that is not open. raises: EngineError if it is a connection error."""
        if self._is_client:
            if not stream_id & 1 or stream_id >= self._next_id:
                raise EngineError(_PROTOCOL, f"{what} on a stream that was never opened")
            return  # we may have closed the stream while the frame was on its way
        if not stream_id & 1 or stream_id > self._last_id:
            raise EngineError(_PROTOCOL, f"{what} on a stream that was never opened")
        if stream_id not in self._strays:
            raise EngineError(
                ErrorCode.STREAM_CLOSED, f"{what} on a stream that the client has ended, reset or skipped"
            )

    def _late_frame(self, stream_id: int, ends: bool, length: int) -> None:
        """Count a frame of a closed stream: the peer may have sent it before it knew, but not for ever."""
        if ends and self._strays.discard(stream_id):
            self.tiny += LATE_END
        elif length < LATE_BULK:
            self.tiny += LATE_FRAME

    # Header lists

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        start, end = 0, len(payload)
        if flags & (PADDED | WITH_PRIORITY):
            if flags & PADDED:
                start, end = 1, end - (payload[0] if payload else 0)
            if flags & WITH_PRIORITY:
                start += 5
            if start > end:
                raise EngineError(_PROTOCOL, "HEADERS is shorter than its flags say")
            if flags & WITH_PRIORITY and number(payload, start - 5) & MOST_ID == stream_id:
                raise EngineError(_PROTOCOL, "a stream that depends on itself")
            payload = payload[start:end]
        if flags & END_HEADERS:
            self._whole_block(flags, stream_id, payload)
        elif not stream_id:
            raise EngineError(_PROTOCOL, "HEADERS on stream 0")
        else:
            self._block = bytearray(payload)
            self._block_id, self._block_flags, self._block_frames = stream_id, flags, 0
            self._block_size = len(payload)

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not self._block_id or stream_id != self._block_id:
            raise EngineError(_PROTOCOL, "CONTINUATION without a header block to continue")
        self._block_frames += 1
        self._block_size += len(payload)
        self._block += payload
        is_last = flags & END_HEADERS != 0
        if self._is_client:
            if len(payload) < LEAST_CONTINUATION and not is_last:
                self.glitches += SMALL_CONTINUATION
        elif self._block_frames > self._limits.max_continuations:
            raise EngineError(_CALM, "too many CONTINUATION frames")
        if self._block_dropped or len(self._block) > self._limits.header_list_bytes_hard:
            if not self._is_client:
                raise EngineError(_CALM, "a header block is too large")
            self._drop(bytes(self._block), 0, not self._block_dropped, is_last)
            self._block_dropped = True
            self._tell_dropped(stream_id)
        if is_last:
            block = _DROPPED if self._block_dropped else bytes(self._block)
            self._block, self._block_id = bytearray(), 0
            self._whole_block(self._block_flags, stream_id, block)
            self._block_dropped = False

    def _drop(self, part: bytes, at: int, is_start: bool, is_last: bool) -> None:
        """Decode a part of a dropped block for its effect on the table; an incomplete field waits in `_block`."""
        self.decoded += len(part) - at
        try:
            at = self._decoder.drop(part, at, is_start)
        except BadBlock as fault:
            raise EngineError(ErrorCode.COMPRESSION_ERROR, str(fault)) from fault
        if is_last and (at < len(part) or self._decoder.is_within_field):
            raise EngineError(ErrorCode.COMPRESSION_ERROR, "a header block ends within a field")
        self._block = bytearray(part[at:])

    def _whole_block(self, flags: int, stream_id: int, block: bytes) -> None:
        stream = self._maybe_stream(stream_id)
        ends = flags & END_STREAM != 0
        if stream is None:
            if self._is_client or not stream_id & 1 or stream_id <= self._last_id:
                self._on_no_stream(stream_id, "HEADERS")
                self._decode(block)  # keeps the decoder's table in step with the peer's
                self._bodies_left -= 1
                self._late_frame(stream_id, ends, 0)
                return
            self._new_request(stream_id, block, ends)
        elif stream.state >= HALF_CLOSED_REMOTE:
            self._fault(stream, HEAD_END if ends else HEAD)
            self._decode(block)
        elif stream.state >= AWAITING:
            self._response(stream, block, ends)
        else:
            self._last_list(stream, block, ends)

    def _new_request(self, stream_id: int, block: bytes, ends: bool) -> None:
        if len(self._streams) >= self._limits.max_streams and not self._pending_settings:
            raise EngineError(_PROTOCOL, "more open streams than MAX_CONCURRENT_STREAMS allows")
        self._last_id = stream_id
        stream = _Stream(stream_id, self._initial_send_window, self._initial_receive_window)
        head = self._header_list(self._known_lists, block, is_trailers=False)
        if stream_id > self._goaway_id:
            if not ends:
                self._strays.add(stream_id, self._last_id)
            return  # the peer knows from our GOAWAY that the stream is ignored
        self._streams[stream_id] = self._latest = stream
        stream.state = HALF_CLOSED_REMOTE if ends else OPEN
        if head is None or (ends and head.length > 0):
            self._refuse(stream, _PROTOCOL, self._malformed if head is None else _WRONG_LENGTH)
            return
        stream.length = head.length
        self._events.append(RequestReceived(stream_id, head.fields, ends))

    def _response(self, stream: _Stream, block: bytes, ends: bool) -> None:
        head = self._header_list(self._known_lists, block, is_trailers=False)
        if head is None:
            self._refuse(stream, _PROTOCOL, self._malformed)
        elif ends and head.is_informational:
            self._refuse(stream, _PROTOCOL, "an informational response with END_STREAM")
        elif head is TOO_LARGE:
            self._headers_dropped(stream, ends)
        elif not head.is_informational:
            if not ends:
                stream.length = head.length  # a response to HEAD has one and no body
            self._events.append(ResponseReceived(stream.id, head.fields, ends))
            if ends:
                self._move(stream, HEAD_END)
            else:
                stream.state = after(stream.state, HEAD)

    def _last_list(self, stream: _Stream, block: bytes, ends: bool) -> None:
        head = self._header_list(self._known_trailers, block, is_trailers=True)
        if head is TOO_LARGE and ends:
            self._headers_dropped(stream, ends)
        elif head is None:
            self._refuse(stream, _PROTOCOL, self._malformed)
        elif not ends:
            self._refuse(stream, _PROTOCOL, "trailers without END_STREAM")
        elif stream.length >= 0 and stream.received != stream.length:
            self._refuse(stream, _PROTOCOL, _WRONG_LENGTH)
        else:
            self._events.append(TrailersReceived(stream.id, head.fields, True))
            self._move(stream, TRAILERS)

    def _tell_dropped(self, stream_id: int) -> None:
        stream = self._maybe_stream(stream_id)
        if stream is not None and stream.state < HALF_CLOSED_REMOTE:
            limit = self._limits.header_list_bytes_hard
            self._events.append(HeadersDropped(stream_id, stream.state < AWAITING, limit, self._block_size))

    def _headers_dropped(self, stream: _Stream, ends: bool) -> None:
        if not self._block_dropped:
            self._tell_dropped(stream.id)
        if ends:
            self._move(stream, TRAILERS if stream.state < AWAITING else HEAD_END)
        else:
            self.reset_stream(stream.id)

    def _header_list(self, known: dict[bytes, HeaderList], block: bytes, is_trailers: bool) -> HeaderList | None:
        """The checked list; None if malformed, TOO_LARGE if dropped. raises: EngineError if it can't be decoded."""
        head = known.get(block)
        if head is not None:
            return head
        as_of = self._known_as_of
        fields = self._decode(block)
        if fields is None:
            return TOO_LARGE
        try:
            if is_trailers:
                head = checked_trailers(fields)
            else:
                head = checked_response(fields) if self._is_client else checked_request(fields)
        except Malformed as fault:
            self._malformed = str(fault)
            self.glitches += MALFORMED_HEAD
            return None
        size = sum([len(name) + len(value) for name, value in fields])
        if self._known_as_of == as_of and len(block) <= KEPT_BYTES and size <= KEPT_BYTES:
            make_room(known, KEPT)
            known[block] = head
        return head

    def _decode(self, block: bytes) -> tuple[Field, ...] | None:
        """The fields; None if they exceed the limit. raises: EngineError if it is a connection error."""
        fields: tuple[Field, ...] | None = None
        if not self._block_dropped:
            self.decoded += len(block)
            try:
                fields = self._decoder.decode(block)
            except BadBlock as fault:
                raise EngineError(ErrorCode.COMPRESSION_ERROR, str(fault)) from fault
            except TooLarge as excess:
                if not self._is_client:
                    raise EngineError(_CALM, str(excess)) from excess
                self._drop(block, excess.at, False, True)
        if self._known_as_of != self._decoder.changes:  # the same bytes may mean other fields now
            self._known_as_of = self._decoder.changes
            self._known_lists.clear()
            self._known_trailers.clear()
        return fields

    # Other frames

    def _window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise EngineError(_SIZE, "WINDOW_UPDATE must have 4 bytes")
        more = number(payload, 0) & MOST_ID
        self._events.append(WINDOW_UPDATED)
        if not stream_id:
            if not more:
                raise EngineError(_PROTOCOL, "WINDOW_UPDATE of 0 bytes")
            self._send_window += more
            if self._send_window > MOST_WINDOW:
                raise EngineError(_FLOW, "a flow-control window is too large")
            return
        stream = self._maybe_stream(stream_id)
        if stream is None:
            self._check_known(stream_id, "WINDOW_UPDATE")
        elif not more:
            self._refuse(stream, _PROTOCOL, "WINDOW_UPDATE of 0 bytes")
        elif stream.send_window + more > MOST_WINDOW:
            self._refuse(stream, _FLOW, "a flow-control window is too large")
        else:
            stream.send_window += more
            self._get_ready(stream)

    def _check_known(self, stream_id: int, what: str) -> None:
        """raises: EngineError if the stream was never opened. A frame on one that has closed is legal."""
        most = self._next_id - 1 if self._is_client else self._last_id
        if not stream_id & 1 or stream_id > most:
            raise EngineError(_PROTOCOL, f"{what} on a stream that was never opened")

    def _rst_stream(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise EngineError(_SIZE, "RST_STREAM must have 4 bytes")
        stream = self._maybe_stream(stream_id)
        if stream is None:
            self._check_known(stream_id, "RST_STREAM")
            self._bodies_left -= 1  # takes time of this turn; free, as the frame may have crossed the stream's end
            self._strays.discard(stream_id)
            return
        code = number(payload, 0)
        stream.state = CLOSED  # stops `_close` from adding it to the strays
        self._events.append(StreamReset(stream_id, code))
        self._close(stream, code, EndedBy.PEER)

    def _settings(self, flags: int, payload: bytes) -> None:
        if len(payload) % 6 or (flags & ACK and payload):
            raise EngineError(_SIZE, "SETTINGS has a wrong size")
        if flags & ACK:
            if not self._pending_settings:
                raise EngineError(_PROTOCOL, "an acknowledgement of SETTINGS that were not sent")
            self._windows_resized(self._pending_settings.popleft())
            return
        self._greeted = True
        # Of a setting that occurs twice the last value counts (RFC 9113 section 6.5.3).
        settings = {payload[at] << 8 | payload[at + 1]: number(payload, at + 2) for at in range(0, len(payload), 6)}
        self._apply(settings)
        self._events.append(SettingsReceived(settings))
        self._reply(frame(SETTINGS, ACK, 0))

    def _apply(self, settings: dict[int, int]) -> None:
        if settings.get(ENABLE_PUSH, 0) > (0 if self._is_client else 1):
            raise EngineError(_PROTOCOL, "ENABLE_PUSH has an invalid value")
        frame_most = settings.get(MAX_FRAME_SIZE, self._frame_most)
        if not LEAST_FRAME <= frame_most <= MOST_FRAME:
            raise EngineError(_PROTOCOL, "MAX_FRAME_SIZE has an invalid value")
        self._frame_most = min(frame_most, FRAME_BYTES)  # large frames would make other streams wait
        if HEADER_TABLE_SIZE in settings:
            self._encoder.resize(settings[HEADER_TABLE_SIZE])
        window = settings.get(INITIAL_WINDOW_SIZE, self._initial_send_window)
        if window > MOST_WINDOW:
            raise EngineError(_FLOW, "INITIAL_WINDOW_SIZE is too large")
        more, self._initial_send_window = window - self._initial_send_window, window
        if more:
            self._resized += len(self._streams)
            if self._resized > MOST_RESIZED:
                raise EngineError(_CALM, "INITIAL_WINDOW_SIZE changes too often")
            for stream in self._streams.values():
                stream.send_window += more
                if stream.send_window > MOST_WINDOW:
                    raise EngineError(_FLOW, "a flow-control window is too large")
                self._get_ready(stream)

    def _reply(self, data: bytes) -> None:
        self._replies += 1
        if self._replies > self._limits.max_queued_replies:
            raise EngineError(_CALM, "acknowledgements are not read")
        self._out.append(data)

    def _ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise EngineError(_SIZE, "PING must have 8 bytes")
        if flags & ACK:
            self._events.append(PingAcknowledged())
        else:
            self._events.append(PingReceived())
            self._reply(frame(PING, ACK, 0, payload))

    def _goaway(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise EngineError(_SIZE, "GOAWAY must have at least 8 bytes")
        last = number(payload, 0) & MOST_ID
        self._is_ending = True
        self._events.append(GoAwayReceived(last, number(payload, 4), payload[8:]))
        if self._is_client:
            for stream in list(self._streams.values()):
                if stream.id > last:
                    self._close(stream, ErrorCode.REFUSED_STREAM, EndedBy.PEER)

    def _priority(self, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise EngineError(_PROTOCOL, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise EngineError(_SIZE, "PRIORITY must have 5 bytes")
        if number(payload, 0) & MOST_ID == stream_id:
            raise EngineError(_PROTOCOL, "a stream that depends on itself")
        self.glitches += PRIORITY_FRAME

    # Ends of streams

    def _refuse(self, stream: _Stream, code: ErrorCode, fault: str) -> None:
        """Reset a stream for an error of the peer's. fault: what the peer sent that is wrong."""
        self._out.append(frame(RST_STREAM, 0, stream.id, code.to_bytes(4, "big")))
        self._close(stream, code, EndedBy.FAULT, fault)

    def _fault(self, stream: _Stream, what: int) -> None:
        """Answer an input that is illegal in the stream's state. raises: EngineError if it is a connection error."""
        if stream.state < HALF_CLOSED_REMOTE:
            self._refuse(stream, _PROTOCOL, fault_text(stream.state, what))
        elif self._is_client:
            self._refuse(stream, ErrorCode.STREAM_CLOSED, fault_text(stream.state, what))
        else:
            raise EngineError(ErrorCode.STREAM_CLOSED, fault_text(stream.state, what))

    def _move(self, stream: _Stream, what: int) -> None:
        state = stream.state = after(stream.state, what)
        if state == CLOSED:
            self._close(stream, 0)
        elif (
            state == HALF_CLOSED_REMOTE and self._is_client
        ):  # the response is complete, so the rest of the request is of no use
            self._out.append(frame(RST_STREAM, 0, stream.id, bytes(4)))
            self._close(stream, 0)

    def _close(self, stream: _Stream, code: int, by: EndedBy = BOTH, fault: str = "") -> None:
        del self._streams[stream.id]
        if self._latest is stream:
            self._latest = _NONE
        if stream.queued:
            self._queued -= stream.queued
            stream.queued = 0
        stream.queue = None
        if stream.state < HALF_CLOSED_REMOTE and not self._is_client:
            self._strays.add(stream.id, self._last_id)
        stream.state = CLOSED
        self._events.append(StreamClosed(stream.id, code, by, fault))

    # Out

    def data_to_send(self, amount: int = WRITE_SIZE) -> bytes:
        """Bytes to send: at least `amount` if so many are ready, and little more."""
        return b"".join(self.pieces_to_send(amount))

    def pieces_to_send(self, amount: int = WRITE_SIZE) -> list[bytes | memoryview]:
        """The same in pieces, which are those that `send_data` got."""
        if self._ready:
            self._take_turns(amount)
        pieces, self._out = self._out, []
        self._out_size = self._replies = self._resized = 0
        if self._is_ending and not self._streams and not self._has_ended:
            self._has_ended = True
            self._events.append(ConnectionClosed())
        return pieces

    @property
    def want_write(self) -> bool:
        """Might `data_to_send` return bytes?"""
        return bool(self._out) or bool(self._ready) or (self._is_ending and not self._streams and not self._has_ended)

    def send_request(
        self, head: Sequence[Field], own: Sequence[Field] = (), more: Sequence[Field] = (), *, end_stream: bool = False
    ) -> int:
        """Open a stream; returns its id. Fields are those of every request like this, of this one, and of its caller.

        raises: EngineError if no more streams can be opened.
        """
        stream = self._new_stream()
        self._send_block(stream, self._request_block(head, own, more), end_stream)
        return stream.id

    def send_call(self, head: Sequence[Field], own: Sequence[Field], more: Sequence[Field], body: bytes) -> int:
        """Open a stream with a whole request: as `send_request` and `send_data`, and framed as by `send_answer`."""
        stream = self._new_stream()
        block = self._request_block(head, own, more)
        size = len(body)
        if len(block) > SMALL_BLOCK or not self._fits(stream, size):
            self._send_block(stream, block, False)
            self.send_data(stream.id, body, end_stream=True)
        else:
            of = stream.id.to_bytes(4, "big")
            self._send_whole(stream, [_HEADS[len(block)], of, block, _LAST_BODIES[size], of, body], size)
        return stream.id

    def _new_stream(self) -> _Stream:
        stream_id = self._next_id
        if self._is_ending or stream_id > MOST_ID:
            raise EngineError(ErrorCode.REFUSED_STREAM, "no more streams can be opened on this connection")
        self._next_id += 2
        stream = self._streams[stream_id] = _Stream(stream_id, self._initial_send_window, self._initial_receive_window)
        return stream

    def _request_block(self, head: Sequence[Field], own: Sequence[Field], more: Sequence[Field]) -> bytes:
        block = self._encoder.encode(head)
        if own:
            block += self._encoder.encode(own)
        return block + self._encoder.encode_chosen(more) if more else block

    def send_answer(
        self, stream_id: int, head: Sequence[Field], body: bytes, status: Sequence[Field], own: Sequence[Field] = ()
    ) -> None:
        """Send a whole answer: its header list, its body, its trailers. raises: EngineError if the stream is not open.

        status, own: trailers of every answer like this, and of this one. A small answer is framed in one piece, which
        costs half of what its three frames cost one by one.
        """
        stream = self._open(stream_id)
        size = len(body)
        if not self._fits(stream, size):
            self.send_response(stream_id, head)
            self.send_data(stream_id, body)
            self.send_trailers(stream_id, (*status, *own))
            return
        first, last = self._encoder.encode(head), self._encoder.encode(status)
        if own:
            last = last + self._encoder.encode(own)  # `+=` would not know that these are bytes, once it is compiled
        if len(first) > SMALL_BLOCK or len(last) > SMALL_BLOCK:
            self._send_block(stream, first, False)
            self.send_data(stream_id, body)
            self._send_block(stream, last, True)
            return
        of = stream_id.to_bytes(4, "big")
        frames = [_HEADS[len(first)], of, first, _BODIES[size], of, body, _ENDS[len(last)], of, last]
        self._send_whole(stream, frames, size)

    def send_response(
        self, stream_id: int, head: Sequence[Field], *, end_stream: bool = False, repeats: bool = False
    ) -> None:
        """Send a response's header list. raises: EngineError if the stream is not open.

        repeats: as of `Encoder.encode`.
        """
        self._send_block(self._open(stream_id), self._encoder.encode(head, repeats), end_stream)

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool = False) -> None:
        """Send a part of a body, or queue it. raises: EngineError if the stream is not open."""
        stream = self._open(stream_id)
        size = len(data)
        if self._fits(stream, size):  # the common case
            self._out.append(frame_header(size, DATA, END_STREAM if end_stream else 0, stream_id))
            self._out.append(data)
            self._count_sent(stream, size)
            if end_stream:
                stream.ends = True
                self._move(stream, ALL_SENT)
            return
        if stream.queue is None:
            stream.queue = deque()
        if size:
            stream.queue.append(data)
            stream.queued += size
            self._queued += size
        stream.ends = end_stream
        self._get_ready(stream)

    def _fits(self, stream: _Stream, size: int) -> bool:
        """Can a body of `size` bytes be framed at once?"""
        return (
            stream.queue is None
            and size <= SMALL
            and size <= stream.send_window
            and size <= self._send_window
            and self._out_size <= WRITE_SIZE
        )

    def _send_whole(self, stream: _Stream, frames: list[bytes], size: int) -> None:
        """Send the last frames of a stream, whose body has `size` bytes and fits."""
        self._out.append(b"".join(frames))
        self._count_sent(stream, size)
        stream.ends = True
        self._move(stream, ALL_SENT)

    def _count_sent(self, stream: _Stream, size: int) -> None:
        self._out_size += size
        stream.send_window -= size
        self._send_window -= size

    def send_trailers(self, stream_id: int, fields: Sequence[Field]) -> None:
        """End the stream with trailers, after what is queued. raises: EngineError if the stream is not open."""
        stream = self._open(stream_id)
        if stream.queue is None:
            self._send_block(stream, self._encoder.encode(fields), True)
        else:
            stream.trailers = fields
            self._get_ready(stream)

    def reset_stream(self, stream_id: int, code: int = ErrorCode.CANCEL) -> None:
        """Send RST_STREAM. raises: EngineError if the stream is not open."""
        stream = self._maybe_stream(stream_id)
        if stream is None:
            raise EngineError(ErrorCode.STREAM_CLOSED, "the stream has ended")
        self._out.append(frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))
        self._close(stream, code, EndedBy.US)

    def acknowledge(self, amount: int, stream_id: int, missing: int = -1) -> None:
        """Return `amount` consumed bytes to the window of the connection and, while it is open, of the stream.

        missing: bytes that are still to come of all that the stream is to bring; negative: nobody knows. What needs no
        more window gets none: an update costs one side a write and the other a read.
        """
        self._unacknowledged += amount
        if self._unacknowledged >= self._update_at:
            self._update_window(0, self._unacknowledged)
            self._receive_window += self._unacknowledged
            self._unacknowledged = 0
        if not stream_id:
            return
        stream = self._maybe_stream(stream_id)
        if stream is not None and stream.state < HALF_CLOSED_REMOTE:
            stream.unacknowledged += amount
            suffices = 0 <= missing <= stream.receive_window - MOST_PADDING
            if stream.unacknowledged >= self._update_stream_at and not suffices:
                self._update_window(stream_id, stream.unacknowledged)
                stream.receive_window += stream.unacknowledged
                stream.unacknowledged = 0

    def resize_windows(self, size: int) -> bool:
        """Announce an INITIAL_WINDOW_SIZE of `size` bytes; it changes open streams too (RFC 9113 section 6.9.2).

        returns: False, having done nothing, while the peer has not acknowledged the last change.
        """
        if self._pending_settings:
            return False
        self._out.append(settings_frame({INITIAL_WINDOW_SIZE: size}))
        self._pending_settings.append(size)
        return True

    def _windows_resized(self, size: int) -> None:
        """The peer has acknowledged this INITIAL_WINDOW_SIZE."""
        more, self._initial_receive_window = size - self._initial_receive_window, size
        if not more:
            return
        self._update_stream_at = size // 2
        for stream in self._streams.values():
            stream.receive_window += more
            self.acknowledge(0, stream.id)  # a smaller window may make a WINDOW_UPDATE due

    def queued_body_size(self, stream_id: int = 0) -> int:
        """Bytes that wait for window or for their turn, of one stream or of all."""
        if not stream_id:
            return self._queued
        stream = self._maybe_stream(stream_id)
        return 0 if stream is None else stream.queued

    def drop_output(self) -> None:
        """Nothing is sent any more: keep nothing that was to be."""
        self._out.clear()
        self._ready.clear()
        self._streams.clear()  # so that calls that have not heard of the end yet can add nothing
        self._latest = _NONE
        self._queued = 0

    def copy_queued(self, stream_id: int) -> None:
        """Keep no memory of others for what a stream's peer has not taken yet."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.queue is not None:
            stream.queue = deque([bytes(chunk) for chunk in stream.queue])

    def ping(self) -> None:
        self._out.append(frame(PING, 0, 0, bytes(8)))

    def send_shutdown_notice(self) -> None:
        """Send the first GOAWAY of two: the client opens no more streams, and those on their way are still served."""
        self._out.append(goaway_frame(MOST_ID, 0))

    def send_goaway(self) -> None:
        """Send the last GOAWAY: streams that have not arrived are ignored. The connection ends with its last stream."""
        self._goaway_id = self._last_id
        self._is_ending = True
        self._out.append(goaway_frame(self._last_id, 0))

    def _open(self, stream_id: int) -> _Stream:
        stream = self._maybe_stream(stream_id)
        if stream is None or stream.ends or stream.trailers is not None:
            raise EngineError(ErrorCode.STREAM_CLOSED, "the stream has ended")
        return stream

    def _update_window(self, stream_id: int, more: int) -> None:
        self._out.append(frame(WINDOW_UPDATE, 0, stream_id, more.to_bytes(4, "big")))

    def _send_block(self, stream: _Stream, block: bytes, ends: bool) -> None:
        most = self._frame_most
        first = block if len(block) <= most else block[:most]
        flags = (END_STREAM if ends else 0) | (END_HEADERS if len(block) <= most else 0)
        self._out.append(frame_header(len(first), HEADERS, flags, stream.id))
        self._out.append(first)
        for at in range(most, len(block), most):
            last = at + most >= len(block)
            self._out.append(frame(CONTINUATION, END_HEADERS if last else 0, stream.id, block[at : at + most]))
        if ends:
            stream.ends = True
            self._move(stream, ALL_SENT)

    def _get_ready(self, stream: _Stream) -> None:
        if not stream.is_ready and stream.queue is not None and (stream.send_window > 0 or not stream.queued):
            stream.is_ready = True
            self._ready.append(stream)

    def _take_turns(self, amount: int) -> None:
        """Frame bodies: one frame of a stream, then one of the next."""
        ready = self._ready
        while ready and self._out_size < amount:
            stream = ready[0]
            if stream.queued and stream.send_window > 0 and self._send_window <= 0:
                return
            ready.popleft()
            stream.is_ready = False
            if stream.state != CLOSED:
                if not stream.queued or stream.send_window > 0:
                    self._send_body(stream)
                self._get_ready(stream)

    def _send_body(self, stream: _Stream) -> None:
        """Send one frame of the stream's body, and the stream's end if the body ends with it."""
        queue = stream.queue
        if queue is None:
            return
        most = min(self._frame_most, self._send_window, stream.send_window)
        parts: list[bytes | memoryview] = []
        size = 0
        while queue and size < most:
            chunk = queue.popleft()
            left = most - size
            if len(chunk) > left:
                whole = memoryview(chunk)
                queue.appendleft(whole[left:])
                chunk = whole[:left]
            parts.append(chunk)
            size += len(chunk)
        stream.queued -= size
        stream.send_window -= size
        self._queued -= size
        self._send_window -= size
        self._out_size += size
        is_last = not stream.queued
        ends = stream.ends and is_last
        if size or ends:
            self._out.append(frame_header(size, DATA, END_STREAM if ends else 0, stream.id))
            self._out += parts
        if is_last:
            stream.queue = None
            trailers, stream.trailers = stream.trailers, None
            if trailers is not None:
                self._send_block(stream, self._encoder.encode(trailers), True)
            elif ends:
                self._move(stream, ALL_SENT)


def server_engine(limits: Limits) -> Engine:
    """A connection that a client has opened; its first bytes to send are ready."""
    return Engine(limits, is_client=False)


def client_engine(limits: Limits) -> Engine:
    """A connection that we have opened; its first bytes to send are ready."""
    return Engine(limits, is_client=True)
