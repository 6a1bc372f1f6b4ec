"""Merging on the forwarded path: the wire side of `merge`, one point for each model on each endpoint.

A point learns from the model's own config whether and how far it batches. Until it knows, and for every request that
can't be merged, the request goes its way alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Protocol

from tritonclient.grpc import service_pb2 as pb

from gateway.bounded import make_room
from gateway.errors import GatewayError
from gateway.forward.channel import WireChannel
from gateway.infer.attempts import Attempt
from gateway.infer.correlation import with_own_id
from gateway.infer.inference import INFER
from gateway.merge import Batch, Layout, Layouts, Member, MergeLimits, Merger, MergeSettings
from gateway.server.ask import ask
from gateway.status import OK, Meaning, judge
from gateway.types import Metadata, Variant
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.wire.client import ClientCall
from gateway.wire.codes import CallFailed as WireFailed
from gateway.wire.fields import fields_from
from gateway.wire.messages import decompress
from gateway.wire.peek import Head, peek_response

_log = logging.getLogger(__name__)

_PATH: Final = INFER.encode()
_OWN_FAULT: Final = (Meaning.CALLER, Meaning.SERVER)  # what one member may have caused for all
_SPOILT_MOST: Final = 3  # batches that a caller may spoil …
_APART_SECONDS: Final = 10.0  # … before its requests go alone for so long
_SPOILERS_KEPT: Final = 1024  # callers come and go
_ASK_AGAIN_SECONDS: Final = 30.0  # after a model's config could not be had, or did not fit what was seen


class Mergeable(Member, Protocol):
    """A forwarded request at a merge point."""

    batch: Batch[Any] | None  # that it is in, once that is on its way; a Protocol can't name itself there
    added: Metadata  # by telemetry, for upstream: its place in a trace, if it is traced

    @property
    def upstream_id(self) -> str | None:
        """Names that place."""

    def rides(self, requests: int, carrier: Metadata) -> None:
        """It is traced, and one of so many that travel together, with what telemetry added for one of them."""

    def send_alone(self, ended: Callable[[bool], None]) -> None:
        """Put it on the wire as it is. ended: told once, with whether the request itself was at fault."""

    def answered(self, body: bytes, head: Head, client: ClientCall, members: int) -> None:
        """Its own answer, out of a batch of so many."""

    def failed(self, client: ClientCall) -> None:
        """The batch failed in a way that is nobody's fault here; it may be tried elsewhere."""


def merge_point(model: str, attempt: Attempt, channel: WireChannel, settings: MergeSettings) -> MergePoint:
    """The one where this attempt would be merged. model: the public one, whose settings these are."""
    variant, kept = attempt.variant, attempt.endpoint.kept
    key = (MergePoint, model, variant.model, variant.version)
    point: MergePoint | None = kept.get(key)
    if point is None or (point.settings is not settings and point.settings != settings):
        point = kept[key] = MergePoint(attempt.endpoint, channel, variant, settings)
    return point


