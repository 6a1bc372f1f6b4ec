"""Telemetry: the log at level debug: one line for each decision of a call, as it is made.

May depend on values only. A payload is never logged, nor a caller's metadata.
"""

from __future__ import annotations

import itertools
import logging
from typing import Final

from gateway.hooks import (
    AttemptEnded,
    AttemptMerged,
    AttemptStarted,
    CallEnded,
    CallObserver,
    CallStarted,
    NoListener,
    NoObserver,
    StepEnded,
)
from gateway.types import Metadata

_log = logging.getLogger("gateway.calls")

_MOST_CHARACTERS: Final = 200  # of what others have written: names, ids, texts


def is_wanted() -> bool:
    """Is the level so low that these lines are written? Else no call must pay for them."""
    return _log.isEnabledFor(logging.DEBUG)


class CallLog(NoListener):
    """Numbers the calls of this process, so that lines of one can be found among those of others."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def call_started(self, event: CallStarted) -> CallObserver:
        return _Call(next(self._numbers), event)


class _Call(NoObserver):
    def __init__(self, number: int, start: CallStarted) -> None:
        self._number = number
        self._start = start
        self._attempt = 0
        self._began = 0.0
        known = "" if start.known else ", a name that the config does not have"
        self._say("%s of %s from %s%s", start.method, _cut(start.model), start.peer, known)

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        self._attempt, self._began = event.number, event.at
        instead = f" in place of {event.instead_of} ({event.reason})" if event.instead_of else ""
        target = f"variant {_cut(event.variant)} at {event.upstream}/{event.endpoint}"
        self._say("attempt %d: %s, chosen by %s%s", event.number, target, event.why, instead)
        return ()

    def attempt_merged(self, event: AttemptMerged) -> None:
        self._say("attempt %d: travels with %d requests in all", self._attempt, event.requests)

    def attempt_ended(self, event: AttemptEnded) -> None:
        meaning = f" ({event.meaning.value}): {_cut(event.text)}" if event.meaning else ""
        self._say(
            "attempt %d: %s in %.1f ms%s", self._attempt, event.code.name, 1e3 * (event.at - self._began), meaning
        )

    def step_ended(self, event: StepEnded) -> None:
        error = f", failed: {_cut(event.error)}" if event.error else ""
        self._say("step %s: %d rows in %.1f ms%s", event.step, event.rows, 1e3 * (event.at - event.started), error)

    def ended(self, event: CallEnded) -> None:
        served = f", answered by {_cut(event.served.variant)} at {event.served.endpoint}" if event.served else ""
        text = f": {_cut(event.text)}" if event.text else ""
        self._say("ended with %s in %.1f ms%s%s", event.code.name, 1e3 * (event.at - self._start.at), served, text)

    def _say(self, text: str, *values: object) -> None:
        _log.debug("call %d: " + text, self._number, *values, extra={"request_id": self._start.request_id})


def _cut(text: str) -> str:
    return repr(text[:_MOST_CHARACTERS])
