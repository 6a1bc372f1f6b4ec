"""One call's half of the wire, whichever end we are: messages out of DATA, and who waits for whom.

A stream takes in what arrives in one of three ways:
- *collected*: the one message of a unary call, in `body`; the window is given back at once, up to the message limit;
- *passed on*: once `on_chunk` is set, the rest of that message goes there as it arrives, and whoever took the bytes
  gives the window back with `consume`;
- *message by message*: with `on_message` set (streaming calls). The window is given back while the reader is hungry,
  so a sender may be one window ahead of a reader that has stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway.status import Code
from gateway.wire.codes import CallFailed
from gateway.wire.frames import BOTH, EngineError, ErrorCode
from gateway.wire.messages import PREFIX, SMALL, prefix, read_prefix

if TYPE_CHECKING:
    from gateway.wire.connection import Connection


class Stream:
    """What calls of both roles have in common.

    Most calls never set most of this, so what is the same for all is kept in the class: making a call is a good part of
    what a small one costs.
    """

    connection: Connection[Any]  # any of its streams: both roles share what is used here
    id = 0
    encoding = b""  # the peer's grpc-encoding
    body = b""  # of a unary call: the message, or as much of it as has arrived
    compressed = False  # is it?
    missing = -1  # bytes of it yet to come; -1 until its prefix is known
    hungry = True  # message by message: the reader has nothing left to read
    done = False  # nothing more is sent or reported
    deaf = False  # what comes is dropped: no messages, but an error page
    closed = False  # the engine has forgotten the stream
    ended_by = BOTH  # once it is closed
    wants_window = True  # is the peer to send more than it may by now?
    on_message: Callable[[bytes, bool], None] | None = None  # (body, compressed)
    on_chunk: Callable[[bytes], None] | None = None
    on_writable: Callable[[], None] | None = None
    _buffer: bytearray | None = None
    _held = 0  # bytes received whose window was not given back
    _offer_at = 0  # size of the front that is shown next
    _received = 0  # bytes, for the rate
    _idle_ticks = 0
    _queued = 0  # bytes given to `send_chunk`
    _last_taken = 0
    _last_unsent = 0
    _stalled_ticks = 0

    # In

    def _data(self, data: bytes) -> None:
        """raises: CallFailed if the bytes are not the messages that the call allows."""
        size = len(data)
        self._received += size
        if self.on_message is not None:
            self._held += size
            self._split(data)
            if self.hungry:
                self.consume(self._held)
        elif self.on_chunk is not None:
            self._held += size
            self._count(size)
            self.on_chunk(data)
        else:
            self.connection.give_back(size, self.id)
            self._collect(data)

    def _collect(self, data: bytes) -> None:
        if self.missing < 0:
            if self._buffer is None and len(data) >= PREFIX:  # nearly always
                length, self.compressed = read_prefix(data, 0, self.connection.limits.message_bytes)
                self.missing = length
                self._count(len(data) - PREFIX)
                self.body = data[PREFIX:]
                return
            self._buffer = self._buffer or bytearray()
            self._buffer += data
            if len(self._buffer) < PREFIX:
                return
            length, self.compressed = read_prefix(self._buffer, 0, self.connection.limits.message_bytes)
            self.missing = length
            self._count(len(self._buffer) - PREFIX)
            del self._buffer[:PREFIX]
        else:
            self._count(len(data))
            if self._buffer is None:
                self._buffer = bytearray(self.body)
                self.body = b""
            self._buffer += data
        if self.missing == 0:
            self.body = bytes(self._buffer)
            self._buffer = None

    def _count(self, size: int) -> None:
        self.missing -= size
        if self.missing < 0:
            raise CallFailed(Code.UNIMPLEMENTED, "A unary call has exactly one message")

    def _offer_front(self, taker: Callable[[Any], None]) -> None:
        """Show `taker` as much of a large message as is here. If it does not take over by `on_chunk`, it is asked again
        when there is twice as much, so that asking stays cheap."""
        if len(self.body if self._buffer is None else self._buffer) < self._offer_at or self.on_chunk is not None:
            return
        if self._buffer is not None:
            self.body = bytes(self._buffer)
        self._offer_at = 2 * len(self.body)
        taker(self)

    def _split(self, data: bytes) -> None:
        buffer: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            buffer = self._buffer
        at, limit = 0, self.connection.limits.message_bytes
        while len(buffer) - at >= PREFIX:
            length, compressed = read_prefix(buffer, at, limit)
            end = at + PREFIX + length
            if len(buffer) < end:
                break
            message = bytes(buffer[at + PREFIX : end])
            at = end
            self.hungry = False
            if self.on_message is not None and not self.done:
                self.on_message(message, compressed)
        if buffer is self._buffer:
            del self._buffer[:at]
        elif at < len(buffer):
            self._buffer = bytearray(buffer[at:])

    @property
    def has_partial_message(self) -> bool:
        return bool(self._buffer) if self.on_message is not None else self.missing != 0

    def consume(self, size: int) -> None:
        """Give the peer `size` bytes of window back: they are no longer ours to keep."""
        size = min(size, self._held)  # a stream that has closed has given back everything
        self._held -= size
        self.connection.give_back(size, self.id)

    def feed(self) -> None:
        """Message by message: the reader wants the next one."""
        self.hungry = True
        self.consume(self._held)

    # Out

    def send_message(self, body: bytes, compressed: bool = False) -> None:
        self.connection.expect_updates()
        if len(body) <= SMALL:
            self.send_chunk(prefix(len(body), compressed) + body)
        else:
            self.send_chunk(prefix(len(body), compressed))
            self.send_chunk(body)

    def send_front(self, front: bytes, missing: int, compressed: bool = False) -> None:
        """The beginning of a message; `send_chunk` brings the `missing` bytes."""
        self.send_chunk(prefix(len(front) + missing, compressed))
        self.send_chunk(front)

    def send_chunk(self, data: bytes) -> None:
        """A piece of a message, prefix included. Lost without a word if the call has ended."""
        if self.done or self.closed:
            return
        try:
            self.connection.engine.send_data(self.id, data)
        except EngineError:
            return  # its end has happened and will be reported
        self._queued += len(data)
        self.connection.wake()

    @property
    def unsent(self) -> int:
        """Bytes that wait for the peer's window or the socket."""
        return 0 if self.closed else self.connection.engine.queued_body_size(self.id)

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call once `unsent` is within the limit, or the call over."""
        self.on_writable = callback
        self.connection.watch(self)

    def reset(self, code: int = ErrorCode.CANCEL) -> None:
        """Stop the stream both ways; its end is reported as such."""
        if not self.closed:
            try:
                self.connection.engine.reset_stream(self.id, code)
            except EngineError:
                return
            self.connection.wake()

    def _close(self) -> None:
        """The engine has forgotten the stream."""
        self.closed = True
        if self._held:
            self.consume(self._held)
        if self.on_writable is not None:
            self._let_go()

    def _forget(self) -> None:
        """Drop what callbacks hold, so that a call's objects go with it and not with the garbage collector."""
        self._buffer = None
        self.on_message = self.on_chunk = self.on_writable = None

    def _let_go(self) -> None:
        """Whoever waits for room need not wait any longer."""
        callback, self.on_writable = self.on_writable, None
        if callback is not None:
            callback()

    # Time

    def _tick(self, write_ticks: int, min_rate: int) -> bool:
        """Once a second. Has the peer taken less than `min_rate` of what waits for it, for `write_ticks`?"""
        unsent = self.unsent
        taken = self._queued - unsent
        slow = unsent > 0 and taken - self._last_taken < min(min_rate, self._last_unsent)
        self._stalled_ticks = self._stalled_ticks + 1 if slow else 0
        self._last_taken = taken
        self._last_unsent = unsent
        return self._stalled_ticks >= write_ticks


def pipe(source: Stream, sink: Stream) -> None:
    """Pass the rest of `source`'s message on to `sink` as it arrives; while `sink` can't send, `source` waits."""
    owed = 0
    limit = source.connection.limits.unsent_bytes

    def taken() -> None:
        nonlocal owed
        size, owed = owed, 0
        source.consume(size)

    def chunk(data: bytes) -> None:
        nonlocal owed
        sink.send_chunk(data)
        owed += len(data)
        if sink.unsent <= limit:
            taken()
        elif sink.on_writable is None:
            sink.when_writable(taken)

    source.on_chunk = chunk
