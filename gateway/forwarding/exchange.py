"""Values: one inference request as it arrived, and its answer. Bodies are serialized V2 messages."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.deadline import Deadline
from gateway.forwarding.caller import NO_METADATA, CallerMetadata
from gateway.types import Metadata, Served


@dataclass(frozen=True, slots=True)
class Request:
    """One ModelInferRequest."""

    body: bytes
    metadata: CallerMetadata = NO_METADATA
    deadline: Deadline | None = None
    peer: str = ""
    method: str = "ModelInfer"  # the RPC that the caller used, for telemetry


@dataclass(slots=True)
class Timings:
    """Seconds that a pipeline's parts took."""

    preprocess: float = 0.0  # steps before the first call
    model: float = 0.0
    postprocess: float = 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """One ModelInferResponse, carrying the name that the caller used."""

    body: bytes
    initial: Metadata
    trailing: Metadata
    served: Served
    timings: Timings | None = None  # of a pipeline
