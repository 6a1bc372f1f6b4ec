"""Numbers by model where nothing is configured: Triton says which names are models, and callers can invent none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import yaml
from patience import wait_until
from traffic import http
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer
from v2_gateways import Script, gateway_of, transparent_to

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

HOSTILE = ["nobody", "add_one_a ", "ADD_ONE_A", "add_one_a\n", "a/../add_one_a", "other", "replayed", "", "x" * 1000]


async def numbers(gateway: Gateway, name: str = "gateway_requests_total") -> Counter[tuple[str, str]]:
    """Calls by the labels `model` and `code`."""
    _, text = await http(gateway.admin_address, "/metrics")
    found: Counter[tuple[str, str]] = Counter()
    for labels, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
        told = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[told["model"], told.get("code", "")] += int(float(value))
    return found


async def series(gateway: Gateway) -> int:
    _, text = await http(gateway.admin_address, "/metrics")
    return len([line for line in text.splitlines() if line.startswith("gateway_")])


@pytest.fixture(params=["transparent", "direct"])
async def everything(request: pytest.FixtureRequest, triton: LocalTriton, tmp_path: Any) -> AsyncIterator[Gateway]:
    """A gateway through which every model of Triton may be called."""
    if request.param == "transparent":
        running = transparent_to(triton.grpc_address)
    else:
        file = tmp_path / "gateway.yaml"
        config = {
            "listen": "127.0.0.1:0",
            "admin": {"listen": "127.0.0.1:0"},
            "telemetry": {"access_log": {"destination": "none"}},
            "upstreams": {"main": {"endpoints": [triton.grpc_address]}},
            "direct": {"models": "all"},
            "models": {"adder": {"variants": {"a": {"upstream": "main", "model": "add_one_a"}}}},
        }
        file.write_text(yaml.safe_dump(config))
        running = gateway_of(load(file, {}))
    async with running:
        yield running


async def test_models_of_triton_have_their_own_numbers_and_invented_names_have_none(everything: Gateway) -> None:
    await wait_until(lambda: "fails" in everything._found.states)
    async with channel_to(everything.listen) as channel:
        for _ in range(3):
            assert (await call(channel, infer("add_one_b"))).code is grpc.StatusCode.OK
        assert (await call(channel, infer("fails"))).code is not grpc.StatusCode.OK
        for name in HOSTILE:
            assert (await call(channel, infer(name))).code is not grpc.StatusCode.OK
        counted, before = await numbers(everything), await series(everything)
        for number in range(50):
            await call(channel, infer(f"invented-{number}"))
    assert counted["add_one_b", "OK"] == 3
    assert {model for model, _ in counted} == {"add_one_b", "fails", "other"}
    assert sum(count for (model, _), count in counted.items() if model == "other") == len(HOSTILE)
    assert sum((await numbers(everything)).values()) == 4 + len(HOSTILE) + 50
    assert await series(everything) <= before + 20  # another code under `other`, and no name


async def test_a_model_that_triton_does_not_list_is_one_once_it_has_answered(triton: LocalTriton) -> None:
    async def answer(body: bytes, context: Any) -> bytes:
        name = pb.ModelInferRequest.FromString(body).model_name
        if not name.startswith("real"):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        return bytes(pb.ModelInferResponse(model_name=name, model_version="1").SerializeToString())

    async with (
        Script(infer=answer).serve() as address,
        transparent_to(address) as gateway,
        channel_to(gateway.listen) as channel,
    ):
        for name in ("real", "unreal", "real", "unreal", "real"):
            await call(channel, infer(name))
        counted = await numbers(gateway)
        _, state = await http(gateway.admin_address, "/state")
    assert counted == {("other", "OK"): 1, ("real", "OK"): 2, ("other", "NOT_FOUND"): 2}
    assert list(state["triton_models"]) == ["real"]


async def test_names_that_are_invented_while_triton_is_away_make_no_series(triton: LocalTriton) -> None:
    """Each of them is tried, and tried again until its budget is used up."""
    async with Script().serve() as address:
        gateway = transparent_to(address)
        await gateway.__aenter__()
    try:
        async with channel_to(gateway.listen) as channel:
            await call(channel, infer("first"))
            before = await series(gateway)
            for number in range(100):
                await call(channel, infer(f"invented-{number}"))
        assert {model for model, _ in await numbers(gateway)} == {"other"}
        assert await series(gateway) <= before + 20
    finally:
        await gateway.__aexit__(None, None, None)
