"""One Triton server as a pool sees it: its connection, what it can serve, what it is doing now.

No I/O of its own: `health` feeds it, `pool` asks it, `forwarding` counts its calls on it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from gateway.bounded import make_room
from gateway.status import Meaning, Verdict
from gateway.upstream.connection import Connection
from gateway.upstream.failures import NOBODY_KNOWN, Scopes
from gateway.upstream.known import MOST_KNOWN, KnownModel
from gateway.upstream.latency import SLOWER
from gateway.upstream.outlier import Record, Standing

if TYPE_CHECKING:
    from gateway.upstream.shared_memory import SharedMemory

ModelKey = tuple[str, str]
"""A Triton model's name and version; version "" stands for the server's policy."""


class State(Enum):
    """What is known of an endpoint as a whole."""

    UNPROBED = "unprobed"  # just added; worth a try
    READY = "ready"  # the last probe went well
    SUSPECT = "suspect"  # a call failed since; used only when nothing better is there, until the next probe
    DOWN = "down"  # a probe failed; left alone until one succeeds


_DOWN: Final = State.DOWN  # see `status.OK`
_PREFERENCE: Final = {State.READY: 0, State.UNPROBED: 1, State.SUSPECT: 2, State.DOWN: 3}

PENALTY_SECONDS: Final = 1.0  # a failed call weighs on an endpoint as one in flight, and less and less: time constant
_LEAST_PENALTY: Final = 0.1
WARM_UP_SECONDS: Final = 10.0  # until a new endpoint has its whole share: Envoy's slow start, which grows in a line too
LEAST_WARMTH: Final = 0.1  # and begins with so much
_LOOK_SECONDS: Final = 0.05  # between two looks at whether an endpoint that is to go is idle
_AT_FAULT: Final = frozenset(
    {Meaning.SERVER, Meaning.UNCLEAR, Meaning.UNREACHABLE, Meaning.LOST, Meaning.LATE, Meaning.WRONG}
)
"""What counts against an endpoint when it is compared with its peers."""

_WORTH_ASKING: Final = (Meaning.UNCLEAR, Meaning.DRAINING)
"""After which the endpoint is asked soon: only it can tell, since the text that says so may be a model's."""

_COSTS_NOTHING: Final = frozenset({Meaning.CALLER, Meaning.ENDED})
"""What does not make an endpoint less worth a call."""


@dataclass(frozen=True, slots=True)
class FailedCall:
    """A call that went wrong at an endpoint, as the endpoint is judged by it."""

    model: str
    version: str
    verdict: Verdict
    at: float
    scopes: Scopes = NOBODY_KNOWN  # whose call it was


