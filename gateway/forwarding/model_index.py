"""The use-case that asks Triton which models it has, where all of an upstream's may be called."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.found_models import READY, FoundModels
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Direct
from gateway.upstream.ask import ask, usable
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint

_AGAIN_SECONDS: Final = 60.0  # between two looks, since a model that is loaded changes nothing that the gateway watches
_PAUSE_SECONDS: Final = 2.0  # at least, however often endpoints come and go
_ENDPOINTS: Final = 3  # asked in one look: they should have the same models, and need not


class ModelIndex:
    """Reads the index of the upstream whose models may all be called, until its `run` is cancelled."""

    def __init__(self, topology: CurrentTopology, found: FoundModels) -> None:
        self._topology = topology
        self._found = found
        self._poked = asyncio.Event()

    def poke(self) -> None:
        """Look soon: an endpoint or the config has changed."""
        self._poked.set()

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_PAUSE_SECONDS)
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
                await asyncio.wait_for(self._poked.wait(), _AGAIN_SECONDS)
            self._poked.clear()

    async def look(self) -> None:
        """Look once. If no endpoint tells, everything stays as it was; the probes say what that means."""
        topology = self._topology.now
        pool = topology.pools.get(topology.routes.default_upstream)
        if topology.routes.direct is not Direct.ALL or pool is None:
            return
        endpoints = list(usable(pool))
        told = await asyncio.gather(*map(_entries_of, random.sample(endpoints, min(len(endpoints), _ENDPOINTS))))
        if any(entries is not None for entries in told):
            self._found.listed(states_of([entry for entries in told for entry in entries or ()], topology))


def states_of(entries: Sequence[Any], topology: Topology) -> dict[str, tuple[str, str]]:
    """State and reason by model, of those that the config does not name. entries: of indexes (Any: protobuf).

    A model is ready if one of its versions is, at one of the endpoints.
    """
    found: dict[str, tuple[str, str]] = {}
    for entry in entries:
        name = entry.name
        if not topology.is_known(name) and (entry.state == READY or found.get(name, ("", ""))[0] != READY):
            found[name] = (entry.state, "" if entry.state == READY else entry.reason)
    return found


async def _entries_of(endpoint: Endpoint) -> Sequence[Any] | None:
    """Any: protobuf. None: the endpoint does not tell; it may not let us ask (`--grpc-restricted-protocol`)."""
    try:
        answer = await ask(endpoint, "RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse)
    except CallFailed:
        return None
    return list(answer.models)
