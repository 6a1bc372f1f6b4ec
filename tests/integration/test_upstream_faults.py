"""What one endpoint's faults cost callers, by the bars of docs/reliability.md. Tritons are played (`played_triton`)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from played_triton import PlayedTriton, fails_at_once, played
from traffic import OK, Traffic, config, gateway, http, traffic, write

from gateway.app import Gateway

NET = {"net": {"variants": {"only": {"upstream": "all", "model": "net"}}}}


def infer(id: str = "", size: int = 4, **parameters: Any) -> Any:
    from tritonclient.grpc import service_pb2 as pb  # noqa: PLC0415

    request = pb.ModelInferRequest(model_name="net", id=id)
    request.inputs.add(name="IN", datatype="UINT8", shape=[size])
    request.raw_input_contents.append(bytes(size))
    return request


@contextlib.asynccontextmanager
async def pair(tmp_path: Path, **more: Any) -> AsyncIterator[tuple[Gateway, PlayedTriton, PlayedTriton]]:
    """A gateway with one upstream of two servers."""
    async with played() as one, played() as two:
        file = write(tmp_path / "g.yaml", config({"all": [one.address, two.address]}, {**NET, **more}))
        async with gateway(file) as running:
            yield running, one, two


def share_of_failures(calls: Traffic, since: float) -> float:
    ended = calls.since(since)
    assert len(ended) > 200
    return sum(each.code is not OK for each in ended) / len(ended)


async def test_one_of_two_servers_that_fails_every_call_at_once_fails_hardly_any_and_gets_calls_when_it_is_well(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (running, one, two), traffic(running.listen, infer(), callers=8) as calls:
        await calls.more(200)
        one.behaviour = fails_at_once
        broken = time.monotonic()
        await asyncio.sleep(2)
        await calls.more(400)
        assert share_of_failures(calls, broken + 2) <= 0.01
        metrics = (await http(running.admin_address, "/metrics"))[1]
        assert f'gateway_endpoint_ejections_total{{address="{one.address}",model="net",upstream="all"}} ' in metrics
        state: Any = running.state()
        assert {each["address"]: each["ejected"] for each in state["upstreams"]["all"]} == {
            one.address: ["net"],
            two.address: [],
        }
        one.behaviour = two.behaviour
        well = time.monotonic()
        await calls.until(lambda: calls.endpoints(time.monotonic() - 1)[one.address] > 50, 25, "its share again")
        assert not [each for each in calls.since(well + 1) if each.code is not OK]
