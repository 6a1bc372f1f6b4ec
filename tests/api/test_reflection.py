"""Tools learn every service and message from a running gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from gateways import running
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICES = {
    "inference.GRPCInferenceService": 20,
    "gateway.v1.ClassificationService": 2,
    "gateway.v1.OutcomeService": 2,
    "gateway.v1.PredictionService": 2,
    "gateway.v1.RankingService": 1,
    "gateway.v1.ReadingService": 1,
    "gateway.v1.SpeechService": 2,
    "gateway.v1.TextService": 2,
    "grpc.health.v1.Health": 2,
    "grpc.reflection.v1alpha.ServerReflection": 1,
}
"""Full names, and how many methods each has."""

T = TypeVar("T")


async def with_channel(address: str, ask: Callable[[Any], T]) -> T:
    """reflection's own client is a blocking one."""

    def call() -> T:
        with grpc.insecure_channel(address) as channel:
            return ask(channel)

    return await asyncio.to_thread(call)


async def test_reflection_lists_every_service_with_its_methods(tmp_path: Path) -> None:
    def ask(channel: Any) -> dict[str, int]:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        return {name: len(pool.FindServiceByName(name).methods) for name in database.get_services()}

    async with running(tmp_path, "server: {reflection: true}") as gateway:
        assert await with_channel(gateway.listen, ask) == SERVICES


async def test_a_tool_can_make_a_call_from_reflection_alone(tmp_path: Path) -> None:
    def ask(channel: Any) -> Any:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("gateway.v1.ClassificationService").FindMethodByName("Classify")
        call = channel.unary_unary(
            "/gateway.v1.ClassificationService/Classify",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(GetMessageClass(method.input_type)(model="cats", text="?"), timeout=60)
        return caught.value

    async with running(tmp_path, "server: {reflection: true}") as gateway:
        error = await with_channel(gateway.listen, ask)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "Request for unknown model: 'cats' is not found"


async def test_reflection_is_off_by_default(tmp_path: Path) -> None:
    def ask(channel: Any) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        return caught.value.code()

    async with running(tmp_path, "") as gateway:
        assert await with_channel(gateway.listen, ask) is grpc.StatusCode.UNIMPLEMENTED
