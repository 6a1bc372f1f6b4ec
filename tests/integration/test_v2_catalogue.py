"""What the gateway says of models and of itself: as Triton does, with public models among the others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from patience import ask_until
from triton_fixture import FAST_START
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer
from v2_gateways import transparent_to

from gateway.app import Gateway
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
async def direct(triton: LocalTriton) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(triton.grpc_address) as made:
        yield made


@pytest.fixture(scope="module")
async def plain(bare: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(bare.listen) as made:
        yield made


@pytest.fixture(scope="module")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(gateway.listen) as made:
        yield made


QUESTIONS = {
    "ModelReady": (pb.ModelReadyRequest, pb.ModelReadyResponse),
    "ModelMetadata": (pb.ModelMetadataRequest, pb.ModelMetadataResponse),
    "ModelConfig": (pb.ModelConfigRequest, pb.ModelConfigResponse),
    "ModelStatistics": (pb.ModelStatisticsRequest, pb.ModelStatisticsResponse),
}
NAMES = [
    ("add_one_b", ""),
    ("add_one_b", "2"),
    ("add_one_b", "1"),
    ("add_one_b", "9"),
    ("add_one_b", "abc"),
    ("repeat", ""),
    ("classifier", ""),
    ("nobody", ""),
    ("nobody", "1"),
]


async def ask(channel: grpc.aio.Channel, method: str, name: str = "", version: str = "") -> Any:
    """The answer, parsed. raises: AssertionError with the status if there is none."""
    request, response = QUESTIONS[method]
    outcome = await call(channel, request(name=name, version=version), method)
    assert outcome.code is grpc.StatusCode.OK, outcome
    return response.FromString(outcome.body)


@pytest.mark.parametrize(("name", "version"), NAMES)
@pytest.mark.parametrize("method", QUESTIONS)
async def test_answers_about_a_tritons_own_model_are_its_own(
    direct: grpc.aio.Channel, plain: grpc.aio.Channel, method: str, name: str, version: str
) -> None:
    request = QUESTIONS[method][0](name=name, version=version)
    expected, through = await call(direct, request, method), await call(plain, request, method)
    assert (through.code, through.text, through.body) == (expected.code, expected.text, expected.body)


async def test_every_model_of_a_transparent_gateway_has_statistics(
    direct: grpc.aio.Channel, plain: grpc.aio.Channel
) -> None:
    expected, through = await ask(direct, "ModelStatistics"), await ask(plain, "ModelStatistics")
    assert {each.name for each in through.model_stats} == {each.name for each in expected.model_stats}


async def listed(channel: grpc.aio.Channel, request: Any) -> list[Any]:
    outcome = await call(channel, request, "RepositoryIndex")
    return list(pb.RepositoryIndexResponse.FromString(outcome.body).models)


async def test_a_transparent_gateway_lists_what_triton_lists(direct: grpc.aio.Channel, plain: grpc.aio.Channel) -> None:
    for ready in (False, True):
        request = pb.RepositoryIndexRequest(ready=ready)
        expected, through = await listed(direct, request), await listed(plain, request)
        assert sorted(through, key=str) == sorted(expected, key=str)


async def test_a_transparent_gateway_describes_itself_as_its_triton(
    direct: grpc.aio.Channel, plain: grpc.aio.Channel
) -> None:
    for method, request in (
        ("ServerMetadata", pb.ServerMetadataRequest()),
        ("ServerLive", pb.ServerLiveRequest()),
        ("ServerReady", pb.ServerReadyRequest()),
    ):
        assert (await call(plain, request, method)).body == (await call(direct, request, method)).body


async def test_a_public_models_description_is_its_variants_under_its_name(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel
) -> None:
    metadata, config = await ask(direct, "ModelMetadata", "add_one_a"), await ask(direct, "ModelConfig", "add_one_a")
    metadata.name = config.config.name = "adder"
    assert await ask(channel, "ModelMetadata", "adder") == metadata
    assert await ask(channel, "ModelConfig", "adder") == config


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("adder", "", True),
        ("adder", "1", True),
        ("adder", "2", True),  # one variant has it
        ("adder", "9", False),
        ("best-label", "", True),
        ("best-label", "1", True),
        ("best-label", "2", False),
        ("nobody", "", False),
        ("add_two", "", True),
    ],
)
async def test_a_public_model_is_ready_if_a_variant_is(
    channel: grpc.aio.Channel, name: str, version: str, ready: bool
) -> None:
    assert (await ask(channel, "ModelReady", name, version)).ready is ready


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
@pytest.mark.parametrize(("name", "version"), [("adder", "9"), ("best-label", "2")])
async def test_an_unknown_version_of_a_public_model_is_refused_as_at_triton(
    channel: grpc.aio.Channel, method: str, name: str, version: str
) -> None:
    outcome = await call(channel, QUESTIONS[method][0](name=name, version=version), method)
    assert outcome.code.name == ("INVALID_ARGUMENT" if method == "ModelStatistics" else "NOT_FOUND")
    assert name in outcome.text


async def test_a_pipeline_describes_itself(channel: grpc.aio.Channel) -> None:
    metadata = await ask(channel, "ModelMetadata", "best-label")
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [("scores", "FP32", [-1, 4])]
    assert [(o.name, o.datatype, list(o.shape)) for o in metadata.outputs] == [("label", "BYTES", [-1, 1])]
    config = (await ask(channel, "ModelConfig", "best-label")).config
    assert (config.name, config.max_batch_size) == ("best-label", 8)


async def count(channel: grpc.aio.Channel, name: str) -> int:
    answer = await ask(channel, "ModelStatistics", name)
    assert {each.name for each in answer.model_stats} == {name}
    return sum(int(each.inference_count) for each in answer.model_stats)


async def test_statistics_of_a_public_model_add_up_its_variants(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel
) -> None:
    before = await count(channel, "adder")
    for variant in "abb":
        await call(channel, infer("adder", [[1.0], [2.0]]), metadata=[("x-variant", variant)])
    # Triton counts after it has answered.
    await ask_until(lambda: count(channel, "adder"), lambda now: now == before + 6)
    versions = {each.version for each in (await ask(channel, "ModelStatistics", "adder")).model_stats}
    assert versions == {"1", "2"}
    assert await count(channel, "adder") == await count(direct, "add_one_a") + await count(direct, "add_one_b")


async def test_statistics_add_up_endpoints(channel: grpc.aio.Channel, direct: grpc.aio.Channel) -> None:
    """`add_one_a` is on both upstreams, but only one of them has a variant of it."""
    assert await count(channel, "add_one_a") == await count(direct, "add_one_a")
    assert await count(channel, "sums") >= await count(direct, "accumulate")


async def test_a_pipeline_counts_its_requests_and_failures(channel: grpc.aio.Channel) -> None:
    request = infer("best-label", [[0, 9, 3, 1]], name="scores")
    before = (await ask(channel, "ModelStatistics", "best-label")).model_stats[0]
    await call(channel, request)
    await call(channel, infer("best-label", [[0.0]], name="scores"))
    after = (await ask(channel, "ModelStatistics", "best-label")).model_stats[0]
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1


async def test_the_index_lists_public_models_among_tritons(channel: grpc.aio.Channel) -> None:
    models = [(m.name, m.version, m.state) for m in await listed(channel, pb.RepositoryIndexRequest(ready=True))]
    assert {("adder", "1", "READY"), ("adder", "2", "READY"), ("best-label", "1", "READY")} <= set(models)
    assert ("add_two", "1", "READY") in models
    assert len(models) == len(set(models))


RESTRICTED = "metadata,model-config,statistics,model-repository,shared-memory,trace,logging"
KEY = [("triton-grpc-protocol-admin", "sesame")]
RPCS = {
    "ServerMetadata": (pb.ServerMetadataRequest(), pb.ServerMetadataResponse),
    "ModelMetadata": (pb.ModelMetadataRequest(name="add_one_a"), pb.ModelMetadataResponse),
    "ModelConfig": (pb.ModelConfigRequest(name="add_one_a"), pb.ModelConfigResponse),
    "ModelStatistics": (pb.ModelStatisticsRequest(name="add_one_a"), pb.ModelStatisticsResponse),
    "ModelStatistics of all": (pb.ModelStatisticsRequest(), pb.ModelStatisticsResponse),
    "RepositoryIndex": (pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse),
    "RepositoryIndex elsewhere": (
        pb.RepositoryIndexRequest(repository_name="no-such-place"),
        pb.RepositoryIndexResponse,
    ),
    "RepositoryModelLoad": (pb.RepositoryModelLoadRequest(model_name="add_one_a"), pb.RepositoryModelLoadResponse),
    "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest(model_name="repeat"), pb.RepositoryModelUnloadResponse),
    "SystemSharedMemoryStatus": (pb.SystemSharedMemoryStatusRequest(), pb.SystemSharedMemoryStatusResponse),
    "TraceSetting": (pb.TraceSettingRequest(), pb.TraceSettingResponse),
    "LogSettings": (pb.LogSettingsRequest(), pb.LogSettingsResponse),
}


@pytest.fixture(scope="module")
async def restricted(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """A Triton that wants a key for nearly everything but inference."""
    flag = f"--grpc-restricted-protocol={RESTRICTED}:admin=sesame"
    server = LocalTriton(triton_repository, models=("add_one_a", "repeat"), extra=(*FAST_START, flag))
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize("metadata", [(), KEY, [("triton-grpc-protocol-admin", "wrong")]], ids=["none", "key", "wrong"])
async def test_a_restricted_rpc_answers_as_triton_with_the_caller_s_key_and_without(
    restricted: LocalTriton, rpc: str, metadata: Any
) -> None:
    request, answer = RPCS[rpc]
    async with (
        transparent_to(restricted.grpc_address) as gateway,
        channel_to(gateway.listen) as through,
        channel_to(restricted.grpc_address) as direct,
    ):
        method = rpc.partition(" ")[0]
        expected = await call(direct, request, method, metadata=metadata)
        got = await call(through, request, method, metadata=metadata)
    assert (got.code, got.text) == (expected.code, expected.text)
    assert bool(answer.FromString(got.body).ListFields()) == bool(answer.FromString(expected.body).ListFields())


async def test_an_index_that_no_endpoint_can_tell_is_an_error(unused_tcp_port: int) -> None:
    async with transparent_to(f"127.0.0.1:{unused_tcp_port}") as gateway, channel_to(gateway.listen) as through:
        got = await call(through, pb.RepositoryIndexRequest(), "RepositoryIndex")
    assert got.code is grpc.StatusCode.UNAVAILABLE
