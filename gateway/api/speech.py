"""The voice assistant of `gateway.v1`: a `Conversation` for each Converse, and for Speak what its model makes.

What is decided is decided in `gateway.speech`; here messages, models and the caller are brought together.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

import numpy as np
from google.protobuf.duration_pb2 import Duration
from tritonclient.grpc import service_pb2 as v2

from gateway.api.calls import CallLimits, Context, request_from, with_errors, within
from gateway.api.parts import AnswerError, Parts
from gateway.api.typed import served_message, served_of, timed_infer
from gateway.deadline import Deadline
from gateway.errors import (
    BadInput,
    BadRequest,
    DeadlineExceeded,
    GatewayError,
    Overloaded,
    SequenceLost,
    UnknownModel,
    shown,
)
from gateway.forwarding.caller import CallerMetadata, unchecked
from gateway.forwarding.exchange import Reply, Request, Timings
from gateway.forwarding.messages import build_request, parse_response
from gateway.forwarding.models import Models
from gateway.rpc.budget import Budget
from gateway.speech import Conversation, Detect, Ended, Heard, Recognise, SpeechEnded, SpeechStarted, WrongAudio
from gateway.speech.conversation import RATE, WINDOW, Event
from gateway.speech.intents import NONE, Intent, intent_of
from gateway.steps import Array, WrongAnswer
from gateway.v1 import speech_pb2, speech_pb2_grpc

_log = logging.getLogger(__name__)

_DETECTOR: Final = "speech-detector"
_RECOGNISER: Final = "voice-commands"
_SPEAKER: Final = "speaker"

_FULL_SCALE: Final = np.float32(32768)  # of 16-bit samples
_SPOKEN_RATE: Final = 24_000  # samples per second of hibari's audio
_MOST_CHARACTERS: Final = 10_000
_SLOWEST, _FASTEST = 0.5, 2.0

_AHEAD: Final = 2
"""Sentences that wait for a caller who listens slowly, before the model's stream is held."""

_LATE_SECONDS: Final = 0.05
"""How long to look, once all is heard, whether audio follows the `end` of a caller that has not closed its side."""

_MOST_CONVERSATIONS: Final = 448
_MOST_OF_ONE: Final = 64
"""Conversations at once: of all callers, and of one connection. The detector keeps a place for each of 512
(`max_candidate_sequences`); whoever came after them would wait until one ends, and not be told."""

_PATIENCE_SECONDS: Final = 25.0
"""How long a conversation waits for its caller's next message. After 30 s the detector gives its place away."""

_FAREWELL_SECONDS: Final = 5.0
"""How long the detector may take to hear that a caller has gone; then its place is free by idleness."""


