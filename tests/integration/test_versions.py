"""Versions of public models: pinned ones, spellings of them, and who is counted and listed for which."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from patience import ask_until
from triton_fixture import FAST_START, for_the_whole_run
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, call, channel_to, infer, stream
from v2_gateways import Script, gateway_of

from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams:
  one: {{endpoints: ["{one}"]}}
  both: {{endpoints: ["{one}", "{other}"]}}
  far: {{endpoints: ["{other}"]}}
models:
  pinned: {{variants: {{v1: {{upstream: one, model: counted, version: 1}}, v2: {{upstream: one, model: counted, version: 2}}}}}}
  first: {{variants: {{v1: {{upstream: one, model: counted, version: 1}}}}}}
  mixed: {{variants: {{now: {{upstream: one, model: counted}}, old: {{upstream: one, model: counted, version: 1}}}}}}
  pools: {{variants: {{near: {{upstream: one, model: counted}}, wide: {{upstream: both, model: counted}}}}}}
  far: {{variants: {{only: {{upstream: far, model: counted}}}}}}
  piped:
    pipeline:
      inputs: [{{name: IN, datatype: INT32, shape: [1]}}]
      outputs: [{{name: OUT, datatype: INT32, shape: [1]}}]
      steps: [{{call: far, inputs: {{IN: IN}}, outputs: {{OUT: OUT}}}}]
"""  # noqa: E501

QUESTIONS = {
    "ModelReady": pb.ModelReadyRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
    "ModelStatistics": pb.ModelStatisticsRequest,
}


