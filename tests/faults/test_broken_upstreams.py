"""Servers and networks fail under load, and the ledger stays right: bars 38, 41, 42 and 47 of the reliability page."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from books import Sent, Servers, Write
from faulty_proxy import FaultyProxy, faulty_proxy
from ledger import OK, Ledger, calling
from namespaces import THERE, namespace, why_not
from traffic import gateway, http, until

MILLISECONDS = 20  # that a call takes, so that some are in flight at every fault
SOAK = "SOAK_SECONDS" in os.environ
TIMEOUT = 60.0  # reached by what hangs alone


def down(state: object) -> int:
    upstreams = state["upstreams"]  # type: ignore[index]
    return sum(endpoint["state"] == "down" for endpoints in upstreams.values() for endpoint in endpoints)


async def test_a_killed_server_costs_hardly_a_call_and_is_used_again(
    servers: Servers, write_config: Write, sent: Sent
) -> None:
    one, two = servers.start(MILLISECONDS), servers.start(MILLISECONDS)
    ledger = Ledger()
    async with (
        gateway(write_config(one.address, two.address, shared_memory=sent.shared_memory)) as running,
        calling(running.listen, ledger, size=sent.size, streams=2, timeout=TIMEOUT),
    ):
        for _ in range(10 if SOAK else 1):
            await asyncio.sleep(0.5)
            one.kill()
            killed = time.monotonic()
            await asyncio.sleep(1.2)
            one.start()
            booked = len(one.book.read_text())
            await until(lambda: len(one.book.read_text()) > booked, 10, "calls for the server that is back")  # noqa: B023
            assert not ledger.failed(killed + 1)
        await sent.check(running)
    ledger.check(servers.books)
    unary = {text: n for text, n in ledger.failed().items() if "stream" not in text}
    assert sum(unary.values()) <= max(1, ledger.good() / 1000), unary
    assert ledger.good() > 30


async def test_a_stopped_server_costs_calls_their_deadline_and_its_late_answers_are_nobodys(
    servers: Servers, write_config: Write, sent: Sent
) -> None:
    one, two = servers.start(MILLISECONDS), servers.start(MILLISECONDS)
    ledger = Ledger()
    async with (
        gateway(write_config(one.address, two.address, shared_memory=sent.shared_memory)) as running,
        calling(running.listen, ledger, size=sent.size, timeout=1.0),
    ):
        await asyncio.sleep(1)
        one.signal(signal.SIGSTOP)
        await until(lambda: down(running.shown.state()) == 1, 6, "the ejection")
        async with calling(running.listen, ledger, size=sent.size, timeout=TIMEOUT):  # who have time on any machine
            await asyncio.sleep(1)
            one.signal(signal.SIGCONT)  # its answers come now, to calls that have ended
            await until(lambda: down(running.shown.state()) == 0, 10, "its return")
            await asyncio.sleep(0.5)
        assert not ledger.failed(given=TIMEOUT)
        await sent.check(running)
    ledger.check(servers.books)
    assert {text.partition(":")[0] for text in ledger.failed()} <= {"DEADLINE_EXCEEDED"}


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs here")
async def test_a_network_that_swallows_packets_ends_calls_in_time_and_is_gone_round(
    servers: Servers, write_config: Write
) -> None:
    ledger = Ledger()
    with namespace() as far:
        one, two = servers.start(MILLISECONDS, THERE, far.inside), servers.start(MILLISECONDS)
        async with (
            gateway(write_config(one.address, two.address)) as running,
            calling(running.listen, ledger, timeout=1.0),
        ):
            await until(lambda: one.book.read_text() != "", 10, "a call over the link")
            far.swallow()
            await until(lambda: down(running.shown.state()) == 1, 8, "the ejection")
            async with calling(running.listen, ledger, timeout=TIMEOUT):  # who have time on any machine
                await asyncio.sleep(1)
                far.heal()
                booked = len(one.book.read_text())
                await until(lambda: len(one.book.read_text()) > booked, 30, "calls over the link again")
            assert not ledger.failed(given=TIMEOUT)
        one.kill()
    ledger.check(servers.books)
    assert {text.partition(":")[0] for text in ledger.failed()} <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}


def delays(proxy: FaultyProxy) -> None:
    proxy.delay = 0.1


def dribbles(proxy: FaultyProxy) -> None:
    proxy.delay, proxy.piece = 0.002, 7


def cuts(proxy: FaultyProxy) -> None:
    proxy.cut_after = 700


def resets(proxy: FaultyProxy) -> None:
    proxy.cut()


def swallows(proxy: FaultyProxy) -> None:
    proxy.swallow = True


@pytest.mark.parametrize("fault", [delays, dribbles, cuts, resets, swallows], ids=lambda fault: fault.__name__)
async def test_a_network_with_faults_gives_nobody_a_wrong_answer_or_two(
    servers: Servers, write_config: Write, sent: Sent, fault: Callable[[FaultyProxy], None]
) -> None:
    """One of two servers is behind it. What a bad network costs a call is its deadline or nothing."""
    one, two = servers.start(5), servers.start(5)
    ledger = Ledger()
    async with faulty_proxy(int(one.address.rpartition(":")[2])) as proxy:
        file = write_config(f"127.0.0.1:{proxy.port}", two.address, shared_memory=sent.shared_memory)
        async with gateway(file) as running, calling(running.listen, ledger, size=sent.size, streams=1, timeout=1.0):
            await asyncio.sleep(0.3)
            for _ in range(3):
                fault(proxy)
                await asyncio.sleep(0.4)
                assert (await http(running.admin_address, "/healthz"))[0] == 200
            proxy.heal()
            healed = time.monotonic()
            booked = len(one.book.read_text())
            await until(lambda: len(one.book.read_text()) > booked, 30, "calls through the healed network")
            await until(lambda: ledger.good(healed) > 0, 10, "good calls")
            await sent.check(running)
    ledger.check(servers.books)
    assert {text.partition(":")[0] for text in ledger.failed()} <= {"DEADLINE_EXCEEDED", "UNAVAILABLE", "UNKNOWN"}


async def test_corrupt_bytes_end_calls_with_an_error_and_the_connection_is_replaced(
    servers: Servers, write_config: Write, sent: Sent
) -> None:
    """TCP's checksum misses some. What is corrupt in a payload nobody can know but TLS; frames must not be misread."""
    one = servers.start(5)
    ledger = Ledger()
    async with (
        faulty_proxy(int(one.address.rpartition(":")[2])) as proxy,
        gateway(write_config(f"127.0.0.1:{proxy.port}", shared_memory=sent.shared_memory)) as running,
        calling(running.listen, ledger, size=sent.size, timeout=1.0),
    ):
        await until(lambda: ledger.good() > 20, 10, "good calls")
        before = proxy.connections
        proxy.corrupt = True
        await asyncio.sleep(1)
        await until(lambda: proxy.connections > before, 10, "another connection")
        proxy.heal()
        healed = time.monotonic()
        await until(lambda: ledger.good(healed) > 20, 30, "good calls again")
        await sent.check(running)
    ledger.check(servers.books)


