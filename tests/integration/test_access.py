"""Who may call what: what is not granted gets no further than the door, and looks like what there is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from access_gateways import CountingTriton, closed_gateway, counting, key_of, request
from tritonclient.grpc import service_pb2 as pb
from v2_calls import channel_to

from gateway.app import Gateway

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
    bearer = (("authorization", f"Bearer {key_of('user')[0][1]}"),)
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
        code, text = await refusal(channel, request(model), metadata)
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
