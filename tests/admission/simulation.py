"""Servers and callers in simulated time, with a `Gate` between them: what queueing theory knows of, and Triton.

Open loop: callers send at their rate, whatever comes of it. One seed gives one run.
"""

from __future__ import annotations

import heapq
import itertools
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.forwarding.admission import AdaptiveLimit, Gate, Refused


class Clock:
    """Runs what is due, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), act))

    def run(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            self.now, _, act = heapq.heappop(self._due)
            act()


class Server(ABC):
    """Answers calls, or refuses them at once when its queue is full."""

    def __init__(self, clock: Clock, most_queued: int | None) -> None:
        self.clock = clock
        self.queue: deque[Callable[[], None]] = deque()
        self.most_queued = most_queued
        self.refused = 0

    def take(self, done: Callable[[], None]) -> bool:
        if self.most_queued is not None and len(self.queue) >= self.most_queued and not self.is_free():
            self.refused += 1
            return False
        self.queue.append(done)
        self.work()
        return True

    @abstractmethod
    def is_free(self) -> bool: ...

    @abstractmethod
    def work(self) -> None: ...


class Instances(Server):
    """M/M/c or M/D/c with a bounded queue: `seconds` gives each service time."""

    def __init__(self, clock: Clock, count: int, seconds: Callable[[], float], most_queued: int | None) -> None:
        super().__init__(clock, most_queued)
        self.free = count
        self.seconds = seconds

    def is_free(self) -> bool:
        return self.free > 0

    def work(self) -> None:
        while self.free and self.queue:
            self.free -= 1
            done = self.queue.popleft()
            self.clock.after(self.seconds(), lambda done=done: self._done(done))  # type: ignore[misc]

    def _done(self, done: Callable[[], None]) -> None:
        self.free += 1
        self.work()
        done()


class Sleeper(Server):
    """One instance of a Triton 2.51 whose queue is bounded, as its source has it and as it was measured.

    It begins with the next request when one is queued while the instance is free, else half a second later. The
    instance is free a moment after its answer has gone: `busy_after` seconds.
    """

    def __init__(
        self, clock: Clock, seconds: Callable[[], float], busy_after: Callable[[], float], most_queued: int
    ) -> None:
        super().__init__(clock, most_queued)
        self.seconds, self.busy_after = seconds, busy_after
        self.is_busy = False
        self.looks = 0  # each wait for a free instance has a number

    def is_free(self) -> bool:
        return False  # what is queued is not begun with at once, so it always counts

    def take(self, done: Callable[[], None]) -> bool:
        assert self.most_queued is not None
        if len(self.queue) >= self.most_queued:
            self.refused += 1
            return False
        self.queue.append(done)
        self.work()
        return True

    def work(self) -> None:
        if self.is_busy or not self.queue:
            return
        done = self.queue.popleft()
        self.is_busy = True
        self.looks += 1
        self._look_later(self.looks)
        self.clock.after(self.seconds(), lambda: self._done(done))

    def _look_later(self, number: int) -> None:
        def look() -> None:
            if number == self.looks:
                self.work()
                if number == self.looks and self.queue:
                    self._look_later(number)

        self.clock.after(0.5, look)

    def _done(self, done: Callable[[], None]) -> None:
        def free() -> None:
            self.is_busy = False

        self.clock.after(self.busy_after(), free)
        done()


class Batcher(Server):
    """Triton's dynamic batcher: all that wait, up to `largest`, are served as one, in `fixed` + `each` * size."""

    def __init__(self, clock: Clock, largest: int, fixed: float, each: float, most_queued: int | None) -> None:
        super().__init__(clock, most_queued)
        self.largest, self.fixed, self.each = largest, fixed, each
        self.is_busy = False

    def is_free(self) -> bool:
        return not self.is_busy

    def work(self) -> None:
        if self.is_busy or not self.queue:
            return
        batch = [self.queue.popleft() for _ in range(min(self.largest, len(self.queue)))]
        self.is_busy = True

        def done() -> None:
            self.is_busy = False
            for each in batch:
                each()
            self.work()

        self.clock.after(self.fixed + self.each * len(batch), done)