def test_the_ledger_sees_what_is_wrong(tmp_path: Path) -> None:
    """A judge that never says no is none."""

    def finding(spoil: Callable[[Ledger, str, Path], object]) -> str:
        ledger, book = Ledger(), tmp_path / "book"
        id_ = ledger.begin(1.0)
        book.write_text(f"{id_}\n")
        spoil(ledger, id_, book)
        with pytest.raises(AssertionError) as caught:
            ledger.check([book])
        return str(caught.value).partition("\n")[0]

    assert "ended 0 times" in finding(lambda ledger, id_, book: None)
    assert "got b'x'" in finding(lambda ledger, id_, book: ledger.end(id_, OK, "", b"x"))

    def twice(ledger: Ledger, id_: str, book: Path) -> None:
        ledger.end(id_, grpc.StatusCode.UNAVAILABLE)
        book.write_text(f"{id_}\n{id_}\n")

    assert "was executed 2 times" in finding(twice)

    def stranger(ledger: Ledger, id_: str, book: Path) -> None:
        ledger.end(id_, grpc.StatusCode.UNAVAILABLE)
        book.write_text("other\n")

    assert "nobody asked for" in finding(stranger)

    def late(ledger: Ledger, id_: str, book: Path) -> None:
        ledger.entries[id_].deadline -= 60
        ledger.end(id_, grpc.StatusCode.DEADLINE_EXCEEDED)

    assert "late" in finding(late)
