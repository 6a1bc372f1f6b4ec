"""Who may call what: what is not granted gets no further than the door, and looks like what there is not."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from access_gateways import ACCESS, KEYS, MARK, CountingTriton, closed_gateway, counting, key_of, request
from grpc_health.v1 import health_pb2
from played_triton import played
from traffic import config, write
from traffic import gateway as gateway_of
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from v2_calls import channel_to

from gateway.access.api_keys import hash_of
from gateway.access.rpcs import PATHS
from gateway.app import Gateway
from gateway.compiled import is_compiled
from gateway.telemetry.replay import replay
from gateway.v1 import classification_pb2, prediction_pb2

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
async def upstream() -> AsyncIterator[CountingTriton]:
    async with counting() as triton:
        yield triton


@pytest.fixture
def triton(upstream: CountingTriton) -> CountingTriton:
    upstream.calls.clear()
    upstream.metadata.clear()
    return upstream


@pytest.fixture(scope="module")
async def gateway(upstream: CountingTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    async with closed_gateway(tmp_path_factory.mktemp("access"), upstream) as running:
        yield running


@pytest.fixture(scope="module")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(gateway.listen) as opened:
        yield opened


async def infer(channel: grpc.aio.Channel, message: Any, metadata: Any) -> Any:
    call = channel.unary_unary(INFER, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString)
    return await call(message, metadata=metadata, timeout=10)


async def refusal(channel: grpc.aio.Channel, message: Any, metadata: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await infer(channel, message, metadata)
    return refused.value.code(), refused.value.details() or ""


async def test_a_key_opens_what_its_caller_is_granted_and_goes_no_further(
    channel: grpc.aio.Channel, triton: CountingTriton
) -> None:
    answer = await infer(channel, request("adder"), key_of("user"))
    assert answer.model_name == "adder"
    bearer = (
        MARK,
        ("authorization", f"Bearer {KEYS['user']}"),
    )
    assert (await infer(channel, request("adder"), bearer)).model_name == "adder"
    assert triton.calls == {"ModelInfer": 2}
    for metadata in triton.metadata:
        assert "x-api-key" not in metadata
        assert "authorization" not in metadata


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ((), "say who is calling"),
        ((("x-api-key", "igk_wrong"),), "the API key is not known"),
        ((("x-api-key", ""),), "the API key is not known"),
        ((("authorization", "Basic dXNlcg=="),), "the scheme of 'authorization' is not Bearer"),
        ((("authorization", "Bearer a.b.c"),), "the API key is not known"),
        ((*key_of("user"), *key_of("user")), "several credentials"),
        ((*key_of("user"), ("authorization", "Bearer x")), "several credentials"),
        ((("gateway-caller", "user"),), "say who is calling"),
        ((("x-api-key-bin", b"x"),), "say who is calling"),
    ],
)
async def test_who_is_not_known_is_told_what_would_be_right_and_nothing_is_sent(
    channel: grpc.aio.Channel, triton: CountingTriton, metadata: Any, says: str
) -> None:
    for model in ("adder", "nonexistent"):
        code, text = await refusal(channel, request(model), (MARK, *metadata))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert says in text
        assert model not in text
    assert not triton.calls


async def test_a_forbidden_model_looks_like_one_that_there_is_not(
    channel: grpc.aio.Channel, triton: CountingTriton
) -> None:
    for version in ("", "1", "x"):
        seen = []
        for model in ("secret", "missing", "hidden_one", "add_one", "third", "../secret"):
            message = request(model)
            message.model_version = version
            code, text = await refusal(channel, message, key_of("user"))
            seen.append((code, text.replace(model, "NAME")))
        assert len(set(seen)) == 1, seen
    assert not triton.calls
    assert (await infer(channel, request("secret"), key_of("admin"))).model_name == "secret"
    assert (await infer(channel, request("hidden_one"), key_of("admin"))).model_name == "hidden_one"


async def test_a_pipeline_calls_its_models_as_itself(channel: grpc.aio.Channel, triton: CountingTriton) -> None:
    assert (await infer(channel, request("caption"), key_of("user"))).model_name == "caption"
    assert triton.calls["ModelInfer"] == 1
    code, text = await refusal(channel, request("caption"), key_of("other"))
    assert (code, "not found" in text) == (grpc.StatusCode.NOT_FOUND, True)
    assert triton.calls["ModelInfer"] == 1


async def test_a_forbidden_model_has_no_quota_for_who_may_not_use_it(triton: CountingTriton, tmp_path: Path) -> None:
    """He neither uses it up for those who may use the model, nor learns by it that there is one."""
    quotas = "quotas: {models: {secret: {requests: 0.001, burst: 2000s}, hidden_one: {requests: 0.001}}}"
    server = f"server: {{control: all}}\ntelemetry: {{access_log: {{destination: none}}}}\n{quotas}"
    async with (
        closed_gateway(tmp_path, triton, ACCESS, server) as running,
        channel_to(running.listen) as channel,
    ):
        predict = channel.unary_unary(
            "/gateway.v1.PredictionService/Predict",
            prediction_pb2.PredictRequest.SerializeToString,
            prediction_pb2.PredictResponse.FromString,
        )
        large = [request(model) for model in ("secret", "hidden_one", "missing")]
        for message in large:
            message.raw_input_contents[0] = bytes(100_000)
        for _ in range(3):
            seen = set()
            for model in ("secret", "hidden_one", "missing"):
                code, text = await refusal(channel, request(model), key_of("user"))
                seen.add((code, text.replace(model, "NAME")))
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await predict(prediction_pb2.PredictRequest(model=model), metadata=key_of("user"), timeout=10)
                seen.add((refused.value.code(), (refused.value.details() or "").replace(model, "NAME")))
            for message in large:
                code, text = await refusal(channel, message, key_of("user"))
                seen.add((code, text.replace(message.model_name, "NAME")))
                [answer] = await streamed(channel, [message], key_of("user"))
                seen.add((grpc.StatusCode.NOT_FOUND, answer.error_message.replace(message.model_name, "NAME")))
            assert seen == {(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'NAME' is not found")}
        assert not triton.calls
        for _ in range(2):
            assert (await infer(channel, request("secret"), key_of("other"))).model_name == "secret"
        code, text = await refusal(channel, request("secret"), key_of("other"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "model 'secret' is used up" in text


async def test_a_caller_who_may_load_one_model_changes_no_other_by_it(triton: CountingTriton, tmp_path: Path) -> None:
    """By a config of his own a model would become an ensemble of models that he may not use."""
    loader = "    - {callers: [other], direct: [mine], rpcs: [control]}\n"
    async with (
        closed_gateway(tmp_path, triton, ACCESS + loader, "server: {control: all}") as running,
        channel_to(running.listen) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        load, unload = stub.RepositoryModelLoad, stub.RepositoryModelUnload

        def message(kind: Any, **parameters: Any) -> Any:
            made = kind(model_name="mine")
            for name, value in parameters.items():
                field = {bool: "bool_param", str: "string_param", bytes: "bytes_param"}[type(value)]
                setattr(made.parameters[name], field, value)
            return made

        beyond = [
            (load, message(pb.RepositoryModelLoadRequest, config='{"platform": "ensemble"}')),
            (load, message(pb.RepositoryModelLoadRequest, config="{}", **{"file:1/model.py": b"x"})),
            (load, message(pb.RepositoryModelLoadRequest, tomorrow="s parameter")),
            (unload, message(pb.RepositoryModelUnloadRequest, unload_dependents=True)),
        ]
        for call, asked in beyond:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(asked, metadata=key_of("other"), timeout=10)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "allow: [all]" in (refused.value.details() or "")
        assert not triton.calls["RepositoryModelLoad"]
        assert not triton.calls["RepositoryModelUnload"]
        await load(pb.RepositoryModelLoadRequest(model_name="mine"), metadata=key_of("other"), timeout=10)
        plain = message(pb.RepositoryModelUnloadRequest, unload_dependents=False)  # as tritonclient sends it
        await unload(plain, metadata=key_of("other"), timeout=10)
        for call, asked in beyond:
            await call(asked, metadata=key_of("admin"), timeout=10)
        assert (triton.calls["RepositoryModelLoad"], triton.calls["RepositoryModelUnload"]) == (4, 2)


# The table: every RPC, by everybody, by every way that a path can be written

V2 = [method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
NEVER = {
    "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus", "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus", "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
}  # fmt: skip
BY_PERMISSION = {"RepositoryIndex", "ModelConfig", "ModelStatistics"}
OPEN = {"ServerLive", "ServerReady"}
WAYS = {
    "right": lambda path: path,
    "case": lambda path: path.lower(),
    "case of the service": lambda path: path.replace("inference.", "Inference."),
    "doubled slash": lambda path: "/" + path,
    "doubled slash within": lambda path: path.replace("/Model", "//Model").replace("/Server", "//Server"),
    "slash at the end": lambda path: path + "/",
    "encoded": lambda path: path.replace("Service/", "Service%2F"),
    "encoded letter": lambda path: path.replace("S", "%53"),
    "query": lambda path: path + "?x=1",
    "dots": lambda path: "/x/.." + path,
    "fragment": lambda path: path + "#",
}


def expected(rpc: str, who: str, is_right: bool) -> grpc.StatusCode | None:
    """None: it reaches its handler, whatever that answers."""
    if is_right and rpc in OPEN:
        return None
    if who == "nobody":
        return grpc.StatusCode.UNAUTHENTICATED
    if not is_right:
        return grpc.StatusCode.UNIMPLEMENTED
    if who == "user" and rpc in NEVER | BY_PERMISSION:
        return grpc.StatusCode.PERMISSION_DENIED
    return None


def _stream_ended(address: str, path: str, body: bytes, metadata: Any) -> grpc.StatusCode:
    """By grpcio's other client: that on asyncio loses the status of a stream which ends before it has written."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(path)(iter([body]), metadata=metadata, timeout=10)
        try:
            for _ in call:
                pass
        except grpc.RpcError:
            pass
        found: grpc.StatusCode = call.code()
        return found


