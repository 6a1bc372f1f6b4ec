"""Pure: the request id that a traced attempt has at its Triton.

Triton loses a few per cent of the parents that it is sent and begins traces of its own then, and on a stream it gives
all requests the parent that came with the first. Its spans and its log do name the request's id, so that id tells
which attempt they belong to. The caller's id is put back wherever the caller would see the difference.
"""

from __future__ import annotations

from typing import Final

from gateway.types import Metadata

UNKNOWN_ID: Final = "<id_unknown>"
"""What Triton's error texts say of a request without an id. source: triton core, infer_request.h, `LogRequest`."""

_IDS: Final = slice(3, 52)  # of a traceparent: "00-", 32 digits of the trace, "-", 16 of the span, "-01"


def traced_id(extra: Metadata, id: str) -> str | None:
    """`TRACE-SPAN:ID` if the attempt is traced, else None: then the request keeps its id.

    extra:  the metadata that telemetry adds upstream, which has a `traceparent` for a sampled call.
    id:     the caller's; stays last, so that a person who looks for it finds it.
    """
    for key, value in extra:
        if key == "traceparent":
            return f"{str(value)[_IDS]}:{id}"
    return None


def with_own_id(text: str, upstream_id: str, id: str) -> str:
    """An error's text as Triton would have written it for the caller's own id."""
    return text.replace(f"[request id: {upstream_id}]", f"[request id: {id or UNKNOWN_ID}]")
