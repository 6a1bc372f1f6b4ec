"""Connections are handed to whoever has fewest, and none is lost while those who take them come, hang and go."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack

import pytest
from frames import PREFACE, Answer, connect, settings
from patience import wait_until
from processes import request

from gateway.rpc.server import ServerCall
from gateway.status import Code
from gateway.transport.handover import LATE_SECONDS, MOST_ON_THE_WAY, HandedOver, Handover, Taker, fewest
from gateway.transport.listener import ForwardMethod, WireServer

PATH = "/test.Service/Who"


def taker(*, open_: int = 0, on_the_way: int = 0, since: float = 0.0, serves: bool = True) -> Taker:
    made = Taker(socket.socket())
    made.channel.close()
    made.serves, made.open, made.waiting_since = serves, open_, since
    made.on_the_way.extend([made.channel] * on_the_way)
    return made


class TestWhoGetsTheNext:
    def test_is_who_has_fewest_with_those_on_the_way(self) -> None:
        few, many = taker(open_=2, on_the_way=1), taker(open_=4)
        assert fewest([many, few], 0.5) is few

    @pytest.mark.parametrize(
        "unable",
        [taker(serves=False), taker(on_the_way=1, since=-LATE_SECONDS), taker(on_the_way=MOST_ON_THE_WAY)],
        ids=["has not started", "hangs", "has enough to take"],
    )
    def test_is_none_that_takes_none(self, unable: Taker) -> None:
        loaded = taker(open_=1000)
        assert fewest([unable, loaded], 0.0) is loaded
        assert fewest([unable], 0.0) is None

    def test_goes_round_among_equals(self) -> None:
        """Callers of one call each: their connections are gone before the next one comes."""
        takers = [taker() for _ in range(3)]
        for _ in range(30):
            chosen = fewest(takers, 0.0)
            assert chosen is not None
            chosen.handed += 1
        assert [each.handed for each in takers] == [10, 10, 10]


class Worker:
    """One that takes what it is handed, when told to."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover
        self.taker, channel = handover.join()
        self.held: list[socket.socket] = []
        self.source = HandedOver(channel, lambda: len(self.held), lambda: None)
        self.source.report()

    def take(self) -> None:
        try:
            while True:
                self.held.append(self.source.accept()[0])
        except (BlockingIOError, EOFError):
            return

    def takes_at_once(self) -> None:
        asyncio.get_running_loop().add_reader(self.source.fileno(), self.take)

    def drop(self, which: int) -> None:
        self.held.pop(which).close()
        self.source.report()

    def die(self) -> None:
        asyncio.get_running_loop().remove_reader(self.source.fileno())
        self.source.close()
        for each in self.held:
            each.close()


@pytest.fixture
async def bound() -> AsyncIterator[socket.socket]:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


@pytest.fixture
def clients(bound: socket.socket) -> AsyncIterator[Callable[[], socket.socket]]:
    with ExitStack() as exits:
        yield lambda: exits.enter_context(socket.create_connection(bound.getsockname()))  # type: ignore[misc]


Connect = Callable[[], socket.socket]


async def test_connections_are_even_however_they_come_and_go(bound: socket.socket, clients: Connect) -> None:
    """By SO_REUSEPORT four connections would be with one of two workers in an eighth of such trials."""
    handover = Handover(bound)
    workers = [Worker(handover) for _ in range(2)]
    for worker in workers:
        worker.takes_at_once()
    await handover.open(100)
    total = 0
    draw = random.Random(7)
    for _ in range(40):
        for _ in range(4):
            clients()
        total += 4
        await wait_until(lambda: sum(len(worker.held) for worker in workers) == total)  # noqa: B023
        assert abs(len(workers[0].held) - len(workers[1].held)) <= 1
        for worker in workers:  # as many of each, whichever
            for _ in range(2):
                worker.drop(draw.randrange(len(worker.held)))
                total -= 1
    await handover.close(1)
    for worker in workers:
        worker.die()


