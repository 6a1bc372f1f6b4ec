"""The voice assistant end to end: real models on a real Triton, through the gateway."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pocketsphinx
import pytest
import tritonclient.grpc.aio as triton_client
import yaml
from google.protobuf import text_format
from patience import wait_until
from triton_fixture import FAST_START
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import np_to_triton_dtype
from v2_calls import channel_to
from v2_gateways import gateway_of
from voices import (
    SILENCE,
    Samples,
    by_espeak,
    config,
    events_of,
    hibari,
    pieces,
    said,
    shown,
    with_pauses,
)

from gateway.app import Gateway
from gateway.artifacts import fetch
from gateway.config import load
from gateway.models import catalogue, sources
from gateway.triton import LocalTriton
from gateway.v1 import speech_pb2, speech_pb2_grpc

pytestmark = pytest.mark.integration

CHECKOUT = Path(__file__).parents[2]
REPOSITORY = CHECKOUT / "model_repository"
MODELS = ("speech_detector", "voice_commands", "hibari_tts")
END = speech_pb2.ConverseRequest(end=speech_pb2.EndOfAudio())

TIMER = ("set a timer for ten minutes", ("timer.set", {"seconds": 600.0}))
LIGHTS = ("turn on the lights in the kitchen", ("lights.on", {"room": "kitchen"}))


@dataclass
class Stack:
    """What the tests of this file share."""

    triton: LocalTriton
    repository: Path
    gateway: Gateway
    channel: Any
    direct: triton_client.InferenceServerClient


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("voice")
    repository = folder / "models"
    repository.mkdir()
    for model in MODELS:  # elsewhere than in the checkout, where others expect what is built by default
        shutil.copytree(REPOSITORY / model, repository / model, ignore=shutil.ignore_patterns("1"))
    catalogue.build(MODELS, repository)
    _add_slow_speaker(repository / "slow_speaker")
    triton = LocalTriton(repository, models=(*MODELS, "slow_speaker"), extra=FAST_START)
    await triton.start()
    file = write_config(folder / "gateway.yaml", triton.grpc_address)
    async with (
        gateway_of(load(file, {})) as gateway,
        channel_to(gateway.listen) as channel,
        triton_client.InferenceServerClient(triton.grpc_address) as direct,
    ):
        yield Stack(triton, repository, gateway, channel, direct)
    await triton.kill()
    await triton.aclose()


def _add_slow_speaker(folder: Path) -> None:
    """hibari, but that it takes 200 ms after each part."""
    folder.mkdir()
    text = (REPOSITORY / "hibari_tts/config.pbtxt").read_text()
    slow = text.replace('"hibari_tts"', '"slow_speaker"').replace('string_value: "0"', 'string_value: "200"')
    (folder / "config.pbtxt").write_text(slow)
    (folder / "1").symlink_to(folder.with_name("hibari_tts") / "1")


def write_config(file: Path, *tritons: str) -> Path:
    """The shipped config. tritons: where the models are; of several, each has all."""
    settings = yaml.safe_load((CHECKOUT / "deploy/examples/voice.yaml").read_text())
    settings["upstreams"]["local"]["endpoints"] = list(tritons)
    settings["direct"] = {"models": "all", "upstream": "local"}
    settings["telemetry"] = {"access_log": {"destination": "none"}}
    settings |= {"listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}}
    file.write_text(yaml.safe_dump(settings))
    return file


async def infer(client: Any, model: str, inputs: dict[str, Any], **options: Any) -> Any:
    tensors = []
    for name, array in inputs.items():
        tensor = triton_client.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return await client.infer(model, tensors, **options)


# The models, beside their packages


def speech_of(samples: Samples) -> list[float]:
    """As silero_vad's `OnnxWrapper` asks its own graph, window by window."""
    graph = fetch(sources.SILERO_VAD) / "silero_vad/data/silero_vad.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    state, context, found = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
    for window in windows(samples):
        heard = np.concatenate([context, window], 1)
        speech, state = session.run(None, {"input": heard, "state": state, "sr": np.array(16_000)})
        context = heard[:, -64:]
        found.append(float(speech[0, 0]))
    return found


