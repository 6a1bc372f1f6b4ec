"""Typed V2 questions to endpoints, for the RPCs whose answers the gateway must read: metadata, statistics, control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError

from gateway.errors import UpstreamFailed
from gateway.status import Code, Origin, code_of
from gateway.types import Metadata
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.pool import Pool
from gateway.v2.names import SERVICE

Message = TypeVar("Message")

TIMEOUT = 10.0
"""Seconds for one question whose caller set no deadline; these RPCs take milliseconds."""


@dataclass(frozen=True, slots=True)
class Asker:
    """On whose behalf a question is asked. Triton may want a key in the metadata (`--grpc-restricted-protocol`)."""

    metadata: Metadata = ()  # of the caller, what may be passed on
    timeout: float | None = TIMEOUT  # seconds


NOBODY: Final = Asker()
"""The gateway asks for itself."""


async def ask(endpoint: Endpoint, method: str, request: Any, answer: type[Message], asker: Asker = NOBODY) -> Message:
    """Call `method` of the V2 service on one endpoint.

    request, answer:  protobuf messages (Any: their classes carry no types).
    raises:           CallFailed, also if the answer can't be decoded: that is the endpoint's failure like any other.
    """
    body = request.SerializeToString()
    reply = await endpoint.connection.unary(SERVICE + method, body, asker.metadata, asker.timeout)
    return decoded(method, reply.body, answer)


def decoded(method: str, body: bytes, answer: type[Message]) -> Message:
    """An endpoint's answer to `method` as the protobuf message that it must be.

    raises: CallFailed if it is none.
    """
    try:
        return answer.FromString(body)  # type: ignore[attr-defined,no-any-return]
    except DecodeError as error:
        text = f"the server's answer to {method} is no message of Triton's protocol"
        raise CallFailed(Code.INTERNAL, text) from error


def usable(pool: Pool, model: str = "", version: str = "") -> Sequence[Endpoint]:
    """The endpoints that are not known to be unable to answer, best first."""
    able = [endpoint for endpoint in pool.endpoints if endpoint.can_serve(model, version)]
    return sorted(able, key=lambda endpoint: endpoint.in_flight)


def as_error(failure: CallFailed) -> UpstreamFailed:
    """An endpoint's failure as the caller gets it; what the transport says of addresses stays here."""
    text = failure.text if failure.from_server else "The endpoint cannot be reached."
    if failure.origin is Origin.GIVEN_UP:
        text = "The endpoint did not answer in time."
    return UpstreamFailed(code_of(failure.code), text, failure.trailing)
