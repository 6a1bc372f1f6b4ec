"""One call's half of the wire, whichever end we are: messages out of DATA, and who waits for whom.

A stream takes in what arrives in one of three ways:
- *collected*: the one message of a unary call, in `body`; the window is given back at once, and until the call is
  answered the bytes are taken from a budget (see there);
- *passed on*: once `on_chunk` is set, the rest of that message goes there as it arrives, and whoever took the bytes
  gives the window back with `consume`;
- *message by message*: with `on_message` set (streaming calls). The reader gets one when it is hungry, and no more of
  them in one turn of the loop than the connection allows. What it has not got stays as it came, as bytes whose window
  is not given back: so a sender may be one window ahead of a reader that has stopped, however small the messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gateway.http2.frames import BOTH, EngineError, ErrorCode
from gateway.http2.prices import LEAST_WAITING, MESSAGE_END
from gateway.rpc.codes import CallFailed
from gateway.rpc.framing import PREFIX, SMALL, prefix, read_prefix
from gateway.status import Code

if TYPE_CHECKING:
    from gateway.rpc.connection import Connection

JOINED: Final = (
    16_384  # bytes; pieces are joined up to this as they come, so that small ones cost no more than their bytes
)


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
    on_message: Callable[[bytes, bool], None] | None = None  # (body, compressed)
    on_chunk: Callable[[bytes], None] | None = None
    on_writable: Callable[[], None] | None = None
    most_bytes = 0  # of a message, if that is less than the limit of the connection
    _parts: list[bytes] | None = None  # of the message that is being collected
    _prefix = b""  # as much of the next message's as has come, if that is not all
    _charged = 0  # bytes that were taken from the budget
    _chunks: deque[bytes] | None = None  # message by message: what has come and was not looked at ...
    _at = 0  # ... from this byte of the first one on
    _waiting = 0  # bytes of those
    _left = -1  # bytes of the message yet to come; -1 until its prefix is known
    _compressed_now = False  # is that message?
    _is_inflating = False  # a message is being inflated; those behind it wait
    _ends_late = False  # the stream has ended in good order, with messages that the reader has not got
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
            self._waiting += size
            _append(self._chunks if self._chunks is not None else self._new_chunks(), data)
            self.work_off()
        elif self.on_chunk is not None:
            self._held += size
            self._count(size)
            self.on_chunk(data)
        else:
            self.connection.give_back(size, self.id)
            self._collect(data)

    def _new_chunks(self) -> deque[bytes]:
        chunks: deque[bytes] = deque()
        self._chunks = chunks
        return chunks

    def _limit(self) -> int:
        return self.most_bytes or self.connection.limits.message_bytes

    def _charge(self, size: int) -> None:
        """raises: CallFailed if so much may not be collected."""
        self.connection.budget.take(size, self._charged + size)
        self._charged += size

    def release(self) -> None:
        """What was collected is no longer held here."""
        if self._charged:
            self.connection.budget.give(self._charged)
            self._charged = 0

    # The one message of a unary call

    def _collect(self, data: bytes) -> None:
        if self.missing < 0:
            if self._prefix:
                data, self._prefix = self._prefix + data, b""
            if len(data) < PREFIX:
                self._prefix = data
                return
            self.missing, self.compressed = read_prefix(data, 0, self._limit())
            data = data[PREFIX:]
            self._count(len(data))
            self.body = data
            if self.missing or len(data) > SMALL:
                self._charge(len(data))
                self._parts = [data]
        else:
            self._count(len(data))
            self._charge(len(data))
            if self._parts is not None:
                _append(self._parts, data)
        if self.missing == 0:
            self._join()
            self._parts = None

    def collected(self) -> bytes:
        """What is here of the one message, as it grows."""
        self._join()
        return self.body

    def _join(self) -> None:
        parts = self._parts
        if parts is not None and len(parts) > 1:
            self.body = b"".join(parts)
            parts[:] = (self.body,)
        elif parts:
            self.body = parts[0]

    def _count(self, size: int) -> None:
        self.missing -= size
        if self.missing == 0:
            self.connection.tiny += MESSAGE_END
        elif self.missing < 0:
            raise CallFailed(Code.UNIMPLEMENTED, "A unary call has exactly one message")

    def _is_passed_on(self) -> bool:
        return self.on_chunk is not None  # asked here, since compiled code would not ask again after a callback

    def _offer_front(self, taker: Callable[[Any], None]) -> None:
        """Show `taker` as much of a large message as is here. If it does not take over by `on_chunk`, it is asked again
        when there is twice as much, so that asking stays cheap."""
        if self._charged < self._offer_at or self._is_passed_on() or self.compressed:
            return
        self._join()
        self._offer_at = 2 * len(self.body)
        taker(self)
        if self._is_passed_on():
            self._parts = None
            if self._charged <= 2 * self.connection.limits.whole_bytes:
                self.release()  # of a larger one, whose names came late, the front is kept until the call ends

    # Message by message

    @property
    def is_behind(self) -> bool:
        """Is there more than the reader has got, apart from a message that is not here whole?"""
        return bool(self._chunks) or self._is_inflating

    def work_off(self) -> None:
        """Hand on what is here, as far as the reader wants it now and the turn of the loop allows.

        raises: CallFailed if the bytes are not the messages that the call allows.
        """
        connection = self.connection
        while self.hungry and not self._is_inflating and not self.done:
            if connection.turn_left <= 0 and self._chunks:
                connection.go_on_with(self)
                return
            message = self._next_message()
            if message is None:
                self.consume(self._held)
                return
            self.hungry = False
            connection.turn_left -= 1
            connection.tiny += MESSAGE_END
            if self._compressed_now:
                connection.inflate(self, message, self._deliver)
            else:
                self._deliver(message)

    def _deliver(self, message: bytes) -> None:
        self.release()
        if self.on_message is not None:
            self.on_message(message, False)

    def _next_message(self) -> bytes | None:
        """The next one that is here whole."""
        chunks = self._chunks
        while chunks:
            chunk, at = chunks[0], self._at
            end = len(chunk)
            if self._left < 0:
                at = self._read_prefix(chunk, at)
            stop = at
            message: bytes | None = None
            if self._left >= 0:
                stop = min(at + self._left, end)
                piece = chunk[at:stop]
                self._left -= len(piece)
                if self._left:
                    self._charge(len(piece))
                    if self._parts is None:
                        self._parts = []
                    _append(self._parts, piece)
                elif self._parts is None:
                    message = piece
                else:
                    self._charge(len(piece))
                    self._parts.append(piece)
                    message, self._parts = b"".join(self._parts), None
            self._waiting -= stop - self._at
            if stop == end:
                chunks.popleft()
                self._at = 0
            else:
                self._at = stop
            if message is not None:
                self._left = -1
                return message
        return None

    def _read_prefix(self, chunk: bytes, at: int) -> int:
        """Where what follows the prefix begins; `_left` stays -1 if that is not here whole."""
        if not self._prefix and len(chunk) - at >= PREFIX:  # nearly always
            self._left, self._compressed_now = read_prefix(chunk, at, self._limit())
            return at + PREFIX
        stop = at + PREFIX - len(self._prefix)
        self._prefix += chunk[at:stop]
        if len(self._prefix) < PREFIX:
            return len(chunk)
        self._left, self._compressed_now = read_prefix(self._prefix, 0, self._limit())
        self._prefix = b""
        return stop

    def completes_nothing(self, size: int) -> bool:
        """Has a frame of `size` bytes, which has just been taken in, left a message without its end?"""
        if self.on_message is None:
            return self.missing != 0
        if self._chunks:  # the reader is slow, so what is in them is not known yet
            return size < LEAST_WAITING
        return self._left >= 0 or bool(self._prefix)

    @property
    def has_partial_message(self) -> bool:
        if self.on_message is None:
            return self.missing != 0
        return self._left >= 0 or bool(self._prefix) or bool(self._chunks)

    def consume(self, size: int) -> None:
        """Give the peer `size` bytes of window back: they are no longer ours to keep."""
        size = min(size, self._held)  # a stream that has closed has given back everything
        self._held -= size
        self.connection.give_back(size, self.id)

    def feed(self) -> None:
        """Message by message: the reader wants the next one. It gets it soon, never before this returns."""
        self.hungry = True
        if self._held > self._waiting and not self._is_inflating:
            self.consume(self._held - self._waiting)
        if self._chunks:
            self.connection.go_on_with(self)

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

    def _forget(self) -> None:
        """Drop what callbacks hold, so that a call's objects go with it and not with the garbage collector."""
        if self._charged:
            self.release()
        self._parts = self._chunks = None
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


def _append(pieces: list[bytes] | deque[bytes], piece: bytes) -> None:
    if pieces and len(pieces[-1]) + len(piece) <= JOINED:
        pieces[-1] += piece
    else:
        pieces.append(piece)
