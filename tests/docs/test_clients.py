"""What docs/clients.md shows is so: its retry policy does what it says, its requests and methods exist."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from test_documentation import ROOT, blocks
from tritonclient.grpc import service_pb2 as pb
from v2_calls import infer
from v2_gateways import Script, transparent_to

from gateway.api.descriptors import descriptor_set

PAGE = ROOT / "docs" / "clients.md"
(_RETRIES,) = [text for _, text in blocks(PAGE, "json")]
_INFER = "/inference.GRPCInferenceService/ModelInfer"
ARRIVED = {
    "what a connection's end looks like": (grpc.StatusCode.UNAVAILABLE, 3),
    "too many calls": (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
    "a model's fault": (grpc.StatusCode.INTERNAL, 1),
    "a caller's fault": (grpc.StatusCode.INVALID_ARGUMENT, 1),
}


@pytest.fixture(scope="module")
def pool() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(descriptor_set()).file:
        pool.Add(file)
    return pool


@pytest.mark.parametrize(("code", "times"), ARRIVED.values(), ids=ARRIVED)
async def test_the_retry_policy_repeats_what_may_be_repeated(code: grpc.StatusCode, times: int) -> None:
    seen: Counter[str] = Counter()

    async def fail(body: bytes, context: Any) -> bytes:
        seen[pb.ModelInferRequest.FromString(body).id] += 1
        await context.abort(code, "not now")
        return b""

    request = infer("any")
    request.id = "one"
    async with (
        Script(infer=fail).serve() as address,
        transparent_to(address) as gateway,
        grpc.aio.insecure_channel(gateway.listen, [("grpc.service_config", _RETRIES)]) as channel,
    ):
        with pytest.raises(grpc.RpcError) as raised:
            await channel.unary_unary(_INFER)(request.SerializeToString(), timeout=60)
    assert raised.value.code() is code
    assert seen == {"one": times}


async def test_the_retry_policy_ends_by_itself_while_all_calls_fail() -> None:
    seen: Counter[str] = Counter()

    async def fail(body: bytes, context: Any) -> bytes:
        seen["all"] += 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return b""

    async with (
        Script(infer=fail).serve() as address,
        transparent_to(address) as gateway,
        grpc.aio.insecure_channel(gateway.listen, [("grpc.service_config", _RETRIES)]) as channel,
    ):
        for _ in range(20):
            with pytest.raises(grpc.RpcError):
                await channel.unary_unary(_INFER)(infer("any").SerializeToString(), timeout=60)
    assert seen["all"] < 20 + 10


def test_the_retry_policy_names_methods_that_exist_and_change_nothing(pool: DescriptorPool) -> None:
    (config,) = json.loads(_RETRIES)["methodConfig"]
    named = {(name["service"], name["method"]) for name in config["name"]}
    for service, method in named:
        found = pool.FindMethodByName(f"{service}.{method}")
        assert not any((found.client_streaming, found.server_streaming)), method
    assert not {method for _, method in named if re.search("Load|Register|Setting|Report", method)}


def test_the_requests_by_grpcurl_are_what_their_methods_take(pool: DescriptorPool) -> None:
    commands = [line for _, text in blocks(PAGE, "sh") for line in text.splitlines() if line.startswith("grpcurl")]
    called = set()
    for line in commands:
        words = shlex.split(re.sub(r"\$\(.*?\)", "AAAA", line))
        service, _, name = words[-1].partition("/")
        called.add(service)
        given = words[words.index("-d") + 1] if "-d" in words else "{}"
        method = pool.FindMethodByName(f"{service}.{name}")
        json_format.Parse(given, GetMessageClass(method.input_type)(), descriptor_pool=pool)
    declared = FileDescriptorSet.FromString(descriptor_set()).file
    assert called == {f"{file.package}.{service.name}" for file in declared for service in file.service}
