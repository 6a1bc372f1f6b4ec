"""The interchangeable endpoints of one upstream: which one a call goes to. Decides only; `forwarding` acts."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from gateway.upstream.endpoint import Endpoint, State

_READY: Final = State.READY  # see `status.OK`
_PREFERENCE: Final = {State.READY: 0, State.UNPROBED: 1, State.SUSPECT: 2}


class Pool:
    """Least-loaded choice among the endpoints that can serve a model."""

    def __init__(self, name: str, endpoints: Sequence[Endpoint]) -> None:
        self.name = name
        self.endpoints = tuple(endpoints)
        self._turn = 0

    def __repr__(self) -> str:
        return f"<Pool {self.name} {self.endpoints!r}>"

    def is_available(self, model: str, version: str) -> bool:
        for endpoint in self.endpoints:  # a loop and not any(): no generator on the hot path  # noqa: SIM110
            if endpoint.can_serve(model, version):
                return True
        return False

    def maybe_pick(self, model: str, version: str, tried: Container[Endpoint] = ()) -> Endpoint | None:
        """The endpoint with the fewest calls in flight of those in the best state, or None.

        Ties go round, so that an idle pool is used evenly.
        """
        endpoints = self.endpoints
        if not endpoints:  # its name was not found yet
            return None
        if len(endpoints) == 1:
            only = endpoints[0]
            return only if only not in tried and only.can_serve(model, version) else None
        self._turn = turn = (self._turn + 1) % len(endpoints)
        best, best_rank = None, (9, 0)
        for endpoint in (*endpoints[turn:], *endpoints[:turn]):
            if endpoint in tried or not endpoint.can_serve(model, version):
                continue
            state = endpoint.state
            rank = (0 if state is _READY else _PREFERENCE[state], endpoint.in_flight)
            if rank < best_rank:
                best, best_rank = endpoint, rank
        return best

    def maybe_find(self, address: str) -> Endpoint | None:
        return next((e for e in self.endpoints if e.address == address), None)
