"""What both ends of a connection do: turn engine events into calls, count what a peer costs, keep the time.

Bytes go in by `receive`, come out by `output`; `wake` is called whenever there may be output that the owner of the
socket does not know of. `tick` wants to be called about once a second.

No event has as many things done at once as a peer likes: in a turn of the loop only so many calls begin, move or end.
What is left waits in order; `has_work` says so, and `advance` does the next turn's part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from gateway.http2.engine import WRITE_SIZE, Engine
from gateway.http2.frames import (
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
    TinyReceived,
    TrailersReceived,
    WindowUpdated,
    goaway_frame,
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

# Under names that compiled code need not look up.
_DATA: Final = DataReceived
_TINY: Final = TinyReceived
_CLOSED: Final = StreamClosed
_REQUEST: Final = RequestReceived
_RESPONSE: Final = ResponseReceived
_TRAILERS: Final = TrailersReceived
_WINDOW: Final = WindowUpdated
_RESET: Final = StreamReset
_DROPPED: Final = HeadersDropped

MANY_EVENTS: Final = 50  # of one read
TURN: Final = 200  # calls begun, moved or ended, and messages handed on, in one turn of the loop: a few ms of work
INFLATED_AT_ONCE: Final = 65_536  # bytes; what grows to no more takes 0.2 ms or so ...
INFLATED_AS: Final = 5  # ... as long as so many of those
DRAIN_STEP: Final = 1.0  # seconds between the two GOAWAYs, for what is on its way; RFC 9113 asks for one round trip
BUG_TEXT: Final = "Internal error"


def _ignore(error: Exception) -> None: ...


Elsewhere = Callable[[Inflater, Callable[[CallFailed | None], None]], None]
"""Takes a step of an inflater beside the event loop, and tells on the loop how that went."""


class Connection(ABC, Generic[AnyStream]):
    """Base of `ServerConnection` and `ClientConnection`."""

    def __init__(
        self, engine: Engine, limits: Limits, now: float, wake: Callable[[], None], budget: Budget | None = None
    ) -> None:
        """budget: for messages that are collected whole, if it is not this connection's alone."""
        self.engine = engine
        self.limits = limits
        self.budget = budget or Budget(limits.collected_bytes, "collected_bytes")
        self.elsewhere: Elsewhere | None = None  # without it everything is inflated at once
        self.turn_left = TURN  # see there
        self.tiny = 0  # tokens of `Limits.tiny` that were not taken yet; negative ones give back
        self._small = min(SMALL, limits.message_bytes)
        self.wake = wake
        self.now = now
        self.streams: dict[int, AnyStream] = {}
        self.on_bug: Callable[[Exception], None] = _ignore  # told of exceptions out of callbacks
        self.closed = False  # the socket can go once what `output` gave is written
        self.draining = False  # no new calls
        self.reason = ""  # why it was closed, for the log
        self.peer_erred = False  # was it closed for a rule, or a limit, that the peer has broken?
        self.greeted = False  # the peer's first SETTINGS came
        self.full = False  # does the socket take no more now? Its owner sees to it that it is not so for ever ...
        self.reads = True  # ... and may not read meanwhile; then the peer can't be late with what it sends
        self.born = now
        self._last_id = 0  # the highest stream that the peer opened
        self._last_words = b""
        self._control = Bucket(limits.control, now)
        self._glitches = Bucket(limits.glitches, now)
        self._tiny = Bucket(limits.tiny, now)
        self._partial = 0  # the number of the frame or header block that has come in part, or 0
        self._partial_since = now
        self._active_at = now
        self._pinged_at: float | None = None
        self._ping_after = 0.0  # no PING before, unless more than the last one's answer has come
        self._ponged_at = 0.0
        self._ping_ticks = 0  # since the PING: one alone may come before the answer is read, after a long turn
        self.is_dead = False  # the peer answers nothing, so that waiting for it to take more is in vain
        self._watched: set[Stream] = set()
        self._later: list[Event] = []  # that this turn had no room for
        self._behind: dict[AnyStream, None] = {}  # streams with messages that their readers want
        self._ending: deque[AnyStream] = deque()  # calls that the connection's end has ended, and that are not told yet
        self._writers_wait = False

    # Turns

    @property
    def is_late(self) -> bool:
        """Has more come than it could be dealt with in a turn?"""
        return bool(self._later) or self.engine.is_behind

    @property
    def has_work(self) -> bool:
        """Is there anything for `advance` to do?"""
        return self.is_late or bool(self._behind) or bool(self._ending) or self._writers_wait

    def advance(self) -> None:
        """A new turn of the loop: go on with what is left of the ones before."""
        self.turn_left = TURN
        if not self.has_work:
            return
        self._tell_ends()
        if self._later:
            events, self._later = self._later, []
            self._handle(events)
        if self.engine.is_behind and not self._later and self.turn_left > 0:
            self._take_in(b"")
        for stream in list(self._behind):
            if self.turn_left <= 0:
                break
            del self._behind[stream]
            self._work_off(stream)
        if self._writers_wait:
            self._notify_writable()
        if self.has_work:
            self.wake()

    def go_on_with(self, stream: AnyStream) -> None:
        """It has messages that its reader wants: hand them on in a later turn."""
        self._behind[stream] = None
        self.wake()

    def _work_off(self, stream: AnyStream) -> None:
        if stream.done:
            return
        try:
            stream.work_off()
            if stream._ends_late and not stream.is_behind:
                stream._ends_late = False
                self._all_read(stream)
        except CallFailed as failure:
            self._call_failed(stream, failure)
        except Exception as error:  # as in `_data`
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))

    # Compression

    def inflate(self, stream: AnyStream, body: bytes, then: Callable[[bytes], None]) -> None:
        """Have a message's plain form handed to `then`: at once if that is small, else when it has been made elsewhere.

        raises: CallFailed if it can't be had; what is found later ends the call.
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
        """What was done for a call has raised this. Only that call ends."""
        if isinstance(error, CallFailed):
            self._call_failed(stream, error)
        else:
            self.on_bug(error)
            self._call_failed(stream, CallFailed(Code.INTERNAL, BUG_TEXT))

    # Bytes

    def receive(self, data: bytes, now: float) -> None:
        """Bytes from the peer."""
        if self.closed:
            return
        self.now = self._active_at = now
        self._pinged_at = None  # any byte is as good as the answer
        self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        """Read what has come, or a part of it if it is very many frames; the rest in later turns."""
        now, engine = self.now, self.engine
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
            if self._later:
                self._later = list(self._thinned_out([*self._later, *events]))
            else:
                self._handle(events if len(events) <= MANY_EVENTS else self._thinned_out(events))
        if engine.decoded:
            self.turn_left -= engine.decoded // HEADER_BYTES_PER_EVENT
            engine.decoded = 0
        if engine.glitches:
            if not self._glitches.take(engine.glitches, now):
                self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that mean nothing")
            engine.glitches = 0
        tiny = self.tiny + engine.tiny
        if tiny:
            if not self._tiny.take(tiny, now):
                self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many small frames that complete no message")
            self.tiny = engine.tiny = 0
        if failure is not None:
            self.break_off(failure.code, str(failure))
        elif engine.is_behind:
            self.turn_left = 0
            self.wake()

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
            if self._later:
                self._later += events
            else:
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
        for at, event in enumerate(events):
            if self.closed:
                return  # one of them was the last straw
            if self.turn_left <= 0:
                self._later = list(events[at:])
                self.wake()
                break
            kind = type(event)
            try:
                if kind is _DATA:
                    self.turn_left -= 1
                    self._data(streams.get(event.stream_id), event)  # type: ignore[attr-defined, arg-type]
                elif kind is _TINY:
                    self.turn_left -= 1
                    self._tiny_data(streams.get(event.stream_id), event)  # type: ignore[attr-defined, arg-type]
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
            except Exception as error:  # as in `_safely`, without the call
                self.on_bug(error)
        if control and not self._control.take(control, self.now):
            self.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames")

    def _data(self, stream: AnyStream | None, event: DataReceived) -> None:
        data = event.data
        if stream is None or stream.done or stream.deaf:  # the bytes are dropped, the connection's window goes back ...
            is_awaited = stream is not None and not stream.done  # ... and the stream's only if more of it is wanted
            self.give_back(len(data), event.stream_id if is_awaited else 0)
            if event.end_stream:
                self.tiny += LATE_END
            return
        try:
            size = len(data) - PREFIX
            if (
                0 <= size <= self._small
                and data.startswith(SMALL_PREFIXES[size])
                and stream.missing < 0
                and stream.on_message is None
                and not stream._prefix
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

    def _tiny_data(self, stream: AnyStream | None, event: DataReceived) -> None:
        is_late = stream is None or stream.done or stream.deaf
        self._data(stream, event)
        if is_late or stream is None or stream.completes_nothing(len(event.data)):
            self.tiny += TINY_DATA

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
            if event.by is not BOTH:
                stream.ended_by = event.by
            self._end_stream(stream, event.error_code)
        if self.draining and not self.streams:
            self.wake()

    def _end_stream(self, stream: AnyStream, error_code: int) -> None:
        """The engine has forgotten the stream. Its end is told before those are let go who wait for room on it: what
        they have kept is for nobody now."""
        stream.closed = True
        if stream._held:
            held, stream._held = stream._held, 0
            self.give_back(held, stream.id)
        waiting = stream.on_writable
        if waiting is not None:
            stream.on_writable = None
        try:
            self._call_closed(stream, error_code)
        except Exception as error:  # as in `_safely`
            self.on_bug(error)
        if waiting is not None:
            self._safely(waiting)
        if stream.done:  # and is not under way again
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
            self.reason = self.reason or f"GOAWAY {event.error_code} from the peer"
            self._peer_leaves(event)
        elif isinstance(event, ConnectionClosed):
            self.close(self.reason or "all of its calls have ended")
        elif isinstance(event, PingAcknowledged):
            self._ponged_at = self.now
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

    def _all_read(self, stream: AnyStream) -> None:
        """The reader has the last message of a stream that ended before."""

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
        self._writers_wait = False
        for stream in [s for s in self._watched if s.unsent <= self.limits.unsent_bytes]:
            if self.turn_left <= 0:
                self._writers_wait = True
                self.wake()
                return
            self.turn_left -= 1
            self._watched.discard(stream)
            self._safely(stream._let_go)

    # Endings

    @abstractmethod
    def drain(self) -> None:
        """Tell the peer to open no more calls here (the first GOAWAY); what runs may end."""

    def break_off(self, code: int, reason: str) -> None:
        """End at once, saying why to the peer."""
        if not self.closed:
            self.peer_erred = code != ErrorCode.NO_ERROR
            self._last_words = goaway_frame(self._last_id, code, reason.encode("ascii", "replace")[:100])
            self.close(reason)

    def close(self, reason: str) -> None:
        """End at once: every call that runs is told, in this turn or the next ones. Also to be called when the socket
        is lost."""
        if self.closed:
            return
        self.closed = True
        self.draining = True
        self.reason = reason
        self._later.clear()
        self.engine.is_behind = False
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.ended_by = EndedBy.CONNECTION
        self._ending.extend(streams.values())
        self._tell_ends()
        self.wake()

    def _tell_ends(self) -> None:
        while self._ending and self.turn_left > 0:
            self.turn_left -= 1
            self._end_stream(self._ending.popleft(), -1)

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
    """A message while it is inflated elsewhere. Nothing of it refers to itself, so that it goes with its last step."""

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
            if stream._ends_late or stream._chunks:
                connection.go_on_with(stream)
        except Exception as error:
            connection.failed(stream, error)