async def ended(
    address: str, channel: grpc.aio.Channel, path: str, body: bytes, metadata: Any, is_stream: bool
) -> grpc.StatusCode:
    try:
        if is_stream:
            return await asyncio.to_thread(_stream_ended, address, path, body, metadata)
        await channel.unary_unary(path)(body, metadata=metadata, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def body_for(rpc: str, model: str) -> bytes:
    """A request that names the model, if it can."""
    if "Infer" in rpc:
        return bytes(request(model).SerializeToString())
    message = getattr(pb, f"{rpc}Request")()
    for field in ("name", "model_name"):
        if field in message.DESCRIPTOR.fields_by_name and rpc.startswith(("Model", "Repository", "Trace")):
            setattr(message, field, model)
    return bytes(message.SerializeToString())


def test_the_table_is_of_all_rpcs_that_triton_has() -> None:
    assert len(V2) == 20
    assert set(V2) > NEVER | BY_PERMISSION | OPEN


@pytest.mark.parametrize("who", ["nobody", "user", "admin"])
@pytest.mark.parametrize("rpc", V2)
async def test_each_rpc_is_for_whom_the_table_says_however_its_path_is_written(
    gateway: Gateway, channel: grpc.aio.Channel, triton: CountingTriton, rpc: str, who: str
) -> None:
    for name, way in WAYS.items():
        path = f"/inference.GRPCInferenceService/{rpc}"
        written = way(path)
        for encoding in ("", "gzip", "identity", "nonsense"):
            if encoding and name != "right":
                continue
            metadata = (*key_of(who), *((("grpc-encoding", encoding),) if encoding == "nonsense" else ()))
            body = body_for(rpc, "hidden_one" if rpc in NEVER else "adder")
            wanted = expected(rpc, who, written == path)
            before = triton.calls.total()
            code = await ended(gateway.listen, channel, written, body, metadata, rpc == "ModelStreamInfer")
            if wanted is not None:
                assert (name, code) == (name, wanted)
                assert triton.calls.total() == before, "nothing may reach the upstream"
            else:
                assert code not in (
                    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED
                ), name  # fmt: skip


OTHERS = [
    "/gateway.v1.PredictionService/Predict",
    "/gateway.v1.PredictionService/StreamPredict",
    "/gateway.v1.ClassificationService/Classify",
    "/gateway.v1.ClassificationService/StreamClassify",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/no.such.Service/Method",
    "/",
    "/metrics",
]


@pytest.mark.parametrize("path", OTHERS)
async def test_other_services_are_closed_to_strangers_too(
    gateway: Gateway, channel: grpc.aio.Channel, triton: CountingTriton, path: str
) -> None:
    assert await ended(gateway.listen, channel, path, b"", (), "Stream" in path) is grpc.StatusCode.UNAUTHENTICATED
    if "Reflection" in path:
        assert (
            await ended(gateway.listen, channel, path, b"", key_of("user"), True) is grpc.StatusCode.PERMISSION_DENIED
        )
    assert not triton.calls


def test_every_method_that_is_served_has_a_place_in_the_table(gateway: Gateway) -> None:
    server = gateway._server._server
    paths = {path.decode() for path in (*server._forward, *server._registered)}
    for generic in server._generic:
        handlers = getattr(generic, "_method_handlers", {})
        paths |= set(handlers)
    assert len(paths) > 20
    unplaced = {path for path in paths if path.encode() not in PATHS}
    assert not unplaced


# Streams, typed calls, lists and health


async def streamed(channel: grpc.aio.Channel, messages: list[Any], metadata: Any) -> list[Any]:
    call = channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        pb.ModelInferRequest.SerializeToString,
        pb.ModelStreamInferResponse.FromString,
    )(messages, metadata=metadata, timeout=10)
    return [answer async for answer in call]


