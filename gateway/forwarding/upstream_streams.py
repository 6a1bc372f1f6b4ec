"""The upstream streams of one caller's ModelStreamInfer, and the request ids on them.

All messages of a caller that go to one endpoint for one model travel on one upstream stream, so that Triton sees the
requests of a sequence in order. Models do not share streams, since a Triton whose stream has requests of decoupled
models among others ends up answering nothing or crashing (seen with 2.51).

An answer names its request by id, so the ids under way on one stream differ. A caller's id goes to the model as it is:
a second request with the same id goes on another stream beside the first, so that a request that is meant to stop the
first one names it. Only a request without an id gets one here. An id gets a suffix if its stream has that id already,
which happens to requests of a sequence and to the fifth request at once with one id. The caller sees its own id.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container
from typing import Final

from gateway.forwarding.answer_order import OrderedRequest
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.exposures import Exposed
from gateway.forwarding.rolled import VariantCounts
from gateway.forwarding.shadowing import ModelShadow
from gateway.forwarding.work import Work
from gateway.hooks import CallObserver
from gateway.quotas import Quota
from gateway.status import Code, Origin, Verdict
from gateway.types import Metadata, Served
from gateway.upstream.connection import CallFailed, StreamCall
from gateway.upstream.endpoint import Endpoint
from gateway.v2.names import STREAM
from gateway.v2.peek import Head, StreamHead
from gateway.v2.repeats import StreamResponseHeads

_LANES: Final = 4
"""Upstream streams to one endpoint for one model, for requests that share an id and are under way at once."""

_MOST_OPEN: Final = 32
"""Upstream streams of one caller, beyond which idle ones are closed. Clients call a few models on one stream."""


class Message(OrderedRequest):
    """One request of the stream, until its last answer has been sent."""

    work: Work | None = None  # None for a pipeline
    attempt: Attempt | None = None
    answers = 0
    answer_bytes = 0
    served: Served | None = None
    asked: Served | None = None  # who was asked last, if the message has failed
    callers_fault = False  # the message failed by its caller's fault, although the code does not say so
    failed: tuple[CallFailed, Verdict] | None = None  # the first error among its answers that was not the last answer
    key = ""  # the id that it has upstream
    quota: Quota | None = None  # that it must leave
    shadows: tuple[ModelShadow, ...] = ()  # that get a copy of it once it is answered
    copied: bytes = b""  # the message, if there are shadows
    exposed: Exposed | None = None  # if its unit takes part in an experiment
    counted: VariantCounts | None = None  # of its variant, if its model has a rollout

    def __init__(self, body: bytes, head: Head, observer: CallObserver) -> None:
        self.body: bytes | None = body  # None once an answer has come: the message can't be sent again
        self.size = len(body)
        self.head = head
        self.id = head.id.partition("\0")[0]  # as a model's answer has it: Triton's core ends ids at a NUL
        self.observer = observer


StreamKey = tuple[Endpoint, str, int]
"""The endpoint, the Triton model, and the number of the lane beside others of the same two."""


class StreamOwner(ABC):
    """Hears what comes of its upstream streams."""

    @abstractmethod
    def answer_arrived(self, stream: UpstreamStream, body: bytes) -> bool:
        """A stream brings an answer. False: let no more come until `UpstreamStreams.resume`."""

    @abstractmethod
    def upstream_has_room(self, stream: UpstreamStream) -> None:
        """A stream takes messages again."""

    @abstractmethod
    def upstream_ended(self, stream: UpstreamStream, failure: CallFailed) -> None:
        """A stream has ended; messages that are still on it have no last answer."""


class UpstreamStream:
    """One upstream ModelStreamInfer and the messages that are under way on it."""

    __slots__ = ("_owner", "call", "endpoint", "heads", "key", "messages")

    def __init__(self, owner: StreamOwner, key: StreamKey, metadata: Metadata, timeout: float | None) -> None:
        self._owner = owner
        self.endpoint = key[0]
        self.key = key
        self.messages: dict[str, Message] = {}  # by the id that they have upstream
        self.heads = StreamResponseHeads()
        self.call: StreamCall = self.endpoint.connection.stream(STREAM, metadata, timeout, self)

    def add(self, message: Message, id: str | None) -> None:
        """Count a message as under way, and choose its id upstream. id: the one it should have, None for any."""
        message.key = _own_id(self.messages) if id is None else _distinct_id(id, self.messages)
        self.messages[message.key] = message
        self.endpoint.in_flight += 1

    def remove(self, message: Message) -> None:
        """The message is no longer under way here."""
        if self.messages.pop(message.key, None) is not None:
            self.endpoint.in_flight -= 1

    def maybe_message(self, head: StreamHead) -> Message | None:
        """The message that an answer with this head belongs to."""
        key = head.response.id if head.response else ""
        if not key and len(self.messages) == 1:  # an error that Triton could not attribute to a request
            return next(iter(self.messages.values()))
        return self.messages.get(key)

    # What the connection calls

    def message_arrived(self, body: bytes) -> bool:
        return self._owner.answer_arrived(self, body)

    def has_room(self) -> None:
        self._owner.upstream_has_room(self)

    def ended(self, failure: CallFailed | None) -> None:
        lost = CallFailed(Code.UNAVAILABLE, "the stream ended", origin=Origin.LOST)
        self._owner.upstream_ended(self, failure or lost)


class UpstreamStreams:
    """All upstream streams of one caller's stream."""

    __slots__ = ("_closing", "_full", "_open", "_owner", "_paused")

    def __init__(self, owner: StreamOwner) -> None:
        self._owner = owner
        self._open: dict[StreamKey, UpstreamStream] = {}
        self._closing: set[UpstreamStream] = set()  # streams that take no more messages and have not ended
        self._full: set[UpstreamStream] = set()  # streams that take no more messages now
        self._paused: set[UpstreamStream] = set()  # streams that were told to bring no more answers

    @property
    def have_room(self) -> bool:
        """Can every stream take a message now?"""
        return not self._full

    @property
    def any_paused(self) -> bool:
        return bool(self._paused)

    @property
    def have_ended(self) -> bool:
        return not self._open and not self._closing

    def all(self) -> tuple[UpstreamStream, ...]:
        """Those that have not ended."""
        return (*self._open.values(), *self._closing)

    def key_for(self, message: Message, work: Work, attempt: Attempt) -> StreamKey:
        """The first lane that has no request of the same id. A sequence keeps to one lane, whatever its ids are."""
        id, endpoint, model = message.id, attempt.endpoint, attempt.variant.model
        if id and work.sequence is None:
            for lane in range(_LANES):
                key = (endpoint, model, lane)
                stream = self._open.get(key)
                if stream is None or id not in stream.messages:
                    return key
        return (endpoint, model, 0)

    def maybe_open(self, key: StreamKey) -> UpstreamStream | None:
        """The open stream with this key."""
        return self._open.get(key)

    def begin(self, key: StreamKey, metadata: Metadata, timeout: float | None) -> UpstreamStream:
        """Open a stream. timeout: seconds that its call gets, None for any time."""
        if len(self._open) >= _MOST_OPEN:
            self._close_idle()
        stream = UpstreamStream(self._owner, key, metadata, timeout)
        self._open[key] = stream
        return stream

    def _close_idle(self) -> None:
        """Half-close idle streams: a caller may name any number of models on one stream, and none need exist."""
        for stream in [stream for stream in self._open.values() if not stream.messages]:
            stream.call.done_writing()  # the server then ends the stream
            del self._open[stream.key]
            self._closing.add(stream)

    def filled(self, stream: UpstreamStream) -> None:
        """The stream takes no more messages, until `has_room`."""
        self._full.add(stream)

    def has_room(self, stream: UpstreamStream) -> None:
        self._full.discard(stream)

    def pause(self, stream: UpstreamStream) -> None:
        """The stream was told to bring no more answers, until `resume`."""
        self._paused.add(stream)

    def is_paused(self, stream: UpstreamStream) -> bool:
        return stream in self._paused

    def resume(self, may_read: Callable[[UpstreamStream], bool]) -> None:
        """Let those paused streams bring answers again that may."""
        for stream in [stream for stream in self._paused if may_read(stream)]:
            self._paused.discard(stream)
            stream.call.feed()

    def done_writing(self) -> None:
        """Half-close every stream: each server then ends its stream."""
        for stream in self._open.values():
            stream.call.done_writing()

    def ended(self, stream: UpstreamStream) -> None:
        """Forget a stream that has ended."""
        self._closing.discard(stream)
        self._full.discard(stream)
        self._paused.discard(stream)
        if self._open.get(stream.key) is stream:
            del self._open[stream.key]

    def clear(self) -> None:
        self._open.clear()
        self._closing.clear()
        self._full.clear()
        self._paused.clear()


def _own_id(taken: Container[str]) -> str:
    """An id for a request that has none: a number, since some models read ids as numbers, that no other caller has."""
    while (id := str(random.getrandbits(62))) in taken:
        pass
    return id


def _distinct_id(id: str, taken: Collection[str]) -> str:
    """The id, or one that begins with it and is not taken. If the id is a number, so is the result."""
    mark = "" if id.isascii() and id.isdigit() else "-"
    distinct, count = id, max(len(taken), 1)
    while distinct in taken:
        distinct = f"{id}{mark}{count}"
        count += 1
    return distinct