async def test_what_a_worker_had_not_taken_when_it_died_goes_to_another(bound: socket.socket, clients: Connect) -> None:
    handover = Handover(bound)
    dying = Worker(handover)
    await handover.open(100)
    made = [clients() for _ in range(5)]
    for number, client in enumerate(made):
        client.sendall(b"%d" % number)
    await wait_until(lambda: len(dying.taker.on_the_way) == 5)
    dying.held.append(dying.source.accept()[0])  # one it takes, which nobody else may have too
    other = Worker(handover)
    dying.die()
    other.takes_at_once()
    await wait_until(lambda: len(other.held) == 4)
    assert [held.recv(10) for held in other.held] == [b"1", b"2", b"3", b"4"]
    await asyncio.to_thread(made[0].settimeout, 60)
    with pytest.raises(ConnectionResetError):  # it had sent what was not read
        await asyncio.to_thread(made[0].recv, 1)
    await handover.close(1)
    other.die()


async def test_a_worker_that_could_not_be_handed_a_connection_gets_later_ones(
    bound: socket.socket, clients: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ETOOMANYREFS: more descriptors are on their way than a process may have open (unix(7))."""
    handover, send_fds = Handover(bound), socket.send_fds
    worker = Worker(handover)
    worker.takes_at_once()
    await handover.open(100)
    refused: list[int] = []

    def refuses_once(channel: socket.socket, buffers: list[bytes], descriptors: list[int]) -> int:
        if not refused:
            refused.extend(descriptors)
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return send_fds(channel, buffers, descriptors)

    monkeypatch.setattr(socket, "send_fds", refuses_once)
    clients()
    await wait_until(lambda: bool(refused))
    worker.source.report()  # as it does each second
    await wait_until(lambda: len(worker.held) == 1)
    await handover.close(1)
    worker.die()


async def test_connections_wait_in_the_queue_while_no_worker_is_there(bound: socket.socket, clients: Connect) -> None:
    handover = Handover(bound)
    first = Worker(handover)
    await handover.open(100)
    first.die()
    handover.leave(first.taker)
    made = [clients() for _ in range(3)]
    second = Worker(handover)
    second.takes_at_once()
    await wait_until(lambda: len(second.held) == 3)
    assert {held.getpeername() for held in second.held} == {client.getsockname() for client in made}
    await handover.close(1)
    second.die()


async def test_more_than_a_worker_may_have_on_the_way_are_all_taken(bound: socket.socket, clients: Connect) -> None:
    handover = Handover(bound)
    worker = Worker(handover)
    await handover.open(1024)
    made = [clients() for _ in range(3 * MOST_ON_THE_WAY)]
    await wait_until(lambda: len(worker.taker.on_the_way) == MOST_ON_THE_WAY)
    closing = asyncio.ensure_future(handover.close(60))  # it hands over what is left, first
    await asyncio.sleep(0.02)
    worker.takes_at_once()
    await closing
    await wait_until(lambda: len(worker.held) == len(made))
    await asyncio.wait_for(worker.source.ended.wait(), 60)
    worker.die()


async def test_a_server_that_stops_answers_whom_the_kernel_had_accepted() -> None:
    """They got their SYN-ACK: a server that closed its socket now would reset them, calls and all."""

    def who(call: ServerCall) -> None:
        call.send_message(b"me")
        call.finish(Code.OK, "")

    server = WireServer({PATH: ForwardMethod(who)})
    port = server.listen("127.0.0.1:0")
    await server.start()
    with ExitStack() as exits:
        peers = []
        for _ in range(20):  # the loop does not turn meanwhile, so that they all are in the queue
            peer = exits.enter_context(connect(port))
            peer.send(PREFACE + settings(()) + request(PATH.encode(), b"?"))
            peers.append(peer)
        assert server.connections == 0

        def answers() -> list[Answer]:
            return [peer.answer(1, 60) for peer in peers]

        answering = asyncio.ensure_future(asyncio.to_thread(answers))
        await server.stop(60)
        assert [answer.status for answer in await answering] == ["0"] * 20
