"""A connection whose answers to probes are scripted: for faults that no real Triton can be made to have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from tritonclient.grpc import service_pb2 as pb

from gateway.status import Code, Origin
from gateway.types import Metadata
from gateway.upstream.connection import Answer, CallFailed, StreamCall, StreamListener


@dataclass
class ScriptedConnection:
    """Lives, and every model is ready, unless told otherwise."""

    address: str = "a:1"
    live: bool = True
    not_ready: set[str] = field(default_factory=set)
    failure: CallFailed | None = None
    garbage: bytes | None = None
    asked: list[str] = field(default_factory=list)  # "ServerLive", or a model's name and version
    closed: bool = False
    fault: Callable[[str], None] = print  # to be told that the server was cut for its faults

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        await asyncio.sleep(0)
        method = path.rpartition("/")[2]
        request = pb.ModelReadyRequest.FromString(body)
        self.asked.append(f"{request.name}:{request.version}" if method == "ModelReady" else method)
        if self.failure is not None:
            raise self.failure
        if self.garbage is not None:
            return Answer(self.garbage, (), ())
        if method == "ServerLive":
            return Answer(pb.ServerLiveResponse(live=self.live).SerializeToString(), (), ())
        ready = request.name not in self.not_ready
        return Answer(pb.ModelReadyResponse(ready=ready).SerializeToString(), (), ())

    def stream(self, path: str, metadata: Metadata, timeout: float | None, listener: StreamListener) -> StreamCall:
        raise AssertionError("probes open no streams")

    def tell_faults(self, told: Callable[[str], None]) -> None:
        self.fault = told

    @property
    def losses(self) -> int:
        return 0

    async def aclose(self) -> None:
        self.closed = True


TIMED_OUT = CallFailed(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", origin=Origin.GIVEN_UP)
REFUSED = CallFailed(Code.UNAVAILABLE, "connection refused", origin=Origin.CONNECTION)
