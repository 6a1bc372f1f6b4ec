"""Connections to the admin plane that ask nothing: they take no room from those who ask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence

import aiohttp
import pytest

from gateway.admin import Admin, Connections

HALF = b"GET /state HTTP/1.1\r\nHost: x\r\nX-A: "
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Source:
    """A gateway that is well."""

    def is_live(self) -> bool:
        return True

    def readiness(self) -> tuple[bool, Sequence[str]]:
        return True, []

    def state(self) -> Mapping[str, object]:
        return {}

    def config(self) -> Mapping[str, object]:
        return {}


@contextlib.asynccontextmanager
async def opened(admin: Admin, count: int, said: bytes) -> AsyncIterator[list[Streams]]:
    """So many connections that said this much."""
    host, port = admin.address.split(":")
    streams = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
    for _, writer in streams:
        writer.write(said)
    try:
        yield streams
    finally:
        for _, writer in streams:
            writer.close()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What came before the end."""
    with contextlib.suppress(ConnectionResetError):
        return await asyncio.wait_for(reader.read(), 60)
    return b""


async def healthz(admin: Admin) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"http://{admin.address}/healthz") as answer:
        return answer.status


def no_metrics(accept: str) -> tuple[bytes, str]:
    return b"", "text/plain"


@pytest.mark.parametrize("said", [HALF, b"", b"PRI * HT", WHOLE], ids=["half", "nothing", "a preface", "idle"])
async def test_health_answers_whatever_the_others_said(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    closed: list[str] = []
    connections = Connections(closed.append, most=4)
    with caplog.at_level(logging.WARNING):
        async with Admin(Source(), "127.0.0.1:0", no_metrics, connections) as admin, opened(admin, 40, said):
            for _ in range(10):
                assert await healthz(admin) == 200
            assert len(connections) <= 4
    assert closed.count("admin") >= 36
    assert caplog.text.count("were more than 4 at once") == 1


async def test_a_half_request_is_cut_also_if_it_goes_on_byte_by_byte() -> None:
    connections = Connections(head_seconds=0.2)
    async with Admin(Source(), "127.0.0.1:0", no_metrics, connections) as admin, opened(admin, 1, HALF) as streams:
        reader, writer = streams[0]
        closed = asyncio.ensure_future(until_closed(reader))
        while not closed.done():
            writer.write(b"a")
            await asyncio.sleep(0.01)
        assert await closed == b""
    assert len(connections) == 0


async def test_whoever_has_asked_may_ask_again_and_is_closed_when_it_does_not() -> None:
    connections = Connections(head_seconds=20, idle_seconds=0.2)
    async with Admin(Source(), "127.0.0.1:0", no_metrics, connections) as admin, opened(admin, 1, 2 * WHOLE) as streams:
        assert (await until_closed(streams[0][0])).count(b"200 OK") == 2


async def test_one_that_is_being_answered_stays() -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(accept: str) -> tuple[bytes, str]:
        entered.set()
        assert release.wait(30)
        return b"done", "text/plain"

    async with Admin(Source(), "127.0.0.1:0", slow, Connections(most=2)) as admin, aiohttp.ClientSession() as session:
        scraping = asyncio.ensure_future(session.get(f"http://{admin.address}/metrics"))
        assert await asyncio.to_thread(entered.wait, 30)
        async with opened(admin, 10, HALF):
            assert await healthz(admin) == 200
            release.set()
            async with await scraping as answer:
                assert await answer.read() == b"done"