@dataclass
class Ledger:
    """What became of one caller's calls: each has one end."""

    sent: int = 0
    answered: list[tuple[float, float]] = field(default_factory=list)  # (when, latency)
    late: int = 0  # answered after their deadline
    refused: list[float] = field(default_factory=list)  # how long each had waited for it
    by_server: int = 0  # refused there
    failed: int = 0  # by having been refused there too often

    def goodput(self, since: float, until: float) -> float:
        return sum(since <= at < until for at, _ in self.answered) / (until - since)

    def quantile(self, q: float, since: float = 0.0) -> float:
        latencies = sorted(latency for at, latency in self.answered if at >= since)
        return latencies[min(len(latencies) - 1, int(q * len(latencies)))]


class Call:
    """One call, as `forwarding.call` has them."""

    def __init__(self, world: World, caller: object, deadline: float | None, is_batch: bool) -> None:
        self.world, self.turn, self.is_batch = world, caller, is_batch
        self.began = world.clock.now
        self.until = None if deadline is None else self.began + deadline
        self.ledger = world.ledgers.setdefault(caller, Ledger())
        self.ledger.sent += 1
        self.gate: Gate | None = None
        self.returns = 0  # times that a server refused it and it waits again

    def begin(self) -> None:
        gate = self.world.gate
        if gate is None:
            if not self.returns:
                self._send()
            else:  # no gate is wanted in this world
                self.ledger.failed += 1
            return
        try:
            self.gate = gate
            if gate.enter(self, self.is_batch, self.world.clock.now):
                self._send()
        except Refused:
            self.ledger.refused.append(self.world.clock.now - self.began)

    def admitted(self) -> None:
        self._send()

    def shed(self, reason: str, retry_after: float) -> None:
        self.ledger.refused.append(self.world.clock.now - self.began)

    def _send(self) -> None:
        self.sent_at = self.world.clock.now
        if self.world.server.take(self._done):
            self.world.on_their_way += 1
            return
        self.ledger.by_server += 1
        self.world.server_refused()
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.leave(self.world.clock.now)
        self.returns += 1
        if self.returns <= 3:
            self.begin()
        else:
            self.ledger.failed += 1

    def _done(self) -> None:
        world, now = self.world, self.world.clock.now
        world.on_their_way -= 1
        if self.until is not None and now > self.until:
            self.ledger.late += 1
        else:
            self.ledger.answered.append((now, now - self.began))
        if self.gate is not None:
            self.gate.answered(now - self.sent_at, now)
            self.gate.leave(now)


class World:
    """A server, callers, and between them a gate from the first refusal on."""

    def __init__(
        self, server: Callable[[Clock, random.Random], Server], *, is_gated: bool = True, seed: int = 1
    ) -> None:
        self.clock = Clock()
        self.random = random.Random(seed)
        self.server = server(self.clock, self.random)
        self.is_gated = is_gated
        self.gate: Gate | None = None
        self.on_their_way = 0
        self.ledgers: dict[object, Ledger] = {}
        self.limits: list[tuple[float, int]] = []

    def server_refused(self) -> None:
        if self.gate is not None:
            self.gate.server_refused()
        elif self.is_gated:
            now = self.clock.now
            self.gate = Gate(now, adaptive=AdaptiveLimit(self.on_their_way, now))

    def limit(self, limit: int) -> None:
        """A fixed one."""
        self.gate = Gate(0.0, adaptive=AdaptiveLimit(limit, 0.0), fixed=limit)

    def know(self, best: int, most: int) -> None:
        """What room the server has, as it says."""

        def later(seconds: float, act: Callable[[float], None]) -> None:
            self.clock.after(seconds, lambda: act(self.clock.now))

        self.gate = Gate(0.0, adaptive=AdaptiveLimit(best, 0.0), later=later)
        self.gate.know(best, most, 0.0)

    def calls(
        self,
        caller: object,
        rate: float,
        until: float,
        *,
        deadline: float | None = None,
        is_batch: bool = False,
        since: float = 0.0,
    ) -> None:
        """Poisson arrivals."""

        def arrive() -> None:
            if self.clock.now >= until:
                return
            self.clock.after(self.random.expovariate(rate), arrive)
            Call(self, caller, deadline, is_batch).begin()
            if self.gate is not None:
                self.limits.append((self.clock.now, self.gate.limit))

        self.clock.after(max(0.0, since - self.clock.now) + self.random.expovariate(rate), arrive)

    def run(self, until: float) -> None:
        self.clock.run(until)
