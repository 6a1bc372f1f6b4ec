"""The interchangeable endpoints of one upstream: which one a call goes to. Decides only; `forwarding` acts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Sequence
from typing import Final

from mypy_extensions import mypyc_attr

from gateway.status import Verdict
from gateway.upstream.endpoint import Endpoint, Standing, State
from gateway.upstream.outlier import expected_share

_READY: Final = State.READY  # see `status.OK`
_PREFERENCE: Final = {State.READY: 0, State.UNPROBED: 1, State.SUSPECT: 2}


@mypyc_attr(allow_interpreted_subclasses=True)
class Pool:
    """Least-loaded choice among the endpoints that can serve a model, without those that do worse than their peers."""

    def __init__(
        self, name: str, endpoints: Sequence[Endpoint], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.endpoints = tuple(endpoints)
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Pool {self.name} {self.endpoints!r}>"

    def is_available(self, model: str, version: str) -> bool:
        for endpoint in self.endpoints:  # a loop and not any(): no generator on the hot path  # noqa: SIM110
            if endpoint.can_serve(model, version):
                return True
        return False

    def maybe_pick(
        self, model: str, version: str, tried: Container[Endpoint] = (), *, desperate: bool = False
    ) -> Endpoint | None:
        """The endpoint with the fewest calls in flight of those in the best state, or None.

        Ties are drawn: an idle pool is used evenly, and no caller can tell whose turn is next. A call that failed
        lately counts like one in flight, so that who fails at once does not attract what it can't answer.

        desperate: also one that is ejected, since there is nothing else.
        """
        endpoints = self.endpoints
        count = len(endpoints)
        if not count:  # its name was not found yet
            return None
        if count == 1:
            only = endpoints[0]
            return only if only not in tried and only.can_serve(model, version) else None
        turn = int(random.random() * count)  # noqa: S311  (spread, not secrecy)
        best, best_rank = None, (9, 0.0)
        for endpoint in (*endpoints[turn:], *endpoints[:turn]):
            if endpoint in tried or not endpoint.can_serve(model, version):
                continue
            state = endpoint.state
            load: float = endpoint.in_flight
            if endpoint.is_troubled:
                now = self._clock()
                standing = Standing.IN if desperate else endpoint.standing(model, version, now)
                if standing is Standing.TRIAL:
                    return endpoint
                if standing is Standing.OUT:
                    continue
                load = endpoint.burdened(now)
            rank = (0 if state is _READY else _PREFERENCE[state], load)
            if rank < best_rank:
                best, best_rank = endpoint, rank
        return best

    def failed(self, endpoint: Endpoint, model: str, version: str, verdict: Verdict, now: float) -> float:
        """Count a call that went wrong. Answers for how many seconds that ejects the endpoint, if it does."""
        if not endpoint.counts_against(model, version, verdict, now):
            return 0.0
        record = endpoint.record(model, version)
        peers = [e for e in self.endpoints if e is not endpoint and e.can_serve(model, version)]
        if not record.is_ejected and 2 * (sum(e.is_ejected(model, version) for e in self.endpoints) + 1) > len(
            self.endpoints
        ):
            return 0.0
        others = [e.record(model, version).counts(now) for e in peers if not e.is_ejected(model, version)]
        if not others or not record.is_outlier(expected_share(others), now):
            return 0.0
        return endpoint.eject(model, version, now)

    def maybe_find(self, address: str) -> Endpoint | None:
        return next((e for e in self.endpoints if e.address == address), None)


class Ranked(Pool):
    """The first endpoint in the given order, of those in the best state: for who must find the same one again."""

    def maybe_pick(
        self, model: str, version: str, tried: Container[Endpoint] = (), *, desperate: bool = False
    ) -> Endpoint | None:
        able = [e for e in self.endpoints if e not in tried and e.can_serve(model, version)]
        able = [e for e in able if e.state is not State.SUSPECT] or able
        able = [e for e in able if not e.is_ejected(model, version)] or able
        return able[0] if able else None