@pytest.fixture(scope="module")
async def near(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """`counted` has two versions, and both are loaded."""
    async with for_the_whole_run(LocalTriton(triton_repository, models=["counted"], extra=FAST_START)) as server:
        yield server


@pytest.fixture(scope="module")
async def far(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    async with for_the_whole_run(LocalTriton(triton_repository, models=["counted"], extra=FAST_START)) as server:
        yield server


@pytest.fixture(scope="module")
async def channel(
    near: LocalTriton, far: LocalTriton, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[grpc.aio.Channel]:
    file = tmp_path_factory.mktemp("versions") / "gateway.yaml"
    file.write_text(CONFIG.format(one=near.grpc_address, other=far.grpc_address))
    async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as made:
        yield made


@pytest.fixture(scope="module")
async def direct(near: LocalTriton) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(near.grpc_address) as made:
        yield made


@pytest.fixture(scope="module")
async def afar(far: LocalTriton) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(far.grpc_address) as made:
        yield made


async def counts(channel: grpc.aio.Channel, name: str, version: str = "") -> dict[str, int]:
    """Inferences by version."""
    request = pb.ModelStatisticsRequest(name=name, version=version)
    outcome = await call(channel, request, "ModelStatistics")
    assert outcome.code is grpc.StatusCode.OK, outcome
    return {e.version: e.inference_count for e in pb.ModelStatisticsResponse.FromString(outcome.body).model_stats}


async def sum_of(*channels: grpc.aio.Channel) -> int:
    return sum([sum((await counts(channel, "counted")).values()) for channel in channels])


async def counts_of_all(channel: grpc.aio.Channel) -> dict[tuple[str, str], int]:
    outcome = await call(channel, pb.ModelStatisticsRequest(), "ModelStatistics")
    entries = pb.ModelStatisticsResponse.FromString(outcome.body).model_stats
    assert len({(entry.name, entry.version) for entry in entries}) == len(entries)
    return {(entry.name, entry.version): entry.inference_count for entry in entries}


async def test_statistics_count_each_version_on_each_server_once(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel, afar: grpc.aio.Channel
) -> None:
    before = await sum_of(direct, afar)
    for name, version in (("pinned", "1"), ("pinned", "2"), ("mixed", ""), ("far", "1"), ("far", "")):
        called = await call(channel, infer(name, [[1]], "INT32", version=version))
        assert called.code is grpc.StatusCode.OK, called
    # Triton counts after it has answered.
    await ask_until(lambda: sum_of(direct, afar), lambda counted: counted >= before + 5)
    here, there = await counts(direct, "counted"), await counts(afar, "counted")
    assert min(*here.values(), *there.values()) > 0
    both = {version: here[version] + there[version] for version in here}
    expected = {"pinned": here, "mixed": here, "first": {"1": here["1"]}, "pools": both, "far": there, "counted": both}
    of_all = await counts_of_all(channel)
    for name, wanted in expected.items():
        assert await counts(channel, name) == wanted, name
        assert await counts(channel, name, "1") == {"1": wanted["1"]}, name
        assert {version: count for (of, version), count in of_all.items() if of == name} == wanted
    assert ("piped", "1") in of_all


def under(outcome: Outcome, name: str) -> tuple[grpc.StatusCode, str]:
    return outcome.code, outcome.text.replace(f"'{name}'", "'counted'")


async def ask(channel: grpc.aio.Channel, method: str, name: str, version: str) -> Outcome:
    return await call(channel, QUESTIONS[method](name=name, version=version), method)


SPELLINGS = ["1", "2", "01", " 1", "+2", "1x", "9", "09", "0", "abc", "-1", " ", "99999999999999999999"]


@pytest.mark.parametrize("version", SPELLINGS)
@pytest.mark.parametrize("name", ["pinned", "mixed"])
async def test_a_version_is_spelled_as_at_triton(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel, name: str, version: str
) -> None:
    expected = await call(direct, infer("counted", [[1]], "INT32", version=version))
    got = await call(channel, infer(name, [[1]], "INT32", version=version))
    assert under(got, name) == under(expected, "")
    assert got.response.model_version == expected.response.model_version
    for method in QUESTIONS:
        answered, wanted = await ask(channel, method, name, version), await ask(direct, method, "counted", version)
        assert under(answered, name) == under(wanted, ""), method
        if method == "ModelReady":
            assert answered.body == wanted.body


@pytest.mark.parametrize("version", ["", "1", "abc", "-1"])
@pytest.mark.parametrize("name", ["", "nobody"])
async def test_an_unknown_name_is_refused_in_tritons_words(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel, name: str, version: str
) -> None:
    expected = await call(direct, infer(name, [[1]], "INT32", version=version))
    got = await call(channel, infer(name, [[1]], "INT32", version=version))
    assert (got.code, got.text) == (expected.code, expected.text)
    for method in QUESTIONS:
        answered, wanted = await ask(channel, method, name, version), await ask(direct, method, name, version)
        assert (answered.code, answered.text) == (wanted.code, wanted.text), method
        if method == "ModelReady":
            assert answered.body == wanted.body


@pytest.mark.parametrize(
    ("version", "code"),
    [("01", "OK"), ("2", "NOT_FOUND"), ("abc", "INVALID_ARGUMENT"), ("-1", "INVALID_ARGUMENT")],
)
async def test_a_pipelines_version_is_spelled_likewise(channel: grpc.aio.Channel, version: str, code: str) -> None:
    got = await call(channel, infer("piped", [[1]], "INT32", version=version))
    assert got.code.name == code
    for method in ("ModelMetadata", "ModelConfig"):
        assert (await ask(channel, method, "piped", version)).code.name == code
    of_statistics = "INVALID_ARGUMENT" if code == "NOT_FOUND" else code
    assert (await ask(channel, "ModelStatistics", "piped", version)).code.name == of_statistics


async def test_a_stream_goes_on_after_what_is_no_version(channel: grpc.aio.Channel) -> None:
    streaming = stream(channel)
    for version in ("abc", "01"):
        await streaming.write(infer("first", [[1]], "INT32", version=version))
    await streaming.done_writing()
    refused, answered = [answer async for answer in streaming]
    assert "'abc' (details: stol), version should be an integral value > 0" in refused.error_message
    assert answered.infer_response.model_version == "1"


def lists(**states: str) -> Script:
    """An endpoint whose repository has these versions of `net`: v1="READY", …"""

    async def index(body: bytes, context: Any) -> bytes:
        entry = pb.RepositoryIndexResponse.ModelIndex
        models = [entry(name="net", version=version[1:], state=state) for version, state in states.items()]
        return bytes(pb.RepositoryIndexResponse(models=models).SerializeToString())

    return Script(others={"RepositoryIndex": index})


async def test_the_index_lists_what_the_upstreams_of_a_name_have(tmp_path: Path) -> None:
    async with lists(v1="READY", v2="UNAVAILABLE").serve() as near, lists(v2="READY", v3="READY").serve() as far:
        file = tmp_path / "gateway.yaml"
        file.write_text(f"""
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{near: {{endpoints: ["{near}"]}}, far: {{endpoints: ["{far}"]}}}}
models:
  one: {{variants: {{only: {{upstream: near, model: net}}}}}}
  other: {{variants: {{only: {{upstream: far, model: other}}}}}}
""")
        async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
            outcome = await call(channel, pb.RepositoryIndexRequest(), "RepositoryIndex")
    models = pb.RepositoryIndexResponse.FromString(outcome.body).models
    assert [(model.name, model.version, model.state) for model in models] == [
        ("one", "1", "READY"),
        ("net", "1", "READY"),
        ("net", "2", "UNAVAILABLE"),
    ]
