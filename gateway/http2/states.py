"""States of a stream as one end sees them, and what may come in each. Source: RFC 9113 section 5.1. Pure.

Legality is a table: what is not in it is a fault, and `fault_text` names it. Two states are gRPC's and not the RFC's:
before the peer's head has come, a body is a fault. What streams are that are not open is known by their ids: those that
were never opened are idle, the others closed; of these `Strays` remembers which the peer may still send on.
"""

from __future__ import annotations

from typing import Final

# States, in an order that tells most: a body may come before AWAITING, and from RECEIVED on the peer has ended.
OPEN: Final = 0x00
SENT: Final = 0x10  # half-closed (local)
AWAITING: Final = 0x20  # open; the peer's head has not come
AWAITING_SENT: Final = 0x30  # half-closed (local); the peer's head has not come
RECEIVED: Final = 0x40  # half-closed (remote)
CLOSED: Final = 0x50

# What comes, and what goes
HEAD: Final = 1
HEAD_END: Final = 2  # with END_STREAM
BODY: Final = 3
BODY_END: Final = 4
TRAILERS: Final = 5  # which always end
ALL_SENT: Final = 6  # our END_STREAM
RESET: Final = 7  # either end's RST_STREAM

NEXT: Final[dict[int, int]] = {
    AWAITING + HEAD: OPEN,
    AWAITING + HEAD_END: RECEIVED,
    AWAITING + ALL_SENT: AWAITING_SENT,
    AWAITING + RESET: CLOSED,
    AWAITING_SENT + HEAD: SENT,
    AWAITING_SENT + HEAD_END: CLOSED,
    AWAITING_SENT + RESET: CLOSED,
    OPEN + BODY: OPEN,
    OPEN + BODY_END: RECEIVED,
    OPEN + TRAILERS: RECEIVED,
    OPEN + ALL_SENT: SENT,
    OPEN + RESET: CLOSED,
    SENT + BODY: SENT,
    SENT + BODY_END: CLOSED,
    SENT + TRAILERS: CLOSED,
    SENT + RESET: CLOSED,
    RECEIVED + ALL_SENT: CLOSED,
    RECEIVED + RESET: CLOSED,
}
"""The state after an input, by the sum of both."""

STATES: Final = {
    AWAITING: "open and has no head yet",
    AWAITING_SENT: "half-closed (local) and has no head yet",
    OPEN: "open",
    SENT: "half-closed (local)",
    RECEIVED: "half-closed (remote)",
    CLOSED: "closed",
}
INPUTS: Final = {
    HEAD: "HEADERS",
    HEAD_END: "HEADERS with END_STREAM",
    BODY: "DATA",
    BODY_END: "DATA with END_STREAM",
    TRAILERS: "trailers",
    ALL_SENT: "the end of what is sent",
    RESET: "RST_STREAM",
}

MOST_STRAYS: Final = 1000


def fault_text(state: int, what: int) -> str:
    """Of an input that `NEXT` does not have."""
    return f"{INPUTS[what]} on a stream that is {STATES[state]}"


class Strays:
    """Streams that we ended and the peer has not: its frames on them are no fault, until it ends them.

    Only so many are remembered by themselves; then any that was opened so far may be one of them.
    """

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._up_to = 0  # ids up to this may all be strays

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, stream_id: int) -> bool:
        return stream_id <= self._up_to or stream_id in self._ids

    def add(self, stream_id: int, last_id: int) -> None:
        """last_id: the highest that was opened."""
        if len(self._ids) >= MOST_STRAYS:
            self._ids.clear()
            self._up_to = last_id
        self._ids.add(stream_id)

    def discard(self, stream_id: int) -> bool:
        """The peer has ended it. Was it remembered by itself?"""
        if stream_id not in self._ids:
            return False
        self._ids.remove(stream_id)
        return True
