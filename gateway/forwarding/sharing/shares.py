"""The public models whose identical requests share answers: what is in flight for them, and what is remembered.

A request in flight is a call of its own, which no caller owns: a `Flight` is its caller, and has members. Each member
has its own deadline and goes when it likes; the call goes on while there is one. So what a member may do wrong by
himself, such as leaving too little time, never becomes the others' failure; what the call fails with is all members'.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from gateway.errors import GatewayError, UpstreamFailed
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.caller import Caller, CallerMetadata
from gateway.forwarding.correlation import with_own_id
from gateway.forwarding.sharing.answer_cache import Answer, AnswerCache
from gateway.hooks import (
    AttemptEnded,
    AttemptMerged,
    AttemptStarted,
    CallEnded,
    CallObserver,
    SharedNow,
    StepEnded,
)
from gateway.rpc.metadata import Fields
from gateway.status import UNKNOWN_ID, Code, Meaning
from gateway.types import Metadata, Served, Variant
from gateway.upstream.kept import Kept
from gateway.upstream.known import KnownModel
from gateway.v2.peek import Head, peek_response, rename_response

HIT: Final = "hit"
COALESCED: Final = "coalesced"
_OWN: Final = b"gateway-"  # of the gateway's own trailing metadata; no upstream's pass that begin so


@dataclass(frozen=True, slots=True)
class ShareSettings:
    """What the config says of one public model."""

    coalesce: bool = True
    cache_bytes: int = 0  # of one worker; 0: nothing is remembered
    seconds: float = 60.0  # for which an answer is remembered
    metadata: frozenset[str] | None = None  # keys that must be equal; None: all, without those that differ by nature
    caller_key: bytes = b""  # under which the gateway itself tells Triton who calls; empty: it does not


class Member(Protocol):
    """A call that waits for an answer which is not its own only."""

    head: Head
    observer: CallObserver
    deadline: float | None

    @property
    def is_over(self) -> bool: ...

    def share_answered(self, answer: Answer, how: str, trailing: Fields) -> None:
        """how: HIT, COALESCED, or "" if the answer is to its own request. trailing: of that own answer."""

    def share_failed(self, error: GatewayError) -> None: ...


class SharedCall(Protocol):
    """The call that is made for the members of a flight."""

    served: Served | None

    def begin_shared(self) -> None:
        """Make the first attempt."""

    @property
    def is_queued(self) -> bool:
        """Does it wait for its turn, at a gate?"""

    @property
    def given_up(self) -> Kept | None:
        """What its endpoint keeps for it and goes on with, if it is over all the same."""

    def now(self) -> float: ...

    def tell_answered(self) -> None:
        """Report that its attempt was answered, if that is not told yet."""

    def cancelled(self, code: Code) -> None: ...

    def late(self) -> None:
        """The deadline of who asked first has passed while an endpoint had the request."""


class Flight(Caller):
    """Who asks for all members. Also the call's observer: the first member still there hears of each attempt."""

    call: SharedCall

    def __init__(  # noqa: PLR0917  (made on the hot path, where keywords cost)
        self,
        model: SharedModel,
        key: Hashable,
        digest: bytes,
        leader: Member,
        asked_by: Caller,
        sent: Fields,
        turn: Hashable,
    ) -> None:
        """key:      of what is in flight.
        digest:   of the request.
        asked_by: the leader's own caller.
        sent:     of his metadata, what goes upstream.
        turn:     whose turn the call takes where calls take turns.
        """
        self._model = model
        self._key = key
        self._digest = digest
        self._members: dict[Member, None] = {leader: None}  # in order
        self._latest = leader.deadline
        self._leader: Member = leader
        self._hears: Member | None = None  # of the attempt under way
        self._variant: Variant | None = None
        self._known: KnownModel | None = None  # what is asked now, as it is known
        self._is_counted = False  # would it be seen if that is loaded anew from now on?
        self._is_late = False
        self.turn = turn
        self._id = leader.head.id
        own = asked_by.metadata
        self.metadata = CallerMetadata(own.values, sent, own.trace, ())
        self.peer = asked_by.peer
        self.number = asked_by.number
        self.deadline = None  # each member has its own

    @property
    def useful_until(self) -> float | None:
        """The latest deadline of all members so far."""
        return self._latest

    def takes(self, turn: Hashable) -> bool:
        """May one more member wait for it?

        Not if the model has changed since it was asked; nor if a member's time has passed already, since an endpoint
        that hangs must not get all who come; nor if it waits for another's turn.
        """
        if self._is_late or (self._known is not None and not self._known.is_current):
            return False
        return turn == self.turn or not self.call.is_queued

    def join(self, member: Member) -> None:
        self._members[member] = None
        deadline = member.deadline
        if self._latest is not None and (deadline is None or deadline > self._latest):
            self._latest = deadline

    def left(self, member: Member, code: Code, text: str, now: float) -> None:
        """A member's caller has gone, or its deadline has passed."""
        del self._members[member]
        if self._hears is member:
            self._hears = None
            member.observer.attempt_ended(AttemptEnded(code, text, Meaning.ENDED, now))
        if code is Code.DEADLINE_EXCEEDED:
            self._is_late = True
            if member is self._leader:  # as whose it counts: he is not to answer for another's haste
                self.call.late()
        if not self._members:
            self._model.landed(self._key, self)
            self.call.cancelled(Code.CANCELLED)

    def sent(self, attempt: Attempt, is_seen: bool = True) -> None:
        """The call is about to be sent to an endpoint. is_seen: False if its models may have changed since it was."""
        self._variant = attempt.variant
        known = self._known = attempt.endpoint.known(attempt.variant.model, attempt.variant.version)
        self._is_counted = is_seen and known.is_counted

    # As a caller

    def reply(self, body: bytes, initial: Fields, trailing: Fields) -> None:
        self._model.landed(self._key, self)
        self.call.tell_answered()  # before the answer ends the member that hears of it
        served, variant, known = self.call.served, self._variant, self._known
        assert served is not None and variant is not None and known is not None  # noqa: S101, PT018  (it was sent)
        head = peek_response(body)
        if head.id:
            body = rename_response(body, head, id="")
        theirs = tuple([field for field in trailing if not field[0].startswith(_OWN)])
        answer = Answer(body, initial, theirs, served)
        known.answered(served.model_version)
        if self._is_counted:
            own = answer if not served.fallback_from else replace(answer, served=_as_chosen(served))
            self._model.answered(variant, self._digest, own, known, self.call.now())
        for member in self._leaving():
            if member is self._leader:
                member.share_answered(answer, "", trailing)
            else:
                self._model.coalesced += 1
                member.share_answered(answer, COALESCED, ())

    def fail(self, error: GatewayError, trailing: Fields) -> None:
        self._model.landed(self._key, self)
        for member in self._leaving():
            member.share_failed(error if member is self._leader else self._as_for(member, error))

    def _leaving(self) -> list[Member]:
        members, self._members = list(self._members), {}
        return [member for member in members if not member.is_over]

    def _as_for(self, member: Member, error: GatewayError) -> GatewayError:
        """A server's text names the id of the request that it got."""
        if not isinstance(error, UpstreamFailed):
            return error
        text = with_own_id(error.text, self._id or UNKNOWN_ID, member.head.id or UNKNOWN_ID)
        own = UpstreamFailed(error.code, text, error.trailers)
        own.served = error.served
        return own

    # As an observer

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        self._hears = next(iter(self._members), None)
        return self._hears.observer.attempt_started(event) if self._hears is not None else ()

    def attempt_merged(self, event: AttemptMerged) -> None:
        if self._hears is not None:
            self._hears.observer.attempt_merged(event)

    def attempt_ended(self, event: AttemptEnded) -> None:
        hears, self._hears = self._hears, None
        if hears is not None:
            hears.observer.attempt_ended(event)

    def step_ended(self, event: StepEnded) -> None:
        """A model that Triton answers has none."""

    def ended(self, event: CallEnded) -> None:
        """Each member's end is reported as its own."""


