"""What a peer may cost us: every limit by name, with its default and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass

KiB = 1024
MiB = 1024 * KiB


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one connection. A rate is (burst, per second): a bucket of `burst` tokens that refills."""

    # Work
    max_streams: int = 1000  # open streams of a connection, which all clients of one process may share
    message_bytes: int = 256 * MiB  # of one message, by its prefix; a larger one is refused before any of it is kept
    whole_bytes: int = 64 * KiB  # a forwarded message up to this is collected; a larger one is passed on as it arrives
    collected_bytes: int = 256 * MiB  # messages that a connection collects at once; the largest message fits

    # Flow control: what a peer may send before its bytes are consumed
    stream_window: int = 1 * MiB  # of one call; a picture as a tensor (602 KB) never stops for a WINDOW_UPDATE
    connection_window: int = 128 * MiB  # of all calls; of more than 64 each has less than `stream_window`
    unsent_bytes: int = 64 * KiB  # a stream with more than this to send makes its producer wait

    # Headers
    header_list_bytes: int = 16 * KiB  # gRPC suggests 8; a request beyond it is refused, and the connection lives on
    header_list_bytes_hard: int = 64 * KiB  # a larger request ends its connection (HPACK bombs); a response is dropped
    header_count: int = 100
    open_heads_bytes: int = 4 * MiB  # of open calls, counting header lists over 1 KiB: 1000 calls can have a token each
    max_continuations: int = 8  # frames of one request, as nghttp2 allows since the CONTINUATION flood of 2024

    # Floods
    resets: tuple[int, int] = (1000, 33)  # streams that either end reset; the numbers are nghttp2's since rapid reset
    glitches: tuple[int, int] = (400, 33)  # PRIORITY, unknown and empty frames, malformed requests
    tiny: tuple[int, int] = (10_000, 1_000)  # small DATA frames that complete no message, or arrive on closed streams
    control: tuple[int, int] = (1000, 100)  # PING, SETTINGS and WINDOW_UPDATE frames that no other traffic explains
    max_queued_replies: int = 1000  # acknowledgements of SETTINGS and PING that the peer does not read

    # Time, in seconds
    handshake_seconds: float = 10.0  # from accept to the client's first SETTINGS
    frame_seconds: float = 10.0  # for one frame or header block to become complete
    first_message_seconds: float = 5.0  # a unary request may fall below `min_rate` for this long before it is complete
    min_rate: int = 1 * KiB  # bytes per second that a peer must send of a request, and must read of a response
    write_stall_seconds: float = 30.0  # a call whose peer reads less for so long is reset; a silent socket, closed
    idle_seconds: float = 3600.0  # a connection without calls
    age_seconds: float = 0.0  # a connection gets a GOAWAY at this age, ± 10 %; 0 is never
    keepalive_seconds: float = 30.0  # a peer with calls that sends no byte for this long gets a PING; 0 is never
    keepalive_timeout: float = 10.0  # for the answer to the PING
    keepalive_rest: float = 0.0  # seconds until another PING while nothing but an answer to the last one has come

    def __post_init__(self) -> None:
        for name, low in (("max_streams", 1), ("message_bytes", 1), ("stream_window", 65_535), ("min_rate", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}")
        if self.connection_window < self.stream_window:
            raise ValueError("connection_window must not be smaller than stream_window")


UPSTREAM = Limits(
    # held for a caller who does not read, as by Envoy's default; 602 KB answers take 6 % less CPU than with 64 KiB
    stream_window=MiB,
    # no limit: callers share the connection, and one who does not read must not stop the others
    connection_window=(1 << 31) - 1,
    # Triton echoes what callers wrote, and models' own error texts can be long
    header_list_bytes=64 * KiB,
    # frames of cancelled calls count, and callers cancel as they like
    glitches=(100_000, 10_000),
    # answers of cancelled calls count; the burst is 0.1 s of work, and the rate 1 % of a core
    tiny=(100_000, 10_000),
    # a server answers messages later than they were sent, when what explains its frames may be forgotten: one caller's
    # 6,000 small messages ended everybody's connection; the burst is a tenth of a second of work
    control=(100_000, 10_000),
    # A connection that leads nowhere any more is dialled anew within 5 s, ...
    keepalive_seconds=1.5,
    keepalive_timeout=1.5,
    # ... but C-core's servers end a connection with a third PING within 5 minutes without data
    keepalive_rest=300.0,
)
"""Limits of a connection to an upstream. All callers share it, so nothing that one of them sends may end it."""


class Bucket:
    """A token bucket: tokens refill with time."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, burst_and_rate: tuple[int, int], now: float) -> None:
        self._burst, self._rate = burst_and_rate
        self._left = float(self._burst)
        self._at = now

    def take(self, tokens: float, now: float) -> bool:
        """Take tokens, or give them back if negative. Were there enough?"""
        left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._left = min(self._burst, left - tokens)
        self._at = now
        return self._left >= 0
