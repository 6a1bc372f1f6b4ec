"""What both ends of a connection do: turn engine events into calls, take the price of frames, watch the time.

Bytes go in by `receive` and come out by `output`. The connection calls `wake` when there may be output that the owner
of the socket does not know of. The owner calls `tick` about once a second.

In one turn of the event loop only so many calls begin, move or end, whatever one read brings. The rest waits in order:
`has_work` says so, and `advance` does the next turn's part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from gateway.http2.engine import WRITE_SIZE, Engine
from gateway.http2.frames import (
    BOTH,
    DATA,
    GOAWAY_TEXT,
    HEADER,
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
    TinyReceived,
    TrailersReceived,
    WindowUpdated,
    goaway_frame,
    printable,
)
from gateway.http2.limits import Bucket, Limits
from gateway.http2.prices import (
    BYTES_PER_UPDATE,
    CONTROL_FRAME,
    HEAD_EXPLAINS,
    HEADER_BYTES_PER_EVENT,
    LATE_END,
    MESSAGE_EXPLAINS,
    TINY_DATA,
    WINDOW_UPDATE_FRAME,
)
from gateway.rpc.budget import Budget
from gateway.rpc.codes import CallFailed
from gateway.rpc.framing import PREFIX, SMALL, SMALL_PREFIXES, Inflater
from gateway.rpc.stream import Stream
from gateway.status import Code

AnyStream = TypeVar("AnyStream", bound=Stream)

# As module constants: compiled code need not look them up
_DATA: Final = DataReceived
_TINY: Final = TinyReceived
_CLOSED: Final = StreamClosed
_REQUEST: Final = RequestReceived
_RESPONSE: Final = ResponseReceived
_TRAILERS: Final = TrailersReceived
_WINDOW: Final = WindowUpdated
_RESET: Final = StreamReset
_DROPPED: Final = HeadersDropped

MANY_EVENTS: Final = 50  # events of one read, above which `_worth_handling` is asked
TURN: Final = 200  # calls begun, moved or ended, and messages delivered, in one turn of the loop: a few ms of work
LARGE_OUTPUT: Final = 65_536  # bytes of bodies that wait, from which on they are worth being written piece by piece
LEAST_VIEW: Final = 16_384  # bytes of a read, from which on a body is worth being laid straight where it belongs
MOST_STEPS: Final = 32  # frames of such a read that are looked at one by one
INFLATED_AT_ONCE: Final = 65_536  # bytes; making so many takes about 0.2 ms
INFLATED_AS: Final = 5  # what making INFLATED_AT_ONCE bytes counts of a turn
DRAIN_STEP: Final = 1.0  # seconds between the two GOAWAYs, for requests on their way; RFC 9113 asks for one round trip
BUG_TEXT: Final = "Internal error"


def _ignore(error: Exception) -> None: ...


def _nothing() -> None: ...


Elsewhere = Callable[[Inflater, Callable[[CallFailed | None], None]], None]
"""Runs a step of an inflater beside the event loop, and then calls back on the loop: with None, or with the failure."""


class Connection(ABC, Generic[AnyStream]):
    """Base of `ServerConnection` and `ClientConnection`."""

    def __init__(
        self, engine: Engine, limits: Limits, now: float, wake: Callable[[], None], budget: Budget | None = None
    ) -> None:
        """budget: for messages that are collected; None makes one of this connection's own."""
        self.engine = engine
        self.limits = limits
        self.budget = budget or Budget(limits.collected_bytes, "collected_bytes")
        self.elsewhere: Elsewhere | None = None  # None: every message is inflated on the loop
        self.turn_left = TURN  # what is left of TURN
        self.tiny = 0  # tokens of `Limits.tiny` to take at the next read; negative ones give back
        self._small = min(SMALL, limits.message_bytes)
        self.wake = wake
        self.now = now
        self.streams: dict[int, AnyStream] = {}
        self._latest: AnyStream | None = None  # that was asked for last
        self.on_bug: Callable[[Exception], None] = _ignore  # called with an exception that a callback raised
        self.on_laid: Callable[[], None] = _nothing  # called when a body is laid: `receive_view` is worth it
        self.closed = False  # the socket can close once `output` was written
        self.draining = False  # no new calls begin
        self.reason = ""  # why the connection closed, for the log
        self.peer_erred = False  # did it close because the peer broke a rule or a limit?
        self.greeted = False  # the peer's first SETTINGS arrived
        self.full = False  # does the socket take no more bytes now? Its owner cuts a peer that reads nothing
        self.reads = True  # false while the owner reads nothing from the socket: this stops the timers for the peer
        self.born = now
        self._last_id = 0  # the highest stream id that the peer has opened
        self._goaway = b""
        self._control = Bucket(limits.control, now)
        self._glitches = Bucket(limits.glitches, now)
        self._tiny = Bucket(limits.tiny, now)
        self._partial = 0  # the number of the frame or header block that has arrived in part, or 0
        self._partial_since = now
        self._active_at = now
        self._pinged_at: float | None = None
        self._ping_after = 0.0  # no PING before, unless more than the last one's answer has come
        self._ponged_at = 0.0
        self._ping_ticks = 0  # since the PING: one alone may come before the answer is read, after a long turn
        self.is_dead = False  # the peer answers nothing, so that waiting for it to take more is in vain
        self._watched: set[Stream] = set()
        self._reading: Stream | None = None  # whose body the socket is being read to its place
        self._deferred: list[Event] = []  # events that this turn had no room for
        self._unread_streams: dict[AnyStream, None] = {}  # streams with messages that their readers want
        self._ended: deque[AnyStream] = deque()  # calls that ended with the connection, and have not heard it yet
        self._writers_wait = False

    # Turns

    @property
    def is_late(self) -> bool:
        """Did more arrive than one turn could handle?"""
        return bool(self._deferred) or self.engine.is_behind

    @property
    def has_work(self) -> bool:
        """Is there work for `advance`?"""
        return self.is_late or bool(self._unread_streams) or bool(self._ended) or self._writers_wait

    def advance(self) -> None:
        """Begin a turn of the loop: do what earlier turns left."""
        self.turn_left = TURN
        if not self.has_work:
            return
        self._tell_ends()
        if self._deferred:
            events, self._deferred = self._deferred, []
            self._handle(events)
        if self.engine.is_behind and not self._deferred and self.turn_left > 0:
            self._take_in(b"")
        for stream in list(self._unread_streams):
            if self.turn_left <= 0:
                break
            del self._unread_streams[stream]
            self._deliver_messages(stream)
        if self._writers_wait:
            self._notify_writable()
        if self.has_work:
            self.wake()

    def go_on_with(self, stream: AnyStream) -> None:
        """Deliver the stream's messages in a later turn."""
        self._unread_streams[stream] = None
        self.wake()

    def _deliver_messages(self, stream: AnyStream) -> None:
        if stream.done:
            return
        try:
            stream.deliver_messages()
            if stream._ended_unread and not stream.is_behind:
                stream._ended_unread = False
                self._all_read(stream)
        except CallFailed as failure:
            self._call_failed(stream, failure)
        except Exception as error:  # a bug behind one callback must not end other calls
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))

    # Compression

    def inflate(self, stream: AnyStream, body: bytes, then: Callable[[bytes], None]) -> None:
        """Inflate a message and give it to `then`: at once if it is small, else after steps on another thread.

        raises: CallFailed if the message is broken or too large. A later step that fails ends the call.
        """
        inflater = Inflater(body, stream.encoding, stream._limit())
        self.turn_left -= INFLATED_AS
        is_all = inflater.step(INFLATED_AT_ONCE)
        stream._charge(inflater.size)
        elsewhere = self.elsewhere
        if elsewhere is None:
            while not is_all:
                before = inflater.size
                is_all = inflater.step(INFLATED_AT_ONCE)
                stream._charge(inflater.size - before)
        if is_all or elsewhere is None:
            then(inflater.body)
            return
        stream._is_inflating = True
        elsewhere(inflater, _Inflation(self, stream, inflater, then).stepped)

    def failed(self, stream: AnyStream, error: Exception) -> None:
        """End the call whose work raised this error; no other call ends."""
        if isinstance(error, CallFailed):
            self._call_failed(stream, error)
        else:
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))

    # Bytes

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes from the peer."""
        if self.closed:
            return
        self.now = self._active_at = now
        self._pinged_at = None  # any byte answers for the PING
        self._take_in(data)

    def receive_view(self, view: memoryview, now: float) -> None:
        """As `receive`, of bytes that are not there any more once this has returned.

        Those of a body that is laid where it belongs are not made an object before. All else is, frame by frame as long
        as that leads to such a body soon.
        """
        at, size = 0, len(view)
        for _ in range(MOST_STEPS):
            if size - at <= LEAST_VIEW:
                break
            at += self._lay(view[at:], now)
            step = self._step(view[at:])
            if not step:
                break
            self.receive(bytes(view[at : at + step]), now)
            at += step
        if at < size:
            self.receive(bytes(view[at:]), now)

    def _step(self, view: memoryview) -> int:
        """How many bytes are before the next body that may be laid; 0 if there is none that is worth it.

        The last byte of a frame is never laid, so that all that a frame's end means is in one place.
        """
        left = self.engine.body_left
        if left > 1:  # a body that is not laid
            return left if LEAST_VIEW < left <= len(view) else 0
        begin = left + HEADER
        if left < 0 or len(view) < begin or self.turn_left <= 0:
            return 0
        if view[left + 3] == DATA:
            return begin
        end = begin + (view[left] << 16 | view[left + 1] << 8 | view[left + 2])
        return end if end <= len(view) else 0

    def _lay(self, view: memoryview, now: float) -> int:
        """Give bytes to the stream that lays them, if they are a body of such a one. Answers how many it has taken."""
        engine = self.engine
        size = min(engine.body_left - 1, len(view))
        if size <= 0 or self.closed or self.is_late:
            return 0
        stream = self.streams.get(engine.body_of)
        if stream is None or stream.place is None or stream.done or stream.discarding:
            return 0
        self.now = self._active_at = now
        engine.skip_body(size)
        self.turn_left -= 1
        try:
            stream._view(view[:size])
        except CallFailed as failure:
            self._call_failed(stream, failure)
        except Exception as error:  # a bug behind one callback must not end other calls
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))
        return size

    def maybe_room(self) -> memoryview | None:
        """Memory that the socket can be read to, since what comes next belongs there; None: it has to be taken in.

        It is not to be kept, but filled at once: see `filled`.
        """
        engine = self.engine
        left = engine.body_left - 1  # the last byte of a frame is never laid: see `_step`
        if left < LEAST_VIEW or self.closed or self.is_late:
            return None
        stream = self.streams.get(engine.body_of)
        if stream is None or stream.place is None or stream.done or stream.discarding:
            return None
        self._reading = stream
        return stream.place.maybe_room(left)

    def filled(self, size: int, now: float) -> None:
        """So many bytes have been read to the memory that `maybe_room` has just answered."""
        stream: Any = self._reading
        self.now = self._active_at = now
        self._pinged_at = None
        self.engine.skip_body(size)
        self.turn_left -= 1
        try:
            stream._filled(size)
        except CallFailed as failure:
            self._call_failed(stream, failure)
        except Exception as error:  # a bug behind one callback must not end other calls
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))

    def _take_in(self, data: bytes) -> None:
        """Read bytes, or a part of them if they hold very many frames; later turns read the rest."""
        now, engine = self.now, self.engine
        failure: EngineError | None = None
        try:
            engine.receive_data(data)
        except EngineError as error:
            failure = error
        if engine.partial_unit != self._partial:
            self._partial = engine.partial_unit
            self._partial_since = now
        events = engine.events()
        if events:
            if self._deferred:
                self._deferred = self._worth_handling([*self._deferred, *events])
            else:
                self._handle(events if len(events) <= MANY_EVENTS else self._worth_handling(events))
        if engine.decoded:
            self.turn_left -= engine.decoded // HEADER_BYTES_PER_EVENT
            engine.decoded = 0
        if engine.glitches:
            if not self._glitches.take(engine.glitches, now):
                self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many frames without effect")
            engine.glitches = 0
        tiny = self.tiny + engine.tiny
        if tiny:
            if not self._tiny.take(tiny, now):
                self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many small frames that complete no message")
            self.tiny = engine.tiny = 0
        if failure is not None:
            self._peer_failed(failure)
        elif engine.is_behind:
            self.turn_left = 0
            self.wake()

    @property
    def has_output(self) -> bool:
        """Might `output` return bytes?"""
        return self.closed or self.engine.want_write

    def output(self) -> bytes:
        """Bytes for the peer. When there are fewer than WRITE_SIZE, no more are ready."""
        if self.closed:
            goaway, self._goaway = self._goaway, b""
            return goaway
        data = self.engine.data_to_send(WRITE_SIZE)
        self._has_framed(len(data))
        return data

    @property
    def has_large_output(self) -> bool:
        """Is a large body to be sent? Then `large_output` is worth it."""
        return not self.closed and self.engine.queued_body_size() >= LARGE_OUTPUT

    def large_output(self) -> tuple[list[bytes | memoryview], int]:
        """The same as `output`, in pieces that are no copies, and the bytes of all."""
        pieces = self.engine.pieces_to_send(WRITE_SIZE)
        size = sum([len(piece) for piece in pieces])
        self._has_framed(size)
        return pieces, size

    def _has_framed(self, size: int) -> None:
        events = self.engine.events()
        if events:
            if self._deferred:
                self._deferred += events
            else:
                self._handle(events)
        if size > BYTES_PER_UPDATE:
            self._control.take(-size / BYTES_PER_UPDATE, self.now)
        if self._watched:
            self._notify_writable()

    def expect_updates(self) -> None:
        """A message goes out: give back the control frames with which a peer answers it, however small it is."""
        self._control.take(-MESSAGE_EXPLAINS, self.now)

    # Events

    def _maybe_stream(self, stream_id: int) -> AnyStream | None:
        """The call of this number, if it has not ended. It is mostly the same as the last time."""
        latest = self._latest
        if latest is None or latest.id != stream_id:
            latest = self.streams.get(stream_id)
            self._latest = latest
        return latest

    def _handle(self, events: list[Event]) -> None:
        control = 0.0
        for at, event in enumerate(events):
            if self.closed:
                return  # an event may have closed the connection
            if self.turn_left <= 0:
                self._deferred = events[at:]
                self.wake()
                break
            kind = type(event)
            try:
                if kind is _DATA:
                    self.turn_left -= 1
                    self._data(event)  # type: ignore[arg-type]
                elif kind is _TINY:
                    self.turn_left -= 1
                    self._tiny_data(event)  # type: ignore[arg-type]
                elif kind is _CLOSED:
                    self.turn_left -= 1
                    self._stream_closed(event)  # type: ignore[arg-type]
                elif kind is _REQUEST or kind is _RESPONSE or kind is _TRAILERS:
                    control -= HEAD_EXPLAINS
                    self.turn_left -= 1
                    self._headers(event)  # type: ignore[arg-type]
                elif kind is _WINDOW:
                    control += WINDOW_UPDATE_FRAME
                elif kind is _RESET or kind is _DROPPED:
                    self._rare_event(event)
                else:
                    control += CONTROL_FRAME
                    self._control_event(event)
            except Exception as error:  # like `_safely`, without the cost of a call
                self.on_bug(error)
        if control and not self._control.take(control, self.now):
            self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames")

    def _data(self, event: DataReceived) -> AnyStream | None:
        """Answers whose it is, if anybody takes it."""
        stream, data = self._maybe_stream(event.stream_id), event.data
        # The dropped bytes go back to the connection's window, and to the stream's only if it has to run on to its end.
        if stream is None or stream.done or stream.discarding:
            is_awaited = stream is not None and (not stream.done or stream.runs_out)
            self.give_back(len(data), event.stream_id if is_awaited else 0)
            if event.end_stream:
                self.tiny += LATE_END
            return None
        try:
            size = len(data) - PREFIX
            if (
                0 <= size <= self._small
                and data.startswith(SMALL_PREFIXES[size])
                and stream.missing < 0
                and stream.on_message is None
                and not stream._prefix
            ):  # the common case: the one message of a unary call, whole
                stream.body = data[PREFIX:]
                stream.missing = 0
                self.engine.acknowledge(len(data), 0 if event.end_stream else event.stream_id)
            else:
                stream._data(data)
            self._data_taken(stream, event.end_stream)
        except CallFailed as failure:
            self._call_failed(stream, failure)
        except Exception as error:  # a bug behind one callback must not end other calls
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))
        return stream

    def _tiny_data(self, event: DataReceived) -> None:
        stream = self._data(event)
        if stream is None or stream.left_incomplete(len(event.data)):
            self.tiny += TINY_DATA

    def give_back(self, size: int, stream_id: int, missing: int = -1) -> None:
        """Return the window of `size` bytes to the peer. missing: as of `Engine.acknowledge`."""
        if size:
            self.engine.acknowledge(size, stream_id, missing)
            if self.engine.want_write:
                self.wake()

    def _stream_closed(self, event: StreamClosed) -> None:
        if event.by is not BOTH:
            self._count_end(event)
        stream = self._maybe_stream(event.stream_id)
        if stream is not None:
            self._latest = None
            del self.streams[event.stream_id]
            if self._watched:
                self._watched.discard(stream)
            if event.by is not BOTH:
                stream.ended_by = event.by
                stream.fault = event.fault
            self._end_stream(stream, event.error_code)
        if self.draining and not self.streams:
            self.wake()

    def _end_stream(self, stream: AnyStream, error_code: int) -> None:
        """The engine has closed the stream. Tell its end before its writers wake, so that they write no more."""
        stream.closed = True
        if stream._unacknowledged:
            held, stream._unacknowledged = stream._unacknowledged, 0
            self.give_back(held, stream.id)
        waiting = stream.on_writable
        if waiting is not None:
            stream.on_writable = None
        try:
            self._call_closed(stream, error_code)
        except Exception as error:  # a bug behind one callback must not end other calls
            self.on_bug(error)
        if waiting is not None:
            self._safely(waiting)
        if stream.done:  # a call that was retried is not done
            stream._forget()

    def _rare_event(self, event: Event) -> None:
        if isinstance(event, StreamReset):  # its StreamClosed follows
            self._reset_by_peer(event)
        elif isinstance(event, HeadersDropped):
            self._headers_dropped(event)

    def _control_event(self, event: Event) -> None:
        if isinstance(event, SettingsReceived):
            self._settings(event)
            self.greeted = True
        elif isinstance(event, GoAwayReceived):
            self.draining = True
            self.reason = (
                self.reason
                or f"GOAWAY {event.error_code} from the peer: {printable(event.debug_data)}".removesuffix(": ")
            )
            self._peer_leaves(event)
        elif isinstance(event, ConnectionClosed):
            self.close(self.reason or "all of its calls have ended")
        elif isinstance(event, PingAcknowledged):
            self._ponged_at = self.now
            self._ping_answered()

    # Overridden by the roles

    def _worth_handling(self, events: list[Event]) -> list[Event]:
        """The events of a large read, without those that need no work."""
        return events

    @abstractmethod
    def _headers(self, event: HeadersEvent) -> None: ...

    @abstractmethod
    def _data_taken(self, stream: AnyStream, ended: bool) -> None: ...

    @abstractmethod
    def _call_failed(self, stream: AnyStream, failure: CallFailed) -> None: ...

    @abstractmethod
    def _call_closed(self, stream: AnyStream, error_code: int) -> None: ...

    def _all_read(self, stream: AnyStream) -> None:
        """The reader has got the last message of a stream that had ended."""

    def _reset_by_peer(self, event: StreamReset) -> None: ...

    def _headers_dropped(self, event: HeadersDropped) -> None: ...

    def _count_end(self, event: StreamClosed) -> None:
        """Take the price of a stream that was reset."""

    def _ping_answered(self) -> None: ...

    def _settings(self, event: SettingsReceived) -> None: ...

    def _peer_leaves(self, event: GoAwayReceived) -> None: ...

    # Waiting

    def watch(self, stream: Stream) -> None:
        self._watched.add(stream)
        self.wake()

    def _notify_writable(self) -> None:
        self._writers_wait = False
        for stream in [s for s in self._watched if s.unsent <= self.limits.unsent_bytes]:
            if self.turn_left <= 0:
                self._writers_wait = True
                self.wake()
                return
            self.turn_left -= 1
            self._watched.discard(stream)
            self._safely(stream._wake_writer)

    # Endings

    @abstractmethod
    def drain(self) -> None:
        """Send the first GOAWAY: the peer opens no more calls here, and running calls may end."""

    def _peer_failed(self, failure: EngineError) -> None:
        """The peer has broken the protocol."""
        self.break_off(failure.code, str(failure))

    def not_chosen(self) -> None:
        """The peer's TLS has not chosen HTTP/2."""
        self.close("TLS peer did not choose h2")

    def break_off(self, code: int, reason: str) -> None:
        """Close at once, with a GOAWAY that tells the peer why."""
        if not self.closed:
            self.peer_erred = code != ErrorCode.NO_ERROR
            self._goaway = goaway_frame(self._last_id, code, reason.encode("ascii", "replace")[:GOAWAY_TEXT])
            self.close(reason)

    def close(self, reason: str) -> None:
        """Close at once: running calls end in this turn or the next ones. To be called too when the socket is lost."""
        if self.closed:
            return
        self.closed = True
        self.draining = True
        self.reason = reason
        self._deferred.clear()
        self.engine.is_behind = False
        self.engine.drop_output()  # now, and not when Python next looks for cycles
        streams, self.streams = self.streams, {}
        self._latest = None
        for stream in streams.values():
            stream.ended_by = EndedBy.CONNECTION
        self._ended.extend(streams.values())
        self._tell_ends()
        self.wake()

    def _tell_ends(self) -> None:
        while self._ended and self.turn_left > 0:
            self.turn_left -= 1
            self._end_stream(self._ended.popleft(), -1)

    def _safely(self, callback: Callable[[], None]) -> None:
        """Call back; an exception is reported and reaches no other call."""
        try:
            callback()
        except Exception as error:
            self.on_bug(error)

    # Time

    def tick(self, now: float) -> None:
        """Check all timers, about once a second."""
        self.now = now
        limits = self.limits
        if not self.reads:
            self._active_at = now
            self._pinged_at = None
            self._partial_since = now
        if not self.greeted and now - self.born > limits.handshake_seconds:
            self.break_off(ErrorCode.PROTOCOL_ERROR, "no SETTINGS arrived in time")
        elif self._partial and now - self._partial_since > limits.frame_seconds:
            self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "a frame did not arrive whole in time")
        elif not self.closed:
            self._keep_alive(now)
            for stream in list(self.streams.values()):
                stream.give_back_lent()
                self._tick_stream(stream)

    def _tick_stream(self, stream: AnyStream) -> None:
        if not self.full and stream._tick(int(self.limits.write_stall_seconds), self.limits.min_rate):
            stream.reset(ErrorCode.ENHANCE_YOUR_CALM)

    def _keep_alive(self, now: float) -> None:
        limits = self.limits
        if not limits.keepalive_seconds:
            return
        if self._pinged_at is not None:  # also if its calls have been given up meanwhile
            self._ping_ticks += 1
            if self._ping_ticks > 1 and now - self._pinged_at > limits.keepalive_timeout:
                self.is_dead = True
                self.close("no answer to a keepalive PING")
        elif self.streams and now - self._active_at > limits.keepalive_seconds:
            if self._active_at <= self._ponged_at and now < self._ping_after:
                return
            self._pinged_at = now
            self._ping_ticks = 0
            self._ping_after = now + limits.keepalive_rest
            self.engine.ping()
            self.wake()


class _Inflation:
    """A message that is inflated on another thread. It holds no reference cycle, so its last step frees it."""

    def __init__(
        self, connection: Connection[Any], stream: Stream, inflater: Inflater, then: Callable[[bytes], None]
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._inflater = inflater
        self._then = then
        self._charged = inflater.size

    def stepped(self, failure: CallFailed | None) -> None:
        connection, stream, inflater = self._connection, self._stream, self._inflater
        if stream.done:
            return
        if failure is not None:
            connection.failed(stream, failure)
            return
        try:
            stream._charge(inflater.size - self._charged)
            self._charged = inflater.size
            if not inflater.body:
                if connection.elsewhere is not None:
                    connection.elsewhere(inflater, self.stepped)
                return
            stream._is_inflating = False
            self._then(inflater.body)
            if stream._ended_unread or stream._unread:
                connection.go_on_with(stream)
        except Exception as error:
            connection.failed(stream, error)
