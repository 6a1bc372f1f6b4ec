"""Speech for tests, and callers who speak it.

What hibari says is made here, of the pinned wheel. `espeak_lights.npz` is "turn on the lights in the kitchen" as
espeak-ng 1.51 says it (voice en-us, 150 words a minute), at 16 kHz; what a program says is not under its licence.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.artifacts import fetch
from gateway.models import sources
from gateway.v1 import speech_pb2, speech_pb2_grpc

RATE = 16_000
SILENCE = np.zeros(RATE, np.int16)
_CLIP = Path(__file__).parents[1] / "data" / "voice" / "espeak_lights.npz"

Samples = NDArray[np.int16]


@cache
def hibari() -> Any:
    """The package's own speaker, as its users have it."""
    folder = str(fetch(sources.HIBARI))
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("hibari").Hibari()
    finally:
        sys.path.remove(folder)


@cache
def said(text: str) -> Samples:
    """The text as hibari says it, at 16 kHz."""
    return resampled(hibari()(text, seed=0), 24_000)


def resampled(audio: NDArray[Any], rate: int) -> Samples:
    """audio: in [-1, 1]. By cutting the spectrum, which is right for a whole recording."""
    samples = len(audio) * RATE // rate
    spectrum = np.fft.rfft(audio)[: samples // 2 + 1]
    return np.clip(np.fft.irfft(spectrum, samples) * samples / len(audio) * 20_000, -32768, 32767).astype(np.int16)


def by_espeak() -> Samples:
    with np.load(_CLIP) as clip:
        samples: Samples = clip["samples"]
        return samples


def with_pauses(*parts: Samples) -> Samples:
    """The parts, each after a second of silence, and one more second."""
    return np.concatenate([piece for part in parts for piece in (SILENCE, part)] + [SILENCE])


def config(**changes: Any) -> Any:
    fields = {"encoding": speech_pb2.AUDIO_ENCODING_PCM16, "sample_rate_hz": RATE, **changes}
    return speech_pb2.ConverseRequest(config=speech_pb2.ConverseConfig(**fields))


def pieces(samples: Samples, size: int = 3_200) -> list[Any]:
    """Messages with the audio. size: bytes of each."""
    audio = samples.astype("<i2").tobytes()
    return [speech_pb2.ConverseRequest(audio=audio[at : at + size]) for at in range(0, len(audio), size)]


async def events_of(channel: Any, messages: Sequence[Any]) -> list[Any]:
    """All events of one conversation, whose messages are sent at once."""
    call = speech_pb2_grpc.SpeechServiceStub(channel).Converse(_each(messages), timeout=60)
    return [event async for event in call]


async def _each(messages: Sequence[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def shown(events: Sequence[Any]) -> list[Any]:
    """Events in short: kinds, texts and intents, without their times."""
    short: list[Any] = []
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "text":
            short.append(event.text.text)
        elif kind == "intent":
            slots = {name: slot.number or slot.word for name, slot in event.intent.slots.items()}
            short.append((event.intent.name, slots))
        else:
            short.append(kind)
    return short
