"""What an endpoint may read and write of a region for one call: until its answer, and longer where that is not the end.

A call that is given up runs on in Triton, which knows no way to stop it that would be safe; so how many of these there
are is counted, and an ensemble whose step fails answers while its other steps read on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from gateway.bounded import make_room
from gateway.status import Code, is_of_step, is_tritons_own
from gateway.upstream.slots import Slot

MOST_GIVEN_UP: Final = 8
"""Calls that are given up and run on in an endpoint. Once there are so many, tensors go as bytes until all of them have
ended: what is sent so has a deadline, and Triton drops it when it is cancelled. Else a Triton with more to do than it
can would compute what nobody waits for any more."""
_GIVEN_UP_SECONDS: Final = 30.0  # for which a call that is given up keeps its places: its endpoint may hang
_STEPS_SECONDS: Final = 600.0  # for which a part stays taken that an ensemble's steps may read after it has failed
_ENSEMBLES_KEPT: Final = 1024  # models that have failed so


class Unheard:
    """What one endpoint goes on with although nobody hears of it any more."""

    def __init__(self) -> None:
        self.count = 0  # calls that nobody waits for any more, and Triton has not answered
        self.steps_seconds = _STEPS_SECONDS
        self._is_sparing = False  # have there been too many?
        self._ensembles: dict[str, None] = {}  # models that have failed in a step

    def is_too_much(self) -> bool:
        """Too many calls are so until none is left."""
        self._is_sparing = self.count > 0 and (self._is_sparing or self.count >= MOST_GIVEN_UP)
        return self._is_sparing

    def failed_in_step(self, model: str) -> None:
        """A model is an ensemble whose step has failed."""
        make_room(self._ensembles, _ENSEMBLES_KEPT)
        self._ensembles[model] = None

    def has_steps(self, model: str) -> bool:
        """Is a model such an ensemble?"""
        return model in self._ensembles


class Kept:
    """The parts of a region that a server may read and write for one call, until it has answered."""

    def __init__(self, unheard: Unheard, slots: Sequence[Slot], names: tuple[str, str, str]) -> None:
        """names: of model and version, and the id, as the server gets them."""
        self._unheard = unheard
        self._slots = slots
        self._names = names
        self._has_steps = False  # may steps of an ensemble go on, though it has answered?
        self._is_over = False  # has Triton answered, or does nobody wait for that any more?
        self._ends: list[Callable[[], None]] = []  # if it is given up
        self._timer: asyncio.TimerHandle | None = None

    def released(self, is_answered: bool) -> None:
        """As `Slot.released`."""
        if self._has_steps:
            asyncio.get_running_loop().call_later(self._unheard.steps_seconds, self._let_go, is_answered)
        else:
            self._let_go(is_answered)
        if self._timer is not None:
            self._unheard.count -= 1
            self._timer.cancel()
        self._end()

    def _let_go(self, is_answered: bool) -> None:
        for slot in self._slots:
            slot.released(is_answered)

    def give_up(self, ended: Callable[[], None]) -> None:
        """Nobody waits for the answer any more, while Triton goes on. May be called again, by whoever is to be told.

        ended: called once Triton has answered, or after a while without an answer; at once if that was already.
        """
        if self._is_over:
            ended()
            return
        self._ends.append(ended)
        if self._timer is None:
            self._unheard.count += 1
            self._timer = asyncio.get_running_loop().call_later(_GIVEN_UP_SECONDS, self._end)

    def _end(self) -> None:
        self._is_over = True
        ends, self._ends = self._ends, []
        for end in ends:
            end()

    def is_own(self, code: Code, text: str, is_core: bool) -> bool:
        """Is a status of the call provably Triton's own, so that it reads no more? See `is_tritons_own`.

        An ensemble answers once a step has failed, while others go on with the request's tensors, and Triton lets go of
        a region that they read (probed, 2.51). So that is a reason neither to free a place nor to retire the region.
        """
        model, version, id = self._names
        if code is not Code.OK and is_of_step(text):
            self._has_steps = True
            self._unheard.failed_in_step(model)
            return True
        return is_tritons_own(code, text, is_core, model=model, version=version, id=id)