class MergePoint:
    """Where requests for one model on one endpoint meet."""

    def __init__(self, endpoint: Endpoint, channel: WireChannel, variant: Variant, settings: MergeSettings) -> None:
        self._endpoint = endpoint
        self._channel = channel
        self._variant = variant
        self.settings = settings
        self._loop = asyncio.get_running_loop()
        self._requests = Layouts(pb.ModelInferRequest)
        self._answers = Layouts(pb.ModelInferResponse)
        self._merger: Merger[Mergeable] | None = None  # None while it is not known whether the model batches
        self._asking: asyncio.Task[None] | None = None
        self._ask_at = 0.0
        self._in_flight: dict[Batch[Mergeable], ClientCall] = {}
        self._spoilt: dict[Hashable, tuple[int, float]] = {}  # by caller: how often, and until when it goes alone

    def maybe_layout(self, body: bytes, head: Head, caller: Hashable) -> tuple[Layout, list[tuple[int, int]]] | None:
        """How a request can be merged; None if it must go alone."""
        merger = self._merger
        if merger is None:
            self._ask()
            return None
        if self._spoilt and self._is_apart(caller):
            return None
        found = self._requests.maybe_read(body, head)
        return found if found is not None and found[0].rows < merger.limits.rows else None

    def submit(self, member: Mergeable) -> None:
        """Send it, now or with others. Only after `maybe_layout` said how."""
        assert self._merger is not None  # noqa: S101  (there is a layout)
        self._merger.submit(member)

    # Batches

    def _send(self, batch: Batch[Mergeable]) -> None:
        merger = self._merger  # that counts it; by its end there may be another one
        if len(batch.members) == 1:
            batch.members[0].send_alone(lambda at_fault: self._ended(batch, merger))
            return
        leader = next((member for member in batch.members if member.added), None)
        client = self._channel.call(_PATH, fields_from(leader.added) if leader is not None else ())
        id = leader.upstream_id or "" if leader is not None else ""
        client.request = batch.request(self._variant.model, self._variant.version, id)
        client.on_done = lambda done: self._done(batch, merger, done, id)
        self._in_flight[batch] = client
        for member in batch.members:
            member.batch = batch
            if leader is not None and member.added:
                member.rides(len(batch.members), leader.added)
        self._channel.submit(client)

    def left(self, batch: Batch[Mergeable]) -> None:
        """A member's caller has gone. When all have, nobody waits for the answer."""
        client = self._in_flight.get(batch)
        if client is not None and batch.is_abandoned:
            client.cancel()

    def _done(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None, client: ClientCall, id: str) -> None:
        del self._in_flight[batch]
        for member in batch.members:
            member.batch = None
        if id:
            client.text = with_own_id(client.text, id, "")  # it is one member's, and none of the others' business
        try:
            if client.code is OK:
                self._hand_out(batch, client)
            else:
                self._refused(batch, client)
        finally:
            self._ended(batch, merger)

    def _hand_out(self, batch: Batch[Mergeable], client: ClientCall) -> None:
        body = client.body
        try:
            if client.compressed:
                body = decompress(body, client.encoding, client.connection.limits)
            head = peek_response(body)
            found = self._answers.maybe_read(body, head)
        except (GatewayError, WireFailed):
            found = None
        if found is None or found[0].rows != batch.rows:
            # An output without the batch axis: this model can't be merged after all.
            _log.warning("model %s: its answers can't be taken apart; its requests go alone", self._variant.model)
            self._stop()
            self._one_by_one(batch.members)
            return
        layout, spans = found
        answers = batch.answers(body, head, layout, spans)
        for member, answer in zip(batch.members, answers, strict=True):
            if not member.is_over:
                member.answered(answer, head, client, len(batch.members))

    def _refused(self, batch: Batch[Mergeable], client: ClientCall) -> None:
        verdict = judge(client.code, client.text, client.origin)
        if verdict.meaning in _OWN_FAULT:
            self._one_by_one(batch.members)
            return
        for member in batch.members:
            if not member.is_over:
                member.failed(client)

    def _one_by_one(self, members: Sequence[Mergeable]) -> None:
        """Send the members of a batch that was refused on their own: whose fault it was shows in their own answers."""
        for member in members:
            if not member.is_over:
                member.send_alone(self._judge_alone(member))

    def _judge_alone(self, member: Mergeable) -> Callable[[bool], None]:
        caller = member.caller

        def ended(at_fault: bool) -> None:
            count, until = self._spoilt.get(caller, (0, 0.0))
            if at_fault:
                count += 1
                if count >= _SPOILT_MOST:
                    until = self._loop.time() + _APART_SECONDS
                if caller not in self._spoilt:
                    make_room(self._spoilt, _SPOILERS_KEPT)
                self._spoilt[caller] = (count, until)

        return ended

    def _is_apart(self, caller: Hashable) -> bool:
        count, until = self._spoilt.get(caller, (0, 0.0))
        if count < _SPOILT_MOST:
            return False
        if self._loop.time() < until:
            return True
        del self._spoilt[caller]
        return False

    def _ended(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None) -> None:
        if merger is not None and merger is self._merger:
            merger.ended(batch, self._loop.time())

    # The model's config

    def _ask(self) -> None:
        if self._asking is None and self._loop.time() >= self._ask_at:
            self._asking = self._loop.create_task(self._learn())

    async def _learn(self) -> None:
        request = pb.ModelConfigRequest(name=self._variant.model, version=self._variant.version)
        try:
            config = (await ask(self._endpoint, "ModelConfig", request, pb.ModelConfigResponse)).config
        except CallFailed as failure:
            _log.info("model %s: its config can't be had, so nothing is merged: %s", self._variant.model, failure)
            self._stop()
            return
        finally:
            self._asking = None
        stateful = config.HasField("sequence_batching") or config.model_transaction_policy.decoupled
        rows = min(config.max_batch_size, self.settings.rows or config.max_batch_size)
        if stateful or rows < 2:
            self._ask_at = self._loop.time() + _ASK_AGAIN_SECONDS
            return
        limits = MergeLimits(rows, self.settings.bytes, self.settings.in_flight, self.settings.delay)
        self._merger = Merger(limits, self._loop.time(), self._send, self._loop.call_later, self._loop.call_soon)

    def _stop(self) -> None:
        """Merge nothing for a while. What waits goes alone."""
        self._ask_at = self._loop.time() + _ASK_AGAIN_SECONDS
        merger, self._merger = self._merger, None
        if merger is not None:
            for member in merger.abandon():
                member.send_alone(lambda at_fault: None)
