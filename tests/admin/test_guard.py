"""Who may read the admin plane: whoever is on its host, and elsewhere who has a token or a certificate."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from certificates import Authority
from command_line import command, free_address

from gateway.access.api_keys import hash_of
from gateway.admin import Admin, AdminAccess
from gateway.admin.guard import maybe_refusal, maybe_refusal_of_change

TOKEN = "igk_operator"
PATHS = ("/", "/page/page.js", "/metrics", "/config", "/state", "/nothing")


class Transport:
    def __init__(self, peer: str, certificate: Any = None) -> None:
        self._told = {"peername": (peer, 5), "peercert": certificate}

    def get_extra_info(self, name: str) -> Any:
        return self._told[name]


class Asked:
    """What the guard reads of a request."""

    def __init__(self, path: str, transport: Transport, host: str = "gateway:9002", **headers: str) -> None:
        self.path = path
        self.transport = transport
        self.host = host
        self.headers = headers


def status(path: str, peer: str = "10.0.0.9", *, is_local: bool = False, certificate: Any = None, **more: str) -> int:
    request: Any = Asked(path, Transport(peer, certificate), **more)
    refusal = maybe_refusal(AdminAccess((hash_of("other"), hash_of(TOKEN))), request, is_local=is_local)
    assert refusal is None or isinstance(refusal, web.Response)
    return 200 if refusal is None else refusal.status


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize("path", PATHS)
def test_elsewhere_a_token_or_a_certificate_is_needed_and_on_this_host_none(path: str) -> None:
    assert status(path) == 401
    for wrong in ("", "Bearer", "Bearer x", f"Bearer {TOKEN}x", TOKEN, "Basic !", basic("x"), basic(""), "Digest x"):
        assert status(path, Authorization=wrong) == 401, wrong
    for right in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", basic(TOKEN)):
        assert status(path, Authorization=right) == 200, right
    assert status(path, certificate={"subject": ()}) == 200
    for here in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert status(path, here) == 200


def test_probes_need_nothing() -> None:
    assert status("/healthz") == status("/readyz") == 200


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost:9002", 200), ("127.0.0.1:9002", 200), ("[::1]:9002", 200), ("LOCALHOST", 200),
        ("evil.example.com:9002", 421), ("localhost.evil.com", 421), ("10.0.0.9:9002", 421),
    ],
)  # fmt: skip
def test_a_name_of_elsewhere_that_leads_to_this_host_reads_nothing(host: str, code: int) -> None:
    assert status("/state", "127.0.0.1", is_local=True, host=host) == code
    assert status("/state", "127.0.0.1", is_local=False, host=host) == 200


class Source:
    def is_live(self) -> bool:
        return True

    def readiness(self) -> tuple[bool, list[str]]:
        return True, []

    def state(self) -> dict[str, Any]:
        return {"upstreams": {}, "models": {}}

    def config(self) -> dict[str, Any]:
        return {"current": None, "last_refused": None, "changes": []}


def change(peer: str, *, asks: bool, **headers: str) -> int:
    request: Any = Asked("/rollouts/int8/abort", Transport(peer), **headers)
    refusal = maybe_refusal_of_change(AdminAccess((hash_of(TOKEN),) if asks else ()), request)
    return 200 if refusal is None else refusal.status


def test_only_who_is_on_this_host_or_has_been_asked_who_he_is_changes_something_and_no_browser() -> None:
    assert change("127.0.0.1", asks=False) == 200
    assert change("10.0.0.9", asks=False) == 403
    assert change("10.0.0.9", asks=True) == 200  # since without a token it had not come so far
    for header in ({"Origin": "http://localhost:9002"}, {"Origin": "null"}, {"Sec-Fetch-Site": "same-origin"}):
        assert change("127.0.0.1", asks=True, **header) == change("127.0.0.1", asks=False, **header) == 403


async def test_an_order_is_taken_with_who_gave_it_and_only_by_post() -> None:
    orders = []

    async def order(*given: str) -> tuple[int, dict[str, object]]:
        orders.append(given)
        return 409, {"error": "not now"}

    access = AdminAccess((hash_of(TOKEN),))
    async with (
        Admin(Source(), "127.0.0.1:0", lambda _: (b"", "text/plain"), access=access, order=order) as admin,
        aiohttp.ClientSession() as session,
    ):
        url = f"http://{admin.address}/rollouts/int8/pause"
        async with session.post(url, headers={"x-asked-by": "somebody else"}) as answer:
            assert (answer.status, await answer.json()) == (409, {"error": "not now"})
        for method in ("GET", "PUT", "DELETE"):
            async with session.request(method, url) as answer:
                assert answer.status == 405
    assert orders == [("int8", "pause", "127.0.0.1 (admin)")]


async def test_nothing_can_be_changed_by_any_method() -> None:
    async with (
        Admin(Source(), "127.0.0.1:0", lambda _: (b"", "text/plain")) as admin,
        aiohttp.ClientSession() as session,
    ):
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"):
            for path in ("/", "/config", "/state", "/healthz"):
                async with session.request(method, f"http://{admin.address}{path}") as answer:
                    assert answer.status in (400, 404, 405), (method, path)


def elsewhere() -> str:
    """An address of this machine that is not loopback, if it has one; so it is asked as from elsewhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a network for documentation; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


