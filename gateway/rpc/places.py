"""Where a large body belongs, while it is read from a socket: memory of somebody's, or another stream's call.

`lay` has a stream's body in a place that has room for all of it. `pipe` passes it on to another stream, which sends it
from where it was read to; how much is on its way is bounded by the sink.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

if TYPE_CHECKING:
    from gateway.rpc.stream import Stream

CHUNK: Final = 131_072  # bytes of memory that bodies that are passed on are read to
KEPT: Final = CHUNK // 2  # bytes of a piece, from which on it is not copied


@mypyc_attr(allow_interpreted_subclasses=True)
class Place(ABC):
    """Where the rest of a message belongs."""

    @abstractmethod
    def feed(self, data: bytes) -> None:
        """The next bytes of the message."""

    @abstractmethod
    def feed_view(self, view: memoryview) -> None:
        """As `feed`, of bytes that may change once this has returned."""

    @abstractmethod
    def maybe_room(self, most: int) -> memoryview | None:
        """The memory that the next bytes belong to, at most so many; None: they have to be fed. It must not raise."""

    @abstractmethod
    def filled(self, size: int) -> None:
        """The next `size` bytes are in the memory that `maybe_room` has just answered."""


def pipe(source: Stream, sink: Stream, copy: Callable[[bytes | memoryview], None] | None = None) -> None:
    """Pass the rest of `source`'s message on to `sink` as it arrives; while `sink` can't send, `source` waits.

    copy: gets every piece too. In place of another sink, which has ended: what that one took no more is not owed.
    """
    source.put_into(_Pipe(source, sink, copy))


def lay(source: Stream, place: Place) -> None:
    """Have the rest of `source`'s message in its place, which has room for all of it, as it arrives; nobody waits."""
    source.put_into(_Laying(source, place))


class _Laying(Place):
    """A place that returns the window of what has come at once."""

    def __init__(self, source: Stream, place: Place) -> None:
        self._source = source
        self._place = place

    def feed(self, data: bytes) -> None:
        self._place.feed(data)
        self._source.consume(len(data))

    def feed_view(self, view: memoryview) -> None:
        self._place.feed_view(view)
        self._source.consume(len(view))

    def maybe_room(self, most: int) -> memoryview | None:
        return self._place.maybe_room(most)

    def filled(self, size: int) -> None:
        self._place.filled(size)
        self._source.consume(size)


class _Pipe(Place):
    """What comes belongs to a sink, which sends it from where it was read to."""

    def __init__(self, source: Stream, sink: Stream, copy: Callable[[bytes | memoryview], None] | None) -> None:
        self._source = source
        self._sink = sink
        self._copy = copy
        self._limit = source.connection.limits.unsent_bytes
        self._owed = 0  # bytes that have come, and whose window is not returned

    def feed(self, data: bytes) -> None:
        self._pass(data)

    def feed_view(self, view: memoryview) -> None:
        self._pass(bytes(view))

    def maybe_room(self, most: int) -> memoryview | None:
        return _chunks.room(most)

    def filled(self, size: int) -> None:
        self._pass(_chunks.take(size))

    def _pass(self, data: bytes | memoryview) -> None:
        sink = self._sink
        if self._copy is not None:
            self._copy(data)
        sink.send_chunk(data)
        self._owed += len(data)
        if sink.unsent <= self._limit:
            self._taken()
        elif sink.on_writable is None:
            sink.when_writable(self._taken)

    def _taken(self) -> None:
        size, self._owed = self._owed, 0
        self._source.consume(size)


class _Chunks:
    """Memory to read bodies to that are passed on, one piece after the other.

    Who has a piece keeps its whole chunk alive. So a small piece is copied: what is alive is at most twice what counts.
    """

    def __init__(self) -> None:
        self._chunk = memoryview(b"")
        self._at = 0  # what is before it is in use

    def room(self, most: int) -> memoryview:
        """Memory for up to so many bytes. Whoever asks takes what he has put there before anybody else asks."""
        if len(self._chunk) - self._at < KEPT:
            self._chunk, self._at = memoryview(bytearray(CHUNK)), 0
        return self._chunk[self._at : self._at + most]

    def take(self, size: int) -> bytes | memoryview:
        """The first `size` bytes of that memory."""
        begin = self._at
        piece = self._chunk[begin : begin + size]
        if size < KEPT:
            return bytes(piece)
        self._at = begin + size
        return piece


_chunks: Final = _Chunks()  # for all connections