class SpeechService(speech_pb2_grpc.SpeechServiceServicer):  # type: ignore[misc]
    """Hears commands while they are spoken, and speaks."""

    def __init__(self, models: Models, limits: CallLimits, budget: Budget) -> None:
        """limits: of each call of a model. budget: for audio that waits for its caller."""
        self._models = models
        self._limits = limits
        self._budget = budget
        self._farewells: set[asyncio.Task[None]] = set()
        self._conversations: Counter[str] = Counter()  # under way, by connection
        self.Converse = with_errors(self._converse)
        self.Speak = with_errors(self._speak)

    async def aclose(self) -> None:
        """Wait for what callers that have gone left to be done."""
        await asyncio.gather(*self._farewells, return_exceptions=True)

    # Hearing

    async def _converse(self, messages: AsyncIterator[Any], context: Context) -> None:
        opening = request_from(context, b"", "Converse", CallLimits())  # a conversation may last
        with self._models.refusals(opening, _DETECTOR):
            self._check_room(opening.peer)
        self._conversations[opening.peer] += 1
        try:
            async with aclosing(_Messages(messages)) as ahead:
                ears = _Ears(self._models, opening, self._limits, await _config_of(ahead))
                await self._listen(ears, ahead, context)
        finally:
            self._conversations[opening.peer] -= 1
            if not self._conversations[opening.peer]:
                del self._conversations[opening.peer]

    def _check_room(self, peer: str) -> None:
        """:raises Overloaded: if there are as many conversations as may be."""
        if self._conversations[peer] >= _MOST_OF_ONE:
            raise Overloaded(f"this connection has {_MOST_OF_ONE} conversations, and may have no more at once")
        if self._conversations.total() >= _MOST_CONVERSATIONS:
            raise Overloaded(f"there are {_MOST_CONVERSATIONS} conversations, and may be no more at once; try later")

    async def _listen(self, ears: _Ears, messages: _Messages, context: Context) -> None:
        conversation = Conversation()
        try:
            await _drive(conversation, ears, messages, context)
        except WrongAudio as error:
            raise BadInput(str(error)) from error
        finally:
            if conversation.is_open_at_detector and not ears.is_lost:
                task = asyncio.ensure_future(ears.say_farewell())
                self._farewells.add(task)
                task.add_done_callback(self._farewells.discard)

    # Speaking

    async def _speak(self, request: Any, context: Context) -> None:
        opening = request_from(context, b"", "Speak", CallLimits())  # whoever listens as it is spoken takes its time
        model = request.model or _SPEAKER
        with self._models.refusals(opening, model):
            body = _spoken_body(model, request.text, request.speed)
        is_silent = True
        with Parts(self._models, replace(opening, body=body), self._budget, ahead=_AHEAD) as parts:
            try:
                while (outputs := await parts.next()) is not None:
                    audio = _output(outputs, "audio", "INT16", model)
                    is_silent = False
                    await context.write(
                        speech_pb2.SpeakResponse(audio=audio.astype("<i2").tobytes(), sample_rate_hz=_SPOKEN_RATE)
                    )
            except AnswerError as error:
                if error.text.startswith(("text ", "speed ")):  # the model names an input that it can't speak
                    raise BadInput(error.text) from error
                raise
        if is_silent:
            raise WrongAnswer(f"'{shown(model)}' ended without any audio, so it is no model for this")
        context.set_trailing_metadata(tuple(parts.trailing))


class _Messages:
    """What the caller sends, read one ahead: so it is seen whether something follows `end`."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self._next = self._read()

    def _read(self) -> asyncio.Future[Any]:
        return asyncio.ensure_future(anext(self._messages, None))

    async def next(self) -> Any:
        """The next message, None if there is no more. raises: DeadlineExceeded if it does not come in time."""
        if not self._next.done():
            await asyncio.wait({self._next}, timeout=_PATIENCE_SECONDS)
        if not self._next.done():
            raise DeadlineExceeded(
                f"no message came for {_PATIENCE_SECONDS:g} s; send audio as it is heard, silence too, or begin "
                "another conversation when there is some"
            )
        message = self._next.result()
        if message is not None:
            self._next = self._read()
        return message

    async def next_within(self, seconds: float) -> Any:
        """The next message if it comes in this time, None otherwise."""
        await asyncio.wait({self._next}, timeout=seconds)
        return self._next.result() if self._next.done() else None

    async def aclose(self) -> None:
        self._next.cancel()
        await asyncio.gather(self._next, return_exceptions=True)


async def _config_of(messages: _Messages) -> Any:
    """The first message's config. raises: BadRequest"""
    first = await messages.next()
    if first is None or first.WhichOneof("message") != "config":
        raise BadRequest("the first message has no config; say there how the audio is written, and at which rate")
    config = first.config
    if config.encoding != speech_pb2.AUDIO_ENCODING_PCM16:
        name = speech_pb2.AudioEncoding.Name(config.encoding) if config.encoding in (0, 1) else config.encoding
        raise BadInput(
            f"encoding is {name}; only AUDIO_ENCODING_PCM16 is understood (16-bit little-endian, one channel)"
        )
    if config.sample_rate_hz != RATE:
        raise BadInput(f"sample_rate_hz is {config.sample_rate_hz}; only {RATE} is understood, so resample the audio")
    return config


