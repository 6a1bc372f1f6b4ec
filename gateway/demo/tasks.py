"""I/O: the tasks of `inference-gateway demo`: what each sends to a gateway, and how its answer reads in a table.

A task is called as any client would, by the typed API. Its input is the content of a file: a picture, a text in UTF-8,
a recording, or for ranking two lines of words.
"""

from __future__ import annotations

import io
import time
import wave
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np

from gateway.artifacts import fetch
from gateway.errors import Misused
from gateway.models import pictures, sources
from gateway.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
    reading_pb2,
    reading_pb2_grpc,
    speech_pb2,
    speech_pb2_grpc,
    text_pb2,
    text_pb2_grpc,
)

_SOURCE: Final = Path(__file__)  # a program, to be recognised as one
_TIMEOUT: Final = 60.0  # seconds
_HEARD_RATE: Final = 16_000  # samples per second that the voice assistant understands
_PIECE: Final = 3_200  # bytes of audio in a message: 100 ms


class UnfitInput(Misused):
    """The file can't be what the task takes; the text says what would be right."""


@dataclass(frozen=True, slots=True)
class Site:
    """What a task calls, and where its models are."""

    channel: grpc.aio.Channel
    repository: Path


@dataclass(frozen=True, slots=True)
class Shown:
    """One row of the table.

    given, answer:  what went in and what came out, for people.
    seconds:        from the call to its answer; of a stream, to the end, or to what `answer` says.
    """

    given: str
    answer: str
    variant: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Task:
    """One thing that the demo can show.

    takes:   what its input is, for people.
    pipeline: the public model that it calls, or the first of them.
    config:  of `deploy/examples`, which serves it.
    models:  of the repository.
    sample:  makes the input where the user gives none.
    ask:     calls the gateway with an input.
    package: that its model's program needs to have installed; "" if none.
    """

    name: str
    takes: str
    pipeline: str
    config: str
    models: tuple[str, ...]
    sample: Callable[[Site], Awaitable[bytes]]
    ask: Callable[[Site, bytes], Awaitable[Shown]]
    package: str = ""


# What classification shows


async def _photo(_: Site) -> bytes:
    return pictures.sample_photo()


async def _classify_photo(site: Site, given: bytes) -> Shown:
    request = classification_pb2.ClassifyRequest(model="photo-labels", image=given, max_labels=3)
    return await _classify(site, request, _size("photo", given))


async def _language(_: Site) -> bytes:
    return "Können wir den Zug um halb neun noch erreichen?".encode()


async def _classify_language(site: Site, given: bytes) -> Shown:
    text = _text(given)
    request = classification_pb2.ClassifyRequest(model="language", text=text, max_labels=2)
    return await _classify(site, request, text)


async def _file(_: Site) -> bytes:
    return _SOURCE.read_bytes()


async def _classify_file(site: Site, given: bytes) -> Shown:
    request = classification_pb2.ClassifyRequest(model="file-type", file=given, max_labels=1)
    return await _classify(site, request, _size("file", given))


async def _classify(site: Site, request: Any, given: str) -> Shown:
    stub = classification_pb2_grpc.ClassificationServiceStub(site.channel)
    answer, took = await _timed(stub.Classify, request)
    labels = "\n".join(f"{label.name} {label.score:.2f}" for label in answer.labels)
    return Shown(given, labels, answer.served.variant, took)


# What the other tasks show


async def _page(_: Site) -> bytes:
    encoded = io.BytesIO()
    pictures.picture(fetch(sources.PICTURES), "page.png").save(encoded, "PNG")
    return encoded.getvalue()


async def _read(site: Site, given: bytes) -> Shown:
    request = reading_pb2.ReadRequest(model="page-text", page=given)
    answer, took = await _timed(reading_pb2_grpc.ReadingServiceStub(site.channel).Read, request)
    first = [line.text for line in answer.lines[:3]]
    more = [f"… {len(answer.lines) - 3} more lines"] if len(answer.lines) > 3 else []
    return Shown(_size("page", given), "\n".join([*first, *more]) or "no text", answer.served.variant, took)


async def _chinese(_: Site) -> bytes:
    return "你会说英语吗？".encode()


async def _translate(site: Site, given: bytes) -> Shown:
    return await _rewrite(site, "chinese-to-english", _text(given))


async def _name(_: Site) -> bytes:
    return "حبيبة عطيفي".encode()


