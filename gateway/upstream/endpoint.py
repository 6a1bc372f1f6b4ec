"""One Triton server as a pool sees it: its connection, what it can serve, what it is doing now.

No I/O of its own: `health` feeds it, `pool` asks it, `forwarding` counts its calls on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

from gateway.status import Meaning, Verdict
from gateway.upstream.connection import Connection
from gateway.upstream.known import MOST_KNOWN, KnownModel

ModelKey = tuple[str, str]
"""A Triton model's name and version; version "" stands for the server's policy."""


class State(Enum):
    """What is known of an endpoint as a whole."""

    UNPROBED = "unprobed"  # just added; worth a try
    READY = "ready"  # the last probe went well
    SUSPECT = "suspect"  # a call failed since; used only when nothing better is there, until the next probe
    DOWN = "down"  # a probe failed; left alone until one succeeds


_DOWN: Final = State.DOWN  # see `status.OK`


class Endpoint:
    """One endpoint of one upstream. Lives on one event loop."""

    def __init__(self, upstream: str, address: str, connection: Connection) -> None:
        self.upstream = upstream
        self.address = address
        self.connection = connection
        self.state = State.UNPROBED
        self.reason = "not probed yet"
        self._in_flight = 0
        self._idle: list[asyncio.Future[None]] = []  # who waits for the last call to end
        self.models: dict[ModelKey, bool] = {}  # of the models that variants use: ready at the last probe?
        self.remembered: dict[ModelKey, KnownModel] = {}  # the one known longest comes first; see `known`
        self.unasked_answers = 0  # on streams, to requests that it was not sent, since the log told of them
        self.unasked_quiet_until = 0.0  # on the monotonic clock
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
        for key in [key for key in self.remembered if model is None or key[0] == model]:
            known = self.remembered.pop(key, None)
            if known is not None:
                known.forget()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def begin(self) -> None:
        """Count one call, which must `end`."""
        self._in_flight += 1

    def end(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count one call for as long as the block runs."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def close(self) -> None:
        """Take no more calls, for good: who still knows this endpoint began before the config changed."""
        self.state = State.DOWN
        self.reason = "removed from the config"
        self.forget()

    async def wait_idle(self) -> None:
        """Return when no call is in flight."""
        if self._in_flight:
            waiter = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter

    def suspect(self, reason: str) -> None:
        """It is in doubt as a whole until a probe has asked it, which comes soon."""
        if self.state is not State.DOWN:
            self.state = State.SUSPECT
            self.reason = reason
        self.forget()  # it may have been started again
        self.on_suspicion()

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
        elif meaning is not Meaning.UNCLEAR:
            return
        self.on_suspicion()