async def test_each_message_of_a_stream_is_asked_about(channel: grpc.aio.Channel, triton: CountingTriton) -> None:
    models = ("adder", "secret", "missing", "hidden_one", "caption", "adder")
    answers = await streamed(channel, [request(model, id=model) for model in models], key_of("user"))
    said = [answer.error_message.replace(model, "NAME") for model, answer in zip(models, answers, strict=True)]
    unknown = "Request for unknown model: 'NAME' is not found"
    assert said == ["", unknown, unknown, unknown, "", ""]
    assert triton.calls == {"ModelStreamInfer": 2, "ModelInfer": 1}


async def test_typed_calls_are_asked_about_too(channel: grpc.aio.Channel, triton: CountingTriton) -> None:
    predict = channel.unary_unary(
        "/gateway.v1.PredictionService/Predict",
        prediction_pb2.PredictRequest.SerializeToString,
        prediction_pb2.PredictResponse.FromString,
    )
    classify = channel.unary_unary(
        "/gateway.v1.ClassificationService/Classify",
        classification_pb2.ClassifyRequest.SerializeToString,
        classification_pb2.ClassifyResponse.FromString,
    )
    tensor = prediction_pb2.Tensor(datatype="UINT8", shape=[1, 4], raw=b"\0\1\2\3")
    answer = await predict(
        prediction_pb2.PredictRequest(model="adder", inputs={"IN": tensor}), metadata=key_of("user"), timeout=10
    )
    assert answer.served.model == "adder"
    seen = set()
    for call, kind in ((predict, prediction_pb2.PredictRequest), (classify, classification_pb2.ClassifyRequest)):
        for model in ("secret", "missing", "hidden_one"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(kind(model=model), metadata=key_of("user"), timeout=10)
            seen.add((refused.value.code(), (refused.value.details() or "").replace(model, "NAME")))
    assert seen == {(grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'NAME' is not found")}
    with pytest.raises(grpc.aio.AioRpcError, match="pipelines: none is configured"):
        await classify(classification_pb2.ClassifyRequest(), metadata=key_of("other"), timeout=10)
    assert triton.calls == {"ModelInfer": 1}


async def ask(channel: grpc.aio.Channel, rpc: str, message: Any, who: str) -> Any:
    path = f"/inference.GRPCInferenceService/{rpc}"
    answer = getattr(pb, f"{rpc}Response")
    call = channel.unary_unary(path, type(message).SerializeToString, answer.FromString)
    return await call(message, metadata=key_of(who), timeout=10)


async def test_questions_about_a_forbidden_model_are_answered_as_about_none(
    channel: grpc.aio.Channel, triton: CountingTriton
) -> None:
    assert (await ask(channel, "ModelReady", pb.ModelReadyRequest(name="adder"), "user")).ready
    triton.calls.clear()
    for name in ("secret", "missing", "add_one"):
        assert not (await ask(channel, "ModelReady", pb.ModelReadyRequest(name=name), "user")).ready
        with pytest.raises(grpc.aio.AioRpcError, match=f"unknown model: '{name}' is not found"):
            await ask(channel, "ModelMetadata", pb.ModelMetadataRequest(name=name), "user")
    assert not triton.calls


async def names_listed(channel: grpc.aio.Channel, who: str) -> list[str]:
    index = await ask(channel, "RepositoryIndex", pb.RepositoryIndexRequest(), who)
    return [entry.name for entry in index.models]


async def test_lists_have_what_the_caller_may_see_alone(upstream: CountingTriton, tmp_path: Path) -> None:
    lists = ACCESS + "    - {callers: [user, other], rpcs: [details], models: [adder], direct: [thi*]}\n"
    async with closed_gateway(tmp_path, upstream, lists) as running, channel_to(running.listen) as channel:
        assert await names_listed(channel, "user") == ["adder", "third"]
        assert await names_listed(channel, "other") == ["adder", "third"]  # `secret` is his to call, and not to list
        everything = ["adder", "secret", "caption", "add_one", "hidden_one", "third"]
        assert await names_listed(channel, "admin") == everything


async def health(channel: grpc.aio.Channel, name: str, who: str) -> str:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    try:
        answer = await check(health_pb2.HealthCheckRequest(service=name), metadata=key_of(who), timeout=10)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


@pytest.mark.parametrize(
    ("name", "who", "status"),
    [
        ("", "nobody", "SERVING"),
        ("inference.GRPCInferenceService", "nobody", "SERVING"),
        ("adder", "nobody", "NOT_FOUND"),
        ("adder", "user", "SERVING"),
        ("secret", "user", "NOT_FOUND"),
        ("secret", "other", "SERVING"),
    ],
)
async def test_health_of_the_whole_is_open_and_of_a_model_for_whom_it_is(
    channel: grpc.aio.Channel, name: str, who: str, status: str
) -> None:
    assert await health(channel, name, who) == status


# What is in requests


def with_shared_memory(model: str, *, in_output: bool) -> Any:
    message = request(model)
    if in_output:
        message.outputs.add(name="OUT").parameters["shared_memory_region"].string_param = "r"
    else:
        message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    return message


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (request("adder", priority=1), "priority"),
        (request("adder", timeout=1), "timeout"),
        (request("adder", sequence_id=1, sequence_start=True), "sequences"),
        (request("adder", sequence_end=True), "sequences"),
        (request("adder", triton_final_response=True), "reserved"),
        (request("adder", headers="x"), "reserved"),
        (request("adder", shared_memory_region="x"), "shared_memory"),
        (with_shared_memory("adder", in_output=False), "shared_memory"),
        (with_shared_memory("adder", in_output=True), "shared_memory"),
    ],
)
async def test_what_is_not_granted_in_a_request_is_refused_before_it_is_forwarded(
    channel: grpc.aio.Channel, triton: CountingTriton, message: Any, word: str
) -> None:
    for _ in range(2):  # the second time its head is known
        code, text = await refusal(channel, message, key_of("user"))
        assert (code, f"allow: [{word}]" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    [answer] = await streamed(channel, [message], key_of("user"))
    assert f"allow: [{word}]" in answer.error_message
    assert not triton.calls
    await infer(channel, message, key_of("admin"))
    assert triton.calls


async def test_contents_that_look_like_shared_memory_are_contents(
    channel: grpc.aio.Channel, triton: CountingTriton
) -> None:
    message = request("adder", triton_enable_empty_final_response=True, cohort="a")
    message.raw_input_contents[0] = b"shared_memory_region"
    await infer(channel, message, key_of("user"))
    del message.raw_input_contents[:]
    message.inputs[0].contents.bytes_contents.append(b"\x22\x16\x0a\x14shared_memory_region")
    await infer(channel, message, key_of("user"))
    assert triton.calls == {"ModelInfer": 2}


async def test_nothing_hides_behind_the_front_of_a_large_request(
    channel: grpc.aio.Channel, triton: CountingTriton
) -> None:
    message = request("adder")
    message.raw_input_contents[0] = bytes(1 << 20)
    parameters = pb.ModelInferRequest()
    parameters.parameters["priority"].int64_param = 1
    hidden = message.SerializeToString() + parameters.SerializeToString()
    infer_bytes = channel.unary_unary(INFER)
    with pytest.raises(grpc.aio.AioRpcError, match=r"allow: \[priority\]"):
        await infer_bytes(hidden, metadata=key_of("user"), timeout=10)
    assert not triton.calls
    await infer(channel, message, key_of("user"))
    await infer(channel, message, key_of("admin"))
    assert triton.calls == {"ModelInfer": 2}


async def test_a_caller_s_messages_are_as_large_as_he_is_granted(upstream: CountingTriton, tmp_path: Path) -> None:
    small = ACCESS.replace("models: [adder, caption]}", "models: [adder, caption], max_message_bytes: 64KiB}")
    message = request("adder")
    message.raw_input_contents[0] = bytes(70_000)
    async with closed_gateway(tmp_path, upstream, small) as running, channel_to(running.listen) as channel:
        assert (await refusal(channel, message, key_of("user")))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        await infer(channel, message, key_of("admin"))


# Changes


async def test_a_key_that_is_taken_out_stops_working_on_what_is_open(upstream: CountingTriton, tmp_path: Path) -> None:
    async with closed_gateway(tmp_path, upstream) as running, channel_to(running.listen) as channel:
        call = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            pb.ModelInferRequest.SerializeToString,
            pb.ModelStreamInferResponse.FromString,
        )(metadata=key_of("user"), timeout=30)
        await call.write(request("adder"))
        assert not (await call.read()).error_message
        file = tmp_path / "gateway.yaml"
        file.write_text(file.read_text().replace(hash_of(KEYS["user"]).hex(), "0" * 64))
        await running._watcher.look(poked=True)
        upstream.calls.clear()
        await call.write(request("adder"))
        assert "the API key is not known" in (await call.read()).error_message
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
        assert (await refusal(channel, request("adder"), key_of("user")))[0] is grpc.StatusCode.UNAUTHENTICATED
        assert not upstream.calls
        file.write_text(file.read_text().partition("access:")[0])
        await running._watcher.look(poked=True)
        await infer(channel, request("adder"), ())


# Names


async def test_the_caller_s_name_is_a_fact_for_rules_and_goes_upstream_if_that_is_configured(
    upstream: CountingTriton, tmp_path: Path
) -> None:
    upstream.metadata.clear()
    told = ACCESS.replace("access:", "access:\n  tell_upstream: x-caller")
    async with closed_gateway(tmp_path, upstream, told) as running, channel_to(running.listen) as channel:
        forged = (*key_of("user"), ("x-caller", "admin"), ("gateway-caller", "admin"))
        await infer(channel, request("adder"), forged)
        [metadata] = upstream.metadata
        assert metadata["x-caller"] == "user"
        known = [decision.facts.metadata for decision in running._models.inference._decisions.values()]
        assert [facts["gateway-caller"] for facts in known] == ["user"]


async def test_a_name_that_goes_upstream_keeps_callers_apart_who_share_answers(tmp_path: Path) -> None:
    """Whatever its key is, also one that differs from call to call where others set it."""
    told: list[Any] = []

    async def note(asked: Any, context: Any) -> None:
        told.append(dict(context.invocation_metadata()).get("x-forwarded-user"))

    keys = [{"caller": name, "sha256": hash_of(key).hex()} for name, key in KEYS.items()]
    access = {"api_keys": keys, "grants": [{"everybody": True, "models": ["adder"]}]}
    access["tell_upstream"] = "x-forwarded-user"
    async with played(note) as triton:
        models = {"adder": {"variants": {"only": {"upstream": "main", "model": "add_one"}}, "share": {}}}
        file = write(tmp_path / "gateway.yaml", config({"main": triton.address}, models, access=access))
        async with gateway_of(file) as running, channel_to(running.listen) as channel:
            for name in ("user", "other"):
                await infer(channel, request("adder"), (*key_of(name), ("x-forwarded-user", "admin")))
    assert told == ["user", "other"]


async def test_refused_calls_are_counted_by_reason(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    async def refused(reason: str) -> float:
        body, _ = await asyncio.to_thread(gateway._telemetry.scrape.render, "")
        [line] = [each for each in body.decode().splitlines() if f'access_refused_total{{reason="{reason}"}}' in each]
        return float(line.rpartition(" ")[2])

    before = await refused("none"), await refused("permission_denied")
    await refusal(channel, request("adder"), ())
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(channel, "ModelConfig", pb.ModelConfigRequest(name="adder"), "user")
    assert (await refused("none"), await refused("permission_denied")) == (before[0] + 1, before[1] + 1)


ROOMS = ("access", "api", "forwarding", "routing", "v2")


async def test_a_forbidden_model_costs_the_same_steps_as_an_unknown_one(channel: grpc.aio.Channel) -> None:
    """Counted in calls of functions, of which a clock knows nothing. Native functions can't be counted so."""
    if is_compiled():
        return
    counted = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        room = frame.f_code.co_filename.partition("/gateway/")[2].partition("/")[0]
        counted += event == "call" and room in ROOMS

    steps: dict[str, list[int]] = {}
    for _ in range(4):  # the first time each head is read; other tasks of the gateway may come in between
        for model in ("unheard-of", "secret", "hidden_one"):
            counted = 0
            sys.setprofile(count)
            try:
                await refusal(channel, request(model), key_of("user"))
            finally:
                sys.setprofile(None)
            steps.setdefault(model, []).append(counted)
    assert len({min(each) for each in steps.values()}) == 1, steps
    assert min(steps["secret"]) > 10


RULES = """
  by-caller:
    variants: {a: {upstream: main, model: add_one}, b: {upstream: main, model: add_two}}
    split: {a: 1, b: 1}
    sticky: {metadata: gateway-caller}
    rules: [{name: testers, match: {metadata: {gateway-caller: [user]}}, variant: b}]
"""


async def test_a_caller_is_a_condition_of_rules_and_a_sticky_key_that_nobody_can_forge(
    upstream: CountingTriton, tmp_path: Path
) -> None:
    access = RULES + ACCESS.replace("models: [adder, caption]", "models: [by-caller]")
    async with closed_gateway(tmp_path, upstream, access) as running, channel_to(running.listen) as channel:
        found = []
        for who in ("user", "admin"):
            call = channel.unary_unary(INFER, pb.ModelInferRequest.SerializeToString)(
                request("by-caller"), metadata=(*key_of(who), ("gateway-caller", "user")), timeout=10
            )
            await call
            found.append(dict(await call.trailing_metadata())["gateway-variant"])
        assert found[0] == "b"
        reasons = {decision.plan.reason for decision in running._models.inference._decisions.values() if decision.plan}
        assert reasons == {"rule:testers", "sticky"}


async def test_without_access_nobody_is_a_caller_whatever_clients_say(upstream: CountingTriton, tmp_path: Path) -> None:
    async with closed_gateway(tmp_path, upstream, RULES) as running, channel_to(running.listen) as channel:
        await infer(channel, request("by-caller"), (MARK, ("gateway-caller", "user")))
        [decision] = running._models.inference._decisions.values()
        assert "gateway-caller" not in decision.facts.metadata


async def test_items_of_a_typed_stream_are_asked_about_anew(upstream: CountingTriton, tmp_path: Path) -> None:
    tensor = prediction_pb2.Tensor(datatype="UINT8", shape=[1, 4], raw=b"\0\1\2\3")
    item = prediction_pb2.StreamPredictRequest(
        id="1", request=prediction_pb2.PredictRequest(model="adder", inputs={"IN": tensor})
    )
    async with closed_gateway(tmp_path, upstream) as running, channel_to(running.listen) as channel:
        call = channel.stream_stream(
            "/gateway.v1.PredictionService/StreamPredict",
            prediction_pb2.StreamPredictRequest.SerializeToString,
            prediction_pb2.StreamPredictResponse.FromString,
        )(metadata=key_of("user"), timeout=30)
        await call.write(item)
        assert (await call.read()).response.served.model == "adder"
        file = tmp_path / "gateway.yaml"
        file.write_text(file.read_text().replace("models: [adder, caption]", "models: [caption]"))
        await running._watcher.look(poked=True)
        await call.write(item)
        assert (await call.read()).error.code == grpc.StatusCode.NOT_FOUND.value[0]
        file.write_text(file.read_text().replace(hash_of(KEYS["user"]).hex(), "0" * 64))
        await running._watcher.look(poked=True)
        await call.write(item)
        assert (await call.read()).error.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
        call.cancel()


async def test_no_credential_is_in_anything_that_is_written(
    upstream: CountingTriton, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = "telemetry: {access_log: {destination: stdout, sample: 1}}"
    kept = f"capture: [{{model: adder, directory: '{tmp_path}/kept', share: 1}}]"
    captured = logged.replace("sample: 1}", f"sample: 1}}, {kept}")
    file = tmp_path / "gateway.yaml"
    secrets = [*KEYS.values(), *(hash_of(key).hex() for key in KEYS.values()), "igk_mistaken"]
    with caplog.at_level("DEBUG"):
        async with closed_gateway(tmp_path, upstream, ACCESS, captured) as running:
            async with channel_to(running.listen) as channel:
                await infer(channel, request("adder"), key_of("user"))
                for metadata in ((("x-api-key", "igk_mistaken"),), (("authorization", "Bearer igk_mistaken"),)):
                    await refusal(channel, request("adder"), metadata)
                await refusal(channel, request("secret"), key_of("user"))
                wrong = file.read_text().replace('caller: other, sha256: "', 'caller: other, sha256: "igk_mistaken')
                file.write_text(wrong)
                await running._watcher.look(poked=True)
            written = ""
            async with aiohttp.ClientSession() as session:
                for path in ("metrics", "config", "state"):
                    async with session.get(f"http://{running.admin_address}/{path}") as answer:
                        written += await answer.text()
            assert "access.api_keys[2].sha256" in written, "the finding is there"
    written += caplog.text + "".join(capsys.readouterr())
    written += "".join(each.read_text() for each in (tmp_path / "kept").rglob("*") if each.is_file())
    assert '"caller": "user"' in written
    assert '"model_name"' in written or "adder" in written
    assert not [secret for secret in secrets if secret in written]


async def test_captured_requests_are_replayed_with_a_key_and_counted_as_such_for_whom_all_is_allowed(
    upstream: CountingTriton, tmp_path: Path
) -> None:
    file = tmp_path / "kept.jsonl"
    body = base64.b64encode(request("adder").SerializeToString()).decode()
    file.write_text(json.dumps({"model": "adder", "request": body, "metadata": {}}) + "\n")
    async with closed_gateway(tmp_path, upstream) as running:
        found = []
        for key in ("", KEYS["user"], KEYS["admin"]):
            result = await replay([str(file)], running.listen, key=key)
            found.append(dict(result.codes))
        assert found == [{"UNAUTHENTICATED": 1}, {"OK": 1}, {"OK": 1}]
        facts = [decision.facts.metadata for decision in running._models.inference._decisions.values()]
        assert [("gateway-replayed" in each, each["gateway-caller"]) for each in facts] == [
            (False, "user"), (True, "admin"),
        ]  # fmt: skip


async def test_grpc_on_the_admin_port_reaches_nothing(gateway: Gateway, triton: CountingTriton) -> None:
    async with channel_to(gateway.admin_address) as channel:
        call = channel.unary_unary(INFER, pb.ModelInferRequest.SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request("adder"), metadata=key_of("admin"), timeout=1)
        assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert not triton.calls


async def test_strangers_fill_no_log(
    upstream: CountingTriton, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = "telemetry: {access_log: {destination: stdout, sample: 1}}"
    async with (
        closed_gateway(tmp_path, upstream, ACCESS, logged) as running,
        channel_to(running.listen) as channel,
    ):
        for _ in range(50):
            await refusal(channel, request("adder"), ())
    assert sum("refused" in record.getMessage() for record in caplog.records) == 1
    assert not [line for line in capsys.readouterr().out.splitlines() if "UNAUTHENTICATED" in line]
