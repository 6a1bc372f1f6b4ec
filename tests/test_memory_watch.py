"""What a worker does without as memory gets scarce, and that it does with it again afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from gateway.errors import Overloaded
from gateway.forwarding.admission import AdmissionSettings, Gates
from gateway.forwarding.shadowing import Shadows
from gateway.forwarding.sharing import Shares
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.memory_watch import MemoryWatch
from gateway.process.container import Memory
from gateway.routing import Routes
from gateway.rpc.budget import SMALL_MESSAGE, Budget
from gateway.rpc.codes import CallFailed
from gateway.steps.budget import MEMORY

MIB = 1 << 20


@dataclass
class Connections:
    """A listener's, of which each reset gives back so much."""

    reset: list[str] = field(default_factory=list)
    is_closed: bool = False
    heard: Callable[[int], None] = lambda size: None

    def tell_bytes(self, heard: Callable[[int], None]) -> None:
        self.heard = heard

    def close_to_new(self, is_closed: bool) -> None:
        self.is_closed = is_closed

    def reset_heaviest(self) -> tuple[str, int] | None:
        self.reset.append("ipv4:127.0.0.1:1")
        return self.reset[-1], 5 * MIB


class Worker:
    def __init__(self) -> None:
        self.percent: float | None = 10.0
        self.collected = Budget(100 * MIB, "server.max_collected_bytes")
        self.connections = Connections()
        self.gates = Gates()
        self.gates.apply(AdmissionSettings(priority="x-priority"), 0.0)
        shadows = Shadows(CurrentTopology(Topology(Routes(), {})), self.gates)
        self.watch = MemoryWatch(
            self._read, collected=self.collected, shares=Shares(), gates=self.gates, shadows=shadows
        )
        self.watch.watch(self.connections)

    def _read(self) -> Memory:
        if self.percent is None:
            raise OSError("no such file")
        return Memory(int(self.percent * MIB), 100 * MIB)

    def at(self, percent: float | None) -> int:
        self.percent = percent
        self.watch.look()
        return self.watch.now().step

    @property
    def collects(self) -> bool:
        try:
            self.collected.take(1, SMALL_MESSAGE + 1)
        except CallFailed:
            return False
        self.collected.give(1)
        return True

    @property
    def takes_batch_calls(self) -> bool:
        try:
            self.gates.check_shed({"x-priority": "batch"})
        except Overloaded:
            return False
        return True


@pytest.fixture
def worker() -> Iterator[Worker]:
    before, MEMORY.most = MEMORY.most, 64 * MIB
    yield Worker()
    MEMORY.most, MEMORY.spare = before, None


async def test_each_step_does_without_more_and_the_way_down_undoes_it(worker: Worker) -> None:
    seen = []
    for percent in (50, 86, 93, 91, 86, 50):
        step = worker.at(percent)
        seen.append((step, worker.collects, worker.takes_batch_calls, not worker.connections.is_closed))
    assert seen == [
        (0, True, True, True),
        (1, False, True, True),
        (2, False, False, False),
        (2, False, False, False),
        (1, False, True, True),
        (0, True, True, True),
    ]
    assert not worker.connections.reset


async def test_small_messages_are_taken_at_every_step_and_other_classes_of_calls(worker: Worker) -> None:
    assert worker.at(97) == 3
    worker.collected.take(SMALL_MESSAGE, SMALL_MESSAGE)
    worker.gates.check_shed({"x-priority": "high"})
    worker.gates.check_shed({})


async def test_the_heaviest_goes_and_no_other_before_its_memory_is_back(worker: Worker) -> None:
    worker.at(96)
    worker.at(97)
    worker.at(97)
    assert len(worker.connections.reset) == 1  # what it held may not be counted off yet
    while len(worker.connections.reset) < 2:
        await asyncio.sleep(0.01)
        worker.at(97)
    assert worker.watch.now().resets == 2
    assert worker.at(80) == 0


async def test_many_bytes_that_come_are_a_reason_to_look(worker: Worker) -> None:
    worker.percent = 90
    for _ in range(3):
        worker.connections.heard(1 * MIB)
        assert worker.watch.now().step == 0
    worker.connections.heard(1 * MIB)
    assert worker.watch.now().step == 1


async def test_pictures_get_what_is_left_below_the_last_step(worker: Worker) -> None:
    """What they hold counts in full, since it may not be in use yet."""
    worker.at(60)
    assert MEMORY.spare == 35 * MIB
    worker.at(99)
    with pytest.raises(Overloaded), MEMORY.hold(1 * MIB, "a picture", patience=0.0):
        pass


async def test_the_log_tells_the_way_up_at_once_and_does_not_repeat_a_fight(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.memory_watch")
    for percent in (86, 80, 86, 93, 86, 93, 80, 93):
        worker.at(percent)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("86 of 100 MiB of memory (86%) are in use: messages over 64 KiB")
    assert "new connections" in lines[1]


async def test_a_system_that_does_not_tell_is_said_once_and_refuses_nothing(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    assert (worker.at(None), worker.at(None)) == (0, 0)
    assert len(caplog.records) == 1
    assert worker.collects
