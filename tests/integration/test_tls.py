"""TLS and mutual TLS on the listening side, on both transports, with a real client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from certificates import Authority, Files, read
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.app import Gateway, Place
from gateway.config import load

CONFIG = """
listen: localhost:0
admin: {{listen: "127.0.0.1:0"}}
transport: {transport}
server: {{tls: {{cert: "{files.certificate}", key: "{files.key}"{client_ca}}}}}
upstreams: {{nowhere: {{endpoints: ["127.0.0.1:1"]}}}}
direct: {{models: all}}
telemetry: {{access_log: {{destination: none}}}}
"""


@pytest.fixture(scope="module")
def server_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Authority(tmp_path_factory.mktemp("server-authority")).issue("localhost")


@pytest.fixture(scope="module")
def client_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Authority(tmp_path_factory.mktemp("client-authority")).issue("a-client")


@pytest.fixture(params=["wire", "grpcio"])
async def address(
    request: pytest.FixtureRequest, tmp_path: Path, server_files: Files, client_files: Files
) -> AsyncIterator[str]:
    """A gateway that wants clients' certificates if the test is marked so."""
    mutual = request.node.get_closest_marker("mutual") is not None
    client_ca = f', client_ca: "{client_files.ca}"' if mutual else ""
    file = tmp_path / "gateway.yaml"
    file.write_text(CONFIG.format(transport=request.param, files=server_files, client_ca=client_ca))
    loaded = load(file, {})
    async with Gateway(loaded, lambda: load(file, {}), {}, Place("127.0.0.1:0")) as gateway:
        yield gateway.listen


async def check(address: str, credentials: grpc.ChannelCredentials | None) -> int:
    """The health of the server, asked by C core."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = grpc.aio.secure_channel(address, credentials)
    async with channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return int(answer.status)


async def test_a_client_that_trusts_the_authority_is_served(address: str, server_files: Files) -> None:
    credentials = grpc.ssl_channel_credentials(read(server_files.ca))
    assert await check(address, credentials) == health_pb2.HealthCheckResponse.NOT_SERVING  # there is no Triton


async def test_plain_text_is_not_served_beside_tls(address: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await check(address, None)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.mutual
async def test_mutual_tls_serves_those_with_a_certificate(
    address: str, server_files: Files, client_files: Files
) -> None:
    credentials = grpc.ssl_channel_credentials(
        read(server_files.ca), read(client_files.key), read(client_files.certificate)
    )
    assert await check(address, credentials) == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.mutual
async def test_mutual_tls_refuses_those_without_one(address: str, server_files: Files) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await check(address, grpc.ssl_channel_credentials(read(server_files.ca)))
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
