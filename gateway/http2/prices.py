"""What frames, and streams that end too soon, cost a peer: tokens of the buckets in `Limits`. Negative ones give back.

A frame that does work for its sender costs nothing, one that an honest peer has little reason to send costs a token,
and honest work gives back what it explains.
"""

from __future__ import annotations

from typing import Final

# `Limits.glitches`: frames that mean nothing
EMPTY_DATA: Final = 1
PRIORITY_FRAME: Final = 1
UNKNOWN_FRAME: Final = 1
SMALL_CONTINUATION: Final = 1  # of an answer's head; see LEAST_CONTINUATION
MALFORMED_HEAD: Final = 1
REFUSED_HEAD: Final = 1  # one that gRPC, or a limit, does not allow
LEAST_CONTINUATION: Final = 1024  # bytes; one that is smaller, and not the last of its block, is small

# `Limits.tiny`: frames of bodies that are no bulk, and complete nothing
TINY: Final = 256  # bytes; a DATA frame of an open stream that is smaller, and not its last, is tiny
LEAST_WAITING: Final = 32  # bytes; no request on a stream is smaller, so no frame that waits for a slow reader is
TINY_DATA: Final = 1  # brings no message's end, or is on a call that is over
MESSAGE_END: Final = -2  # a message may come in two tiny frames that are not its end: its prefix, and what is left over
LATE_FRAME: Final = 1  # DATA or HEADERS of a stream that is closed
LATE_BULK: Final = 1024  # bytes; a late DATA frame that is no smaller is a body on its way, and is free
LATE_END: Final = -1  # the peer ends a stream that we ended before: that it had sent a little is no wonder

# `Limits.control`: frames of the connection, beyond what honest work explains
WINDOW_UPDATE_FRAME: Final = 1.0
CONTROL_FRAME: Final = 1.0  # SETTINGS, PING, GOAWAY
HEAD_EXPLAINS: Final = 6.0  # C-core: up to three updates, and BDP pings
MESSAGE_EXPLAINS: Final = 3.0  # a small message on a stream: C-core's two updates and a BDP ping
BYTES_PER_UPDATE: Final = 4096  # sent bytes that explain one WINDOW_UPDATE

# `Limits.resets`: streams that end too soon
WASTED: Final = 1.0  # the peer reset it soon, with nothing to show for it ("rapid reset"); whatever code it gave
FORCED: Final = 4.0  # we had to, over a fault of the peer's ("MadeYouReset")
EARLY: Final = 1.0  # we answered before its request was complete, and stopped it
ANSWERED: Final = -9.0  # who resets nine calls of ten is a client that hedges, or is in a hurry
PATIENT: Final = 1.0  # seconds; who resets a call that is older has waited for it

# Of a turn of the event loop, counted in events
BODIES_AT_ONCE: Final = 500  # DATA frames that are read in one go, half a millisecond; the rest waits for later turns
HEADER_BYTES_PER_EVENT: Final = 320  # bytes of Huffman code that take as long to decode as an event to handle