def _as_chosen(served: Served) -> Served:
    """Who gave a fallback's answer, as calls are told for which it is remembered: that variant is meant for them."""
    return replace(served, fallback_from="", fallback_reason="")


class SharedModel:
    """Of one public model: its requests in flight by key, and its remembered answers."""

    def __init__(self, name: str, settings: ShareSettings) -> None:
        self._name = name
        self.settings = settings
        self._flights: dict[Hashable, Flight] = {}  # the latest by key, and one by key and turn
        self._cache = AnswerCache(settings.cache_bytes, settings.seconds)
        self.hits = 0
        self.coalesced = 0
        self.executed = 0

    def maybe_answer(self, variant: Variant, digest: bytes, now: float) -> Answer | None:
        """A remembered one, to a request that this variant is to answer."""
        found = self._cache.maybe_find((variant, digest), now) if self.settings.cache_bytes else None
        if found is not None:
            self.hits += 1
        return found

    def maybe_flight(self, key: Hashable, turn: Hashable) -> Flight | None:
        """The flight that a request may join: the latest, or the one that waits for the same turn."""
        flight = self._flights.get(key)
        if flight is not None and not flight.takes(turn):
            flight = self._flights.get((key, turn))
        return flight if flight is not None and flight.takes(turn) else None

    def began(self, key: Hashable, flight: Flight) -> None:
        self.executed += 1
        if self.settings.coalesce:
            self._flights[key] = self._flights[key, flight.turn] = flight

    def landed(self, key: Hashable, flight: Flight) -> None:
        """It takes no more members."""
        for each in (key, (key, flight.turn)):
            if self._flights.get(each) is flight:
                del self._flights[each]

    def answered(self, variant: Variant, digest: bytes, answer: Answer, known: KnownModel, now: float) -> None:
        """variant: that answered, which may be a fallback: what it said is remembered as its own."""
        if self.settings.cache_bytes:
            self._cache.keep((variant, digest), answer, known, now)

    def forget(self) -> None:
        self._cache.clear()

    def now(self) -> SharedNow:
        cache = self._cache
        return SharedNow(
            self._name, self.hits, self.coalesced, self.executed, len(cache), cache.bytes, cache.most, cache.evictions
        )


class Shares:
    """By public model. `table` is empty, and false, when nothing is shared."""

    def __init__(self) -> None:
        self.table: dict[str, SharedModel] = {}

    def apply(self, settings: Mapping[str, ShareSettings]) -> None:
        """Put a config in force. What a model remembers stays if its settings do."""
        before = self.table
        self.table = {
            name: before[name] if name in before and before[name].settings == each else SharedModel(name, each)
            for name, each in settings.items()
        }

    def forget(self) -> None:
        """Remember no answer any more, until others come."""
        for each in self.table.values():
            each.forget()

    def now(self) -> list[SharedNow]:
        """May be asked from any thread."""
        return [each.now() for each in self.table.values()]