async def _romanize(site: Site, given: bytes) -> Shown:
    return await _rewrite(site, "latin-names", _text(given))


async def _rewrite(site: Site, model: str, text: str) -> Shown:
    request = text_pb2.TranslateRequest(model=model, text=text)
    answer, took = await _timed(text_pb2_grpc.TextServiceStub(site.channel).Translate, request)
    unknown = f"\n(unknown: {', '.join(answer.unknown)})" if answer.unknown else ""
    return Shown(text, answer.text + unknown, answer.served.variant, took)


async def _candidates(_: Site) -> bytes:
    return b"coffee, tea\nengine, milk, window, cup, planet, sugar\n"


async def _rank(site: Site, given: bytes) -> Shown:
    listed = (site.repository / "recommend/1/items.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    items = [item.strip(" \u2581") for item in listed]  # wordllama marks the beginning of a word
    lines = [[word.strip() for word in line.split(",") if word.strip()] for line in _text(given).splitlines()]
    if len(lines) != 2:
        raise UnfitInput("Ranking takes two lines: what the user liked, and the candidates, each separated by commas.")
    numbers = {item: number for number, item in reversed(list(enumerate(items)))}
    unknown = [word for line in lines for word in line if word not in numbers]
    if unknown:
        raise UnfitInput(f"The model does not know {', '.join(unknown)}; what it knows is in recommend/1/items.txt.")
    liked, offered = ([numbers[word] for word in line] for line in lines)
    request = ranking_pb2.RankRequest(model="recommendations", history=liked, candidates=offered, top=3)
    answer, took = await _timed(ranking_pb2_grpc.RankingServiceStub(site.channel).Rank, request)
    best = "\n".join(f"{items[item.item]} {item.score:.2f}" for item in answer.items)
    return Shown(f"liked: {', '.join(lines[0])}\nof: {', '.join(lines[1])}", best, answer.served.variant, took)


_COMMAND: Final = "Set a timer for ten minutes."


async def _sentence(_: Site) -> bytes:
    return _COMMAND.encode()


async def _speak(site: Site, given: bytes) -> Shown:
    text = _text(given)
    await _spoken(site, text)
    began = time.perf_counter()
    samples, rate, first = await _spoken(site, text)
    length = len(samples) / rate
    return Shown(text, f"{length:.1f} s of speech,\nthe first part after {first * 1e3:.0f} ms", "", _since(began))


async def _spoken(site: Site, text: str) -> tuple[np.ndarray[Any, Any], int, float]:
    """The speech, its rate, and the seconds until its first part."""
    began, first, rate, audio = time.perf_counter(), 0.0, 0, b""
    request = speech_pb2.SpeakRequest(text=text)
    async for part in speech_pb2_grpc.SpeechServiceStub(site.channel).Speak(request, timeout=_TIMEOUT):
        first = first or _since(began)
        audio, rate = audio + part.audio, part.sample_rate_hz
    return np.frombuffer(audio, "<i2"), rate, first


async def _recording(site: Site) -> bytes:
    """The command as the demo's own voice says it, as a WAV file."""
    samples, rate, _ = await _spoken(site, _COMMAND)
    encoded = io.BytesIO()
    with wave.open(encoded, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return encoded.getvalue()


async def _hear(site: Site, given: bytes) -> Shown:
    samples = heard(given)
    silence = np.zeros(_HEARD_RATE, "<i2")  # an utterance ends with silence
    audio = np.concatenate([silence, samples, silence]).tobytes()

    async def messages() -> AsyncIterator[Any]:
        encoding = speech_pb2.AUDIO_ENCODING_PCM16
        yield speech_pb2.ConverseRequest(
            config=speech_pb2.ConverseConfig(encoding=encoding, sample_rate_hz=_HEARD_RATE)
        )
        for at in range(0, len(audio), _PIECE):
            yield speech_pb2.ConverseRequest(audio=audio[at : at + _PIECE])

    began, lines = time.perf_counter(), []
    async for event in speech_pb2_grpc.SpeechServiceStub(site.channel).Converse(messages(), timeout=_TIMEOUT):
        kind = event.WhichOneof("event")
        if kind == "text":
            lines.append(event.text.text or "(no command that is known)")
        elif kind == "intent" and event.intent.name:
            slots = (
                f"{name} {slot.number:g}" if slot.number else slot.word for name, slot in event.intent.slots.items()
            )
            lines.append(f"→ {event.intent.name} {', '.join(slots)}".rstrip())
    length = len(samples) / _HEARD_RATE
    return Shown(f"recording, {length:.1f} s", "\n".join(lines) or "no speech", "", _since(began))


def heard(file: bytes) -> np.ndarray[Any, Any]:
    """The samples of a WAV file as the voice assistant takes them: one channel, 16 bits, 16 kHz.

    :raises UnfitInput: if it is no WAV file of 16-bit samples, or empty.
    """
    try:
        with wave.open(io.BytesIO(file)) as recording:
            channels, width, rate = recording.getnchannels(), recording.getsampwidth(), recording.getframerate()
            content = recording.readframes(recording.getnframes())
    except (wave.Error, EOFError) as error:
        raise UnfitInput(
            f"This is no WAV file that can be read ({error}); hearing takes one of 16-bit samples."
        ) from error
    if width != 2:
        raise UnfitInput(f"This WAV file has samples of {8 * width} bits; hearing takes 16 bits.")
    whole = len(content) - len(content) % (2 * channels)
    samples = np.frombuffer(content[:whole], "<i2").reshape(-1, channels).mean(axis=1)
    wanted = len(samples) * _HEARD_RATE // rate
    if not wanted:
        raise UnfitInput("This WAV file has no samples.")
    if rate != _HEARD_RATE:  # the spectrum is cut, or filled up with silence, which is right for a whole recording
        samples = np.fft.irfft(np.fft.rfft(samples)[: wanted // 2 + 1], wanted) * wanted / len(samples)
    clipped: np.ndarray[Any, Any] = np.clip(samples, -32768, 32767).astype("<i2")
    return clipped


TASKS: Final = (
    Task(
        "photo",
        "a JPEG, PNG or WebP",
        "photo-labels",
        "demo.yaml",
        ("efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8"),
        _photo,
        _classify_photo,
    ),
    Task("language", "a text", "language", "demo.yaml", ("langid",), _language, _classify_language),
    Task("file-type", "any file", "file-type", "demo.yaml", ("magika",), _file, _classify_file),
    Task(
        "reading",
        "a picture of a page",
        "page-text",
        "reading.yaml",
        ("ocr_detection", "ocr_direction", "ocr_recognition"),
        _page,
        _read,
    ),
    Task(
        "translation",
        "a Chinese text",
        "chinese-to-english",
        "translate.yaml",
        ("cn2en", "cn2en_stream"),
        _chinese,
        _translate,
    ),
    Task(
        "romanizing",
        "an Arabic name",
        "latin-names",
        "translate.yaml",
        ("arabic_names", "arabic_names_stream"),
        _name,
        _romanize,
    ),
    Task(
        "ranking",
        "two lines: liked words, candidates",
        "recommendations",
        "recommend.yaml",
        ("recommend",),
        _candidates,
        _rank,
    ),
    Task("speaking", "an English text", "speaker", "voice.yaml", ("hibari_tts",), _sentence, _speak),
    Task(
        "hearing",
        "a WAV file with a command",
        "speech-detector",
        "voice.yaml",
        ("speech_detector", "voice_commands", "hibari_tts"),
        _recording,
        _hear,
        package="pocketsphinx",
    ),
)
BY_DEFAULT: Final = tuple(task for task in TASKS if task.config == "demo.yaml")
EVERYTHING: Final = "edge.yaml"
"""The config that serves every task."""


def models_of(tasks: Sequence[Task]) -> list[str]:
    return list(dict.fromkeys(model for task in tasks for model in task.models))


def _text(given: bytes) -> str:
    try:
        text = given.decode().strip()
    except UnicodeDecodeError as error:
        raise UnfitInput(f"The file is no text in UTF-8 ({error.reason} at byte {error.start}).") from error
    if not text:
        raise UnfitInput("The file has no text.")
    return text


def _size(what: str, given: bytes) -> str:
    return f"{what}, {len(given) / 1000:.0f} kB"


async def _timed(call: Callable[..., Awaitable[Any]], request: Any) -> tuple[Any, float]:
    """The first call of all includes one-time work (the first run of a session); the second is what a user sees."""
    await call(request, timeout=_TIMEOUT)
    began = time.perf_counter()
    return await call(request, timeout=_TIMEOUT), _since(began)


def _since(began: float) -> float:
    return time.perf_counter() - began
