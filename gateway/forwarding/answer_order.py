"""Pure: the order in which the answers of one stream reach its caller, and the bytes that the stream keeps meanwhile.

The order is Triton's: answers of models that answer once come in the order of their requests; answers of a decoupled
model come as they are made, in order per request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from gateway.rpc.budget import Budget


class HeldBytes:
    """Bytes that one stream keeps, paid from the budget of the caller's connection."""

    __slots__ = ("_budget", "_is_closed", "_most", "size")

    def __init__(self, most: int, budget: Budget) -> None:
        self.size = 0
        self._most = most
        self._budget = budget
        self._is_closed = False

    def hold(self, size: int) -> None:
        self.size += size
        self._budget.hold(size)

    def release(self, size: int) -> None:
        if not self._is_closed:  # `close` has released everything
            self.size -= size
            self._budget.give(size)

    def close(self) -> None:
        """Release everything; what is released later has no effect."""
        self._is_closed = True
        self._budget.give(self.size)
        self.size = 0

    def is_within(self, size: int) -> bool:
        """Is `size` below the limit of the stream, while its connection's budget has room?"""
        return size < self._most and self._budget.has_room

    @property
    def has_room(self) -> bool:
        """May the stream keep more? It may always keep one message, so that it proceeds whatever other streams hold."""
        return not self.size or self.is_within(self.size)


class OrderedRequest:
    """A request whose answers have a place in the order."""

    held: deque[bytes] | None = None  # answers that wait for their turn
    done = False  # its last answer has been sent, or is held
    in_order = True  # False for a decoupled model, whose answers need not wait for those of earlier requests


R = TypeVar("R", bound=OrderedRequest)


class AnswerOrder(Generic[R]):
    """Sends the answers of one stream in order, and holds those whose turn has not come."""

    __slots__ = ("_bytes", "_requests", "_send", "caller_is_full", "held_bytes")

    def __init__(self, send: Callable[[bytes], bool], held: HeldBytes) -> None:
        """send: writes an answer; False if the caller reads slowly. held: counts the answers that are held."""
        self._send = send
        self._bytes = held
        self._requests: deque[R] = deque()  # requests in order whose answers have not all been sent
        self.held_bytes = 0  # bytes of the answers that wait for their turn
        self.caller_is_full = False  # the caller reads slowly

    @property
    def maybe_first(self) -> R | None:
        """The request whose turn it is."""
        return self._requests[0] if self._requests else None

    def enter(self, request: R) -> None:
        """Put a request behind all others."""
        self._requests.append(request)

    def write(self, request: R, body: bytes) -> None:
        """Send an answer, or hold it until the answers before it have been sent."""
        if request.in_order and (request.held or self._requests[0] is not request):
            if request.held is None:
                request.held = deque()
            request.held.append(body)
            self.held_bytes += len(body)
            self._bytes.hold(len(body))
        elif not self._send(body):
            self.caller_is_full = True

    def ended(self, request: R) -> None:
        """A request is done; if it was the first, those behind it move up."""
        if request.in_order and self._requests[0] is request:
            self.advance()

    def release(self, request: R) -> None:
        """Take a request out of the order, since its model is decoupled, and send what was held of it."""
        request.in_order = False
        requests = self._requests
        was_first = requests[0] is request
        if requests[-1] is request:  # the usual case: it has only just come
            requests.pop()
        else:
            requests.remove(request)
        self._send_held(request, at_once=True)
        if was_first:
            self.advance()

    def advance(self) -> None:
        """Send the answers whose turn has come, until the caller takes no more."""
        requests = self._requests
        while requests:
            first = requests[0]
            if first.held:
                self._send_held(first)
            if first.held or not first.done:
                return
            requests.popleft()

    def clear(self) -> None:
        self._requests.clear()

    def _send_held(self, request: R, *, at_once: bool = False) -> None:
        """at_once: send everything, even if the caller reads slowly."""
        held = request.held
        while held and (at_once or not self.caller_is_full):
            body = held.popleft()
            self.held_bytes -= len(body)
            self._bytes.release(len(body))
            if not self._send(body):
                self.caller_is_full = True
