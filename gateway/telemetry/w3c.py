"""Telemetry: reads a `traceparent`, without the cost of a whole propagator. Pure.

Source: W3C Trace Context Level 2, section 3.2 (version "-" trace-id "-" parent-id "-" trace-flags).
"""

from __future__ import annotations

import re

# A version above 00 may append further fields; ff is invalid; ids of only zeros are invalid.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]([0-9a-f])(?:-.*)?"
)
_SAMPLED = 1


def trace_id_of(traceparent: str) -> str:
    """The trace id, 32 hex digits, or "" if the text is not a valid traceparent."""
    match = _match(traceparent)
    return match[2] if match else ""


def is_unsampled(traceparent: str) -> bool:
    """Is the text a valid traceparent that says that the caller does not record the trace?"""
    match = _match(traceparent)
    return match is not None and not int(match[3], 16) & _SAMPLED


def _match(traceparent: str) -> re.Match[str] | None:
    match = _TRACEPARENT.fullmatch(traceparent)
    return None if match is None or (match[1] == "00" and len(traceparent) != 55) else match
