"""Pure: how long the next attempt of a call waits, and what the server has to say about it.

The second attempt goes to another server and waits for nothing, nor does one of another variant: what a server says of
itself, or how often its peers have failed, says nothing of those. Those after it are spread, with full jitter: a draw
between nothing and a bound that doubles. Source: AWS Architecture Blog, "Exponential Backoff And Jitter";
`grpc-retry-pushback-ms` is gRFC A6's.
"""

from __future__ import annotations

from typing import Final

from gateway.rpc.metadata import Fields

FIRST_SECONDS: Final = 0.025  # bound of the third attempt's wait
MOST_SECONDS: Final = 1.0
MOST_PUSHBACK: Final = 60.0  # seconds; who wants a longer pause gets no other attempt: calls may have no deadline

NEVER: Final = -1.0  # in the place of seconds: no other attempt

PUSHBACK: Final = b"grpc-retry-pushback-ms"


def wait_before(number: int, draw: float) -> float:
    """Seconds. number: of the attempt, 1 is the first. draw: uniform in [0, 1)."""
    if number < 3:
        return 0.0
    return draw * min(FIRST_SECONDS * (1 << min(number - 3, 30)), MOST_SECONDS)


def pushback(trailing: Fields) -> float | None:
    """Seconds for which the server wants the call not to be repeated; NEVER for too long; None if it says nothing."""
    for name, value in trailing:
        if name == PUSHBACK:
            text = bytes(value)
            seconds = int(text) / 1000.0 if text.isdigit() and len(text) <= 9 else NEVER
            return seconds if seconds <= MOST_PUSHBACK else NEVER
    return None