class Endpoint:
    """One endpoint of one upstream. Lives on one event loop."""

    def __init__(self, upstream: str, address: str, connection: Connection) -> None:
        self.upstream = upstream
        self.address = address
        self.connection = connection
        self.state = State.UNPROBED
        self.reason = "not probed yet"
        self.in_flight = 0  # calls under way: who sends one counts it, until it has ended
        self.is_limited = False  # has it failed calls lately, is it ejected for some model, or warming up?
        self.records: dict[ModelKey, Record] = {}  # of how calls went; see `outlier`
        self._ejections = 0  # records with any
        self._penalty = 0.0  # calls that it failed, as if they were still in flight
        self._penalty_at = 0.0
        self.warmth = 1.0  # as of the last `settle`: the share of calls that it gets, of what it would get for good
        self._warm_at = 0.0
        self.models: dict[ModelKey, bool] = {}  # of the models that variants use: ready at the last probe?
        self.probed: dict[ModelKey, str] = {}  # by inferences: why a model is not usable, or ""; see `inference_probe`
        self.remembered: dict[ModelKey, KnownModel] = {}  # the one known longest comes first; see `known`
        self.needed_at = -math.inf  # when a sequence here was used last, on the monotonic clock
        self._lives = 0
        self.unasked_answers = 0  # on streams, to requests that it was not sent, since the log told of them
        self.unasked_quiet_until = 0.0  # on the monotonic clock
        self.memory: SharedMemory | None = None  # that it shares with this worker, if that is configured
        self.on_suspicion: Callable[[], None] = lambda: None  # set by `health`: probe soon

    def __repr__(self) -> str:
        return f"<Endpoint {self.upstream}/{self.address} {self.state.value} in_flight={self.in_flight}>"

    def can_serve(self, model: str, version: str) -> bool:
        """Is there no reason to think that it can't? Models that nobody watches get the benefit of the doubt."""
        return self.state is not _DOWN and self.models.get((model, version), True)

    def known(self, model: str, version: str) -> KnownModel:
        """Where to remember something of a model as it is now. Ask each time: another one follows when it changes."""
        found = self.remembered.get((model, version))
        if found is None:
            if len(self.remembered) >= MOST_KNOWN:
                self.remembered.pop(next(iter(self.remembered))).forget()
            found = self.remembered[model, version] = KnownModel(model, version)
        return found

    def has_seen(self, model: str, version: str, what: str) -> bool:
        """Is this remembered of a model? Unlike `known`, asking makes nothing be remembered."""
        found = self.remembered.get((model, version))
        return found is not None and what in found.kept

    def forget(self, model: str | None = None) -> None:
        """A model, or with None any of them, has been loaded or unloaded, or may have been: what is remembered ends."""
        self._lives += 1
        for key in [key for key in self.remembered if model is None or key[0] == model]:
            known = self.remembered.pop(key, None)
            if known is not None:
                known.forget()

    # How its calls went

    def record(self, model: str, version: str) -> Record:
        found = self.records.get((model, version))
        if found is None:
            make_room(self.records, MOST_KNOWN)
            self._count_ejections()
            found = self.records[model, version] = Record()
        return found

    def _count_ejections(self) -> None:
        self._ejections = sum(bool(each.ejections) for each in self.records.values())

    @property
    def has_ejections(self) -> bool:
        """Of any model, for anybody's calls?"""
        return self._ejections > 0

    def standing(self, model: str, version: str, now: float, scopes: Scopes = NOBODY_KNOWN) -> Standing:
        """TRIAL is answered to one call, and to the next one after a while. To be asked if it is limited."""
        record = self.records.get((model, version))
        return Standing.IN if record is None else record.standing(now, scopes)

    def is_ejected(self, model: str, version: str, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """Also while it is on trial."""
        record = self.records.get((model, version)) if self._ejections else None
        return record is not None and record.is_ejected(scopes)

    def is_out(self, model: str, version: str, now: float, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """Is it left alone by these calls of this model, those for a trial too?"""
        record = self.records.get((model, version)) if self._ejections else None
        return record is not None and record.is_out(now, scopes)

    def eject(
        self, model: str, version: str, now: float, whose: Scopes = NOBODY_KNOWN, by: Scopes = NOBODY_KNOWN
    ) -> float:
        """Have those of a scope leave it alone with this model. Answers for how many seconds."""
        seconds = self.record(model, version).eject(now, whose, by)
        self._count_ejections()
        self.is_limited = True
        return seconds

    def succeeded(
        self, model: str, version: str, now: float, seconds: float = 0.0, scopes: Scopes = NOBODY_KNOWN
    ) -> bool:
        """Count a call that went well. True: an ejection has ended.

        seconds: that it took; 0 if that says nothing. scopes: of the call, if there are ejections.
        """
        record = self.records.get((model, version))
        if record is None:
            record = self.record(model, version)
        if seconds > 0.0:
            record.latency.observe(seconds, now)
        if not record.succeeded(now, scopes):
            return False
        self._count_ejections()
        return True

    def is_better(self, other: Endpoint, key: ModelKey) -> bool:
        """Is it worth a call more than another one: by its state, then by its load?

        The load is the calls in flight and the one to come, each as long as the endpoint takes (peak EWMA). A call that
        failed lately counts like one in flight, so that who fails at once does not attract what it can't answer.
        """
        if self.state is not other.state:
            return _PREFERENCE[self.state] < _PREFERENCE[other.state]
        mine, its = self.in_flight + self._penalty, other.in_flight + other._penalty
        record, peer = self.records.get(key), other.records.get(key)
        if record is None or peer is None:
            return mine < its
        latency, peers = record.latency, peer.latency
        if latency.seconds > SLOWER * peers.seconds:
            return (mine + 1.0) * latency.slowness(peers) < its + 1.0
        if peers.seconds > SLOWER * latency.seconds:
            return mine + 1.0 < (its + 1.0) * peers.slowness(latency)
        return mine < its

    def settle(self, now: float) -> None:
        """Let failures fade, and let it be warmer. To be called before it is compared, if it is limited."""
        self._penalty *= math.exp((self._penalty_at - now) / PENALTY_SECONDS)
        self._penalty_at = now
        if self._penalty < _LEAST_PENALTY:
            self._penalty = 0.0
        self.warmth = min(1.0, max(1.0 - (self._warm_at - now) / WARM_UP_SECONDS, LEAST_WARMTH))
        self.is_limited = self._penalty > 0.0 or self._ejections > 0 or self.warmth < 1.0

    def _burden(self, now: float) -> None:
        self.settle(now)
        self._penalty += 1.0
        self.is_limited = True

    def warm_up(self, now: float) -> None:
        """It is new, or back: let it get its share by and by. Its caches are cold, and it may fail as it did before."""
        self._warm_at = now + WARM_UP_SECONDS
        self.settle(now)

    def pardon(self, now: float) -> None:
        """It was started anew, it seems: what it is ejected for is tried at once."""
        for record in self.records.values():
            record.pardon(now)

    @property
    def lives(self) -> int:
        """Another number means that it, or a model of it, may have been started again."""
        return self._lives + self.connection.losses

    def close(self) -> None:
        """Take no more calls, for good: who still knows this endpoint began before the config changed."""
        self.state = State.DOWN
        self.reason = "removed from the config"
        self.forget()

    async def wait_idle(self) -> None:
        """Return soon after the last call in flight has ended."""
        while self.in_flight:  # noqa: ASYNC110  (to tell who waits would cost every call, and endpoints go rarely)
            await asyncio.sleep(_LOOK_SECONDS)

    def suspect(self, reason: str) -> None:
        """It is in doubt as a whole until a probe has asked it, which comes soon."""
        if self.state is not State.DOWN:
            self.state = State.SUSPECT
            self.reason = reason
        self.forget()  # it may have been started again
        self.on_suspicion()

    def counts_against(self, failed: FailedCall) -> bool:
        """Weigh a failed call. True: it speaks against the endpoint, if its peers do better."""
        verdict, scopes = failed.verdict, failed.scopes
        if verdict.meaning not in _COSTS_NOTHING:
            self._burden(failed.at)
        if verdict.meaning not in _AT_FAULT:
            return False
        if verdict.ejects and self.state is not State.READY:
            return False  # it has just died: all its calls end then, which is one failure and not as many
        if verdict.meaning is Meaning.UNREACHABLE:
            scopes = NOBODY_KNOWN  # no caller can bring that about
        self.record(failed.model, failed.version).failed(failed.at, scopes)
        return True

    def failed(self, model: ModelKey, verdict: Verdict, text: str) -> None:
        """Take note of a call that this endpoint did not answer.

        One call's failure is evidence and no verdict, since its caller or its model may have made it: it has the
        endpoint asked soon, and only what a probe finds keeps other calls away.
        """
        meaning = verdict.meaning
        if verdict.ejects:
            self.suspect(text)
            return
        if meaning is Meaning.MODEL_GONE and model in self.models:
            self.forget(model[0])
        elif meaning not in _WORTH_ASKING:
            return
        self.on_suspicion()
