"""The voice assistant, measured: `python -m perf.voice`, three minutes. What it printed last is in docs/tasks/voice.md.

Speech is hibari's, and espeak-ng's where that is on PATH. Callers send as they would speak, 20 ms of audio each 20 ms,
where latency is measured; and all at once where the gateway is compared with a caller that does the same steps itself.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as triton_client
import yaml
from tritonclient.utils import np_to_triton_dtype

from gateway.app import Gateway, Place
from gateway.artifacts import fetch
from gateway.config import load
from gateway.models import catalogue, sources
from gateway.speech import Conversation, Detect, Heard, Recognise, intent_of
from gateway.triton import LocalTriton
from gateway.v1 import speech_pb2, speech_pb2_grpc

CHECKOUT = Path(__file__).parents[1]
REPOSITORY = CHECKOUT / "model_repository"
MODELS = ("speech_detector", "voice_commands", "hibari_tts")
RATE = 16_000
PIECE = RATE // 50  # samples of a message
SILENCE = np.zeros(RATE, np.int16)

COMMANDS = (
    "set a timer for ten minutes",
    "set a timer for one hour and thirty minutes",
    "set a timer for twenty five seconds",
    "set a timer for half an hour",
    "stop the timer",
    "set an alarm for seven thirty",
    "turn on the lights in the kitchen",
    "turn off the lights",
    "what time is it",
    "set the volume to forty percent",
    "volume up",
    "turn it down please",
    "play some music",
    "pause the music",
    "next song",
)
OTHERS = (
    "the quick brown fox jumps over the lazy dog",
    "i would like to buy a new car tomorrow",
    "she sells sea shells by the sea shore",
    "tell me about the history of france",
    "set the table for dinner",
    "hello there my friend",
    "the weather is nice today",
    "please give me ten apples",
    "what a nice day it is",
    "turn left at the corner",
    "he stopped playing the piano",
    "yes",
    "one two three",
)
ANSWER = "Your timer is set for ten minutes. It is now seven thirty. The lights in the kitchen are on, and it is quiet."


# Speech


def resampled(audio: np.ndarray, rate: int) -> np.ndarray:
    samples = len(audio) * RATE // rate
    spectrum = np.fft.rfft(audio)[: samples // 2 + 1]
    return np.clip(np.fft.irfft(spectrum, samples) * samples / len(audio) * 20_000, -32768, 32767).astype(np.int16)


def hibari() -> Any:
    sys.path.insert(0, str(fetch(sources.HIBARI)))
    return importlib.import_module("hibari").Hibari()


def by_espeak(text: str) -> np.ndarray:
    command = ["espeak-ng", "-v", "en-us", "-s", "150", "--stdout", text]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    return resampled(np.frombuffer(wav[44:], "<i2") / 20_000, 22_050)


# Calls


async def infer(client: Any, model: str, inputs: dict[str, np.ndarray], **options: Any) -> Any:
    tensors = []
    for name, array in inputs.items():
        tensor = triton_client.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return await client.infer(model, tensors, **options)


def config() -> Any:
    encoding = speech_pb2.AUDIO_ENCODING_PCM16
    return speech_pb2.ConverseRequest(config=speech_pb2.ConverseConfig(encoding=encoding, sample_rate_hz=RATE))


def pieces(samples: np.ndarray) -> Iterator[Any]:
    for at in range(0, len(samples), PIECE):
        yield speech_pb2.ConverseRequest(audio=samples[at : at + PIECE].tobytes())


async def as_spoken(channel: Any, spoken: np.ndarray) -> tuple[float, float, str]:
    """Seconds from the last sample of speech to the intent, and from `speech_ended` to it; and the text."""
    call = speech_pb2_grpc.SpeechServiceStub(channel).Converse()
    await call.write(config())
    audio, loud = np.concatenate([SILENCE, spoken, SILENCE, SILENCE]), np.flatnonzero(np.abs(spoken) > 300)
    began = time.perf_counter()
    over = began + (len(SILENCE) + loud[-1]) / RATE

    async def send() -> None:
        for number, message in enumerate(pieces(audio), 1):
            await asyncio.sleep(began + number * PIECE / RATE - time.perf_counter())
            await call.write(message)
        await call.done_writing()

    sending, ended, text, found = asyncio.ensure_future(send()), 0.0, "", (0.0, 0.0)
    while (event := await call.read()) is not grpc.aio.EOF:
        kind = event.WhichOneof("event")
        if kind == "speech_ended":
            ended = time.perf_counter()
        elif kind == "text":
            text = event.text.text
        elif kind == "intent":
            now = time.perf_counter()
            found = now - over, now - ended
    await sending
    return (*found, text)


async def through_gateway(channel: Any, audio: np.ndarray) -> list[str]:
    async def messages() -> Any:
        yield config()
        for message in pieces(audio):
            yield message

    call = speech_pb2_grpc.SpeechServiceStub(channel).Converse(messages())
    return [event.intent.name async for event in call if event.WhichOneof("event") == "intent"]


async def by_the_caller(client: Any, audio: np.ndarray, number: int) -> list[str]:
    """The same steps, each call of a model made by the caller."""
    conversation, intents = Conversation(), []
    conversation.take(audio.tobytes())
    conversation.end()
    while (step := conversation.next_step()) is not None:
        if isinstance(step, Detect):
            window = np.frombuffer(step.window, "<i2").astype(np.float32)[None] / 32768
            borders = {"sequence_start": step.is_first, "sequence_end": step.is_last}
            answer = await infer(client, "speech_detector", {"audio": window}, sequence_id=number, **borders)
            conversation.detected(float(answer.as_numpy("speech")[0, 0]))
        elif isinstance(step, Recognise):
            answer = await infer(client, "voice_commands", {"audio": np.frombuffer(step.audio, "<i2")})
            conversation.recognised(answer.as_numpy("text")[0].decode(), float(answer.as_numpy("score")[0]))
        elif isinstance(step, Heard):
            intents.append(intent_of(step.text).name)
    return intents


# Measuring


def spread(values: list[float], unit: str = "ms", scale: float = 1000) -> str:
    low, *_, high = sorted(values)
    return f"{statistics.median(values) * scale:.0f} {unit} ({low * scale:.0f} to {high * scale:.0f})"


async def words(client: Any, voices: dict[str, Any]) -> None:
    for name, say in voices.items():
        right, wrong, accepted = 0, [], []
        for text in (*COMMANDS, *OTHERS):
            answer = await infer(client, "voice_commands", {"audio": say(text)})
            heard = answer.as_numpy("text")[0].decode()
            if text in COMMANDS:
                right += heard == text
                if heard and intent_of(heard) not in (intent_of(text), intent_of("")):
                    wrong.append(f"{text} → {heard}")
            elif intent_of(heard).name:
                accepted.append(f"{text} → {heard}")
        print(f"{name}: {right} of {len(COMMANDS)} commands word for word, another command for {len(wrong)}: {wrong}")
        print(f"  of {len(OTHERS)} sentences that are none, taken for one: {len(accepted)}: {accepted}")


async def latency(channel: Any, say: Any) -> None:
    for callers in (1, 4):
        found = []
        for text in COMMANDS[:6]:
            found += await asyncio.gather(*(as_spoken(channel, say(text)) for _ in range(callers)))
        print(f"{callers} callers: from the end of speech to the intent {spread([each[0] for each in found])}")
        print(f"  of that from `speech_ended` to the intent {spread([each[1] for each in found])}")


async def beside_direct(channel: Any, client: Any, say: Any) -> None:
    audio = np.concatenate([piece for text in COMMANDS[:4] for piece in (SILENCE, say(text))] + [SILENCE])
    ratios, ours = [], []
    for number in range(1, 8):
        began = time.perf_counter()
        await by_the_caller(client, audio, number)
        direct = time.perf_counter() - began
        began = time.perf_counter()
        await through_gateway(channel, audio)
        ours.append(time.perf_counter() - began)
        ratios.append(ours[-1] / direct)
    seconds = len(audio) / RATE
    print(f"{seconds:.0f} s of audio at once: {spread(ours)}, gateway ÷ direct {spread(ratios, '', 100)} %")


async def speaking(channel: Any, client: Any) -> None:
    first, whole, direct = [], [], []
    for number in range(9):
        began = time.perf_counter()
        samples = 0
        call = speech_pb2_grpc.SpeechServiceStub(channel).Speak(speech_pb2.SpeakRequest(text=ANSWER))
        async for part in call:
            if not samples:
                first.append(time.perf_counter() - began)
            samples += len(part.audio) // 2
        whole.append((time.perf_counter() - began) / (samples / 24_000))
        began = time.perf_counter()
        answers = client.stream_infer(_asked(number))
        async for _ in answers:
            direct.append(time.perf_counter() - began)
            break
        answers.cancel()
    print(f"speaking {samples / 24_000:.1f} s: first part after {spread(first)}, directly {spread(direct)}")
    print(f"  time ÷ length of the speech (real-time factor) {statistics.median(whole):.4f}")


async def _asked(number: int) -> Any:
    text = triton_client.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([ANSWER.encode()], np.object_))
    yield {"model_name": "hibari_tts", "inputs": [text], "request_id": str(number)}


async def main() -> None:
    catalogue.build(MODELS, REPOSITORY)
    speaker = hibari()
    voices: dict[str, Any] = {"hibari": lambda text: resampled(speaker(f"{text}.", seed=0), 24_000)}
    if shutil.which("espeak-ng"):
        voices["espeak-ng"] = by_espeak
    async with LocalTriton(REPOSITORY, models=MODELS) as triton:
        settings = yaml.safe_load((CHECKOUT / "deploy/examples/voice.yaml").read_text())
        settings["upstreams"]["local"]["endpoints"] = [triton.grpc_address]
        settings["telemetry"] = {"access_log": {"destination": "none"}}
        settings |= {"listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "gateway.yaml"
            file.write_text(yaml.safe_dump(settings))
            loaded = load(file, {})
        async with (
            Gateway(loaded, lambda: loaded, {}, Place(loaded.config.admin.listen)) as gateway,
            grpc.aio.insecure_channel(gateway.listen) as channel,
            triton_client.InferenceServerClient(triton.grpc_address) as client,
        ):
            await words(client, voices)
            await latency(channel, voices["hibari"])
            await beside_direct(channel, client, voices["hibari"])
            await speaking(channel, client)


if __name__ == "__main__":
    asyncio.run(main())