@pytest.mark.parametrize("workers", [1, 2])
async def test_tokens_are_taken_over_while_it_runs(tmp_path: Path, workers: int) -> None:
    """One that is taken out of the config opens nothing any more."""
    file, here = tmp_path / "gateway.yaml", elsewhere()
    refused = 200 if here.startswith("127.") else 401

    def write(**admin: Any) -> None:
        content = {
            "listen": free_address(),
            "workers": workers,
            "admin": {"listen": "0.0.0.0:0", **admin},
            "upstreams": {"main": {"endpoints": ["127.0.0.1:1"]}},
            "direct": {"models": "all"},
        }
        file.write_text(json.dumps(content))

    async def asked(path: str = "/state") -> list[int]:
        found = []
        async with aiohttp.ClientSession() as session:
            for token in ("old", "new"):
                headers = {"Authorization": f"Bearer {token}"}
                async with session.get(f"http://{here}:{port}{path}", headers=headers) as answer:
                    found.append(answer.status)
        return found

    async def until_asked(*wanted: int, path: str = "/state") -> None:
        end = time.monotonic() + 60
        while await asked(path) != list(wanted):
            assert time.monotonic() < end, (await asked(path), wanted)
            await asyncio.sleep(0.1)

    write(tokens=[hash_of("old").hex()])
    async with command("serve", "--config", str(file), folder=tmp_path) as running:
        await running.until_said("admin on")
        _, admin = await running.until_serving()
        port = admin.rpartition(":")[2]
        await until_asked(200, refused)
        write(tokens=[hash_of("old").hex(), hash_of("new").hex()])
        await until_asked(200, 200)
        write(tokens=[hash_of("new").hex()], open=["metrics"])
        await until_asked(refused, 200)
        await until_asked(200, 200, path="/metrics")
        write(tokens=[])
        await until_asked(200, 200)
        assert "admin.tokens: changes" not in running.errors


async def test_it_serves_tls_and_knows_certificates_of_its_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, operator = authority.issue("localhost"), authority.issue("operator")
    access = AdminAccess(tls=(server.certificate, server.key, server.ca))
    trusting = ssl.create_default_context(cafile=server.ca)
    knowing = ssl.create_default_context(cafile=server.ca)
    knowing.load_cert_chain(operator.certificate, operator.key)
    here = elsewhere()
    async with Admin(Source(), "0.0.0.0:0", lambda _: (b"", "text/plain"), access=access) as admin:
        port = admin.address.rpartition(":")[2]
        found = []
        async with aiohttp.ClientSession() as session:
            for context in (trusting, knowing):
                url = f"https://{here}:{port}/state"
                async with session.get(url, ssl=context, server_hostname="localhost") as answer:
                    found.append(answer.status)
        is_elsewhere = not here.startswith("127.")
        assert found == [401 if is_elsewhere else 200, 200]
