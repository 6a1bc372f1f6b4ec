"""Conversations that take up places and say nothing: they end, and keep nobody else from speaking."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from patience import wait_until
from test_wrong_models import playing, write_config
from v2_calls import channel_to
from v2_gateways import gateway_of
from voices import SILENCE, config, pieces

from gateway.api import speech
from gateway.app import Gateway
from gateway.config import load
from gateway.v1 import speech_pb2_grpc


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with (
        playing("").serve() as address,
        gateway_of(load(write_config(tmp_path / "gateway.yaml", address), {})) as running,
    ):
        yield running


async def begun(channel: Any) -> Any:
    """A conversation that has sent a window, and stays."""
    call = speech_pb2_grpc.SpeechServiceStub(channel).Converse(timeout=60)
    await call.write(config())
    await call.write(pieces(SILENCE, 1024)[0])
    return call


async def refused(channel: Any) -> tuple[grpc.StatusCode, str]:
    """How one ends that says nothing. Python's client may tell another error if it is still writing."""
    call = speech_pb2_grpc.SpeechServiceStub(channel).Converse(timeout=60)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value.code(), caught.value.details() or ""


async def is_heard(channel: Any) -> bool:
    """Is a second of silence heard to its end?"""
    call = speech_pb2_grpc.SpeechServiceStub(channel).Converse(iter([config(), *pieces(SILENCE)]), timeout=60)
    return [event.WhichOneof("event") async for event in call] == ["ended"]


async def test_one_connection_holds_so_many_places_and_no_more(gateway: Gateway) -> None:
    async with channel_to(gateway.listen) as greedy, channel_to(gateway.listen) as other:
        held = [await begun(greedy) for _ in range(speech._MOST_OF_ONE)]
        code, text = await refused(greedy)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "this connection has 64 conversations" in text
        assert await is_heard(other)
        held[0].cancel()
        sequences = gateway._models.inference.sequences
        await wait_until(lambda: len(sequences) < speech._MOST_OF_ONE)
        assert await is_heard(greedy)


async def test_all_together_hold_so_many_and_whoever_comes_then_is_told(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "_MOST_CONVERSATIONS", 3)
    async with channel_to(gateway.listen) as greedy, channel_to(gateway.listen) as other:
        for _ in range(3):
            await begun(greedy)
        code, text = await refused(other)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "there are 3 conversations" in text


@pytest.mark.parametrize("messages", [0, 1], ids=["before its config", "after it"])
async def test_one_whose_caller_says_nothing_ends(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, messages: int
) -> None:
    monkeypatch.setattr(speech, "_PATIENCE_SECONDS", 0.2)
    async with channel_to(gateway.listen) as channel:
        call = speech_pb2_grpc.SpeechServiceStub(channel).Converse(timeout=60)
        for _ in range(messages):
            await call.write(config())
        with pytest.raises(grpc.aio.AioRpcError, match="no message came for") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
