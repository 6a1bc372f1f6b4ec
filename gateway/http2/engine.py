"""One end of an HTTP/2 connection, sans-IO: frames, stream states and flow control. Source: RFC 9113.

Bytes go in by `receive_data` and come out by `data_to_send`; both leave `events`. It is made for many small calls: they
are framed as they are given, and only a body that is large, or has no window, waits in its stream and takes turns with
others. Whoever took received bytes gives their window back with `acknowledge`. What makes the connection useless is
raised as `EngineError`; what spoils a stream only resets that. Limits that need a clock are the owner's: see
`glitches`, `unit`, and the events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from gateway.bounded import make_room
from gateway.http2.frames import (
    ACK,
    BOTH,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
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
    frame_head,
    goaway_frame,
    number,
    settings_frame,
)
from gateway.http2.header_lists import TOO_LARGE, Head, Malformed, request_head, response_head, trailers_head
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
    HEAD,
    HEAD_END,
    NEXT,
    OPEN,
    RECEIVED,
    TRAILERS,
    Strays,
    fault_text,
)

WRITE_SIZE: Final = 262_144  # bytes; more than this is given by several calls of `data_to_send`
SMALL: Final = 4096 + 5  # bytes of a body that are framed at once, not in turns
FRAME_BYTES: Final = 65_536  # in one frame, either way: some per MiB cost little, and each is one turn
MOST_RESIZED: Final = 20_000  # windows that the peer's SETTINGS may change in one go: some ms of work

_OF_CONNECTION: Final = frozenset((SETTINGS, PING, GOAWAY))
_PROTOCOL: Final = ErrorCode.PROTOCOL_ERROR
_SIZE: Final = ErrorCode.FRAME_SIZE_ERROR
_FLOW: Final = ErrorCode.FLOW_CONTROL_ERROR
_CALM: Final = ErrorCode.ENHANCE_YOUR_CALM
_DROPPED: Final = b"\x80"  # stands for a block that was dropped: no block that means anything


class _Stream:
    """What the engine knows of one."""

    def __init__(self, stream_id: int, window: int, allowance: int) -> None:
        self.id = stream_id
        self.window = window  # bytes that we may send
        self.allowance = allowance  # bytes that the peer may send
        self.unacknowledged = 0  # bytes that were taken, and no WINDOW_UPDATE sent for them
        self.state = AWAITING
        self.length = -1  # content-length, until it is wrong
        self.received = 0  # bytes of body
        self.queue: deque[bytes | memoryview] | None = None
        self.queued = 0  # bytes in it
        self.ends = False  # END_STREAM was sent, or will be with the last byte of the queue
        self.trailers: Sequence[Field] | None = None  # after it
        self.is_ready = False  # has a place among those that take turns


class Engine:
    """Of either role; made by `server_engine` or `client_engine`."""

    def __init__(self, limits: Limits, is_client: bool) -> None:
        self.glitches = 0  # frames that an honest peer has little reason to send; the owner sets it back
        self.tiny = 0  # tokens of `Limits.tiny` that frames of closed streams cost; likewise
        self.is_behind = False  # is there more to read of what has come? `receive_data` reads on, also with nothing new
        self.decoded = 0  # bytes of header blocks that had to be decoded; likewise
        self._limits = limits
        self._is_client = is_client
        self._events: list[Event] = []
        self._streams: dict[int, _Stream] = {}
        self._next_id = 1
        self._last_id = 0  # the highest stream that the peer has opened
        self._strays = Strays()
        # In
        self._decoder = Decoder(limits.header_list_bytes_hard)
        self._heads: dict[bytes, Head] = {}  # by their blocks, while the decoder's table stays as it is
        self._trailers: dict[bytes, Head] = {}
        self._heads_as_of = 0
        self._rest = b""  # a frame that has not come whole
        self._units = 0  # frames and header blocks that have
        self._in_preface = not is_client
        self._greeted = False  # the peer's first SETTINGS came
        self._block = bytearray()  # a header block that has not come whole
        self._block_id = 0  # its stream, or 0
        self._block_flags = 0
        self._block_frames = 0
        self._block_size = 0  # bytes that have come of it
        self._block_dropped = False  # it is larger than any that is kept
        self._body_left = 0  # bytes of a DATA frame that are still to come ...
        self._body_id = 0  # ... on this stream
        self._body_ends = self._body_is_tiny = False
        self._bodies_left = 0  # DATA and late frames that are still read in this go
        self._allowance = FIRST_WINDOW  # bytes that the peer may send on the connection
        self._unacknowledged = 0
        self._unacknowledged_most = limits.connection_window // 2  # what the peer is told of at once
        self._unacknowledged_most_stream = limits.stream_window // 2
        self._stream_window = (
            limits.stream_window
        )  # what the peer has on a new stream, by the last acknowledged SETTINGS
        self._pending_settings = deque((limits.stream_window,))  # INITIAL_WINDOW_SIZE of each that is unacknowledged
        # Out
        self._encoder = Encoder()
        self._out: list[bytes | memoryview] = []
        self._out_size = 0  # bytes of bodies in it
        self._window = FIRST_WINDOW  # bytes that we may send on the connection
        self._first_window = FIRST_WINDOW  # and on a new stream
        self._resized = 0  # windows of streams by the peer's SETTINGS, since output was taken
        self._frame_most = LEAST_FRAME  # bytes that one may have
        self._ready: deque[_Stream] = deque()  # with a body to send
        self._queued = 0  # bytes of those
        self._replies = 0  # to SETTINGS and PING, since output was taken
        self._goaway_id = MOST_ID  # streams beyond are not looked at
        self._is_ending = False  # a GOAWAY went or came
        self._has_ended = False
        self._greet(limits)

    def _greet(self, limits: Limits) -> None:
        settings = {
            INITIAL_WINDOW_SIZE: limits.stream_window,
            MAX_FRAME_SIZE: FRAME_BYTES,
            MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
        }
        if self._is_client:
            self._out.append(PREFACE)
            settings[ENABLE_PUSH] = 0
        else:
            settings[MAX_CONCURRENT_STREAMS] = limits.max_streams
            settings[NO_RFC7540_PRIORITIES] = 1
        self._out.append(settings_frame(settings))
        more = limits.connection_window - FIRST_WINDOW
        if more > 0:
            self._update_window(0, more)
            self._allowance += more

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events = self._events
        if events:
            self._events = []
        return events

    @property
    def unit(self) -> int:
        """The number of the frame or header block that has come in part, or 0. Parts of bodies don't count."""
        return self._units + 1 if self._rest or self._block_id else 0

    # In

    def receive_data(self, data: bytes) -> None:
        """Read a part, if it is very many frames; see `is_behind`. raises: EngineError."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        self.is_behind = False
        self._bodies_left = BODIES_AT_ONCE
        at, size = 0, len(data)
        if self._in_preface:
            at = self._read_preface(data)
        while at < size:
            if self._body_left:
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
            if length > FRAME_BYTES:
                raise EngineError(_SIZE, f"a frame of {length} bytes is larger than {FRAME_BYTES}")
            end = start + length
            if kind == DATA and not flags & PADDED and not self._block_id and self._greeted:
                at = min(end, size)
                self._body(stream_id, length, flags & END_STREAM != 0, data[start:at])
                continue
            if end > size:
                break
            self._frame(kind, flags, stream_id, data[start:end])
            if not self._block_id:
                self._units += 1
            at = end
        if at < size:
            self._rest = data[at:]

    def _read_preface(self, data: bytes) -> int:
        if not PREFACE.startswith(data[: len(PREFACE)]):
            raise EngineError(_PROTOCOL, "that is not how an HTTP/2 connection begins")
        if len(data) < len(PREFACE):
            self._rest = data
            return len(data)
        self._in_preface = False
        return len(PREFACE)

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block_id and kind != CONTINUATION:
            raise EngineError(_PROTOCOL, "a header block was not continued")
        if not self._greeted and (kind != SETTINGS or flags & ACK):
            raise EngineError(_PROTOCOL, "the first frame is not SETTINGS")
        if kind == HEADERS:
            self._headers(flags, stream_id, payload)
        elif kind == DATA:
            self._padded_body(flags, stream_id, payload)
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
            raise EngineError(_PROTOCOL, "a frame of the connection on a stream")
        if kind == SETTINGS:
            self._settings(flags, payload)
        elif kind == PING:
            self._ping(flags, payload)
        elif kind == GOAWAY:
            self._goaway(payload)
        elif kind == PUSH_PROMISE:
            raise EngineError(_PROTOCOL, "PUSH_PROMISE, which is not allowed here")
        else:
            self.glitches += UNKNOWN_FRAME  # to be ignored

    # Bodies

    def _body(self, stream_id: int, length: int, ends: bool, part: bytes) -> None:
        """A DATA frame of `length` bytes, of which `part` is here."""
        self._units += 1
        self._bodies_left -= 1
        stream = self._streams.get(stream_id)
        if length > self._allowance:
            raise EngineError(_FLOW, "more DATA than the connection's window allows")
        self._allowance -= length
        if stream is None or stream.state >= AWAITING or length > stream.allowance:
            self._body_fault(stream_id, stream, ends, length)
            stream = None  # its bytes are dropped
        elif not length and not ends:
            self.glitches += EMPTY_DATA
        if stream is not None:
            stream.allowance -= length
        self._body_id = stream_id
        self._body_ends = ends
        self._body_is_tiny = length < TINY and not ends
        self._body_left = length - len(part)
        self._deliver(stream, part)

    def _more_body(self, data: bytes, at: int) -> int:
        end = min(at + self._body_left, len(data))
        self._body_left -= end - at
        self._deliver(self._streams.get(self._body_id), data[at:end])
        return end

    def _padded_body(self, flags: int, stream_id: int, payload: bytes) -> None:
        padding = payload[0] + 1 if payload else 1
        length = len(payload) - padding
        if length < 0:
            raise EngineError(_PROTOCOL, "the padding is longer than its frame")
        if padding > self._allowance:
            raise EngineError(_FLOW, "more DATA than the connection's window allows")
        self._allowance -= padding
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.allowance -= padding  # it may fall below zero, where no more DATA is let in
        self._body(stream_id, length, flags & END_STREAM != 0, payload[1 : 1 + length])
        self.acknowledge(padding, stream_id)

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
                self._refuse(stream, _PROTOCOL)
                return
        if self._body_is_tiny:
            self._events.append(TinyReceived(stream.id, data, ends))
        else:
            self._events.append(DataReceived(stream.id, data, ends))
        if ends:
            self._move(stream, BODY_END)

    def _body_fault(self, stream_id: int, stream: _Stream | None, ends: bool, length: int) -> None:
        """DATA on a stream that can't take it. raises: EngineError if the peer must know better."""
        if stream is None:
            self._on_no_stream(stream_id, "DATA")
            self._late_frame(stream_id, ends, length)
        elif stream.state >= AWAITING:
            self._fault(stream, BODY_END if ends else BODY)
        else:
            self._refuse(stream, _FLOW)

    def _on_no_stream(self, stream_id: int, what: str) -> None:
        """A frame on a stream that is not open. raises: EngineError if the peer must know better."""
        if self._is_client:
            if not stream_id & 1 or stream_id >= self._next_id:
                raise EngineError(_PROTOCOL, f"{what} on a stream that was never opened")
            return  # we may have closed it just now
        if not stream_id & 1 or stream_id > self._last_id:
            raise EngineError(_PROTOCOL, f"{what} on a stream that was never opened")
        if stream_id not in self._strays:
            raise EngineError(
                ErrorCode.STREAM_CLOSED, f"{what} on a stream that the client has ended, reset or skipped"
            )

    def _late_frame(self, stream_id: int, ends: bool, length: int) -> None:
        """Count a frame of a closed stream: a peer may send what it had begun to, and not go on for ever."""
        if ends and self._strays.discard(stream_id):
            self.tiny += LATE_END
        elif length < LATE_BULK:
            self.tiny += LATE_FRAME

    # Heads

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        start, end = 0, len(payload)
        if flags & (PADDED | WITH_PRIORITY):
            if flags & PADDED:
                start, end = 1, end - (payload[0] if payload else 0)
            if flags & WITH_PRIORITY:
                start += 5
            if start > end:
                raise EngineError(_PROTOCOL, "HEADERS without room for what its flags say")
            if flags & WITH_PRIORITY and number(payload, start - 5) & MOST_ID == stream_id:
                raise EngineError(_PROTOCOL, "a stream that depends on itself")
            payload = payload[start:end]
        if flags & END_HEADERS:
            self._whole_block(flags, stream_id, payload)
        elif not stream_id:
            raise EngineError(_PROTOCOL, "HEADERS on no stream")
        else:
            self._block = bytearray(payload)
            self._block_id, self._block_flags, self._block_frames = stream_id, flags, 0
            self._block_size = len(payload)

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not self._block_id or stream_id != self._block_id:
            raise EngineError(_PROTOCOL, "CONTINUATION of nothing")
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
                raise EngineError(_CALM, "too large a header block")
            self._drop(bytes(self._block), 0, not self._block_dropped, is_last)
            self._block_dropped = True
            self._tell_dropped(stream_id)
        if is_last:
            block = _DROPPED if self._block_dropped else bytes(self._block)
            self._block, self._block_id = bytearray(), 0
            self._whole_block(self._block_flags, stream_id, block)
            self._block_dropped = False

    def _drop(self, part: bytes, at: int, is_start: bool, is_last: bool) -> None:
        """Take in what of a block's part matters to later blocks; what has not come whole of it waits in `_block`."""
        self.decoded += len(part) - at
        try:
            at = self._decoder.drop(part, at, is_start)
        except BadBlock as fault:
            raise EngineError(ErrorCode.COMPRESSION_ERROR, str(fault)) from fault
        if is_last and (at < len(part) or self._decoder.is_within_field):
            raise EngineError(ErrorCode.COMPRESSION_ERROR, "a header block ends within a field")
        self._block = bytearray(part[at:])

    def _whole_block(self, flags: int, stream_id: int, block: bytes) -> None:
        stream = self._streams.get(stream_id)
        ends = flags & END_STREAM != 0
        if stream is None:
            if self._is_client or not stream_id & 1 or stream_id <= self._last_id:
                self._on_no_stream(stream_id, "HEADERS")
                self._decode(block)  # or later blocks would mean something else
                self._bodies_left -= 1
                self._late_frame(stream_id, ends, 0)
                return
            self._new_request(stream_id, block, ends)
        elif stream.state >= RECEIVED:
            self._fault(stream, HEAD_END if ends else HEAD)
            self._decode(block)
        elif stream.state >= AWAITING:
            self._response(stream, block, ends)
        else:
            self._last_head(stream, block, ends)

    def _new_request(self, stream_id: int, block: bytes, ends: bool) -> None:
        if len(self._streams) >= self._limits.max_streams and not self._pending_settings:
            raise EngineError(_PROTOCOL, "more streams at once than the client knows that it may open")
        self._last_id = stream_id
        stream = _Stream(stream_id, self._first_window, self._stream_window)
        head = self._head(self._heads, block, is_trailers=False)
        if stream_id > self._goaway_id:
            if not ends:
                self._strays.add(stream_id, self._last_id)
            return  # the peer knows by our GOAWAY that it is not looked at
        self._streams[stream_id] = stream
        stream.state = RECEIVED if ends else OPEN
        if head is None or (ends and head.length > 0):
            self._refuse(stream, _PROTOCOL)
            return
        stream.length = head.length
        self._events.append(RequestReceived(stream_id, head.fields, ends))

    def _response(self, stream: _Stream, block: bytes, ends: bool) -> None:
        head = self._head(self._heads, block, is_trailers=False)
        if head is None or (ends and head.is_informational):
            self._refuse(stream, _PROTOCOL)
        elif head is TOO_LARGE:
            self._headers_dropped(stream, ends)
        elif not head.is_informational:
            if not ends:
                stream.length = head.length  # of an answer without a body it may be what another has
            self._events.append(ResponseReceived(stream.id, head.fields, ends))
            if ends:
                self._move(stream, HEAD_END)
            else:
                stream.state = NEXT[stream.state + HEAD]

    def _last_head(self, stream: _Stream, block: bytes, ends: bool) -> None:
        head = self._head(self._trailers, block, is_trailers=True)
        if head is TOO_LARGE and ends:
            self._headers_dropped(stream, ends)
        elif head is None or not ends or (stream.length >= 0 and stream.received != stream.length):
            self._refuse(stream, _PROTOCOL)
        else:
            self._events.append(TrailersReceived(stream.id, head.fields, True))
            self._move(stream, TRAILERS)

    def _tell_dropped(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None and stream.state < RECEIVED:
            limit = self._limits.header_list_bytes_hard
            self._events.append(HeadersDropped(stream_id, stream.state < AWAITING, limit, self._block_size))

    def _headers_dropped(self, stream: _Stream, ends: bool) -> None:
        if not self._block_dropped:
            self._tell_dropped(stream.id)
        if ends:
            self._move(stream, TRAILERS if stream.state < AWAITING else HEAD_END)
        else:
            self.reset_stream(stream.id)

    def _head(self, known: dict[bytes, Head], block: bytes, is_trailers: bool) -> Head | None:
        """None if it is malformed, TOO_LARGE if it was dropped. raises: EngineError if it can't be decoded."""
        head = known.get(block)
        if head is not None:
            return head
        as_of = self._heads_as_of
        fields = self._decode(block)
        if fields is None:
            return TOO_LARGE
        try:
            if is_trailers:
                head = trailers_head(fields)
            else:
                head = response_head(fields) if self._is_client else request_head(fields)
        except Malformed:
            self.glitches += MALFORMED_HEAD
            return None
        size = sum([len(name) + len(value) for name, value in fields])
        if self._heads_as_of == as_of and len(block) <= KEPT_BYTES and size <= KEPT_BYTES:
            make_room(known, KEPT)
            known[block] = head
        return head

    def _decode(self, block: bytes) -> tuple[Field, ...] | None:
        """None if the list is too large. raises: EngineError if it can't be decoded, or the peer must know better."""
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
        if self._heads_as_of != self._decoder.changes:  # what other blocks say may be something else now
            self._heads_as_of = self._decoder.changes
            self._heads.clear()
            self._trailers.clear()
        return fields

    # Other frames

    def _window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise EngineError(_SIZE, "WINDOW_UPDATE has 4 bytes")
        more = number(payload, 0) & MOST_ID
        self._events.append(WINDOW_UPDATED)
        if not stream_id:
            if not more:
                raise EngineError(_PROTOCOL, "WINDOW_UPDATE by nothing")
            self._window += more
            if self._window > MOST_WINDOW:
                raise EngineError(_FLOW, "too large a window")
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "WINDOW_UPDATE")
        elif not more:
            self._refuse(stream, _PROTOCOL)
        elif stream.window + more > MOST_WINDOW:
            self._refuse(stream, _FLOW)
        else:
            stream.window += more
            self._get_ready(stream)

    def _check_known(self, stream_id: int, what: str) -> None:
        """raises: EngineError if the stream has never been open; what comes on one that was, may."""
        most = self._next_id - 1 if self._is_client else self._last_id
        if not stream_id & 1 or stream_id > most:
            raise EngineError(_PROTOCOL, f"{what} on a stream that was never opened")

    def _rst_stream(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise EngineError(_SIZE, "RST_STREAM has 4 bytes")
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "RST_STREAM")
            self._bodies_left -= 1  # it is free, since it may have crossed the stream's end, but waits for its turn
            self._strays.discard(stream_id)
            return
        code = number(payload, 0)
        stream.state = CLOSED  # for the peer; it sends no more on it
        self._events.append(StreamReset(stream_id, code))
        self._close(stream, code, EndedBy.PEER)

    def _settings(self, flags: int, payload: bytes) -> None:
        if len(payload) % 6 or (flags & ACK and payload):
            raise EngineError(_SIZE, "SETTINGS of a wrong size")
        if flags & ACK:
            if not self._pending_settings:
                raise EngineError(_PROTOCOL, "an acknowledgement of SETTINGS that were not sent")
            self._windows_resized(self._pending_settings.popleft())
            return
        self._greeted = True
        settings = {
            payload[at] << 8 | payload[at + 1]: number(payload, at + 2) for at in range(0, len(payload), 6)
        }  # of one that comes twice the last counts
        self._apply(settings)
        self._events.append(SettingsReceived(settings))
        self._reply(frame(SETTINGS, ACK, 0))

    def _apply(self, settings: dict[int, int]) -> None:
        if settings.get(ENABLE_PUSH, 0) > (0 if self._is_client else 1):
            raise EngineError(_PROTOCOL, "a bad ENABLE_PUSH")
        frame_most = settings.get(MAX_FRAME_SIZE, self._frame_most)
        if not LEAST_FRAME <= frame_most <= MOST_FRAME:
            raise EngineError(_PROTOCOL, "a bad MAX_FRAME_SIZE")
        self._frame_most = min(frame_most, FRAME_BYTES)  # bodies take turns by the frame
        if HEADER_TABLE_SIZE in settings:
            self._encoder.resize(settings[HEADER_TABLE_SIZE])
        window = settings.get(INITIAL_WINDOW_SIZE, self._first_window)
        if window > MOST_WINDOW:
            raise EngineError(_FLOW, "too large an INITIAL_WINDOW_SIZE")
        more, self._first_window = window - self._first_window, window
        if more:
            self._resized += len(self._streams)
            if self._resized > MOST_RESIZED:
                raise EngineError(_CALM, "windows are resized too often")
            for stream in self._streams.values():
                stream.window += more
                if stream.window > MOST_WINDOW:
                    raise EngineError(_FLOW, "too large a window")
                self._get_ready(stream)

    def _reply(self, data: bytes) -> None:
        self._replies += 1
        if self._replies > self._limits.max_queued_replies:
            raise EngineError(_CALM, "answers are not read")
        self._out.append(data)

    def _ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise EngineError(_SIZE, "PING has 8 bytes")
        if flags & ACK:
            self._events.append(PingAcknowledged())
        else:
            self._events.append(PingReceived())
            self._reply(frame(PING, ACK, 0, payload))

    def _goaway(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise EngineError(_SIZE, "GOAWAY has at least 8 bytes")
        last = number(payload, 0) & MOST_ID
        self._is_ending = True
        self._events.append(GoAwayReceived(last, number(payload, 4), payload[8:]))
        if self._is_client:
            for stream in list(self._streams.values()):
                if stream.id > last:
                    self._close(stream, ErrorCode.REFUSED_STREAM, EndedBy.PEER)

    def _priority(self, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise EngineError(_PROTOCOL, "PRIORITY on no stream")
        if len(payload) != 5:
            raise EngineError(_SIZE, "PRIORITY has 5 bytes")
        if number(payload, 0) & MOST_ID == stream_id:
            raise EngineError(_PROTOCOL, "a stream that depends on itself")
        self.glitches += PRIORITY_FRAME

    # Ends of streams

    def _refuse(self, stream: _Stream, code: ErrorCode) -> None:
        """Reset a stream for a fault of the peer's."""
        self._out.append(frame(RST_STREAM, 0, stream.id, code.to_bytes(4, "big")))
        self._close(stream, code, EndedBy.FAULT)

    def _fault(self, stream: _Stream, what: int) -> None:
        """The peer sent what can't come in the stream's state. raises: EngineError if it must know better."""
        if stream.state < RECEIVED:
            self._refuse(stream, _PROTOCOL)
        elif self._is_client:
            self._refuse(stream, ErrorCode.STREAM_CLOSED)
        else:
            raise EngineError(ErrorCode.STREAM_CLOSED, fault_text(stream.state, what))

    def _move(self, stream: _Stream, what: int) -> None:
        state = stream.state = NEXT[stream.state + what]
        if state == CLOSED:
            self._close(stream, 0)
        elif state == RECEIVED and self._is_client:  # the answer is whole: nobody waits for the rest of the request
            self._out.append(frame(RST_STREAM, 0, stream.id, bytes(4)))
            self._close(stream, 0)

    def _close(self, stream: _Stream, code: int, by: EndedBy = BOTH) -> None:
        del self._streams[stream.id]
        if stream.queued:
            self._queued -= stream.queued
            stream.queued = 0
        stream.queue = None
        if stream.state < RECEIVED and not self._is_client:
            self._strays.add(stream.id, self._last_id)
        stream.state = CLOSED
        self._events.append(StreamClosed(stream.id, code, by))

    # Out

    def data_to_send(self, amount: int = WRITE_SIZE) -> bytes:
        """At least `amount` bytes, if there are so many now, and little more."""
        if self._ready:
            self._take_turns(amount)
        data = b"".join(self._out)
        self._out.clear()
        self._out_size = self._replies = self._resized = 0
        if self._is_ending and not self._streams and not self._has_ended:
            self._has_ended = True
            self._events.append(ConnectionClosed())
        return data

    @property
    def want_write(self) -> bool:
        """Might `data_to_send` give anything?"""
        return bool(self._out) or bool(self._ready) or (self._is_ending and not self._streams and not self._has_ended)

    def send_request(self, head: Sequence[Field], more: Sequence[Field] = (), *, end_stream: bool = False) -> int:
        """Answers the new stream's id. head: what many requests begin with; see `Encoder.encode`.

        raises: EngineError if no more streams can be opened.
        """
        stream_id = self._next_id
        if self._is_ending or stream_id > MOST_ID:
            raise EngineError(ErrorCode.REFUSED_STREAM, "no more streams can be opened on this connection")
        self._next_id += 2
        stream = self._streams[stream_id] = _Stream(stream_id, self._first_window, self._stream_window)
        block = self._encoder.encode(head)
        if more:
            block += self._encoder.encode(more)
        self._send_block(stream, block, end_stream)
        return stream_id

    def send_response(self, stream_id: int, head: Sequence[Field], *, end_stream: bool = False) -> None:
        """raises: EngineError if the stream is not open."""
        self._send_block(self._open(stream_id), self._encoder.encode(head), end_stream)

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool = False) -> None:
        """raises: EngineError if the stream is not open."""
        stream = self._open(stream_id)
        size = len(data)
        if (
            stream.queue is None
            and size <= SMALL
            and size <= stream.window
            and size <= self._window
            and self._out_size <= WRITE_SIZE
        ):  # nearly always
            self._out.append(frame_head(size, DATA, END_STREAM if end_stream else 0, stream_id))
            self._out.append(data)
            self._out_size += size
            stream.window -= size
            self._window -= size
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

    def send_trailers(self, stream_id: int, fields: Sequence[Field]) -> None:
        """The last of a stream, after what is queued. raises: EngineError if the stream is not open."""
        stream = self._open(stream_id)
        if stream.queue is None:
            self._send_block(stream, self._encoder.encode(fields), True)
        else:
            stream.trailers = fields
            self._get_ready(stream)

    def reset_stream(self, stream_id: int, code: int = ErrorCode.CANCEL) -> None:
        """raises: EngineError if the stream is not open."""
        stream = self._streams.get(stream_id)
        if stream is None:
            raise EngineError(ErrorCode.STREAM_CLOSED, "the stream has ended")
        self._out.append(frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))
        self._close(stream, code, EndedBy.US)

    def acknowledge(self, amount: int, stream_id: int) -> None:
        """Give `amount` bytes of window back to the peer, on the connection and, while it is open, on the stream."""
        self._unacknowledged += amount
        if self._unacknowledged >= self._unacknowledged_most:
            self._update_window(0, self._unacknowledged)
            self._allowance += self._unacknowledged
            self._unacknowledged = 0
        stream = self._streams.get(stream_id)
        if stream is not None and stream.state < RECEIVED:
            stream.unacknowledged += amount
            if stream.unacknowledged >= self._unacknowledged_most_stream:
                self._update_window(stream_id, stream.unacknowledged)
                stream.allowance += stream.unacknowledged
                stream.unacknowledged = 0

    def resize_windows(self, size: int) -> bool:
        """Have the peer send `size` bytes ahead on each stream, on those that are open too (RFC 9113 section 6.9.2).

        False: not now, since it has not acknowledged the last change.
        """
        if self._pending_settings:
            return False
        self._out.append(settings_frame({INITIAL_WINDOW_SIZE: size}))
        self._pending_settings.append(size)
        return True

    def _windows_resized(self, size: int) -> None:
        """The peer counts with this size from here on."""
        more, self._stream_window = size - self._stream_window, size
        if not more:
            return
        self._unacknowledged_most_stream = size // 2
        for stream in self._streams.values():
            stream.allowance += more
            self.acknowledge(0, stream.id)  # what is owed may be enough to be told now

    def queued_body_size(self, stream_id: int = 0) -> int:
        """Bytes that wait for window or their turn, of a stream or of all."""
        if not stream_id:
            return self._queued
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.queued

    def ping(self) -> None:
        self._out.append(frame(PING, 0, 0, bytes(8)))

    def send_shutdown_notice(self) -> None:
        """The first GOAWAY of two: open no more streams; those that are on their way are still served."""
        self._out.append(goaway_frame(MOST_ID, 0))

    def send_goaway(self) -> None:
        """No stream is looked at that is not here already; once the last has ended, so has the connection."""
        self._goaway_id = self._last_id
        self._is_ending = True
        self._out.append(goaway_frame(self._last_id, 0))

    def _open(self, stream_id: int) -> _Stream:
        stream = self._streams.get(stream_id)
        if stream is None or stream.ends or stream.trailers is not None:
            raise EngineError(ErrorCode.STREAM_CLOSED, "the stream has ended")
        return stream

    def _update_window(self, stream_id: int, more: int) -> None:
        self._out.append(frame(WINDOW_UPDATE, 0, stream_id, more.to_bytes(4, "big")))

    def _send_block(self, stream: _Stream, block: bytes, ends: bool) -> None:
        most = self._frame_most
        first = block if len(block) <= most else block[:most]
        flags = (END_STREAM if ends else 0) | (END_HEADERS if len(block) <= most else 0)
        self._out.append(frame_head(len(first), HEADERS, flags, stream.id))
        self._out.append(first)
        for at in range(most, len(block), most):
            last = at + most >= len(block)
            self._out.append(frame(CONTINUATION, END_HEADERS if last else 0, stream.id, block[at : at + most]))
        if ends:
            stream.ends = True
            self._move(stream, ALL_SENT)

    def _get_ready(self, stream: _Stream) -> None:
        if not stream.is_ready and stream.queue is not None and (stream.window > 0 or not stream.queued):
            stream.is_ready = True
            self._ready.append(stream)

    def _take_turns(self, amount: int) -> None:
        """Frame bodies, one frame of a stream after one of another."""
        ready = self._ready
        while ready and self._out_size < amount:
            stream = ready[0]
            if stream.queued and stream.window > 0 and self._window <= 0:
                return
            ready.popleft()
            stream.is_ready = False
            if stream.state != CLOSED:
                if not stream.queued or stream.window > 0:
                    self._send_body(stream)
                self._get_ready(stream)

    def _send_body(self, stream: _Stream) -> None:
        """One frame of it, and if that was the last, the stream's end."""
        queue = stream.queue
        if queue is None:
            return
        most = min(self._frame_most, self._window, stream.window)
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
        stream.window -= size
        self._queued -= size
        self._window -= size
        self._out_size += size
        is_last = not stream.queued
        ends = stream.ends and is_last
        if size or ends:
            self._out.append(frame_head(size, DATA, END_STREAM if ends else 0, stream.id))
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
