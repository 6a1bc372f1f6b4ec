"""Gateways with different subsets of one upstream: calls stay in the subset, sequences go on at whichever gateway."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from patience import wait_until
from played_triton import PlayedTriton, played
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, call, channel_to, infer, read_all, stream

from gateway.app import Gateway, Place
from gateway.config import load
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.subset import place_of, subset_of

pytestmark = pytest.mark.integration

NO_START = (
    "[request id: <id_unknown>] inference request for sequence {} to model 'kept' must specify the START flag on the "
    "first request of the sequence"
)
ids = itertools.count(1000)


@dataclass
class Keeper:
    """A model that keeps sequences, in a played Triton: of each, how many requests it had."""

    address: str = ""
    sequences: Counter[int] = field(default_factory=Counter)

    async def __call__(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        parameters = request.parameters
        sequence = parameters["sequence_id"].int64_param
        if not sequence:
            return
        if parameters["sequence_start"].bool_param:
            self.sequences[sequence] = 0
        elif sequence not in self.sequences:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_START.format(sequence))
        self.sequences[sequence] += 1


@dataclass
class Site:
    """Six endpoints, and two gateways with two of them each, none the same."""

    keepers: dict[str, Keeper]
    servers: dict[str, contextlib.AsyncExitStack]
    gateways: list[Gateway]
    channels: list[grpc.aio.Channel]

    async def kill(self, address: str) -> None:
        await self.servers[address].aclose()

    async def restart(self, address: str) -> None:
        keeper = self.keepers[address] = Keeper(address)
        await self.servers[address].enter_async_context(played(keeper, address))

    def holders(self, sequence: int) -> list[str]:
        return [address for address, keeper in self.keepers.items() if sequence in keeper.sequences]

    def subset(self, gateway: int) -> set[str]:
        return {endpoint.address for endpoint in self.gateways[gateway]._topology.now.pools["pool"].endpoints}

    def outside(self, gateway: int) -> list[str]:
        return [endpoint.address for endpoint in self.gateways[gateway]._fleet.outside("pool")]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with contextlib.AsyncExitStack() as exits:
        keepers, servers = {}, {}
        for _ in range(6):
            keeper, server = Keeper(), await exits.enter_async_context(contextlib.AsyncExitStack())
            triton: PlayedTriton = await server.enter_async_context(played(keeper))
            keeper.address = triton.address
            keepers[triton.address], servers[triton.address] = keeper, server
        file = tmp_path / "gateway.yaml"
        file.write_text(
            f"""
            listen: 127.0.0.1:0
            admin: {{listen: "127.0.0.1:0"}}
            telemetry: {{access_log: {{destination: none}}}}
            server: {{control: all}}
            upstreams: {{pool: {{endpoints: [{", ".join(keepers)}], subset: 2, probe_interval: 100ms}}}}
            models: {{m: {{variants: {{only: {{upstream: pool, model: kept}}}}}}}}
            """
        )
        loaded = load(file, {})

        def subset(worker: int) -> set[str]:
            return set(subset_of(tuple(keepers), 2, place_of(socket.gethostname(), worker, 1)))

        other = next(worker for worker in range(1, 1000) if not subset(worker) & subset(0))
        gateways = []
        for worker in (0, other):
            gateway = Gateway(loaded, lambda: loaded, {}, Place(loaded.config.admin.listen, worker=worker))
            gateways.append(await exits.enter_async_context(gateway))
        channels = [await exits.enter_async_context(channel_to(gateway.listen)) for gateway in gateways]
        yield Site(keepers, servers, gateways, channels)


def known_of(site: Site, gateway: int, address: str) -> list[Endpoint]:
    """The endpoints of this address that a gateway is connected to."""
    inside = site.gateways[gateway]._topology.now.pools["pool"].endpoints
    return [each for each in (*inside, *site.gateways[gateway]._fleet.outside("pool")) if each.address == address]


def step(sequence: int, *, start: bool = False, end: bool = False) -> Any:
    parameters = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    return infer("m", [[1]], "INT32", parameters=parameters)


def fine(outcome: Outcome) -> str:
    """Who answered."""
    assert outcome.code is grpc.StatusCode.OK, outcome.text
    return outcome.trailers["gateway-endpoint"]


async def test_calls_go_to_the_subset_and_nobody_else_is_connected(site: Site) -> None:
    for number, channel in enumerate(site.channels):
        asked = {fine(await call(channel, infer("m", [[1]], "INT32"))) for _ in range(40)}
        assert asked == site.subset(number)
        assert len(asked) == 2
        assert site.outside(number) == []
        shown = site.gateways[number].shown.state()
        assert {endpoint["address"] for endpoint in shown["upstreams"]["pool"]} == asked
        assert shown["subsets"] == {"pool": {"endpoints": 6, "in_subset": 2, "outside": []}}


async def test_a_sequence_goes_on_at_another_gateway_with_another_subset(site: Site) -> None:
    here, there = site.channels
    places = set()
    for sequence in (next(ids) for _ in range(100)):
        began = fine(await call(here, step(sequence, start=True)))
        assert [fine(await call(channel, step(sequence))) for channel in (there, here, there)] == [began] * 3
        assert site.holders(sequence) == [began]
        assert site.keepers[began].sequences[sequence] == 4
        places.add(began)
    assert places == set(site.keepers)
    assert set(site.outside(0)) == places - site.subset(0)


async def test_a_sequence_that_began_elsewhere_since_its_place_is_gone_is_found_there(site: Site) -> None:
    here, there = site.channels
    victim = next(iter(site.subset(0)))  # of which one gateway knows that it is gone, and the other does not
    await site.kill(victim)
    await wait_until(lambda: site.gateways[0]._topology.now.pools["pool"].maybe_find(victim).state.value == "down")
    for sequence in (next(ids) for _ in range(40)):
        began = fine(await call(here, step(sequence, start=True)))
        assert began != victim
        assert fine(await call(there, step(sequence))) == began
        assert site.holders(sequence) == [began]
        assert site.keepers[began].sequences[sequence] == 2


async def test_a_sequence_that_is_lost_is_so_at_every_gateway_and_every_time(site: Site) -> None:
    here, there = site.channels
    sequences = [next(ids) for _ in range(24)]
    began = {sequence: fine(await call(here, step(sequence, start=True))) for sequence in sequences}
    victim = began[sequences[0]]
    lost = [sequence for sequence in sequences if began[sequence] == victim]
    await site.kill(victim)
    for channel in (there, here, there, there):
        for sequence in lost:
            outcome = await call(channel, step(sequence))
            assert outcome.code is grpc.StatusCode.UNAVAILABLE, outcome.text
            assert "is lost" in outcome.text
        for sequence in set(sequences) - set(lost):
            assert fine(await call(channel, step(sequence))) == began[sequence]
    for sequence in lost:
        again = fine(await call(there, step(sequence, start=True)))
        assert again != victim
        assert fine(await call(there, step(sequence))) == again


async def test_a_sequence_goes_on_over_a_stream_of_another_gateway(site: Site) -> None:
    here, there = site.channels
    for sequence in (next(ids) for _ in range(12)):
        began = fine(await call(here, step(sequence, start=True)))
        streaming = stream(there)
        for _ in range(5):
            await streaming.write(step(sequence))
        await streaming.done_writing()
        assert [answer.error_message for answer in await read_all(streaming)] == [""] * 5
        assert site.holders(sequence) == [began]
        assert site.keepers[began].sequences[sequence] == 6


async def test_a_server_that_does_not_know_a_sequence_is_no_reason_to_ask_another(site: Site) -> None:
    """It might hold an older one of the same id, which its caller had given up there before beginning it anew."""
    here, there = site.channels
    victim = next(iter(site.subset(0)))
    sequences = [next(ids) for _ in range(60)]
    await site.kill(victim)
    older = {sequence: fine(await call(here, step(sequence, start=True))) for sequence in sequences}
    await site.restart(victim)
    known = [endpoint for gateway in (0, 1) for endpoint in known_of(site, gateway, victim)]
    await wait_until(lambda: all(endpoint.state.value == "ready" for endpoint in known))
    newer = {sequence: fine(await call(here, step(sequence, start=True))) for sequence in sequences}
    moved = [sequence for sequence in sequences if newer[sequence] != older[sequence]]
    assert {newer[sequence] for sequence in moved} == {victim}
    site.keepers[victim].sequences.clear()  # the model was loaded anew
    for sequence in moved:
        outcome = await call(there, step(sequence))
        assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT, outcome.text
        assert site.keepers[older[sequence]].sequences[sequence] == 1


async def test_a_sequence_is_lost_when_none_of_its_places_can_be_reached(site: Site) -> None:
    here, there = site.channels
    sequence = next(ids)
    fine(await call(here, step(sequence, start=True)))
    for address in site.keepers:
        await site.kill(address)
    for _ in range(3):
        outcome = await call(there, step(sequence))
        assert outcome.code is grpc.StatusCode.UNAVAILABLE
        assert "is lost" in outcome.text, outcome.text
    outcome = await call(there, step(sequence, start=True))
    assert outcome.code is grpc.StatusCode.UNAVAILABLE
    assert "no variant can answer now" in outcome.text


async def test_a_sequence_that_nobody_began_is_refused_as_triton_does(site: Site) -> None:
    for channel in site.channels:
        outcome = await call(channel, step(next(ids)))
        assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "must specify the START flag" in outcome.text


async def test_rpcs_that_must_change_every_server_are_refused(site: Site) -> None:
    load_model = site.channels[0].unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
    with pytest.raises(grpc.aio.AioRpcError, match="keeps in touch with a subset") as caught:
        await load_model(
            pb.RepositoryModelLoadRequest(model_name="kept").SerializeToString(),
            metadata=[("gateway-upstream", "pool")],
        )
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
