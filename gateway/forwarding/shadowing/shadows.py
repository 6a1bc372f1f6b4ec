"""I/O: sends copies of requests to the variants that shadow a model, and has their answers compared.

A copy must cost the caller nothing. It is made of an answered call, after the answer; it has a queue, a number in
flight and a deadline of its own; it is not retried, not merged, shares no answer, waits at no gate, and a failure of it
is no evidence against an endpoint. Where there is no room for it, it is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from gateway.experiments.compare import Comparison
from gateway.forwarding.admission import Gates, Place, found_full
from gateway.forwarding.exchange import request_for
from gateway.forwarding.exposures import Exposed
from gateway.forwarding.shadowing.comparison import Compared, Pair, compare
from gateway.forwarding.shadowing.glance import Glance
from gateway.forwarding.shadowing.parity import Parity, ParitySettings
from gateway.forwarding.topology import CurrentTopology
from gateway.hooks import ShadowNow
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields
from gateway.status import OK, Code
from gateway.types import Plan, Variant
from gateway.upstream.endpoint import Endpoint
from gateway.v2.names import INFER
from gateway.v2.peek import Head

_log = logging.getLogger(__name__)

_PATH: Final = INFER.encode()
_QUEUED: Final = 64  # copies of one model that wait for their turn …
_QUEUED_BYTES: Final = 32 << 20  # … and their bytes, with those of answers, of all models
_COMPARED: Final = 64  # pairs that wait to be compared, of all models
_TOGETHER: Final = 16  # pairs for which the thread is woken at once: waking it costs as much as comparing one
_GATHER_SECONDS: Final = 0.1  # for which fewer pairs wait for others
_SHARED_MEMORY: Final = b"shared_memory_"
_QUIET_SECONDS: Final = 60.0  # between two log lines on pairs of one shadow that can't be compared

FULL, NO_ENDPOINT, NO_ROOM, MEMORY, LEFT_OUT = "full", "no_endpoint", "no_room", "memory", "left_out"
DROPS: Final = (FULL, NO_ENDPOINT, NO_ROOM, MEMORY, LEFT_OUT)
AGREED, DIFFERED, NOT_COMPARED, FAILED = "agreed", "differed", "not_compared", "failed"
RESULTS: Final = (AGREED, DIFFERED, NOT_COMPARED, FAILED)


@dataclass(frozen=True, slots=True)
class ShadowSettings:
    """What the config says of one shadow of one public model, for one worker."""

    variant: Variant
    comparison: Comparison
    share: float = 0.01
    in_flight: int = 4
    timeout: float = 10.0  # seconds
    parity: ParitySettings | None = None  # None: it may stand in for other variants from the start


@dataclass(slots=True)
class Copy:
    """A request that was answered, and goes to a shadow."""

    shadow: ModelShadow
    variant: str  # that answered
    request: bytes
    head: Head
    fields: Fields
    answer: bytes
    exposed: Exposed | None = None  # if its caller takes part in an experiment
    began: float = 0.0
    place: Place | None = None

    @property
    def size(self) -> int:
        return len(self.request) + len(self.answer)


@dataclass(slots=True, eq=False)
class ModelShadow:
    """One shadow of one public model, and what came of its copies in this worker."""

    model: str
    settings: ShadowSettings
    dropped: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)  # of failed copies
    wrong: int = 0  # answers of the shadow with NaN or infinity
    wrong_here: int = 0  # answers that callers got, with them
    seconds: float = 0.0  # that copies took which were answered, in all
    measures: dict[str, tuple[int, float]] = field(default_factory=dict)  # count and sum, by name
    parity: Parity | None = None
    in_flight: int = 0
    waiting: deque[Copy] = field(default_factory=deque)
    quiet_until: float = 0.0

    def __post_init__(self) -> None:
        if self.settings.parity is not None:
            self.parity = Parity(self.settings.parity)

    @property
    def gate(self) -> str:
        """By what workers know each other's copies of the same: another model or another demand is another gate."""
        variant, needed = self.settings.variant, self.settings.parity
        what = f"{self.model} {variant.name} {variant.model} {variant.version} {needed}"
        return sha256(what.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def count(self, result: str, *, agrees: bool = False) -> None:
        """Count what came of a copy."""
        self.results[result] += 1
        if self.parity is not None:
            was_open = self.parity.is_open
            self.parity.add(agrees)
            self._tell_parity(self.parity, was_open)

    def counted_elsewhere(self, parity: Parity, found: tuple[int, int]) -> None:
        """Other workers have compared so many copies, of which so many agreed."""
        was_open, parity.elsewhere = parity.is_open, found
        self._tell_parity(parity, was_open)

    def _tell_parity(self, parity: Parity, was_open: bool) -> None:
        if parity.is_open is not was_open:
            now = "may" if parity.is_open else "may no longer"
            name = self.settings.variant.name
            _log.info("model %s: variant '%s' %s stand in for others: %s", self.model, name, now, parity.now())

    def now(self) -> ShadowNow:
        """May be asked from any thread."""
        means = {name: total / count for name, (count, total) in dict(self.measures).items()}
        results = {result: self.results[result] for result in RESULTS}
        dropped = {reason: self.dropped[reason] for reason in DROPS}
        wrong, wrong_here = self.wrong, self.wrong_here
        name, parity = self.settings.variant.name, self.parity.now() if self.parity is not None else None
        return ShadowNow(self.model, name, results, dropped, wrong, wrong_here, self.seconds, means, parity)


class Shadows:
    """By public model. `table` is empty, and false, when nothing is shadowed."""

    def __init__(
        self,
        topology: CurrentTopology,
        gates: Gates,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._topology = topology
        self._gates = gates
        self._clock = clock
        self._draw = draw
        self._held = 0  # bytes of copies that wait, are under way or are compared
        self._glance = Glance()
        self._comparing = 0
        self._pairs: list[tuple[Copy, Pair]] = []  # that wait for the thread
        self._gathering: asyncio.TimerHandle | None = None
        self._is_comparing = False
        self._executor: ThreadPoolExecutor | None = None
        self.table: dict[str, tuple[ModelShadow, ...]] = {}
        self.gated: dict[str, dict[str, Parity]] = {}  # by public model and variant, of those that have to agree first
        self.is_saving = False  # is memory scarce?
        self.on_pair: Callable[[Pair, Compared], None] = _nobody  # called on the thread with each pair that comes there
        self.on_compared: Callable[[Exposed, str, bool], None] = _no_unit  # the unit, the shadow, do they agree

    def apply(self, settings: Mapping[str, tuple[ShadowSettings, ...]]) -> None:
        """Put a config in force. What was counted of a shadow stays while its settings do."""
        before = {(shadow.model, shadow.settings): shadow for shadows in self.table.values() for shadow in shadows}
        self.table = {
            model: tuple(before.get((model, each)) or ModelShadow(model, each) for each in shadows)
            for model, shadows in settings.items()
        }
        gated = {
            model: {shadow.settings.variant.name: shadow.parity for shadow in shadows if shadow.parity is not None}
            for model, shadows in self.table.items()
        }
        self.gated = {model: parities for model, parities in gated.items() if parities}

    def parities(self) -> dict[str, tuple[int, int]]:
        """Copies compared here, and those that agreed, by gate. May be asked from any thread."""
        return {
            shadow.gate: shadow.parity.counts
            for shadows in list(self.table.values())
            for shadow in shadows
            if shadow.parity is not None
        }

    def counted_elsewhere(self, found: Mapping[str, tuple[int, int]]) -> None:
        """What other workers say, as `parities`, of all of them together."""
        for shadows in self.table.values():
            for shadow in shadows:
                if shadow.parity is not None:
                    shadow.counted_elsewhere(shadow.parity, found.get(shadow.gate, (0, 0)))

    def without_strangers(self, model: str, plan: Plan) -> Plan:
        """The plan without those variants that may not stand in for the chosen one, since they have yet to agree."""
        parities = self.gated.get(model)
        if parities is None:
            return plan
        first, *others = plan.targets
        kept = [other for other in others if other.name not in parities or parities[other.name].is_open]
        return plan if len(kept) == len(others) else Plan((first, *kept), plan.reason, plan.instead_of)

    def drawn(self, model: str) -> tuple[ModelShadow, ...]:
        """The shadows that get a copy of this call."""
        chosen: tuple[ModelShadow, ...] = ()
        for shadow in self.table.get(model, ()):
            if self._draw() < shadow.settings.share:
                chosen = (*chosen, shadow)
        return chosen

    def answered(  # noqa: PLR0917  (called on the hot path, where keywords cost)
        self,
        shadows: tuple[ModelShadow, ...],
        variant: str,
        request: bytes,
        head: Head,
        fields: Fields,
        answer: bytes,
        exposed: Exposed | None = None,
    ) -> None:
        """A call has its answer: send its copies. request: as the caller sent it. answer: as its server did."""
        for shadow in shadows:
            if shadow.settings.variant.name == variant:  # it has answered this one itself
                if exposed is not None:
                    self.on_compared(exposed, variant, True)
                continue
            if _SHARED_MEMORY in request:
                shadow.dropped[LEFT_OUT] += 1  # the memory may be the caller's again by now
                continue
            self._offer(Copy(shadow, variant, request, head, fields, answer, exposed))

    def _offer(self, copy: Copy) -> None:
        shadow = copy.shadow
        if self.is_saving:
            shadow.dropped[MEMORY] += 1
        elif len(shadow.waiting) >= _QUEUED or self._held + copy.size > _QUEUED_BYTES:
            shadow.dropped[FULL] += 1
        else:
            self._held += copy.size
            shadow.waiting.append(copy)
            self._send_waiting(shadow)

    def _send_waiting(self, shadow: ModelShadow) -> None:
        while shadow.waiting and shadow.in_flight < shadow.settings.in_flight:
            self._send(shadow.waiting.popleft())

    def _send(self, copy: Copy) -> None:
        shadow, variant, now = copy.shadow, copy.shadow.settings.variant, self._clock()
        pool = self._topology.now.pools.get(variant.upstream)
        endpoint = pool.maybe_pick(variant.model, variant.version) if pool is not None else None
        if endpoint is None:
            self._drop(copy, NO_ENDPOINT)
            return
        gate = self._gates.table.get((variant.upstream, variant.model))
        if gate is not None:
            if not gate.maybe_enter():
                self._drop(copy, NO_ROOM)
                return
            copy.place = Place(gate, now)
        copy.began = now
        client = endpoint.connection.call(_PATH, copy.fields, now + shadow.settings.timeout)
        client.request = request_for(variant, copy.request, copy.head)
        client.on_done = lambda client: self._ended(copy, endpoint, client)
        shadow.in_flight += 1
        endpoint.in_flight += 1
        endpoint.connection.submit(client)

    def _drop(self, copy: Copy, reason: str) -> None:
        copy.shadow.dropped[reason] += 1
        self._held -= copy.size

    def _ended(self, copy: Copy, endpoint: Endpoint, client: ClientCall) -> None:
        shadow, now = copy.shadow, self._clock()
        shadow.in_flight -= 1
        endpoint.in_flight -= 1
        if copy.place is not None:
            was_full = found_full(client, shadow.settings.variant.model, copy.head.id)
            copy.place.leave(client, was_full, now)
        if client.code is not OK:
            shadow.count(FAILED)
            shadow.codes[Code(client.code).name] += 1
            self._held -= copy.size
        else:
            self._answered(copy, client.body, now - copy.began)
        self._send_waiting(shadow)

    def _answered(self, copy: Copy, body: bytes, seconds: float) -> None:
        shadow = copy.shadow
        compared = self._glance.maybe_compare(copy.answer, body, shadow.settings.comparison)
        if compared is None and self._comparing >= _COMPARED:
            self._drop(copy, FULL)
            return
        shadow.seconds += seconds
        if compared is None:
            self._compare(copy, body)
        else:
            self._held -= copy.size
            self._count(copy, compared)

    def _compare(self, copy: Copy, body: bytes) -> None:
        shadow = copy.shadow
        name = shadow.settings.variant.name
        pair = Pair(shadow.model, copy.variant, name, copy.head.id, copy.request, copy.answer, body)
        self._comparing += 1
        self._pairs.append((copy, pair))
        if self._is_comparing:
            return
        if len(self._pairs) >= _TOGETHER:
            self._compare_waiting()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._compare_waiting)

    def _compare_waiting(self) -> None:
        """Hand the pairs that wait to the thread, which has none."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "shadows")
        pairs, self._pairs, self._is_comparing = self._pairs, [], True
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._compare_all, pairs)
        future.add_done_callback(
            lambda future: self._all_compared(pairs, [] if future.cancelled() else future.result())
        )

    def _all_compared(self, pairs: list[tuple[Copy, Pair]], compared: list[Compared]) -> None:
        """compared: empty if the worker stops."""
        self._is_comparing = False
        for at, (copy, _) in enumerate(pairs):
            self._compared(copy, compared[at] if compared else None)
        if self._pairs and compared:
            self._compare_waiting()

    def _compare_all(self, pairs: list[tuple[Copy, Pair]]) -> list[Compared]:
        return [self._compare_pair(pair, copy.shadow.settings.comparison) for copy, pair in pairs]

    def _compare_pair(self, pair: Pair, comparison: Comparison) -> Compared:
        compared = Compared(None, "the gateway failed to compare them")  # one pair must not take the others with it
        try:
            compared = compare(pair, comparison)
            self.on_pair(pair, compared)
        except Exception:
            _log.exception("model %s: a pair of answers could not be compared or kept", pair.model)
        return compared

    def _compared(self, copy: Copy, compared: Compared | None) -> None:
        self._comparing -= 1
        self._held -= copy.size
        if compared is not None:  # the worker does not stop
            self._count(copy, compared)

    def _count(self, copy: Copy, compared: Compared) -> None:
        shadow = copy.shadow
        shadow.wrong += bool(compared.wrong)
        shadow.wrong_here += bool(compared.wrong_here)
        if compared.agreement is None:
            shadow.count(NOT_COMPARED)
            self._say_not_compared(shadow, compared.why)
            return
        agrees = compared.agreement.agrees
        shadow.count(AGREED if agrees else DIFFERED, agrees=agrees and not compared.wrong)
        if copy.exposed is not None:
            self.on_compared(copy.exposed, shadow.settings.variant.name, agrees and not compared.wrong_here)
        for name, value in compared.agreement.measures.items():
            count, total = shadow.measures.get(name, (0, 0.0))
            shadow.measures[name] = count + 1, total + value

    def _say_not_compared(self, shadow: ModelShadow, why: str) -> None:
        now = self._clock()
        if now >= shadow.quiet_until:
            shadow.quiet_until = now + _QUIET_SECONDS
            variant = shadow.settings.variant.name
            _log.warning("model %s: answers of its shadow '%s' can't be compared: %s", shadow.model, variant, why)

    def now(self) -> list[ShadowNow]:
        """May be asked from any thread."""
        return [shadow.now() for shadows in list(self.table.values()) for shadow in shadows]

    def stop(self) -> None:
        """Forget what waits. Copies under way end with their connections."""
        for shadows in self.table.values():
            for shadow in shadows:
                shadow.waiting.clear()
        if self._gathering is not None:
            self._gathering.cancel()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _nobody(pair: Pair, compared: Compared) -> None: ...


def _no_unit(exposed: Exposed, shadow: str, agrees: bool) -> None: ...
