"""A pool behind one name: its servers come and go, calls are spread over those there are, and none is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, read
from traffic import config, gateway, http, traffic, until, write
from tritonclient.grpc import service_pb2 as pb
from v2_calls import channel_to, infer
from v2_gateways import Script

from gateway.upstream import discovery as discovery_module

MODELS = {"adder": {"variants": {"only": {"upstream": "pool", "model": "m"}}}}


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of pool.test, for a name service that is asked very often. Empty: there is no such name."""
    known: list[str] = []
    ask = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **more: Any) -> Any:
        if host != "pool.test":
            return ask(host, *arguments, **more)
        if not known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in known]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(discovery_module, "_PERIOD_SECONDS", 0.05)
    monkeypatch.setattr(discovery_module, "_FIRST_RETRY_SECONDS", 0.05)
    return known


@contextlib.asynccontextmanager
async def server(host: str, port: int, script: Script) -> AsyncIterator[int]:
    """A server at one of this machine's loopback addresses; port 0 takes a free one."""
    running = grpc.aio.server()
    running.add_generic_rpc_handlers((script._handlers(),))
    port = running.add_insecure_port(f"{host}:{port}")
    await running.start()
    try:
        yield port
    finally:
        await running.stop(0)


def slow(begun: asyncio.Event, go_on: asyncio.Event) -> Callable[[bytes, Any], Any]:
    async def answer(body: bytes, context: Any) -> bytes:
        begun.set()
        await go_on.wait()
        return bytes(pb.ModelInferResponse(model_name="m", model_version="1").SerializeToString())

    return answer


async def test_calls_follow_the_addresses_of_a_name(tmp_path: Path, hosts: list[str]) -> None:
    async with server("127.0.0.1", 0, Script()) as port, server("127.0.0.2", port, Script()):
        first, second = f"127.0.0.1:{port}", f"127.0.0.2:{port}"
        hosts.append("127.0.0.1")
        content = config({"pool": f"dns:///pool.test:{port}"}, MODELS)
        async with gateway(write(tmp_path / "gateway.yaml", content)) as running, traffic(running.listen) as made:

            def name() -> dict[str, Any]:
                names: Any = running.shown.state()["names"]
                return dict(names[f"pool.test:{port}"])

            await made.more(10)
            assert set(made.endpoints()) == {first}
            hosts.append("127.0.0.2")
            await made.until(lambda: second in made.endpoints(), 10, "calls at the new address")
            hosts.remove("127.0.0.1")
            await until(lambda: set(Counter(e.endpoint for e in made.calls[-20:])) == {second}, 10, "calls there only")
            # Calls may prefer the quicker address before the other one has gone from the name.
            await until(lambda: name()["addresses"] == [second], 10, "one address")
            hosts.clear()  # the name service is gone
            await until(lambda: name()["failure"] is not None, 10, "a failure")
            await made.more(10)
            assert name() == {"addresses": [second], "failure": "Name or service not known"}
        assert not made.failed, made.why()


async def test_a_call_in_flight_ends_where_it_began_though_the_address_is_gone(
    tmp_path: Path, hosts: list[str]
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    async with server("127.0.0.1", 0, Script(slow(begun, go_on))) as port, server("127.0.0.2", port, Script()):
        hosts.append("127.0.0.1")
        content = config({"pool": f"dns:///pool.test:{port}"}, MODELS)
        async with gateway(write(tmp_path / "gateway.yaml", content)) as running, channel_to(running.listen) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(infer("adder").SerializeToString())

            def addresses() -> list[str]:
                pool: Any = running.shown.state()["upstreams"]
                return [endpoint["address"] for endpoint in pool["pool"]]

            await begun.wait()
            hosts[:] = ["127.0.0.2"]
            await until(lambda: addresses() == [f"127.0.0.2:{port}"], 10, "another address")
            go_on.set()
            assert pb.ModelInferResponse.FromString(await call).model_name == "adder"


async def test_a_gateway_starts_without_its_pool_and_is_ready_when_that_appears(
    tmp_path: Path, hosts: list[str]
) -> None:
    async with server("127.0.0.1", 0, Script()) as port:
        content = config({"pool": f"dns:///pool.test:{port}"}, MODELS)
        async with gateway(write(tmp_path / "gateway.yaml", content)) as running:
            assert running.shown.readiness() == (False, ["upstream pool: no address found"])
            # 0 and not nothing, or the alert UpstreamGone would not see it.
            usable = 'gateway_upstream_usable_endpoints{upstream="pool"}'
            assert f"{usable} 0.0" in (await http(running.admin_address, "/metrics"))[1]
            hosts.append("127.0.0.1")
            await until(lambda: running.shown.readiness()[0], 10, "ready")
            assert f"{usable} 1.0" in (await http(running.admin_address, "/metrics"))[1]


async def test_a_reload_may_bring_a_name_and_take_it_away(tmp_path: Path, hosts: list[str]) -> None:
    async with server("127.0.0.1", 0, Script()) as port:
        file = tmp_path / "gateway.yaml"
        hosts.append("127.0.0.1")
        async with gateway(write(file, config({"pool": f"127.0.0.1:{port}"}, MODELS))) as running:
            async with traffic(running.listen) as made:
                await made.more(5)
                write(file, config({"pool": f"dns:///pool.test:{port}"}, MODELS))
                running.reload()
                await until(lambda: bool(running.shown.state()["names"]), 10, "the name")
                await made.more(5)
                write(file, config({"pool": f"127.0.0.1:{port}"}, MODELS))
                running.reload()
                await until(lambda: not running.shown.state()["names"], 10, "no name")
                await made.more(5)
            assert not made.failed, made.why()


async def test_certificates_are_made_out_to_the_name_and_not_to_the_addresses(tmp_path: Path, hosts: list[str]) -> None:
    files = Authority(tmp_path).issue("pool.test")
    credentials = grpc.ssl_server_credentials([(read(files.key), read(files.certificate))])
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Script()._handlers(),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    hosts.append("127.0.0.1")
    upstream = {"endpoints": [f"dns:///pool.test:{port}"], "tls": {"ca": files.ca}}
    content = config({"pool": upstream}, MODELS)
    async with gateway(write(tmp_path / "gateway.yaml", content)) as running:
        async with traffic(running.listen) as made:
            await made.more(5)
        assert not made.failed, made.why()
    await server.stop(0)
