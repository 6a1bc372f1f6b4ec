"""One call at the gate of its model: it waits for its turn, has a place among the calls in flight, and leaves it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Protocol

from gateway.forwarding.admission.gate import Gate
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.caller import Caller
from gateway.rpc.client import ClientCall
from gateway.status import OK, Code, classify, is_queue_full

_MAY_BE_FULL: Final = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


class Queued(Protocol):
    """The call that takes a turn: it is told as a `Waiting` is."""

    def admitted(self) -> None: ...

    def shed(self, reason: str, retry_after: float) -> None: ...


class Place:
    """Of one call in flight, which must leave it once."""

    __slots__ = ("_gate", "_since")

    def __init__(self, gate: Gate, now: float) -> None:
        self._gate = gate
        self._since = now

    def leave(self, client: ClientCall | None, was_full: bool, now: float) -> None:
        """client: that has ended, if one has. was_full: the server refused it since its queue was full."""
        if client is not None and client.code is OK:
            self.leave_answered(now)
            return
        if was_full:
            self._gate.server_refused()
        self._gate.leave(now)

    def leave_answered(self, now: float) -> None:
        """An answer is here, or as much of a large one that the server must have done with it."""
        self._gate.answered(now - self._since, now)
        self._gate.leave(now)


class Turn(Place):
    """A place for which a call may have to wait. Also its `Waiting`."""

    __slots__ = ("_call", "_caller", "attempt", "turn")

    def __init__(  # noqa: PLR0917  (made for each call of a limited model, where keywords cost)
        self, call: Queued, caller: Caller, turn: Hashable, attempt: Attempt, gate: Gate, now: float
    ) -> None:
        """turn: who it is that takes turns with others. attempt: that is made when there is a place."""
        super().__init__(gate, now)
        self._call = call
        self._caller = caller
        self.turn = turn
        self.attempt = attempt

    def enter(self, is_batch: bool) -> bool:
        """True: the call has the place. False: it waits, and is told.

        :raises Refused: if it would wait in vain.
        """
        return self._gate.enter(self, is_batch, self._since)

    def stop_waiting(self, now: float) -> float:
        """Answers for how many seconds it has waited. From now on it has the place, if it is to have it."""
        waited, self._since = now - self._since, now
        return waited

    def abandon(self) -> None:
        """The call no longer waits."""
        self._gate.abandon(self)

    # As a `Waiting`

    @property
    def until(self) -> float | None:
        return self._caller.useful_until

    def admitted(self) -> None:
        self._call.admitted()

    def shed(self, reason: str, retry_after: float) -> None:
        self._call.shed(reason, retry_after)


def found_full(client: ClientCall, model: str, id: str) -> bool:
    """Has a server refused this request, of this id and model, since its queue was full?"""
    if client.code not in _MAY_BE_FULL:
        return False
    return is_queue_full(classify(client.code, client.text, client.origin, model=model, id=id), client.text)
