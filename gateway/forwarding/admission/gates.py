"""The gates in force, by upstream and Triton model: those of the config, and those that overload has called for.

A model whose limit is `auto` has none, and costs nothing, until one of its servers refuses a call because its queue is
full. No caller can bring that about for a model that has room. Streams are not held at gates: how long one message of
a decoupled model takes says nothing of the next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final

from gateway.errors import Overloaded
from gateway.forwarding.admission.gate import REASONS, Gate, Later
from gateway.forwarding.admission.limit import AdaptiveLimit
from gateway.forwarding.admission.server_room import ServerRoom
from gateway.hooks import GateNow
from gateway.quotas import Quotas

_log = logging.getLogger(__name__)

GateKey = tuple[str, str]
"""An upstream, and the name of a model at its servers."""

AUTO: Final = -1
NONE: Final = 0
_BATCH: Final = "batch"
_ADOPTED_SECONDS: Final = 0.25  # that calls count which were on their way before there was a gate
_FEWEST: Final = 2  # calls in flight that a search begins with


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """What the config says of it."""

    limits: Mapping[GateKey, int] = field(default_factory=dict)  # calls, or AUTO, which is the default, or NONE
    caller: str = ""  # metadata key by whose value callers share; "": by their connections
    priority: str = ""  # metadata key by which a call says that it is of the batch class; "": none is
    workers: int = 1  # that share what room servers have


def _later(seconds: float, act: Callable[[float], None]) -> object:
    loop = asyncio.get_running_loop()
    return loop.call_later(seconds, lambda: act(time.monotonic()))


class Gates:
    """By model. `table` is empty, and false, when nothing is limited."""

    def __init__(self, later: Later = _later, quotas: Quotas | None = None) -> None:
        """quotas: that may say of callers that their calls are of the batch class."""
        self._quotas = quotas
        self._later = later
        self.table: dict[GateKey, Gate] = {}
        self._endless: set[GateKey] = set()  # models whose queues have no bound
        self.is_shedding = False  # are calls of the batch class refused, for want of memory?
        self._settings = AdmissionSettings()
        self._refusals: dict[GateKey, dict[str, int]] = {}  # of all gates that there were

    def apply(self, settings: AdmissionSettings, now: float) -> None:
        """Put a config in force. A gate whose limit has changed lets all go who wait at it."""
        before, self._settings = self._settings, settings
        for key in list(self.table):
            limit, old = settings.limits.get(key, AUTO), before.limits.get(key, AUTO)
            if limit > 0 and old > 0:
                self.table[key].resize(limit, now)
            elif limit != old:
                self.table.pop(key).dissolve()
        for key, limit in settings.limits.items():
            if limit > 0 and key not in self.table:
                self._add(key, AdaptiveLimit(limit, now), now, limit)

    def _add(self, key: GateKey, adaptive: AdaptiveLimit, now: float, fixed: int = 0) -> Gate:
        refusals = self._refusals.setdefault(key, dict.fromkeys(REASONS, 0))
        gate = self.table[key] = Gate(now, adaptive=adaptive, fixed=fixed, refusals=refusals, later=self._later)
        return gate

    def adapts(self, key: GateKey) -> bool:
        """Does the config leave this model's limit to what is found out?"""
        return self._settings.limits.get(key, AUTO) == AUTO

    def keep(self, keys: Container[GateKey], now: float) -> None:
        """Forget what other models' servers have said."""
        self._endless = {key for key in self._endless if key in keys}
        for key in [key for key, gate in self.table.items() if gate.is_known and key not in keys]:
            self.learn(key, None, now)

    def learn(self, key: GateKey, room: ServerRoom | None, now: float, *, is_endless: bool = False) -> None:
        """What room the servers say that they have; None if they say nothing.

        is_endless: all of them say that no queue of theirs has a bound, so that none can be full.
        """
        gate = self.table.get(key)
        if not self.adapts(key):
            return
        (self._endless.add if is_endless else self._endless.discard)(key)
        if room is None:
            if gate is not None and (gate.is_known or is_endless):
                self.table.pop(key).dissolve()
            return
        mine = room.shared(self._settings.workers)
        if gate is None:
            gate = self._add(key, AdaptiveLimit(mine.best, now), now)
        gate.know(mine.best, mine.most, now)

    def left(self, upstream: str, model: str, refused: bool, now: float) -> None:
        """A call has ended that had no place. refused: since the server's queue was full."""
        gate = self.table.get((upstream, model))
        if gate is not None:
            gate.adopted_left(refused, now)

    def maybe_gate(self, upstream: str, model: str, now: float) -> Gate | None:
        key = (upstream, model)
        gate = self.table.get(key)
        if gate is not None and gate.is_idle(now):
            self.table.pop(key).dissolve()
            _log.info("model %s of upstream %s: calls are no longer limited", model, upstream)
            return None
        return gate

    def overloaded(self, upstream: str, model: str, in_flight: int, now: float) -> None:
        """A server has refused a call since its queue is full. in_flight: of the upstream, at that moment."""
        key = (upstream, model)
        if key in self._endless:
            return  # the model itself says so, maybe in the words of a caller
        if key in self.table or self._settings.limits.get(key, AUTO) != AUTO:
            return
        gate = self._add(key, AdaptiveLimit(max(in_flight, _FEWEST), now), now)
        gate.adopt(in_flight)
        self._later(_ADOPTED_SECONDS, gate.disown)
        _log.warning("model %s of upstream %s refuses calls: its queue is full; they are limited now", model, upstream)

    def turn_of(self, metadata: Mapping[str, str], connection: Hashable) -> Hashable:
        """Whose turn a call waits for."""
        key = self._settings.caller
        return (metadata.get(key) if key else None) or connection

    def is_batch(self, metadata: Mapping[str, str]) -> bool:
        """What the caller's quota says counts more than what the call says."""
        said = self._quotas.class_of(metadata) if self._quotas is not None else None
        if said is not None:
            return said
        key = self._settings.priority
        return bool(key) and metadata.get(key) == _BATCH

    def check_shed(self, metadata: Mapping[str, str]) -> None:
        """:raises Overloaded: if a call with this metadata is not to begin."""
        if self.is_shedding and self.is_batch(metadata):
            raise Overloaded(
                "The gateway's memory is nearly used up: calls of the batch class are refused until there is more."
            )

    def now(self) -> list[GateNow]:
        """May be asked from any thread."""
        return [gate.now(*key) for key, gate in list(self.table.items())]
