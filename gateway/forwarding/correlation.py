"""Pure: the request id that a traced attempt has at its Triton, if its caller gave none.

Triton loses a few per cent of the parents that it is sent and begins traces of its own then, and on a stream it gives
all requests the parent that came with the first. Its spans and its log do name the request's id, so that id tells
which attempt they belong to. A caller's own id goes to the model as it is, since models act on ids (TensorRT-LLM stops
the request that has the id) and log them; such a request is found by the id that is in the gateway's span as well.
"""

from __future__ import annotations

from typing import Final

from gateway.status import UNKNOWN_ID
from gateway.types import Metadata

_IDS: Final = slice(3, 52)  # of a traceparent: "00-", 32 digits of the trace, "-", 16 of the span, "-01"


def traced_id(extra: Metadata, id: str) -> str | None:
    """`TRACE-SPAN` if the attempt is traced and has no id of its own, else None: then the request keeps what it has.

    extra:  the metadata that telemetry adds upstream, which has a `traceparent` for a sampled call.
    id:     the caller's.
    """
    if id:
        return None
    for key, value in extra:
        if key == "traceparent":
            return str(value)[_IDS]
    return None


def with_own_id(text: str, upstream_id: str, id: str) -> str:
    """An error's text as Triton would have written it for the caller's own id."""
    if upstream_id == id:
        return text
    return text.replace(f"[request id: {upstream_id}]", f"[request id: {id or UNKNOWN_ID}]", 1)
