"""One call of a model whose identical requests share answers: as a member of a flight, or with a remembered answer."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from gateway.errors import GatewayError
from gateway.forwarding.batching import carried
from gateway.forwarding.caller import Caller
from gateway.forwarding.inference import Inference
from gateway.forwarding.metadata import served_trailers
from gateway.forwarding.sharing.answer_cache import Answer
from gateway.forwarding.sharing.key import maybe_key
from gateway.forwarding.sharing.shares import HIT, Flight, SharedCall, SharedModel
from gateway.forwarding.work import Work
from gateway.hooks import CallObserver
from gateway.rpc.metadata import Fields, fields_from
from gateway.status import Code
from gateway.types import Served
from gateway.upstream.kept import Kept
from gateway.v2.peek import Head, peek_response, rename_response


class Sharer(Protocol):
    """The call that may share an answer."""

    is_over: bool

    def made_for(self, flight: Flight) -> SharedCall:
        """A call with the same request, for the members of a flight; it has not begun."""

    def reply_shared(self, served: Served, body: bytes, initial: Fields, trailing: Fields) -> None:
        """Give it an answer that is not its own alone."""

    def fail_by(self, error: Exception) -> None:
        """End it by an error for its caller."""

    def fail_unforeseen(self, error: Exception) -> None:
        """End it by a fault of our own."""


class Sharing:
    """Of one call. Also its `Member`."""

    __slots__ = ("_call", "_caller", "_flight", "_inference", "_joined_at", "_work", "deadline", "head", "observer")

    def __init__(self, call: Sharer, caller: Caller, inference: Inference, work: Work) -> None:
        self._call = call
        self._caller = caller
        self._inference = inference
        self._work = work
        self.head: Head = work.head
        self.deadline: float | None = caller.deadline
        self.observer: CallObserver = work.observer  # the call's own: that of the work becomes the flight
        self._flight: Flight | None = None  # whose answer it waits for
        self._joined_at = 0.0  # if that was under way when it came

    def begin(self, model: SharedModel, body: bytes) -> bool:
        """Answer the call as an identical request was or is being answered. False: it must go alone."""
        inference, caller, targets = self._inference, self._caller, self._work.attempts.targets
        sent = carried(caller.metadata.passed, model.settings.metadata, model.settings.caller_key)
        digest = maybe_key(body, self._work.head, sent)
        if digest is None:
            return False
        now = inference.clock()
        answer = model.maybe_answer(targets[0], digest, now)
        if answer is not None:
            self.share_answered(answer, HIT, ())
            return True
        values = caller.metadata.values
        key = (targets, inference.gates.is_batch(values), digest)
        turn = inference.gates.turn_of(values, caller.number)
        flight = model.maybe_flight(key, turn)
        if flight is not None:
            self._flight, self._joined_at = flight, now
            flight.join(self)
            return True
        flight = self._flight = Flight(model, key, digest, self, caller, sent, turn)
        call = flight.call = self._call.made_for(flight)
        model.began(key, flight)
        call.begin_shared()
        return True

    def leave(self, code: Code, text: str) -> bool:
        """The caller has gone, or its deadline has passed. False: it waits for no flight."""
        if self._flight is None:
            return False
        self._flight.left(self, code, text, self._inference.clock())
        return True

    @property
    def given_up(self) -> Kept | None:
        """Of the flight that it was the last to leave: as of `SharedCall`."""
        return None if self._flight is None else self._flight.call.given_up

    def waited(self, now: float) -> float:
        """Seconds since it joined what was under way."""
        return now - self._joined_at if self._joined_at else 0.0

    # As a member

    @property
    def is_over(self) -> bool:
        return self._call.is_over

    def share_answered(self, answer: Answer, how: str, trailing: Fields) -> None:
        self._flight = None
        body, served, id = answer.body, answer.served, self.head.id
        try:
            if id:
                body = rename_response(body, peek_response(body), id=id)
            if how:
                served, who = _reused(served, how)
                trailing = (*answer.trailing, *who)
            self._call.reply_shared(served, body, answer.initial, trailing)
        except Exception as error:
            self._call.fail_unforeseen(error)

    def share_failed(self, error: GatewayError) -> None:
        self._flight = None
        try:
            self._call.fail_by(error)
        except Exception as unforeseen:
            self._call.fail_unforeseen(unforeseen)


@lru_cache(4096)
def _reused(served: Served, how: str) -> tuple[Served, Fields]:
    """The same, of an answer that was not made for this caller alone."""
    reused = replace(served, attempts=0, reused=how)
    return reused, tuple(fields_from(served_trailers(reused)))
