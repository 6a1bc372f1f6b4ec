"""What is known of a request on its way: what was decided, what its attempts came to, and what follows from these.

It says whose call it is, why another variant is asked, and who has answered. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gateway.access.door import CALLER
from gateway.errors import GatewayError
from gateway.forwarding.admission import Refused
from gateway.forwarding.attempts import LIMITED, SAMPLE, UNAVAILABLE, Attempt, Attempts
from gateway.forwarding.rolled import Whose
from gateway.forwarding.sequences import ID, Pin, SequenceKey
from gateway.hooks import CallObserver
from gateway.routing import Route
from gateway.status import Verdict
from gateway.types import Facts, Served
from gateway.upstream.connection import CallFailed
from gateway.upstream.failures import Scopes, scopes_of
from gateway.v2.peek import Head


@dataclass(init=False, slots=True)
class Work:
    """One request on its way."""

    route: Route
    head: Head
    facts: Facts
    attempts: Attempts
    observer: CallObserver
    sequence: SequenceKey | None
    pin: Pin | None  # where its sequence has been living, if that is known
    own_sequence: bytes  # to append to the request, if Triton knows its sequence by another id than its caller
    upstream_id: str | None  # of the attempt under way, if it is traced
    failures: Sequence[tuple[Attempt, CallFailed, Verdict]]
    repeats: int  # times that it was sent again although it may have been executed
    refused: Refused | None  # by the gate of the last variant that had no room for it, if any
    returns: int  # times that it came back from a server whose queue was full, to wait for its turn
    peer: str  # of its caller
    _scopes: Scopes | None  # once somebody has asked for them

    def __init__(
        self,
        route: Route,
        head: Head,
        facts: Facts,
        attempts: Attempts,
        observer: CallObserver,
        sequence: SequenceKey | None = None,
        pin: Pin | None = None,
        upstream_id: str | None = None,
        failures: Sequence[tuple[Attempt, CallFailed, Verdict]] = (),
        peer: str = "",
    ) -> None:
        self.route = route
        self.head = head
        self.facts = facts
        self.attempts = attempts
        self.observer = observer
        self.sequence = sequence
        self.pin = pin
        self.own_sequence = b""
        self.upstream_id = upstream_id
        self.failures = failures
        self.repeats = 0
        self.refused = None
        self.returns = 0
        self.peer = peer
        self._scopes = None

    @property
    def scopes(self) -> Scopes:
        """Whose call it is, as endpoints are judged by it and budgets are shared by it."""
        scopes = self._scopes
        if scopes is None:
            scopes = self._scopes = scopes_of(_caller(self), _unit(self))
        return scopes

    def in_callers_words(self, text: str) -> str:
        """A text of Triton's with its sequence's id as the caller knows it."""
        if not self.own_sequence or self.sequence is None:
            return text
        return text.replace(str(self.sequence[1]), str(self.facts.parameters[ID]), 1)


def why_not(work: Work, variant: str) -> str:
    """Why another variant is asked in the place of this one."""
    for attempt, _, verdict in reversed(work.failures):
        if attempt.variant.name == variant:
            return verdict.meaning.value
    if work.attempts.is_sample:
        return SAMPLE
    return LIMITED if work.refused is not None else UNAVAILABLE


def stand_in(work: Work) -> str:
    """Why another variant than the one that the call was meant for has answered it; "" if none has."""
    last, chosen = work.attempts.last, work.attempts.chosen
    return "" if last is None or last.variant.name == chosen else why_not(work, chosen)


def whose(work: Work) -> Whose:
    """Whose call it is: which unit's, and which caller's, who is known by his name or else by his host."""
    return Whose(_unit(work) or "", _caller(work))


def _unit(work: Work) -> str | None:
    sticky = work.route.sticky
    return sticky.maybe_read(work.facts) if sticky is not None else None


def _caller(work: Work) -> str:
    return work.facts.metadata.get(CALLER) or work.peer.rpartition(":")[0]


def last_asked(error: GatewayError, work: Work) -> GatewayError:
    """The error, with who was asked last, if anybody was."""
    last = work.attempts.last
    if last is not None:
        error.served = served_by(work, last, last.variant.version)
    return error


def served_by(work: Work, attempt: Attempt, model_version: str) -> Served:
    return _served(work.route.model, attempt.variant.name, model_version, attempt.endpoint.address, attempt.number)


_served = lru_cache(4096)(Served)  # names of the config, addresses of its upstreams, versions that these have told
