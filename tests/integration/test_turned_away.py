"""Who comes with the wrong certificate, or speaks another protocol than the port does: what he, the log and the metrics
are told. Both by asyncio's loop and by uvloop, which the command runs on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from certificates import Authority
from command_line import command, free_address
from traffic import http
from v2_calls import call, channel_to, infer
from v2_gateways import gateway_of, transparent_to

from gateway.config import load
from gateway.triton import LocalTriton

HTTP1 = b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(189)


class World:
    """A gateway that wants client certificates, or none that speaks TLS."""

    def __init__(self, folder: Path, *, tls: bool) -> None:
        (folder / "strange").mkdir()
        self.mine, self.strange = Authority(folder), Authority(folder / "strange")
        self.server = self.mine.issue("localhost")
        self.listen, self.admin = free_address(), free_address()
        content: dict[str, Any] = {
            "listen": self.listen,
            "admin": {"listen": self.admin},
            "telemetry": {"access_log": {"destination": "none"}},
            "upstreams": {"main": {"endpoints": ["127.0.0.1:1"]}},
            "direct": {"models": "all"},
        }
        if tls:
            files = {"cert": self.server.certificate, "key": self.server.key, "client_ca": self.server.ca}
            content["server"] = {"tls": files}
        self.file = folder / "gateway.yaml"
        self.file.write_text(yaml.safe_dump(content))

    async def raw(self, sent: bytes, most: int = -1) -> bytes:
        """What the port answers to these bytes, until it closes."""
        host, port = self.listen.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(most), 60)
        finally:
            writer.close()

    async def shake(self, change: Callable[[ssl.SSLContext], None] = lambda context: None) -> str:
        """What a client's TLS says that it was told."""
        context = ssl.create_default_context(cafile=self.server.ca)
        context.set_alpn_protocols(["h2"])
        change(context)
        host, port = self.listen.split(":")
        try:
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
            writer.write(PREFACE)
            await asyncio.wait_for(reader.read(1), 60)
        except ssl.SSLError as error:
            return str(error.reason)
        except OSError as error:
            return type(error).__name__
        writer.close()
        return ""

    async def counted(self) -> dict[str, int]:
        _, text = await http(self.admin, "/metrics")
        found = re.findall(r'^gateway_connections_turned_away_total{reason="(\w+)"} (\d+)', text, re.MULTILINE)
        return {reason: int(count) for reason, count in found if count != "0"}


@pytest.fixture(params=["asyncio", "uvloop"])
def running(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Any:
    """Runs the gateway of a world; gives what its log says by then."""

    @contextlib.asynccontextmanager
    async def run(world: World) -> AsyncIterator[Callable[[], str]]:
        if request.param == "asyncio":
            with caplog.at_level(logging.WARNING):
                async with gateway_of(load(world.file, {})):
                    yield lambda: caplog.text
            return
        async with command("serve", "--config", str(world.file), folder=tmp_path) as process:
            await process.until_serving()
            yield lambda: process.output + process.errors

    return run


async def test_a_client_that_fails_the_handshake_is_told_by_an_alert_and_the_operator_by_a_line(
    tmp_path: Path, running: Any
) -> None:
    world = World(tmp_path, tls=True)
    stranger, friend = world.strange.issue("eve"), world.mine.issue("ada")

    def old(context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")

    async with running(world) as log:
        assert await world.shake(lambda context: context.load_cert_chain(friend.certificate, friend.key)) == ""
        for _ in range(3):
            assert "CERTIFICATE_REQUIRED" in await world.shake()
        told = await world.shake(lambda context: context.load_cert_chain(stranger.certificate, stranger.key))
        assert "UNKNOWN_CA" in told
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            assert "PROTOCOL_VERSION" in await world.shake(old)
        assert (await world.raw(HTTP1)).startswith(b"HTTP/1.1 400 ")
        assert b"over TLS" in await world.raw(PREFACE)
        assert await world.counted() == {"no_certificate": 3, "certificate": 1, "version": 1, "plaintext": 2}
        said = log()
    assert said.count("(no_certificate)") == said.count("(plaintext)") == 1
    assert re.search(r"a connection of ipv4:127\.0\.0\.1:\d+ was turned away \(version\): unsupported protocol", said)


async def test_a_client_of_another_protocol_is_told_in_that_protocol(tmp_path: Path, running: Any) -> None:
    world = World(tmp_path, tls=False)
    async with running(world) as log:
        assert (await world.raw(PREFACE, most=9))[3:4] == b"\x04"  # SETTINGS, once it is known what the client speaks
        answer = await world.raw(HTTP1)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"this port speaks gRPC" in answer
        assert await world.raw(CLIENT_HELLO) == bytes.fromhex("15030100020228")
        assert "HANDSHAKE_FAILURE" in await world.shake()
        assert await world.raw(b"\0hello") == b""
        assert await world.counted() == {"http1": 1, "tls": 2, "other": 1}
        said = log()
    assert "a client speaks HTTP/1 on the gRPC port" in said
    assert said.count("(tls)") == 1


async def test_the_http_port_of_triton_as_an_upstream_is_told_apart(triton: LocalTriton) -> None:
    async with transparent_to(triton.http_address) as gateway, channel_to(gateway.listen) as channel:
        assert (await call(channel, infer("add_one_a"))).code.name == "UNAVAILABLE"
        _, state = await http(gateway.admin_address, "/state")
    assert "is it a gRPC port?" in state["upstreams"]["triton"][0]["reason"]


def in_front_of(behind: World, folder: Path, upstream: dict[str, Any]) -> Path:
    """The config file of a gateway whose upstream is another one."""
    content = {
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        "upstreams": {"main": {"endpoints": [behind.listen], **upstream}},
        "direct": {"models": "all"},
    }
    file = folder / "front.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


async def reason_of(behind: World, front: Path) -> str:
    """What the gateway in front says of the other one."""
    async with gateway_of(load(behind.file, {})), gateway_of(load(front, {})) as gateway:
        _, state = await http(gateway.admin_address, "/state")
    return str(state["upstreams"]["main"][0]["reason"])


@pytest.mark.parametrize(("gateways_tls", "told"), [(True, "speak no TLS on this port"), (False, "over TLS")])
async def test_tls_on_one_side_alone_is_told_apart(tmp_path: Path, gateways_tls: bool, told: str) -> None:
    behind = World(tmp_path, tls=not gateways_tls)
    upstream = {"tls": {"ca": behind.server.ca}} if gateways_tls else {}
    assert told in await reason_of(behind, in_front_of(behind, tmp_path, upstream))


async def test_a_client_certificate_that_is_missing_is_told_to_the_gateway_as_a_client(tmp_path: Path) -> None:
    behind = World(tmp_path, tls=True)
    upstream = {"tls": {"ca": behind.server.ca, "server_name": "localhost"}}
    assert "it wants a client certificate" in await reason_of(behind, in_front_of(behind, tmp_path, upstream))
