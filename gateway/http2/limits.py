"""What a peer may cost us: every limit by name, with its default and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass

KiB = 1024
MiB = 1024 * KiB


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one connection. Rates are (burst, per second): a bucket of `burst` tokens that refills."""

    # Work
    max_streams: int = 1000  # calls at once on a connection, which all clients of one process may share
    message_bytes: int = 256 * MiB  # one message, as declared by its prefix; refused before any of it is kept
    whole_bytes: int = 64 * KiB  # up to here a forwarded message is collected; a larger one is passed on as it arrives
    collected_bytes: int = 256 * MiB  # at once, of a connection's messages that must be here whole; one of the largest

    # Flow control: what a peer may send ahead of whoever takes the bytes
    stream_window: int = 1 * MiB  # what one call may hold that waits; a picture as a tensor, 602 KB, never stops for it
    connection_window: int = 128 * MiB  # of all calls together; beyond 64 at once each has less than `stream_window`
    unsent_bytes: int = 64 * KiB  # a stream with more than this to send makes its producer wait

    # Headers
    header_list_bytes: int = 16 * KiB  # gRPC suggests 8; a request beyond it is refused, the connection lives on
    header_list_bytes_hard: int = 64 * KiB  # beyond it a caller's connection ends (HPACK bombs), an answer is dropped
    header_count: int = 100
    open_heads_bytes: int = 4 * MiB  # of a connection's open calls, in heads over 1 KiB: 1000 of them with a token each
    max_continuations: int = 8  # of a caller's head, as nghttp2 since the CONTINUATION flood of 2024

    # Floods
    resets: tuple[int, int] = (1000, 33)  # streams ended by RST, whoever sent it; as nghttp2 since rapid reset
    glitches: tuple[int, int] = (400, 33)  # PRIORITY, unknown and empty frames, malformed requests
    tiny: tuple[int, int] = (10_000, 1_000)  # small frames of bodies that complete no message, or come too late
    control: tuple[int, int] = (1000, 100)  # PING, SETTINGS, WINDOW_UPDATE beyond those that honest work explains
    max_queued_replies: int = 1000  # SETTINGS and PING acknowledgements that a peer doesn't read

    # Time, in seconds
    handshake_seconds: float = 10.0  # from accept to the client's first SETTINGS
    frame_seconds: float = 10.0  # for one frame or header block to become complete
    first_message_seconds: float = 5.0  # a unary call may be this long below `min_rate` before its message is complete
    min_rate: int = 1 * KiB  # bytes per second that a peer must send of its request, and take of what waits for it
    write_stall_seconds: float = 30.0  # a call whose peer takes less for so long is reset; a silent socket, cut
    idle_seconds: float = 3600.0  # a connection with no call
    age_seconds: float = 0.0  # a connection is asked to leave after this, ± 10 %; 0 is never
    keepalive_seconds: float = 30.0  # a PING after so long without a byte from a peer with calls; 0 is never
    keepalive_timeout: float = 10.0  # for its answer
    keepalive_rest: float = 0.0  # seconds until another PING while nothing but the last one's answer has come

    def __post_init__(self) -> None:
        for name, low in (("max_streams", 1), ("message_bytes", 1), ("stream_window", 65_535), ("min_rate", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}")
        if self.connection_window < self.stream_window:
            raise ValueError("connection_window must not be smaller than stream_window")


UPSTREAM = Limits(
    stream_window=MiB,  # held for a caller who does not read, as by Envoy's default; 602 KB answers take 6 % less CPU
    connection_window=(1 << 31) - 1,  # none: callers share the connection, and one who does not read must stop no other
    header_list_bytes=64 * KiB,  # a Triton echoes what callers wrote, and models' own error texts can be long
    glitches=(100_000, 10_000),  # what it still says of cancelled calls counts, and callers cancel as they like
    tiny=(100_000, 10_000),  # likewise: answers that were on their way; 0.1 s of work, then 1 % of a core
    keepalive_seconds=1.5,  # a connection that leads nowhere any more is dialled anew within 5 s ...
    keepalive_timeout=1.5,
    keepalive_rest=300.0,  # ... while C-core's servers leave for a third PING within 5 minutes without data
)
"""Limits of a connection to an upstream: no caller's words may end it, as all of them share it."""


class Bucket:
    """Tokens that refill with time. `take` says whether there were enough."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, burst_and_rate: tuple[int, int], now: float) -> None:
        self._burst, self._rate = burst_and_rate
        self._left = float(self._burst)
        self._at = now

    def take(self, tokens: float, now: float) -> bool:
        """Negative tokens give back."""
        left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._left = min(self._burst, left - tokens)
        self._at = now
        return self._left >= 0
