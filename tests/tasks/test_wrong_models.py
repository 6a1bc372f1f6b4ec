"""Models that answer what their task has no use for: the caller is told, and gets no answer that is silently wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from tritonclient.grpc import service_pb2 as pb
from v2_calls import channel_to
from v2_gateways import Script, gateway_of
from voices import SILENCE, config, pieces

from gateway.config import load
from gateway.v1 import ranking_pb2, ranking_pb2_grpc, speech_pb2, speech_pb2_grpc, text_pb2, text_pb2_grpc

MODELS = ("speech-detector", "voice-commands", "speaker", "live", "ranker")

RANKING = """
pipeline:
  inputs: [{name: history, datatype: INT32, shape: [-1]}, {name: candidates, datatype: INT32, shape: [-1]}]
  outputs: [{name: items, datatype: INT32, shape: [-1]}, {name: best, datatype: FP32, shape: [-1]}]
  steps: [{call: ranker, outputs: [items, best]}]
"""

Answer = dict[str, tuple[str, Any]]
"""Datatype and array of each output."""


def answer_of(outputs: Answer) -> Any:
    answer = pb.ModelInferResponse(model_name="m", model_version="1")
    for name, (datatype, array) in outputs.items():
        answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
        answer.raw_output_contents.append(array.tobytes())
    return answer


def playing(model: str, *answers: Answer) -> Script:
    """A Triton whose `model` answers so, in parts if it is decoupled, and whose others answer as they should."""
    heard = {"speech": ("FP32", np.full((1, 1), 0.1, np.float32))}

    async def infer(body: bytes, context: Any) -> bytes:
        request = pb.ModelInferRequest.FromString(body)
        return bytes(answer_of(answers[0] if request.model_name == model else heard).SerializeToString())

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async for _ in requests:
            for outputs in answers:
                await context.write(pb.ModelStreamInferResponse(infer_response=answer_of(outputs)).SerializeToString())
            last = pb.ModelInferResponse(model_name=model, model_version="1")
            last.parameters["triton_final_response"].bool_param = True
            await context.write(pb.ModelStreamInferResponse(infer_response=last).SerializeToString())

    return Script(infer=infer, stream=stream)


def write_config(file: Path, *tritons: str) -> Path:
    models = {name: {"variants": {"only": {"upstream": "local", "model": name}}} for name in MODELS}
    settings = {
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        "upstreams": {"local": {"endpoints": list(tritons)}},
        "models": models | {"ranking": yaml.safe_load(RANKING)},
        "telemetry": {"access_log": {"destination": "none"}},
    }
    file.write_text(yaml.safe_dump(settings))
    return file


async def converse(channel: Any) -> list[Any]:
    call = speech_pb2_grpc.SpeechServiceStub(channel).Converse(timeout=60)
    for message in [config(), *pieces(SILENCE, 1_000_000)]:  # nothing is written once the error may have come
        await call.write(message)
    return [await call.read()]


async def speak(channel: Any) -> list[Any]:
    return [part async for part in speech_pb2_grpc.SpeechServiceStub(channel).Speak(speech_pb2.SpeakRequest(text="Hi"))]


async def translate(channel: Any) -> list[Any]:
    request = text_pb2.TranslateRequest(model="live", text="Hi")
    return [part async for part in text_pb2_grpc.TextServiceStub(channel).TranslateStream(request)]


async def rank(channel: Any) -> Any:
    request = ranking_pb2.RankRequest(model="ranking", history=[1], candidates=[2, 3])
    return await ranking_pb2_grpc.RankingServiceStub(channel).Rank(request)


UNORDERED = {"items": ("INT32", np.array([[2, 3]], np.int32)), "best": ("FP32", np.array([[np.nan, 0.5]], np.float32))}
NAN = ("FP32", np.full((1, 1), np.nan, np.float32))
PERCENT = ("FP32", np.full((1, 1), 97, np.float32))
FLOATS = ("FP32", np.full(9, 0.5, np.float32))

WRONG: dict[str, tuple[str, tuple[Answer, ...], Callable[[Any], Any], str]] = {
    "no number as a probability": ("speech-detector", ({"speech": NAN},), converse, "answered nan as the probability"),
    "a percentage": ("speech-detector", ({"speech": PERCENT},), converse, "answered 97 as the probability"),
    "audio in floats": ("speaker", ({"audio": FLOATS},), speak, "answers 'audio' as FP32 instead of INT16"),
    "scores that have no order": ("ranker", (UNORDERED,), rank, "made scores that are no numbers"),
    "no audio": ("speaker", (), speak, "ended without any audio"),
    "no text": ("live", (), translate, "ended without any text"),
}


@pytest.mark.parametrize(("model", "answers", "call", "text"), WRONG.values(), ids=WRONG)
async def test_the_caller_is_told_that_the_model_is_none_for_this(
    tmp_path: Path, model: str, answers: tuple[Answer, ...], call: Callable[[Any], Any], text: str
) -> None:
    async with (
        playing(model, *answers).serve() as address,
        gateway_of(load(write_config(tmp_path / "gateway.yaml", address), {})) as gateway,
        channel_to(gateway.listen) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(channel)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert text in (failed.value.details() or "")