def windows(samples: Samples) -> list[Any]:
    whole = samples[: len(samples) // 512 * 512].astype(np.float32) / 32768
    return [window[None] for window in whole.reshape(-1, 512)]


async def test_callers_whose_windows_are_heard_together_each_have_the_packages_probabilities(stack: Stack) -> None:
    """Triton keeps each one's state. A number that is used again begins anew."""
    speakers = {1: said("What time is it?")[:12_000], 2: by_espeak()[10_000:20_000], 3: SILENCE[:8_000]}

    async def hear(number: int, samples: Samples) -> list[float]:
        found, all_windows = [], windows(samples)
        for at, window in enumerate(all_windows):
            borders = {"sequence_start": at == 0, "sequence_end": at == len(all_windows) - 1}
            answer = await infer(stack.direct, "speech_detector", {"audio": window}, sequence_id=number, **borders)
            found.append(float(answer.as_numpy("speech")[0, 0]))
        return found

    heard = dict(zip(speakers, await asyncio.gather(*(hear(*each) for each in speakers.items())), strict=True))
    for number, samples in speakers.items():
        np.testing.assert_allclose(heard[number], speech_of(samples), atol=1e-5)
    np.testing.assert_allclose(await hear(2, speakers[1]), speech_of(speakers[1]), atol=1e-5)
    assert max(heard[1]) > 0.9
    assert max(heard[3]) < 0.1


async def test_a_sequence_that_has_ended_is_not_gone_on_with(stack: Stack) -> None:
    (window, *_) = windows(SILENCE)
    await infer(
        stack.direct, "speech_detector", {"audio": window}, sequence_id=9, sequence_start=True, sequence_end=True
    )
    with pytest.raises(Exception, match="START flag"):
        await infer(stack.direct, "speech_detector", {"audio": window}, sequence_id=9)


async def test_words_are_those_of_the_packages_own_decoder(stack: Stack) -> None:
    english = stack.repository / "voice_commands/1"
    decoder = pocketsphinx.Decoder(
        hmm=str(english / "en-us"),
        dict=str(english / "cmudict-en-us.dict"),
        jsgf=str(REPOSITORY / "voice_commands/commands.gram"),
        lm=None,
        loglevel="FATAL",
    )
    for samples in (said("Set an alarm for seven thirty."), by_espeak()):
        decoder.reinit_feat()
        decoder.start_utt()
        noise = np.random.default_rng(0).standard_normal(len(samples) + 9600) * 8
        decoder.process_raw((np.pad(samples, 4800) + noise).astype("<i2").tobytes(), full_utt=True)
        decoder.end_utt()
        answer = await infer(stack.direct, "voice_commands", {"audio": samples})
        assert answer.as_numpy("text")[0].decode() == decoder.hyp().hypstr


async def test_what_one_caller_said_does_not_change_how_the_next_one_is_heard(stack: Stack) -> None:
    scores = []
    for samples in (by_espeak(), said("Volume up."), by_espeak()):
        answer = await infer(stack.direct, "voice_commands", {"audio": samples})
        scores.append(float(answer.as_numpy("score")[0]))
    assert scores[0] == scores[2]


@pytest.mark.parametrize("text", ["I would like to buy a new car tomorrow.", "The quick brown fox jumps over the dog."])
async def test_what_is_no_command_has_no_words(stack: Stack, text: str) -> None:
    answer = await infer(stack.direct, "voice_commands", {"audio": said(text)})
    assert answer.as_numpy("text")[0] == b""
    assert answer.as_numpy("score")[0] < -0.275


async def test_what_is_spoken_is_what_the_package_speaks(stack: Stack) -> None:
    text = "Your timer is set. It is seven thirty."
    call = speech_pb2_grpc.SpeechServiceStub(stack.channel).Speak(speech_pb2.SpeakRequest(text=text, speed=1.25))
    parts = [part async for part in call]
    theirs = list(hibari().stream(text, speed=1.25, seed=0))
    assert len(parts) == len(theirs) == 2
    assert {part.sample_rate_hz for part in parts} == {24_000}
    for part, audio in zip(parts, theirs, strict=True):
        ours = np.frombuffer(part.audio, "<i2").astype(np.float32)
        np.testing.assert_allclose(ours, np.clip(audio, -1, 1) * 32767, atol=16)  # their NumPys differ


@pytest.mark.parametrize("model", MODELS)
def test_the_config_says_nothing_that_the_published_format_does_not_know(model: str) -> None:
    text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


# Conversations


@pytest.mark.parametrize("size", [501, 1_000_000], ids=lambda size: f"{size} bytes a message")
async def test_each_utterance_is_heard_and_meant_whatever_the_pieces_are(stack: Stack, size: int) -> None:
    audio = with_pauses(by_espeak(), said("Hello there my good old friend."))
    events = await events_of(stack.channel, [config(), *pieces(audio, size), END])
    began = ["speech_started", "speech_ended"]
    assert shown(events) == [*began, *LIGHTS, *began, "", ("", {}), "ended"]
    assert events[-1].ended.audio.ToSeconds() == len(audio) // 16_000
    assert events[-1].ended.utterances == 2
    detected = events[-1].ended.served
    windows_heard = -(-len(audio) // 512)
    assert (detected.model, detected.endpoint) == ("speech-detector", stack.triton.grpc_address)
    assert windows_heard <= detected.attempts <= windows_heard + 1
    readers = [event.text.served for event in events if event.WhichOneof("event") == "text"]
    assert [(each.model, each.endpoint, each.attempts) for each in readers] == [
        ("voice-commands", stack.triton.grpc_address, 1)
    ] * 2
    at = events[0].speech_started.at.ToMilliseconds()
    assert 900 <= at <= 1_500, "the silence before it is a second"


async def test_events_come_while_the_caller_still_sends(stack: Stack) -> None:
    call = speech_pb2_grpc.SpeechServiceStub(stack.channel).Converse(timeout=60)
    await call.write(config())
    for message in pieces(with_pauses(said("Set a timer for ten minutes."))):
        await call.write(message)
    events = [await call.read() for _ in range(4)]  # the caller's side is open
    assert shown(events) == ["speech_started", "speech_ended", *TIMER]
    for message in pieces(with_pauses(said("Volume up."))):
        await call.write(message)
    assert shown([await call.read() for _ in range(4)])[2:] == ["volume up", ("volume.up", {})]
    await call.done_writing()
    assert shown([await call.read()]) == ["ended"]
    assert await call.read() is grpc.aio.EOF


async def test_silence_is_heard_to_its_end(stack: Stack) -> None:
    (ended,) = await events_of(stack.channel, [config(), *pieces(with_pauses())])
    assert (ended.ended.utterances, ended.ended.audio.ToMilliseconds()) == (0, 1000)


WRONG: list[tuple[str, list[Any], str]] = [
    ("another rate", [config(sample_rate_hz=8_000)], "sample_rate_hz is 8000; only 16000 is understood"),
    ("no rate", [config(sample_rate_hz=0)], "sample_rate_hz is 0; only 16000"),
    ("no encoding", [config(encoding=0)], "only AUDIO_ENCODING_PCM16 is understood"),
    ("an unknown encoding", [config(encoding=7)], "encoding is 7; only AUDIO_ENCODING_PCM16"),
    ("nothing", [], "the first message has no config"),
    ("audio first", [speech_pb2.ConverseRequest(audio=b"1234")], "the first message has no config"),
    ("two configs", [config(), config()], "a second config came"),
    ("an empty message", [config(), speech_pb2.ConverseRequest()], "a message is empty; set audio or end"),
    ("half a sample", [config(), speech_pb2.ConverseRequest(audio=b"123")], "two bytes for each"),
    ("a file", [config(), speech_pb2.ConverseRequest(audio=b"RIFF1234WAVE")], "begins as a WAV file"),
    ("audio after the end", [config(), END, *pieces(SILENCE[:9])], "audio came after `end`"),
]


@pytest.mark.parametrize(("messages", "text"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
async def test_audio_that_can_not_be_heard_is_refused_with_what_would_be_right(
    stack: Stack, messages: Sequence[Any], text: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=text.replace("`", ".")) as failed:
        await events_of(stack.channel, messages)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("models", "code"),
    [
        ({"detector": "nowhere"}, grpc.StatusCode.NOT_FOUND),
        ({"detector": "voice_commands"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"recogniser": "nowhere"}, grpc.StatusCode.NOT_FOUND),
    ],
    ids=["unknown detector", "a detector that takes no windows", "unknown recogniser"],
)
async def test_a_model_that_can_not_hear_is_an_error(stack: Stack, models: dict[str, str], code: Any) -> None:
    audio = with_pauses(said("What time is it?"))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await events_of(stack.channel, [config(**models), *pieces(audio, 1_000_000)])
    assert failed.value.code() is code


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": " "}, "text is empty"),
        ({"text": "x" * 10_001}, "at most 10000 are spoken"),
        ({"text": "你好"}, "nothing that can be spoken"),
        ({"text": "Hello.", "speed": 3.0}, "speed is 3; it is from 0.5"),
    ],
)
async def test_a_text_that_can_not_be_spoken_is_refused(stack: Stack, fields: dict[str, Any], text: str) -> None:
    call = speech_pb2_grpc.SpeechServiceStub(stack.channel).Speak(speech_pb2.SpeakRequest(**fields))
    with pytest.raises(grpc.aio.AioRpcError, match=text) as failed:
        await call.read()
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_who_spoke_is_in_the_trailing_metadata(stack: Stack) -> None:
    call = speech_pb2_grpc.SpeechServiceStub(stack.channel).Speak(speech_pb2.SpeakRequest(text="One. Two."))
    assert len([part async for part in call]) == 2
    told = dict(await call.trailing_metadata())
    assert told["gateway-endpoint"] == stack.triton.grpc_address
    assert told["gateway-attempts"] == "1"


async def parts_made(stack: Stack) -> int:
    """How many parts `slow_speaker` has made."""
    answer = await stack.direct.get_inference_statistics("slow_speaker", as_json=True)
    each = answer["model_stats"][0].get("response_stats", {})
    return sum(int(stats.get("success", {}).get("count", 0)) for stats in each.values())


async def test_a_listener_who_goes_away_stops_the_speaker_within_a_part(stack: Stack) -> None:
    text = "One is a number. " * 50
    before = await parts_made(stack)
    call = speech_pb2_grpc.SpeechServiceStub(stack.channel).Speak(
        speech_pb2.SpeakRequest(model="slow_speaker", text=text)
    )
    assert len((await call.read()).audio)
    call.cancel()
    heard = await parts_made(stack) - before
    await asyncio.sleep(1)  # the time of four parts
    assert await parts_made(stack) - before <= heard + 1
    assert heard < 10


async def test_a_caller_who_goes_away_leaves_no_place_taken_at_the_detector(stack: Stack) -> None:
    """Its sequence is ended, so the gateway knows of none, and the detector has heard its last window."""
    sequences = stack.gateway._models.inference.sequences
    before = set(sequences._pins)  # those of calls before may still be at their end, or idle

    def own() -> set[Any]:
        return set(sequences._pins) - before

    call = speech_pb2_grpc.SpeechServiceStub(stack.channel).Converse(timeout=60)
    await call.write(config())
    for message in pieces(SILENCE):
        await call.write(message)
    await wait_until(lambda: len(own()) == 1)
    call.cancel()
    await wait_until(lambda: not own())


# Faults


async def test_a_caller_whose_endpoint_dies_is_told_so_and_begins_again_elsewhere_and_nobody_else_notices(
    stack: Stack, tmp_path: Path
) -> None:
    """Conversations begin until both endpoints have one; then one endpoint dies between two windows."""
    fragile = LocalTriton(stack.repository, models=("speech_detector", "voice_commands"), extra=FAST_START)
    await fragile.start()
    try:
        file = write_config(tmp_path / "gateway.yaml", stack.triton.grpc_address, fragile.grpc_address)
        async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
            await _let_one_of_two_die(gateway, channel, fragile)
    finally:
        await fragile.kill()
        await fragile.aclose()


async def _let_one_of_two_die(gateway: Gateway, channel: Any, fragile: LocalTriton) -> None:
    stub = speech_pb2_grpc.SpeechServiceStub(channel)
    audio = pieces(with_pauses(said("Set a timer for ten minutes.")))
    half = len(audio) * 6 // 10

    def places() -> list[str]:
        return [pin.endpoint.address for _, pin in gateway._models.inference.sequences._pins.values()]

    calls: list[Any] = []
    while len(set(places())) < 2:
        assert len(calls) < 64
        calls.append(stub.Converse(timeout=60))
        await calls[-1].write(config())
        for message in audio[:half]:
            await calls[-1].write(message)
        assert shown([await calls[-1].read()]) == ["speech_started"]
    lost = places().count(fragile.grpc_address)
    await fragile.kill()
    outcomes = await asyncio.gather(*(_finish(call, audio[half:]) for call in calls))
    told = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(told) == lost
    for error in told:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "start" in error.details() or "begin" in error.details(), error.details()
    assert all(shown(events)[1:3] == [*TIMER] for events in outcomes if isinstance(events, list))
    for _ in range(lost):  # they begin again
        events = await events_of(channel, [config(), *audio])
        assert shown(events) == ["speech_started", "speech_ended", *TIMER, "ended"]


async def _finish(call: Any, messages: Sequence[Any]) -> list[Any] | grpc.aio.AioRpcError:
    """The events that are left, or the error. A call that has ended takes no more messages."""
    try:
        for message in messages:
            await call.write(message)
            await asyncio.sleep(0.01)
        await call.done_writing()
        events = []
        while (event := await call.read()) is not grpc.aio.EOF:
            events.append(event)
        return events
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        return error if isinstance(error, grpc.aio.AioRpcError) else grpc.aio.AioRpcError(
            await call.code(), (), (), await call.details()
        )  # fmt: skip