async def _drive(conversation: Conversation, ears: _Ears, messages: _Messages, context: Context) -> None:
    """Do what the conversation says until it is over. raises: WrongAudio, GatewayError"""
    while True:
        step = conversation.next_step()
        if step is None:
            _hear(conversation, await messages.next())
        elif isinstance(step, Detect):
            conversation.detected(await ears.detect(step))
        elif isinstance(step, Recognise):
            conversation.recognised(*await ears.recognise(step))
        else:
            if isinstance(step, Ended) and (late := await messages.next_within(_LATE_SECONDS)) is not None:
                _hear(conversation, late)
            for message in _told(step, ears):
                await context.write(message)
            if isinstance(step, Ended):
                return


def _hear(conversation: Conversation, message: Any) -> None:
    """Give the conversation one more message; None is the end of them. raises: WrongAudio, BadRequest"""
    kind = "end" if message is None else message.WhichOneof("message")
    if kind == "audio":
        conversation.take(message.audio)
    elif kind == "config":
        raise BadRequest("a second config came; a conversation keeps its first, so begin another one")
    elif kind is None:
        raise BadRequest("a message is empty; set audio or end")
    else:
        conversation.end()


def _told(event: Event, ears: _Ears) -> list[Any]:
    """The messages that tell the caller. ears: know who heard."""
    response = speech_pb2.ConverseResponse
    if isinstance(event, SpeechStarted):
        return [response(speech_started=speech_pb2.SpeechStarted(at=_time(event.at)))]
    if isinstance(event, SpeechEnded):
        return [response(speech_ended=speech_pb2.SpeechEnded(at=_time(event.at), is_cut=event.is_cut))]
    if isinstance(event, Heard):
        text = speech_pb2.RecognisedText(text=event.text, score=event.score, served=ears.last_reader)
        return [response(text=text), response(intent=_intent(NONE if event.is_cut else intent_of(event.text)))]
    ended = speech_pb2.ConversationEnded(
        audio=_time(event.samples), utterances=event.utterances, served=ears.detecting.served()
    )
    return [response(ended=ended)]


def _intent(intent: Intent) -> Any:
    message = speech_pb2.Intent(name=intent.name)
    for name, value in intent.slots.items():
        if isinstance(value, str):
            message.slots[name].word = value
        else:
            message.slots[name].number = value
    return message


