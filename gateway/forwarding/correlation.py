"""Pure: the request id that a traced attempt has at Triton, if its caller gave none.

Triton ignores a few per cent of the trace parents that it is sent and begins traces of its own then; on a stream it
gives all requests the parent that came with the first one. But its spans and its log have the request's id, so the id
tells which attempt they belong to. A caller's own id goes to the model as it is, since models act on ids (TensorRT-LLM
stops the request that has the id) and log them; the gateway's span has that id too.
"""

from __future__ import annotations

from typing import Final

from gateway.status import UNKNOWN_ID
from gateway.types import Metadata

_IDS: Final = slice(3, 52)
"""The ids in a traceparent, which is "00-", 32 digits of the trace, "-", 16 digits of the span, "-01"."""


def traced_id(extra: Metadata, id: str) -> str | None:
    """`TRACE-SPAN` if the attempt is traced and its caller gave no id, else None.

    extra:   the metadata that telemetry adds upstream, which has a `traceparent` for a sampled call.
    id:      the id that the caller gave.
    source:  W3C Trace Context, section 3.2.
    """
    if id:
        return None
    for key, value in extra:
        if key == "traceparent":
            return str(value)[_IDS]
    return None


def with_own_id(text: str, upstream_id: str, id: str) -> str:
    """An error's text as Triton would have written it for the caller's id. upstream_id: the id that Triton was sent."""
    if upstream_id == id:
        return text
    return text.replace(f"[request id: {upstream_id}]", f"[request id: {id or UNKNOWN_ID}]", 1)
