"""I/O: the second attempt of one call, which is sent elsewhere when the first has taken longer than most."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from gateway.forwarding.admission import Place, found_full
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.hedging.hedges import HedgedModel
from gateway.forwarding.inference import Inference
from gateway.forwarding.work import Work
from gateway.hooks import AttemptEnded
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import metadata_from
from gateway.status import OK, Code, Meaning, Verdict
from gateway.upstream.connection import CallFailed

_log = logging.getLogger(__name__)

_SLOWER: Final = "another endpoint was faster"


class Hedged(Protocol):
    """The call whose first attempt may be slow."""

    def maybe_slow(self) -> Attempt | None:
        """Its attempt, if that is under way and nothing has come of it."""

    def second_request(self, attempt: Attempt) -> ClientCall:
        """Its request, to the endpoint of this attempt; it is not sent yet."""

    def hedge_answered(self, hedge: Hedge, client: ClientCall) -> None:
        """The second attempt's answer has come first."""

    def fail_by(self, error: Exception) -> None:
        """End it by what was thrown."""


class Hedge:
    """The second attempt of one call: it is to come, under way, or has failed. An answer makes it the call's own."""

    __slots__ = (
        "_began_at",
        "_call",
        "_ended",
        "_inference",
        "_lives",
        "_model",
        "_sent_at",
        "_timer",
        "_work",
        "attempt",
        "client",
        "place",
    )

    def __init__(self, call: Hedged, model: HedgedModel, inference: Inference, work: Work) -> None:
        """Begin to wait for the first attempt."""
        self._call = call
        self._model = model
        self._inference = inference
        self._work = work
        self.attempt: Attempt | None = None  # once it was sent
        self.client: ClientCall | None = None  # while it is under way
        self.place: Place | None = None  # if its model's calls are limited
        self._sent_at = 0.0
        self._lives = 0  # of its endpoint, when it was sent
        self._ended: AttemptEnded | None = None  # if it has failed, or was dropped
        self._began_at = now = inference.clock()
        after = model.after(now)
        self._timer: asyncio.TimerHandle | None = None
        if after is not None:
            self._timer = asyncio.get_running_loop().call_later(after, self._send)

    def _send(self) -> None:
        """The first attempt has taken longer than most."""
        self._timer = None
        first, inference, now = self._call.maybe_slow(), self._inference, self._inference.clock()
        if first is None or not self._model.may(now, self._work.scopes):
            return
        gate = inference.gates.table.get((first.variant.upstream, first.variant.model))
        if gate is not None and not gate.maybe_enter():
            return
        second = self._work.attempts.maybe_hedge(first)
        if second is None:
            if gate is not None:
                gate.leave(now)
            return
        self._model.began(now, self._work.scopes)
        self.attempt, self._sent_at, self._lives = second, now, second.endpoint.lives
        self.place = Place(gate, now) if gate is not None else None
        second.endpoint.in_flight += 1
        try:
            client = self.client = self._call.second_request(second)
            client.on_done = self._done
            second.endpoint.connection.submit(client)
        except Exception as error:  # the first attempt goes on
            model = self._work.head.model_name
            _log.error("model %s: unforeseen failure of a second attempt", model, exc_info=error)
            self._leave(second, None)
            self.attempt = None

    def _done(self, client: ClientCall) -> None:
        """It has an answer, or has failed, before the first attempt."""
        attempt = self.attempt
        if self.client is not client or attempt is None:
            return
        self._leave(attempt, client)
        try:
            if client.code is OK:
                now = self._inference.clock()
                self._model.won += 1
                self._model.latency.took(now - self._began_at, now)  # the first would have taken longer
                self._call.hedge_answered(self, client)
            else:
                failure = CallFailed(client.code, client.text, metadata_from(client.trailing), origin=client.origin)
                _, _, self._ended = self._inference.learn(self._work, attempt, failure)
        except Exception as error:
            self._call.fail_by(error)

    def _leave(self, attempt: Attempt, client: ClientCall | None) -> None:
        """client: that has ended, if it has."""
        self.client = None
        attempt.endpoint.in_flight -= 1
        if self.place is not None:
            was_full = client is not None and found_full(client, attempt.variant.model, self._work.head.id)
            self.place.leave(client, was_full, self._inference.clock())

    def first_failed(self, first: Attempt, failure: CallFailed, verdict: Verdict | None) -> None:
        """Report the failure of the first attempt, and learn from it, while this one goes on."""
        inference, work = self._inference, self._work
        failure, verdict, ended = inference.learn(work, first, failure, verdict)
        work.observer.attempt_ended(ended)
        work.attempts.failed(first, verdict)
        work.failures = (*work.failures, (first, failure, verdict))
        inference.learn_of_overload(work)

    def become_first(self) -> Attempt:
        """It is the call's own attempt from now on, and reported only now: reports are in turn."""
        attempt = self._work.attempts.last = self.attempt
        assert attempt is not None  # noqa: S101  (it was sent)
        self._inference.tell_hedge(self._work, attempt, self._sent_at)
        return attempt

    @property
    def is_of_same_life(self) -> bool:
        """Has its endpoint been up since it was sent?"""
        return self.attempt is not None and self.attempt.endpoint.lives == self._lives

    def drop(self) -> None:
        """The first attempt's answer has come first, or the call is over."""
        client, attempt = self.client, self.attempt
        if client is not None and attempt is not None:
            self._leave(attempt, None)
            self._ended = slower(self._inference.clock())
            forsake(client)

    def end(self, code: Code, first: Attempt | None) -> None:
        """The call is over. first: its own attempt, if it has made one."""
        if self._timer is not None:
            self._timer.cancel()
        now = self._inference.clock()
        if code in (OK, Code.DEADLINE_EXCEEDED) and first is not None and first.number == 1:
            self._model.latency.took(now - self._began_at, now)
        self.drop()
        if self.attempt is not None and self._ended is not None:
            self._inference.tell_hedge(self._work, self.attempt, self._sent_at)
            self._work.observer.attempt_ended(self._ended)


def maybe_hedge(call: Hedged, inference: Inference, work: Work) -> Hedge | None:
    """For a call that makes its first attempt; None if its model is not hedged, or it is of a sequence."""
    model = inference.hedges.table.get(work.route.model)
    return None if model is None or work.sequence is not None else Hedge(call, model, inference, work)


def slower(now: float) -> AttemptEnded:
    """How the slower one of two attempts ended."""
    return AttemptEnded(Code.CANCELLED, _SLOWER, Meaning.ENDED, now)


def forsake(client: ClientCall) -> None:
    """Cancel an attempt that nobody waits for any more."""
    client.on_done = _ignored
    client.cancel()


def _ignored(client: ClientCall) -> None:
    """Whatever has become of it."""
