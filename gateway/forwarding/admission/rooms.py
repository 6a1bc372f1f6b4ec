"""The use-case of knowing servers' queues before they are full: asks Tritons for their models' configs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.admission.gates import GateKey, Gates
from gateway.forwarding.admission.server_room import ServerRoom, has_bound, maybe_room
from gateway.forwarding.topology import CurrentTopology
from gateway.types import Variant
from gateway.upstream.ask import decoded
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint, State

_log = logging.getLogger(__name__)

_PATH: Final = "/inference.GRPCInferenceService/ModelConfig"
_PATIENCE_SECONDS: Final = 5.0  # for one answer
_PAUSE_SECONDS: Final = 1.0  # between two rounds: when many endpoints change at once, few questions
_PAUSES: Final = 60  # after which all are asked again: a model that is replaced in place changes no readiness


class Rooms:
    """Tells `Gates` what room there is, until its `run` is cancelled."""

    def __init__(self, topology: CurrentTopology, gates: Gates) -> None:
        self._topology = topology
        self._gates = gates
        self._is_poked = False

    def poke(self) -> None:
        """Ask soon: a model, an endpoint or the config has changed."""
        self._is_poked = True

    async def run(self) -> None:
        while True:
            self._is_poked = False
            try:
                await self.ask()
            except Exception:  # the edge: nobody waits for this
                _log.exception("servers could not be asked for the length of their queues")
            for _ in range(_PAUSES):
                await asyncio.sleep(_PAUSE_SECONDS)
                if self._is_poked:
                    break

    async def ask(self) -> None:
        """Ask every endpoint that can be for every model whose limit is `auto`."""
        variants: dict[GateKey, Variant] = {}
        for route in self._topology.now.routes.public.values():
            for variant in route.variants:
                variants.setdefault((variant.upstream, variant.model), variant)
        self._gates.keep(variants, time.monotonic())
        for key, variant in variants.items():
            if not self._gates.adapts(key):
                continue
            pool = self._topology.now.pools.get(variant.upstream)
            usable = [e for e in pool.endpoints if _is_usable(e, variant)] if pool is not None else []
            if not usable:
                continue  # what was known stands until somebody can be asked
            configs = await asyncio.gather(*(self._config(endpoint, variant) for endpoint in usable))
            rooms = [maybe_room(config) if config is not None else None for config in configs]
            is_endless = not any(config is None or has_bound(config) for config in configs)
            self._gates.learn(key, _total(rooms), time.monotonic(), is_endless=is_endless)

    @staticmethod
    async def _config(endpoint: Endpoint, variant: Variant) -> Any:
        """A `ModelConfig`, whose class has no types; None if the endpoint does not say."""
        request = pb.ModelConfigRequest(name=variant.model, version=variant.version).SerializeToString()
        try:
            answer = await endpoint.connection.unary(_PATH, request, (), _PATIENCE_SECONDS)
            return decoded("ModelConfig", answer.body, pb.ModelConfigResponse).config
        except CallFailed:
            return None  # its probes see whether that means anything


def _is_usable(endpoint: Endpoint, variant: Variant) -> bool:
    return endpoint.state is State.READY and endpoint.can_serve(variant.model, variant.version)


def _total(rooms: list[ServerRoom | None]) -> ServerRoom | None:
    """Of all endpoints; None if one of them has no bound that is known, for then it may take more."""
    total = ServerRoom(0, 0)
    for room in rooms:
        if room is None:
            return None
        total = total.plus(room)
    return total
