"""Values: one inference request as it arrived, and its answer. Bodies are serialized V2 messages."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.deadline import Deadline
from gateway.forwarding.caller import NO_METADATA, CallerMetadata
from gateway.forwarding.raw_tensors import RawTensors
from gateway.types import Metadata, Served, Variant
from gateway.v2.peek import Head, rename_request


@dataclass(frozen=True, slots=True)
class Request:
    """One ModelInferRequest."""

    body: bytes  # whole, or all that is before its raw tensors if these are in `raw`
    metadata: CallerMetadata = NO_METADATA
    deadline: Deadline | None = None
    peer: str = ""
    method: str = "ModelInfer"  # the RPC that the caller used, for telemetry
    raw: RawTensors | None = None

    def whole(self) -> bytes:
        """The whole message."""
        return self.body if self.raw is None else self.raw.after(self.body)


@dataclass(slots=True)
class Timings:
    """Seconds that the parts of a pipeline took."""

    preprocess: float = 0.0  # steps before the first model call
    model: float = 0.0  # model calls
    postprocess: float = 0.0  # steps after the first model call


@dataclass(frozen=True, slots=True)
class Reply:
    """One ModelInferResponse, with the model name that the caller used."""

    body: bytes
    initial: Metadata
    trailing: Metadata
    served: Served
    timings: Timings | None = None  # None unless a pipeline answered


def request_for(variant: Variant, body: bytes, head: Head, *, id: str | None = None, extra: bytes = b"") -> bytes:
    """The request as this variant's Triton must see it."""
    if variant.model == head.model_name and variant.version in ("", head.model_version) and id is None and not extra:
        return body
    return rename_request(
        body, head, model_name=variant.model, model_version=variant.version or None, id=id, extra=extra
    )
