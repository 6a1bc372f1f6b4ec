"""TLS and mutual TLS on the listening side, with a real client."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from certificates import Authority, Files, read
from grpc_health.v1 import health_pb2, health_pb2_grpc
from traffic import until

from gateway.app import Gateway, Place
from gateway.config import load

CONFIG = """
listen: localhost:0
admin: {{listen: "127.0.0.1:0"}}
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


@pytest.fixture
async def address(
    request: pytest.FixtureRequest, tmp_path: Path, server_files: Files, client_files: Files
) -> AsyncIterator[str]:
    """A gateway that wants clients' certificates if the test is marked so."""
    mutual = request.node.get_closest_marker("mutual") is not None
    client_ca = f', client_ca: "{client_files.ca}"' if mutual else ""
    file = tmp_path / "gateway.yaml"
    file.write_text(CONFIG.format(files=server_files, client_ca=client_ca))
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
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
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


async def test_a_renewed_certificate_is_shown_to_new_connections_without_a_restart(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As cert-manager and the kubelet do it: other contents at the same paths. Here even by another authority."""
    old, new = (Authority(tmp_path_factory.mktemp("authority")).issue("localhost") for _ in range(2))
    used = Files("", str(tmp_path / "tls.crt"), str(tmp_path / "tls.key"))

    def put(files: Files) -> None:
        shutil.copy(files.certificate, used.certificate)
        shutil.copy(files.key, used.key)

    put(old)
    file = tmp_path / "gateway.yaml"
    file.write_text(CONFIG.format(files=used, client_ca=""))
    loaded = load(file, {})
    trusting_old, trusting_new = (grpc.ssl_channel_credentials(read(files.ca)) for files in (old, new))
    async with (
        Gateway(loaded, lambda: load(file, {}), {}, Place("127.0.0.1:0")) as gateway,
        grpc.aio.secure_channel(gateway.listen, trusting_old) as before,
    ):
        ask = health_pb2_grpc.HealthStub(before).Check
        await ask(health_pb2.HealthCheckRequest(), timeout=60)
        put(new)
        gateway.reload()
        await until(lambda: gateway.shown.config()["changes"][1:] != [], 10, "the renewed files are read")  # type: ignore[index]
        assert await check(gateway.listen, trusting_new) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="CERTIFICATE_VERIFY_FAILED"):
            await check(gateway.listen, trusting_old)
        await ask(health_pb2.HealthCheckRequest(), timeout=60)  # who is connected stays so