def _time(samples: int) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(samples * 1_000_000_000 // RATE)
    return duration


class _Detecting:
    """Who answered the windows of a conversation so far, and what that took."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds = 0.0
        self._attempts = 0
        self._last: Reply | None = None

    def add(self, reply: Reply, seconds: float) -> None:
        self._last = reply
        self._seconds += seconds
        self._attempts += reply.served.attempts

    def served(self) -> Any:
        """A common_pb2.Served; None before the first answer."""
        if self._last is None:
            return None
        who = replace(self._last.served, attempts=self._attempts)
        return served_message(who, self._began, Timings(model=self._seconds))


class _Ears:
    """The models that hear one caller."""

    def __init__(self, models: Models, opening: Request, limits: CallLimits, config: Any) -> None:
        self._models = models
        self._opening = opening
        self._limits = limits
        self._detector = config.detector or _DETECTOR
        self._recogniser = config.recogniser or _RECOGNISER
        self._sequence = secrets.randbits(62) + 1
        self.detecting = _Detecting()
        self.last_reader: Any = None  # a common_pb2.Served: who read the last utterance
        self.is_lost = False  # has the detector forgotten this caller? Then nothing is left there that can be ended

    async def detect(self, step: Detect) -> float:
        """The probability that the window is speech."""
        try:
            return await self._detect(within(self._opening, self._limits), step.window, step.is_first, step.is_last)
        except SequenceLost:
            self.is_lost = True
            raise

    async def recognise(self, step: Recognise) -> tuple[str, float]:
        """The words, and how well they fit."""
        began = time.monotonic()
        samples = np.frombuffer(step.audio, "<i2").astype(np.int16, copy=False)
        body = build_request(self._recogniser, {"audio": samples}, outputs=("text", "score"))
        reply, took = await timed_infer(self._models, replace(within(self._opening, self._limits), body=body))
        self.last_reader = served_of(reply, began, took)
        arrays = parse_response(reply.body)
        text = _output(arrays, "text", "BYTES", self._recogniser).flat[0]
        score = _output(arrays, "score", "FP32", self._recogniser).flat[0]
        return bytes(text).decode("utf-8", "replace"), float(score)

    async def say_farewell(self) -> None:
        """Have the detector forget a caller who went away, so that its place is free at once."""
        deadline = Deadline.after(_FAREWELL_SECONDS, asyncio.get_running_loop().time())
        try:
            await self._detect(replace(self._opening, deadline=deadline), bytes(2 * WINDOW), False, True)
        except GatewayError as error:
            _log.debug("the end of a conversation was not heard: %s", error.text)

    async def _detect(self, opening: Request, window: bytes, is_first: bool, is_last: bool) -> float:
        samples = np.frombuffer(window, "<i2").astype(np.float32) / _FULL_SCALE
        parameters = {
            "sequence_id": v2.InferParameter(int64_param=self._sequence),
            "sequence_start": v2.InferParameter(bool_param=is_first),
            "sequence_end": v2.InferParameter(bool_param=is_last),
        }
        body = build_request(self._detector, {"audio": samples[None]}, outputs=("speech",), parameters=parameters)
        request = replace(opening, metadata=self._own(opening.metadata), body=body)
        reply, took = await timed_infer(self._models, request)
        self.detecting.add(reply, took)
        speech = float(_output(parse_response(reply.body), "speech", "FP32", self._detector).flat[0])
        if not 0 <= speech <= 1:  # NaN too, which would be taken for silence
            raise WrongAnswer(f"'{shown(self._detector)}' answered {speech:g} as the probability of speech")
        return speech

    def _own(self, metadata: CallerMetadata) -> CallerMetadata:
        """For a request of the conversation's own sequence: its caller needs a right to the model, none to sequences.

        :raises UnknownModel: if he may not use the model.
        """
        if self._models.inference.current.seen_by(metadata.access).routes.lookup(self._detector) is None:
            raise UnknownModel(self._detector)
        return unchecked(metadata)


def _output(arrays: dict[str, tuple[str, Array]], name: str, datatype: str, model: str) -> Array:
    """:raises WrongAnswer: if the model has no such output, none of this datatype, or nothing in it."""
    found = arrays.get(name)
    if found is None or (not found[1].size and name != "audio"):
        raise WrongAnswer(f"'{shown(model)}' answered nothing as '{name}', so it is no model for this")
    if found[0] != datatype:
        raise WrongAnswer(f"'{shown(model)}' answers '{name}' as {found[0]} instead of {datatype}")
    return found[1]


def _spoken_body(model: str, text: str, speed: float) -> bytes:
    """:raises BadInput: if it can't be spoken."""
    if not text.strip():
        raise BadInput("text is empty; send an English sentence")
    if len(text) > _MOST_CHARACTERS:
        raise BadInput(f"text has {len(text)} characters; at most {_MOST_CHARACTERS} are spoken, so send it in parts")
    speed = speed or 1.0
    if not _SLOWEST <= speed <= _FASTEST:
        raise BadInput(f"speed is {speed:g}; it is from {_SLOWEST} (slow) to {_FASTEST:g} (fast), and 1 is usual")
    texts = np.array([text.encode()], np.object_)
    return build_request(model, {"text": texts, "speed": np.array([speed], np.float32)})
