"""States of a stream as one end sees them, and the input that each allows. Source: RFC 9113 section 5.1. Pure.

The table `NEXT` has every legal input; `fault_text` names an illegal one. Two states are not the RFC's: before the
peer's header list has arrived, a body is illegal. A stream that is not open is known by its id: an id that was never
opened is idle, any other closed. `Strays` remembers the closed streams on which the peer may still send.
"""

from __future__ import annotations

from typing import Final

# The order counts: DATA is legal below AWAITING, and from HALF_CLOSED_REMOTE on the peer has sent END_STREAM.
OPEN: Final = 0x00
HALF_CLOSED_LOCAL: Final = 0x10
AWAITING: Final = 0x20  # open, before the peer's header list
AWAITING_HALF_CLOSED: Final = 0x30  # half-closed (local), before the peer's header list
HALF_CLOSED_REMOTE: Final = 0x40
CLOSED: Final = 0x50

# Inputs: what is received, and what is sent
HEAD: Final = 1
HEAD_END: Final = 2  # HEADERS with END_STREAM
BODY: Final = 3
BODY_END: Final = 4
TRAILERS: Final = 5  # with END_STREAM, as trailers must have
ALL_SENT: Final = 6  # our END_STREAM
RESET: Final = 7  # RST_STREAM of either end

NEXT: Final[dict[int, int]] = {
    AWAITING + HEAD: OPEN,
    AWAITING + HEAD_END: HALF_CLOSED_REMOTE,
    AWAITING + ALL_SENT: AWAITING_HALF_CLOSED,
    AWAITING + RESET: CLOSED,
    AWAITING_HALF_CLOSED + HEAD: HALF_CLOSED_LOCAL,
    AWAITING_HALF_CLOSED + HEAD_END: CLOSED,
    AWAITING_HALF_CLOSED + RESET: CLOSED,
    OPEN + BODY: OPEN,
    OPEN + BODY_END: HALF_CLOSED_REMOTE,
    OPEN + TRAILERS: HALF_CLOSED_REMOTE,
    OPEN + ALL_SENT: HALF_CLOSED_LOCAL,
    OPEN + RESET: CLOSED,
    HALF_CLOSED_LOCAL + BODY: HALF_CLOSED_LOCAL,
    HALF_CLOSED_LOCAL + BODY_END: CLOSED,
    HALF_CLOSED_LOCAL + TRAILERS: CLOSED,
    HALF_CLOSED_LOCAL + RESET: CLOSED,
    HALF_CLOSED_REMOTE + ALL_SENT: CLOSED,
    HALF_CLOSED_REMOTE + RESET: CLOSED,
}
"""The next state, by state + input."""

_NOTHING: Final = 0xFF
_TABLE: Final = bytes(NEXT.get(key, _NOTHING) for key in range(CLOSED + 0x10))  # every frame asks it


def after(state: int, what: int) -> int:
    """The next state. raises: KeyError if the input is illegal."""
    found = _TABLE[state + what]
    if found == _NOTHING:
        raise KeyError(fault_text(state, what))
    return found


STATES: Final = {
    AWAITING: "open and has no head yet",
    AWAITING_HALF_CLOSED: "half-closed (local) and has no head yet",
    OPEN: "open",
    HALF_CLOSED_LOCAL: "half-closed (local)",
    HALF_CLOSED_REMOTE: "half-closed (remote)",
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
    """Names an input that `NEXT` does not have."""
    return f"{INPUTS[what]} on a stream that is {STATES[state]}"


class Strays:
    """Streams that we have closed and the peer has not: its frames on them are legal until it ends them.

    Up to MOST_STRAYS ids are remembered. When there are more, every id up to the highest counts as a stray.
    """

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._up_to = 0  # every id up to this counts as a stray

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, stream_id: int) -> bool:
        return stream_id <= self._up_to or stream_id in self._ids

    def add(self, stream_id: int, last_id: int) -> None:
        """last_id: the highest stream id that the peer has opened."""
        if len(self._ids) >= MOST_STRAYS:
            self._ids.clear()
            self._up_to = last_id
        self._ids.add(stream_id)

    def discard(self, stream_id: int) -> bool:
        """The peer has ended the stream. Was its id remembered?"""
        if stream_id not in self._ids:
            return False
        self._ids.remove(stream_id)
        return True
