"""Prices of frames, and of streams that end early, in tokens of the buckets in `Limits`. A negative price gives back.

A frame that does work for its sender is free. A frame that an honest peer has little reason to send costs a token.
Honest work gives back the tokens of the control frames that it explains.
"""

from __future__ import annotations

from typing import Final

# `Limits.glitches`: frames without effect
EMPTY_DATA: Final = 1
PRIORITY_FRAME: Final = 1
UNKNOWN_FRAME: Final = 1
SMALL_CONTINUATION: Final = 1  # of a response; see LEAST_CONTINUATION
MALFORMED_HEAD: Final = 1
REFUSED_HEAD: Final = 1  # a valid header list that gRPC or a limit refuses
LEAST_CONTINUATION: Final = 1024  # bytes; a smaller CONTINUATION frame, unless it ends its block, is small

# `Limits.tiny`: small frames of bodies that complete no message
TINY: Final = 256  # bytes; a smaller DATA frame without END_STREAM is tiny
LEAST_WAITING: Final = 32  # bytes; no request of a stream is smaller, so such a frame for a slow reader has a price
TINY_DATA: Final = 1  # a tiny frame that completes no message, or whose call is over
MESSAGE_END: Final = -2  # gives back a message's prefix and its last piece, which may come in tiny frames
LATE_FRAME: Final = 1  # DATA or HEADERS of a closed stream
LATE_BULK: Final = 1024  # bytes; a late DATA frame of this size or more is free: it is a body that was on its way
LATE_END: Final = -1  # the peer ends a stream that we had ended; it may have had little left to send

# `Limits.control`: frames of the connection that no other traffic explains
WINDOW_UPDATE_FRAME: Final = 1.0
CONTROL_FRAME: Final = 1.0  # SETTINGS, PING, GOAWAY
HEAD_EXPLAINS: Final = 6.0  # each response: C-core sends up to three updates, and BDP pings
MESSAGE_EXPLAINS: Final = 3.0  # each message sent on a stream: C-core sends two updates and a BDP ping
BYTES_PER_UPDATE: Final = 4096  # bytes sent that explain one WINDOW_UPDATE

# `Limits.resets`: streams that end early
WASTED: Final = 1.0  # the peer reset a stream early, with whatever code ("rapid reset")
FORCED: Final = 4.0  # we reset a stream for an error of the peer's ("MadeYouReset")
EARLY: Final = 1.0  # we answered before the request was complete, and stopped it
ANSWERED: Final = -9.0  # a client that resets nine calls of ten is hedging or in a hurry, and is served
PATIENT: Final = 1.0  # seconds; a call older than this was waited for, so its reset is free

# Work of one turn of the event loop, counted in events
BODIES_AT_ONCE: Final = 500  # DATA frames read in one go, half a millisecond; later turns read the rest
HEADER_BYTES_PER_EVENT: Final = 320  # bytes of Huffman code that take as long to decode as an event takes to handle
