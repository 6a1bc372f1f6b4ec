"""A server whose answers are no protobuf messages: it has failed like any other, and the good ones are used."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.api.catalogue import Catalogue
from gateway.errors import GatewayError
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Route, Routes, Split
from gateway.status import Code
from gateway.types import Metadata, Variant
from gateway.upstream.connection import Answer
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

ANSWERS: dict[str, Any] = {
    "ModelReady": pb.ModelReadyResponse(ready=True),
    "ServerMetadata": pb.ServerMetadataResponse(name="triton"),
    "ModelMetadata": pb.ModelMetadataResponse(name="m"),
    "ModelConfig": pb.ModelConfigResponse(),
    "ModelStatistics": pb.ModelStatisticsResponse(model_stats=[pb.ModelStatistics(name="m", version="1")]),
    "RepositoryIndex": pb.RepositoryIndexResponse(),
}
QUESTIONS: dict[str, Callable[[Catalogue], Awaitable[Any]]] = {
    "ModelReady": lambda c: c.model_ready("p", ""),
    "ServerMetadata": lambda c: c.server_metadata(),
    "ModelMetadata": lambda c: c.model_metadata("p", ""),
    "ModelConfig": lambda c: c.model_config("p", ""),
    "ModelStatistics": lambda c: c.model_statistics("p", ""),
    "RepositoryIndex": lambda c: c.repository_index(pb.RepositoryIndexRequest()),
}


@dataclass
class Connection:
    """Answers rubbish, or as Triton."""

    garbage: bytes | None = None

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        method = path.rpartition("/")[2]
        return Answer(ANSWERS[method].SerializeToString() if self.garbage is None else self.garbage, (), ())


def catalogue(*connections: Any) -> Catalogue:
    endpoints = [Endpoint("main", f"e:{number}", each) for number, each in enumerate(connections)]
    for endpoint in endpoints:
        endpoint.state = State.READY
    routes = Routes([Route("p", (Variant("v", "main", "m"),), Split.all_to("v"))])
    topology = Topology(routes, {"main": Pool("main", endpoints)})
    return Catalogue(CurrentTopology(topology))


@pytest.mark.parametrize("method", QUESTIONS)
async def test_the_good_server_is_used(method: str) -> None:
    assert await QUESTIONS[method](catalogue(Connection(b"\xff" * 9), Connection()))


@pytest.mark.parametrize("method", QUESTIONS)
async def test_alone_it_is_an_error_of_the_server_without_a_stack(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(GatewayError) as raised:
        await QUESTIONS[method](catalogue(Connection(b"\xff" * 9)))
    assert raised.value.code in (Code.INTERNAL, Code.UNAVAILABLE)
    assert not caplog.records
