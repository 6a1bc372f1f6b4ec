"""What both ends of a connection do: turn engine events into calls, count what a peer costs, keep the time.

Bytes go in by `receive`, come out by `output`; `wake` is called whenever there may be output that the owner of the
socket does not know of. `tick` wants to be called about once a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Generic, TypeVar

from gateway.status import Code
from gateway.wire.codes import CallFailed
from gateway.wire.engine import WRITE_SIZE, Engine
from gateway.wire.frames import (
    BOTH,
    ConnectionClosed,
    DataReceived,
    EndedBy,
    EngineError,
    ErrorCode,
    Event,
    GoAwayReceived,
    HeadersDropped,
    HeadersEvent,
    PingAcknowledged,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
    goaway_frame,
)
from gateway.wire.limits import Bucket, Limits
from gateway.wire.messages import PREFIX, SMALL, SMALL_PREFIXES
from gateway.wire.prices import (
    BYTES_PER_UPDATE,
    CONTROL_FRAME,
    HEAD_EXPLAINS,
    HEADER_BYTES_PER_EVENT,
    MESSAGE_EXPLAINS,
    WINDOW_UPDATE_FRAME,
)
from gateway.wire.stream import Stream

AnyStream = TypeVar("AnyStream", bound=Stream)

# Under names that compiled code need not look up.
_DATA: Final = DataReceived
_CLOSED: Final = StreamClosed
_REQUEST: Final = RequestReceived
_RESPONSE: Final = ResponseReceived
_TRAILERS: Final = TrailersReceived
_WINDOW: Final = WindowUpdated
_RESET: Final = StreamReset
_DROPPED: Final = HeadersDropped

MANY_EVENTS: Final = 50  # of one read
DRAIN_STEP: Final = 1.0  # seconds between the two GOAWAYs, for what is on its way; RFC 9113 asks for one round trip
BUG_TEXT: Final = "Internal error"


def _ignore(error: Exception) -> None: ...


class Connection(ABC, Generic[AnyStream]):
    """Base of `ServerConnection` and `ClientConnection`."""

    def __init__(self, engine: Engine, limits: Limits, now: float, wake: Callable[[], None]) -> None:
        self.engine = engine
        self.limits = limits
        self._small = min(SMALL, limits.message_bytes)
        self.wake = wake
        self.now = now
        self.streams: dict[int, AnyStream] = {}
        self.on_bug: Callable[[Exception], None] = _ignore  # told of exceptions out of callbacks
        self.closed = False  # the socket can go once what `output` gave is written
        self.draining = False  # no new calls
        self.reason = ""  # why it was closed, for the log
        self.greeted = False  # the peer's first SETTINGS came
        self.work = 0  # events handled since the owner set this to 0
        self.full = False  # does the socket take no more now? Its owner sees to it that it is not so for ever ...
        self.reads = True  # ... and may not read meanwhile; then the peer can't be late with what it sends
        self.born = now
        self._last_id = 0  # the highest stream that the peer opened
        self._last_words = b""
        self._control = Bucket(limits.control, now)
        self._glitches = Bucket(limits.glitches, now)
        self._partial = 0  # the number of the frame or header block that has come in part, or 0
        self._partial_since = now
        self._active_at = now
        self._pinged_at: float | None = None
        self._watched: set[Stream] = set()

    # Bytes

    def receive(self, data: bytes, now: float) -> None:
        """Bytes from the peer."""
        if self.closed:
            return
        self.now = self._active_at = now
        self._pinged_at = None  # any byte is as good as the answer
        engine = self.engine
        failure: EngineError | None = None
        try:
            engine.receive_data(data)
        except EngineError as error:
            failure = error
        if engine.unit != self._partial:
            self._partial = engine.unit
            self._partial_since = now
        events = engine.events()
        if events:
            self.work += len(events)
            self._handle(events if len(events) <= MANY_EVENTS else self._thinned_out(events))
        if engine.decoded:
            self.work += engine.decoded // HEADER_BYTES_PER_EVENT
            engine.decoded = 0
        if engine.glitches:
            if not self._glitches.take(engine.glitches, now):
                self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that mean nothing")
            engine.glitches = 0
        if failure is not None:
            self.break_off(failure.code, str(failure))

    @property
    def has_output(self) -> bool:
        """May `output` give something now?"""
        return self.closed or self.engine.want_write

    def output(self) -> bytes:
        """Bytes for the peer; b"" when there are none now. Fewer than WRITE_SIZE means that there are no more now."""
        if self.closed:
            words, self._last_words = self._last_words, b""
            return words
        data = self.engine.data_to_send(WRITE_SIZE)
        events = self.engine.events()
        if events:
            self._handle(events)
        if len(data) > BYTES_PER_UPDATE:
            self._control.take(-len(data) / BYTES_PER_UPDATE, self.now)
        if self._watched:
            self._notify_writable()
        return data

    def expect_updates(self) -> None:
        """A message goes out on a stream, and a peer that reads at once answers each however small it is."""
        self._control.take(-MESSAGE_EXPLAINS, self.now)

    # Events

    def _handle(self, events: Sequence[Event]) -> None:
        streams = self.streams
        control = 0.0
        for event in events:
            if self.closed:
                return  # one of them was the last straw
            kind = type(event)
            try:
                if kind is _DATA:
                    self._data(streams.get(event.stream_id), event)  # type: ignore[attr-defined, arg-type]
                elif kind is _CLOSED:
                    self._stream_closed(event)  # type: ignore[arg-type]
                elif kind is _REQUEST or kind is _RESPONSE or kind is _TRAILERS:
                    control -= HEAD_EXPLAINS
                    self._headers(event)  # type: ignore[arg-type]
                elif kind is _WINDOW:
                    control += WINDOW_UPDATE_FRAME
                elif kind is _RESET:  # its StreamClosed follows
                    self._reset_by_peer(event)  # type: ignore[arg-type]
                elif kind is _DROPPED:
                    self._headers_dropped(event)  # type: ignore[arg-type]
                else:
                    control += CONTROL_FRAME
                    self._control_event(event)
            except Exception as error:  # as in `_safely`, without the call
                self.on_bug(error)
        if control and not self._control.take(control, self.now):
            self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames")

    def _data(self, stream: AnyStream | None, event: DataReceived) -> None:
        data = event.data
        if stream is None or stream.done or stream.deaf:  # the bytes are dropped, their window still goes back
            self.give_back(len(data), event.stream_id if stream is None or stream.wants_window else 0)
            return
        try:
            size = len(data) - PREFIX
            if (
                0 <= size <= self._small
                and data.startswith(SMALL_PREFIXES[size])
                and stream.missing < 0
                and stream.on_message is None
                and stream._buffer is None
            ):  # nearly always: the one message of a unary call, whole
                stream.body = data[PREFIX:]
                stream.missing = 0
                self.engine.acknowledge(len(data), event.stream_id)
            else:
                stream._data(data)
            self._data_taken(stream, event.end_stream)
        except CallFailed as failure:
            self._call_failed(stream, failure)
        except Exception as error:  # a callback's own fault must not end its neighbours' calls
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))

    def give_back(self, size: int, stream_id: int) -> None:
        """Window to the peer, for bytes that are no longer ours to keep."""
        if size:
            self.engine.acknowledge(size, stream_id)
            self.wake()

    def _stream_closed(self, event: StreamClosed) -> None:
        if event.by is not BOTH:
            self._count_end(event)
        stream = self.streams.pop(event.stream_id, None)
        if stream is not None:
            if self._watched:
                self._watched.discard(stream)
            stream.closed = True
            if event.by is not BOTH:
                stream.ended_by = event.by
            if stream._held or stream.on_writable is not None:
                stream._close()
            self._call_closed(stream, event.error_code)
            if stream.done:  # and is not under way again
                stream._forget()
        if self.draining and not self.streams:
            self.wake()

    def _control_event(self, event: Event) -> None:
        if isinstance(event, SettingsReceived):
            self._settings(event)
            self.greeted = True
        elif isinstance(event, GoAwayReceived):
            self.draining = True
            self.reason = self.reason or f"GOAWAY {event.error_code} from the peer"
            self._peer_leaves(event)
        elif isinstance(event, ConnectionClosed):
            self.close(self.reason or "all of its calls have ended")
        elif isinstance(event, PingAcknowledged):
            self._ping_answered()

    # For the roles

    def _thinned_out(self, events: Sequence[Event]) -> Sequence[Event]:
        """Of the many events of one read, those that are worth to be handled."""
        return events

    @abstractmethod
    def _headers(self, event: HeadersEvent) -> None: ...

    @abstractmethod
    def _data_taken(self, stream: AnyStream, ended: bool) -> None: ...

    @abstractmethod
    def _call_failed(self, stream: AnyStream, failure: CallFailed) -> None: ...

    @abstractmethod
    def _call_closed(self, stream: AnyStream, error_code: int) -> None: ...

    def _reset_by_peer(self, event: StreamReset) -> None: ...

    def _headers_dropped(self, event: HeadersDropped) -> None: ...

    def _count_end(self, event: StreamClosed) -> None:
        """Of a stream that was reset, whatever the code."""

    def _ping_answered(self) -> None: ...

    def _settings(self, event: SettingsReceived) -> None: ...

    def _peer_leaves(self, event: GoAwayReceived) -> None: ...

    # Waiting

    def watch(self, stream: Stream) -> None:
        self._watched.add(stream)
        self.wake()

    def _notify_writable(self) -> None:
        for stream in [s for s in self._watched if s.unsent <= self.limits.unsent_bytes]:
            self._watched.discard(stream)
            self._safely(stream._let_go)

    # Endings

    @abstractmethod
    def drain(self) -> None:
        """Tell the peer to open no more calls here (the first GOAWAY); what runs may end."""

    def break_off(self, code: int, reason: str) -> None:
        """End at once, saying why to the peer."""
        if not self.closed:
            self._last_words = goaway_frame(self._last_id, code, reason.encode("ascii", "replace")[:100])
            self.close(reason)

    def close(self, reason: str) -> None:
        """End at once: every call that runs is told. Also to be called when the socket is lost."""
        if self.closed:
            return
        self.closed = True
        self.draining = True
        self.reason = reason
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.ended_by = EndedBy.CONNECTION
            self._safely(stream._close)
            self._safely(partial(self._call_closed, stream, -1))
            if stream.done:
                stream._forget()
        self.wake()

    def _safely(self, callback: Callable[[], None]) -> None:
        """A callback's own fault must not reach other calls."""
        try:
            callback()
        except Exception as error:
            self.on_bug(error)

    # Time

    def tick(self, now: float) -> None:
        """About once a second."""
        self.now = now
        limits = self.limits
        if not self.reads:
            self._active_at = now
            self._pinged_at = None
            self._partial_since = now
        if not self.greeted and now - self.born > limits.handshake_seconds:
            self.break_off(ErrorCode.PROTOCOL_ERROR, "no SETTINGS came")
        elif self._partial and now - self._partial_since > limits.frame_seconds:
            self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "a frame did not become complete")
        elif not self.closed:
            self._keep_alive(now)
            for stream in list(self.streams.values()):
                self._tick_stream(stream)

    def _tick_stream(self, stream: AnyStream) -> None:
        if not self.full and stream._tick(int(self.limits.write_stall_seconds), self.limits.min_rate):
            stream.reset(ErrorCode.ENHANCE_YOUR_CALM)

    def _keep_alive(self, now: float) -> None:
        limits = self.limits
        if not limits.keepalive_seconds or not self.streams:
            self._pinged_at = None
        elif self._pinged_at is not None:
            if now - self._pinged_at > limits.keepalive_timeout:
                self.close("no answer to a keepalive PING")
        elif now - self._active_at > limits.keepalive_seconds:
            self._pinged_at = now
            self.engine.ping()
            self.wake()
