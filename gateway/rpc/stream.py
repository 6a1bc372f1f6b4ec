"""One call's half of an HTTP/2 stream, in either role: messages out of DATA, and back-pressure both ways.

A stream takes what arrives in one of three ways:
- *collected*: `body` gets the one message of a unary call. The window is returned at once. Until the call is answered,
  the bytes count in `Connection.budget`.
- *passed on*: once `on_chunk` is set, it gets the rest of that message as it arrives. Whoever consumes the bytes
  returns their window with `consume`. `put_into` does that with a `Place`, where bytes may be
  read to from the socket.
- *message by message*: `on_message` (streaming calls) gets one message whenever the reader wants one, and a turn of
  the loop delivers only as many as the connection allows. Unread bytes stay as they came, and their window is not
  returned. So a sender can be one window ahead of a slow reader, however small the messages are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gateway.http2.frames import BOTH, EngineError, ErrorCode
from gateway.http2.prices import LEAST_WAITING, MESSAGE_END
from gateway.rpc.codes import CallFailed
from gateway.rpc.framing import PREFIX, SMALL, prefix, read_prefix
from gateway.rpc.places import Place
from gateway.status import Code

if TYPE_CHECKING:
    from gateway.rpc.connection import Connection

JOINED: Final = 16_384  # bytes up to which pieces are joined, so that small ones cost no more than their bytes


class Stream:
    """What calls of both roles have in common.

    Most calls leave most attributes at their defaults, so the class holds those: making a call is a good part of what a
    small call costs.
    """

    connection: Connection[Any]  # Any: both roles use only what all streams have
    id = 0
    encoding = b""  # the peer's grpc-encoding
    body = b""  # the message of a unary call, or the part of it that has arrived
    compressed = False  # is `body` compressed?
    missing = -1  # bytes of `body` yet to come; -1 until the prefix has arrived
    hungry = True  # does the reader of messages want the next one?
    done = False  # nothing more is sent or reported
    runs_out = False  # it goes on to its end when it is done, and what arrives is dropped
    discarding = False  # what arrives is dropped: it is an error page, and not gRPC
    closed = False  # the engine has closed the stream
    ended_by = BOTH  # which end closed the stream
    fault = ""  # what the peer sent that is wrong, if `ended_by` is FAULT
    on_message: Callable[[bytes, bool], None] | None = None  # (body, compressed)
    on_chunk: Callable[[bytes], None] | None = None
    place: Place | None = None  # beside `on_chunk`, where what it gets belongs
    on_writable: Callable[[], None] | None = None
    most_bytes = 0  # largest message accepted, if that is less than the connection's limit
    _parts: list[bytes] | None = None  # parts of the message that is being collected
    _prefix = b""  # a part of the next message's prefix
    _charged = 0  # bytes that count in the budget
    _kept = 0  # bytes that count there as copies, until the stream has closed
    _lent_ticks = -1  # ticks since it was given memory of others to send; -1 if it has none
    # What has arrived of messages and was not read: `_unread_bytes`, from `_unread_at` in the first chunk on
    _unread: deque[bytes] | None = None
    _unread_at = 0
    _unread_bytes = 0
    _message_left = -1  # bytes yet to come of the message that is being read; -1 until its prefix has arrived
    _message_compressed = False  # is the message that is being read compressed?
    _is_inflating = False  # a message is being inflated, and later messages wait
    _ended_unread = False  # the stream has ended well, but its reader has not got the last messages
    _unacknowledged = 0  # bytes received whose window was not returned
    _offer_at = 0  # bytes of a large message at which `_offer_front` offers it again
    _received = 0  # bytes received since the last tick
    _idle_ticks = 0
    _queued = 0  # bytes given to `send_chunk`
    _last_taken = 0
    _last_unsent = 0
    _stalled_ticks = 0

    # Receiving

    def _data(self, data: bytes) -> None:
        """raises: CallFailed if the bytes are not the messages that the call allows."""
        size = len(data)
        self._received += size
        if self.on_message is not None:
            self._unacknowledged += size
            self._unread_bytes += size
            _append(self._unread if self._unread is not None else self._new_unread(), data)
            self.deliver_messages()
        elif self.on_chunk is not None:
            self._unacknowledged += size
            self._count(size)
            self.on_chunk(data)
        else:
            self.connection.give_back(size, self.id, self.missing - size)
            self._collect(data)

    def _view(self, view: memoryview) -> None:
        """As `_data`, of bytes that nobody may keep. raises: CallFailed."""
        size = len(view)
        self._received += size
        self._unacknowledged += size
        self._count(size)
        if self.place is not None:
            self.place.feed_view(view)

    def _filled(self, size: int) -> None:
        """As `_data`, of bytes that are in their place already. raises: CallFailed."""
        self._received += size
        self._unacknowledged += size
        self._count(size)
        if self.place is not None:
            self.place.filled(size)

    def _new_unread(self) -> deque[bytes]:
        chunks: deque[bytes] = deque()
        self._unread = chunks
        return chunks

    def _limit(self) -> int:
        return self.most_bytes or self.connection.limits.message_bytes

    def _charge(self, size: int) -> None:
        """raises: CallFailed if so much may not be collected."""
        self.connection.budget.take(size, self._charged + size)
        self._charged += size

    def release(self) -> None:
        """What was collected does not count in the budget any more."""
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

    def put_into(self, place: Place) -> None:
        """Have the rest of the message in its place, as it arrives."""
        self.consume(self._unacknowledged)
        self.on_chunk, self.place = place.feed, place
        self.connection.on_laid()

    def _is_passed_on(self) -> bool:
        return self.on_chunk is not None  # a method: compiled code would not read the attribute again after a callback

    def _offer_front(self, taker: Callable[[Any], None]) -> None:
        """Offer a large message to `taker` before it is complete; it takes the message over by setting `on_chunk`.

        If it does not, it is asked again when twice as much has arrived, so that asking stays cheap.
        """
        if self._charged < self._offer_at or self._is_passed_on() or self.compressed:
            return
        self._join()
        self._offer_at = 2 * len(self.body)
        taker(self)
        if self._is_passed_on():
            self._parts = None
            if self._charged <= 2 * self.connection.limits.whole_bytes:
                self.release()  # the front of a larger message is kept, and counts until the call ends

    # Message by message

    @property
    def is_behind(self) -> bool:
        """Are there unread bytes, beside a message that is not complete?"""
        return bool(self._unread) or self._is_inflating

    def deliver_messages(self) -> None:
        """Deliver complete messages, as far as the reader wants them and this turn of the loop allows.

        raises: CallFailed if the bytes are not the messages that the call allows.
        """
        connection = self.connection
        while self.hungry and not self._is_inflating and not self.done:
            if connection.turn_left <= 0 and self._unread:
                connection.go_on_with(self)
                return
            message = self._next_message()
            if message is None:
                self.consume(self._unacknowledged)
                return
            self.hungry = False
            connection.turn_left -= 1
            connection.tiny += MESSAGE_END
            if self._message_compressed:
                connection.inflate(self, message, self._deliver)
            else:
                self._deliver(message)

    def _deliver(self, message: bytes) -> None:
        self.release()
        if self.on_message is not None:
            self.on_message(message, False)

    def _next_message(self) -> bytes | None:
        """The next complete message."""
        chunks = self._unread
        while chunks:
            chunk, at = chunks[0], self._unread_at
            end = len(chunk)
            if self._message_left < 0:
                at = self._read_prefix(chunk, at)
            stop = at
            message: bytes | None = None
            if self._message_left >= 0:
                stop = min(at + self._message_left, end)
                piece = chunk[at:stop]
                self._message_left -= len(piece)
                if self._message_left:
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
            self._unread_bytes -= stop - self._unread_at
            if stop == end:
                chunks.popleft()
                self._unread_at = 0
            else:
                self._unread_at = stop
            if message is not None:
                self._message_left = -1
                return message
        return None

    def _read_prefix(self, chunk: bytes, at: int) -> int:
        """Read a prefix. Returns where the message begins; `_message_left` stays -1 if the prefix is not complete."""
        if not self._prefix and len(chunk) - at >= PREFIX:
            self._message_left, self._message_compressed = read_prefix(chunk, at, self._limit())
            return at + PREFIX
        stop = at + PREFIX - len(self._prefix)
        self._prefix += chunk[at:stop]
        if len(self._prefix) < PREFIX:
            return len(chunk)
        self._message_left, self._message_compressed = read_prefix(self._prefix, 0, self._limit())
        self._prefix = b""
        return stop

    def left_incomplete(self, size: int) -> bool:
        """Did the DATA frame of `size` bytes that was just taken leave a message incomplete?"""
        if self.on_message is None:
            return self.missing != 0
        if self._unread:  # the reader is slow, so the frame was not read yet
            return size < LEAST_WAITING
        return self._message_left >= 0 or bool(self._prefix)

    @property
    def has_partial_message(self) -> bool:
        if self.on_message is None:
            return self.missing != 0
        return self._message_left >= 0 or bool(self._prefix) or bool(self._unread)

    def consume(self, size: int) -> None:
        """Return the window of `size` bytes: the reader has consumed them."""
        size = min(size, self._unacknowledged)  # a stream that has closed has returned everything
        self._unacknowledged -= size
        self.connection.give_back(size, self.id, self.missing)

    def feed(self) -> None:
        """Message by message: ask for the next one. It never comes before this returns."""
        self.hungry = True
        if self._unacknowledged > self._unread_bytes and not self._is_inflating:
            self.consume(self._unacknowledged - self._unread_bytes)
        if self._unread:
            self.connection.go_on_with(self)

    # Sending

    def send_message(self, body: bytes, compressed: bool = False) -> None:
        self.connection.expect_updates()
        if len(body) <= SMALL:
            self.send_chunk(prefix(len(body), compressed) + body)
        else:
            self.send_chunk(prefix(len(body), compressed))
            self.send_chunk(body)

    def send_front(self, front: bytes | memoryview, missing: int, compressed: bool = False) -> None:
        """Begin a message with `front`; `send_chunk` has to send the `missing` bytes."""
        self.send_chunk(prefix(len(front) + missing, compressed))
        self.send_chunk(front)

    def send_chunk(self, data: bytes | memoryview) -> None:
        """Send a part of a message, prefix included. It is dropped if the call has ended."""
        if self.done or self.closed:
            return
        try:
            self.connection.engine.send_data(self.id, data)
        except EngineError:
            return  # the stream has ended, which an event will report
        self._queued += len(data)
        self.connection.wake()

    @property
    def unsent(self) -> int:
        """Bytes that wait for the peer's window or the socket."""
        return 0 if self.closed else self.connection.engine.queued_body_size(self.id)

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call `callback` once `unsent` is within the limit, or the call has ended."""
        self.on_writable = callback
        self.connection.watch(self)

    def keep_until_closed(self, size: int) -> None:
        """Count bytes that are sent from memory of others as copies, which they become if their peer is slow."""
        if not self.closed:
            self._kept += size
            self._lent_ticks = 0
            self.connection.budget.keep(size)

    def give_back_lent(self) -> None:
        """Once a second. Copy what its peer has not taken for a second or two, also if the socket takes nothing."""
        if self._lent_ticks >= 0:
            self._lent_ticks += 1
            if self._lent_ticks == 2:
                self.connection.engine.copy_queued(self.id)

    def reset(self, code: int = ErrorCode.CANCEL) -> None:
        """Reset the stream; its end is reported as that of any stream."""
        if not self.closed:
            try:
                self.connection.engine.reset_stream(self.id, code)
            except EngineError:
                return
            self.connection.wake()

    def _forget(self) -> None:
        """Drop callbacks and buffers, so that reference counts free a call's objects and no collector has to."""
        if self._charged:
            self.release()
        if self._kept:
            self.connection.budget.keep(-self._kept)
            self._kept = 0
        self._parts = self._unread = None
        self.on_message = self.on_chunk = self.place = self.on_writable = None

    def _wake_writer(self) -> None:
        """Call whoever waits to write."""
        callback, self.on_writable = self.on_writable, None
        if callback is not None:
            callback()

    # Time

    def _tick(self, write_ticks: int, min_rate: int) -> bool:
        """Once a second. Has the peer taken less than `min_rate` bytes per second of what waits, for `write_ticks`?"""
        unsent = self.unsent
        taken = self._queued - unsent
        slow = unsent > 0 and taken - self._last_taken < min(min_rate, self._last_unsent)
        self._stalled_ticks = self._stalled_ticks + 1 if slow else 0
        self._last_taken = taken
        self._last_unsent = unsent
        return self._stalled_ticks >= write_ticks


def _append(pieces: list[bytes] | deque[bytes], piece: bytes) -> None:
    if pieces and len(pieces[-1]) + len(piece) <= JOINED:
        pieces[-1] += piece
    else:
        pieces.append(piece)
